#!/usr/bin/env bash
# One would guess: merge_and_unload puts the LoRA into the weights of a model quantised by quanto, to within a step of the
# quantiser, or raises as it does for other quantisers that it cannot merge into.
# What happens: quanto's weight takes `+=` and stays as it was. The merged model is the base model to the last bit, with
# safe_merge as well, for LoRA and for DoRA; no error, no warning. (quanto's layer is an nn.Linear, so peft treats it as one.)
# Versions: optimum-quanto 0.2.7, peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: the LoRA moves the output by more than its size; after merging the output is that of the base model (difference 0.0).
# The other way round, merged first and quantised then, the output is off by 0.9 %.
# Why it matters: the merged model scores like the backbone, which reads as "the LoRA taught nothing".
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
"$tmp/venv/bin/pip" install -q --no-compile --no-deps optimum-quanto==0.2.7
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig, get_peft_model

def build(quantised):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)).eval()
    return quantised_model(model) if quantised else model

def quantised_model(model):
    quantize(model, weights=qint8)
    freeze(model)
    return model

def adapt(model, dora):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False, use_dora=dora)).eval()

off = lambda a, b: float((a - b).norm() / b.norm())
x = torch.randn(16, 64)
good = True
with torch.no_grad():
    for dora in (False, True):
        for safe in (False, True):
            base = build(True)(x)
            model = adapt(build(True), dora)
            adapted = model(x)
            merged = model.merge_and_unload(safe_merge=safe)(x)
            first = quantised_model(adapt(build(False), dora).merge_and_unload())(x)
            print(f"dora {dora}, safe_merge {safe}: the adapter moves the output by {off(adapted, base):.2f}; merged model against the base "
                  f"model {off(merged, base)}, against the adapted one {off(merged, adapted):.2f}; merged first {off(first, adapted):.3f}")
            good &= off(adapted, base) > 1 and off(merged, base) == 0 and off(first, adapted) < 0.05
if not good:
    sys.exit("changed: merging into a model quantised by quanto")
print("as seen: the merged model is the base model")
EOF
