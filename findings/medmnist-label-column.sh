#!/usr/bin/env bash
# One would guess: a MedMNIST data set yields an image and a class number, as torchvision's MNIST does.
# What happens: the label is an array of one element, so a batch of labels is a column. `pred == label` then compares every
# prediction with every label, and its mean is a number between 0 and 1 that looks like an accuracy.
# Versions: medmnist 3.0.2, torch 2.13.0 (CPU).
# Seen: BreastMNIST's layout with made-up pictures, 156 test images, predictions equal to the labels: (pred == label).mean()
# gives about 0.56 instead of 1.0; flattened labels give 1.0. The same with numpy on `dataset.labels`.
# Why it matters: medical targets of few-shot tables; a wrong accuracy near the share of the larger class is taken for a
# poor LoRA. (Cross entropy complains, nearest prototypes do not.)
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 medmnist==3.0.2
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
import tempfile
import numpy as np
import medmnist
from torchvision.transforms import ToTensor
folder, rng, arrays = tempfile.mkdtemp(), np.random.default_rng(0), {}
for split, n in medmnist.INFO["breastmnist"]["n_samples"].items():
    arrays[split + "_images"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
    arrays[split + "_labels"] = (rng.random((n, 1)) < 0.7).astype(np.uint8)
np.savez(folder + "/breastmnist.npz", **arrays)
data = medmnist.BreastMNIST(split="test", root=folder, download=False, transform=ToTensor())
images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=156)))
perfect = torch.tensor([int(arrays["test_labels"][i, 0]) for i in range(156)])
wrong, right = float((perfect == labels).float().mean()), float((perfect == labels.flatten()).float().mean())
print(f"labels of a batch {tuple(labels.shape)}; accuracy of perfect predictions {wrong:.2f}, with flattened labels {right:.2f}")
if not (tuple(labels.shape) == (156, 1) and wrong < 0.9 and right == 1.0):
    sys.exit("changed: shape of MedMNIST labels")
print("as seen: perfect predictions score like guessing")
EOF
