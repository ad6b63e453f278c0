"Figures 7 to 9 from their notebook, and the rival inversion of Figure 7."

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import run_cells

from lora_recycle.bench.results import TIME_COLUMNS, read_episodes, read_rows
from lora_recycle.core import generator
from lora_recycle.method.inversion import InvertConfig
from lora_recycle.method.lora import new_lora
from lora_recycle.rivals.cmi import CmiConfig, contrastive_loss, generator_net, invert_cmi
from lora_recycle.suite.images import IN_DOMAIN
from lora_recycle.suite.miniature import load_miniature

WITHOUT = ('recycle-no-bn', 'recycle-no-tokens', 'recycle-no-tv', 'recycle-no-prior')
MEASURED = {
    'teacher_accuracy',
    'cross_entropy',
    'r_bn',
    'token_prior',
    'total_variation',
    'diversity',
    'nearest_real_class',
}


def choose(folder, **parameters):
    "Parameters of a run at smoke scale below `folder`"
    places = dict(out_dir=str(folder / 'results'), cache_dir=str(folder / 'cache'))
    return dict(scale='smoke') | places | parameters


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A folder in which the figures were made from an empty cache, and the names that were left"
    folder = tmp_path_factory.mktemp('figures')
    names = run_cells('figures.ipynb', **choose(folder))
    return folder, names


@pytest.fixture(scope='module')
def finished(run):
    return run[0]


@pytest.fixture(scope='module')
def rows(finished):
    return read_rows(finished / 'results' / 'figures')


def cell(rows, table, metric, method):
    "The one value of this metric"
    there = (rows['table'] == table) & (rows['metric'] == metric) & (rows['method'] == method)
    found = rows[there]
    assert len(found) == 1, (table, metric, method)
    return found['value'].item()


