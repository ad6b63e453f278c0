"Core and results: refusals, damage, a kill in the middle, two processes, values of every kind."

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import errands
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lora_recycle.core import (
    Cache,
    _write_entry,
    check_choice,
    check_folder,
    check_int,
    check_parameters,
    digest,
    generator,
    load_tensors,
    plain,
    project_folder,
    save_tensors,
    write_json,
)
from lora_recycle.bench.results import COLUMNS, read_rows, write_rows

ROW = dict.fromkeys(COLUMNS, '') | dict(way=5, seed=0, ci95=None)
FORKED = multiprocessing.get_context('forkserver')  # imports torch once for all processes
FORKED.set_forkserver_preload(['lora_recycle.core'])
STAGE = ('stage', {'size': 3})


def start(folder, seconds, value):
    "A process that asks the cache in `folder` for a stage, and what it says."
    heard, said = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=errands.ask_stage, args=(folder, seconds, value, said))
    process.start()
    said.close()
    return process, heard


def finish(process, heard):
    "What a process says last."
    last = None
    with contextlib.suppress(EOFError):
        while True:
            last = heard.recv()
    process.join(60)
    assert process.exitcode == 0
    return last


def test_a_killed_stage_leaves_nothing_and_is_made_again(tmp_path):
    process, heard = start(tmp_path, 60, 1)
    assert heard.recv() == 'started'
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cache = Cache(tmp_path)
    assert cache.get(*STAGE, lambda: {'x': torch.tensor(2)})['x'] == 2
    assert cache.log[0][2] == 'made'
    assert [p.name for p in (tmp_path / 'stage').iterdir()] == [cache.entry(*STAGE).name]


@pytest.mark.parametrize('delay', (0, 0.002, 0.005, 0.01, 0.02, 0.05))
def test_a_kill_while_writing_leaves_no_half_entry(tmp_path, delay):
    "Some of the kills fall into writing; the stage is either whole or absent."
    process, heard = start(tmp_path, 0, 7)
    heard.recv()
    time.sleep(delay)
    process.kill()
    process.join(60)
    cache = Cache(tmp_path)
    entry = cache.entry(*STAGE)
    whole = ['data.safetensors', 'manifest.json']
    assert not entry.exists() or sorted(p.name for p in entry.iterdir()) == whole
    assert (cache.get(*STAGE, lambda: {'x': torch.full((200, 1000), 7)})['x'] == 7).all()
    assert cache.log[0][2] in ('made', 'hit')
    assert not list(tmp_path.glob('*/.tmp-*'))


def test_two_runs_share_a_cache(tmp_path):
    runs = [start(tmp_path, 0.5, value) for value in (1, 2)]
    (first, whole, _), second = [finish(*run) for run in runs]
    assert whole and second[:2] == (first, True)  # one of the two values, whole, for both
    assert len(list((tmp_path / 'stage').iterdir())) == 1


def test_two_runs_mend_a_damaged_entry(tmp_path):
    entry = Cache(tmp_path).entry(*STAGE)
    entry.mkdir(parents=True)
    (entry / 'manifest.json').write_text('{')
    runs = [start(tmp_path, 0.5, value) for value in (1, 2)]
    assert {finish(*run)[1] for run in runs} == {True}
    assert len(list((tmp_path / 'stage').iterdir())) == 1


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def kinds(x):
    "`x` with its types written out, so that 1, 1.0 and True differ"
    if isinstance(x, list):
        return ['list', *map(kinds, x)]
    if isinstance(x, dict):
        return ['dict', sorted(([k, kinds(v)] for k, v in x.items()), key=lambda pair: pair[0])]
    return [type(x).__name__, repr(x)]


@settings(max_examples=300, deadline=None)
@given(values, values)
def test_digests_agree_exactly_when_values_do(a, b):
    assert (digest(a) == digest(b)) == (kinds(a) == kinds(b))


