#!/usr/bin/env bash
# One would guess: a model that is in eval mode stays so when an adapter is put into it; features are then repeatable.
# What happens: get_peft_model and inject_adapter_in_model add LoRA dropout layers in training mode to a model in eval
# mode. `model.training` still says False, but two passes over one image differ. PeftModel.from_pretrained does call eval.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: ViT of random weights, trained-looking LoRA, dropout 0.5: two passes differ by more than 10 %; after a further
# .eval() by 0; through from_pretrained by 0.
# Why it matters: inject_adapter_in_model plus set_peft_model_state_dict is the usual way to put a LoRA into a bare vision
# model; prototypes and features are then noisy, and the mode flag on the model tells nothing.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, tempfile, warnings, torch
from transformers import ViTConfig, ViTModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
warnings.simplefilter("ignore")
torch.manual_seed(0)
vit = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
base = ViTModel(vit).eval()
weights = {k: v.clone() for k, v in base.state_dict().items()}
def fresh():
    model = ViTModel(vit).eval()
    model.load_state_dict(weights)
    return model
config = dict(target_modules=r".*(query|q_proj|value|v_proj)", r=4, lora_dropout=0.5)
x = torch.randn(2, 3, 32, 32)
@torch.no_grad()
def spread(model):
    a, b = (model(pixel_values=x).last_hidden_state for _ in range(2))
    return float((a - b).norm() / a.norm())

wrapped = get_peft_model(base, LoraConfig(init_lora_weights=False, **config))
for name, p in wrapped.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(p, std=0.5)
folder = tempfile.mkdtemp()
wrapped.save_pretrained(folder)
injected = fresh()
inject_adapter_in_model(LoraConfig(**config), injected)
set_peft_model_state_dict(injected, get_peft_model_state_dict(wrapped))
first = spread(injected), spread(wrapped)
flag = injected.training
after = spread(injected.eval()), spread(wrapped.eval())
loaded = spread(PeftModel.from_pretrained(fresh(), folder))
print(f"training flag {flag}; two passes differ by {first[0]:.2f} (injected), {first[1]:.2f} (wrapped); after eval {after}; from_pretrained {loaded}")
if flag or min(first) < 0.05 or max(after) > 0 or loaded > 0:
    sys.exit("changed: dropout of a LoRA put into an eval-mode model")
print("as seen: LoRA dropout is active in a model that was in eval mode")
EOF
