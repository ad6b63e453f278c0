#!/usr/bin/env bash
# One would guess: after process_support_set, asking an easyfsl classifier twice about the same queries gives the same
# answer, and one query batch does not depend on the batch before it.
# What happens: BDCSPN, LaplacianShot, TIM, PTMAP - and the inductive Finetune - store the prototypes they refine for a
# batch in the classifier and start the next batch from them.
# Versions: easyfsl 1.5.0, torch 2.13.0 (CPU).
# Seen: 50 queries, asked again: scores differ for Finetune, BDCSPN, LaplacianShot, TIM; after another batch BDCSPN and
# LaplacianShot change labels too. PrototypicalNetworks and SimpleShot do not change.
# Why it matters: a rival evaluated in query batches depends on their order and size, and a service gives each user
# answers shaped by the users before. Call process_support_set before every batch.
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
from easyfsl.methods import BDCSPN, Finetune, LaplacianShot, PrototypicalNetworks, SimpleShot, TIM
warnings.simplefilter("ignore")
torch.manual_seed(0)
means = torch.randn(5, 16) * 0.4
labels = torch.arange(5).repeat_interleave(5)
support, queries = means[labels] + torch.randn(25, 16), means[torch.arange(5).repeat_interleave(10)] + torch.randn(50, 16)
others = torch.randn(30, 16)
seen = {}
for method in (PrototypicalNetworks, SimpleShot, Finetune, TIM, BDCSPN, LaplacianShot):
    model = method(backbone=torch.nn.Identity())
    def answers(*batches):
        model.process_support_set(support, labels)
        return [model(b).detach().clone() for b in batches]
    first, again = answers(queries, queries)
    _, after = answers(others, queries)
    fresh, = answers(queries)
    assert torch.equal(first, fresh)  # no randomness: the memory is the only difference
    seen[method.__name__] = float((first - again).abs().max()), int((first.argmax(1) != after.argmax(1)).sum())
    print(f"{method.__name__}: same batch again, scores move by {seen[method.__name__][0]:.2g}; after another batch {seen[method.__name__][1]} of 50 labels change")
still = all(seen[n] == (0.0, 0) for n in ("PrototypicalNetworks", "SimpleShot"))
moved = all(seen[n][0] > 1e-4 for n in ("Finetune", "TIM", "BDCSPN", "LaplacianShot")) and min(seen["BDCSPN"][1], seen["LaplacianShot"][1]) > 0
if not (still and moved):
    sys.exit("changed: memory of easyfsl classifiers between query batches")
print("as seen: four easyfsl classifiers carry one query batch over into the next")
EOF
