"Merges of a market: identities, several ranks and widths, refusals; peft where it is exact."

from dataclasses import replace

import pytest
import torch

from lora_recycle.core import generator
from lora_recycle.method.lora import LoRA, average_products, new_lora, stack_loras
from lora_recycle.rivals.merge import (
    MERGES,
    TRIMMED,
    MergeGrid,
    choose_merge,
    core_space,
    knots_space,
    merge,
)


def draw_market(n=3, rank=4, width=20, seed=0, targets=('q', 'v')):
    "`n` LoRAs with random factors"
    gen = generator(seed, 'market')
    lora = new_lora(2, width, rank, gen, n, targets)
    return replace(lora, B=torch.randn(lora.B.shape, generator=gen))


def product(lora):
    return lora.A @ lora.B


def apply(how, market, **more):
    return merge(market, how, gen=generator(0, 'draw'), **more)


def near(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('how', [how for how in MERGES if how != 'iso-c'])
def test_one_lora_and_equal_ones_come_back(how):
    market = draw_market()
    assert near(product(apply(how, market[:1], density=1.0)), product(market[0]))
    same = apply(how, market[[0] * 5], density=1.0)
    assert near(product(same), product(market[0]) * (5 if how == 'sum' else 1))


def test_iso_c_keeps_directions_and_makes_them_equally_strong():
    market = draw_market(1)
    S = torch.linalg.svdvals(product(market[0]))[..., :4]
    found = torch.linalg.svdvals(product(merge(market, 'iso-c')))
    assert near(found[..., :4], S.mean(-1, keepdim=True).expand(-1, -1, 4))
    assert found[..., 4:].max() < 1e-4, 'directions without strength stay without'


def test_a_linear_rule_in_knots_or_core_space_is_the_mean():
    market = draw_market()
    A, B = (t[:, 0, 0].double() for t in (market.A, market.B))
    mean = (A @ B).mean(0)
    X, Y, R = knots_space(A, B)
    assert near((X @ Y).mean(0) @ R, mean)
    L, X, Y, R = core_space(A, B)
    assert near(L @ (X @ Y).mean(0) @ R, mean)
    assert near(product(merge(market)), product(average_products(market)))
    assert near(product(merge(market, 'sum')), 3 * product(average_products(market)))


def test_ties_by_hand():
    "Three LoRAs of one entry that counts: 4, 2 and -1; the mean of those with the sign of the sum"
    entries = torch.tensor([4.0, 2.0, -1.0]).view(3, 1, 1, 1, 1)
    A = torch.ones(3, 1, 1, 2, 1) * torch.tensor([1.0, 0.01]).view(2, 1)
    market = LoRA(A, entries * torch.tensor([[1.0, -0.5]]), targets=('q',))
    found = product(merge(market, 'ties', density=0.25))[0, 0]
    assert near(found, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    whole = product(merge(market, 'ties', density=1.0))[0, 0]
    assert near(whole, torch.tensor([[3.0, -1.5], [0.03, -0.015]]))


def test_rows_in_blocks_are_the_rows_of_the_whole():
    "130 columns are more than two blocks"
    market = draw_market(3, 2, 130)
    D = product(market)
    level = D.abs().flatten(-2).kthvalue(130**2 - round(0.2 * 130**2) + 1, -1).values
    kept = D * (D.abs() >= level[..., None, None])
    agree = kept * torch.where(kept.sum(0) < 0, -1, 1) > 0
    expected = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    off = (product(merge(market, 'ties')) - expected).abs() > 1e-4
    assert off.float().mean() < 1e-3, 'but for entries on the threshold'


def test_tsv_m_of_loras_that_do_not_overlap_is_their_sum():
    one, other = draw_market(1), draw_market(1)
    half = torch.arange(20) < 10
    one = replace(one, A=one.A * half[:, None], B=one.B * half)
    other = replace(other, A=other.A * ~half[:, None], B=other.B * ~half)
    market = LoRA(torch.cat([one.A, other.A]), torch.cat([one.B, other.B]))
    assert near(product(merge(market, 'tsv-m')), product(market).sum(0))


def test_lego_with_as_many_clusters_as_units_is_the_average():
    market = draw_market(3, 4)
    assert merge(market, 'lego').rank == 4
    assert near(product(merge(market, 'lego', rank=12)), product(average_products(market)))


@pytest.mark.parametrize('how', MERGES)
def test_zeros_that_pad_change_nothing(how):
    "Mixed ranks, and projections of other widths, are padded with zeros"
    market = draw_market(2, 3)
    padded = stack_loras([market[0], market[1], draw_market(1, 5, seed=1)[0]])
    pad = torch.nn.functional.pad
    wider = replace(padded, A=pad(padded.A, (0, 0, 0, 6)), B=pad(padded.B, (0, 6)))
    found = product(apply(how, wider, rank=5))
    assert near(found[..., :20, :20], product(apply(how, padded, rank=5)))
    assert not found[..., 20:, :].any() and not found[..., 20:].any()


@pytest.mark.parametrize('how', MERGES)
def test_a_merge_is_repeatable_and_can_be_cut_scaled_and_empty(how):
    market = draw_market(targets=('q', 'k', 'out'))
    one = apply(how, market, rank=2)
    assert one.rank == 2 and one.W is None and one.targets == market.targets
    assert torch.equal(one.A, apply(how, market, rank=2).A)
    assert near(product(apply(how, market, scale=2.0)), 2 * product(apply(how, market)))
    assert not product(apply(how, replace(market, B=market.B * 0))).any()


def test_more_loras_than_columns():
    market = draw_market(30, 2, 20)
    for how in MERGES:
        assert product(apply(how, market)).isfinite().all()


def test_the_choice_is_the_best_of_the_grid():
    market = draw_market()
    wanted = 0.3 * product(average_products(market))
    score = lambda lora: -(product(lora) - wanted).norm().item()
    chosen = choose_merge(market, 'average', score)
    assert (chosen.scale, chosen.density) == (0.3, 1.0) and len(chosen.scores) == 4
    assert near(product(chosen.lora), wanted)
    for how in TRIMMED:
        grid = MergeGrid(scales=(1.0, 3.0), densities=(0.2, 0.5, 1.0))
        assert len(choose_merge(market, how, score, grid).scores) == 6


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(how='best'), 'how'),
        (dict(density=0.0), r'density=0.0 must lie in \(0, 1\]'),
        (dict(rank=0), 'rank'),
        (dict(how='dare-ties'), 'give gen='),
    ],
)
def test_refusals(given, words):
    with pytest.raises(ValueError, match=words):
        merge(draw_market(), **given)


