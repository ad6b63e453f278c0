#!/usr/bin/env bash
# One would guess: save_as_lora of a DoRA adapter at full rank gives the LoRA that changes the weights as the DoRA does (any
# change of weights is a LoRA of full rank), or refuses as it does for adapters that it cannot convert.
# What happens: it takes the product of the two factors alone. DoRA's magnitudes, and the division by the new norms, are gone;
# the only word is a warning that the adapter is a LoRA already. A DoRA whose magnitudes alone were trained becomes nothing.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: share of the change of the weights that is lost, at full rank: DoRA trained in all parts 0.76, in its magnitudes 1.0;
# LoRA, LoHa and LoKr of the same size 0.0. Merging the DoRA loses nothing.
# Why it matters: who brings a market of mixed adapters to plain LoRAs (to average them, say) loses most of each DoRA and
# blames the rank. Take the merged weight minus the base weight instead.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, save_as_lora

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False)).eval()

def lost(name, config, parts=""):
    model = get_peft_model(build(), config).eval()
    for n, p in model.named_parameters():
        if p.requires_grad and parts in n:
            p.data.add_(torch.randn_like(p) * 0.3)
    save_as_lora(name, model, rank=16)
    with torch.no_grad():
        base = build()[0].weight
        lora = PeftModel.from_pretrained(build(), name).merge_and_unload()[0].weight - base
        forward = model(torch.eye(16)).T - base
        merged = model.merge_and_unload()[0].weight - base
    if not torch.allclose(merged, forward, atol=1e-5):
        sys.exit("changed: a merged adapter differs from its forward pass")
    return round(float((lora - merged).norm() / merged.norm()), 2)

dora = lambda: LoraConfig(target_modules=["0"], r=4, lora_alpha=4, use_dora=True)
seen = {
    "LoRA": lost("lora", LoraConfig(target_modules=["0"], r=4, lora_alpha=4)),
    "LoHa": lost("loha", LoHaConfig(target_modules=["0"], r=4, alpha=4)),
    "LoKr": lost("lokr", LoKrConfig(target_modules=["0"], r=4, alpha=4)),
    "DoRA": lost("dora", dora()),
    "DoRA, magnitudes alone": lost("magnitudes", dora(), "magnitude"),
}
print("share of the change that is lost at full rank:", seen)
if not (seen["LoRA"] == seen["LoHa"] == seen["LoKr"] == 0 and seen["DoRA"] > 0.2 and seen["DoRA, magnitudes alone"] == 1):
    sys.exit("changed: what save_as_lora keeps of a DoRA")
print("as seen: save_as_lora leaves DoRA's magnitudes out")
EOF
