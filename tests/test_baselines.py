"Every rival finds a planted answer, repeats itself, and says when it diverged."

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lora_recycle.bench.methods import METHODS, RIVALS, SCALES, Cell, Exam, list_needs
from lora_recycle.method.backbone import normalise
from lora_recycle.method.chain import Chain, Meta, Tuned
from lora_recycle.rivals.features import (
    CamlConfig,
    caml_logits,
    caml_predict,
    choose_tip,
    fit_linear,
    linear_probe,
    new_caml,
    public_images,
    simple_shot,
    simplex_codes,
    tip_adapter,
    train_caml,
    zero_shot,
)
from lora_recycle.core import digest, generator
from lora_recycle.suite.images import ImageSet, load_set
from lora_recycle.method.distill import DistillConfig
from lora_recycle.suite.episodes import EpisodeSize, draw_episodes
from lora_recycle.suite.evaluate import embed, nearest_prototype, right_answers
from lora_recycle.rivals.finetune import (
    RATES,
    Adapted,
    HubConfig,
    TuneConfig,
    TunedEpisodes,
    ask_and_tell,
    choose_rate,
    compose,
    gated_lora,
    group_features,
    lorahub,
    meta_train_pmf,
    own_probe,
    own_prototype,
    tune_episodes,
    tune_full,
    tune_head,
    tune_lora,
    tune_mole,
    tune_pmf,
)
from lora_recycle.method.lora import LoRA, average_products, new_lora, stack_loras, truncate_rank
from lora_recycle.suite.miniature import load_miniature

SHAPES = [(2, 1), (2, 5), (5, 1), (5, 5), (20, 1), (20, 5)]


def share(predicted):
    return right_answers(predicted).sum().item() / predicted.numel()


def random_lora(seed, rank=4, size=0.15):
    gen = generator(seed, 'random lora')
    return LoRA(
        torch.randn(4, 2, 128, rank, generator=gen) * size,
        torch.randn(4, 2, rank, 128, generator=gen) * size,
    )


def without(backbone, lora):
    "The backbone that `lora` repairs: its product is taken out of the q and v weights"
    weights, product = dict(backbone.weights), (lora.A @ lora.B).mT
    for layer in range(backbone.layers):
        name = f'transformer.resblocks.{layer}.attn.in_proj_weight'
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat([q - product[layer, 0], k, v - product[layer, 1]])
    return replace(backbone, weights=weights)


def toy_set(n_classes, per_class, dim, noise, seed=0):
    "Features of well separated classes and a set that has these classes, for episodes"
    gen = generator(seed, 'toy')
    centres = torch.randn(n_classes, dim, generator=gen)
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    features = centres[labels] + noise * torch.randn(len(labels), dim, generator=gen)
    data = ImageSet(
        'toy',
        torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8),
        labels,
        tuple(map(str, range(n_classes))),
        dict(train=(), val=(), test=tuple(range(n_classes))),
    )
    return features, centres, data


@pytest.fixture(scope='module')
def backbone():
    return load_miniature()


@pytest.fixture(scope='module')
def data():
    return load_set('greek', per_class=20).split('test')


@pytest.fixture(scope='module')
def features(backbone, data):
    return embed(backbone, data.images)


def few(data, n, way=5, shot=1, n_query=15):
    return draw_episodes(data, 'test', n, EpisodeSize(way, shot, n_query))


def shuffled(data, seed=0):
    "The same images, their labels dealt anew: nothing can be learned"
    return replace(
        data,
        images=data.images[torch.randperm(len(data.images), generator=generator(seed, 'shuffle'))],
    )


# on fixed features


@pytest.mark.parametrize('shot,c', [(1, 1.0), (5, 1.0), (5, 0.1)])
def test_linear_probe_is_scikit_learns(features, data, shot, c):
    e = few(data, 120, shot=shot)
    labels, theirs = torch.arange(5).repeat_interleave(shot), []
    for s, q in zip(e.support.flatten(1), e.query.flatten(1)):
        theirs.append(
            torch.from_numpy(
                LogisticRegression(C=c, max_iter=5000)
                .fit(features[s].numpy(), labels.numpy())
                .predict(features[q].numpy())
            )
        )
    ours, theirs = linear_probe(features, e, c), torch.stack(theirs).view_as(e.query)
    assert abs(share(ours) - share(theirs)) < 0.005 and (ours == theirs).float().mean() > 0.98


