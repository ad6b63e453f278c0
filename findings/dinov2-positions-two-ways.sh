#!/usr/bin/env bash
# One would guess: Dinov2Model and Dinov2WithRegistersModel of one library bring the position table for 518 pixels to 224 in
# the same way, which is that of timm.
# What happens: both call bicubic interpolation, the registers model with antialias, the plain model without. timm uses
# antialias for both, so plain DINOv2 gives other features in transformers than in timm at any size but 518.
# Versions: transformers 5.24.0, timm 1.0.31, torch 2.13.0 (CPU).
# Seen: 37 x 37 positions to 16 x 16: registers against timm 0.0; plain against timm 0.02 (smooth table) and above 1
# (noise); plain against timm with antialias=False 0.0.
# Why it matters: a LoRA trained on one library's DINOv2 at 224 pixels meets other features in the other; state the
# library with the backbone, or store the resampled table.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 transformers==5.24.0 timm==1.0.31
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
from timm.layers import resample_abs_pos_embed
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
size = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14)
torch.manual_seed(0)
plain, registers = Dinov2Model(Dinov2Config(**size)), Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size))
smooth = torch.nn.functional.interpolate(torch.randn(1, 48, 6, 6), size=(37, 37), mode="bicubic").flatten(2).transpose(1, 2)
seen = {}
with torch.no_grad():
    for name, grid in (("smooth", smooth), ("noise", torch.randn(1, 37 * 37, 48))):
        table = torch.cat([torch.zeros(1, 1, 48), grid], 1)
        at224 = {"timm": resample_abs_pos_embed(table, (16, 16)), "timm, no antialias": resample_abs_pos_embed(table, (16, 16), antialias=False)}
        for label, model in (("plain", plain), ("registers", registers)):
            model.embeddings.position_embeddings.copy_(table)
            at224[label] = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 48), 224, 224)
        distance = lambda a, b: float((at224[a] - at224[b]).norm() / at224[b].norm())
        seen[name] = [round(distance(*pair), 4) for pair in (("registers", "timm"), ("plain", "timm"), ("plain", "timm, no antialias"))]
        print(name, "registers-timm, plain-timm, plain-timm without antialias:", seen[name])
if any(a > 1e-3 or b < 0.005 or c > 1e-3 for a, b, c in seen.values()):
    sys.exit("changed: resampling of DINOv2 positions")
print("as seen: plain DINOv2 without antialias, registers and timm with")
EOF
