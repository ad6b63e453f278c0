#!/usr/bin/env bash
# One would guess: a peft LoRA on the fused `qkv` layer of a timm vision transformer acts in the forward pass, whatever the
# model family, as it does in timm's plain ViT.
# What happens: BEiT, Swin V2 and EVA hand `qkv.weight` to a functional call and never call the layer, so the LoRA neither
# changes the features nor gets a gradient, without a word - and merging it changes the features after all.
# Versions: timm 1.0.31, peft 0.21.2, torch 2.13.0 (CPU).
# Seen: plain ViT: LoRA effect above 0 and equal to the merged one; beit, swinv2, eva, eva02: effect 0.0, all LoRA
# gradients 0, merged effect above 0.
# Why it matters: a run with a trained head still learns, so the idle LoRA goes unnoticed; published or merged, its
# random numbers start to act. Check that every LoRA factor has a gradient after one step.
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

def measure(name, size, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n and n.endswith("weight"):
                p.fill_(1.0)  # Swin V2 starts with branches that are switched off
    config = LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False, modules_to_save=["head"])
    model = get_peft_model(model, config).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        lora = model(x)
        with model.disable_adapter():
            base = model(x)
        # the copy of the head is equal to the head, so the difference is the LoRA's
    model(x).pow(2).sum().backward()
    gradients = [p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if "lora_" in n]
    with torch.no_grad():
        model.merge_adapter()
        merged = model(x)
    distance = lambda a: float((a - base).norm() / base.norm())
    print(f"{name}: LoRA effect {distance(lora):.2g}, factors with a gradient {sum(gradients)}/{len(gradients)}, merged effect {distance(merged):.2g}")
    return distance(lora), sum(gradients), len(gradients), distance(merged)

small = dict(embed_dim=48, depth=2, num_heads=3)
effect, some, all_, merged = measure("vit_tiny_patch16_224", 224, **small)
good = effect > 1e-4 and some == all_ and abs(effect - merged) < 1e-3
for name, size, kwargs in [("beit_base_patch16_224", 224, small), ("swinv2_tiny_window8_256", 256, dict(embed_dim=24)),
                           ("eva_giant_patch14_224", 224, small), ("eva02_tiny_patch14_224", 224, small)]:
    effect, some, all_, merged = measure(name, size, **kwargs)
    good &= effect == 0 and some == 0 and merged > 0
if not good:
    sys.exit("changed: a LoRA on qkv of these timm models is no longer idle before merging")
print("as seen: LoRA on qkv is idle in timm's BEiT, Swin V2 and EVA, but acts once merged")
EOF
