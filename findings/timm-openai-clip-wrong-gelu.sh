#!/usr/bin/env bash
# One would guess: timm's `vit_base_patch16_clip_224.openai` is OpenAI's CLIP tower: the tag names the weights' origin.
# What happens: the model of that name has the exact GELU, while those weights were trained with QuickGELU. The right one is
# `vit_base_patch16_clip_quickgelu_224.openai`; both names point to the very same file on the hub, nothing warns.
# Versions: timm 1.0.31, torch 2.13.0 (CPU).
# Seen: three sizes (B/32, B/16, L/14): GELU without, QuickGELU with `quickgelu` in the name, equal hub id; same random
# weights in both: features differ.
# Why it matters: a LoRA trained against transformers' or open_clip's OpenAI tower and moved to timm sits on a slightly
# wrong backbone, about the size of effect that is taken for noise.
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
from timm.models import get_pretrained_cfg
good = True
for size in ("base_patch32", "base_patch16", "large_patch14"):
    names = [f"vit_{size}_clip_224.openai", f"vit_{size}_clip_quickgelu_224.openai"]
    files = {(c.hf_hub_id, c.hf_hub_filename) for c in map(get_pretrained_cfg, names)}
    torch.manual_seed(0)
    plain, quick = (timm.create_model(n, depth=2).eval() for n in names)
    quick.load_state_dict(plain.state_dict())
    with torch.no_grad():
        x = torch.randn(1, 3, 224, 224)
        difference = float((plain(x) - quick(x)).norm() / quick(x).norm())
    acts = [type(m.blocks[0].mlp.act).__name__ for m in (plain, quick)]
    print(names[0], acts, "files", files, f"features differ by {difference:.2g}")
    good &= len(files) == 1 and acts == ["GELU", "QuickGELU"] and difference > 1e-4
if not good:
    sys.exit("changed: activations of timm's OpenAI CLIP towers")
print("as seen: the plain .openai names use the exact GELU")
EOF
