#!/usr/bin/env bash
# One would guess: a metric of scores that only their order decides, such as AUROC, is the same however the scores are cut
# into batches; and cosine similarities, handed to a calibration error, are either taken as they are or put through a softmax.
# What happens: each call of `update` asks for itself whether all scores lie in [0, 1], and only if one does not, puts that
# batch through a sigmoid (binary) or a softmax (multiclass). Batches that happen to lie inside keep their raw scores, and both
# kinds are then ranked and binned together.
# Versions: torchmetrics 1.9.0, torch 2.13.0 (CPU).
# Seen: BinaryAUROC of 999 scores around 0.5: 0.909 at once, 0.866 in batches of three. MulticlassCalibrationError of
# 1000 x 5 cosines in [0, 1]: 0.178; with one of the 5000 at -0.01: 0.346; that again in batches of 75: 0.204.
# Why it matters: prototype classifiers score by cosine, which is seldom negative, and detectors of unknown classes by distances;
# what is printed then depends on the batch size and on single images. Rank or scale the scores yourself before `update`.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from torchmetrics.classification import BinaryAUROC, MulticlassCalibrationError

def fed(metric, scores, labels, batch):
    for part in zip(scores.split(batch), labels.split(batch)):
        metric.update(*part)
    return metric.compute().item()

torch.manual_seed(0)
scores = 0.5 + 0.3 * torch.randn(999)
known = (scores + 0.2 * torch.randn(999) > 0.5).long()
whole, threes = (fed(BinaryAUROC(), scores, known, n) for n in (999, 3))
ranks = scores.argsort().argsort() / 999
ranked = [fed(BinaryAUROC(), ranks, known, n) for n in (999, 3)]
print(f"AUROC: at once {whole:.3f}, by threes {threes:.3f}; of ranks in [0, 1] {ranked[0]:.3f} and {ranked[1]:.3f}")

labels = torch.randint(5, (1000,))
cosines = 0.5 * torch.rand(1000, 5)
cosines[torch.arange(1000), labels] += 0.2
other = cosines.clone()
other[0, (labels[0] + 1) % 5] = -0.01
ece = lambda x, n: fed(MulticlassCalibrationError(5, n_bins=15), x, labels, n)
inside, one, cut = ece(cosines, 1000), ece(other, 1000), ece(other, 75)
print(f"calibration error: all in [0, 1] {inside:.3f}, one of 5000 at -0.01 {one:.3f}, that in batches of 75 {cut:.3f}")

if not (whole - threes > 0.01 and abs(whole - ranked[0]) < 1e-4 and abs(ranked[0] - ranked[1]) < 1e-6 and one - inside > 0.1 and one - cut > 0.1):
    sys.exit("changed: torchmetrics no longer decides batch by batch whether scores are logits")
print("as seen: torchmetrics decides batch by batch whether scores are logits, so the batch size changes AUROC and calibration")
EOF
