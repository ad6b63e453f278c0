"Dropping tokens: against a slow and obvious transformer, for gradients, for grids that are not square, and for every wrong plan."

import math
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lora_recycle.method import backbone as library
from lora_recycle.method.backbone import (
    Backbone,
    encode,
    encode_tokens,
    gather_tokens,
    most_attended,
)
from lora_recycle.core import generator
from lora_recycle.method.lora import LoRA

WIDTH, LAYERS, HEADS, OUT, PATCH = 16, 3, 2, 10, 6
quick = settings(deadline=None, max_examples=25)


def make(rows, columns, act='quick_gelu', seed=0):
    "A random backbone for images of `rows` x `columns` patches, in double precision; every tensor, biases and norms too, is random"
    sizes = {
        'class_embedding': (WIDTH,),
        'positional_embedding': (rows * columns + 1, WIDTH),
        'conv1.weight': (WIDTH, 3, PATCH, PATCH),
        'proj': (WIDTH, OUT),
    }
    for name in (
        'ln_pre',
        'ln_post',
        *(f'transformer.resblocks.{l}.ln_{i}' for l in range(LAYERS) for i in (1, 2)),
    ):
        sizes |= {f'{name}.weight': (WIDTH,), f'{name}.bias': (WIDTH,)}
    for l in range(LAYERS):
        for name, a, b in (
            ('attn.in_proj_', 3 * WIDTH, WIDTH),
            ('attn.out_proj.', WIDTH, WIDTH),
            ('mlp.c_fc.', 4 * WIDTH, WIDTH),
            ('mlp.c_proj.', WIDTH, 4 * WIDTH),
        ):
            sizes |= {
                f'transformer.resblocks.{l}.{name}weight': (a, b),
                f'transformer.resblocks.{l}.{name}bias': (a,),
            }
    gen = generator(seed, 'pruning', rows, columns)
    return Backbone(
        'random',
        {k: torch.randn(s, generator=gen, dtype=torch.float64) * 0.3 for k, s in sizes.items()},
        HEADS,
        PATCH,
        act,
    )


def noise(*size, seed=0):
    return torch.randn(size, generator=generator(seed, 'noise', *size), dtype=torch.float64)


def pictures(n, rows, columns, seed=0):
    return noise(n, 3, rows * PATCH, columns * PATCH, seed=seed)


def loras(n, seed=0):
    return LoRA(
        noise(n, LAYERS, 2, WIDTH, 4, seed=seed) * 0.3,
        noise(n, LAYERS, 2, 4, WIDTH, seed=seed + 1) * 0.3,
    )


# ---- a slow, obvious transformer: one image at a time, one head at a time, a list of tokens and the patch number of each ----


def slow_norm(w, name, v):
    centred = v - v.mean()
    return centred / ((centred**2).mean() + 1e-5).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']


def slow_attention(w, at, rows, A, B):
    "Mixed tokens, and for each head the attention of the first token to all"
    W, bias = w[at + 'attn.in_proj_weight'], w[at + 'attn.in_proj_bias']
    q, k, v = (
        [
            W[part * WIDTH : (part + 1) * WIDTH] @ row + bias[part * WIDTH : (part + 1) * WIDTH]
            for row in rows
        ]
        for part in range(3)
    )
    if A is not None:
        q, v = (
            [old + (row @ A[p]) @ B[p] for old, row in zip(part, rows)]
            for p, part in ((0, q), (1, v))
        )
    mixed, first, d = [torch.zeros(WIDTH, dtype=torch.float64) for _ in rows], [], WIDTH // HEADS
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(rows)):
            powers = [
                math.exp(float(q[i][part] @ k[j][part]) / math.sqrt(d)) for j in range(len(rows))
            ]
            shares = [p / sum(powers) for p in powers]
            if i == 0:
                first.append(shares)
            for j, share in enumerate(shares):
                mixed[i][part] += share * v[j][part]
    return [w[at + 'attn.out_proj.weight'] @ m + w[at + 'attn.out_proj.bias'] for m in mixed], first


