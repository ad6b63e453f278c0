#!/usr/bin/env bash
# One would guess: create_model(name, num_classes=0, global_pool="avg") and reset_classifier(0, "avg") on the model are two
# ways to ask for one thing, averaged patch features.
# What happens: the first moves the final LayerNorm behind the pooling and renames it (fc_norm), the second leaves it before
# the pooling. Features differ, and the weights of the first do not load into the second or back.
# Versions: timm 1.0.31, torch 2.13.0 (CPU).
# Seen: same weights, norm copied across: features differ by tens of per cent; state dict keys norm.* against fc_norm.*.
# Why it matters: prototypes, or a LoRA trained on the one, are wrong on the other; pass fc_norm=False to get the second
# from create_model, which also lets pretrained weights load.
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
make = lambda **kwargs: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=0, **kwargs).eval()
torch.manual_seed(0)
reset = make()
with torch.no_grad():
    for p in reset.parameters():
        p.add_(torch.randn_like(p) * 0.1)
weights = reset.state_dict()
reset.reset_classifier(0, "avg")
created, same = make(global_pool="avg"), make(global_pool="avg", fc_norm=False)
keys = sorted(set(created.state_dict()) ^ set(weights))
created.load_state_dict({("fc_" + k if k.startswith("norm.") else k): v for k, v in weights.items()})
same.load_state_dict(weights)
x = torch.randn(4, 3, 64, 64)
with torch.no_grad():
    wanted = reset(x)
    first, second = (float((m(x) - wanted).norm() / wanted.norm()) for m in (created, same))
print(f"create_model against reset_classifier: {first:.2g}; with fc_norm=False: {second:.2g}; keys that differ: {keys}")
if not (first > 0.01 and second < 1e-5 and keys == ["fc_norm.bias", "fc_norm.weight", "norm.bias", "norm.weight"]):
    sys.exit("changed: average pooling of timm's ViT")
print("as seen: two different average poolings")
EOF
