"The notebooks are the source: clean, narrow, fresh, and what they export is what is committed."

import ast
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tools import ROOT, compute_stamp, list_imports, parse_cell, read_cells, read_stamp, run_tool

PACKAGE = ROOT / 'lora_recycle'
WIDTH, CELL_LINES, FUNCTION_LINES, SENTENCE, PARAMETERS = 100, 30, 45, 90, 6
MEGABYTES = 1


def is_hidden(path):
    return any(part.startswith(('.', '_')) for part in path.relative_to(ROOT).parts)


NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if not is_hidden(p))
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if not p.name.startswith('_'))


def count_lines(cell):
    "Number of lines of `cell` that are neither empty nor directives."
    return sum(bool(line.strip()) and line[:2] != '#|' for line in cell['source'].splitlines())


def find_directive(cell, name):
    "What follows `#| name` in `cell`; None if it is not there."
    found = re.search(rf'^#\|\s*{name}\b:?[ \t]*(.*)$', cell['source'], re.MULTILINE)
    return found and found[1].strip()


def is_exported(cell):
    return find_directive(cell, 'exports?i?') is not None


def list_parameters(path):
    return [c for c in read_cells(path) if 'parameters' in c['metadata'].get('tags', [])]


def find_module_name(path):
    names = (find_directive(c, 'default_exp') for c in read_cells(path))
    return next(filter(None, names), None)


def is_for_papermill(path):
    return path.name.startswith('run_') or bool(list_parameters(path))


def list_definitions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in tree.body if isinstance(node, kinds)]


def list_functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def is_public(node):
    return not node.name.startswith('_')


def name_arguments(function):
    a = function.args
    every = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [name for name in every if name not in ('self', 'cls')]


LIBRARY = [p for p in NOTEBOOKS if find_module_name(p)]
PAPERMILL = [p for p in NOTEBOOKS if is_for_papermill(p)]


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda p: p.relative_to(ROOT).as_posix())


@each(NOTEBOOKS)
def test_title_and_summary_come_first(path):
    first = read_cells(path, 'markdown')[0]['source']
    assert re.match(r'# \S.*\n+> \S', first), "the first cell is '# Title' and '> summary'"
    # nbdev takes '- key: value' in this cell for settings, skip_exec among them
    assert not re.search(r'^- .*:', first, re.MULTILINE), 'put lists into the next markdown cell'


@each(NOTEBOOKS)
def test_outputs_are_sound(path):
    outputs = [o for c in read_cells(path) for o in c['outputs']]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert not [o for o in outputs if o.get('name') == 'stderr'], 'a warning or a log stands in it'
    assert 'widget-view' not in path.read_text(encoding='utf-8'), 'run it with TQDM_DISABLE=1'
    assert outputs or is_for_papermill(path), 'run the notebook: people read its outputs'
    assert path.stat().st_size < MEGABYTES * 2**20, 'make its pictures smaller'


@each([p for p in NOTEBOOKS if not is_for_papermill(p)])
def test_outputs_are_as_new_as_the_code(path):
    assert read_stamp(path) == compute_stamp(path), (
        f'run it again: python tests/tools.py execute {path.relative_to(ROOT)}'
    )


@each([p for p in PAPERMILL])
def test_sources_for_papermill_hold_no_output(path):
    assert not any(c['outputs'] for c in read_cells(path)), 'its executed copy is in results/'


@each(NOTEBOOKS)
def test_code_is_narrow(path):
    wide = [x for c in read_cells(path) for x in c['source'].splitlines() if len(x) > WIDTH]
    assert not wide, f'more than {WIDTH} characters'


@each(sorted([*MODULES, *(ROOT / 'tests').glob('*.py'), ROOT / 'setup.py']))
def test_modules_are_narrow(path):
    wide = [x for x in path.read_text(encoding='utf-8').splitlines() if len(x) > WIDTH + 20]
    listed = [x for x in wide if not x.lstrip().startswith(('__all__', "'", '# %%'))]
    assert not [x for x in listed if len(x) > WIDTH]


