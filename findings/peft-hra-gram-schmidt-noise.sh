#!/usr/bin/env bash
# One would guess: a new HRA adapter (Householder reflections) leaves the model as it is, with Gram-Schmidt orthogonalisation
# (apply_GS=True) as without it.
# What happens: the reflections start in equal pairs, so that each pair undoes itself. Gram-Schmidt makes the second of a pair
# orthogonal to the first: what is left of it is rounding noise, which is brought to length one. The new adapter reflects
# the weights in random directions that depend on the precision, and its gradient is divided by the size of that noise.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen (64 inputs, r 4): the untrained adapter changes the output by 61 % (float32) and 52 % (float64) of its size, without
# Gram-Schmidt by less than 0.0001 %; the gradient is 1e7 times as long in float32, 1e16 times in float64.
# Why it matters: training starts from a spoiled backbone; a saved adapter is another one in bfloat16; clipping or a plain
# gradient step sees nothing but noise. Neither the loss nor a warning tells. init_weights=False has no pairs.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from peft import HRAConfig, get_peft_model

def start(dtype, **options):
    """Relative change of the output by the untrained adapter, and length of its gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)).to(dtype).eval()
    x = torch.randn(16, 64).to(dtype)
    before = model(x).detach()
    torch.manual_seed(1)
    model = get_peft_model(model, HRAConfig(target_modules=["0"], r=4, **options))
    after = model(x)
    learned = [p for p in model.parameters() if p.requires_grad]
    (gradient,) = torch.autograd.grad(after.pow(2).sum(), learned)
    return float((after.detach() - before).norm() / before.norm()), float(gradient.norm())

for dtype, factor in ((torch.float32, 1e5), (torch.float64, 1e13)):
    plain, schmidt = start(dtype), start(dtype, apply_GS=True)
    free = [start(dtype, init_weights=False, apply_GS=gs) for gs in (False, True)]
    print(f"{dtype}: change by the untrained adapter {plain[0]:.1g}, with Gram-Schmidt {schmidt[0]:.2f}; gradient {plain[1]:.1f}, "
          f"with Gram-Schmidt {schmidt[1]:.1g}; gradients without pairs {free[0][1]:.1f} and {free[1][1]:.1f}")
    if not (plain[0] < 1e-5 and schmidt[0] > 0.1 and schmidt[1] > factor * plain[1] and free[1][1] < 100 * plain[1]):
        sys.exit("changed: the start of HRA with Gram-Schmidt")
print("as seen: with Gram-Schmidt HRA starts from normalised rounding noise")
EOF
