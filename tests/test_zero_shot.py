"Class names in the place of heads and prototypes: planted answers are found, order and seed matter, stages come back from the cache."

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lora_recycle.method.backbone import encode, normalise
from lora_recycle.core import Cache, generator
from lora_recycle.suite.images import ImageSet, load_set
from lora_recycle.method.distill import DistillConfig, Embedder, Pool, Task, distill
from lora_recycle.suite.episodes import draw_episodes
from lora_recycle.rivals.finetune import HubConfig
from lora_recycle.method.lora import new_lora
from lora_recycle.method.market import MarketConfig, private_data
from lora_recycle.suite.miniature import load_clip, load_miniature, tokenise
from lora_recycle.method.chain import SCALES, Chain
from lora_recycle.rivals.text import (
    by_text,
    every_class_rows,
    hub_named,
    mole_named,
    name_texts,
    text_hub,
    text_inverted,
    text_logits,
    text_loss,
    text_market,
    text_meta,
    text_mole,
    text_pool,
    text_tasks,
    tune_named,
    with_texts,
)

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
    scale = replace(
        SCALES['smoke'],
        n_tasks=6,
        hub=HubConfig(steps=2, images=20),
        invert=replace(SCALES['smoke'].invert, steps=2, per_class=4),
        distill=replace(SCALES['smoke'].distill, steps=2),
        market=replace(SCALES['smoke'].market, steps=2, batch=10),
    )
    return Chain(backbone, scale, 0, Cache(tmp_path), ('armenian', 'greek'))


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
    views, m, c = text_tasks(backbone, images, CONFIG, mixed, generator(0, 'tasks'))
    student, market = Embedder(backbone), Embedder(backbone, teachers)
    loss, accuracy = text_loss(student, market, Task(views, mixed, m, c), CONFIG)
    assert accuracy == 1 and loss < (0.3 if mixed else 1e-5)
    turned, worse = text_loss(student, market, Task(views, mixed, m, c.roll(1, 1)), CONFIG)
    if mixed:
        assert worse < 0.5 and turned > loss + 1  # names of other classes
    else:
        assert (
            abs(turned - loss) < 1e-5
        )  # teacher and student read the same names: the same distribution


def test_distillation_has_its_minimum_at_the_teacher(backbone, pool):
    images, teachers = pool
    tuned = replace(teachers, B=torch.randn(teachers.B.shape, generator=generator(0, 'B')) * 0.3)
    views, m, c = text_tasks(
        backbone, images, replace(CONFIG, tasks=1), False, generator(0, 'tasks')
    )
    own, other = int(m[0, 0]), (int(m[0, 0]) + 1) % 3
    task = Task(views, False, m, c)
    losses = [
        text_loss(Embedder(backbone, tuned[i]), Embedder(backbone, tuned), task, CONFIG)[0].item()
        for i in (own, other)
    ]
    assert abs(losses[0]) < 1e-5 < losses[1]


def test_kept_patches_are_all_that_is_seen(backbone, pool):
    images, teachers = pool
    views, m, c = text_tasks(backbone, images, CONFIG, True, generator(0, 'tasks'))
    keep = torch.arange(9).expand(*views.shape[:3], -1)
    changed = views.clone()
    changed[..., 12:, :] = 5.0  # patches 0 to 8 lie in the upper two rows of six
    market = Embedder(backbone, teachers)
    loss = lambda x, k: text_loss(Embedder(backbone), market, Task(x, True, m, c, k), CONFIG)[0]
    assert torch.equal(loss(views, keep), loss(changed, keep)) and not torch.equal(
        loss(views, None), loss(changed, None)
    )


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
    views, m, c = text_tasks(
        backbone, images, replace(CONFIG, tasks=2), True, generator(0, 'fresh')
    )
    task, teachers = Task(views, True, m, c), Embedder(backbone, market)
    loss = lambda lora: text_loss(Embedder(backbone, lora), teachers, task, CONFIG)[0]
    assert made.rank == 2 and loss(made) < loss(market[0])
    assert torch.equal(
        made.A, hub_named(backbone, market, images, CONFIG, hub, generator(0, 'hub')).A
    )


def test_stages_come_back_from_the_cache_and_depend_on_their_source(run):
    made = [
        text_market(run).lora.B,
        text_inverted(run),
        text_meta(run)[0].B,
        text_mole(run).B,
        text_hub(run).B,
    ]
    first = len(run.cache.log)
    again = [
        text_market(run).lora.B,
        text_inverted(run),
        text_meta(run)[0].B,
        text_mole(run).B,
        text_hub(run).B,
    ]
    assert all(torch.equal(a, b) for a, b in zip(made, again)) and {
        entry[2] for entry in run.cache.log[first:]
    } == {'hit'}
    kinds = {entry[0] for entry in run.cache.log}
    assert kinds == {'text_market', 'text_inverted', 'text_meta', 'text_mole', 'text_hub'}
    other = replace(run, seed=1)
    assert not torch.equal(text_meta(other)[0].B, made[2])
    assert not torch.equal(text_meta(run, start='zero')[0].A[..., :4], text_meta(run)[0].A[..., :4])


def test_real_images_fit_the_loras_of_a_mixed_market(run):
    market, real = text_market(run), text_pool(run, 'real')
    assert real.shape == text_inverted(run).shape == (4, 5, 4, 3, 36, 36)
    for i, source in enumerate(run.parts):
        for j in range(2):
            own = {
                im.numpy().tobytes()
                for im in source.data.images[
                    torch.isin(source.data.labels, market.classes[2 * i + j])
                ]
            }
            assert all(im.numpy().tobytes() in own for im in real[2 * i + j].flatten(0, 1))


def test_the_support_is_not_looked_at(run):
    data = load_set('digits')
    episodes = draw_episodes(data, 'test', 6, 5, 1)
    predict = by_text(lambda run: None)
    same = predict(run, data, episodes)
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
        torch.equal(same, predict(run, blank, episodes, 0)) and same.shape == episodes.query.shape
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
    methods = {('Zero-shot CLIP', ''): by_text(lambda run: None)}
    episodes = draw_episodes(data, 'test', 50, 5, 1)
    right = [
        (methods['Zero-shot CLIP', ''](run, d, episodes) == torch.arange(5).view(1, 5, 1))
        .float()
        .mean()
        for d in (named, turned)
    ]
    assert right[0] > right[1]


def test_rows_of_the_harder_question(run):
    methods = {
        ('Zero-shot CLIP', ''): by_text(lambda run: None),
        ('Zero-shot CLIP', 'plain'): by_text(lambda run: None, prompt=False),
    }
    rows = every_class_rows('zero_shot', run, methods, ('digits', 'armenian'))
    assert list(zip(rows['dataset'], rows['variant'])) == [
        (d, v) for d in ('digits', 'armenian') for v in ('', 'plain')
    ]
    assert (
        rows['value'].between(0, 100).all()
        and (rows['ci95'] > 0).all()
        and set(rows['metric']) == {'all_way_accuracy'}
    )
    digits = load_set('digits')
    episodes = draw_episodes(digits, 'test', 1, 10, 1, run.scale.n_query)
    by_hand = (
        (by_text(lambda run: None)(run, digits, episodes)[0] == torch.arange(10)[:, None])
        .float()
        .mean()
        .item()
    )
    assert rows['value'][0] == pytest.approx(100 * by_hand, abs=1e-3)