def slow_mlp(w, at, v, act):
    h = w[at + 'mlp.c_fc.weight'] @ v + w[at + 'mlp.c_fc.bias']
    h = (
        h * torch.sigmoid(1.702 * h)
        if act == 'quick_gelu'
        else h * (1 + torch.erf(h / math.sqrt(2))) / 2
    )
    return w[at + 'mlp.c_proj.weight'] @ h + w[at + 'mlp.c_proj.bias']


def slow(backbone, image, lora=None, plan=None, keep=None):
    "Features [OUT] of one image [3,H,W] and the numbers of the patches that are left"
    w, plan, tokens, names = backbone.weights, plan or {}, [], []
    for number in (
        range(image.shape[1] // PATCH * (image.shape[2] // PATCH)) if keep is None else keep
    ):
        row, column = divmod(number, image.shape[2] // PATCH)
        piece = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        tokens.append(
            torch.stack([(kernel * piece).sum() for kernel in w['conv1.weight']])
            + w['positional_embedding'][number + 1]
        )
        names.append(number)
    tokens = [
        slow_norm(w, 'ln_pre', v)
        for v in [w['class_embedding'] + w['positional_embedding'][0], *tokens]
    ]
    for layer in range(LAYERS):
        at = f'transformer.resblocks.{layer}.'
        A, B = (None, None) if lora is None else (lora.A[layer], lora.B[layer])
        mixed, first = slow_attention(w, at, [slow_norm(w, at + 'ln_1', v) for v in tokens], A, B)
        tokens = [v + m for v, m in zip(tokens, mixed)]  # the residual stays whole
        if layer in plan:
            scores = [sum(head[1 + i] for head in first) / HEADS for i in range(len(names))]
            lowest = sorted(range(len(names)), key=scores.__getitem__)[
                : int(len(names) * plan[layer])
            ]
            stay = [i for i in range(len(names)) if i not in lowest]
            tokens, names = [tokens[0], *(tokens[1 + i] for i in stay)], [names[i] for i in stay]
        tokens = [v + slow_mlp(w, at, slow_norm(w, at + 'ln_2', v), backbone.act) for v in tokens]
    return slow_norm(w, 'ln_post', tokens[0]) @ w['proj'], names


grids = st.tuples(st.integers(1, 3), st.integers(1, 4))
ratios = st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.99))
plans = st.dictionaries(st.integers(0, LAYERS - 1), ratios, max_size=LAYERS)


@quick
@given(
    grid=grids,
    plan=plans,
    n=st.integers(1, 2),
    seed=st.integers(0, 99),
    act=st.sampled_from(('gelu', 'quick_gelu')),
    with_lora=st.booleans(),
)
def test_equals_the_slow_transformer(grid, plan, n, seed, act, with_lora):
    backbone, x = make(*grid, act, seed), pictures(n, *grid, seed=seed)
    lora = loras(1, seed)[0] if with_lora else None
    out = encode(backbone, x, lora, plan=plan)
    for i in range(n):
        features, names = slow(backbone, x[i], lora, plan)
        assert out.kept[i].tolist() == names
        torch.testing.assert_close(out.features[i], features, rtol=1e-9, atol=1e-9)


