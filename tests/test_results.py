"Rows, episodes, intervals and runs: what they refuse, and what a run leaves behind."

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import ROOT, read_cells

from lora_recycle.bench.claims import Drawing, claims_of, judge
from lora_recycle.bench.intervals import bootstrap, common_tasks, paired_difference
from lora_recycle.bench.plots import image_rows
from lora_recycle.bench.report import write_page
from lora_recycle.bench.results import (
    COLUMNS,
    PAPER_TABLES,
    episode_key,
    paper_table,
    pivot_rows,
    read_episodes,
    read_rows,
    write_episodes,
    write_rows,
)
from lora_recycle.bench.runs import (
    SeedRun,
    compare_cells,
    hide_machine,
    read_parameters,
    write_command,
)
from lora_recycle.core import generator


def make_row(**changes):
    "One row of an accuracy."
    row = dict(table='in_domain', scale='smoke', seed=0, method='nn', title='NN', backbone='b')
    row |= dict(dataset='greek', way=5, shot=1, metric='accuracy', value=70.0, ci95=0.5, n_tasks=9)
    return row | changes


def test_rows_come_back_bit_for_bit(tmp_path):
    rows = [make_row(), make_row(metric='flops_g', shot=None, ci95=None, dataset='NA', value=1 / 3)]
    written = write_rows(tmp_path, rows)
    pd.testing.assert_frame_equal(written, read_rows(tmp_path), check_exact=True)
    back = read_rows(tmp_path).iloc[1]
    # no shot; and a name that csv readers like to lose
    assert (back['dataset'], back['value']) == ('NA', 1 / 3) and pd.isna(back['shot'])
    assert set(written['commit']) == {''} and list(written.columns) == list(COLUMNS)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda rows: rows.drop(columns='seed'), "no column 'seed'"),
        (lambda rows: rows.assign(acuracy=1), "column='acuracy' is not known"),
        (lambda rows: pd.concat([rows, rows[:1]]), 'measured twice'),
        (lambda rows: rows.assign(shot='one'), "column 'shot'"),
        (lambda rows: rows.assign(dataset='a\rb'), 'carriage return'),
    ],
)
def test_rows_that_cannot_be_kept_are_refused(tmp_path, change, words):
    rows = pd.DataFrame([make_row(), make_row(method='recycle')])
    with pytest.raises(ValueError, match=words):
        write_rows(tmp_path, change(rows))


def test_missing_files_say_what_to_run(tmp_path):
    for read in (read_rows, read_episodes):
        with pytest.raises(FileNotFoundError, match='run_table'):
            read(tmp_path / 'none')


def test_episodes_are_whole_numbers_within_the_questions(tmp_path):
    write_episodes(tmp_path, {'a': np.array([0, 75])}, 75)
    first = (tmp_path / 'episodes.npz').read_bytes()
    write_episodes(tmp_path, {'a': np.array([0, 75])}, 75)
    assert (tmp_path / 'episodes.npz').read_bytes() == first  # equal counts, equal file
    for count in ([76], [0.5], [-1], [[1]]):
        with pytest.raises(ValueError, match=r"counts\['a'\].*from 0 to 75"):
            write_episodes(tmp_path, {'a': np.array(count)}, 75)


def test_the_paper_has_no_fifteenth_table():
    with pytest.raises(ValueError, match='n=15'):
        paper_table(15)
    ids = {i for n in PAPER_TABLES.values() for ids in paper_table(n)['ours'] for i in ids.split()}
    from lora_recycle.bench.methods import METHODS

    assert ids <= set(METHODS) and all((paper_table(n)['ours'] != '').all() for n in range(1, 15))


def test_a_pivot_mixes_nothing():
    rows = pd.DataFrame([make_row(), make_row(seed=1)])
    with pytest.raises(ValueError, match='a cell twice, of several scales, seeds'):
        pivot_rows(rows)


