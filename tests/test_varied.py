"Tasks whose ways and shots vary, as Meta-Dataset draws them: its limits, the methods, a table."

import json
from dataclasses import replace

import pytest
import torch
from tools import run_cells

from lora_recycle.bench.methods import METHODS, SCALES, Cell, Exam, answer_cell, choose_votes
from lora_recycle.bench.results import episode_key, read_episodes, read_rows, write_episodes
from lora_recycle.bench.tables import (
    Place,
    chosen_methods,
    make_table,
    own_scale,
    table_columns,
)
from lora_recycle.core import Cache, generator
from lora_recycle.jobs import Executor
from lora_recycle.method.chain import Files
from lora_recycle.paper.preflight import check_sets, plan_of
from lora_recycle.rivals.features import (
    answer_together,
    choose_weight,
    linear_probe,
    simple_shot,
    tip_adapter,
    zero_shot,
)
from lora_recycle.suite import episodes as module
from lora_recycle.suite.episodes import Episodes, EpisodeSize, draw_episodes
from lora_recycle.suite.episodes import draw_varied_episodes, list_problems
from lora_recycle.suite.evaluate import nearest_prototype, right_answers
from lora_recycle.suite.images import ImageSet


def make_set(sizes, groups=None):
    "Classes of so many images, all for testing"
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    splits = dict(train=(), val=(), test=tuple(range(len(sizes))))
    return ImageSet('x', images, labels, tuple(map(str, range(len(sizes)))), splits, groups)


UNEQUAL = [2 + 7 * c % 230 for c in range(64)]
ALL = make_set(UNEQUAL)


