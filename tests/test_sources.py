"The notebooks are the source: they are clean, complete, short-celled, and what they export is what is committed."

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts)
)
MODULES = sorted(
    (
        p
        for p in (ROOT / 'lora_recycle').rglob('*.py')
        if p.name not in ('__init__.py', '_modidx.py')
    ),
    key=lambda p: p.stem,
)
CELL_LINES, FUNCTION_LINES, MEGABYTES = 40, 30, 1


def cells(path, kind='code'):
    "The cells of one kind of the notebook at `path`, each with its source as one text"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [dict(c, source=''.join(c['source'])) for c in found if c['cell_type'] == kind]


def code(cell):
    "The source of `cell` as a syntax tree, without the lines that only IPython understands"
    return ast.parse(
        '\n'.join(
            '' if line.lstrip().startswith(('%', '!')) else line
            for line in cell['source'].splitlines()
        )
    )


def lines(cell):
    "Number of lines of `cell` that are neither empty nor directives"
    return sum(
        1 for line in cell['source'].splitlines() if line.strip() and not line.startswith('#|')
    )


def directive(cell, name):
    "What follows `#| name` in `cell`; None if it is not there"
    found = re.search(rf'^#\|\s*{name}\b:?[ \t]*(.*)$', cell['source'], re.MULTILINE)
    return found and found[1].strip()


def exported(cell):
    return directive(cell, 'exports?i?') is not None


def parameters(path):
    return [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]


def default_exp(path):
    return next(
        (directive(c, 'default_exp') for c in cells(path) if directive(c, 'default_exp')), None
    )


def for_papermill(path):
    return path.name.startswith('run_') or bool(parameters(path))


def definitions(tree):
    return [
        n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]


def number(path):
    "The place of the notebook at `path` in the reading order; None if it has none"
    found = re.match(r'(\d+)[a-z]?_', path.name)
    return found and int(found[1])


LIBRARY = [p for p in NOTEBOOKS if default_exp(p)]
PAPERMILL = [p for p in NOTEBOOKS if for_papermill(p)]
each = lambda paths: pytest.mark.parametrize('path', paths, ids=lambda p: p.name)


@each(NOTEBOOKS)
def test_title_and_summary_come_first(path):
    first = cells(path, 'markdown')[0]['source']
    assert re.match(r'# \S.*\n+> \S', first), (
        "the first markdown cell is '# Title' and '> one-line summary'"
    )
    # nbdev takes '- key: value' in this cell for settings, skip_exec among them
    assert not re.search(r'^- .*:', first, re.MULTILINE), 'put lists into the next markdown cell'


@each(NOTEBOOKS)
def test_outputs_are_sound(path):
    outputs = [o for c in cells(path) for o in c['outputs']]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert outputs or for_papermill(path), 'run the notebook and keep its outputs: people read them'
    assert path.stat().st_size < MEGABYTES * 2**20, 'make its pictures smaller'


@each(NOTEBOOKS)
def test_cells_are_short(path):
    long = [(c['source'].splitlines()[:2], lines(c)) for c in cells(path) if lines(c) > CELL_LINES]
    assert not long, f'more than {CELL_LINES} lines'


@each(NOTEBOOKS)
def test_imports_have_cells_of_their_own(path):
    for cell in cells(path):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in code(cell).body}
        assert kinds != {True, False}, cell['source']


@each(NOTEBOOKS)
def test_only_notebooks_for_papermill_are_left_out_of_nbdev_test(path):
    heads = '\n'.join(c['source'] for c in cells(path, 'raw'))
    if 'skip_exec' in heads:
        assert for_papermill(path), 'nbdev_test must run this notebook'


