#!/usr/bin/env bash
# One would guess: add_weighted_adapter of a single LoRA at weight 1 returns that LoRA, at least by `cat`, which stacks.
# What happens: with `use_rslora=True` the new adapter is sqrt(r) times too strong by every way of combining: the scale
# alpha/sqrt(r) is used when the factors are combined, and applied once more by the new adapter, which is made with alpha = r.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: r 16, one LoRA, weight 1: 4.0 by linear, cat, svd; without use_rslora 1.0 by all three.
# Why it matters: rank-stabilised LoRAs of vision models cannot be merged with peft as they are; a sweep over the weights
# finds another optimum for them and hides it.
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
seen = {}
for stabilised in (False, True):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=16, lora_alpha=16, use_rslora=stabilised, init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 48)), config)
    layer = model.base_model.model[0]
    target = layer.get_delta_weight("default").detach()
    for kind in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        seen[stabilised, kind] = round(float((layer.get_delta_weight(kind).detach() * target).sum() / target.pow(2).sum()), 2)
print(seen)
if any(v != (4.0 if k[0] else 1.0) for k, v in seen.items()):
    sys.exit("changed: strength of a single rank-stabilised LoRA after add_weighted_adapter")
print("as seen: sqrt(16) = 4 times too strong with use_rslora, right without")
EOF
