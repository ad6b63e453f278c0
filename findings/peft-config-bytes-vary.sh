#!/usr/bin/env bash
# One would guess: saving the same adapter twice writes the same bytes, so that a checksum tells whether two are equal.
# What happens: target_modules is kept as a set and written in the set's order, which Python's string hashing shuffles anew
# in every process: adapter_config.json differs between two runs of one script, though the weights file is equal.
# Versions: peft 0.21.2, torch 2.13.0 (CPU), transformers 5.24.0.
# Seen: q, k, v and out in four processes: one checksum of adapter_model.safetensors, several of adapter_config.json.
# Why it matters: stores addressed by content, caches and version control see a changed LoRA in every run; compare the
# parsed file with sorted lists, or write it again with sorted lists.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import hashlib, os, subprocess, sys
child = '''
import hashlib, sys, tempfile, torch
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
block = torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in ("q_proj", "k_proj", "v_proj", "out_proj")})
folder = tempfile.mkdtemp()
get_peft_model(block, LoraConfig(r=2, target_modules=list(block))).save_pretrained(folder)
for name in ("adapter_model.safetensors", "adapter_config.json"):
    print(hashlib.sha256(open(folder + "/" + name, "rb").read()).hexdigest()[:12])
'''
runs = [subprocess.run([sys.executable, "-c", child], env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True,
                       capture_output=True, text=True).stdout.split() for seed in range(4)]
weights, configs = {r[-2] for r in runs}, {r[-1] for r in runs}
print("weights", weights, "configs", configs)
if len(weights) != 1 or len(configs) < 2:
    sys.exit("changed: bytes of an adapter saved by four processes")
print(f"as seen: equal weights, {len(configs)} different adapter_config.json")
EOF
