#!/usr/bin/env bash
# One would guess: nbdev-clean removes outputs and noise from a notebook; papermill runs it afterwards as before.
# What happens: nbdev-clean also removes the cell tag `parameters`. papermill then puts the given values in front of the
# notebook, the defaults in the notebook overwrite them, and the run goes on with the defaults: status 0, one log line.
# Versions: nbdev 3.3.26, papermill 2.7.0, ipykernel 7.4.0.
# Seen: rank = 4 in the notebook, `-p rank 8`: before cleaning the run prints 8, after cleaning it prints 4.
# Why it matters: nbdev installs the cleaning as a git hook; a sweep of LoRA ranks started from a fresh clone computes one
# rank many times. allowed_cell_metadata_keys keeps the tags.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile papermill==2.7.0 ipykernel==7.4.0 nbformat==5.11.1 nbdev==3.3.26
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

notebook("n.ipynb", "rank = 4", "print(rank)")
before = run("n.ipynb", "-p", "rank", "8")
subprocess.run(["nbdev-clean", "--fname", "n.ipynb"], check=True, capture_output=True)
after = run("n.ipynb", "-p", "rank", "8")
print("before cleaning:", before, "after:", after, "tags left:", [c.metadata.get("tags") for c in nbformat.read("n.ipynb", as_version=4).cells])
if before != (0, "8") or after != (0, "4"):
    sys.exit("changed: papermill parameters after nbdev-clean")
print("as seen: after nbdev-clean papermill's parameters are without effect")
EOF