def test_all_is_written(finished):
    out = finished / 'results' / 'figures'
    for n in (7, 8, 9):
        assert (out / f'figure{n}.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    record = json.loads((out / 'run.json').read_text())
    assert 'papermill nbs/figures.ipynb' in record['command']
    assert record['environment']['versions']['torch']
    assert record['config']['parameters']['scale'] == 'smoke'


def metrics(rows, table):
    "Method -> its metrics"
    return rows[rows['table'] == table].groupby('method')['metric'].agg(set).to_dict()


def test_rows_are_complete(rows):
    assert set(rows['table']) == {'figure7', 'figure8', 'figure9'} and rows['value'].notna().all()
    timed = {'seconds_per_lora', 'seconds_per_lora_ratio'}
    seven = metrics(rows, 'figure7')
    assert set(seven) == {'nn', 'recycle-real', 'recycle', 'recycle-paper-losses', 'cmi'}
    for method in ('recycle', 'recycle-paper-losses', 'cmi'):
        assert seven[method] == MEASURED | timed | {'accuracy'}
    assert seven['recycle-real'] == MEASURED | {'accuracy'} and seven['nn'] == {'accuracy'}
    nine = metrics(rows, 'figure9')
    assert nine.pop('nn') == {'accuracy'}
    assert set(nine) == {'recycle-real', 'recycle', *WITHOUT}
    assert all(found == MEASURED | {'accuracy'} for found in nine.values())
    eight = rows[rows['table'] == 'figure8']
    assert len(eight) == len(IN_DOMAIN) * 2 * 5 and set(eight['dataset']) == set(IN_DOMAIN)
    assert set(eight['method']) == {'recycle-own-lora', 'recycle-plain-backbone'}


def test_titles_are_for_readers_and_tell_methods_apart(rows):
    titles = rows.groupby('method')['title'].agg(set)
    assert all(len(found) == 1 for found in titles)
    assert len({*titles.map(min)}) == len(titles)
    assert set(rows[rows['method'].str.startswith('recycle')]['start']) == {'zero'}


def test_shares_are_percent_and_times_ratios(rows):
    percent = rows['metric'].isin(('accuracy', 'teacher_accuracy', 'nearest_real_class'))
    shares = rows[percent | (rows['table'] == 'figure8')]
    assert shares['value'].between(0, 100).all()
    assert cell(rows, 'figure7', 'seconds_per_lora_ratio', 'recycle') == 1
    assert cell(rows, 'figure7', 'seconds_per_lora', 'cmi') > 0


def test_what_both_figures_show_is_one_measurement(rows):
    for metric in ('accuracy', 'r_bn', 'token_prior', 'diversity'):
        for method in ('recycle', 'recycle-real'):
            both = [cell(rows, table, metric, method) for table in ('figure7', 'figure9')]
            assert both[0] == both[1]


def test_a_prior_that_is_left_out_is_missed(rows):
    for metric, method in (('r_bn', 'recycle-no-bn'), ('token_prior', 'recycle-no-tokens')):
        whole = cell(rows, 'figure9', metric, 'recycle')
        assert whole < cell(rows, 'figure9', metric, method)


def test_the_controls_of_figure_8_are_controls(rows):
    """Real images are told from inverted ones of four steps, not from other real ones;
    their own classes are found"""
    mean = rows[rows['table'] == 'figure8'].groupby('metric')['value'].mean()
    assert 30 < mean['told_apart_real'] < 70 < mean['told_apart']
    assert mean['real_to_real'] > 70 > mean['inverted_to_real'] > 20


def test_episodes_give_the_accuracies_back(finished, rows):
    episodes = read_episodes(finished / 'results' / 'figures')
    for r in rows[rows['metric'] == 'accuracy'].itertuples():
        found = episodes[f'{r.dataset}|{r.shot}|{r.method}'].mean()
        assert found == pytest.approx(r.value, abs=1e-9) and r.n_tasks == 10


def test_statements_are_judged(run):
    names = run[1]
    pairs = [(m, 'recycle', m) for m in names['taught'] if m != 'recycle']
    judged = names['judge_pairs'](names['taught'], pairs)
    assert len(judged) == len(pairs) >= 4 and set(judged['verdict']) <= {'holds', 'fails', 'open'}
    gains = [(names['taught']['recycle'] - names['taught'][m]).double().mean() for m, _, _ in pairs]
    signs = [d > 0 for d in judged['difference']]
    assert signs == [bool(gain > 0) for gain in gains]


def test_a_full_cache_makes_nothing(finished, rows):
    run_cells('figures.ipynb', **choose(finished))
    stages = json.loads((finished / 'results/figures/run.json').read_text())['stages']
    assert stages and {s['outcome'] for s in stages} == {'hit'}
    again = read_rows(finished / 'results' / 'figures').drop(columns=list(TIME_COLUMNS))
    before = rows.drop(columns=list(TIME_COLUMNS))
    pd.testing.assert_frame_equal(before, again, check_exact=True)


def run_guards(folder, **parameters):
    "The cells up to the first work, with `parameters`, as papermill would run them, but here"
    run_cells('figures.ipynb', "check_folder('cache_dir'", **choose(folder, **parameters))


@pytest.mark.parametrize(
    'parameters, words',
    [
        (dict(scale='embeded'), ["scale='embeded'", "Did you mean 'embedded'"]),
        (dict(scale='paper'), ["scale='paper'", 'smoke']),
        (dict(cache='x'), ["'cache'", "Did you mean 'cache_dir'"]),
        (dict(seed=-1), ['seed=-1', '0 or more']),
        (dict(device='gpu'), ["device='gpu'", "'cpu'"]),
    ],
)
def test_bad_parameters_end_before_any_work(tmp_path, parameters, words):
    with pytest.raises(ValueError) as err:
        run_guards(tmp_path, **parameters)
    for word in words:
        assert word in str(err.value)
    assert not list(tmp_path.glob('*/*/*'))
    run_guards(tmp_path, scale='embedded')


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 2**16))
def test_contrastive_loss_knows_no_order_and_grows_with_the_bank(n, k, seed):
    gen = generator(seed, 'features')
    view, other, bank = (torch.randn(size, 8, generator=gen) for size in (n, n, k))
    loss, turn = contrastive_loss(view, other, bank), torch.randperm(n, generator=gen)
    assert contrastive_loss(view[turn], other[turn], bank.flip(0)).item() == pytest.approx(
        loss.item(), rel=1e-4, abs=1e-5
    )
    assert contrastive_loss(3 * view, other, bank).item() == pytest.approx(
        loss.item(), rel=1e-4, abs=1e-5
    )  # only directions count
    assert contrastive_loss(view, other, bank[:0]) <= loss + 1e-5


