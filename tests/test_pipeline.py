"The chain by papermill: complete, repeatable, resumed after a kill, clear about bad input."

import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import pytest
from tools import ROOT, run_cells, try_papermill

from lora_recycle.bench import device
from lora_recycle.bench.claims import claims_of, judge
from lora_recycle.bench.methods import METHODS, SCALES
from lora_recycle.bench.report import write_page
from lora_recycle.bench.results import (
    PAPER_TABLES,
    TIME_COLUMNS,
    episode_key,
    paper_table,
    read_episodes,
    read_rows,
    write_rows,
)
from lora_recycle.bench.runs import SeedRun
from lora_recycle.bench.tables import (
    TABLES,
    Place,
    Scene,
    chosen_methods,
    draw_advice,
    make_table,
    table_at,
    table_columns,
)
from lora_recycle.core import Cache, load_tensors
from lora_recycle.jobs import Executor
from lora_recycle.suite.miniature import shipped

FEW = dict(table='interpolation', methods='nn|recycle')  # one set: Cyrillic
DOMAIN_TABLES = ('in_domain', 'cross_domain', 'in_domain_b32')


def choose(folder, **parameters):
    "Parameters of a smoke run that writes below `folder`"
    places = dict(out_dir=str(folder / 'results'), cache_dir=str(folder / 'cache'))
    return dict(scale='smoke', executor='here') | places | parameters


def run_table(folder, **parameters):
    "papermill to its end: exit status and what it said"
    return try_papermill('run_table.ipynb', folder / 'out.ipynb', **choose(folder, **parameters))


def rows_of(folder, table=FEW['table']):
    "The rows of the run in `folder`, without what depends on the clock"
    return read_rows(folder / 'results' / table).drop(columns=list(TIME_COLUMNS))


def read_stages(folder):
    "What the last finished run did, stage by stage"
    return json.loads((folder / 'results' / FEW['table'] / 'run.json').read_text())['stages']


def outcomes(folder):
    "(kind, digest) -> outcome of every stage of the last finished run, the first time"
    found = {}
    for s in read_stages(folder):
        found.setdefault((s['kind'], s['digest']), s['outcome'])
    return found


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder in which the smoke table was made from an empty cache"
    folder = tmp_path_factory.mktemp('finished')
    run_cells('run_table.ipynb', **choose(folder))
    return folder


def test_the_table_is_complete(finished):
    rows = read_rows(finished / 'results' / 'in_domain')
    methods = chosen_methods('in_domain', 'quick')
    assert len(rows) == len(TABLES['in_domain'].columns) * 2 * len(methods)
    assert rows['value'].between(0, 100).all()
    assert (rows['n_tasks'] == 10).all() and (rows['scale'] == 'smoke').all()
    files = {'rows.csv', 'table.md', 'run.json', 'episodes.npz'}
    files |= {'dots.png', 'images.png', 'curves.png'}
    assert {p.name for p in (finished / 'results/in_domain').iterdir()} >= files
    page = (finished / 'results/in_domain/table.md').read_text()
    assert '89.69' in page and '## Gains' in page  # the paper's number, and our gain
    record = json.loads((finished / 'results/in_domain/run.json').read_text())
    assert 'papermill nbs/run_table.ipynb' in record['command']
    assert record['environment']['versions']['torch']


def choose_some(table, whole):
    "Table 3 with all methods, and those are the ones of Tables 2 and 6; the first of the others"
    if table == 'cross_domain':
        return whole.methods
    return chosen_methods(table, 'quick') if table in DOMAIN_TABLES else whole.methods[:7]

def test_the_picture_of_advice_merges_nothing_anew(finished, tmp_path):
    smoke = replace(SCALES['smoke'], shots=(1,))
    machine = replace(smoke.machine, executor=Executor('here'))
    place = Place(Cache(finished / 'cache'), machine=machine)
    columns = table_columns('merging', smoke, place)[:1]
    rows, _ = make_table('merging', columns, ('nn', 'average', 'merge-tsv-m'), smoke)
    chain, target = columns[0]
    table = replace(table_at('merging', smoke), columns=((chain.sources, target),))
    scene = Scene(table, (chain,), write_rows(tmp_path, rows), smoke)
    log = chain.store.log
    start = len(log)
    assert draw_advice(scene)
    found = [(kind, outcome) for kind, _, outcome, _ in log[start:]]
    assert ('merge', 'hit') in found and {outcome for _, outcome in found} == {'hit'}


