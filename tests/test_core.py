"What a notebook cannot show of core and results: a kill in the middle, two processes at once, values of every kind."

import json
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lora_recycle.core import Cache, digest, plain
from lora_recycle.bench.results import COLUMNS, read_rows, write_rows

STAGE = """
import sys, time, torch
from lora_recycle.core import Cache
folder, seconds, value = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def make():
    print("started", flush=True)
    time.sleep(seconds)
    return {"x": torch.full((200, 1000), value)}
cache = Cache(folder)
x = cache.get("stage", {"size": 3}, make)["x"]
print(int(x[0, 0]), bool((x == x[0, 0]).all()), cache.log[0][2])
"""


def start(folder, seconds, value):
    "A process that asks the cache in `folder` for a stage that takes `seconds` and gives `value`"
    return subprocess.Popen(
        [sys.executable, '-c', STAGE, str(folder), str(seconds), str(value)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_stage_leaves_nothing_and_is_made_again(tmp_path):
    process = start(tmp_path, 60, 1)
    assert process.stdout.readline() == 'started\n'
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    cache = Cache(tmp_path)
    assert cache.get('stage', {'size': 3}, lambda: {'x': torch.tensor(2)})['x'] == 2
    assert cache.log[0][2] == 'made'
    assert [p.name for p in (tmp_path / 'stage').iterdir()] == [
        cache.entry('stage', {'size': 3}).name
    ]


def test_a_kill_while_writing_leaves_no_half_entry(tmp_path):
    "Killed after ever longer delays, so that some kills fall into writing, the stage is either whole or absent"
    for delay in (0, 0.002, 0.005, 0.01, 0.02, 0.05):
        process = start(tmp_path, 0, 7)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        entry = Cache(tmp_path).entry('stage', {'size': 3})
        assert not entry.exists() or sorted(p.name for p in entry.iterdir()) == [
            'data.safetensors',
            'manifest.json',
        ]
    cache = Cache(tmp_path)
    assert (
        cache.get('stage', {'size': 3}, lambda: {'x': torch.full((200, 1000), 7)})['x'] == 7
    ).all()
    assert cache.log[0][2] in ('made', 'hit')
    assert not list(tmp_path.glob('*/.tmp-*'))


def test_two_runs_share_a_cache(tmp_path):
    processes = [start(tmp_path, 1, value) for value in (1, 2)]
    said = [p.communicate(timeout=120)[0].splitlines()[-1].split() for p in processes]
    assert (
        said[0][:2] == said[1][:2] and said[0][1] == 'True'
    )  # one of the two values, whole, for both
    assert len(list((tmp_path / 'stage').iterdir())) == 1


def test_two_runs_mend_a_damaged_entry(tmp_path):
    entry = Cache(tmp_path).entry('stage', {'size': 3})
    entry.mkdir(parents=True)
    (entry / 'manifest.json').write_text('{')
    processes = [start(tmp_path, 1, value) for value in (1, 2)]
    said = [p.communicate(timeout=120)[0].splitlines()[-1].split() for p in processes]
    assert [p.returncode for p in processes] == [0, 0] and {s[1] for s in said} == {'True'}
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
    rows = [
        dict(
            dict.fromkeys(COLUMNS, ''),
            method=f'{i}',
            variant=text,
            way=5,
            shot=shot,
            value=v,
            ci95=None,
            n_tasks=600,
            seed=0,
            seconds=v,
        )
        for i, v in enumerate(reals)
    ]
    written = write_rows(folder, rows)
    pd.testing.assert_frame_equal(written, read_rows(folder), check_exact=True)
    assert np.array_equal(read_rows(folder)['value'], reals) and set(
        read_rows(folder)['variant']
    ) == {text}


def test_a_carriage_return_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'variant' holds a carriage return"):
        write_rows(
            tmp_path,
            [
                dict(
                    dict.fromkeys(COLUMNS, ''),
                    variant='a\rb',
                    way=5,
                    shot=1,
                    value=1.0,
                    ci95=None,
                    n_tasks=2,
                    seed=0,
                    seconds=1.0,
                )
            ],
        )
