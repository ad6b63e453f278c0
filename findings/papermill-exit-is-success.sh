#!/usr/bin/env bash
# One would guess: a notebook that stops half-way makes papermill return an error, or is at least not called finished.
# What happens: sys.exit(0) in a cell (a guard such as "nothing to do", or a library's argument parser) ends the run: the
# remaining cells are not executed, and papermill returns status 0. Only the cell's own metadata says "failed".
# Versions: papermill 2.7.0, ipykernel 7.4.0.
# Seen: three cells, the second exits: status 0, the third is pending and its file is not there; sys.exit(1): status not 0.
# Why it matters: pipelines of many LoRA trainings go by the status; a half-run notebook counts as a finished run.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile papermill==2.7.0 ipykernel==7.4.0 nbformat==5.11.1
cd "$tmp"
export PATH="$tmp/venv/bin:$PATH"
"$tmp/venv/bin/python" - <<'EOF'
import json, subprocess, sys
import nbformat
v4 = nbformat.v4
def notebook(path, *sources):
    cells = [v4.new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
def run(path, *options):
    status = subprocess.run(["papermill", path, "out.ipynb", *options], capture_output=True).returncode
    cells = nbformat.read("out.ipynb", as_version=4).cells
    return status, "".join(o.get("text", "") for c in cells for o in c.get("outputs", [])).strip()

import os
seen = {}
for code in (0, 1):
    notebook("exit.ipynb", "x = 1", f"import sys; sys.exit({code})", "open('reached', 'w').write('x')")
    status, _ = run("exit.ipynb")
    seen[code] = status, [c.metadata.papermill.status for c in nbformat.read("out.ipynb", as_version=4).cells if "papermill" in c.metadata], os.path.exists("reached")
    print(f"sys.exit({code}): status {status}, cells {seen[code][1]}, last cell's file there {seen[code][2]}")
if seen[0] != (0, ["completed", "failed", "pending"], False) or seen[1][0] == 0:
    sys.exit("changed: sys.exit(0) in a cell under papermill")
print("as seen: status 0 though the last cell never ran")
EOF
