"The package is complete, needs what it says it needs, and its papers agree with each other."

import ast
import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import lora_recycle

ROOT = Path(__file__).resolve().parent.parent
INSTALL, TEST, JOB = (
    'pip install -e ".[dev]"',
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
}
DOOR = ('LoRA', 'load_backbone', 'load_set', 'read_market', 'average', 'merge', 'advise', 'recycle')
DOOR += ('FewShotClassifier', 'compare',)
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


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#\s]+)', text) + re.findall(
        r"""<img[^>]*src=["']([^"']+)""", text
    ):
        if '://' not in link and not link.startswith('mailto:'):
            assert (ROOT / link).exists(), f'{page} links to {link}'


def test_the_numbers_in_the_readme_are_those_of_the_results():
    "Every cell of README's table of results: the mean of four glyph sets, then photos."
    from lora_recycle.bench.results import pivot_rows, read_rows

    glyphs, photos = (
        pivot_rows(read_rows(ROOT / 'results' / folder))[0]
        for folder in ('in_domain', 'photos/in_domain')
    )
    ids = ('nn', 'average-factors', 'average', 'recycle', 'recycle-average')
    columns = [('average', '1-shot'), ('average', '5-shot')]
    shown = [(name, '1-shot') for name in ('gtsrb', 'omniglot', 'caltech101', 'tiny-imagenet')]
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split('\n## Results')[1]
    table = re.search(r'\n\| ---.*?\n(.*?)\n\n', section, re.DOTALL)[1]
    lines = [[c.strip(' *') for c in x.strip('|').split('|')] for x in table.splitlines()]
    assert len(lines) == len(ids)
    for method, (_, *cells) in zip(ids, lines):
        found = [*glyphs.loc[method, columns], *photos.loc[method, shown]]
        assert cells == [f'{v:.2f}' for v in found]
