"The package is complete, needs what it says it needs, and its papers agree with each other."

import ast
import configparser
import csv
import itertools
import json
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import pytest

import lora_recycle

ROOT = Path(__file__).resolve().parent.parent
INSTALL, TEST, JOB = (
    'pip install --no-compile -e ".[dev]"',
    'OMP_NUM_THREADS=1 nbdev_test --n_workers 2 && OMP_NUM_THREADS=1 pytest -q -n 2',
    'papermill nbs/run_table.ipynb',
)
# what settings.ini calls it -> what Python calls it
PLAIN = {
    'torch': 'torch',
    'torchvision': 'torchvision',
    'scikit-learn': 'sklearn',
    'safetensors': 'safetensors',
    'tqdm': 'tqdm',
    'matplotlib': 'matplotlib',
    'pillow': 'PIL',
    'numpy': 'numpy',
    'huggingface_hub': 'huggingface_hub',
    'filelock': 'filelock',
}
BENCH = {
    'open_clip_torch': 'open_clip',
    'timm': 'timm',
    'pandas': 'pandas',
    'seaborn': 'seaborn',
    'nevergrad': 'nevergrad',
    'tokenizers': 'tokenizers',
}
DOOR = ('LoRA', 'load_backbone', 'load_set', 'read_market', 'average', 'merge', 'advise', 'recycle')
DOOR += ('FewShotClassifier', 'compare', 'add')
FOR_DEVELOPERS = {
    'nbdev',
    'papermill',
    'fastcore',
    'execnb',
    'IPython',
    'ipykernel',
    'ipywidgets',
    'jupyter',
    'jupyter_core',
    'jupyter_client',
    'nbformat',
    'nbclient',
    'nbconvert',
    'notebook',
    'pytest',
    'hypothesis',
    'peft',
    'transformers',
    'playwright',
}


@pytest.fixture(scope='module')
def settings():
    config = configparser.ConfigParser()
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def python(code):
    "What a fresh Python prints that runs `code` far from the checkout"
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(settings, key):
    return {re.split('[<>=!~]', r)[0] for r in settings[key].split()}


def imported(node):
    "What is imported by `node` of a syntax tree from outside of its own package."
    if isinstance(node, ast.Import):
        return {a.name.split('.')[0] for a in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or 'lora_recycle').split('.')[0]}
    return set()


def test_modules_import_only_what_is_required(settings):
    assert names_of(settings, 'requirements') == set(PLAIN)
    assert names_of(settings, 'bench_requirements') == set(BENCH)
    optional = names_of(settings, 'ray_requirements')  # for those who have a cluster
    allowed = {*sys.stdlib_module_names, *PLAIN.values(), *BENCH.values(), 'lora_recycle'}
    for path in (ROOT / 'lora_recycle').rglob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        at_once = set().union(*map(imported, tree.body))
        assert not optional & at_once, f'{path.name} needs an optional package at once'
        for node in ast.walk(tree):
            assert imported(node) <= allowed | optional, f'{path.name}: {ast.unparse(node)}'


def test_developers_get_both_extras():
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    assert re.search(r"'dev': .* \+ bench \+ ray", setup)


def test_the_library_works_without_the_tools_of_developers():
    "Every module imports where these tools do not exist (seaborn alone takes IPython if it is there, so what is loaded would not tell)"
    loaded = python(
        'import sys\n'
        f'sys.modules.update(dict.fromkeys({sorted(FOR_DEVELOPERS)!r}))\n'  # None: as if not installed
        'import lora_recycle, importlib, pkgutil\n'
        "names = [m.name for m in pkgutil.walk_packages(lora_recycle.__path__, 'lora_recycle.')]\n"
        'for name in names: importlib.import_module(name)\n'
        "print(*names); print(*{name.split('.')[0] for name, module in sys.modules.items() if module})"
    ).splitlines()
    assert {'lora_recycle.core', 'lora_recycle.method.chain', 'lora_recycle.bench.plots'} <= set(
        loaded[0].split()
    )
    assert not FOR_DEVELOPERS & set(loaded[1].split())


