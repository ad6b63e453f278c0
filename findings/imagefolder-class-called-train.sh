#!/usr/bin/env bash
# One would guess: load_dataset("imagefolder") on a folder of class folders bus, car and train gives nine images of three
# classes in one split.
# What happens: a class folder whose name holds a word such as train, test, validation or dev is taken for a split;
# all other classes are left out, and with one folder left there is no label column. No warning.
# Versions: datasets 5.2.0, pillow 13.0.0.
# Seen: three images each of bus, car, train: one split `train`, 3 of 9 images, no label. bus, car, "crash-test dummy": one
# split `test`, 3 of 9. Control bus, car, tram: 9 images, three labels. data_files="**" keeps all nine and their labels.
# Why it matters: few-shot folders are named by people (train, test tube); the LoRA or the prototypes are then fitted to a
# part of the data, and the count is the only sign of it.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import os, sys, tempfile
import numpy as np
from PIL import Image
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
def look(*classes, **kwargs):
    folder = tempfile.mkdtemp()
    for c in classes:
        os.mkdir(os.path.join(folder, c))
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(os.path.join(folder, c, f"{i}.png"))
    sets = load_dataset("imagefolder", data_dir=folder, cache_dir=tempfile.mkdtemp(), **kwargs)
    found = {k: (len(v), v.features["label"].names if "label" in v.features else None) for k, v in sets.items()}
    print(classes, kwargs, "->", found)
    return found
good = look("bus", "car", "tram") == {"train": (9, ["bus", "car", "tram"])}
good &= look("bus", "car", "train") == {"train": (3, None)}
good &= look("bus", "car", "crash-test dummy") == {"test": (3, None)}
good &= look("bus", "car", "train", data_files="**") == {"train": (9, ["bus", "car", "train"])}
if not good:
    sys.exit("changed: class folders with a split's name in imagefolder")
print("as seen: a class called train swallows the data set")
EOF
