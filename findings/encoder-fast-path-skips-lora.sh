#!/usr/bin/env bash
# One would guess: a peft LoRA on linear1 and linear2 of torch's nn.TransformerEncoderLayer acts in eval mode as it does in
# training mode.
# What happens: in eval mode the layer takes a fused path that reads linear1.weight and linear2.weight directly, so the
# LoRA is left out, whether or not gradients are on: the frozen weights make the layer think that no gradient is needed.
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0.
# Seen: effect of the LoRA on the output: train mode (dropout 0) above 0.1, eval mode 0.0, eval mode with
# torch.backends.mha.set_fastpath_enabled(False) as in train mode.
# Why it matters: a small ViT from torch's own layers learns with a LoRA, then tests as if it had none; prototypes and
# features taken in eval mode are those of the base.
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
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
encoder = torch.nn.TransformerEncoder(layer, 2).eval()
x = torch.randn(2, 5, 16)
base = encoder(x).detach()
model = get_peft_model(encoder, LoraConfig(target_modules=["linear1", "linear2"], r=2, init_lora_weights=False))
effect = lambda: round(float((model(x).detach() - base).norm() / base.norm()), 4)
seen = {"train": (model.train(), effect())[1], "eval": (model.eval(), effect())[1]}
torch.backends.mha.set_fastpath_enabled(False)
seen["eval, no fast path"] = effect()
print(seen)
if not (seen["train"] > 0.1 and seen["eval"] == 0 and abs(seen["train"] - seen["eval, no fast path"]) < 1e-3):
    sys.exit("changed: LoRA inside nn.TransformerEncoderLayer in eval mode")
print("as seen: the fast path leaves the LoRA out")
EOF