def test_the_first_import_is_light():
    assert python("import lora_recycle, sys; print('torch' in sys.modules)").strip() == 'False'


def test_the_front_door_needs_no_extra():
    "Its names, and the ten lines, work where only the plain requirements are installed."
    absent = sorted({*BENCH.values(), *FOR_DEVELOPERS} - {'IPython'})
    words = python(
        'import sys\n'
        f'sys.modules.update(dict.fromkeys({absent!r}))\n'  # None: as if not installed
        'from importlib.resources import files\n'
        'import lora_recycle as lr\n'
        'for name in lr.__all__: getattr(lr, name)\n'
        "print(*lr.__all__); print({'torchvision', 'matplotlib'} & {*sys.modules})\n"
        "backbone = lr.load_backbone('miniature')\n"
        "market, _ = lr.read_market(files('lora_recycle') / 'assets/market', backbone)\n"
        "digits = lr.load_set('digits')\n"
        'model = lr.FewShotClassifier(backbone, lr.average(market))\n'
        'model.fit(digits.images[:20], digits.labels[:20])\n'
        'print(model.score(digits.images[20:60], digits.labels[20:60]) > 0.5)'
    ).splitlines()
    assert set(words[0].split()) == set(DOOR)
    assert words[1:] == ['set()', 'True'], 'they take seconds to import'


def test_the_front_door_is_seen_and_shut():
    assert set(DOOR) <= set(dir(lora_recycle)) and lora_recycle.__doc__
    with pytest.raises(AttributeError, match='no attribute .recycel.'):
        lora_recycle.recycel
    from lora_recycle.method.lora import average_products

    assert lora_recycle.average is average_products


def test_package_data_is_there():
    assets = files('lora_recycle') / 'assets'
    assert len([p for p in (assets / 'splits').iterdir() if p.name.endswith('.json')]) == 9
    pages = {p.name for p in (assets / 'page').iterdir()}
    assert pages == {'index.html', 'page.css', 'page.js', 'photos.json', 'photos.jpg'}
    assert (assets / 'paper_tables.csv').read_text(encoding='utf-8').count('\n') == 468


def test_wheel_and_source_archive_hold_all_assets(tmp_path):
    copy = tmp_path / 'source'
    for path in [
        *(ROOT / 'lora_recycle').rglob('*'),
        *(
            ROOT / n
            for n in (
                'settings.ini',
                'setup.py',
                'pyproject.toml',
                'MANIFEST.in',
                'README.md',
                'LICENSE',
                'CHANGELOG.md',
                'CONTRIBUTING.md',
                'environment.yml',
            )
        ),
    ]:
        if path.is_file() and '__pycache__' not in path.parts:
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    subprocess.run(
        [
            sys.executable,
            '-c',
            "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')",
        ],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=300,
    )
    packed = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'lora_recycle').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }
    assert packed <= set(zipfile.ZipFile(next((copy / 'out').glob('*.whl'))).namelist())
    with tarfile.open(next((copy / 'out').glob('*.tar.gz'))) as archive:
        kept = {n.split('/', 1)[-1] for n in archive.getnames()}
    assert packed | {'settings.ini', 'LICENSE', 'README.md'} <= kept


