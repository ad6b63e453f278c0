#!/usr/bin/env bash
# One would guess: an array saved with safetensors.numpy and loaded again is equal to the array saved, or saving is refused
# (safetensors.torch refuses or copes with tensors that are not contiguous).
# What happens: for an array that is a view - transposed, sliced with a step, reversed, Fortran-ordered - the file keeps the
# shape, but the numbers come back in another order. No error.
# Versions: safetensors 0.8.0, numpy 2.4.6.
# Seen: a.T, a[:, ::2], a[::-1] and asfortranarray(a) come back wrong; a contiguous copy comes back right.
# Why it matters: LoRA factors are transposed all the time (B.T @ A.T, JAX's layout, fan_in_fan_out); the file loads, has the
# right shapes, and holds another LoRA. Save np.ascontiguousarray(x).
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys
import numpy as np
from safetensors.numpy import load_file, save_file
a = np.arange(12, dtype=np.float32).reshape(3, 4)
views = {"transposed": a.T, "stepped": a[:, ::2], "reversed": a[::-1], "fortran": np.asfortranarray(a), "copy": np.ascontiguousarray(a.T)}
save_file(views, "views.safetensors")
loaded = load_file("views.safetensors")
seen = {k: (loaded[k].shape == v.shape, bool(np.array_equal(loaded[k], v))) for k, v in views.items()}
print("shape kept, numbers kept:", seen)
if any(v != (True, k == "copy") for k, v in seen.items()):
    sys.exit("changed: safetensors.numpy with views")
print("as seen: right shapes, scrambled numbers")
EOF
