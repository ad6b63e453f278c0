#!/usr/bin/env bash
# One would guess: the state dict of a model is the same in training and eval mode, and loading it gives the model back.
# What happens: loralib adds the LoRA to the base weight on .eval() and takes it out on .train(). A state dict taken in eval
# mode holds the merged weight and the LoRA; loaded into a new model, the LoRA acts twice, in either mode.
# Versions: loralib 0.1.2, torch 2.13.0 (CPU).
# Seen: Linear and MergedLinear (q and v of a fused qkv): strength of the LoRA after loading the eval state 2.0, after
# loading the training state 1.0.
# Why it matters: checkpoints are mostly written after validation, that is in eval mode. Save with lora_state_dict beside the
# untouched base, or call .train() first.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 loralib==0.1.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, torch, loralib
x, seen = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), {}
makers = {"Linear": lambda: loralib.Linear(8, 6, r=2, lora_alpha=2),
          "MergedLinear": lambda: loralib.MergedLinear(8, 24, r=2, lora_alpha=2, enable_lora=[True, False, True])}
for name, make in makers.items():
    for mode in ("training", "eval"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(make())
        with torch.no_grad():
            torch.nn.init.normal_(model[0].lora_B)
            base = torch.nn.functional.linear(x, model[0].weight, model[0].bias).clone()
            wanted = model(x) - base
            state = {k: v.clone() for k, v in model.train(mode == "training").state_dict().items()}
            other = torch.nn.Sequential(make())
            other.load_state_dict(state)
            strengths = [float(((m(x) - base) * wanted).sum() / wanted.pow(2).sum()) for m in (other, other.eval())]
        seen[name, mode] = [round(s, 3) for s in strengths]
        print(f"{name}, state saved in {mode} mode: strength of the LoRA after loading {seen[name, mode]} (train, eval)")
if any(v != ([2.0, 2.0] if k[1] == "eval" else [1.0, 1.0]) for k, v in seen.items()):
    sys.exit("changed: loralib state dicts saved in eval mode")
print("as seen: a state saved in eval mode counts the LoRA twice")
EOF
