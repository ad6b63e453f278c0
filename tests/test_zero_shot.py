"Class names in the place of heads and prototypes: planted answers are found, order and seed matter, stages come back from the cache."

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lora_recycle.core import Cache, generator
from lora_recycle.jobs import Executor
from lora_recycle.method.backbone import encode, normalise
from lora_recycle.method.chain import SETTINGS, Chain, Machine, Named, Recipe
from lora_recycle.method.distill import DistillConfig, Embedder, Pool, distill
from lora_recycle.method.lora import new_lora
from lora_recycle.method.market import MarketConfig, private_data
from lora_recycle.rivals.features import zero_shot
from lora_recycle.rivals.finetune import HubConfig
from lora_recycle.rivals.text import (
    hub_named,
    mole_named,
    name_texts,
    text_logits,
    text_loss,
    text_tasks,
    tune_named,
    with_texts,
)
from lora_recycle.suite.episodes import EpisodeSize, draw_episodes
from lora_recycle.suite.evaluate import embed_used
from lora_recycle.suite.images import ImageSet, load_set
from lora_recycle.suite.miniature import PHOTO, load_clip, load_miniature, tokenise

CONFIG = DistillConfig(steps=6, tasks=2, n_query=2, rank=4, cycle=6, warmup=2, lr=4e-3, flip=0.0)


@pytest.fixture(scope='module')
def backbone():
    return load_miniature()


@pytest.fixture(scope='module')
def pool():
    "Three made-up LoRAs that were never tuned, noise images of their five classes each, and heads that match the very features of these images"
    gen = generator(0, 'pool')
    base = (
        torch.randint(256, (3, 5, 1, 3, 36, 36), dtype=torch.uint8, generator=gen)
        .expand(-1, -1, 4, -1, -1, -1)
        .clone()
    )
    lora = new_lora(4, 128, 2, gen, n=3)
    features = encode(
        load_miniature(), normalise(base[:, :, 0].flatten(0, 1), load_miniature())
    ).features
    return base, with_texts(
        lora, 30 * F.normalize(features - features.mean(0), dim=-1), torch.arange(15).view(3, 5)
    )


@pytest.fixture
def run(tmp_path, backbone):
    smoke = SETTINGS['smoke']
    settings = replace(
        smoke,
        invert=replace(smoke.invert, steps=2, per_class=4),
        distill=replace(smoke.distill, steps=2),
        market=replace(smoke.market, steps=2, batch=10),
    )
    machine = Machine(executor=Executor('here'))
    return Chain(backbone, Named(('armenian', 'greek')), settings, 0, Cache(tmp_path), machine)


def named_loss(backbone, lora, teachers, task, config=None):
    student = Embedder(backbone, lora)
    return text_loss(student, Embedder(backbone, teachers), task, config or CONFIG)


