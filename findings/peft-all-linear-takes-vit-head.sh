#!/usr/bin/env bash
# One would guess: `target_modules="all-linear"` leaves the output layer of a transformers model alone, as peft's docs say, and
# what the saved adapter needs to answer as it did is in it.
# What happens: the classifier of image models counts as one more linear layer. It gets a LoRA on top of the random numbers
# that it was initialised with, and those are in no file: loaded onto the same backbone in another process, the adapter
# answers with another head. For a text classifier with task_type SEQ_CLS the head is left alone, trained and saved.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU).
# Seen: ViT, DINOv2, Swin: `classifier.lora_A` and `lora_B` saved, no `classifier.weight`; logits of the reloaded adapter
# differ from those of the saved one while the features are equal. BERT with SEQ_CLS: `classifier.weight` saved, same logits.
# Why it matters: such adapters are shared, score at chance, and cannot be repaired. Add `exclude_modules=["classifier"]` and
# `modules_to_save=["classifier"]`; as a member of a market such an adapter has no head.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - 2> log <<'EOF' || { cat log; exit 1; }
import sys, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig, BertForSequenceClassification, Dinov2Config, Dinov2ForImageClassification, SwinConfig,
    SwinForImageClassification, ViTConfig, ViTForImageClassification,
)

small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=5)
vision = dict(image_size=32, patch_size=8)
kinds = {
    "ViT": (ViTForImageClassification, ViTConfig(**small, **vision), None),
    "DINOv2": (Dinov2ForImageClassification, Dinov2Config(**small, **vision), None),
    "Swin": (SwinForImageClassification, SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=5), None),
    "BERT": (BertForSequenceClassification, BertConfig(vocab_size=50, **small), "SEQ_CLS"),
}

def fresh(kind, config, backbone):
    "The same pretrained backbone, and a head initialised as by any other process"
    model = kind(config)
    rest = model.load_state_dict({k: v for k, v in backbone.items() if "classifier" not in k}, strict=False)
    assert all("classifier" in k for k in rest.missing_keys)
    return model

good = True
for name, (kind, config, task) in kinds.items():
    torch.manual_seed(0)
    backbone = {k: v.clone() for k, v in kind(config).state_dict().items()}
    inputs = dict(input_ids=torch.arange(8)[None]) if task else dict(pixel_values=torch.rand(1, 3, 32, 32))
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type=task)
    tuned = get_peft_model(fresh(kind, config, backbone), lora).eval()
    tuned.save_pretrained(name)
    saved = {k for k in load_file(f"{name}/adapter_model.safetensors") if "classifier" in k}
    again = PeftModel.from_pretrained(fresh(kind, config, backbone), name).eval()
    with torch.no_grad():
        a, b = (m(**inputs, output_hidden_states=True) for m in (tuned, again))
    features = float((a.hidden_states[-1] - b.hidden_states[-1]).abs().max())
    logits = float((a.logits - b.logits).abs().max())
    print(f"{name}: saved {sorted(saved)}, features differ by {features:.1g}, logits by {logits:.1g}")
    head = any(k.endswith("classifier.weight") for k in saved)
    low = any("classifier.lora_A" in k for k in saved)
    good &= features < 1e-5 and (head and not low and logits < 1e-5 if task else low and not head and logits > 1e-2)
if not good:
    sys.exit("changed: all-linear no longer takes the classifier of image models, or the adapter now holds it")
print("as seen: all-linear puts a LoRA on the head of image classifiers, and the head itself is not saved")
EOF
