#!/usr/bin/env bash
# One would guess: `last_hidden_state` means the same in the vision towers of transformers: the tokens after the final
# LayerNorm, so that its first token is the class feature.
# What happens: CLIPVisionModel applies its post_layernorm to the pooled token only; last_hidden_state is the raw output of
# the last block. ViTModel, DeiTModel, Dinov2Model, DINOv3ViTModel and SiglipVisionModel return normalised tokens.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen: LayerNorm weights made unequal to 1: for CLIP, hidden_states[-1] equals last_hidden_state and the norm of it gives
# pooler_output; for the other five, the norm of hidden_states[-1] gives last_hidden_state.
# Why it matters: nearest prototypes or dense features written for DINOv2 and pointed at CLIP take un-normalised tokens, in
# which a few channels dominate all distances.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from transformers import (CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel, DeiTConfig, DeiTModel,
                          Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel)
size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
good = True
for model_class, config_class in [(CLIPVisionModel, CLIPVisionConfig), (ViTModel, ViTConfig), (DeiTModel, DeiTConfig),
                                  (Dinov2Model, Dinov2Config), (DINOv3ViTModel, DINOv3ViTConfig), (SiglipVisionModel, SiglipVisionConfig)]:
    torch.manual_seed(0)
    model = model_class(config_class(**size)).eval()
    last = [m for n, m in model.named_modules() if n.split(".")[-1] in ("post_layernorm", "layernorm", "norm") and "layer." not in n][-1 if model_class is not SiglipVisionModel else 0]
    with torch.no_grad():
        last.weight.copy_(torch.rand(32) + 0.5)
        out = model(pixel_values=torch.randn(2, 3, 32, 32), output_hidden_states=True)
        close = lambda a, b: torch.allclose(a, b, atol=1e-5)
        raw = close(out.last_hidden_state, out.hidden_states[-1])
        normed = close(out.last_hidden_state, last(out.hidden_states[-1]))
        pooled = close(last(out.last_hidden_state[:, 0]), out.pooler_output)
    print(f"{model_class.__name__}: last_hidden_state raw {raw}, normalised {normed}, norm of its first token is pooler_output {pooled}")
    good &= (raw and pooled and not normed) if model_class is CLIPVisionModel else (normed and not raw)
if not good:
    sys.exit("changed: which vision towers normalise last_hidden_state")
print("as seen: only CLIP leaves last_hidden_state un-normalised")
EOF
