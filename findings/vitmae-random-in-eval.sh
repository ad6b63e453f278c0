#!/usr/bin/env bash
# One would guess: a ViTMAEModel in eval mode is a feature extractor: same image, same features, one token per patch.
# What happens: it goes on hiding a random 75 % of the patches and shuffles the rest, in eval mode as in training; nothing
# but `mask_ratio=0` in the config (or a `noise` argument) stops it.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen: 16 patches: 5 tokens come back instead of 17 and two passes over one image differ; with mask_ratio 0 the 17
# tokens come in another order each time, and only the class token is repeatable.
# Why it matters: few-shot features or a LoRA on an MAE tower are computed from a random quarter of the picture. Set
# mask_ratio=0 and use the class token, or sort the tokens by the ids_restore that come with them.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from transformers import ViTMAEConfig, ViTMAEModel
size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
x, seen = torch.randn(1, 3, 32, 32), {}
for ratio in (0.75, 0.0):
    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(mask_ratio=ratio, **size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        a, b = (model(pixel_values=x).last_hidden_state for _ in range(2))
    seen[ratio] = a.shape[1], round(float((a - b).norm() / a.norm()), 4), round(float((a - b)[:, 0].norm() / a[:, 0].norm()), 4)
    print(f"mask_ratio {ratio}: {a.shape[1]} tokens, two passes differ by {seen[ratio][1]}, class token by {seen[ratio][2]}")
if not (seen[0.75][0] == 5 and seen[0.75][2] > 0.001 and seen[0.0][0] == 17 and seen[0.0][1] > 0.001 and seen[0.0][2] < 1e-3):
    sys.exit("changed: ViTMAEModel in eval mode")
print("as seen: random in eval mode, and shuffled even without masking")
EOF
