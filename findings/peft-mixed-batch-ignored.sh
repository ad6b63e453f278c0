#!/usr/bin/env bash
# One would guess: model(x, adapter_names=[...]), peft's batch of several adapters, gives each image its own adapter, or raises
# where a kind of adapter cannot do so (as it does for DoRA).
# What happens: for LoRA, RoAd and GLoRA it does; for LoKr, LoHa, VeRA, IA3, OFT, BOFT, HRA, C3A, FourierFT and MiSS the names are
# taken, not looked at, and every image gets the active adapter, also those that ask for "__base__". Any names will do.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: of six images two each for one, two and no adapter, two active: right ones with LoRA 6, with each of the other ten 2; a name
# that no adapter has: ValueError with LoRA, the active adapter's output with the others.
# Why it matters: a market of LoKr's scored in one batch, or served so, is one adapter throughout; scores of the others are
# those of strangers. Compare one image with its adapter set active.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch
from peft import (BOFTConfig, C3AConfig, FourierFTConfig, GloraConfig, HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig,
                  MissConfig, OFTConfig, RoadConfig, VeraConfig, get_peft_model)

layers = ["0", "2"]
kinds = {
    "LoRA": lambda: LoraConfig(target_modules=layers, r=4),
    "RoAd": lambda: RoadConfig(target_modules=layers, group_size=8),
    "GLoRA": lambda: GloraConfig(target_modules=layers, r=4),
    "LoKr": lambda: LoKrConfig(target_modules=layers, r=4),
    "LoHa": lambda: LoHaConfig(target_modules=layers, r=4),
    "VeRA": lambda: VeraConfig(target_modules=layers, r=4),
    "IA3": lambda: IA3Config(target_modules=layers, feedforward_modules=[]),
    "OFT": lambda: OFTConfig(target_modules=layers, oft_block_size=4),
    "BOFT": lambda: BOFTConfig(target_modules=layers, boft_block_size=4),
    "HRA": lambda: HRAConfig(target_modules=layers, r=4),
    "C3A": lambda: C3AConfig(target_modules=layers, block_size=8),
    "FourierFT": lambda: FourierFTConfig(target_modules=layers, n_frequency=50),
    "MiSS": lambda: MissConfig(target_modules=layers, r=4),
}
x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
names = ["one", "two", "__base__"] * 2

def right(kind):
    """How many of the six images get their own adapter's output, and what a name without adapter gives."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    model = get_peft_model(model, kinds[kind](), adapter_name="one")
    model.add_adapter("two", kinds[kind]())
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.5)
    model.eval()
    alone = {}
    with torch.no_grad():
        with model.disable_adapter():
            alone["__base__"] = model(x)
        for adapter in ("one", "two"):  # two is active in the end
            model.set_adapter(adapter)
            alone[adapter] = model(x)
        mixed = model(x, adapter_names=names)
        count = sum(torch.allclose(mixed[i], alone[name][i], atol=1e-4) for i, name in enumerate(names))
        try:
            stranger = model(x, adapter_names=["nobody"] * 6)
            stranger = "active adapter's output" if torch.equal(stranger, alone["two"]) else "something else"
        except (KeyError, ValueError) as error:
            stranger = type(error).__name__
    return int(count), stranger

seen = {kind: right(kind) for kind in kinds}
for kind, found in seen.items():
    print(f"{kind}: {found[0]} of 6 images get their own adapter; a name that no adapter has: {found[1]}")
able = [kind for kind, found in seen.items() if found[0] == 6]
ignoring = [kind for kind, found in seen.items() if found == (2, "active adapter's output")]
if able != ["LoRA", "RoAd", "GLoRA"] or len(ignoring) != 10 or seen["LoRA"][1] != "ValueError":
    sys.exit("changed: which kinds of adapters look at adapter_names")
print("as seen: ten of thirteen kinds of adapters take adapter_names and ignore them")
EOF
