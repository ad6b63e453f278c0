#!/usr/bin/env bash
# One would guess: `papermill -f params.json` reads JSON as JSON, so the learning rate 1e-05 that json.dump wrote is a number.
# What happens: the file is read as YAML 1.1, in which a number without a dot before the e is text: the notebook gets the
# string '1e-05'. 0.0001 and 1.5e-05 stay numbers, so it hits round powers of ten below 1e-4 only.
# Versions: papermill 2.7.0, ipykernel 7.4.0.
# Seen: {"a": 1e-05, "b": 0.0001, "c": 1.5e-05} arrives as str, float, float; `-p a 1e-05` arrives as float.
# Why it matters: sweeps over learning rates and weight decays of LoRAs: one column of the sweep is text, and
# comparisons or f-strings with it fail late or not at all.
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

notebook("p.ipynb", "a = b = c = 0.0", "print(type(a).__name__, type(b).__name__, type(c).__name__)")
with open("p.json", "w") as file:
    json.dump({"a": 1e-5, "b": 1e-4, "c": 1.5e-5}, file)
print(open("p.json").read())
by_file, by_option = run("p.ipynb", "-f", "p.json"), run("p.ipynb", "-p", "a", "1e-05")
print("by file:", by_file, "by option:", by_option)
if by_file != (0, "str float float") or not by_option[1].startswith("float"):
    sys.exit("changed: small numbers in a JSON parameter file")
print("as seen: 1e-05 of a JSON file arrives as text")
EOF
