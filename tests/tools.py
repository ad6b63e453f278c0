"""What several tests need: one way to run a notebook, and the stamp that says with which code it was run.

python tests/tools.py execute nbs/1_method/00_lora.ipynb ...   runs notebooks in place, cleans and stamps them
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = 'executed_with'  # key of the notebooks' metadata, see allowed_metadata_keys in settings.ini


@lru_cache
def _read_notebook(path, changed):
    "The notebook at `path`, as it was when it was `changed`."
    return json.loads(path.read_text(encoding='utf-8'))


def read_cells(path, kind='code'):
    "The cells of one kind of the notebook at `path`, each with its source as one text."
    path = Path(path)
    cells = _read_notebook(path, path.stat().st_mtime_ns)['cells']
    return [dict(c, source=''.join(c['source'])) for c in cells if c['cell_type'] == kind]


def parse_cell(cell):
    "The source of `cell` as a syntax tree, without the lines that only IPython understands."
    lines = cell['source'].splitlines()
    return ast.parse('\n'.join('' if re.match(r'\s*[%!]', line) else line for line in lines))


def strip_docstrings(tree):
    "`tree` without docstrings: prose may change without making an output old."
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                body[0].value.value = ''
    return tree


def find_module(name):
    "The file of the module or name `name` of the package; None if it is not one of ours."
    parts = name.split('.')
    while parts and parts[0] == 'lora_recycle':
        path = ROOT.joinpath(*parts)
        for file in (path.with_suffix('.py'), path / '__init__.py'):
            if file.is_file():
                return file
        parts.pop()
    return None


def list_imports(tree, package=''):
    "Full names of the modules of ours that `tree` imports; `package`: where relative ones start."
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) - node.level + 1]
            start = '.'.join(above) if node.level else ''
            module = '.'.join(filter(None, (start, node.module)))
            names += [module, *(f'{module}.{alias.name}' for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.split('.')[0] == 'lora_recycle']


@lru_cache
def read_module(file):
    "A module of ours as a text that prose does not change, and the files of ours that it imports."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    package = '.'.join(file.relative_to(ROOT).parent.parts)
    found = {find_module(name) for name in list_imports(tree, package)}
    files = sorted(f for f in found - {None, file} if f.name != '__init__.py')
    return ast.dump(strip_docstrings(tree)), files


def compute_stamp(path):
    "Digest of the code of the notebook at `path` and of all modules of ours that it reaches."
    trees = [parse_cell(cell) for cell in read_cells(path)]
    found = {find_module(name) for tree in trees for name in list_imports(tree)}
    todo = sorted(f for f in found - {None} if f.name != '__init__.py')
    seen = {}
    while todo:
        file = todo.pop()
        if file not in seen:
            seen[file], more = read_module(file)
            todo += more
    codes = [('', ast.dump(strip_docstrings(tree))) for tree in trees]
    codes += [(f.relative_to(ROOT).as_posix(), seen[f]) for f in sorted(seen)]
    digest = hashlib.sha256()
    for name, code in codes:
        digest.update(f'{name}\n{code}\n'.encode())
    return digest.hexdigest()[:16]


def read_stamp(path):
    "The stamp that the notebook at `path` was given when it was run; None if it has none."
    metadata = json.loads(Path(path).read_text(encoding='utf-8'))['metadata']
    return metadata.get('lora_recycle', {}).get(STAMP)


def write_stamp(path):
    "Give the notebook at `path`, just run, its stamp."
    notebook = json.loads(Path(path).read_text(encoding='utf-8'))
    notebook['metadata']['lora_recycle'] = {STAMP: compute_stamp(path)}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    Path(path).write_text(text + '\n', encoding='utf-8')


def run_tool(*command, **more):
    "Run a command of the environment that this Python belongs to; its output if it fails."
    beside = Path(sys.executable).parent / command[0]
    tool = str(beside) if beside.exists() else command[0]
    return subprocess.run([tool, *map(str, command[1:])], check=True, timeout=1800, **more)


def drop_bars(path):
    "Remove progress bars from the outputs: `TQDM_DISABLE` does not stop those of a notebook."
    notebook = json.loads(Path(path).read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if 'outputs' in cell:
            kept = [o for o in cell['outputs'] if 'widget-view' not in json.dumps(o)]
            cell['outputs'] = kept
    notebook['metadata'].pop('widgets', None)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    Path(path).write_text(text + '\n', encoding='utf-8')


def execute(path):
    "Run the notebook at `path` in place, without progress bars, clean it and stamp it."
    env = dict(os.environ, TQDM_DISABLE='1')
    how = ('--to', 'notebook', '--execute', '--inplace', '--log-level', 'WARN')
    run_tool('jupyter', 'nbconvert', *how, Path(path).name, cwd=Path(path).parent, env=env)
    drop_bars(path)
    run_tool('nbdev_clean', '--fname', Path(path).resolve(), cwd=ROOT)
    write_stamp(path)


def list_command(notebook, target, **parameters):
    "The command by which a user runs `nbs/notebook` with `parameters` into the file `target`."
    given = [part for item in parameters.items() for part in ('-p', *map(str, item))]
    start = (sys.executable, '-m', 'papermill', '--no-progress-bar')
    return [*start, f'nbs/{notebook}', str(target), *given]


def try_papermill(notebook, target, env=None, **parameters):
    "That command to its end, from the project's folder: exit status and what it said."
    target.parent.mkdir(parents=True, exist_ok=True)
    how = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    done = subprocess.run(list_command(notebook, target, **parameters), **how)
    return done.returncode, done.stdout + done.stderr


def papermill(notebook, target, **parameters):
    "The same where it must succeed: the executed notebook, `target`."
    code, said = try_papermill(notebook, target, **parameters)
    assert code == 0, said[-3000:]
    return target


def run_cells(notebook, last=None, **parameters):
    "The names left by the cells of `nbs/notebook`, up to the one with `last` if given, run here."
    cells = read_cells(ROOT / 'nbs' / notebook)
    ends = [n for n, cell in enumerate(cells, 1) if last is not None and last in cell['source']]
    if last is not None and not ends:
        raise ValueError(f'no cell of {notebook} holds {last!r}')
    names = dict(__name__=notebook)
    parameters = {k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()}
    for cell in cells[: ends[0] if ends else None]:
        exec(compile(cell['source'], notebook, 'exec'), names)
        if 'parameters' in cell['metadata'].get('tags', []):
            names.update(parameters)
    if 'matplotlib.pyplot' in sys.modules:
        sys.modules['matplotlib.pyplot'].close('all')
    return names


if __name__ == '__main__':
    for name in sys.argv[2:]:
        print(name, flush=True)
        execute(name) if sys.argv[1] == 'execute' else write_stamp(name)
