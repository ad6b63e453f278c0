#!/usr/bin/env bash
# One would guess: augmentations that are modules of a model are switched off by `model.eval()`, as dropout is.
# What happens: kornia's random augmentations go on in eval mode, alone and inside a Sequential with a network; torch's dropout
# beside them stops.
# Versions: kornia 0.9.0, torch 2.13.0 (CPU).
# Seen: the same images through `nn.Sequential(RandomAffine, RandomHorizontalFlip, RandomErasing, Dropout, Linear)` in eval mode
# twice: other outputs each time, with each of nine augmentations that were tried alone, too.
# Why it matters: put in front of a backbone ("augment on the device"), they turn and cut the support images of every test task:
# prototypes, and accuracies, change from run to run. Keep them outside of the model, or skip them by `if self.training`.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 kornia==0.9.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
import kornia.augmentation as K
from torch import nn

torch.manual_seed(0)
images = torch.rand(8, 3, 32, 32)
torch.set_grad_enabled(False)
tried = [
    K.RandomAffine(30.0, p=1.0), K.RandomHorizontalFlip(0.5), K.RandomErasing(p=0.5), K.RandomResizedCrop((32, 32)),
    K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0), K.RandomGaussianNoise(p=1.0), K.RandomRotation(30.0, p=1.0),
    K.RandomPerspective(0.5, p=1.0), K.RandomGrayscale(p=0.5),
]
moves = []
for module in tried:
    module.eval()
    passes = [module(images) for _ in range(4)]
    moves.append(max(float((p - passes[0]).abs().max()) for p in passes[1:]))
    print(f"{type(module).__name__} in eval mode: outputs of the same images differ by up to {moves[-1]:.2f}")
model = nn.Sequential(*tried[:3], nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 5)).eval()
whole = float((model(images) - model(images)).abs().max())
still = float((model[3:](images) - model[3:](images)).abs().max())
print(f"inside a model in eval mode: {whole:.2f}; the model without them, dropout included: {still:.2f}")
if not (min(moves) > 0.01 and whole > 0.01 and still == 0):
    sys.exit("changed: kornia's augmentations are no longer random in eval mode")
print("as seen: model.eval() does not switch kornia's augmentations off")
EOF
