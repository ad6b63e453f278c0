#!/usr/bin/env bash
# One would guess: a LoRA that peft puts on an nn.MultiheadAttention (the attention of open_clip) changes its in and out
# projections by alpha/r * B A, each once.
# What happens: that of the out projection counts twice, in the forward pass and in what `merge_and_unload` leaves; that of
# the in projection counts once. Both agree with each other, so comparing the merged model with the unmerged one shows nothing.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: strength of the in projection's LoRA 1.0, of the out projection's 2.0; merged against unmerged outputs: equal.
# Why it matters: the file says alpha and r; who reads it by these numbers (another library, another class of the same CLIP)
# gets half of the change of the out projections that the adapter was trained with.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from peft import LoraConfig, get_peft_model

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]

torch.manual_seed(0)
model, x = Block().eval(), torch.randn(2, 5, 16)
before = [t.detach().clone() for t in (model.attn.in_proj_weight, model.attn.out_proj.weight)]
adapted = get_peft_model(model, LoraConfig(target_modules=["attn"], r=2, lora_alpha=2, init_lora_weights=False)).eval()
state = {k: v.detach().clone() for k, v in adapted.named_parameters()}
at = "base_model.model.attn."
pairs = [[state[f"{at}{part}lora_{side}.default.weight"] for side in "BA"] for part in ("", "base_layer.out_proj.")]
with torch.no_grad():
    unmerged = adapted(x)
    merged = adapted.merge_and_unload()
    gap = float((merged(x) - unmerged).abs().max())
after = (merged.attn.in_proj_weight, merged.attn.out_proj.weight)
strength = [round(float(((new - old) * (B @ A)).sum() / (B @ A).pow(2).sum()), 2) for new, old, (B, A) in zip(after, before, pairs)]
print(dict(zip(("in_proj", "out_proj"), strength)), "merged against unmerged:", gap)
if strength != [1.0, 2.0] or gap > 1e-5:
    sys.exit("changed: how often a LoRA of MultiheadAttention counts")
print("as seen: the out projection's LoRA counts twice")
EOF
