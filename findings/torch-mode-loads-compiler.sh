#!/usr/bin/env bash
# One would guess: a TorchDispatchMode that looks at operators and passes them on costs a Python call for each; so do torch's
# own counters, which are such modes.
# What happens: torch wraps the __torch_dispatch__ of every subclass so that its compiler leaves it alone, and the wrapper
# imports that compiler at the first operator: torch._dynamo and with it sympy, although nothing is ever compiled.
# Versions: torch 2.13.0 (CPU).
# Seen: a product under a mode of five lines imports 823 modules, among them torch._dynamo and sympy, in five seconds; the same product without a mode imports none. Every process pays it anew.
# Why it matters: whoever counts operations, checks devices or rounds products in short tests and in many worker processes
# waits longer for the compiler than for the work.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys, time, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

def count(call):
    before, started = set(sys.modules), time.process_time()
    call()
    return set(sys.modules) - before, time.process_time() - started

def under_a_mode():
    with Passes():
        x @ x

x = torch.randn(8, 8)
plain, _ = count(lambda: x @ x)
first, seconds = count(under_a_mode)
second, _ = count(under_a_mode)
print(f"modules imported by a product: {len(plain)} without a mode, {len(first)} under the first one ({seconds:.1f} s), {len(second)} under the next")
if plain or second or len(first) < 200 or not {"torch._dynamo", "sympy"} <= first:
    sys.exit("changed: what the first operator under a TorchDispatchMode imports")
print("as seen: the first operator under a mode loads torch's compiler")
EOF
