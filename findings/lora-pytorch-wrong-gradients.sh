#!/usr/bin/env bash
# One would guess: a library that puts LoRAs into a network computes their gradients right; autograd does that by itself.
# What happens: lora-pytorch runs every frozen layer without gradient tracking instead of freezing its weights. Gradients
# reach earlier layers through the LoRA branches and skip connections only, never through the frozen weights: all LoRAs
# but those of the last layer get a wrong gradient, of exactly 0 at the start in a plain stack, as does the input.
# Versions: lora-pytorch 0.2.0, torch 2.13.0 (CPU).
# Seen: three linear layers: gradient against finite differences: last layer equal, first layer and input far off; with
# fresh LoRAs the first layer's gradient is 0.
# Why it matters: training goes down all the same through the last layer; and inversion (the gradient of an image through
# the adapted network) follows a direction that is not the gradient. Compare with finite differences once.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 lora-pytorch==0.2.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from torch import nn
from lora_pytorch import LoRA
def net():
    torch.manual_seed(0)
    return LoRA.from_module(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), rank=2).double()
x = torch.randn(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
fresh = net()
fresh(x).sum().backward()
factors = lambda m: {n: p for n, p in m.named_parameters() if "lora_module" in n}
at_start = max(float(p.grad.abs().max()) for n, p in factors(fresh).items() if ".0." in n)
model, seen = net(), {}
for p in factors(model).values():
    nn.init.normal_(p, std=0.3)
x.grad = None
model(x).pow(2).sum().backward()
for name, p in [*factors(model).items(), ("input", x)]:
    direction, h = p.grad / p.grad.norm(), 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            p.add_(sign * h * direction)
            values.append(float(model(x).pow(2).sum()))
            p.sub_(sign * h * direction)
    seen[name] = float(p.grad.norm()) / ((values[0] - values[1]) / (2 * h))
    print(f"{name}: gradient by autograd / by finite differences along it = {seen[name]:.3f}")
last = [v for n, v in seen.items() if ".4." in n]
wrong = [v for n, v in seen.items() if ".4." not in n]
print("largest first-layer gradient of fresh LoRAs:", at_start)
if at_start != 0 or any(abs(v - 1) > 1e-3 for v in last) or any(abs(v - 1) < 0.05 for v in wrong):
    sys.exit("changed: gradients of lora-pytorch")
print("as seen: only the last layer's gradients are right")
EOF