@each(NOTEBOOKS)
def test_cells_are_short(path):
    long = [c['source'].splitlines()[:3] for c in read_cells(path) if count_lines(c) > CELL_LINES]
    assert not long, f'more than {CELL_LINES} lines'


@each(NOTEBOOKS)
def test_imports_have_cells_of_their_own(path):
    for cell in read_cells(path):
        nodes = parse_cell(cell).body
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes}
        assert kinds != {True, False}, cell['source']


@each(NOTEBOOKS)
def test_only_notebooks_for_papermill_are_left_out_of_nbdev_test(path):
    heads = '\n'.join(c['source'] for c in read_cells(path, 'raw'))
    assert 'skip_exec' not in heads or is_for_papermill(path), 'nbdev_test must run this notebook'


@each(MODULES)
def test_functions_are_short_and_take_few_arguments(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in list_functions(tree):
        length = node.end_lineno - node.lineno + 1
        assert length <= FUNCTION_LINES, f'{node.name} has {length} lines'
        if is_public(node):
            n = len(name_arguments(node))
            assert n <= PARAMETERS, f'{node.name} takes {n} arguments; bundle some'


@each(MODULES)
def test_one_idea_a_statement(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            packed = isinstance(node.targets[0], ast.Tuple)
            assert not packed, f'line {node.lineno}: {ast.unparse(node)}'


def check_docstring(node, name):
    "A sentence of at most 90 characters that ends, then whatever else there is to say."
    text = ast.get_docstring(node)
    assert text, f'{name} has no docstring'
    first = text.splitlines()[0]
    assert len(first) <= SENTENCE, f'{name}: {len(first)} characters'
    assert first[-1] in '.:?!', f'{name}: end the sentence'


@each(MODULES)
def test_public_names_have_one_form_of_docstring(path):
    source = path.read_text(encoding='utf-8')
    lines = source.splitlines()
    for node in filter(is_public, list_definitions(ast.parse(source))):
        check_docstring(node, node.name)
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and is_public(m)]
            for method in methods:
                check_docstring(method, f'{node.name}.{method.name}')
            continue
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        for name in name_arguments(node):
            described = any(re.search(rf'\b{name}\b[^#]*#', line) for line in head)
            assert described, f'{node.name}: say what `{name}` is, in a comment behind it'


def test_no_public_name_means_two_things():
    names = Counter()
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        names.update(node.name for node in filter(is_public, list_definitions(tree)))
    assert not [name for name, n in names.items() if n > 1]


@each(LIBRARY)
def test_what_is_exported_is_shown_at_work_at_once(path):
    waiting = set()
    for cell in read_cells(path):
        if is_exported(cell):
            nodes = list_definitions(parse_cell(cell))
            functions = [n for n in nodes if not isinstance(n, ast.ClassDef)]
            waiting |= {n.name for n in filter(is_public, functions)}
        elif waiting and count_lines(cell):
            waiting -= set(re.findall(r'\w+', cell['source']))
            assert not waiting, f'the next code cell calls {sorted(waiting)}'
    assert not waiting, f'no code cell calls {sorted(waiting)}'


@each(LIBRARY)
def test_there_is_prose(path):
    exported = list(filter(is_exported, read_cells(path)))
    prose = read_cells(path, 'markdown')
    assert 3 * len(prose) >= len(exported), 'a markdown cell for every three exported cells'
    code = '\n'.join(c['source'] for c in read_cells(path))
    assert re.search(r'\btest_\w+\(|\bassert\b', code), 'nothing is checked'


def test_one_notebook_for_each_module_in_the_same_room():
    places = {}
    for path in LIBRARY:
        room = re.sub(r'^\d+_', '', path.parent.name).replace('nbs', '')
        name = re.sub(r'^\d+_', '', path.stem)
        places['.'.join(filter(None, (room, name)))] = path
    assert set(places) == {find_module_name(p) for p in LIBRARY}
    names = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in MODULES}
    assert names == set(places)


