#!/usr/bin/env bash
# One would guess: higher's differentiable copy of an optimiser takes the steps that the optimiser takes, or refuses (as it does
# for AdamW, which it does not know).
# What happens: options that torch's optimisers got after 2020 are not looked at. With maximize=True the copy goes down where
# the optimiser goes up; Adam with decoupled_weight_decay=True, which is AdamW, becomes Adam with an L2 penalty.
# Versions: higher 0.2.1, torch 2.13.0 (CPU).
# Seen: loss 1.15, after 20 steps with maximize by higher 0.5, by torch 4e5 (SGD), 154 (Adam), 44 (Adagrad), 74 (Adamax);
# higher's parameters are those of torch without maximize. Adam with decoupled decay: those of Adam with L2, to 6e-7.
# Why it matters: an inner loop that should make images hard (adversarial inversion, hard support sets) makes them easy, and its
# loss looks as healthy as ever. Change the sign of the loss; compare one inner step with the optimiser's own.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 higher==0.2.1
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import copy, sys, torch, higher

def steps(kind, options, torch_options=None):
    """Loss at the start, after higher's steps and after torch's; greatest difference of the parameters."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    model = torch.nn.Linear(4, 2)
    other = copy.deepcopy(model)
    loss = lambda m: (m(x) - y).pow(2).mean()
    start = loss(model).item()
    with higher.innerloop_ctx(model, kind(model.parameters(), lr=0.2, **options)) as (inner, optimiser):
        for _ in range(20):
            optimiser.step(loss(inner))
        by_higher, found = loss(inner).item(), [p.detach() for p in inner.parameters()]
    optimiser = kind(other.parameters(), lr=0.2, **(options if torch_options is None else torch_options))
    for _ in range(20):
        optimiser.zero_grad()
        loss(other).backward()
        optimiser.step()
    gap = max((a - b).abs().max().item() for a, b in zip(found, other.parameters()))
    return start, by_higher, loss(other).item(), gap

good = True
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.Adamax):
    start, mine, theirs, _ = steps(kind, {"maximize": True})
    plain = steps(kind, {"maximize": True}, {})[3]
    print(f"{kind.__name__}, maximize: loss {start:.2f}, by higher {mine:.2f}, by torch {theirs:.3g}; higher against torch's minimising {plain:.1g}")
    good &= mine < start < theirs and plain < 1e-3
decoupled = {"weight_decay": 0.5, "decoupled_weight_decay": True}
itself, as_l2 = steps(torch.optim.Adam, decoupled)[3], steps(torch.optim.Adam, decoupled, {"weight_decay": 0.5})[3]
print(f"Adam, decoupled decay: parameters of higher against torch's {itself:.2f}, against Adam with L2 {as_l2:.1g}")
good &= itself > 0.02 and as_l2 < 1e-3
try:
    steps(torch.optim.AdamW, {})
    known = True
except ValueError as error:
    known = False
    print("AdamW:", error)
if not good or known:
    sys.exit("changed: the options that higher looks at")
print("as seen: higher minimises with maximize=True and has no decoupled decay")
EOF
