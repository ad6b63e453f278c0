#!/usr/bin/env bash
# One would guess: peft's LoRA+ optimiser gives the factors B the higher learning rate and leaves everything else, such as
# the classifier in modules_to_save, at `lr`: its ratio is described as that of the rates of B and A.
# What happens: every parameter with one axis counts as a B (a rule taken over from the method's published code). The
# head's bias learns at ratio times lr, the head's weight at lr; so do biases beside a LoRA, and DoRA's magnitudes. For
# LoKr, which has no lora_B, the head's bias is all that is sped up.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU).
# Seen: ratio 16, one step of SGD at lr 0.01: step / gradient is 0.01 for the head's weight and A, 0.16 for the head's bias,
# B, and DoRA's magnitude; LoKr: 0.01 for all its factors, 0.16 for the head's bias.
# Why it matters: heads are trained with LoRAs of vision backbones. LoRA+ against LoRA is then also a comparison of heads
# whose bias runs ahead, and "LoKr with LoRA+" is nothing else. Make the parameter groups oneself.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import ViTConfig, ViTForImageClassification

def rates(config):
    """Step over gradient, for each kind of parameter, in one step of SGD."""
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    model = ViTForImageClassification(ViTConfig(num_labels=5, **size))
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.shape == (32, 32)]
    config.target_modules, config.modules_to_save = linears, ["classifier"]
    model = get_peft_model(model, config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in n:
                p.normal_()  # no factor starts at zero, so that all have a gradient
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    x, y = torch.randn(10, 3, 32, 32), torch.arange(5).repeat(2)
    torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
    optimizer.step()
    found = {}
    for n, p in model.named_parameters():
        if n in before:
            kind = next((k for k in ("lora_A", "lora_B", "magnitude", "lokr_w1", "lokr_w2") if k in n), None)
            kind = kind or "head " + n.rsplit(".", 1)[1]
            rate = (before[n] - p.detach()).norm() / p.grad.norm()
            found.setdefault(kind, set()).add(round(rate.item(), 3))
    return {kind: sorted(values) for kind, values in found.items()}

good = True
for name, config, fast in (("LoRA", LoraConfig(r=2), ["head bias", "lora_B"]),
                           ("DoRA", LoraConfig(r=2, use_dora=True), ["head bias", "lora_B", "magnitude"]),
                           ("LoKr", LoKrConfig(r=2), ["head bias"])):
    found = rates(config)
    print(f"{name}: step over gradient at lr 0.01, ratio 16: {found}")
    good &= len(found) >= 3 and all(v == ([0.16] if k in fast else [0.01]) for k, v in found.items())
    good &= set(fast) <= set(found) and "head weight" in found
if not good:
    sys.exit("changed: which parameters LoRA+ speeds up")
print("as seen: the head's bias learns at the rate of B, the head's weight at that of A")
EOF
