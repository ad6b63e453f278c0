#!/usr/bin/env bash
# One would guess: with several adapters that each have a head (modules_to_save), merge_and_unload(adapter_names=["birds"])
# returns the model of the adapter birds: its LoRA and its head.
# What happens: the LoRA is that of the adapter named, the head is that of the adapter that is active, which is the first
# one unless set_adapter was called. Names that do not match are not refused, and nothing warns.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: a ViT with adapters cars (active) and birds: merging birds by name gives birds' LoRA with cars' head; merging it
# after set_adapter("birds") gives the outputs of birds. With heads drawn at random 2 % of 64 images keep their class.
# Why it matters: a loop that merges the LoRAs of a market one by one gives all but one of them a foreign head. With equal
# numbers of ways all shapes fit, and accuracy falls to chance.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import copy, sys, warnings
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification
torch.manual_seed(0)
size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, modules_to_save=["classifier"], init_lora_weights=False)
model = get_peft_model(ViTForImageClassification(ViTConfig(**size, num_labels=5)), config, adapter_name="cars")
model.add_adapter("birds", config)
model.eval()
x = torch.randn(64, 3, 32, 32)
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.add_(torch.randn_like(weight))
    wanted = {}
    for name in ("birds", "cars"):
        model.set_adapter(name)
        wanted[name] = model(x).logits
    heads = {name: model.base_model.model.classifier.modules_to_save[name].weight.clone() for name in wanted}
    warnings.simplefilter("always")
    by_name = copy.deepcopy(model).merge_and_unload(adapter_names=["birds"])
    warned = len(caught)
    model.set_adapter("birds")
    active = copy.deepcopy(model).merge_and_unload()
    close = lambda a, b: torch.allclose(a, b, atol=1e-3)
    head = [name for name in heads if torch.equal(by_name.classifier.weight, heads[name])]
    pairs = zip(by_name.vit.state_dict().values(), active.vit.state_dict().values())
    same_lora = all(torch.equal(a, b) for a, b in pairs)
    kept = float((by_name(x).logits.argmax(1) == wanted["birds"].argmax(1)).float().mean())
    right = close(active(x).logits, wanted["birds"])
print(f"merged by name: LoRA of birds {same_lora}, head of {head}, classes kept {kept:.2f}; warnings {warned}")
print(f"merged after set_adapter: outputs of birds {right}")
if not (same_lora and right and head == ["cars"] and not warned and not close(by_name(x).logits, wanted["birds"])):
    sys.exit("changed: the head that merge_and_unload takes")
print("as seen: the head is that of the active adapter, not of the one named")
EOF