def test_refuses_what_is_no_market():
    with pytest.raises(ValueError, match='not a single LoRA'):
        merge(draw_market()[0])
    with pytest.raises(ValueError, match='empty'):
        merge(draw_market()[:0])
    broken = draw_market()
    broken.B[0, 0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        merge(broken)


def two_adapters(market):
    "A linear map under peft with a market's first product as adapters 0, 1, ... (alpha = r)"
    peft = pytest.importorskip('peft')
    A, B = (t[:, 0, 0] for t in (market.A, market.B))
    model = torch.nn.Sequential(torch.nn.Linear(A.shape[1], B.shape[2], bias=False))
    how = dict(r=market.rank, lora_alpha=market.rank, target_modules=['0'])
    model = peft.get_peft_model(model, peft.LoraConfig(**how), adapter_name='0')
    for i in range(1, len(A)):
        model.add_adapter(str(i), peft.LoraConfig(**how))
    layer = model.base_model.model[0]
    for i in range(len(A)):
        layer.lora_A[str(i)].weight.data = A[i].mT.contiguous()
        layer.lora_B[str(i)].weight.data = B[i].mT.contiguous()
    return model, layer


def merge_by_peft(market, kind, weight, **more):
    "The product of `add_weighted_adapter`, all adapters with the same weight"
    model, layer = two_adapters(market)
    names = [str(i) for i in range(market.size)]
    model.add_weighted_adapter(names, [weight] * len(names), 'merged', kind, **more)
    return layer.get_delta_weight('merged').mT.detach()


def test_peft_is_the_same_where_it_is_exact():
    "Stacked factors and the SVD of products are the average; TIES of products is ours"
    market = draw_market()
    ours = product(average_products(market))[0, 0]
    assert near(merge_by_peft(market, 'cat', 1 / 3), ours)
    assert near(merge_by_peft(market, 'svd', 1 / 3, svd_rank=12), ours)
    ours = product(merge(market, 'ties', density=0.5))[0, 0]
    found = merge_by_peft(market, 'ties_svd', 1.0, svd_rank=20, density=0.5)
    assert ((found - ours).abs() > 1e-4).float().mean() < 0.01, 'but for an entry on the threshold'


def test_peft_is_not_the_same_where_it_merges_factors_apart():
    "`linear` and `ties` treat A and B alone: cross terms, and no lora comes out that was voted for"
    market = draw_market()
    ours = product(average_products(market))[0, 0]
    linear = merge_by_peft(market, 'linear', 1 / 3)
    assert (linear - ours).norm() > 0.5 * ours.norm()
    assert near(linear, (market.A.sum(0) @ market.B.sum(0))[0, 0] / 3)
    ties = merge_by_peft(market, 'ties', 1.0, density=0.5)
    ours = product(merge(market, 'ties', density=0.5))[0, 0]
    assert (ties - ours).norm() > 0.5 * ours.norm()
