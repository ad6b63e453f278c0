#!/usr/bin/env bash
# One would guess: the average (weights 0.5 and 0.5) of a LoRA and its exact copy is that LoRA, whatever the way of merging.
# What happens: peft's add_weighted_adapter combines the two factors of a LoRA apart, with square roots of the weights on
# each. Two equal LoRAs come out twice as strong by `linear` and `magnitude_prune` (as many times as there are copies), and
# half as strong by `ties`; only `cat` and `svd` return the LoRA.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: strength of the average against the LoRA: linear 2.0, magnitude_prune 2.0, ties 0.5, cat 1.0, svd 1.0.
# Why it matters: similar LoRAs of one market are averaged too strongly in proportion to their likeness, so `linear`
# against `svd` compares strengths, not directions. A copy of one LoRA is a one-minute check of any merging code.
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
config = LoraConfig(target_modules=["0"], r=4, lora_alpha=4, init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 24)), config)
model.add_adapter("copy", config)
layer = model.base_model.model[0]
with torch.no_grad():
    for factors in (layer.lora_A, layer.lora_B):
        factors["copy"].weight.copy_(factors["default"].weight)
target = layer.get_delta_weight("default").detach()
seen = {}
for kind in ("linear", "magnitude_prune", "ties", "cat", "svd"):
    density = {"density": 1.0} if kind in ("magnitude_prune", "ties") else {}
    model.add_weighted_adapter(["default", "copy"], [0.5, 0.5], kind, combination_type=kind, **density)
    seen[kind] = round(float((layer.get_delta_weight(kind).detach() * target).sum() / target.pow(2).sum()), 3)
print(seen)
if seen != {"linear": 2.0, "magnitude_prune": 2.0, "ties": 0.5, "cat": 1.0, "svd": 1.0}:
    sys.exit("changed: strength of the average of two equal LoRAs")
print("as seen: the average of two equal LoRAs is 2, 2, 0.5, 1 and 1 times the LoRA")
EOF
