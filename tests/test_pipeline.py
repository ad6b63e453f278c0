"The whole chain through the real papermill command line: complete, repeatable, resumable after a kill, clear about bad input."

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import pytest

from lora_recycle.core import Cache, load_tensors
from lora_recycle.bench.methods import BOUNDS, ONE_BY_ONE, label
from lora_recycle.suite.miniature import shipped
from lora_recycle.method.chain import SCALES
from lora_recycle.bench.results import (
    PAPER_TABLES,
    TIME_COLUMNS,
    comparison,
    judge,
    paper_table,
    read_episodes,
    read_rows,
    write_rows,
)
from lora_recycle.bench.tables import (
    DOMAIN_TABLES,
    TABLES,
    chosen_methods,
    make_table,
    table_at,
    table_runs,
)

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = [sys.executable, '-m', 'papermill']
FEW = dict(table='interpolation', methods='NN|LoRA Recycle')  # one set: Cyrillic


def command(folder, **parameters):
    "The papermill command for a smoke run that writes below `folder`"
    values = (
        dict(scale='smoke', out_dir=folder / 'results', cache_dir=folder / 'cache') | parameters
    )
    return [
        *PAPERMILL,
        'nbs/run_table.ipynb',
        str(folder / 'out.ipynb'),
        '--no-progress-bar',
        *(w for k, v in values.items() for w in ('-p', k, str(v))),
    ]


