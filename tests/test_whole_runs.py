"Whole runs are timed as users start them, and their accuracies compared in both precisions."

import math
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tools import run_cells

from lora_recycle import precision
from lora_recycle.bench.results import read_rows
from lora_recycle.bench.watch import keep_busy, list_family, watch_memory
from lora_recycle.precision import multiply_in

RUN = subprocess.run


def run_here(command, **how):
    "The command for a table, in this process; others as ever"
    if 'nbs/run_table.ipynb' not in command:
        return RUN(command, **how)
    words = command[command.index('nbs/run_table.ipynb') + 2 :]
    given = dict(zip(words[1::3], words[2::3]))
    if 'precision' in given:
        given['methods'] = 'recycle'  # one of the four, for the sake of time
    run_cells('run_table.ipynb', **given | dict(seed=int(given['seed']), executor='here'))
    return SimpleNamespace(returncode=0)


def test_a_run_is_timed_and_both_precisions_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', run_here)
    given = dict(scale='smoke', table='interpolation', methods='nn', against='', busy=1)
    given |= dict(compared='interpolation', out_dir=tmp_path / 'out', cache_dir=tmp_path / 'cache')
    run_cells('whole_runs.ipynb', **given)
    out = tmp_path / 'out' / 'whole_runs'
    assert {p.name for p in out.iterdir()} == {'rows.csv', 'run.json', 'seconds.png', 'table.md'}
    rows = read_rows(out)
    timed = rows[rows['method'] == 'this commit'].set_index(['title', 'metric'])['value']
    for title in ('interpolation, alone', 'interpolation, beside 1 busy programs'):
        assert timed[title, 'seconds'] > 0 and timed[title, 'times_as_fast'] == 1
    assert timed['interpolation, alone', 'idle'] == 1
    both = rows[rows['metric'].isin(('float32', 'bfloat16', 'difference', 'half'))]
    both = both.pivot_table(index=['method', 'title'], columns='metric', values='value')
    assert len(both) == 2  # 1 and 5 shots
    assert (both['bfloat16'] - both['float32'] - both['difference']).abs().max() < 1e-9
    page = (out / 'table.md').read_text(encoding='utf-8')
    assert 'in both precisions' in page and '| alone | this commit |' in page
    folders = (tmp_path / 'cache' / 'meta').glob('*/manifest.json')
    found = [text.read_text(encoding='utf-8') for text in folders]
    assert len([t for t in found if '"bfloat16"' in t]) == len(found) / 2 > 0


@pytest.mark.parametrize(
    'parameters, words',
    [
        (dict(against='no-such'), ["against='no-such'", 'git log']),
        (dict(table='in_domian'), ["table='in_domian'", "Did you mean 'in_domain'"]),
        (dict(methods='all of them'), ["methods='all of them'"]),
        (dict(busy=-1), ['busy=-1']),
        (dict(repeats=0), ['repeats=0']),
    ],
)
def test_bad_parameters_end_before_any_run(tmp_path, parameters, words):
    given = dict(out_dir=str(tmp_path), cache_dir=str(tmp_path)) | parameters
    with pytest.raises(ValueError) as caught:
        run_cells('whole_runs.ipynb', 'def time_run', **given)
    assert all(word in str(caught.value) for word in words)


# ---- memory of processes, and a busy machine


def test_busy_programs_end_with_the_block_also_after_an_error():
    before = set(list_family(os.getpid()))
    with pytest.raises(KeyError):
        with keep_busy(2):
            begun = set(list_family(os.getpid())) - before
            assert len(begun) == (2 if Path('/proc').exists() else 0)
            raise KeyError
    assert set(list_family(os.getpid())) <= before


def test_what_fails_under_watch_fails_and_what_begins_nothing_has_no_memory():
    with pytest.raises(ZeroDivisionError):
        watch_memory(lambda: 1 / 0)
    result, peaks = watch_memory(lambda: time.sleep(0.1) or 7, every=0.01)
    assert result == 7 and all(math.isnan(mb) for mb in peaks.values()) and len(peaks) == 3
