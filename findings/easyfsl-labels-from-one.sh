#!/usr/bin/env bash
# One would guess: a few-shot classifier takes the support labels it is given, such as the class numbers 3, 7 and 9 of the
# data set, or refuses them.
# What happens: easyfsl's process_support_set counts the different labels and averages those called 0, 1, 2 ...: a class
# with another number is dropped, the empty one gets a prototype of NaN, and every query is answered with class 0.
# Versions: easyfsl 1.5.0, torch 2.13.0 (CPU).
# Seen: five well-separated classes, labels 0 to 4: accuracy 1.0; labels 1 to 5: one prototype of NaN, every prediction
# is index 0, no error and no warning.
# Why it matters: its own task sampler renumbers the labels, one's own loader of LoRA features does not; accuracy at
# chance then looks like a bad backbone.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 easyfsl==1.5.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
try:
    import torchvision
except RuntimeError:  # CPU build of torch beside a CUDA build of torchvision: name the two operators it misses; unused here
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    ops = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        ops.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import warnings
from easyfsl.methods import PrototypicalNetworks
torch.manual_seed(0)
labels = torch.arange(5).repeat_interleave(4)
points = torch.eye(5)[labels] * 10 + torch.randn(20, 5)
seen = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for start in (0, 1):
        model = PrototypicalNetworks(backbone=torch.nn.Identity())
        model.process_support_set(points, labels + start)
        predictions = model(points).argmax(1)
        seen[start] = int(model.prototypes.isnan().any(1).sum()), sorted(set(predictions.tolist())), float((predictions == labels).float().mean())
        print(f"labels from {start}: prototypes of NaN {seen[start][0]}, indices predicted {seen[start][1]}, accuracy {seen[start][2]:.2f}")
if seen[0] != (0, [0, 1, 2, 3, 4], 1.0) or seen[1][:2] != (1, [0]) or caught:
    sys.exit("changed: easyfsl with labels that do not start at 0")
print("as seen: labels from 1 give NaN and always class 0, silently")
EOF
