#!/usr/bin/env bash
# One would guess: a new OFT adapter is the identity, on a convolution as on a linear layer, and an adapter gives before
# merging what it gives after.
# What happens: on a convolution larger than 1 x 1 peft's OFT cuts the input into all windows of stride 1, rotates them and
# adds them up again, every pixel once for each window it lies in and with the axes of windows and kernel exchanged. The
# untrained adapter hands the layer another image. Merging rotates the weights instead, which gives another model.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: output with untrained OFT against the plain convolution's: kernel 1: cosine 1; kernel 3 and kernel 16 with stride 16
# (patches of a ViT): cosine below 0.2, and on an image of one colour 9 and 256 times too strong in its middle; merged:
# cosine 1. LoRA and HRA, another orthogonal adapter: cosine 1 throughout.
# Why it matters: tuning a patch embedding or a ResNet so starts from a wrecked backbone, and what was learnt is not what
# merge_and_unload leaves. Output before training against the plain model is a one-line check.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import copy, sys, torch
from peft import HRAConfig, LoraConfig, OFTConfig, get_peft_model
torch.manual_seed(0)
layers = {}
for size, stride in ((1, 1), (3, 1), (16, 16)):
    layers[f"kernel {size}"] = torch.nn.Conv2d(3, 8, size, stride=stride, bias=False)
configs = {"OFT": lambda: OFTConfig(target_modules=["0"], r=0, oft_block_size=3),
           "HRA": lambda: HRAConfig(target_modules=["0"]), "LoRA": lambda: LoraConfig(target_modules=["0"])}
noise, colour = torch.randn(2, 3, 80, 80), torch.ones(1, 3, 80, 80)
middle = lambda y: y[0, :, y.shape[2] // 2, y.shape[3] // 2]
good = True
with torch.no_grad():
    for name, layer in layers.items():
        base = torch.nn.Sequential(layer).eval()
        cosine = lambda model: float(torch.cosine_similarity(model(noise).flatten(), base(noise).flatten(), dim=0))
        for kind, config in configs.items():
            model = get_peft_model(copy.deepcopy(base), config()).eval()
            factor = float((middle(model(colour)) / middle(base(colour))).mean())
            fresh, merged = cosine(model), cosine(model.merge_and_unload())
            print(f"{kind} on {name}, untrained: cosine {fresh:.3f}, middle of one colour times {factor:.2f}, merged: cosine {merged:.3f}")
            windows = {"kernel 3": 9, "kernel 16": 256}.get(name, 1) if kind == "OFT" else 1
            good &= abs(factor / windows - 1) < 1e-3 and merged > 0.999 and (fresh < 0.2 if windows > 1 else fresh > 0.999)
if not good:
    sys.exit("changed: untrained OFT on a convolution")
print("as seen: an untrained OFT changes what a convolution gives, until it is merged")
EOF