def test_one_version_everywhere(settings):
    assert lora_recycle.__version__ == settings['version']
    assert re.search(
        rf'^## {re.escape(settings["version"])}\b',
        (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'),
        re.MULTILINE,
    )


def test_readme_and_ci_give_the_same_commands():
    readme, ci = (
        (ROOT / 'README.md').read_text(encoding='utf-8'),
        (ROOT / '.ci/run').read_text(encoding='utf-8'),
    )
    for command in (INSTALL, TEST, JOB):
        assert command in readme, f'README.md does not show: {command}'
    assert INSTALL.replace('install', 'install --quiet') in ci and TEST in ci
    assert TEST in (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def list_texts(path):
    "The text of a page, or of all that a notebook shows as markdown."
    if path.suffix == '.md':
        return [path.read_text(encoding='utf-8')]
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    shown = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    texts = [c['source'] for c in cells if c['cell_type'] == 'markdown']
    return [''.join(t) for t in (*texts, *(o.get('text/markdown', '') for o in shown))]


PAGES = sorted(ROOT.glob('*.md'))
for _room in ('nbs', 'results', 'findings', 'lora_recycle'):
    _found = [p for kind in ('md', 'ipynb') for p in (ROOT / _room).rglob(f'*.{kind}')]
    PAGES += sorted(p for p in _found if '.ipynb_checkpoints' not in p.parts)


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for text in list_texts(page):
            links = re.findall(r'\]\(([^)#\s]+)', text)
            links += re.findall(r"""<img[^>]*src=["']([^"']+)""", text)
            near = [x for x in links if '://' not in x and not x.startswith(('mailto:', 'data:'))]
            here = page.relative_to(ROOT).as_posix()
            broken += [f'{here} links to {x}' for x in near if not (page.parent / x).exists()]
    assert not broken, '\n'.join(broken)


# what a reader is told to type; the commands of runs are recorded, and may be older than the code
TOLD = [p for p in PAGES if p.parent == ROOT and p.name != 'CHANGELOG.md']
TOLD += [p for p in PAGES if p.suffix == '.ipynb' and 'nbs' in p.parts]


@lru_cache
def read_defaults(notebook):
    "The parameters of the notebook at path `notebook` below the root, with their defaults."
    for cell in json.loads((ROOT / notebook).read_text(encoding='utf-8'))['cells']:
        if 'parameters' in cell['metadata'].get('tags', []):
            nodes = ast.parse(''.join(cell['source'])).body
            return {n.targets[0].id: ast.literal_eval(n.value) for n in nodes}
    return {}


def read_command(text):
    "Notebook, executed notebook and parameters of a papermill command that begins `text`."
    command = re.split(r'`|&&|[ \t]#|\n|\. ', text, maxsplit=1)[0]
    words = shlex.split(command)
    given = dict(pair for k, *pair in zip(words, words[1:], words[2:]) if k == '-p')
    return words[1], words[2], given


def check_command(text):
    "Fails unless the command is one that papermill can run, and publishes what it says."
    from lora_recycle.bench.methods import SCALES
    from lora_recycle.bench.tables import TABLES, chosen_methods

    notebook, target, given = read_command(text)
    assert (ROOT / notebook).is_file(), f'no {notebook}'
    known = read_defaults(notebook)
    assert set(given) <= set(known), f'{notebook} has no {sorted(set(given) - set(known))}'
    if target.startswith('results/') and 'out_dir' in known:
        published = given.get('out_dir', known['out_dir'])
        assert published.startswith('results'), f'{target} lies beside rows: out_dir={published}'
    if notebook.endswith('run_table.ipynb'):
        scale = SCALES[given.get('scale', 'embedded')]
        assert given.get('table', 'in_domain') in TABLES
        chosen_methods(given.get('table', 'in_domain'), given.get('methods', 'all'), scale)


def test_commands_are_legal():
    n = 0
    illegal = []
    anywhere = {k for p in (ROOT / 'nbs').glob('*.ipynb') for k in read_defaults(f'nbs/{p.name}')}
    for page in TOLD:
        for text in list_texts(page):
            text = text.replace('\\\n', ' ')
            for found in re.finditer(r'papermill nbs/(?=\w+\.ipynb \S)', text):
                n += 1
                try:
                    check_command(text[found.start() :])
                except (AssertionError, ValueError) as err:
                    illegal.append(f'{page.name}: {err}')
            unknown = set(re.findall(r'(?<!mkdir )-p (\w+) ', text)) - anywhere
            illegal += [f'{page.name}: no notebook has the parameter {x}' for x in unknown]
    assert n > 20 and not illegal, '\n'.join(illegal)


@pytest.mark.parametrize(
    'command, match',
    [
        ('papermill nbs/run_tabel.ipynb out.ipynb', 'no nbs'),
        ('papermill nbs/run_table.ipynb out.ipynb -p publish True', 'publish'),
        ('papermill nbs/run_table.ipynb out.ipynb -p methods "NN|LoRA Recycle"', 'methods'),
        ('papermill nbs/run_table.ipynb results/a/b.ipynb -p table alpha', 'out_dir'),
    ],
)
def test_an_illegal_command_is_found(command, match):
    with pytest.raises((AssertionError, ValueError), match=match):
        check_command(command)


def test_what_ships_says_how_it_was_made():
    for path in (ROOT / 'lora_recycle' / 'assets').glob('*/manifest.json'):
        record = json.loads(path.read_text(encoding='utf-8'))
        assert {'files', 'seed', 'command'} <= set(record), path.parent.name
        assert 'Tensor [' not in path.read_text(encoding='utf-8'), f'{path.parent.name}: numbers'
        check_command(record['command'])


SHOWN = ('nn', 'average-factors', 'average', 'recycle', 'recycle-average', 'average-recycle')


def average_seeds(folder):
    "A table of results, the mean over its seeds."
    from lora_recycle.bench.results import pivot_rows, read_rows

    folder = ROOT / 'results' / folder
    tables = [pivot_rows(read_rows(f))[0] for f in (folder, *sorted(folder.glob('seed*')))]
    return sum(tables) / len(tables)


def test_the_numbers_in_the_readme_are_those_of_the_results():
    "Every cell of README's table of results: the mean of four glyph sets, then photos."
    glyphs, photos = map(average_seeds, ('in_domain', 'photos/quick/in_domain'))
    columns = [('average', '1-shot'), ('average', '5-shot')]
    shown = [(name, '1-shot') for name in ('gtsrb', 'omniglot', 'caltech101', 'tiny-imagenet')]
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split('\n## Results')[1]
    table = re.search(r'\n\| ---.*?\n(.*?)\n\n', section, re.DOTALL)[1]
    lines = [[c.strip(' *') for c in x.strip('|').split('|')] for x in table.splitlines()]
    assert len(lines) == len(SHOWN)
    for method, (_, *cells) in zip(SHOWN, lines):
        found = [*glyphs.loc[method, columns], *photos.loc[method, shown]]
        assert cells == [f'{v:.2f}' for v in found]


PHOTO_ROWS = {
    'NN': 'nn',
    'Linear-probe': 'linear-probe',
    'SimpleShot': 'simpleshot',
    'CAML, inverted images': 'caml-inverted',
    'Zero-shot, class names': 'zero-shot',
    'LoRAs Avg + NN, mean of factors': 'average-factors',
    'LoRAs Avg + NN (exact)': 'average',
    'LoRA Recycle (from zero)': 'recycle',
    'LoRA Recycle, from the average': 'recycle-average',
    'LoRAs Avg + half of LoRA Recycle': 'average-recycle',
    'real images, from zero': 'recycle-real',
    'real images, from the average': 'recycle-average-real',
    'noise, from zero': 'recycle-noise',
    'noise, from the average': 'recycle-average-noise',
    'the average + half, real images': 'average-recycle-real',
    'the average + half, noise': 'average-recycle-noise',
}


def read_cells(text, head):
    "The lines below the table head that begins with `head`: title -> cells."
    table = text.split(f'\n| {head}')[1].split('\n\n')[0].splitlines()[2:]
    lines = [[c.strip(' *').replace('*', '') for c in x.strip('|').split('|')] for x in table]
    return {title: cells for title, *cells in lines}


def test_the_table_of_photos_is_the_mean_of_its_seeds():
    page = (ROOT / 'results/photos/README.md').read_text(encoding='utf-8')
    cells = read_cells(page, '1-shot, mean of three seeds')
    pacs = (f'pacs-{look}' for look in ('photo', 'art', 'cartoon', 'sketch'))
    sets = (
        ('in_domain', ('average', 'caltech101', 'gtsrb', 'tiny-imagenet', 'omniglot')),
        ('cross_domain', ('average', *pacs)),
    )
    tables = {name: average_seeds(f'photos/quick/{name}') for name, _ in sets}
    assert set(cells) == set(PHOTO_ROWS)
    for title, method in PHOTO_ROWS.items():
        found = [tables[name].loc[method, (c, '1-shot')] for name, names in sets for c in names]
        assert all(abs(float(a) - b) < 0.006 for a, b in zip(cells[title], found, strict=True))


def test_the_differences_of_photos_are_those_of_the_claims():
    page = (ROOT / 'results/photos/README.md').read_text(encoding='utf-8')
    cells = read_cells(page, 'in points')
    with open(ROOT / 'results/claims/photos.csv', newline='', encoding='utf-8') as file:
        rows = [r for r in csv.DictReader(file) if r['n_seeds'] == '3' and r['shot'] == '1']
    said = lambda r: '{:+.2f} [{:+.2f}, {:+.2f}], '.format(
        *(float(r[k]) for k in ('difference', 'low', 'high'))
    )
    known = {(r['claim'], r['start']): said(r) + r['verdict'] for r in rows}
    assert cells
    for claim, both in cells.items():
        expected = [known.get((claim, start), '') for start in ('zero', 'average')]
        assert both == expected, claim


def list_gains(folder, column):
    "All differences between two methods of a table of results at 1 shot, in points, as printed."
    table = average_seeds(folder)
    bounds = ('recycle-real', 'recycle-noise', 'average-recycle-real')
    names = [m for m in (*SHOWN, *bounds) if m in table.index]
    values = table.loc[names, (column, '1-shot')]
    return {f'{abs(a - b):.1f}' for a, b in itertools.combinations(values, 2)}


def test_the_gains_in_the_readme_are_those_of_the_results():
    "Every decimal number of `What we found`."
    page = (ROOT / 'README.md').read_text(encoding='utf-8')
    section = page.split('\n## What we found')[1].split('\n## ')[0]
    bullets = re.findall(r'^- .*(?:\n  .*)*', section, re.MULTILINE)
    photos = ('photos/quick/in_domain', 'photos/quick/cross_domain')
    both = set.union(*(list_gains(folder, 'average') for folder in ('in_domain', *photos)))
    with open(ROOT / 'results/study/gains.csv', newline='') as file:
        both |= {f'{abs(float(row["gain"])):.1f}' for row in csv.DictReader(file)}
    tiny = list_gains('photos/quick/in_domain', 'tiny-imagenet')
    for bullet in bullets:
        known = tiny if 'Tiny-ImageNet' in bullet else both
        wrong = set(re.findall(r'\d+\.\d', bullet)) - known
        assert not wrong, f'{sorted(wrong)} are no differences in results: {bullet}'


def test_the_count_of_claims_in_the_readme_is_that_of_the_results():
    page = (ROOT / 'README.md').read_text(encoding='utf-8')
    line = next(x for x in page.splitlines() if '](results/claims/table.md)' in x)
    judged = (ROOT / 'results/claims/table.md').read_text(encoding='utf-8').split('\n## ')[0]
    wrong = set(re.findall(r'\d+', line)) - set(re.findall(r'\d+', judged.split('| claim')[0]))
    assert not wrong, f'results/claims/table.md does not say {sorted(wrong)}'


def test_every_find_can_be_run_and_is_in_the_list():
    listed = (ROOT / 'findings' / 'README.md').read_text(encoding='utf-8')
    for script in (ROOT / 'findings').glob('*.sh'):
        assert script.stat().st_mode & 0o100, f'chmod +x findings/{script.name}'
        assert f'({script.name})' in listed, f'findings/README.md does not list {script.name}'