def test_the_published_limits():
    found = list_problems(draw_varied_episodes(ALL, 'test', 300))
    sizes = torch.tensor(UNEQUAL)
    ways = [len(task.classes) for task in found]
    assert (min(ways), max(ways)) == (5, 50) and len(set(ways)) > 40
    most = []
    for task in found:
        way, n_query = task.query.shape
        mine = sizes[task.classes]
        assert n_query == min(10, mine.min().item() // 2)  # the same for every class
        shots = task.rows.bincount(minlength=way)
        assert shots.min() >= 1 and (shots <= mine - n_query).all()
        budget = (mine - n_query).clamp(max=100).sum().item()
        assert shots.sum() <= min(500, budget)
        both = torch.cat([task.support, task.query.flatten()])
        assert len(both.unique()) == len(both)
        assert torch.equal(ALL.labels[task.support], task.classes[task.rows])
        assert torch.equal(ALL.labels[task.query], task.classes[:, None].expand_as(task.query))
        most.append(shots.max().item())
    total = torch.tensor([len(task.support) for task in found])
    assert total.max() > 400 and total.min() < 60  # beta is uniform
    assert min(most) == 1 or max(most) > 50


def test_the_shares_of_classes_are_those_of_the_formula():
    "Without the random alpha and beta the shots follow from the sizes alone"
    sizes = torch.tensor([100, 20, 300, 40, 20])
    seen = torch.zeros(5)
    for i in range(400):
        shots = torch.tensor(module._share_supports(sizes, 10, generator(i)))
        assert shots.sum() <= 90 + 10 + 100 + 30 + 10 and shots.min() >= 1
        seen += shots
    assert seen[2] > seen[0] > seen[3] > seen[4] and (seen[1] - seen[4]).abs() < 0.1 * seen[1]


def test_a_task_is_the_same_however_many_are_asked_for():
    few, more = (list_problems(draw_varied_episodes(ALL, 'test', n)) for n in (3, 5))
    for a, b in zip(few, more):
        assert torch.equal(a.support, b.support) and torch.equal(a.query, b.query)
    other = list_problems(draw_varied_episodes(ALL, 'test', 3, seed=1))
    assert not torch.equal(other[0].query, few[0].query)


def test_no_film_is_in_support_and_query():
    data = make_set([30] * 12, torch.arange(360) // 5)
    for task in list_problems(draw_varied_episodes(data, 'test', 30)):
        films = data.groups[task.support].unique()
        assert not torch.isin(data.groups[task.query], films).any()


def test_sets_that_are_too_small():
    with pytest.raises(ValueError, match="4 classes.*at least 5.*sampler='equal'"):
        draw_varied_episodes(make_set([9] * 4), 'test', 1)
    with pytest.raises(ValueError, match="class '5' has 1 images"):
        draw_varied_episodes(make_set([9] * 5 + [1]), 'test', 1)
    with pytest.raises(ValueError, match='n_tasks=0'):
        draw_varied_episodes(ALL, 'test', 0)


# ---- methods


def pad(t, size):
    found = torch.full(size, -1)
    found[tuple(map(slice, t.shape))] = t
    return found


def test_empty_places_change_no_answer():
    "Equal tasks with empty places beside them are answered as the tasks alone"
    data = make_set([20] * 9)
    e = draw_episodes(data, 'test', 8, EpisodeSize(5, 3, 4))
    wide = Episodes(pad(e.support, (8, 7, 6)), pad(e.query, (8, 7, 5)), pad(e.classes, (8, 7)))
    assert wide.varied and not e.varied
    x = torch.randn(len(data.labels), 16, generator=generator(0)) + data.labels[:, None] * 0.3
    text = torch.randn(9, 16, generator=generator(1))
    for solve in (
        nearest_prototype,
        linear_probe,
        lambda *on: simple_shot(*on, x.mean(0)),
        lambda *on: zero_shot(*on, text),
        lambda *on: tip_adapter(*on, text, 10.0),
        lambda *on: answer_together('bdcspn', *on),
        lambda *on: answer_together('laplacian', *on, weight=0.7),
    ):
        alone, there = solve(x, e), solve(x, wide)
        assert (there[:, :5, :4] == alone).float().mean() > 0.97
        assert (there[:, 5:] == -1).all() and (there[:, :, 4:] == -1).all()
        assert (right_answers(there) - right_answers(alone)).abs().max() <= 2


def test_who_cannot_take_such_tasks_is_left_out_or_told():
    scale = own_scale('smoke', sampler='meta')
    names = chosen_methods('in_domain', 'all', scale)
    assert {'nn', 'linear-probe', 'recycle'} <= set(names)
    assert not {'mole', 'caml', 'full'} & set(names)
    with pytest.raises(ValueError, match="methods='mole'"):
        chosen_methods('in_domain', 'nn|mole', scale)
    with pytest.raises(ValueError, match="sampler='nonsense'"):
        own_scale('smoke', sampler='nonsense')
    with pytest.raises(ValueError, match="shots=1|5: with sampler='meta'.*Give one"):
        own_scale('smoke', shots=(1, 5), sampler='meta')
    assert own_scale('smoke', sampler='meta').shots == (5,)


def test_weight_of_the_votes_never_sees_a_test_image(tmp_path):
    scale = replace(SCALES['smoke'], machine=replace(SCALES['smoke'].machine, executor=HERE))
    chain = table_columns('together', scale, Place(Cache(tmp_path), machine=scale.machine))[0][0]
    exam = Exam(None, None, 1, dict(way=5, n_query=5, votes=(0.3, 0.7, 1.2)))
    assert choose_votes(chain, exam) in (0.3, 0.7, 1.2)
    before = len(chain.store.log)
    choose_votes(chain, exam)
    assert chain.store.log[before:][0][2] == 'hit'
    assert choose_weight(lambda w: -abs(w - 0.7)) == 0.7
    assert choose_weight(lambda w: 1, (1.0, 0.3)) == 0.3  # of equal ones the smallest
    cells = [Cell(chain, 'greek', METHODS[m], 1, scale) for m in ('laplacian', 'bdcspn')]
    other = [replace(c, scale=replace(scale, votes=(1.0,))) for c in cells]
    assert [a.key == b.key for a, b in zip(cells, other)] == [False, True]


# ---- tables

HERE = Executor('here')


def test_counts_of_tasks_that_vary_are_kept(tmp_path):
    key = episode_key('greek', 5, 'nn')
    write_episodes(tmp_path, {key: torch.tensor([3, 40]).numpy()}, {key: torch.tensor([6, 400])})
    assert read_episodes(tmp_path)[key].tolist() == [50.0, 10.0]
    with pytest.raises(ValueError, match='is not legal'):
        write_episodes(tmp_path, {key: torch.tensor([7, 40]).numpy()}, {key: torch.tensor([6, 40])})


def test_the_preflight_of_tasks_that_vary(tmp_path):
    scale = own_scale('photos-quick', ((('x',), 'x'),), sampler='meta')
    found = check_sets('in_domain', scale, Place(Cache(tmp_path), files=Files(str(tmp_path))))
    assert '5 classes of 2 images or more in test' in found['need'].tolist()
    plan = plan_of('in_domain', own_scale('embedded', sampler='meta'), ('nn', 'recycle'))
    assert (plan['pflop'] > 0).all()


def test_a_table_in_one_command_and_again(tmp_path):
    "Page, rows and episodes; the second run finds all of it, and equal tasks are others"
    given = dict(table='together', methods='nn|bdcspn', sampler='meta', scale='smoke')
    given |= dict(executor='here', targets='digits', backbone='miniature')
    given |= dict(out_dir=tmp_path / 'out', cache_dir=tmp_path / 'cache')
    run_cells('run_table.ipynb', **given)
    folder = tmp_path / 'out' / 'together'
    rows = read_rows(folder)
    assert rows['way'].isna().all() and len(rows) == 2
    tasks = read_episodes(folder)
    for r in rows.itertuples():
        assert abs(tasks[episode_key(r.dataset, r.shot, r.method)].mean() - r.value) < 1e-6
    page = (folder / 'table.md').read_text()
    for words in ('digits varied', 'Meta-Dataset', '5 to 50 ways', 'ways and shots that vary'):
        assert words in page
    assert '5-shot' not in page
    record = json.loads((folder / 'run.json').read_text())
    assert '-p sampler meta' in record['command']
    columns = ((('digits',), 'digits'),)
    scale = own_scale('smoke', columns, 'miniature', sampler='meta')
    place = Place(Cache(tmp_path / 'cache'), machine=replace(scale.machine, executor=HERE))
    made = table_columns('together', scale, place)
    again, _ = make_table('together', made, ('nn',), scale)
    assert {outcome for _, _, outcome, _ in place.store.log} == {'hit'}
    assert again[0]['value'] == rows['value'][0]


def test_another_sampler_has_entries_of_its_own(tmp_path):
    own = ('smoke', ((('digits',), 'digits'),), 'miniature')
    scales = [own_scale(*own, sampler=sampler) for sampler in ('meta', 'equal')]
    place = Place(Cache(tmp_path), machine=replace(scales[0].machine, executor=HERE))
    chain = table_columns('together', scales[0], place)[0][0]
    cells = [Cell(chain, 'digits', METHODS['nn'], 5, s) for s in scales]
    found = [answer_cell(cell) for cell in cells]
    assert 'asked' in found[0] and 'asked' not in found[1]
    assert (found[0]['right'] <= found[0]['asked']).all()
    with pytest.raises(ValueError, match="method 'mole' cannot take tasks whose ways"):
        answer_cell(replace(cells[0], method=METHODS['mole']))