@settings(max_examples=100, deadline=None)
@given(values)
def test_plain_values_survive_json(x):
    assert digest(plain(json.loads(json.dumps(plain(x))))) == digest(plain(x))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=8),
    st.text(string.printable.replace('\r', '') + 'é,"\'', max_size=12),
    st.sampled_from([None, 0, 1, 5, 2**40]),
)
def test_rows_read_back_equal(tmp_path_factory, reals, text, shot):
    folder = tmp_path_factory.mktemp('rows')
    same = dict(ROW, title=text, shot=shot, ci95=None, n_tasks=600)
    rows = [dict(same, method=f'{i}', value=v, seconds=v) for i, v in enumerate(reals)]
    written = write_rows(folder, rows)
    pd.testing.assert_frame_equal(written, read_rows(folder), check_exact=True)
    assert np.array_equal(read_rows(folder)['value'], reals)
    assert set(read_rows(folder)['title']) == {text}


def test_a_carriage_return_is_refused(tmp_path):
    row = dict(ROW, title='a\rb', shot=1, value=1.0, n_tasks=2, seconds=1.0)
    with pytest.raises(ValueError, match="'title' holds a carriage return"):
        write_rows(tmp_path, [row])


@pytest.mark.parametrize('wrong', [True, 1.0, '5', None])
def test_what_is_no_whole_number_is_refused(wrong):
    with pytest.raises(ValueError, match=f'shot={wrong!r} is not legal'):
        check_int('shot', wrong, 1)


def test_numbers_out_of_range_are_refused_with_the_range():
    with pytest.raises(ValueError, match='seed must be a whole number, 0 or more'):
        check_int('seed', -1, 0)
    with pytest.raises(ValueError, match='from 1 to 8'):
        check_int('rank', 9, 1, 8)
    with pytest.raises(ValueError, match='seed=-1'):
        generator(-1)


def test_unknown_words_are_refused_with_the_nearest_and_all():
    with pytest.raises(ValueError, match="Did you mean 'in_domain'"):
        check_choice('table', 'in-domain', ['in_domain', 'pruning'])
    with pytest.raises(ValueError, match="one of: 'in_domain', 'pruning'"):
        check_choice('table', 'nonsense', ['in_domain', 'pruning'])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='cannot be written'):
        check_folder('cache_dir', tmp_path / 'file')
    with pytest.raises(ValueError, match='cache_dir='):
        Cache(tmp_path / 'file')


@dataclasses.dataclass(frozen=True)
class Example:
    steps: int = 5
    rate: float = 0.1


DIFFERENT = [
    *(1, 1.0, '1', True, None, '', [1], [[1]], [], {}, {'1': 1}),
    *(Example(), Example(6), dict(steps=5, rate=0.1)),
    *(torch.tensor(1), torch.tensor([1]), torch.tensor([1.0]), torch.zeros(0)),
    *(torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16)),
    np.zeros((2, 3)),
]


def test_digests_tell_types_and_places_apart():
    assert len({digest(x) for x in DIFFERENT}) == len(DIFFERENT)
    assert digest('ab', 'c') != digest('a', 'bc')
    assert digest([1, 2], 3) != digest([1], [2, 3])
    with pytest.raises(ValueError, match='a set has no digest'):
        digest({1, 2})


def test_a_file_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = tmp_path / 'a.json'
    write_json(path, dict(b=1))
    with pytest.raises(TypeError):
        write_json(path, dict(b=print))
    assert json.loads(path.read_text()) == dict(b=1)
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_tensors_that_are_missing_damaged_or_none_are_named(tmp_path):
    path = tmp_path / 'x.safetensors'
    with pytest.raises(FileNotFoundError, match='is missing'):
        load_tensors(path)
    save_tensors(path, dict(A=torch.ones(3)))
    with pytest.raises(ValueError, match='is damaged: its sha256'):
        load_tensors(path, '0' * 64)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match='Delete it'):
        load_tensors(path)
    with pytest.raises(ValueError, match=r"tensors\['A'\] is a list"):
        save_tensors(path, dict(A=[1]))