@each(LIBRARY)
def test_exported_functions_are_short(path):
    for cell in filter(exported, cells(path)):
        for node in ast.walk(code(cell)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= FUNCTION_LINES, f'{node.name} has {length} lines'


@each(LIBRARY)
def test_exported_names_are_shown_at_work(path):
    found = cells(path)
    for i, cell in enumerate(found):
        later = '\n'.join(c['source'] for c in found[i + 1 :] if not exported(c))
        for node in definitions(code(cell)) if exported(cell) else ():
            # a class may show itself through the function that returns it
            if not (node.name.startswith('_') or isinstance(node, ast.ClassDef)):
                assert re.search(rf'\b{node.name}\b', later), (
                    f'no later cell of the notebook uses {node.name}'
                )


@each(LIBRARY)
def test_there_is_prose(path):
    assert 3 * len(cells(path, 'markdown')) >= len(list(filter(exported, cells(path)))), (
        'a markdown cell for every three exported cells'
    )
    assert re.search(r'\btest_\w+\(|\bassert\b', '\n'.join(c['source'] for c in cells(path))), (
        'nothing is checked'
    )


@each(LIBRARY)
def test_notebooks_import_lower_numbers_only(path):
    numbers = {default_exp(p): number(p) for p in LIBRARY}
    for cell in filter(exported, cells(path)):
        for name in re.findall(r'^from lora_recycle\.(\w+) import', cell['source'], re.MULTILINE):
            assert name in numbers and numbers[name] < number(path), f'{path.name} imports {name}'


def test_one_notebook_for_each_module():
    names = [default_exp(p) for p in LIBRARY]
    assert len(set(names)) == len(names) and names
    for path in LIBRARY:
        assert path.stem == f'{path.stem.split("_", 1)[0]}_{default_exp(path)}', (
            'a notebook is named like its module'
        )
    assert sorted(names) == [p.stem for p in MODULES]


@each(PAPERMILL)
def test_parameters_are_literal_and_used(path):
    tagged = parameters(path)
    assert len(tagged) == 1, "exactly one cell has the tag 'parameters'"
    after = cells(path)[[c['id'] for c in cells(path)].index(tagged[0]['id']) + 1 :]
    read = {
        node.id
        for c in after
        for node in ast.walk(code(c))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    for node in code(tagged[0]).body:
        assert (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        ), ast.unparse(node)
        ast.literal_eval(
            node.value
        )  # papermill understands nothing else, and a derived value would keep its default
        assert node.targets[0].id in read, f'no later cell reads {node.targets[0].id}'


@each(PAPERMILL)
def test_papermill_runs_every_cell(path):
    hidden = [c['source'] for c in cells(path) if directive(c, 'eval') == 'false']
    assert not hidden, 'nbdev_test would skip it, papermill would not'


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the notebooks and the settings, without the generated modules"
    folder = tmp_path_factory.mktemp('fresh') / 'lora_recycle'
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.*'))
    (folder / 'lora_recycle').mkdir()
    for name in ('settings.ini', 'pyproject.toml', 'lora_recycle/__init__.py'):
        shutil.copy(ROOT / name, folder / name)
    return folder


def nbdev(command, folder):
    "Run a command of nbdev, the one that belongs to this Python, in `folder`"
    tool = shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)
    subprocess.run([tool], cwd=folder, check=True, timeout=300)


def test_modules_are_what_the_notebooks_export(fresh):
    nbdev('nbdev_export', fresh)
    names = lambda root: sorted(
        p.relative_to(root).as_posix() for p in (root / 'lora_recycle').rglob('*.py')
    )
    assert names(fresh) == names(ROOT), 'run nbdev_export'
    for name in [*names(ROOT), 'pyproject.toml']:
        assert (fresh / name).read_text() == (ROOT / name).read_text(), (
            f'{name}: edit the notebook, run nbdev_export'
        )


def test_notebooks_are_clean(fresh):
    nbdev('nbdev_clean', fresh)
    for path in NOTEBOOKS:
        assert (fresh / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), (
            f'run nbdev_clean: {path.name}'
        )
        assert len(parameters(fresh / path.relative_to(ROOT))) == len(parameters(path)), (
            'nbdev_clean dropped the parameters tag'
        )


@each(MODULES)
def test_public_names_have_docstrings(path):
    for node in definitions(ast.parse(path.read_text(encoding='utf-8'))):
        methods = [
            m
            for m in getattr(node, 'body', [])
            if isinstance(m, ast.FunctionDef) and isinstance(node, ast.ClassDef)
        ]
        for known in [node, *methods]:
            if not (node.name.startswith('_') or known.name.startswith('_')):
                assert ast.get_docstring(known), f'{node.name}: {known.name}'
