#!/usr/bin/env bash
# One would guess: torch.func.functional_call(model, parameters, x) runs the model with the parameters it is given, and
# parametrize.cached() only saves computing a parametrised weight twice.
# What happens: within `with parametrize.cached():` the weight is kept by module, not by the parameters it came from. The
# first functional_call decides; every later one in the block gives that one's answer whatever LoRA it is handed, and the
# gradient with respect to the LoRA it was handed is None.
# Versions: torch 2.13.0 (CPU).
# Seen: three LoRAs by parametrisation, one after another: outputs differ by more than 100 % without the cache, by 0.0 in
# one cached block; with a block around each call they are right. An optimiser step in a block is not seen by it either.
# Why it matters: a market of LoRAs or an inner loop that is evaluated in one cached block is the first LoRA many times
# over, and adaptation seems to do nothing. Put the block around one forward pass with one set of parameters.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from torch.func import functional_call
from torch.nn.utils import parametrize

class Lora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(2, 16)), torch.nn.Parameter(torch.randn(16, 2))
    def forward(self, weight):
        return weight + self.b @ self.a

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).requires_grad_(False)
parametrize.register_parametrization(model[0], "weight", Lora())
names = [n for n, p in model.named_parameters() if p.requires_grad]
market = [{n: torch.randn_like(model.get_parameter(n)).requires_grad_() for n in names} for _ in range(3)]
x = torch.randn(8, 16)
apart = lambda outputs: max(((o - outputs[0]).norm() / outputs[0].norm()).item() for o in outputs[1:])

def call_in_own_block(lora):
    with parametrize.cached():
        return functional_call(model, lora, (x,))

free = [functional_call(model, lora, (x,)) for lora in market]
own = [call_in_own_block(lora) for lora in market]
with parametrize.cached():
    cached = [functional_call(model, lora, (x,)) for lora in market]
gradients = [torch.autograd.grad(o.sum(), list(lora.values()), allow_unused=True, retain_graph=True) for o, lora in zip(cached, market)]
learns = [all(g is not None for g in found) for found in gradients]
with torch.no_grad(), parametrize.cached():
    before = model(x)
    for n in names:
        model.get_parameter(n).mul_(2.0)  # what an optimiser does: the parameter changes in place
    after = model(x)
after_block = model(x)
right = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(free, own))
print(f"outputs of three LoRAs differ by: no cache {apart(free):.2g}, one block {apart(cached):.2g}, own blocks equal to no cache: {right}")
print("gradients reach the LoRA that was handed over, in one block:", learns)
print(f"parameters doubled in a block: output moves by {apart([before, after]):.2g} inside, {apart([before, after_block]):.2g} after it")
if not (apart(free) > 0.5 and right and apart(cached) == 0 and learns == [True, False, False]
        and apart([before, after]) == 0 and apart([before, after_block]) > 0.1):
    sys.exit("changed: functional_call within parametrize.cached()")
print("as seen: in a cached block every LoRA gives the output of the first")
EOF
