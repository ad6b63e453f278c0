#!/usr/bin/env bash
# One would guess: `timm.utils.freeze(model)` sets requires_grad to False and BatchNorm to its running statistics; the modules,
# and the hooks on them, stay.
# What happens: by default every BatchNorm2d is replaced by a new module of another class, without the hooks. A prior on
# batch-norm statistics (DeepInversion's R_BN) that was hooked in before sees nothing any more and is 0; one that looks for
# BatchNorm2d afterwards finds none. `unfreeze` puts modules of the old class back, again without the hooks.
# Versions: timm 1.0.31, torch 2.13.0 (CPU).
# Seen: 20 hooks called before, 0 after freeze, 0 after unfreeze; instances of BatchNorm2d 20, 0, 20. With
# `include_bn_running_stats=False` 20, 20, 20. The features in eval mode are the same.
# Why it matters: "freeze the teacher" is the first line of an inversion; done after the hooks, the images lose their only
# prior without a word. Hook in after freezing and look for FrozenBatchNorm2d, too, or freeze parameters by hand.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 timm==1.0.31
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
import timm
from timm.utils import freeze, unfreeze

def watch(**kwargs):
    "Calls of hooks that were put on all BatchNorm2d, and instances of it: before, frozen, unfrozen."
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0).eval()
    images, calls, seen, features = torch.rand(2, 3, 64, 64), [], [], []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    for change in (lambda *_, **__: None, freeze, unfreeze):
        change(model, **kwargs)
        model.eval()
        calls.clear()
        with torch.no_grad():
            features.append(model(images))
        seen.append((len(calls), sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())))
    same = all(torch.allclose(features[0], f, atol=1e-5) for f in features)
    print(kwargs or "default", "hooks called, BatchNorm2d:", seen, "same features:", same)
    return seen, same

default, same = watch()
kept, also = watch(include_bn_running_stats=False)
if default != [(20, 20), (0, 0), (0, 20)] or kept != [(20, 20)] * 3 or not (same and also):
    sys.exit("changed: timm.utils.freeze no longer replaces BatchNorm2d and drops its hooks")
print("as seen: freeze replaces every BatchNorm2d, and the hooks on them are gone for good")
EOF
