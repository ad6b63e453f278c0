#!/usr/bin/env bash
# One would guess: a package that is only installed beside papermill, and that papermill never asks for, costs it nothing.
# What happens: papermill opens notebooks with nbformat, nbformat imports jsonschema, and jsonschema looks whether
# rfc3987-syntax is there, to check web addresses. Jupyter Server brings it (jupyter-events asks for
# jsonschema[format-nongpl]), and importing it builds a parser for every rule of the grammar of web addresses. No notebook
# has an address to be checked.
# Versions: papermill 2.7.0, nbformat 5.10.4, jsonschema 4.26.0, jupyter-events 0.12.1, rfc3987-syntax 1.1.0, lark 1.3.1.
# Seen: importing papermill builds no parser before jupyter-events is installed, and 39 after it; the import then takes 2.0
# seconds of CPU in place of 0.5. Ray's workers import jsonschema, too.
# Why it matters: every papermill command pays it, and so does every worker of Ray. Where many short runs are started,
# put a module rfc3987_syntax that raises ImportError in front of it; jsonschema does without.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q papermill==2.7.0 nbformat==5.10.4 jsonschema==4.26.0
cd "$tmp"
cat > look.py <<'EOF'
import sys, time
started = time.process_time()
import papermill
seconds = time.process_time() - started
lark = sys.modules.get("lark")
built = []
if lark is not None:
    import gc
    built = [x for x in gc.get_objects() if type(x) is lark.Lark]
print(f"{len(built)} {seconds:.2f} {'rfc3987_syntax' in sys.modules}")
EOF
"$tmp/venv/bin/python" look.py > /dev/null  # compiled once
before=$("$tmp/venv/bin/python" look.py)
"$tmp/venv/bin/pip" install -q jupyter-events==0.12.1 rfc3987-syntax==1.1.0 lark==1.3.1
"$tmp/venv/bin/python" look.py > /dev/null
after=$("$tmp/venv/bin/python" look.py)
mkdir front && echo 'raise ImportError("left out")' > front/rfc3987_syntax.py
without=$(PYTHONPATH=front "$tmp/venv/bin/python" look.py)
echo "parsers, seconds, grammar imported: papermill alone $before; beside jupyter-events $after; with the module in front $without"
read -r n_before _ there_before <<< "$before"
read -r n_after _ there_after <<< "$after"
read -r n_without _ _ <<< "$without"
if [ "$n_before $there_before" != "0 False" ] || [ "$n_after" -lt 2 ] || [ "$there_after" != True ] || [ "$n_without" != 0 ]; then
  echo "changed: what importing papermill builds beside jupyter-events"
  exit 1
fi
echo "as seen: installing jupyter-events makes papermill build a grammar of web addresses"
