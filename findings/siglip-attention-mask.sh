#!/usr/bin/env bash
# One would guess: the attention mask that a tokenizer returns is to be given to a text tower; for CLIP it changes nothing.
# What happens: SigLIP was trained without one: its text attends to the padding, and its feature is read off the last place,
# which is padding. SiglipTokenizer and Siglip2Tokenizer count attention_mask among the model's inputs; SiglipTextModel takes
# it and gives another feature, without a word.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen: random weights, 5 words padded to 16 places: with the mask CLIP's feature is the same, SigLIP's differs by
# 16 % of its length.
# Why it matters: class names made into heads with `model.get_text_features(**tokenizer(...))` are not those that the image
# tower was trained beside.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOP'
import sys, torch
from transformers import CLIPTextConfig, CLIPTextModel, Siglip2Tokenizer, SiglipTextConfig, SiglipTextModel
size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16)
ends = dict(bos_token_id=1, eos_token_id=39, pad_token_id=0)
ids = torch.tensor([[5, 6, 7, 8, 39] + [0] * 11])
mask = (ids != 0).long()
change = {}
for model_class, config_class in ((CLIPTextModel, CLIPTextConfig), (SiglipTextModel, SiglipTextConfig)):
    torch.manual_seed(0)
    model = model_class(config_class(**size, **ends)).eval()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    with torch.no_grad():
        plain, masked = (model(input_ids=ids, **m).pooler_output for m in ({}, dict(attention_mask=mask)))
    change[model_class.__name__] = ((plain - masked).norm() / plain.norm()).item()
    print(f"{model_class.__name__}: the mask changes the feature by {change[model_class.__name__]:.1%}")
named = "attention_mask" in Siglip2Tokenizer.model_input_names
print("attention_mask is among the inputs that Siglip2Tokenizer names:", named)
if not (named and change["CLIPTextModel"] < 1e-4 and change["SiglipTextModel"] > 0.1):
    sys.exit("changed: what an attention mask does to SigLIP's texts")
print("as seen: the mask leaves CLIP's feature alone and changes SigLIP's")
EOP
