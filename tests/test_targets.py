"A market on any products of a block goes the whole way: averaged, cut, recycled, used, saved, and through the rivals."

from dataclasses import replace

import pytest
import torch

from lora_recycle.core import Cache, generator
from lora_recycle.jobs import Executor
from lora_recycle.method.backbone import encode
from lora_recycle.method.chain import SETTINGS, Chain, Given, Machine, Recipe
from lora_recycle.method.distill import DistillConfig
from lora_recycle.method.inversion import InvertConfig
from lora_recycle.method.lora import (
    TARGETS,
    LoRA,
    average_products,
    new_lora,
    product_widths,
    truncate_rank,
)
from lora_recycle.method.market import Market
from lora_recycle.rivals.finetune import (
    HubConfig,
    TuneConfig,
    lorahub,
    meta_train_pmf,
    pmf_features,
    tune_lora,
    tune_mole,
    tune_pmf,
)
from lora_recycle.suite.episodes import EpisodeSize, draw_episodes
from lora_recycle.suite.images import load_set
from lora_recycle.suite.miniature import load_miniature
from lora_recycle.use.classifier import FewShotClassifier
from lora_recycle.use.recycling import recycle

ALL_FOUR = ('q', 'k', 'v', 'out')
PERCEPTRON = ('fc1', 'fc2')
KINDS = pytest.mark.parametrize('targets', [ALL_FOUR, PERCEPTRON], ids='-'.join)


@pytest.fixture(scope='module')
def backbone():
    return load_miniature()


def make_market(backbone, targets, n=3, way=5):
    "M LoRAs with heads, B drawn by chance."
    gen = generator(0, 'targets')
    lora = new_lora(backbone.layers, backbone.widths, 2, gen, n, targets)
    B = torch.randn(lora.B.shape, generator=gen) * 0.05
    for place, target in enumerate(targets):
        B[..., place, :, product_widths(target, *backbone.widths)[1] :] = 0
    W = torch.randn(n, backbone.out_dim, way, generator=gen)
    return replace(lora, B=B, W=W, b=torch.zeros(n, way))


def images(n, seed=0):
    return torch.randint(256, (n, 3, 36, 36), generator=generator(seed, 'x')).to(torch.uint8)


def acts_on_all(lora):
    "Whether each product of a LoRA has some effect."
    return bool((lora.A @ lora.B).abs().amax((0, 2, 3)).min() > 0)


@KINDS
def test_a_market_goes_from_average_to_a_saved_classifier(backbone, targets, tmp_path):
    market = make_market(backbone, targets)
    mean = average_products(market)
    short = truncate_rank(mean, 4)
    quick = dict(
        settings='smoke',
        invert_config=InvertConfig(steps=2, per_class=4, alpha_bn=0.0),
        distill_config=DistillConfig(steps=3, n_query=2, rank=2, cycle=3, warmup=1),
        n_tasks=4,
        executor=Executor('here'),
    )
    meta = recycle(backbone, market, **quick).lora
    for i, lora in enumerate((mean, short, meta)):
        assert lora.targets == targets and acts_on_all(lora)
        model = FewShotClassifier(backbone, lora).fit(images(10), list('ab') * 5)
        again = FewShotClassifier.load(model.save(tmp_path / f'{i}'), backbone)
        assert again.meta_lora.targets == targets
        assert torch.equal(again.meta_lora.B, lora.B)
        assert again.predict(images(9, 1)).tolist() == model.predict(images(9, 1)).tolist()


@KINDS
def test_the_stages_of_a_given_market_keep_its_targets(backbone, targets, tmp_path):
    market = Market.from_tensors(Market(make_market(backbone, targets), *unknown(3)).tensors())
    assert market.lora.targets == targets
    settings = replace(
        SETTINGS['smoke'],
        invert=InvertConfig(steps=2, per_class=4, alpha_bn=0.0, alpha_tokens=0.0),
        distill=DistillConfig(steps=2, n_query=2, rank=2, cycle=2, warmup=1),
    )
    machine = Machine(executor=Executor('here'))
    chain = Chain(backbone, Given(market), settings, machine=machine, store=Cache(tmp_path))
    kept = chain.market(Recipe(n_loras=2)).lora
    assert (kept.size, kept.targets) == (2, targets)
    assert chain.meta(Recipe(), 1).lora.targets == targets


def unknown(n, way=5):
    return torch.full((n, way), -1), torch.full((n,), float('nan'))


def test_the_digest_of_a_given_market_knows_its_targets(backbone):
    lora = make_market(backbone, ('q', 'v'))
    other = replace(lora, targets=('k', 'out'))
    assert Given(lora).describe(None) != Given(other).describe(None)


@KINDS
def test_rivals_tune_what_the_market_changes(backbone, targets):
    market = make_market(backbone, targets)
    data = load_set('greek', per_class=4)
    episodes = draw_episodes(data, 'val', 2, EpisodeSize(5, 1, 3))
    given = backbone, data.images, episodes
    tune = TuneConfig(optimiser='adam', steps=2, lr=1e-3, batch=5)
    gen = lambda: generator(1, 'rivals')
    start = average_products(market)
    config = DistillConfig(steps=1, tasks=1, n_query=2, flip=0.0)
    pmf, _ = meta_train_pmf(backbone, images(60).view(3, 5, 4, 3, 36, 36), config, gen(), start)
    assert (pmf['A'] != start.A).any((-1, -2)).all()  # every product learns
    hub = lorahub(*given, market, HubConfig(steps=2, images=60), gen()).lora
    assert hub.targets == targets
    for tuned in (
        tune_lora(*given, start, tune, gen()),
        tune_mole(*given, market, tune, gen()),
        tune_pmf(*given, pmf, tune, gen()),
    ):
        assert tuned.predicted.shape == (2, 5, 3) and not tuned.diverged.any()


def test_pmf_is_the_lora_that_it_starts_from(backbone):
    "Where nothing is learnt its features are those of the LoRA, whatever it changes."
    for targets in (ALL_FOUR, ('k', 'out'), ('v', 'fc2'), TARGETS):
        lora = make_market(backbone, targets)[0]
        config = DistillConfig(steps=1, tasks=1, n_query=2, lr=1e-12)
        pool = images(60).view(3, 5, 4, 3, 36, 36)
        pmf, _ = meta_train_pmf(backbone, pool, config, generator(0), lora)
        x = torch.randn(2, 3, 36, 36, generator=generator(0))
        found = pmf_features(backbone, pmf, x)
        torch.testing.assert_close(found, encode(backbone, x, lora).features, atol=1e-5, rtol=0)


def test_q_and_v_are_what_they_were(backbone):
    "The paper's LoRA begins with the same numbers, and its digest has no word of targets."
    gen = generator(3)
    A = (torch.rand(4, 2, 128, 4, generator=gen) * 2 - 1) / 128**0.5
    for width in (128, backbone.widths):
        lora = new_lora(4, width, 4, generator(3))
        assert torch.equal(lora.A, A) and lora.B.shape == (4, 2, 4, 128)
    bare = LoRA(lora.A[None], lora.B[None], torch.zeros(1, 128, 5), torch.zeros(1, 5))
    assert list(Market(bare, *unknown(1)).tensors()) == ['A', 'B', 'W', 'b', 'classes', 'accuracy']