@pytest.mark.parametrize('table', [t for t in TABLES if t != 'in_domain'])
def test_every_table_is_made(finished, tmp_path, table):
    "All ids on the first of their sets, on each backbone"
    smoke = replace(SCALES['smoke'], shots=(1,))  # in_domain, above, has both
    whole = table_at(table, smoke)
    if table not in DOMAIN_TABLES and all(len(sources) == 1 for sources, _ in whole.columns):
        pair = replace(smoke.chain.market, n_loras=2)  # of one set: no need to share four
        smoke = replace(smoke, chain=replace(smoke.chain, market=pair))
    machine = replace(smoke.machine, executor=Executor('here'))  # as `finished` was made
    place = Place(Cache(finished / 'cache'), machine=machine)
    columns = table_columns(table, smoke, place)
    columns = [(chain, target) for chain, target in columns if target == columns[0][1]]
    methods = choose_some(table, whole)
    rows, counts = make_table(table, columns, methods, smoke)
    rows = write_rows(tmp_path, rows)
    right = rows[rows['metric'] == 'accuracy']
    assert len(counts) == len(columns) * len(whole.shots or smoke.shots) * len(methods)
    assert right['value'].between(0, 100).all()
    sizes = [smoke.n_tuned if METHODS[m].per_episode else smoke.n_tasks for m in right['method']]
    assert list(right['n_tasks']) == sizes
    if table in COSTS:
        check_costs(table, rows)
    check_page(table, rows, counts, smoke)
    scene = Scene(whole, tuple(chain for chain, _ in columns), rows, smoke)
    assert all(draw(scene) for draw in whole.pictures)
    plt.close('all')


def check_page(table, rows, counts, scale):
    "Every method is on the page, and the claims are judged"
    questions = scale.way * scale.n_query
    run = SeedRun(0, rows, {k: 100 * v.numpy() / questions for k, v in counts.items()})
    judged = judge(claims_of(table), {table: [run]})
    assert set(judged['verdict']) <= {'holds', 'fails', 'open'}
    page = write_page(run, judged)
    assert all(title in page for title in rows['title'].unique())
    if table == 'cross_domain':
        printed = set(paper_table(PAPER_TABLES[table])['method'])
        recipes = [METHODS[m].recipe for m in rows['method']]
        masked = {f'LoRA Recycle_{round(100 * r.sparsity)}' for r in recipes if r}
        assert printed <= masked | {title.split(',')[0] for title in rows['title']}


@pytest.mark.parametrize('table', TABLES)
def test_gains_are_of_methods_that_are_there(table):
    for whole in (TABLES[table], TABLES[table].deep or TABLES[table]):
        assert {m for pair in whole.gains for m in pair} <= set(whole.methods)
        assert set(whole.methods) <= set(METHODS)


COSTS = dict(tuning=('throughput_tasks_per_s', 'peak_mem_mb')) | dict.fromkeys(
    ('pruning', 'sparsity'), ('flops_g', 'flops_true_g', 'throughput_its_per_s', 'peak_mem_mb')
)


def check_costs(table, rows):
    "Each cost is measured, and its ratio to the row that it is compared with"
    priced = {m + end for m in COSTS[table] for end in ('', '_ratio')}
    assert set(rows['metric']) - {'diverged'} == {'accuracy', *priced}
    costs = rows[rows['metric'].isin(priced)]
    each = costs.groupby(['method', 'title', 'backbone', 'dataset'])['metric'].nunique()
    assert (each == len(priced)).all() and len(each) >= 3


def test_episodes_give_the_rows_back(finished):
    rows = read_rows(finished / 'results' / 'in_domain')
    episodes = read_episodes(finished / 'results' / 'in_domain')
    for r in rows.itertuples():
        found = episodes[episode_key(r.dataset, r.shot, r.method)]
        assert found.mean() == pytest.approx(r.value, abs=1e-9)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The same with a few methods: every stage, in less time"
    folder = tmp_path_factory.mktemp('small')
    run_cells('run_table.ipynb', **choose(folder, **FEW))
    return folder


def test_a_few_methods_give_the_rows_of_all(finished, small):
    "Two runs from empty caches agree, bit for bit"
    few = rows_of(small).drop(columns='table')
    both = few[['dataset', 'shot', 'method']]
    both = both.merge(rows_of(finished, 'in_domain').drop(columns='table'))[list(few.columns)]
    assert set(few['method']) == {'nn', 'recycle'} and len(few) == 2 * 2
    pd.testing.assert_frame_equal(few, both, check_exact=True)


def begin_cells(folder, **parameters):
    "The cells of a run in a process that has imported all: forked from this one, where it can"
    how = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    process = how.Process(
        target=run_cells, args=('run_table.ipynb',), kwargs=choose(folder, **parameters)
    )
    process.start()
    return process


