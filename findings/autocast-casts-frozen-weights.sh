#!/usr/bin/env bash
# One would guess: under torch.autocast a weight is cast to bfloat16 once and kept until the block ends, the more so if it is frozen and cannot change. Fine-tuning a LoRA on a
# frozen model would then cast its large matrices once.
# What happens: the cache takes only leaves that require a gradient. A frozen weight is cast anew at every use: freezing a model makes autocast copy more, not less.
# Versions: torch 2.13.0 (CPU).
# Seen: four passes through two layers of 64 x 64 in one block cast 2 matrices if they learn, and 8 if they are frozen (one for each use). A weight that is bfloat16 already is never cast and gives the same bits.
# Why it matters: with a LoRA, in prompt tuning or in optimising pixels all weights of the backbone are frozen, and a ViT-B/16 copies its 86 million numbers in each step; round them
# once before the loop.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

class CountsCasts(TorchDispatchMode):
    "Matrices of 64 x 64 that become bfloat16"
    seen = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16
        self.seen += cast and tuple(made.shape) == (64, 64)
        return made

def count_casts(learns, rounded=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(learns)
    net = net.bfloat16() if rounded else net
    pixels = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), CountsCasts() as counter:
        for _ in range(4):
            out = net(pixels)
    return counter.seen, out.detach()

learning, first = count_casts(True)
frozen, second = count_casts(False)
rounded, third = count_casts(False, rounded=True)
print(f"casts of a matrix in 4 passes through 2 layers: {learning} if they learn, {frozen} if frozen, {rounded} if rounded before")
if (learning, frozen, rounded) != (2, 8, 0) or not torch.equal(first, second) or not torch.equal(second, third):
    sys.exit("changed: what the cache of autocast keeps")
print("as seen: autocast keeps the casts of weights that learn, and casts frozen ones at every use")
EOF