def papermill(folder, **parameters):
    "Run it to its end: exit status and what it said"
    done = subprocess.run(
        command(folder, **parameters), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout + done.stderr


def rows_of(folder, table=FEW['table']):
    "The rows of the run in `folder`, without what depends on the clock"
    return read_rows(folder / 'results' / table).drop(columns=list(TIME_COLUMNS))


def outcomes(folder):
    "(kind, digest) -> outcome of every stage of the last finished run"
    stages = json.loads((folder / 'results' / FEW['table'] / 'run.json').read_text())['stages']
    found = {}
    for s in stages:
        found.setdefault((s['kind'], s['digest']), s['outcome'])
    return found


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder in which the smoke table was made from an empty cache"
    folder = tmp_path_factory.mktemp('finished')
    code, said = papermill(folder)
    assert code == 0, said[-3000:]
    return folder


def test_the_table_is_complete(finished):
    rows = read_rows(finished / 'results' / 'in_domain')
    assert len(rows) == len(TABLES['in_domain'].runs) * 2 * len(
        chosen_methods('in_domain', 'quick')
    )
    assert (
        rows['value'].between(0, 100).all()
        and (rows['n_tasks'] == 20).all()
        and (rows['scale'] == 'smoke').all()
    )
    assert {p.name for p in (finished / 'results/in_domain').iterdir()} >= {
        'rows.csv',
        'table.md',
        'run.json',
        'episodes.npz',
        'accuracy.png',
        'images.png',
        'curves.png',
    }
    page = (finished / 'results/in_domain/table.md').read_text()
    assert '89.69' in page and 'LoRA Recycle − NN' in page  # the paper's number, and our gain
    record = json.loads((finished / 'results/in_domain/run.json').read_text())
    assert (
        record['command'].startswith('papermill nbs/run_table.ipynb')
        and record['environment']['versions']['torch']
    )


@pytest.mark.parametrize('table', [t for t in TABLES if t != 'in_domain'])
def test_every_table_is_made(finished, tmp_path, table):
    "All ids on the first of their sets, on each backbone: Table 3 with all methods, and those are the ones of Tables 2 and 6; the others with their first ones"
    smoke = replace(SCALES['smoke'], shots=(1,))  # in_domain, above, has both
    whole = table_at(table, smoke)
    runs = table_runs(table, smoke, 0, Cache(finished / 'cache'))
    runs = [(run, target) for run, target in runs if target == runs[0][1]]
    methods = (
        whole.methods
        if table == 'cross_domain'
        else whole.methods[:7]
        if table not in DOMAIN_TABLES
        else chosen_methods(table, 'quick')
    )
    rows, counts = make_table(table, runs, methods, note=lambda line: None)
    rows, counts = (
        write_rows(tmp_path, rows),
        {k: 100 * v.numpy() / (smoke.way * smoke.n_query) for k, v in counts.items()},
    )
    right = rows[rows['metric'] == 'accuracy']
    assert (
        len(counts) == len(runs) * len(whole.shots or smoke.shots) * len(methods)
        and right['value'].between(0, 100).all()
    )
    assert (
        right['n_tasks']
        == right['method'].isin(ONE_BY_ONE).map({True: smoke.n_tuned, False: smoke.n_tasks})
    ).all()
    page = comparison(rows, counts, whole.gains, BOUNDS, whole.best)
    assert all(method in page for method in rows['method'].unique())
    there = {label(r.method, r.variant) for r in rows.itertuples()}
    judged = judge([s for s in whole.statements if {s.ours, s.base} <= there], rows, counts)
    if len(judged):
        assert set(judged['verdict']) <= {'holds', 'does not hold', 'cannot be told'}
    if table == 'cross_domain':
        assert set(paper_table(PAPER_TABLES[table])['method']) <= set(rows['method'])
    if table in COSTS:
        check_costs(table, rows)
    assert whole.pictures(table, [run for run, _ in runs], rows)
    plt.close('all')


@pytest.mark.parametrize('table', TABLES)
def test_what_is_said_is_of_methods_that_are_there(table):
    whole = table_at(table, SCALES['embedded'])
    ends = whole.backbones if len(whole.backbones) > 1 else ('',)
    there = {label(*m, end) for m in whole.methods for end in ends}
    assert {m for pair in whole.gains for m in pair} | {
        m for s in whole.statements for m in (s.ours, s.base)
    } <= there


COSTS = dict(tuning=('throughput_tasks_per_s', 'peak_mem_mb')) | dict.fromkeys(
    ('pruning', 'sparsity'), ('flops_g', 'flops_true_g', 'throughput_its_per_s', 'peak_mem_mb')
)


def check_costs(table, rows):
    "Each row of the paper is measured, and so is its ratio to the row that it is compared with"
    there = {
        (r.method, r.variant)
        for r in rows[(table == 'tuning') | (rows['metric'] == 'flops_g')].itertuples()
    }
    if table == 'tuning':
        there |= set(TABLES[table].methods)
    assert {(r.method, r.variant) for r in paper_table(PAPER_TABLES[table]).itertuples()} <= there
    assert set(rows['metric']) - {'diverged'} == {
        'accuracy',
        *(m + end for m in COSTS[table] for end in ('', '_ratio')),
    }


def test_episodes_give_the_rows_back(finished):
    rows, episodes = (
        read_rows(finished / 'results' / 'in_domain'),
        read_episodes(finished / 'results' / 'in_domain'),
    )
    for r in rows.itertuples():
        assert episodes[f'{r.dataset}|{r.shot}|{r.method}|{r.variant}'].mean() == pytest.approx(
            r.value, abs=1e-9
        )


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The same with a few methods: every stage, in less time"
    folder = tmp_path_factory.mktemp('small')
    code, said = papermill(folder, **FEW)
    assert code == 0, said[-3000:]
    return folder


def test_a_few_methods_give_the_rows_of_all(finished, small):
    "Two runs from empty caches agree, bit for bit"
    few, all = (
        rows_of(small).drop(columns='table'),
        rows_of(finished, 'in_domain').drop(columns='table'),
    )
    both = few[['dataset', 'shot', 'method', 'variant']].merge(all)[list(few.columns)]
    assert set(few['method']) == {'NN', 'LoRA Recycle'} and len(few) == 2 * 2
    pd.testing.assert_frame_equal(few, both, check_exact=True)


def test_a_killed_worker_costs_its_job_only(tmp_path, small):
    "Jobs in two other processes, one of which is killed as soon as it is at work: the same rows, and nothing is made twice"
    process = subprocess.Popen(
        command(tmp_path, **FEW, executor='processes', workers=2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    workers = lambda: [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if '_serve' in ' '.join(p.cmdline())
    ]
    while process.poll() is None and not (found := workers()):
        time.sleep(0.05)
    found[0].kill()
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said[-3000:]
    pd.testing.assert_frame_equal(rows_of(tmp_path), rows_of(small), check_exact=True)
    made = [
        (s['kind'], s['digest'])
        for s in json.loads((tmp_path / 'results' / FEW['table'] / 'run.json').read_text())[
            'stages'
        ]
        if s['outcome'] == 'made'
    ]
    assert len(made) == len(set(made)) and set(made) == {
        k for k, v in outcomes(small).items() if v == 'made'
    }


def test_damaged_entries_are_named_and_rebuilt(small):
    before = rows_of(small)
    broken = [
        random.Random(k).choice(sorted((small / 'cache' / k).iterdir()))
        for k in ('inverted', 'meta', 'answers')
    ]
    for entry in broken:
        data = entry / 'data.safetensors'
        data.write_bytes(data.read_bytes()[:-7])
    code, said = papermill(small, **FEW)
    assert code == 0, said[-3000:]
    pd.testing.assert_frame_equal(before, rows_of(small), check_exact=True)
    assert outcomes(small)['answers', broken[2].name] == 'rebuilt'
    executed = (small / 'out.ipynb').read_text()
    assert broken[2].name in executed and 'is damaged' in executed


@pytest.mark.parametrize('stage', ['market', 'inverted', 'meta', 'answers'])
def test_a_killed_run_resumes(small, tmp_path, stage):
    "kill -9, at a random moment after the first entry of `stage`; the next run repeats nothing that was finished"
    process = subprocess.Popen(
        command(tmp_path, **FEW), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 600
    while (
        not list((tmp_path / 'cache').glob(f'{stage}/*/manifest.json'))
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.02)
    time.sleep(random.random() * 1.5)
    for p in (*psutil.Process(process.pid).children(recursive=True), process):
        p.send_signal(signal.SIGKILL)  # the kernel first: it has a session of its own
    process.wait()
    done = {
        (p.parent.parent.name, p.parent.name)
        for p in (tmp_path / 'cache').glob('*/*/manifest.json')
    }
    assert any(kind == stage for kind, _ in done)
    code, said = papermill(tmp_path, **FEW)
    assert code == 0, said[-3000:]
    now = outcomes(tmp_path)
    assert all(now.get(key, 'hit') == 'hit' for key in done)
    pd.testing.assert_frame_equal(rows_of(small), rows_of(tmp_path), check_exact=True)


def test_a_full_cache_makes_nothing(small):
    code, said = papermill(small, **FEW)
    assert code == 0, said[-3000:]
    assert set(outcomes(small).values()) == {'hit'}


@pytest.mark.parametrize(
    'parameters, words',
    [
        (dict(table='nonsense'), ["table='nonsense'", "'in_domain'"]),
        (dict(scale='embeded'), ["scale='embeded'", "Did you mean 'embedded'"]),
        (dict(methods='few'), ["methods='few'", "'quick'"]),
        (dict(tabel='in_domain'), ["'tabel'", "Did you mean 'table'"]),
        (dict(seed='one'), ["seed='one'", 'must be a int']),
        (dict(seed=-1), ['seed=-1', '0 or more']),
        (dict(device='gpu'), ["device='gpu'", "'cpu'"]),
        (dict(cache_dir='/proc/nothing/here'), ['cache_dir', 'Set cache_dir to a folder']),
    ],
)
def test_bad_parameters_end_before_any_work(tmp_path, parameters, words):
    code, said = papermill(tmp_path, **parameters)
    assert code != 0
    for word in words:
        assert word in said, said[-1500:]
    assert not (tmp_path / 'results' / 'in_domain' / 'rows.csv').exists() and not list(
        (tmp_path / 'cache').glob('*/*')
    )


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


def test_shipped_weights_and_markets_can_be_rebuilt(tmp_path):
    "The two commands that rebuild what ships run to their end, at a tiny size, and their files load"
    tiny = {
        'pretrain': dict(n_images=512, n_prior_images=256, out_dir=tmp_path),
        'ship_market': dict(scale='smoke', out_dir=tmp_path / 'market'),
    }
    for name, values in tiny.items():
        done = subprocess.run(
            [
                *PAPERMILL,
                f'nbs/{name}.ipynb',
                str(tmp_path / f'{name}.ipynb'),
                '--cwd',
                'nbs',
                '--no-progress-bar',
                *(w for k, v in values.items() for w in ('-p', k, str(v))),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for folder in ('miniature', 'market'):
        manifest = json.loads((tmp_path / folder / 'manifest.json').read_text())
        for file, record in manifest['files'].items():
            load_tensors(tmp_path / folder / file, record['sha256'])
    assert set(load_tensors(tmp_path / 'miniature' / 'clip.safetensors')) == set(shipped('clip'))