def test_linear_probe_minimises_its_objective():
    support = torch.randn(2, 3, 4, 6, generator=generator(0))
    W, b = (t.requires_grad_() for t in fit_linear(support, c=2.0, steps=20_000, tol=1e-9))
    logits = support.flatten(1, 2) @ W + b
    loss = (
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.arange(3).repeat_interleave(4).repeat(2), reduction='sum'
        )
        + W.square().sum() / 4
    )
    assert torch.autograd.grad(loss, W)[0].abs().max() < 1e-2


def test_linear_probe_of_an_episode_does_not_depend_on_the_others(features, data):
    e = few(data, 30)
    alone = linear_probe(features, type(e)(e.support[3:4], e.query[3:4], e.classes[3:4]))
    assert (alone == linear_probe(features, e)[3:4]).float().mean() > 0.97


def test_simple_shot_takes_the_common_part_away():
    f, _, data = toy_set(6, 20, 16, 0.1)
    e = few(data, 20)
    assert share(simple_shot(f + 100 * torch.ones(16), e, 100 * torch.ones(16))) > 0.99
    assert (
        share(
            simple_shot(
                f * torch.rand(len(f), 1, generator=generator(0)).add(0.01), e, torch.zeros(16)
            )
        )
        > 0.99
    )  # lengths do not matter


def test_text_features_decide_zero_shot_and_support_decides_tip_adapter():
    f, centres, data = toy_set(6, 20, 16, 0.1)
    e = few(data, 20)
    assert share(zero_shot(f, e, centres)) > 0.99
    wrong = centres.roll(1, 0)
    assert share(zero_shot(f, e, wrong)) < 0.5
    assert share(tip_adapter(f, e, wrong, alpha=1e4)) > 0.99
    assert torch.equal(tip_adapter(f, e, wrong, alpha=0.0), zero_shot(f, e, wrong))


def test_validation_episodes_choose_how_much_the_support_counts():
    f, centres, data = toy_set(6, 20, 16, 0.1)
    e = few(data, 20)
    assert (
        choose_tip(f, e, centres)[0] == 1.0
    )  # names that tell all: the least weight for the support
    chosen = choose_tip(f, e, centres.roll(1, 0))
    assert chosen[0] >= 100.0 and share(tip_adapter(f, e, centres.roll(1, 0), *chosen)) > 0.99
    assert choose_tip(f, e, centres.roll(1, 0), alphas=(0.0, 2.0), betas=(3.0,)) == (2.0, 3.0)


@pytest.fixture(scope='module')
def caml():
    f, _, _ = toy_set(200, 20, 16, 0.3, seed=1)
    return train_caml(
        f.view(200, 1, 20, 16), CamlConfig(steps=600, codes=24, way=10), generator(0, 'caml')
    )


def test_caml_learns_to_compare(caml):
    model, curve = caml
    f, _, data = toy_set(24, 20, 16, 0.3, seed=2)  # classes that it never saw
    for shot in (1, 5):
        e = few(data, 20, shot=shot)
        assert share(caml_predict(model, f, e)) > 0.95 * share(nearest_prototype(f, e))
    assert curve[:20].mean() < 0.3 and curve[-20:].mean() > 0.85
    mixed = f[torch.randperm(len(f), generator=generator(0))]
    assert abs(share(caml_predict(model, mixed, e)) - 0.2) < 0.06


def test_caml_goes_on_from_another_and_leaves_that_as_it_was(caml):
    f, _, data = toy_set(24, 20, 16, 0.3, seed=2)
    pool, before = f.view(24, 1, 20, 16), {k: v.clone() for k, v in caml[0].state_dict().items()}
    more, curve = train_caml(pool, CamlConfig(steps=10, codes=24, lr=1e-4), generator(0), caml[0])
    assert curve[0] > 0.8 and not any(p.requires_grad for p in more.parameters())
    assert all(torch.equal(v, before[k]) for k, v in caml[0].state_dict().items())
    assert not torch.equal(more['read'].weight, before['read.weight'])