def test_texts_are_those_of_the_tower_and_the_prompt_touches_the_sets_name_only(run):
    data = load_set('digits')
    raw = load_clip().encode_text(tokenise(list(data.classes)))
    assert torch.allclose(
        F.normalize(name_texts(run, data), dim=-1), F.normalize(raw, dim=-1), atol=1e-5
    )
    assert torch.equal(
        name_texts(run, data), name_texts(run, data, prompt=False)
    )  # no digit is called 'digits'
    one = ImageSet(
        'zulu',
        torch.zeros(1, 3, 36, 36, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        ('zulu small letter a',),
        dict(train=(0,), val=(), test=()),
    )
    latin = replace(one, classes=('latin small letter a',))
    assert torch.equal(name_texts(run, one), name_texts(run, latin)) and not torch.equal(
        name_texts(run, one, prompt=False), name_texts(run, latin)
    )


def test_text_logits_do_not_know_the_length_of_a_feature(pool):
    features = torch.randn(6, 128, generator=generator(0))
    assert torch.allclose(
        text_logits(features, pool[1]), text_logits(features * 7, pool[1]), atol=1e-4
    )
    assert text_logits(features, pool[1]).abs().max() <= 30.01


@pytest.mark.parametrize('mixed', [False, True])
def test_loss_finds_the_planted_names(backbone, pool, mixed):
    images, teachers = pool
    task = text_tasks(backbone, images, CONFIG, mixed, generator(0, 'tasks'))
    loss, accuracy = named_loss(backbone, None, teachers, task)
    assert accuracy == 1 and loss < (0.3 if mixed else 1e-5)
    turned, worse = named_loss(backbone, None, teachers, replace(task, c=task.c.roll(1, 1)))
    if mixed:
        assert worse < 0.5 and turned > loss + 1  # names of other classes
    else:  # teacher and student read the same names: the same distribution
        assert abs(turned - loss) < 1e-5


def test_distillation_has_its_minimum_at_the_teacher(backbone, pool):
    images, teachers = pool
    tuned = replace(teachers, B=torch.randn(teachers.B.shape, generator=generator(0, 'B')) * 0.3)
    config = replace(CONFIG, tasks=1)
    task = text_tasks(backbone, images, config, False, generator(0, 'tasks'))
    first = int(task.m[0, 0])
    losses = [
        named_loss(backbone, tuned[i], tuned, task)[0].item() for i in (first, (first + 1) % 3)
    ]
    assert abs(losses[0]) < 1e-5 < losses[1]


def test_kept_patches_are_all_that_is_seen(backbone, pool):
    images, teachers = pool
    task = text_tasks(backbone, images, CONFIG, True, generator(0, 'tasks'))
    keep = torch.arange(9).expand(*task.images.shape[:3], -1)
    changed = task.images.clone()
    changed[..., 12:, :] = 5.0  # patches 0 to 8 lie in the upper two rows of six

    def loss(x, kept):
        return named_loss(backbone, None, teachers, replace(task, images=x, kept=kept))[0]

    assert torch.equal(loss(task.images, keep), loss(changed, keep))
    assert not torch.equal(loss(task.images, None), loss(changed, None))


@pytest.mark.parametrize('start', ['zero', 'average'])
def test_meta_training_learns_and_repeats_itself(backbone, pool, start):
    images, teachers = pool
    B = (
        torch.randn(teachers.B.shape, generator=generator(0, 'B')) * 0.05
    )  # the average of LoRAs that do nothing is 0, and stays it
    spoilt = replace(
        teachers, W=teachers.W[[1, 2, 0]], B=B
    )  # every class has the name of another one
    config = replace(CONFIG, start=start, steps=30, cycle=30, mix=1.0, lr=6e-3)
    made = [
        distill(backbone, spoilt, Pool(images), config, generator(0, 'distill'), loss_of=text_loss)
        for _ in range(2)
    ]
    assert all(
        torch.equal(getattr(made[0][0], k), getattr(made[1][0], k)) for k in 'AB'
    ) and torch.equal(made[0][1], made[1][1])
    curve = made[0][1]
    assert curve.shape == (30, 4) and curve[-5:, 2].mean() < curve[:5, 2].mean() - 0.1
    assert made[0][0].W is None and made[0][0].rank == 4


def test_market_of_names_learns_and_its_heads_stay(backbone, run):
    data = load_set('armenian', per_class=20)
    texts, config = name_texts(run, data), MarketConfig(n_loras=2, steps=15, batch=20, lr=6e-3)
    market = tune_named(backbone, data, texts, config)
    none = tune_named(backbone, data, texts, replace(config, steps=1, lr=1e-9))
    assert market.accuracy.mean() > none.accuracy.mean()
    assert torch.equal(market.lora.W, texts[market.classes].mT) and market.lora.b.abs().max() == 0
    assert torch.equal(market.classes, private_data(data, config, 0)[0])
    assert torch.equal(tune_named(backbone, data, texts, config).lora.B, market.lora.B)


def test_market_of_two_ranks(backbone, run):
    data = load_set('armenian', per_class=20)
    lora = tune_named(
        backbone,
        data,
        name_texts(run, data),
        MarketConfig(n_loras=2, rank=(2, 4), steps=3, batch=10),
    ).lora
    assert (
        lora.rank == 4
        and lora.A[0, ..., 2:].abs().max() == 0
        and lora.B[0, ..., 2:, :].abs().max() == 0
        and lora.B[1, ..., 2:, :].abs().max() > 0
    )


def market_with_one_good(pool):
    "Teachers of which number 1 alone does nothing; the others spoil every feature"
    images, teachers = pool
    B = torch.randn(teachers.B.shape, generator=generator(0, 'spoil')) * 3.0
    B[1] = 0
    return images, replace(teachers, B=B)


def test_mole_turns_to_the_lora_that_does_no_harm(backbone, pool):
    images, market = market_with_one_good(pool)
    made = mole_named(
        backbone, market, images, replace(CONFIG, steps=30, cycle=30), generator(0, 'mole')
    )
    share = [(made.B[..., 2 * i : 2 * i + 2, :].norm() / market.B[i].norm()).item() for i in (0, 2)]
    assert all(s < 0.3 for s in share)  # a third each at the start


def test_lorahub_is_no_worse_than_its_start(backbone, pool):
    images, market = market_with_one_good(pool)
    hub = HubConfig(steps=8, images=40)
    made = hub_named(backbone, market, images, CONFIG, hub, generator(0, 'hub'))
    config = replace(CONFIG, tasks=2)
    task = text_tasks(backbone, images, config, True, generator(0, 'fresh'))
    loss = lambda lora: named_loss(backbone, lora, market, task)[0]
    assert made.rank == 2 and loss(made) < loss(market[0])
    assert torch.equal(
        made.A, hub_named(backbone, market, images, CONFIG, hub, generator(0, 'hub')).A
    )


def test_stages_come_back_from_the_cache_and_depend_on_their_source(run):
    def make(chain):
        return [chain.market().lora.B, chain.images().images, chain.meta(Recipe(), 0).lora.B]

    found = make(run)
    fresh = replace(run, store=Cache(run.store.folder))
    assert all(torch.equal(a, b) for a, b in zip(make(fresh), found))
    outcomes = [o for part in (fresh, *fresh.parts) for _, _, o, _ in part.store.log]
    assert set(outcomes) == {'hit'}
    assert {kind for kind, *_ in fresh.store.log} == {'market', 'inverted', 'meta'}
    assert not torch.equal(make(replace(run, seed=1))[2], found[2])
    average = run.meta(Recipe('average'), 0).lora
    assert not torch.equal(average.A, run.meta(Recipe(), 0).lora.A)


def test_real_images_fit_the_loras_of_a_mixed_market(run):
    market, real = run.market(), run.pool(Recipe(pool='real')).images
    assert real.shape == run.images().images.shape == (4, 5, 4, 3, 36, 36)
    for i, part in enumerate(run.parts):
        for j in range(2):
            classes = market.classes[2 * i + j]
            known = part.data.images[torch.isin(part.data.labels, classes)]
            known = {im.numpy().tobytes() for im in known}
            assert all(im.numpy().tobytes() in known for im in real[2 * i + j].flatten(0, 1))


def predict_names(run, data, episodes, prompt=True):
    "Zero-shot with the plain backbone."
    features = embed_used(run.backbone, data.images, episodes, None)
    return zero_shot(features, episodes, name_texts(run, data, prompt))


def test_the_support_is_not_looked_at(run):
    data = load_set('digits')
    episodes = draw_episodes(data, 'test', 6, EpisodeSize(5, 1))
    same = predict_names(run, data, episodes)
    blank = replace(
        data,
        images=data.images.index_fill(
            0,
            torch.tensor(
                sorted(
                    set(episodes.support.flatten().tolist())
                    - set(episodes.query.flatten().tolist())
                )
            ),
            0,
        ),
    )
    assert (
        torch.equal(same, predict_names(run, blank, episodes))
        and same.shape == episodes.query.shape
    )


def test_names_of_latin_letters_are_found(run):
    "Two sets with the same images; the one with the right names must win by far"
    data = load_set('digits')
    named = replace(
        data,
        classes=(
            'latin capital letter o',
            'digit one',
            'digit two',
            'digit three',
            'digit four',
            'digit five',
            'digit six',
            'digit seven',
            'digit eight',
            'digit nine',
        ),
    )
    turned = replace(named, classes=named.classes[5:] + named.classes[:5])
    episodes = draw_episodes(data, 'test', 50, EpisodeSize(5, 1))
    right = [
        (predict_names(run, d, episodes) == torch.arange(5).view(1, 5, 1)).float().mean()
        for d in (named, turned)
    ]
    assert right[0] > right[1]


def test_names_are_read_by_the_backbone_for_photos_too(tmp_path):
    "Its text tower ships: no file is looked for, and a table can have the row."
    chain = Chain(load_miniature(PHOTO), Named(('greek',)), SETTINGS['smoke'], store=Cache(tmp_path))
    texts = name_texts(chain, load_set('digits', per_class=1))
    assert texts.shape == (10, chain.backbone.out_dim) and texts.isfinite().all()
    assert torch.allclose(texts.norm(dim=1), texts.norm(dim=1)[0])