@each(LIBRARY)
def test_a_room_is_read_in_the_order_of_its_numbers(path):
    here = {find_module_name(p): p for p in LIBRARY if p.parent == path.parent}
    for cell in filter(is_exported, read_cells(path)):
        for name in list_imports(parse_cell(cell)):
            other = here.get(name.removeprefix('lora_recycle.'))
            assert other is None or other.name < path.name, f'{path.name} imports {name}'


def test_modules_do_not_import_each_other_in_a_ring():
    graph = {}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        top = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])
        package = '.'.join(path.relative_to(ROOT).parent.parts)
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        graph[name] = set(list_imports(top, package))
    free = set()
    while len(free) < len(graph):
        more = {n for n, needs in graph.items() if needs & set(graph) - {n} <= free}
        assert more > free, f'a ring among {sorted(set(graph) - free)}'
        free |= more


@each(PAPERMILL)
def test_parameters_are_literal_and_used(path):
    tagged = list_parameters(path)
    assert len(tagged) == 1, "exactly one cell has the tag 'parameters'"
    cells = read_cells(path)
    after = cells[[c['id'] for c in cells].index(tagged[0]['id']) + 1 :]
    nodes = [node for c in after for node in ast.walk(parse_cell(c))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    for node in parse_cell(tagged[0]).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        # papermill understands nothing else, and a derived value would keep its default
        ast.literal_eval(node.value)
        assert node.targets[0].id in used, f'no later cell reads {node.targets[0].id}'


@each(PAPERMILL)
def test_papermill_runs_every_cell(path):
    skipped = [c['source'] for c in read_cells(path) if find_directive(c, 'eval') == 'false']
    assert not skipped, 'nbdev_test would skip it, papermill would not'


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the notebooks and the settings, without the generated modules."
    folder = tmp_path_factory.mktemp('fresh') / 'lora_recycle'
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.*'))
    (folder / 'lora_recycle').mkdir()
    for name in ('settings.ini', 'pyproject.toml', 'lora_recycle/__init__.py'):
        shutil.copy(ROOT / name, folder / name)
    return folder


def list_files(root):
    files = (root / 'lora_recycle').rglob('*.py')
    return sorted(p.relative_to(root).as_posix() for p in files if p.name != '_modidx.py')


def test_modules_are_what_the_notebooks_export(fresh):
    run_tool('nbdev_export', cwd=fresh)
    by_hand = {'lora_recycle/__main__.py'}
    assert set(list_files(fresh)) | by_hand >= set(list_files(ROOT)), 'run nbdev_export'
    for name in [*list_files(fresh), 'pyproject.toml']:
        same = (fresh / name).read_text() == (ROOT / name).read_text()
        assert same, f'{name}: edit the notebook, run nbdev_export'


def test_notebooks_are_clean(fresh):
    run_tool('nbdev_clean', cwd=fresh)
    for path in NOTEBOOKS:
        copy = fresh / path.relative_to(ROOT)
        assert copy.read_bytes() == path.read_bytes(), f'run nbdev_clean: {path.name}'
        kept = len(list_parameters(copy)) == len(list_parameters(path))
        assert kept, 'nbdev_clean dropped the parameters tag'


def test_no_committed_file_names_a_place_on_a_machine():
    text = ('.ipynb', '.json', '.csv', '.md', '.py', '.yml', '.ini', '.toml', '.sh')
    found = []
    for folder in ('nbs', 'results', 'lora_recycle', 'findings'):
        for path in (ROOT / folder).rglob('*'):
            if path.suffix in text and not is_hidden(path):
                place = r'"/(work|root|home|Users|tmp/w)/|\'/(work|root|home|Users|tmp/w)/'
                found += [path] if re.search(place, path.read_text(encoding='utf-8')) else []
    assert not found
