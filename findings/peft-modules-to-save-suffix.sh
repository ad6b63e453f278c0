#!/usr/bin/env bash
# One would guess: modules_to_save=["fc"] trains and saves the module called fc beside the LoRA, as target_modules=["fc"] would
# adapt the one called fc.
# What happens: target_modules compares whole names (fc is not c_fc), modules_to_save the ends of names as text. In open_clip's
# tower fc is also the mlp.c_fc of every block, in a ViT with qk_norm norm is also q_norm and k_norm. All are copied, trained
# in full and saved; no warning.
# Versions: peft 0.21.2, open_clip_torch 3.3.0, timm 1.0.31, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen (LoRA of rank 4 on CLIP ViT-B/32): head called fc: 13 modules and 28.5 million trainable parameters; called top: 1 and 0.2
# million; target_modules=["fc"] finds 1. norm of a timm ViT of 2 blocks with qk_norm: 11 modules.
# Why it matters: the "LoRA" fine-tunes a third of the backbone on a few shots and its file has 114 MB; who averages the LoRAs
# leaves most of what was trained behind. Count the trainable parameters before training.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 transformers==5.24.0 peft==0.21.2 timm==1.0.31 open_clip_torch==3.3.0
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
from open_clip.transformer import VisionTransformer
from peft import LoraConfig, get_peft_model

class Clip(torch.nn.Module):
    """CLIP's ViT-B/32 image tower with a head of the given name."""
    def __init__(self, head):
        super().__init__()
        self.visual = VisionTransformer(image_size=224, patch_size=32, width=768, layers=12, heads=12, mlp_ratio=4, output_dim=512)
        self.add_module(head, torch.nn.Linear(512, 5))

def meant(model, name):
    """Modules that target_modules takes the name for."""
    return sum(n.endswith(".base_layer") for n, _ in get_peft_model(model, LoraConfig(target_modules=[name], r=4)).named_modules())

def saved(model, lora, name):
    """Modules that modules_to_save takes the name for, and million trainable parameters."""
    model = get_peft_model(model, LoraConfig(target_modules=[lora], r=4, modules_to_save=[name]))
    copied = [n for n, m in model.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    return len(copied), round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1)

as_target = meant(Clip("fc"), "fc")
seen = {
    "head called fc": saved(Clip("fc"), "c_proj", "fc"),
    "head called top": saved(Clip("top"), "c_proj", "top"),
    "norm of a ViT with qk_norm": saved(timm.create_model("vit_tiny_patch16_224", depth=2, qk_norm=True), "qkv", "norm"),
}
print(f"modules of CLIP that target_modules=['fc'] means: {as_target}")
for case, (count, trained) in seen.items():
    print(f"modules_to_save, {case}: {count} modules, {trained} million trainable parameters")
many, few, norms = seen.values()
if as_target != 1 or many[0] != 13 or many[1] < 28 or few != (1, 0.2) or norms[0] != 11:
    sys.exit("changed: what modules_to_save takes a name for")
print("as seen: modules_to_save takes every module whose name ends so")
EOF