def test_the_same_tasks_are_compared():
    with pytest.raises(ValueError, match='the same tasks'):
        paired_difference([1, 2], [1, 2, 3])
    assert paired_difference([1, 2], [1, 2]) == (0, 0)
    few = {'greek|1|nn|b': np.ones(3), 'greek|1|recycle|b': np.ones(2)}
    assert [len(t) for t in common_tasks(few, 'greek', 1, ('nn', 'recycle'), 'b')] == [2, 2]
    assert episode_key('greek', 1, 'nn') == 'greek|1|nn'


def test_image_rows_need_images():
    with pytest.raises(ValueError, match='at least one row'):
        image_rows({})


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(2, 60), st.floats(-5, 5), st.integers(0, 10)
)
def test_bootstrap_is_an_interval_around_the_mean(n_seeds, n_sets, n_tasks, shift, seed):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(-5, 6, n_tasks).astype(float)
    d = [[draw() for _ in range(n_sets)] for _ in range(n_seeds)]
    mean, low, high = bootstrap(d, 200, generator(seed))
    each = np.mean([np.mean([x.mean() for x in sets]) for sets in d])
    assert low <= high and mean == pytest.approx(each)
    moved = bootstrap([[x + shift for x in sets] for sets in d], 200, generator(seed))
    # values that round together may be drawn in another order
    near = 0.2 * (high - low) + 1e-6
    assert np.allclose(np.array(moved) - shift, (mean, low, high), atol=near)


def test_a_page_holds_one_table_scale_and_seed():
    rows = pd.DataFrame([make_row(), make_row(scale='paper', method='recycle')])
    run = SeedRun(0, rows, {})
    with pytest.raises(ValueError, match='a table mixes none'):
        write_page(run, None)
    tasks = np.full(9, 70.0)
    lost = SeedRun(0, pd.DataFrame([make_row(table='in_domian')]), {'greek|1|nn': tasks})
    with pytest.raises(ValueError, match="Did you mean 'in_domain'"):
        write_page(lost, judge(claims_of('in_domain'), {}, Drawing(100)))


def test_another_run_is_compared_cell_by_cell():
    old = pd.DataFrame([make_row(), make_row(method='recycle', title='LoRA Recycle')])
    new = old.assign(value=[70.0, 70.3])
    words = compare_cells(new, old)
    assert words.startswith('1 of 2 cells within 0.10 points') and 'LoRA Recycle, greek' in words
    assert 'None of the 2 cells' in compare_cells(new.assign(seed=1), old)


def test_parameters_are_text_where_text_is_meant():
    given = dict(out_dir=20261127, seed=1)
    assert read_parameters(given, out_dir=str, seed=int)['out_dir'] == '20261127'
    with pytest.raises(ValueError, match='seed='):
        read_parameters(dict(seed='x'), seed=int)
    with pytest.raises(ValueError, match='sead'):
        read_parameters(dict(seed=1, sead=2), seed=int)


def test_a_command_is_quoted_and_names_no_machine():
    given = hide_machine(dict(out_dir='runs', cache_dir='/somewhere/else', methods='nn|recycle'))
    command = write_command('run_table', "it's", given)
    assert '/somewhere' not in command and "-p methods 'nn|recycle'" in command
    assert command.startswith("mkdir -p 'it'\"'\"'s' && papermill")
    assert '-r methods 12' in write_command('run_table', 'runs', dict(methods='12'))


@pytest.mark.parametrize('name', ['tour', 'findings'])
def test_no_number_of_a_story_is_typed(name):
    prose = '\n'.join(c['source'] for c in read_cells(ROOT / 'nbs' / f'{name}.ipynb', 'markdown'))
    assert not re.findall(r'\d+\.\d+|\d+ ?%|[+±−]\d', prose)


def list_folders():
    return sorted(p.parent for p in (ROOT / 'results').rglob('run.json'))


@pytest.mark.parametrize('folder', list_folders(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_published_command_makes_its_own_folder(folder):
    record = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
    place = folder.relative_to(ROOT).as_posix()
    assert f'{place}/' in record['command'] and 'mkdir -p ' in record['command']
    assert '/seed' not in place or not list(folder.glob('*.ipynb')), 'seeds need no notebook'
