#!/usr/bin/env bash
# One would guess: giving NGOpt bounds for the weights narrows the search, and the method stays a random one; LoraHub-like
# recipes set bounds of -1.5 and 1.5 and a budget of 40 for any number of LoRAs.
# What happens: with bounds NGOpt picks COBYLA, which first moves one weight at a time by a fixed step. With more LoRAs than
# budget it ends there: most weights keep their start value, and another seed gives the same run.
# Versions: nevergrad 1.0.12, scipy 1.17.1, numpy 2.4.6.
# Seen: 100 weights, budget 40: bounded: Cobyla, at most one weight changes per step, 61 weights never touched, three
# seeds equal; without bounds another method that moves all weights at once and differs by seed.
# Why it matters: "40 evaluations of black-box search" is then one step for each of 39 LoRAs; the other 61 are never tried.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile nevergrad==1.0.12 scipy==1.17.1 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, warnings
import numpy as np
import nevergrad as ng
warnings.simplefilter("ignore")
def search(seed, **bounds):
    weights = ng.p.Array(init=np.zeros(100), **bounds)
    weights.random_state.seed(seed)
    optimizer = ng.optimizers.NGOpt(parametrization=weights, budget=40)
    tried = []
    def loss(x):
        tried.append(x.copy())
        return float(np.sum((x - 0.4) ** 2))
    optimizer.minimize(loss)
    tried = np.array(tried)
    return optimizer.optim.name, int((tried[1:] != tried[:-1]).sum(1).max()), int((tried == tried[0]).all(0).sum()), tried
bounded = [search(s, lower=-1.5, upper=1.5) for s in range(3)]
free = [search(s) for s in range(2)]
same = lambda runs: all(np.array_equal(r[3], runs[0][3]) for r in runs)
for label, runs in (("bounded", bounded), ("free", free)):
    print(f"{label}: {runs[0][0]}, most weights changed in a step {runs[0][1]}, never touched {runs[0][2]}, seeds equal {same(runs)}")
if not (bounded[0][0] == "Cobyla" and bounded[0][1] == 1 and bounded[0][2] == 61 and same(bounded)
        and free[0][0] != "Cobyla" and free[0][1] > 50 and not same(free)):
    sys.exit("changed: what NGOpt does with bounds, 100 weights and a budget of 40")
print("as seen: bounds turn NGOpt into a sweep of one weight at a time")
EOF
