"The study of when recycling pays: complete at the smallest scale, and clear about what it lacks."

import json

import pandas as pd
import pytest
from tools import run_cells


def test_the_study_runs(tmp_path):
    given = dict(scale='smoke', out_dir=tmp_path / 'results', cache_dir=tmp_path / 'cache')
    run_cells('study.ipynb', **given)
    out = tmp_path / 'results' / 'study'
    frame = pd.read_csv(out / 'gains.csv')
    assert len(frame) == 11
    assert set(frame['axis']) == {'steps', 'rank', 'loras', 'tuning', 'sets'}
    assert (frame['recycled'] - frame['average'] - frame['gain']).abs().max() < 0.01
    untuned = frame[(frame['axis'] == 'rank') & (frame['pool'] == 'real')]
    assert untuned['average'].nunique() == 1, 'the rank of the result does not change the market'
    said = (out / 'table.md').read_text()
    assert said.count('\n| ') == 2 + len(frame) and '![gains](gains.png)' in said
    assert 'of 11 recipes lie surely above the average' in said
    record = json.loads((out / 'run.json').read_text())
    assert 'papermill nbs/study.ipynb' in record['command'] and (out / 'gains.png').is_file()


WRONG = [('scale', 'paper'), ('source', 'hebrew'), ('shot', 0), ('axes', 'steps|ranks')]


@pytest.mark.parametrize('name, value', WRONG)
def test_it_refuses_before_any_work(tmp_path, name, value):
    given = dict(out_dir=str(tmp_path), cache_dir=str(tmp_path)) | {name: value}
    with pytest.raises(ValueError, match=name):
        run_cells('study.ipynb', "check_folder('out_dir'", **given)


def test_photos_have_their_own_set_and_axes(tmp_path):
    given = dict(scale='photos', axes='rank|sets', out_dir=str(tmp_path), cache_dir=str(tmp_path))
    names = run_cells('study.ipynb', 'len(plan)', **given)
    assert names['own'].name == 'gtsrb' and names['own'].backbone.name == 'miniature-photo'
    assert len(names['several'].sources) == 4 and len(names['plan']) == 2 * 3 + 2


TRIED = dict(scale='smoke', sets='cyrillic', variants='noise', executor='here')


def test_what_was_tried_is_judged_alone_and_added(tmp_path):
    given = TRIED | dict(out_dir=tmp_path / 'results', cache_dir=tmp_path / 'cache', seed=1)
    run_cells('tried.ipynb', **given)
    out = tmp_path / 'results' / 'tried' / 'seed1'
    frame = pd.read_csv(out / 'tried.csv').set_index('variant')
    assert list(frame.index) == ['as it stands', 'noise']
    assert frame.loc['as it stands', 'change'] == 0
    alone = frame['alone']
    assert abs(alone['noise'] - alone['as it stands'] - frame.loc['noise', 'change']) < 0.01
    assert (alone - frame['nn'] - frame['to_nn']).abs().max() < 0.01
    shares = pd.read_csv(out / 'shares.csv').set_index('added')['gain']
    assert shares['0.5 of: as it stands'] == frame.loc['as it stands', 'gain']
    assert not [name for name in shares.index if 'twice the rate' in name]  # not asked for
    page = (out / 'table.md').read_text()
    assert '| noise |' in page and '![tried](tried.png)' in page and (out / 'tried.png').is_file()


UNKNOWN = [('scale', 'paper'), ('sets', 'greek|x'), ('variants', 'x')]


@pytest.mark.parametrize('name, value', UNKNOWN)
def test_what_is_to_be_tried_must_exist(tmp_path, name, value):
    given = TRIED | dict(out_dir=str(tmp_path), cache_dir=str(tmp_path)) | {name: value}
    with pytest.raises(ValueError, match=name):
        run_cells('tried.ipynb', "check_choice('scale'", **given)
