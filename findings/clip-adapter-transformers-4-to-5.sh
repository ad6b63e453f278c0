#!/usr/bin/env bash
# One would guess: a peft adapter of a CLIPVisionModel saved under transformers 4 works under transformers 5: both load the
# same checkpoint of the model.
# What happens: version 5 dropped `vision_model.` from the names inside CLIPVisionModel. PeftModel.from_pretrained finds
# none of the adapter's factors and goes on with a fresh LoRA that does nothing (a warning names missing keys), while
# `model.load_adapter` of transformers 5 renames them and gives the right features.
# Versions: peft 0.21.2; transformers 4.57.6 (saved) and 5.24.0 (loaded); torch 2.13.0 (CPU).
# Seen: effect of the LoRA under 4: above 0; under 5 by PeftModel: 0.0; under 5 by load_adapter: equal to that under 4.
# Why it matters: the public CLIP ViT LoRA markets were saved under 4; with PeftModel one compares the bare tower.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==4.57.6 peft==0.21.2
"$tmp/venv/bin/pip" install -q --no-compile --target "$tmp/five" --no-deps transformers==5.24.0
"$tmp/venv/bin/pip" install -q --no-compile --target "$tmp/five" "huggingface_hub==2.4.0" "tokenizers==0.23.3"
cd "$tmp"
"$tmp/venv/bin/python" - "$tmp" <<'EOF'
import os, subprocess, sys
folder = sys.argv[1]
code = '''
import sys, warnings, torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from peft import LoraConfig, PeftModel, get_peft_model
warnings.simplefilter("ignore")
folder, step = sys.argv[1:]
x = torch.ones(1, 3, 32, 32)
features = lambda m: m(pixel_values=x).pooler_output.detach()
distance = lambda a, b: float((a - b).norm() / b.norm())
torch.manual_seed(0)
if step == "save":
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    tower = CLIPVisionModel(CLIPVisionConfig(**size)).eval()
    tower.save_pretrained(folder + "/tower")
    base = features(tower)
    model = get_peft_model(tower, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(folder + "/adapter")
    torch.save(features(model), folder + "/features.pt")
    print(distance(features(model), base))
else:
    load = lambda: CLIPVisionModel.from_pretrained(folder + "/tower").eval()
    base, then, tower = features(load()), torch.load(folder + "/features.pt"), load()
    by_peft = features(PeftModel.from_pretrained(load(), folder + "/adapter").eval())
    tower.load_adapter(folder + "/adapter")
    print(distance(by_peft, base), distance(features(tower.eval()), then))
'''
def run(step, path):
    result = subprocess.run([sys.executable, "-c", code, folder, step], env={**os.environ, "PYTHONPATH": path}, check=True,
                            stdout=subprocess.PIPE, text=True)
    return [float(v) for v in result.stdout.split()]
effect, = run("save", "")
by_peft, by_load = run("load", folder + "/five")
print(f"LoRA effect under 4: {effect:.2g}; under 5 by PeftModel: {by_peft:.2g}; load_adapter against 4: {by_load:.2g}")
if not (effect > 0.01 and by_peft < 1e-6 and by_load < 1e-4):
    sys.exit("changed: a CLIPVisionModel adapter of transformers 4 under transformers 5")
print("as seen: PeftModel.from_pretrained drops the whole adapter, load_adapter keeps it")
EOF