def test_caml_answers_a_query_whatever_else_is_asked(caml):
    support, query = (
        torch.randn(2, 5, 3, 16, generator=generator(0)),
        torch.randn(2, 5, 4, 16, generator=generator(1)),
    )
    codes = simplex_codes(24)[:5].expand(2, -1, -1)
    together, other = caml_logits(caml[0], support, query, codes), query.clone()
    other[:, :, 1:] = 9 * torch.randn(2, 5, 3, 16, generator=generator(2))
    torch.testing.assert_close(
        caml_logits(caml[0], support, other, codes)[:, :, :1],
        together[:, :, :1],
        atol=1e-3,
        rtol=1e-3,
    )
    deep = new_caml(16, CamlConfig(layers=3, codes=24), generator(0)).eval().requires_grad_(False)
    torch.testing.assert_close(
        caml_logits(deep, support, query[:, :, 2:3], codes),
        caml_logits(deep, support, query, codes)[:, :, 2:3],
        atol=1e-3,
        rtol=1e-3,
    )
    support[:, 0] *= -1
    assert not torch.allclose(caml_logits(caml[0], support, query, codes), together, atol=1e-3)


def test_public_images_are_a_pool_of_classes():
    pool = public_images(12, 3, generator(0))
    assert pool.shape == (12, 1, 3, 3, 36, 36) and pool.dtype == torch.uint8
    assert torch.equal(pool, public_images(12, 3, generator(0))) and not torch.equal(
        pool, public_images(12, 3, generator(1))
    )
    assert len({tuple(im.flatten().tolist()) for im in pool.flatten(0, 2)}) == 36
    with pytest.raises(ValueError, match='n_classes=1'):
        public_images(1, 3, generator(0))
    with pytest.raises(ValueError, match='per_class=0'):
        public_images(2, 0, generator(0))