def list_workers(process):
    "Workers; on Linux they are forked from a nursery, and what it is called they are called"
    children = psutil.Process(process.pid).children(recursive=True)

    def named(p):
        with suppress(psutil.Error, AttributeError):  # it, or its parent, may have ended since
            return ' '.join(p().cmdline())
        return ''

    forked = [p for p in children if '_nurse' in named(lambda: p) and '_nurse' in named(p.parent)]
    return forked or [p for p in children if '_serve' in named(lambda: p)]


def test_a_killed_worker_costs_its_job_only(tmp_path, small):
    "One of two processes is killed as soon as it is at work: the same rows, nothing made twice"
    process = begin_cells(tmp_path, **FEW, executor='processes', workers=2)
    while process.is_alive() and not (found := list_workers(process)):
        time.sleep(0.05)
    found[0].kill()
    process.join(900)
    assert process.exitcode == 0
    pd.testing.assert_frame_equal(rows_of(tmp_path), rows_of(small), check_exact=True)
    stages = [s for s in read_stages(tmp_path) if s['outcome'] == 'made']
    made = [(s['kind'], s['digest']) for s in stages]
    assert len(made) == len(set(made))
    assert set(made) == {k for k, v in outcomes(small).items() if v == 'made'}


def list_made(folder):
    "Each entry of the cache, and when it was made"
    files = (folder / 'cache').glob('*/*/manifest.json')
    return {(p.parent.parent.name, p.parent.name): p.stat().st_mtime_ns for p in files}


def kill_after(process, folder, stage):
    "kill -9, at a random moment after the first entry of `stage`"
    deadline = time.time() + 600
    while process.is_alive() and time.time() < deadline:
        if any(kind == stage for kind, _ in list_made(folder)):
            break
        time.sleep(0.02)
    time.sleep(random.random() * 0.5)
    process.kill()
    process.join()


def test_a_run_killed_in_every_stage_resumes(small, tmp_path):
    "The same run is killed in each stage; the next one repeats nothing that was finished"
    done = {}
    for stage in ('market', 'inverted', 'meta', 'answers'):
        kill_after(begin_cells(tmp_path, **FEW), tmp_path, stage)
        now = list_made(tmp_path)
        assert any(kind == stage for kind, _ in now)
        assert done.items() <= now.items()  # not made again
        done = now
    run_cells('run_table.ipynb', **choose(tmp_path, **FEW))
    assert done.items() <= list_made(tmp_path).items()
    assert all(outcomes(tmp_path).get(key, 'hit') == 'hit' for key in done)
    pd.testing.assert_frame_equal(rows_of(small), rows_of(tmp_path), check_exact=True)


def test_a_full_cache_makes_nothing_and_damaged_entries_are_named_and_rebuilt(small, capsys):
    before = rows_of(small)
    run_cells('run_table.ipynb', **choose(small, **FEW))
    assert set(outcomes(small).values()) == {'hit'}
    kinds = ('inverted', 'meta', 'answers')
    entries = [sorted((small / 'cache' / k).iterdir()) for k in kinds]
    broken = [random.Random(k).choice(found) for k, found in zip(kinds, entries)]
    for entry in broken:
        data = entry / 'data.safetensors'
        data.write_bytes(data.read_bytes()[:-7])
    run_cells('run_table.ipynb', **choose(small, **FEW))
    pd.testing.assert_frame_equal(before, rows_of(small), check_exact=True)
    assert outcomes(small)['answers', broken[2].name] == 'rebuilt'
    assert f'{broken[2].name} was damaged' in capsys.readouterr().out


WRONG = [
    (dict(table='nonsense'), ["table='nonsense'", "'in_domain'"]),
    (dict(scale='embeded'), ["scale='embeded'", "Did you mean 'embedded'"]),
    (dict(methods='few'), ["methods='few'", "'quick'"]),
    (dict(tabel='in_domain'), ["'tabel'", "Did you mean 'table'"]),
    (dict(seed='one'), ["seed='one'", 'must be a int']),
    (dict(seed=-1), ['seed=-1', '0 or more']),
    (dict(sources='a', out_dir='results'), ['would replace the published table']),
    (dict(targets='/a'), ["targets='/a'", 'below data_dir']),
    (dict(backbone='ViT'), ["backbone='ViT'", 'miniature-photo']),
    (dict(shots='few'), ["shots='few'", '1|5|50']),
    (dict(device='gpu'), ["device='gpu'", "'cpu'"]),
    (dict(cache_dir='/proc/nothing/here'), ['cache_dir', 'Set cache_dir to a folder']),
]


@pytest.mark.parametrize('parameters, words', WRONG)
def test_bad_parameters_end_before_any_work(tmp_path, parameters, words):
    folders = dict(out_dir=str(tmp_path / 'results'), cache_dir=str(tmp_path / 'cache'))
    with pytest.raises((ValueError, OSError)) as caught:
        given = dict(scale='smoke', **folders) | parameters
        run_cells('run_table.ipynb', "check_folder('cache_dir'", **given)
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.rglob('rows.csv')) and not list(tmp_path.glob('cache/*/*'))


