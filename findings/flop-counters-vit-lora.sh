#!/usr/bin/env bash
# One would guess: tools that count a network's multiplications and parameters agree on a ViT to within a few per cent, and a
# LoRA adds its own to both.
# What happens: torchinfo counts each linear layer once, however many tokens pass, and no attention. ptflops (backend pytorch)
# takes timm's attention module for the two products of attention alone: its own table lists the qkv and projection layers
# with their counts, the total is without them, so a LoRA on qkv costs nothing. The number of parameters of ptflops and of
# calflops is that of the trainable ones: that of a ViT with LoRA is the LoRA's.
# Versions: torchinfo 1.8.0, ptflops 0.7.5, calflops 0.3.2, timm 1.0.31, peft 0.21.2, torch 2.13.0 (CPU).
# Seen (ViT-Tiny of 2 blocks, 224 x 224): million multiplications torch and calflops 203.2, ptflops 176.2, torchinfo 29.8; with
# a LoRA of rank 16 on qkv torch and calflops +4.8, ptflops +0.0, torchinfo +0.02; at 64 x 64 ptflops finds 73 % of torch's.
# Parameters of the ViT with LoRA: 1.10 million by torchinfo, 0.02 million by ptflops and calflops.
# Why it matters: costs and sizes of adapters beside their backbones in a table are off by factors. Check with torch's own
# FlopCounterMode (two per multiplication) and a sum of numel().
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 transformers==5.24.0 peft==0.21.2
"$tmp/venv/bin/pip" install -q --no-compile --no-deps timm==1.0.31 torchinfo==1.8.0 ptflops==0.7.5 calflops==0.3.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import contextlib, copy, io, sys, torch
try:
    import torchvision
except RuntimeError:  # CPU build of torch beside a CUDA build of torchvision: name the two operators it misses; unused here
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    ops = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        ops.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm, torchinfo
from calflops import calculate_flops
from peft import LoraConfig, get_peft_model
from ptflops import get_model_complexity_info
from torch.utils.flop_counter import FlopCounterMode

def count(model, size):
    """Million multiplications and million parameters by each tool."""
    x, model, found = torch.randn(1, 3, size, size), model.eval(), {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    found["torch"] = counter.get_total_flops() / 2, sum(p.numel() for p in model.parameters())
    summary = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0)
    found["torchinfo"] = summary.total_mult_adds, summary.total_params
    with contextlib.redirect_stdout(io.StringIO()):
        found["ptflops"] = get_model_complexity_info(copy.deepcopy(model), (3, size, size), as_strings=False,
                                                     print_per_layer_stat=False, backend="pytorch")
        found["calflops"] = calculate_flops(copy.deepcopy(model), input_shape=(1, 3, size, size), output_as_string=False,
                                            print_results=False)[1:]
    found = {tool: [round(n / 1e6, 2) for n in numbers] for tool, numbers in found.items()}
    print(f"{size} x {size}: millions of multiplications and of parameters {found}")
    return found

vit = lambda size: timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, num_classes=5)
small, base = count(vit(64), 64), count(vit(224), 224)
lora = count(get_peft_model(vit(224), LoraConfig(target_modules=["qkv"], r=16)), 224)
extra = {tool: round(lora[tool][0] - base[tool][0], 2) for tool in base}
print("million multiplications that a LoRA on qkv adds:", extra)
true = base["torch"][0]
good = abs(base["calflops"][0] - true) < 1 and base["torchinfo"][0] < 0.2 * true and base["ptflops"][0] < 0.9 * true
good &= small["ptflops"][0] < 0.8 * small["torch"][0] and extra["ptflops"] == 0 and extra["torchinfo"] < 0.05 < extra["torch"]
good &= lora["torch"][1] > 1 and lora["torchinfo"][1] > 1 and max(lora["ptflops"][1], lora["calflops"][1]) < 0.03
if not good:
    sys.exit("changed: what the tools count of a ViT with LoRA")
print("as seen: torchinfo and ptflops leave out most or much of a ViT, ptflops and calflops its frozen parameters")
EOF
