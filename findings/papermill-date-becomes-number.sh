#!/usr/bin/env bash
# One would guess: `papermill -p run 2026_11_27` passes a text: it has underscores, and the notebook's default is a text.
# What happens: the value is tried with Python's int first, which allows underscores between digits: the notebook gets the
# number 20261127. Names such as 4_8_16 (ranks) lose their parts in the same way; `nan` and `inf` become floats.
# Versions: papermill 2.7.0, ipykernel 7.4.0.
# Seen: -p run 2026_11_27 -> int 20261127; -p run 4_8_16 -> int 4816; -p run 2026-11-27 -> str; -r run 2026_11_27 -> str.
# Why it matters: names of runs and folders; two sweeps named 4_8 and 48 write into one folder. Use -r for text.
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

notebook("p.ipynb", "run = 'name'", "print(type(run).__name__, run)")
seen = {f"{o} {v}": run("p.ipynb", o, "run", v) for o, v in (("-p", "2026_11_27"), ("-p", "4_8_16"), ("-p", "2026-11-27"), ("-r", "2026_11_27"))}
for k, v in seen.items():
    print(k, "->", v)
if [v[1] for v in seen.values()] != ["int 20261127", "int 4816", "str 2026-11-27", "str 2026_11_27"]:
    sys.exit("changed: digits with underscores as a papermill parameter")
print("as seen: 2026_11_27 arrives as the number 20261127")
EOF
