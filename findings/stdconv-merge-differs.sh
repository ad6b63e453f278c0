#!/usr/bin/env bash
# One would guess: merging a peft LoRA into the weights leaves the outputs as they were, up to rounding.
# What happens: timm's BiT and hybrid ViT stems use convolutions that standardise their weight in every forward pass
# (StdConv2d, a subclass of Conv2d). peft takes them for plain convolutions: before merging it adds the LoRA to the output
# of the standardised convolution, after merging the sum is standardised. Two different models, no warning.
# Versions: timm 1.0.31, peft 0.21.2, torch 2.13.0 (CPU).
# Seen: resnetv2_50x1_bit, LoRA on the 3x3 convolutions: outputs before and after merging differ by about 0.6 to 0.8 of
# their size; the same with a plain ResNet: below 1e-4.
# Why it matters: a LoRA of a BiT or R50-hybrid backbone that is merged for speed or for sharing is not the one evaluated.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 torchvision==0.28.0 timm==1.0.31
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
from peft import LoraConfig, get_peft_model

def difference(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1 and n.endswith("weight"):
                p.fill_(1.0)  # no branch is switched off at the start
    layer = type(model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("0.conv2")))).__name__
    config = LoraConfig(target_modules=["conv2"], r=2, lora_alpha=2, init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        after = model(x)
    effect, value = (float((a - before).norm() / before.norm()) for a in (base, after))
    print(f"{name} ({layer}): effect of the LoRA {effect:.2g}, merged against unmerged {value:.2g}")
    return value if effect > 0.01 else float("nan")

plain, standardised = difference("resnet18"), difference("resnetv2_50x1_bit")
if not (plain < 1e-3 and standardised > 0.1):
    sys.exit("changed: merging into weight-standardised convolutions is exact, or plain ones are not")
print("as seen: merging a LoRA into a weight-standardised convolution gives another model")
EOF