DAMAGES = [
    ('data.safetensors', lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ('data.safetensors', lambda data: data[:20]),
    ('data.safetensors', None),
    ('manifest.json', lambda data: b'{'),
    ('manifest.json', lambda data: b'[]'),
    ('manifest.json', None),
]


@pytest.mark.parametrize('name, change', DAMAGES)
def test_damage_is_named_and_mended(tmp_path, name, change):
    cache = Cache(tmp_path)
    ask = lambda: cache.get('stage', 0, lambda: {'x': torch.arange(9)})['x']
    ask()
    file = cache.entry('stage', 0) / name
    data = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(data))
    with pytest.warns(UserWarning, match=f'{file.parent} is damaged'):
        assert torch.equal(ask(), torch.arange(9))
    assert torch.equal(ask(), torch.arange(9))
    assert [outcome for _, _, outcome, _ in cache.log] == ['made', 'rebuilt', 'hit']


def test_where_a_lock_does_not_hold_the_first_entry_stays(tmp_path):
    cache = Cache(tmp_path)
    cache.get('race', 0, lambda: {'x': torch.tensor(1)})
    entry = cache.entry('race', 0)
    _write_entry(entry, 0, lambda: {'x': torch.tensor(2)}, 'cpu')
    assert cache.get('race', 0, None)['x'] == 1
    assert len(list(entry.parent.iterdir())) == 1


def test_what_the_dead_left_is_swept_away(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    names = [f'.tmp-{pid}-0123-{platform.node()}' for pid in (ended.pid, os.getpid())]
    for name in names:
        (tmp_path / 'race' / name).mkdir(parents=True)
    Cache(tmp_path)
    left = [p.name for p in (tmp_path / 'race').iterdir()]
    assert left == names[1:]  # who is alive may be writing still


def stop():
    raise KeyboardInterrupt


def test_what_was_not_made_is_not_kept(tmp_path):
    cache = Cache(tmp_path)
    with pytest.raises(ValueError, match=r"tensors\['y'\] is a int"):
        cache.get('race', 1, lambda: dict(y=1))
    with pytest.raises(KeyboardInterrupt):
        cache.get('race', 2, stop)
    assert not cache.entry('race', 1).exists() and not cache.entry('race', 2).exists()
    with pytest.raises(ValueError, match="kind='no/such'"):
        cache.get('no/such', 0, dict)


def test_seconds_are_those_of_a_stage_alone(tmp_path):
    cache = Cache(tmp_path)

    def make(seconds):
        time.sleep(seconds)
        return {'x': torch.tensor(0)}

    cache.get('outer', 0, lambda: cache.get('inner', 0, lambda: make(0.5)) and make(0.1))
    seconds = [cache.record(kind, 0)['seconds'] for kind in ('outer', 'inner')]
    assert 0.1 <= seconds[0] < 0.5 <= seconds[1]


def test_parameters_of_a_notebook_are_checked():
    given = dict(table='in_domain', seed=0, torch=torch, _i='x', In=['x'])
    check_parameters(given, table=str, seed=int)
    with pytest.raises(ValueError, match="'tabel' is not known. Did you mean 'table'"):
        check_parameters(dict(tabel='in_domain', seed=0), table=str, seed=int)
    with pytest.raises(ValueError, match="seed='0' is a str; it must be a int.*-p seed VALUE"):
        check_parameters(dict(table='in_domain', seed='0'), table=str, seed=int)
    with pytest.raises(ValueError, match='seed=True is a bool'):
        check_parameters(dict(table='in_domain', seed=True), table=str, seed=int)


def test_folders_count_from_the_checkout(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs' / 'deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'nbs' / 'deep')
    assert project_folder('results') == tmp_path / 'results'
    assert project_folder('/results') == Path('/results')
    assert project_folder('~/x') == Path.home() / 'x'