@pytest.fixture(scope='module')
def two_loras():
    "A backbone and two LoRAs with heads, not tuned"
    backbone, gen = load_miniature(), generator(0, 'loras')
    lora = new_lora(backbone.layers, backbone.width, 2, gen, n=2)
    return backbone, replace(
        lora, W=torch.randn(2, backbone.out_dim, 3, generator=gen), b=torch.zeros(2, 3)
    )


LITTLE = CmiConfig(InvertConfig(steps=2, per_class=3, alpha_bn=0.0), batch=2)


def test_a_lora_is_painted_alike_alone_or_first_of_two(two_loras):
    backbone, lora = two_loras
    both, alone = (
        invert_cmi(backbone, some, LITTLE, generator(0, 'cmi')) for some in (lora, lora[:1])
    )
    assert torch.equal(both.images[:1], alone.images) and both.images.shape == (2, 3, 3, 3, 36, 36)
    assert (
        both.kept.shape == (2, 3, 3, backbone.n_patches)
        and 0 <= both.accuracy.min() <= both.accuracy.max() <= 1
    )
    assert not torch.equal(both.images[0], both.images[1])


def test_the_bank_matters_from_the_second_batch_on(two_loras, monkeypatch):
    "Emptied, it leaves the first batch as it was and changes the second"
    import lora_recycle.rivals.cmi as cmi

    backbone, lora = two_loras
    config = replace(LITTLE, losses=replace(LITTLE.losses, steps=4), lr=0.05)
    whole = invert_cmi(backbone, lora[:1], config, generator(0, 'cmi')).images
    loss = cmi.contrastive_loss
    monkeypatch.setattr(
        cmi,
        'contrastive_loss',
        lambda view, other, bank, temperature: loss(view, other, bank[:0], temperature),
    )
    without = invert_cmi(backbone, lora[:1], config, generator(0, 'cmi')).images
    assert torch.equal(whole[:, :, :2], without[:, :, :2]) and not torch.equal(
        whole[:, :, 2:], without[:, :, 2:]
    )


def test_torchs_own_generator_is_left_alone(two_loras):
    backbone, lora = two_loras
    torch.manual_seed(5)
    before = torch.get_rng_state()
    invert_cmi(backbone, lora[:1], LITTLE, generator(0, 'cmi'))
    assert torch.equal(before, torch.get_rng_state())


def test_cmi_refuses_what_it_cannot_use(two_loras):
    backbone, lora = two_loras
    tokens = replace(LITTLE, losses=replace(LITTLE.losses, alpha_tokens=1.0))
    with pytest.raises(ValueError, match='needs token statistics; pass priors='):
        invert_cmi(backbone, lora, tokens, generator(0))
    with pytest.raises(ValueError, match='needs a prior network; pass priors='):
        invert_cmi(backbone, lora, replace(LITTLE, losses=InvertConfig(steps=2)), generator(0))
    with pytest.raises(ValueError, match='side=30'):
        generator_net(30, generator(0))
    for wrong in (dict(batch=0), dict(contrast=-1.0), dict(temperature=0.0), dict(width=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(LITTLE, **wrong)