@quick
@given(plan=plans, seed=st.integers(0, 99), data=st.data())
def test_sparse_tokens_and_a_lora_for_each_group_equal_the_slow_transformer(plan, seed, data):
    "Images of one batch keep different patches, and two LoRAs serve its two halves"
    backbone, x, two = make(2, 3, seed=seed), pictures(4, 2, 3, seed=seed), loras(2, seed)
    n_kept = data.draw(st.integers(1, 6))
    keep = torch.tensor([sorted(data.draw(st.permutations(range(6)))[:n_kept]) for _ in range(4)])
    out = encode(backbone, x, two, plan=plan, keep=keep)
    for i in range(4):
        features, names = slow(backbone, x[i], two[i // 2], plan, keep[i].tolist())
        assert out.kept[i].tolist() == names
        torch.testing.assert_close(out.features[i], features, rtol=1e-9, atol=1e-9)


@quick
@given(grid=grids, plan=plans, n=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_is_left(grid, plan, n, seed):
    "Counts follow the plan, relative to what is left; numbers ascend, are of the grid and never doubled; [CLS] is there after every layer"
    out = encode_tokens(make(*grid), pictures(n, *grid, seed=seed), plan=plan)
    left = grid[0] * grid[1]
    for layer in range(LAYERS):
        left -= int(left * plan.get(layer, 0))
        assert out.tokens[layer].shape == (n, left + 1, WIDTH)
    assert left >= 1 and out.kept.shape == (n, left) and out.kept.dtype == torch.int64
    assert (
        (out.kept.diff(dim=1) > 0).all()
        and out.kept.min() >= 0
        and out.kept.max() < grid[0] * grid[1]
    )


@quick
@given(
    grid=grids,
    layers=st.sets(st.integers(0, LAYERS - 1)),
    n=st.integers(1, 5),
    seed=st.integers(0, 99),
    single=st.booleans(),
)
def test_ratio_zero_is_the_plain_forward_exactly(grid, layers, n, seed, single):
    backbone, x = make(*grid), pictures(n, *grid, seed=seed)
    if single:
        backbone, x = (
            Backbone('single', {k: t.float() for k, t in backbone.weights.items()}, HEADS, PATCH),
            x.float(),
        )
    plain, pruned = encode(backbone, x), encode(backbone, x, plan={layer: 0.0 for layer in layers})
    assert torch.equal(plain.features, pruned.features) and torch.equal(plain.kept, pruned.kept)
    assert torch.equal(plain.kept, torch.arange(grid[0] * grid[1]).expand(n, -1))
    small = 0.99 / (grid[0] * grid[1])  # int(n * ratio) is 0
    assert torch.equal(
        plain.features, encode(backbone, x, plan={layer: small for layer in layers}).features
    )


@quick
@given(grid=grids, plan=plans, seed=st.integers(0, 99))
def test_an_image_does_not_know_its_batch(grid, plan, seed):
    backbone, x = make(*grid), pictures(3, *grid, seed=seed)
    out = encode(backbone, x, plan=plan)
    for i in range(3):
        alone = encode(backbone, x[i : i + 1], plan=plan)
        assert torch.equal(alone.kept[0], out.kept[i])
        torch.testing.assert_close(alone.features[0], out.features[i], rtol=1e-12, atol=1e-12)


def test_keeping_all_patches_is_the_plain_forward_exactly():
    backbone, x = make(2, 3), pictures(4, 2, 3)
    out = encode(backbone, x, keep=torch.arange(6).expand(4, -1))
    assert torch.equal(out.features, encode(backbone, x).features)


def patch_gradient(x, columns):
    "Largest absolute gradient within each patch of the images: [B, patches]"
    blocks = (
        x.grad.abs().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    )  # [B, 3, rows, columns, PATCH, PATCH]
    assert blocks.shape[3] == columns
    return blocks.amax((1, 4, 5)).flatten(1)


@pytest.mark.parametrize('rows,columns', [(4, 6), (6, 4), (1, 5), (3, 3)])
def test_left_out_patches_have_no_gradient_and_no_influence(rows, columns):
    "With `keep`, pixels outside of the kept patches do not enter at all; so the numbers mean the right places, square grid or not"
    backbone, n = make(rows, columns), rows * columns
    keep = torch.stack(
        [torch.randperm(n, generator=generator(i))[: n // 2].sort().values for i in range(3)]
    )
    x = pictures(3, rows, columns).requires_grad_()
    out = encode(backbone, x, keep=keep)
    out.features.square().sum().backward()
    assert torch.equal(out.kept, keep)
    inside = torch.zeros(3, n, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(
        patch_gradient(x, columns) > 0, inside
    )  # exactly zero outside, not zero inside
    with torch.no_grad():
        outside = ~inside.view(3, 1, rows, columns).repeat_interleave(PATCH, 2).repeat_interleave(
            PATCH, 3
        )
        assert torch.equal(
            encode(backbone, torch.where(outside, 9.0, x), keep=keep).features, out.features
        )


@pytest.mark.parametrize('layer', range(LAYERS))
def test_a_dropped_token_gets_no_gradient_after_its_layer(layer, monkeypatch):
    """Where the plan drops: the residual stream just before has a gradient for [CLS] and the kept tokens and exactly none for the others.
    Their pixels still have one, for other tokens have attended to them up to and including this layer."""
    seen = []

    def spy(x, keep, lead):
        x.retain_grad()
        seen.append((x, keep))
        return gather_tokens(x, keep, lead)

    monkeypatch.setattr(library, 'gather_tokens', spy)
    x = pictures(3, 4, 6).requires_grad_()
    # `encode` leaves nobody but [CLS] behind the last attention
    out = encode_tokens(make(4, 6), x, plan={layer: 0.5})
    out.features.square().sum().backward()
    ((stream, stay),) = seen
    assert torch.equal(stay, out.kept)
    inside = torch.zeros(3, 24, dtype=torch.bool).scatter(1, out.kept, True)
    reached = stream.grad.abs().amax(-1) > 0
    assert reached[:, 0].all()
    if layer < LAYERS - 1:
        assert torch.equal(reached[:, 1:], inside)
    else:
        assert not reached[:, 1:].any()  # after the last layer only [CLS] is read
    assert (patch_gradient(x, 6) > 0).all()


def test_choosing_has_no_gradient():
    "Scores choose and do nothing else: the gradient equals the one for the same patches given by hand"
    x, backbone = pictures(2, 2, 3).requires_grad_(), make(2, 3)
    given = encode(backbone, x, plan={1: 0.5})
    (gradient,) = torch.autograd.grad(given.features.square().sum(), x)
    (again,) = torch.autograd.grad(
        encode(backbone, x, plan={1: 0.5}, select=lambda scores, ratio: given.kept)
        .features.square()
        .sum(),
        x,
    )
    assert torch.equal(gradient, again)


@pytest.mark.parametrize('rows,columns', [(4, 6), (6, 4)])
def test_a_marked_patch_is_found_on_a_grid_that_is_not_square(rows, columns):
    "Queries and keys are built so that [CLS] attends to brightness alone: what stays must be the bright patches of each image"
    backbone = make(rows, columns)
    w = backbone.weights
    for name in w:
        w[name] = (
            torch.ones_like(w[name])
            if '.weight' in name and 'ln_' in name
            else torch.zeros_like(w[name])
        )
    w['conv1.weight'][0], w['class_embedding'][1] = (
        1.0,
        1.0,
    )  # a bright patch points along axis 0, [CLS] along 1
    w['transformer.resblocks.0.attn.in_proj_weight'][:WIDTH, 1] = 1.0  # query: [CLS]
    w['transformer.resblocks.0.attn.in_proj_weight'][WIDTH : 2 * WIDTH, 0] = 1.0  # key: brightness
    bright = [(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)]
    x = torch.zeros(3, 3, rows * PATCH, columns * PATCH, dtype=torch.float64)
    for i, (r, c) in enumerate(bright):
        x[i, :, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] = 1.0
    kept = encode(backbone, x, plan={0: 0.999}).kept
    assert kept.tolist() == [[r * columns + c] for r, c in bright]


def by_chance(gen):
    return lambda scores, ratio: most_attended(
        torch.rand(scores.shape, generator=gen, dtype=scores.dtype), ratio
    )


def least(scores, ratio):
    return most_attended(-scores, ratio)


@quick
@given(grid=grids, ratio=ratios.filter(bool), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_other_rules_take_the_place_of_attention(grid, ratio, n, seed):
    backbone, x, n_patches = (
        make(*grid),
        pictures(n, *grid, seed=seed).requires_grad_(),
        grid[0] * grid[1],
    )
    seen = []

    def watch(scores, ratio):
        seen.append(scores)
        return most_attended(scores, ratio)

    best = encode(backbone, x, plan={1: ratio}, select=watch).kept
    assert torch.equal(best, encode(backbone, x, plan={1: ratio}).kept)  # the default rule
    (scores,) = seen
    assert scores.shape == (n, n_patches) and not scores.requires_grad
    assert (scores > 0).all() and (
        scores.sum(1) < 1
    ).all()  # a softmax row without its [CLS] column
    worst = encode(backbone, x, plan={1: ratio}, select=least).kept
    chance = [
        encode(backbone, x, plan={1: ratio}, select=by_chance(generator(seed))).kept
        for _ in range(2)
    ]
    assert torch.equal(*chance) and chance[0].shape == worst.shape == best.shape
    for i in range(n):
        order, k = scores[i].argsort(), best.shape[1]
        assert worst[i].tolist() == sorted(order[:k].tolist()) and best[i].tolist() == sorted(
            order[-k:].tolist()
        )


def test_a_random_rule_differs_between_images_and_the_inverse_rule_is_the_complement():
    backbone, x = make(4, 6), pictures(5, 4, 6)
    chance = encode(backbone, x, plan={1: 0.5}, select=by_chance(generator(3))).kept
    assert len({tuple(row) for row in chance.tolist()}) == 5
    best, worst = (
        encode(backbone, x, plan={1: 0.5}, select=rule).kept for rule in (most_attended, least)
    )
    assert (torch.cat([best, worst], 1).sort(1).values == torch.arange(24)).all()


@pytest.mark.parametrize(
    'plan,what',
    [
        ({LAYERS: 0.5}, '0 to 2'),
        ({-1: 0.5}, '0 to 2'),
        ({'1': 0.5}, '0 to 2'),
        ({1.5: 0.5}, '0 to 2'),
        ({1: 1.0}, '[0, 1)'),
        ({1: 1.5}, '[0, 1)'),
        ({1: -0.1}, '[0, 1)'),
        ({1: math.nan}, '[0, 1)'),
        ({0: 0.5, 1: math.inf}, '[0, 1)'),
    ],
)
def test_a_wrong_plan_is_refused_and_named(plan, what):
    with pytest.raises(ValueError, match=re.escape(what)) as err:
        encode(make(2, 3), pictures(1, 2, 3), plan=plan)
    assert str(plan) in str(err.value)


@pytest.mark.parametrize('plan', [{'1': 0.5, 0: 0.5}, {1: '0.5'}, {1: None}])
def test_a_plan_of_wrong_types_is_refused(plan):
    with pytest.raises(ValueError, match='plan='):
        encode(make(2, 3), pictures(1, 2, 3), plan=plan)


@pytest.mark.parametrize(
    'keep',
    [
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([[0, 6], [1, 2]]),
        torch.tensor([[-1, 0], [1, 2]]),
        torch.tensor([[1, 1], [1, 2]]),
        torch.tensor([[0, 1]]),
        torch.tensor([0, 1]),
        torch.tensor([[0.0, 1.0], [1.0, 2.0]]),
    ],
    ids=['nothing', 'too high', 'negative', 'twice', 'too few images', 'one axis', 'not whole'],
)
def test_wrong_kept_patches_are_refused(keep):
    with pytest.raises(ValueError, match='keep'):
        encode(make(2, 3), pictures(2, 2, 3), keep=keep)


def test_a_rule_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match='select'):
        encode(
            make(2, 3),
            pictures(2, 2, 3),
            plan={1: 0.5},
            select=lambda scores, ratio: torch.zeros(2, 0, dtype=torch.int64),
        )


def test_no_legal_plan_leaves_nothing():
    "The patch that is left over cannot be dropped: int(n * ratio) < n for every ratio below 1"
    highest = math.nextafter(1.0, 0.0)
    out = encode(make(2, 3), pictures(2, 2, 3), plan={layer: highest for layer in range(LAYERS)})
    assert out.kept.shape == (2, 1)
    for n in range(1, 2000):
        assert int(n * highest) < n


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match='patches'):
        encode(make(2, 3), pictures(1, 2, 4))