@pytest.mark.parametrize(
    'scale, precision, found',
    [
        ('embedded', 'scale', 'float32'),
        ('embedded', 'auto', 'bfloat16'),
        ('hour', 'float32', 'float32'),
        ('smoke', 'auto', 'bfloat16'),
        ('smoke', 'scale', 'float32'),
        ('hour', 'scale', 'bfloat16'),
    ],
)
def test_the_precision_is_what_was_asked_for(tmp_path, monkeypatch, scale, precision, found):
    "The faster one where it is asked for; at the embedded scale float32, whatever a clock says"
    monkeypatch.setattr(device, 'choose_precision', lambda name: 'bfloat16')
    folders = dict(out_dir=str(tmp_path), cache_dir=str(tmp_path / 'cache'))
    given = dict(scale=scale, precision=precision, **folders)
    names = run_cells('run_table.ipynb', "check_folder('cache_dir'", **given)
    assert names['place'].machine.precision == found


def test_a_bad_parameter_ends_the_command(tmp_path):
    code, said = run_table(tmp_path, tabel='in_domain')
    assert code != 0 and "Did you mean 'table'" in said, said[-1500:]
    assert not list(tmp_path.rglob('rows.csv')) and not list(tmp_path.glob('cache/*/*'))


def test_a_missing_font_is_named(monkeypatch, tmp_path):
    import matplotlib
    from lora_recycle.suite.glyphs import font_dir

    monkeypatch.setattr(matplotlib, 'get_data_path', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='DejaVuSans.ttf.*Reinstall matplotlib'):
        font_dir()


def test_a_truncated_weight_file_is_named(monkeypatch, tmp_path):
    import shutil
    from lora_recycle.suite import miniature

    shutil.copytree(miniature.asset_dir(), tmp_path / 'miniature')
    damaged = tmp_path / 'miniature' / 'clip.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:1000])
    monkeypatch.setattr(miniature, 'asset_dir', lambda name: tmp_path / name)
    with pytest.raises(ValueError, match='clip.safetensors is damaged'):
        miniature.load_miniature()


def test_shipped_weights_and_markets_can_be_rebuilt(tmp_path, monkeypatch):
    "The two notebooks that rebuild what ships run to their end, tiny, and their files load"
    tiny = {
        'pretrain': dict(n_images=512, n_prior_images=256, out_dir=tmp_path),
        'ship_market': dict(scale='smoke', out_dir=tmp_path / 'market'),
    }
    monkeypatch.chdir(ROOT / 'nbs')
    for name, values in tiny.items():
        run_cells(f'{name}.ipynb', **values)
    for folder in ('miniature', 'market'):
        manifest = json.loads((tmp_path / folder / 'manifest.json').read_text())
        for file, record in manifest['files'].items():
            load_tensors(tmp_path / folder / file, record['sha256'])
    assert set(load_tensors(tmp_path / 'miniature' / 'clip.safetensors')) == set(shipped('clip'))


def test_the_recorded_command_makes_that_folder_again_and_no_other(tmp_path, monkeypatch):
    "In a clean clone, as a reader would run it."
    clone = tmp_path / 'clone'
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(clone)], check=True)
    beside = Path(sys.executable).parent
    paths = os.pathsep.join([str(clone), os.environ['PYTHONPATH']])
    env = dict(os.environ, PYTHONPATH=paths, PATH=f'{beside}:{os.environ["PATH"]}')
    given = dict(table='interpolation', scale='smoke', methods='nn', seed=1, executor='here')
    monkeypatch.chdir(clone)
    run_cells('run_table.ipynb', **given, out_dir='made')

    def run(command):
        how = dict(cwd=clone, env=env, check=True, capture_output=True, text=True)
        return subprocess.run(['bash', '-c', command], **how).stdout

    folder = clone / 'made' / 'interpolation' / 'seed1'
    rows = (folder / 'rows.csv').read_text(encoding='utf-8')
    command = json.loads((folder / 'run.json').read_text(encoding='utf-8'))['command']
    shutil.rmtree(clone / 'made')
    run(command)
    columns = ['method', 'dataset', 'shot', 'value', 'ci95']
    before = pd.read_csv(io.StringIO(rows))[columns]
    pd.testing.assert_frame_equal(pd.read_csv(folder / 'rows.csv')[columns], before)
    assert run('git status --porcelain -uall').split() == [
        word for p in sorted(folder.iterdir()) for word in ('??', str(p.relative_to(clone)))
    ]