def test_caml_does_not_see_the_order_of_the_support(caml):
    support, query = (
        torch.randn(2, 5, 5, 16, generator=generator(0)),
        torch.randn(2, 5, 3, 16, generator=generator(1)),
    )
    codes = simplex_codes(24)[:5].expand(2, -1, -1)
    plain, order = (
        caml_logits(caml[0], support, query, codes),
        torch.randperm(5, generator=generator(2)),
    )
    torch.testing.assert_close(
        caml_logits(caml[0], support[:, :, order], query, codes), plain, atol=1e-3, rtol=1e-3
    )
    rows = caml_logits(
        caml[0], support[:, order], query, codes[:, order]
    )  # classes in another order, each with its code
    torch.testing.assert_close(rows, plain[..., order], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(
        caml_logits(caml[0], support[:, order], query, codes), plain, atol=1e-3
    )


def test_caml_has_a_limit_of_classes(caml):
    with pytest.raises(ValueError, match='codes=25'):
        caml_predict(caml[0], *(lambda f, c, d: (f, few(d, 1, 25)))(*toy_set(30, 20, 16, 0.1)))
    with pytest.raises(ValueError, match='heads=7'):
        new_caml(16, CamlConfig(heads=7), generator(0))


@pytest.mark.parametrize('way,shot', SHAPES)
def test_every_shape_of_episode_on_features(caml, way, shot):
    f, centres, data = toy_set(24, 20, 16, 0.1)
    e = few(data, 4, way, shot)
    answers = dict(
        probe=linear_probe(f, e),
        sgd=tune_head(f, e, TuneConfig(), generator(0)).predicted,
        simple=simple_shot(f, e, f.mean(0)),
        zero=zero_shot(f, e, centres),
        tip=tip_adapter(f, e, centres),
        caml=caml_predict(caml[0], f, e),
    )
    for name, predicted in answers.items():
        assert (
            predicted.dtype == torch.int64
            and predicted.shape == (4, way, 15)
            and predicted.min() >= 0
            and predicted.max() < way
        ), name
        assert share(predicted) > 0.8, name


# tuned on every episode

SHORT = TuneConfig(steps=6, lr=0.01)


def tuners(backbone, way=5):
    "name -> function (images, episodes, generator) of every method that learns on an episode"
    market = stack_loras(
        [random_lora(i, rank, 0.05) for i, rank in ((0, 2), (1, 4))]
    )  # of mixed ranks
    hub = HubConfig(steps=5, views=1)
    lora = dict(
        vars(new_lora(4, 128, 4, generator(0))), scale=torch.tensor(10.0), bias=torch.tensor(0.0)
    )
    pmf = {k: lora[k] for k in ('A', 'B', 'scale', 'bias')}
    adam = replace(SHORT, optimiser='adam', lr=1e-4)
    return {
        'LoRA': lambda x, e, g: (
            tune_lora(backbone, x, e, new_lora(4, 128, 4, generator(0)), SHORT, g).predicted
        ),
        'Avg': lambda x, e, g: (
            tune_lora(backbone, x, e, average_products(market), SHORT, g).predicted
        ),
        'Full': lambda x, e, g: (
            tune_full(backbone, x, e, replace(SHORT, steps=3, lr=0.001), g).predicted
        ),
        'MOLE': lambda x, e, g: tune_mole(backbone, x, e, market, SHORT, g).predicted,
        'Hub': lambda x, e, g: own_probe(
            backbone, x, e, lorahub(backbone, x, e, market, hub, g).lora
        ),
        'Hub NN': lambda x, e, g: own_prototype(
            backbone, x, e, lorahub(backbone, x, e, market, replace(hub, rule='products'), g).lora
        ),
        'PMF': lambda x, e, g: tune_pmf(backbone, x, e, pmf, adam, g).predicted,
        'PMF whole': lambda x, e, g: (
            tune_pmf(
                backbone,
                x,
                e,
                {**backbone.weights, 'scale': torch.tensor(10.0), 'bias': torch.tensor(0.0)},
                replace(adam, steps=2),
                g,
            ).predicted
        ),
    }


NAMES = ['LoRA', 'Avg', 'Full', 'MOLE', 'Hub', 'Hub NN', 'PMF', 'PMF whole']


@pytest.mark.parametrize('name', NAMES)
def test_better_than_chance_twice_the_same_and_chance_on_shuffled_labels(backbone, data, name):
    e, run = few(data, 6, n_query=5), tuners(backbone)[name]
    first = run(data.images, e, generator(0, 'run'))
    assert first.dtype == torch.int64 and share(first) > 0.4
    assert torch.equal(first, run(data.images, e, generator(0, 'run')))
    assert share(run(shuffled(data).images, e, generator(0, 'run'))) < 0.35  # chance .2, sd .035


@pytest.mark.parametrize('way,shot', [(2, 1), (2, 5), (20, 1), (20, 5)])
@pytest.mark.parametrize('name', NAMES)
def test_every_shape_of_episode(backbone, name, way, shot):
    data = load_set('hebrew', per_class=10)
    predicted = tuners(backbone)[name](
        data.images, few(data, 1, way, shot, n_query=2), generator(0)
    )
    assert predicted.shape == (1, way, 2) and predicted.min() >= 0 and predicted.max() < way


@pytest.mark.parametrize('rule', ['factors', 'products'])
def test_lorahub_puts_its_weight_on_the_useful_lora(backbone, data, rule):
    useful = random_lora(9, size=0.3)
    broken, market = (
        without(backbone, useful),
        stack_loras([random_lora(1, 2, 0.2), useful, random_lora(2, 4, 0.2)]),
    )
    e = few(data, 4)
    found = lorahub(broken, data.images, e, market, HubConfig(steps=30, rule=rule), generator(0))
    size = found.weights.abs()  # with factors, weight -1 makes the same LoRA as weight 1
    assert (size[:, 1] > 2 * size[:, [0, 2]].amax(1)).all() and (
        size[:, 1] - 1
    ).abs().max() < 0.3, found.weights
    bad, good = (
        share(nearest_prototype(embed(broken, data.images), e)),
        share(own_prototype(broken, data.images, e, found.lora)),
    )
    assert good > bad + 0.2, (bad, good)


@pytest.mark.parametrize('solver', ['sweep', 'released'])
def test_lorahub_among_a_hundred(backbone, data, solver):
    "The planted LoRA is found wherever it stands; as released, past the budget, none is."
    useful, place = random_lora(9, size=0.3), 70
    broken = without(backbone, useful)
    loras = [random_lora(100 + i, 2, 0.1) for i in range(100)]
    loras[place] = useful
    e = few(data, 2)
    config = HubConfig(steps=20, views=1, solver=solver)
    found = lorahub(broken, data.images, e, stack_loras(loras), config, generator(0))
    if solver == 'released':
        assert not found.weights[:, 20:].any()  # never tried
        return
    assert (found.weights.abs().argmax(1) == place).all()
    plain = share(nearest_prototype(embed(broken, data.images), e))
    assert share(own_prototype(broken, data.images, e, found.lora)) > plain + 0.2


@pytest.mark.parametrize('size', [2, 4, 48, 100])
def test_every_lora_is_tried_alone(size):
    asked = []

    def losses(weights):
        asked.append(weights[0])
        return (weights - torch.eye(size)[size - 1]).square().sum(1)

    found = ask_and_tell(losses, 1, size, HubConfig(steps=10), generator(0))
    alone = torch.stack(asked[:size])
    assert len(asked) == size + 10 and torch.equal(
        alone.sort(0).values, torch.eye(size).sort(0).values
    )
    assert found[0].argmax() == size - 1
    again = ask_and_tell(losses, 1, size, HubConfig(steps=10), generator(0))
    assert torch.equal(found, again)


def test_the_remedy_where_nevergrad_fails(monkeypatch):
    import nevergrad

    def fail(*args, **kwargs):
        raise TypeError('only 0-dimensional arrays can be converted')

    monkeypatch.setattr(nevergrad.optimizers, 'NGOpt', fail)
    config = HubConfig(steps=4, solver='released')
    with pytest.raises(RuntimeError, match="numpy below 2.4, or take HubConfig.solver='sweep'"):
        ask_and_tell(lambda w: w.sum(1), 1, 3, config, generator(0))
    ask_and_tell(lambda w: w.sum(1), 1, 3, HubConfig(steps=4), generator(0))


def test_moles_gate_finds_the_useful_lora(backbone, data):
    useful = random_lora(9, size=0.3)
    broken, market = (
        without(backbone, useful),
        stack_loras([random_lora(1, 2, 0.2), useful, random_lora(2, 4, 0.2)]),
    )
    result = tune_mole(
        broken, data.images, few(data, 4, shot=5), market, TuneConfig('adam', 30, 0.1), generator(0)
    )
    gate = result.learned['gate'].softmax(-1).mean((0, 1))
    assert gate.argmax() == 1 and gate[1] > 0.5, gate


def test_a_backbone_without_its_lora_is_repaired_exactly(backbone, features, data):
    lora = random_lora(9)
    torch.testing.assert_close(
        embed(without(backbone, lora), data.images, lora), features, atol=1e-3, rtol=1e-3
    )


def test_the_average_of_one_lora_is_that_lora(backbone, data):
    lora = random_lora(3, size=0.05)
    average, e = average_products(stack_loras([lora] * 3)), few(data, 4)
    torch.testing.assert_close(
        embed(backbone, data.images[:20], average),
        embed(backbone, data.images[:20], lora),
        atol=1e-4,
        rtol=1e-3,
    )
    a, b = (
        tune_lora(backbone, data.images, e, truncate_rank(l, 4), SHORT, generator(0)).predicted
        for l in (average, lora)
    )
    assert (a == b).float().mean() > 0.98


def test_one_episode_is_tuned_as_by_hand(backbone, data):
    e, start = few(data, 3, shot=5), new_lora(4, 128, 4, generator(0))
    config = TuneConfig(steps=5, lr=0.05, batch=25)
    batch = tune_lora(backbone, data.images, e, start, config, generator(0))
    head, x = torch.nn.Linear(128, 5), data.images[e.support[1].flatten()]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    A, B = start.A.clone().requires_grad_(), start.B.clone().requires_grad_()
    opt = torch.optim.SGD([A, B, *head.parameters()], lr=0.05)
    images = lambda rows: group_features(backbone, normalise(rows, backbone)[None], LoRA(A, B))[0]
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(
            head(images(x)), torch.arange(5).repeat_interleave(5)
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (
        head(images(data.images[e.query[1].flatten()])).argmax(-1) == batch.predicted[1].flatten()
    ).float().mean() > 0.97


def test_groups_of_any_size_give_the_same(backbone, data):
    e, start = few(data, 3, n_query=5), new_lora(4, 128, 4, generator(0))
    a, b = (
        tune_lora(backbone, data.images, e, start, replace(SHORT, images=n), generator(0)).predicted
        for n in (5, 480)
    )
    assert (a == b).float().mean() > 0.98
    plain = Adapted(lambda t, x: group_features(backbone, x, None))
    c = tune_episodes(backbone, data.images, e, plain, SHORT, generator(0)).predicted
    assert (
        c == tune_head(embed(backbone, data.images), e, SHORT, generator(0)).predicted
    ).float().mean() > 0.98


@pytest.mark.parametrize('name', ['head', 'LoRA', 'Full', 'MOLE', 'PMF'])
def test_divergence_is_reported(backbone, data, name):
    e, gen = few(data, 2, shot=5, n_query=5), generator(0)
    features, lora = embed(backbone, data.images), new_lora(4, 128, 4, generator(0))
    nan = data.images.float().mul(float('nan'))
    wild = TuneConfig(steps=6, lr=1e38)
    pmf = dict(A=lora.A, B=lora.B, scale=torch.tensor(10.0), bias=torch.tensor(0.0))
    result = {
        'head': lambda: tune_head(features, e, wild, gen),
        'LoRA': lambda: tune_lora(backbone, data.images, e, lora, wild, gen),
        'Full': lambda: tune_full(backbone, data.images, e, wild, gen),
        'MOLE': lambda: tune_mole(backbone, nan, e, stack_loras([lora]), SHORT, gen),
        'PMF': lambda: tune_pmf(backbone, data.images, e, pmf, wild, gen),
    }[name]()
    assert result.diverged.all() and (result.predicted == -1).all() and share(result.predicted) == 0


def test_a_diverged_episode_leaves_its_neighbours_alone(features, data):
    e = few(data, 3)
    poisoned = features.clone()
    only = (
        set(e.support[1].flatten().tolist())
        - set(e.support[[0, 2]].flatten().tolist())
        - set(e.query[[0, 2]].flatten().tolist())
    )
    assert only
    poisoned[sorted(only)] = float('inf')
    good, bad = (
        tune_head(features, e, TuneConfig(), generator(0)),
        tune_head(poisoned, e, TuneConfig(), generator(0)),
    )
    assert bad.diverged.tolist() == [False, True, False]
    assert torch.equal(bad.predicted[[0, 2]], good.predicted[[0, 2]])


def test_gates_and_weights_of_one_lora_are_that_lora():
    market = stack_loras([random_lora(i, r) for i, r in ((0, 2), (1, 4))])
    product = market.A @ market.B
    for made in (
        gated_lora(market, torch.tensor([[[0.0, 1.0]] * 4])),
        compose(market, torch.tensor([[0.0, 1.0]])),
        compose(market, torch.tensor([[0.0, 1.0]]), 'products'),
    ):
        torch.testing.assert_close((made.A @ made.B)[0], product[1], atol=1e-5, rtol=1e-4)
    cross = compose(market, torch.ones(1, 2))
    torch.testing.assert_close(
        (cross.A @ cross.B)[0], market.A.sum(0) @ market.B.sum(0), atol=1e-4, rtol=1e-3
    )
    assert not torch.allclose((cross.A @ cross.B)[0], product.sum(0), atol=1e-2)  # cross terms


@pytest.mark.parametrize('whole', [True, False])
def test_meta_training_learns_from_any_pool(backbone, whole):
    train = load_set('greek', per_class=20).split('train')
    pool = train.images.view(1, -1, 20, 3, 36, 36)
    config = DistillConfig(
        steps=14, tasks=2, n_query=3, lr=1e-4 if whole else 5e-3, flip=0.0, affine=0.5
    )
    digest = backbone.digest
    start = None if whole else new_lora(4, 128, 4, generator(0))
    a, b = (meta_train_pmf(backbone, pool, config, generator(0, 'meta'), start) for _ in range(2))
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and backbone.digest == digest
    assert a[1][-7:].mean() > 0.4 and a[0]['scale'] != 10.0


def test_rates_are_chosen_fairly():
    def run(lr):
        predicted = torch.arange(2).view(1, 2, 1).expand(2, -1, 4).clone()
        if lr == 0.1:
            predicted[1] = -1  # one of two diverged
        return TunedEpisodes(predicted, torch.tensor([False, lr == 0.1]))

    assert choose_rate(run) == (0.001, {0.001: 1.0, 0.01: 1.0, 0.1: 0.5})  # ties: the smaller
    assert choose_rate(run, (0.1,))[0] == 0.1 and set(RATES) == {0.1, 0.01, 0.001}


def test_settings_are_checked():
    for fn, word in (
        (lambda: TuneConfig('sgdm'), "Did you mean 'sgd'"),
        (lambda: TuneConfig(lr=-1.0), 'lr=-1.0'),
        (lambda: TuneConfig(batch=0), 'batch=0'),
        (lambda: HubConfig(rule='svd'), 'factors'),
        (lambda: HubConfig(solver='ngopt'), 'released'),
        (lambda: gated_lora(new_lora(4, 128, 2, n=2), torch.ones(1, 4, 3)), r'\[T,L,M\]'),
        (lambda: fit_linear(torch.zeros(1, 2, 1, 3), c=0.0), 'c=0.0'),
        (lambda: TuneConfig(lr=float('nan')), 'lr=nan'),
        (lambda: CamlConfig(way=40), '2 to 32'),
        (lambda: choose_rate(None, ()), 'rates'),
    ):
        with pytest.raises(ValueError, match=word):
            fn()


@pytest.mark.parametrize('method', ['recycle', 'recycle-average', 'recycle-no-mix'])
def test_ours_answers_with_what_was_meta_trained(backbone, data, features, method, monkeypatch):
    "A LoRA that changes features changes answers; one that is still zero leaves those of NN."
    e = few(data, 6)
    exam = Exam(data, e, 1, dict(way=5, n_query=15, large=10))
    chain = Chain(backbone, Tuned(('greek',)), settings=SCALES['smoke'].chain)
    asked = []

    def answer(lora):
        "The answers if `lora` was meta-trained."

        def meta(self, recipe, shot):
            asked.append((recipe, shot))
            return Meta(lora, None, torch.zeros(1))

        monkeypatch.setattr(Chain, 'meta', meta)
        return METHODS[method].predict(chain, exam)

    strong = random_lora(9, size=0.3)
    plain = nearest_prototype(features, e)
    assert torch.equal(answer(new_lora(4, 128, 4, generator(0))), plain)
    there = answer(strong)
    assert torch.equal(there, nearest_prototype(embed(backbone, data.images, strong), e))
    assert not torch.equal(there, plain)
    assert asked == [(METHODS[method].recipe, 1)] * 2


def test_a_rival_outlives_the_settings_of_stages_that_it_does_not_need(backbone):
    "How long inversion and meta-training last changes the key of those that use them, no other."
    scale = SCALES['smoke']
    settings = scale.chain
    invert = replace(settings.invert, steps=7)
    changed = {
        'images': replace(settings, invert=invert),
        'meta': replace(settings, distill=replace(settings.distill, steps=9)),
    }
    for need, other in changed.items():
        first, second = (Chain(backbone, Tuned(('greek',)), s) for s in (settings, other))
        for method in RIVALS:
            cells = [Cell(chain, 'greek', method, 1, scale) for chain in (first, second)]
            same = len({digest(cell.key) for cell in cells}) == 1
            needs = list_needs(method, settings.public)
            assert same == (need not in needs and 'meta' not in needs), (method.id, need)
    wide = replace(settings, distill=replace(settings.distill, rank=8))
    cut = METHODS['average-cut']
    cells = [Cell(replace(first, settings=s), 'greek', cut, 1, scale) for s in (settings, wide)]
    assert cells[0].entry != cells[1].entry  # the rank that merges are cut to
