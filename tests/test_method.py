"Refusals and edge cases of the method: LoRAs, backbone, market, inversion, distillation."

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_recycle.core import generator
from lora_recycle.method.backbone import (
    RULES,
    StemConv,
    embed_patches,
    encode,
    encode_tokens,
    normalise,
    patch_rule,
)
from lora_recycle.method.chain import (
    SETTINGS,
    Chain,
    Named,
    Tuned,
    list_tune_inputs,
    shipped_market,
)
from lora_recycle.method.distill import (
    DistillConfig,
    Embedder,
    Pool,
    Task,
    distill,
    draw_tasks,
    head_log_probs,
    mirror_patches,
    pool_logits,
    prototype_logits,
    rate_at,
    reorder_classes,
    task_loss,
    teacher_log_probs,
    worth_caching_teachers,
)
from lora_recycle.method.inversion import (
    SMI_DROP,
    InversionProblem,
    InvertConfig,
    Priors,
    Shift,
    bn_prior,
    count_alive,
    drop_patches,
    drops_at,
    invert,
    shift_patches,
    sparse_patches,
    token_prior,
)
from lora_recycle.method.lora import (
    TARGETS,
    LoRA,
    average_factors,
    average_products,
    new_lora,
    only_layers,
    pack_lora,
    pad_rank,
    product_widths,
    stack_loras,
    truncate_rank,
    unpack_lora,
    widen_targets,
)
from lora_recycle.method.market import MarketConfig, private_data, teacher_accuracy, tune_market
from lora_recycle.suite.images import IN_DOMAIN, load_set
from lora_recycle.suite.miniature import load_miniature, load_prior, load_token_stats

L, D, H = 4, 128, 512  # of the miniature


def tuned_lora(seed=0, rank=4, way=5, targets=('q', 'v'), n=None):
    "LoRAs with a head for the miniature whose B is not zero."
    gen = generator(seed, 'tuned')
    lora = new_lora(L, (D, H), rank, gen, n, targets)
    lead = () if n is None else (n,)
    B = torch.randn(lora.B.shape, generator=gen) * 0.1
    for place, target in enumerate(targets):
        B[..., place, :, product_widths(target, D, H)[1] :] = 0
    return replace(
        lora,
        B=B,
        W=torch.randn(*lead, D, way, generator=gen),
        b=torch.randn(*lead, way, generator=gen),
    )


def noise(n=6, seed=0):
    return torch.randn(n, 3, 36, 36, generator=generator(seed, 'noise'))


@pytest.fixture(scope='module')
def backbone():
    return load_miniature()


@pytest.fixture(scope='module')
def pool():
    images = load_set('greek', per_class=8).images[:240]
    return Pool(images.view(6, 5, 8, *images.shape[1:]))


@pytest.fixture(scope='module')
def masked(pool):
    chance = torch.rand(240, 36, generator=generator(0, 'masks'))
    kept = chance.argsort(1)[:, :18].sort(1).values
    return replace(pool, kept=kept.view(6, 5, 8, 18))


# LoRA


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda: LoRA(torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 4, 9)), 'equally wide'),
        (lambda: LoRA(torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 5, 8)), 'do not fit'),
        (lambda: LoRA(torch.zeros(2, 8, 4), torch.zeros(2, 4, 8)), 'do not fit'),
        (lambda: LoRA(torch.zeros(3, 1, 8, 4), torch.zeros(3, 1, 4, 8)), 'for P=1'),
        (lambda: replace(new_lora(3, 8), W=torch.zeros(8, 5)), 'both W and b'),
        (lambda: new_lora(3, 8, targets=('v', 'q')), 'in this order'),
        (lambda: new_lora(3, 8, targets=()), 'must be some of'),
        (lambda: new_lora(3, 8, targets=('q', 'mlp')), 'must be some of'),
        (lambda: new_lora(3, 8, targets=('fc1',)), 'give (width, hidden)'),
        (lambda: widen_targets(new_lora(3, 8), ('q', 'v', 'fc2')), 'need hidden'),
        (lambda: unpack_lora(dict(targets=torch.tensor([[0], [1]]))), 'the same ones for each'),
        (lambda: unpack_lora(dict(targets=torch.tensor([6]))), 'from 0 to 5'),
        (lambda: new_lora(3, 8, rank=0), 'rank'),
        (lambda: new_lora(3, 8)[0], 'only a market'),
        (lambda: pad_rank(new_lora(3, 8, 4), 2), 'below'),
        (lambda: stack_loras([]), 'empty'),
        (lambda: stack_loras([new_lora(3, 8), new_lora(3, 8, targets=('k',))]), 'widen_targets'),
        (lambda: widen_targets(new_lora(3, 8), ('k', 'v')), "lacks ['q']"),
        (lambda: average_products(new_lora(3, 8)), 'needs a market'),
        (lambda: average_factors(new_lora(3, 8)), 'needs a market'),
        (lambda: truncate_rank(new_lora(3, 8), 9), 'rank'),
        (lambda: only_layers(new_lora(3, 8), [3]), '0 to 2'),
    ],
)
def test_a_lora_refuses(wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert message in str(refused.value)


def test_heads_of_different_shapes_are_left_out():
    loras = [tuned_lora(0, way=5), tuned_lora(1, way=4)]
    assert stack_loras(loras).W is None
    assert stack_loras(loras[:1] * 2).W.shape == (2, D, 5)
    assert stack_loras([loras[0], replace(loras[1], W=None, b=None)]).W is None


@pytest.mark.parametrize('targets', [('q', 'v'), ('k',), ('q', 'k', 'out'), ('fc2',), TARGETS])
def test_targets_are_kept(targets):
    market = stack_loras([tuned_lora(i, targets=targets) for i in range(3)])
    assert market.A.shape[2] == len(targets)
    for lora in (
        market[1],
        market[[0, 2]],
        market.map(torch.clone),
        pad_rank(market, 6),
        average_products(market),
        average_factors(market),
        truncate_rank(market, 2),
        only_layers(market, [1]),
        unpack_lora(pack_lora(market)),
        unpack_lora(pack_lora(market[0])),
    ):
        assert lora.targets == targets
        for place, target in enumerate(targets):
            reads, gives = product_widths(target, D, H)
            assert not lora.A[..., place, reads:, :].any(), 'zero beyond its own width'
            assert not lora.B[..., place, :, gives:].any()


@pytest.mark.parametrize('targets', [('fc1',), ('fc2',), ('q', 'fc1'), TARGETS])
def test_a_truncated_lora_is_the_best_of_its_rank(targets):
    "Found from the factors, the same as from the products."
    gen = generator(0, 'best')
    fresh = new_lora(2, (16, 48), 6, gen, 2, targets)
    market = replace(fresh, B=torch.randn(fresh.B.shape, generator=gen))
    for lora in (market, market[1]):
        U, S, V = torch.linalg.svd(lora.A @ lora.B, full_matrices=False)
        best = U[..., :3] * S[..., None, :3] @ V[..., :3, :]
        cut = truncate_rank(lora, 3)
        torch.testing.assert_close(cut.A @ cut.B, best, atol=1e-4, rtol=0)
        whole = truncate_rank(lora, 9)
        assert whole.rank == 9
        torch.testing.assert_close(whole.A @ whole.B, lora.A @ lora.B, atol=1e-4, rtol=0)


@pytest.mark.parametrize('targets', [('q', 'v'), ('k',), ('v', 'out'), ('fc1',), ('out', 'fc2'), TARGETS])
@pytest.mark.parametrize('seed', range(2))
def test_zeros_for_more_targets_change_nothing(backbone, targets, seed):
    market = tuned_lora(seed, targets=targets, n=2)
    x = noise(6, seed)
    given = encode(backbone, x, market).features
    assert (given - encode(backbone, x).features).abs().max() > 0.01
    wide = encode(backbone, x, widen_targets(market, TARGETS, H)).features
    torch.testing.assert_close(wide, given, atol=1e-4, rtol=0)


def merged_weights(backbone, lora):
    "The weights of a backbone with what a LoRA adds to them."
    weights = dict(backbone.weights)
    names = dict(out='attn.out_proj', fc1='mlp.c_fc', fc2='mlp.c_proj')
    for layer in range(L):
        for place, target in enumerate(lora.targets):
            reads, gives = product_widths(target, D, H)
            change = (lora.A @ lora.B)[layer, place, :reads, :gives].mT
            at = f'transformer.resblocks.{layer}.{names.get(target, "attn.in_proj_")}'
            at += '.weight' if target in names else 'weight'
            rows = 'qkv'.index(target) * D if target not in names else 0
            W = weights[at].clone()
            W[rows : rows + gives] += change
            weights[at] = W
    return weights


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
@pytest.mark.parametrize('targets', [*((t,) for t in TARGETS), ('k', 'fc1'), TARGETS], ids=str)
def test_a_lora_equals_changed_weights(backbone, targets, act):
    lora = tuned_lora(3, targets=targets)
    backbone = replace(backbone, act=act)
    weights = merged_weights(backbone, lora)
    for forward in (encode, encode_tokens):
        merged = forward(replace(backbone, weights=weights), noise()).features
        torch.testing.assert_close(
            forward(backbone, noise(), lora).features, merged, atol=1e-3, rtol=0
        )


# Backbone


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda b: encode(b, noise(5), tuned_lora(n=2)), 'equal groups'),
        (lambda b: encode(b, noise(), plan={L: 0.5}), f'0 to {L - 1}'),
        (lambda b: encode(b, noise(), plan={1: 1.0}), '[0, 1)'),
        (lambda b: encode(b, noise(), keep=torch.zeros(6, 0, dtype=torch.int64)), '1 or more'),
        (lambda b: encode(b, noise(), keep=torch.tensor([[0, 36]] * 6)), '0 to 35'),
        (lambda b: embed_patches(b, torch.zeros(1, 3, 35, 36)), 'do not divide'),
        (lambda b: embed_patches(b, torch.zeros(1, 3, 42, 42)), 'give 49 patches'),
        (lambda b: patch_rule('attentive', generator(0)), "'attention'"),
        (lambda b: replace(b, act='relu'), 'act'),
        (lambda b: replace(b, stem=(StemConv(),)), 'stem has 1 convolutions'),
        (lambda b: StemConv(act='gelu'), 'act'),
    ],
)
def test_a_backbone_refuses(backbone, wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong(backbone)
    assert message in str(refused.value)


def with_stem(backbone, kernels, stem, **other):
    weights = {f'stem.{i}.weight': k for i, k in enumerate(kernels)}
    weights |= {f'stem.{i}.bias': torch.zeros(len(k)) for i, k in enumerate(kernels)}
    return replace(backbone, weights=backbone.weights | weights, stem=stem, **other)


def test_a_stem_is_its_convolutions(backbone):
    gen = generator(0, 'stem')
    kernels = [
        torch.randn(size, generator=gen) * 0.2
        for size in ((6, 3, 1, 1), (6, 1, 3, 3), (3, 6, 1, 1), (3, 3, 3, 3))
    ]
    stem = (
        StemConv(act='relu6'),
        StemConv(padding=1, groups=6, act='relu6'),
        StemConv(act='none', skip=3),  # a residual block, as in MobileNetV2
        StemConv(stride=2, padding=1, act='none'),
    )
    small = dict(stem_side=72)  # 36 -> 72 -> 36 pixels at the patches
    ours = embed_patches(with_stem(backbone, kernels, stem, **small), noise())
    x = nn.functional.interpolate(noise(), size=(72, 72), mode='bicubic', align_corners=False)
    h = nn.functional.relu6(nn.functional.conv2d(x, kernels[0]))
    h = nn.functional.relu6(nn.functional.conv2d(h, kernels[1], padding=1, groups=6))
    x = nn.functional.conv2d(h, kernels[2]) + x
    x = nn.functional.conv2d(x, kernels[3], stride=2, padding=1)
    torch.testing.assert_close(ours, embed_patches(backbone, x), atol=1e-5, rtol=0)


def test_a_stem_is_part_of_the_digest(backbone):
    kernel = [torch.zeros(3, 3, 1, 1)]
    digests = {
        backbone.digest,
        with_stem(backbone, kernel, (StemConv(),)).digest,
        with_stem(backbone, kernel, (StemConv(act='none'),)).digest,
        replace(backbone, stem_side=72).digest,
    }
    assert len(digests) == 4
    with pytest.raises(ValueError, match='reaches back'):
        with_stem(backbone, kernel, (StemConv(skip=2),))


# Market


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda: MarketConfig(way=1), 'way=1'),
        (lambda: MarketConfig(rank=()), 'names no rank'),
        (lambda: MarketConfig(rank=(4, 0)), 'rank'),
        (lambda: MarketConfig(train_share=1.0), 'train_share'),
    ],
)
def test_a_market_refuses(wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert message in str(refused.value)


def test_columns_beyond_a_rank_stay_zero(backbone):
    data = load_set('greek', per_class=5)
    market = tune_market(backbone, data, MarketConfig(n_loras=4, steps=2, rank=(2, 4), batch=8))
    assert not market.lora.A[::2, ..., 2:].any()
    assert not market.lora.B[::2, ..., 2:, :].any()
    assert market.lora.B[1::2, ..., 2:, :].any()


# Inversion


LITTLE = InvertConfig(steps=4, per_class=2, alpha_bn=0.0, lr=0.1)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda: InvertConfig(alpha_bn=-1), '0 or more'),
        (lambda: InvertConfig(plan_after=1.0), 'plan_after'),
        (lambda: InvertConfig(bn_every=0), 'bn_every'),
        (lambda: InvertConfig(rule='attentive'), "'attention'"),
        (lambda: InvertConfig(drop=((0.5, 1.0),)), 'drop='),
        (lambda: InvertConfig(drop=((1.0, 0.5),)), 'drop='),
        (lambda: bn_prior(nn.Conv2d(3, 3, 1), noise()), 'no BatchNorm2d'),
        (lambda: token_prior([torch.zeros(2, 10, 8)], torch.zeros(1, 2, 37, 8)), 'no layer'),
    ],
)
def test_inversion_refuses(wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert message in str(refused.value)


NEEDS = [('alpha_bn', 'network='), ('alpha_tokens', 'token_stats=')]


@pytest.mark.parametrize('term, remedy', NEEDS)
def test_a_prior_with_a_weight_must_be_there(backbone, term, remedy):
    config = replace(LITTLE, **{term: 0.1})
    with pytest.raises(ValueError, match=f'pass priors=Priors\\({remedy}.*set {term}=0'):
        invert(backbone, tuned_lora(n=1), config, generator(0))


@pytest.mark.parametrize(
    'changes',
    [{}, dict(plan=((3, 0.75),)), dict(drop=((0.25, 0.5), (0.5, 0.5))), dict(rule='random')],
    ids=str,
)
def test_same_seed_same_images(backbone, changes):
    config = replace(LITTLE, alpha_tokens=1.0, alpha_tv=1.0, affine=0.5, **changes)
    priors = Priors(token_stats=load_token_stats())
    a, b = (invert(backbone, tuned_lora(n=2), config, generator(0), priors) for _ in range(2))
    assert torch.equal(a.images, b.images) and torch.equal(a.kept, b.kept)


def test_groups_are_judged_alone(backbone):
    net, stats, x = load_prior(), load_token_stats(), noise(8)
    alone = torch.cat([bn_prior(net, x[:4]), bn_prior(net, x[4:])])
    torch.testing.assert_close(bn_prior(net, x, groups=2), alone, rtol=1e-4, atol=0)
    weight = torch.tensor([1.0, 3.0])
    pull = lambda loss, at: torch.autograd.grad(loss, at)[0]
    y = x.clone().requires_grad_()
    found = pull((weight * bn_prior(net, y, groups=2)).sum(), y)
    parts = [part.clone().requires_grad_() for part in x.chunk(2)]
    alone = torch.cat([pull(w * bn_prior(net, p).sum(), p) for w, p in zip(weight, parts)])
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-6)
    tokens = encode_tokens(backbone, x).tokens
    alone = torch.cat([token_prior([t[i : i + 4] for t in tokens], stats) for i in (0, 4)])
    torch.testing.assert_close(token_prior(tokens, stats, 2), alone, rtol=1e-4, atol=0)


def test_the_token_prior_of_all_patches_by_number_is_the_plain_one(backbone):
    stats, x = load_token_stats(), noise(8)
    everyone = torch.arange(36).expand(8, -1)
    tokens = encode_tokens(backbone, x).tokens
    plain = token_prior(tokens, stats, 2)
    torch.testing.assert_close(token_prior(tokens, stats, 2, everyone), plain, rtol=1e-3, atol=0)


def test_the_token_prior_compares_a_patch_with_itself():
    "Two images with different patches: each position's statistics are those of who has it."
    stats = torch.zeros(1, 2, 4, 1)
    stats[0, 0, :, 0] = torch.tensor([0.0, 1, 2, 3])  # means of [CLS] and three patches
    patches = torch.tensor([[0, 1], [1, 2]])
    tokens = torch.tensor([[0.0, 1, 2], [0, 2, 3]])[..., None]  # each patch as the public mean
    assert token_prior([tokens], stats, 1, patches).item() == pytest.approx(0, abs=1e-5)
    assert token_prior([tokens.flip(1)], stats, 1, patches).item() > 1


@pytest.mark.parametrize('steps', [10, 80, 4000])
def test_drops_are_given_in_shares_of_the_run(steps):
    config = InvertConfig(steps=steps, drop=SMI_DROP)
    assert sum(len(drops_at(step, config)) for step in range(steps)) == 4
    alive = count_alive(196, config)
    assert len(alive) == steps and alive[-1] == 48
    assert all(a >= b for a, b in zip(alive, alive[1:]))


def test_dropped_patches_have_no_gradient_without_shift(backbone):
    config = replace(LITTLE, jitter=0.0, flip=False)
    labels = torch.arange(5).repeat(2)
    problem = InversionProblem(backbone, tuned_lora(n=2), labels, config)
    x = noise(10)
    alive = drop_patches(problem, x, drop_patches(problem, x, None, 0.5), 0.5)
    assert alive.shape == (10, 9)
    x.requires_grad_()
    loss, _, kept = problem.losses(x, {1: 0.5}, alive)
    assert kept.shape == (10, 5)  # a plan works on those that are alive
    (grad,) = torch.autograd.grad(loss.sum(), x)
    moved = grad.abs().sum(1).unfold(1, 6, 6).unfold(2, 6, 6).sum((-1, -2)).flatten(1) > 0
    expected = torch.zeros(10, 36, dtype=torch.bool).scatter(1, alive, True)
    assert torch.equal(moved, expected)


@pytest.mark.parametrize('plan', [(), ((2, 0.5),)])
def test_as_many_are_kept_as_survived(backbone, plan):
    config = replace(LITTLE, drop=((0.25, 0.3), (0.5, 0.3)), plan=plan)
    left = count_alive(36, config)[-1]
    out = invert(backbone, tuned_lora(n=2), config, generator(0))
    assert left == 19
    assert out.kept.shape == (2, 5, 2, left - int(left * 0.5) if plan else left)
    dense = invert(backbone, tuned_lora(n=2), replace(config, drop=((0.5, 0.0),)), generator(0))
    assert dense.kept.shape[-1] == (18 if plan else 36)


@pytest.mark.parametrize('down, right', [(0, 0), (6, 0), (0, -12), (-6, 18)])
@pytest.mark.parametrize('mirrored', [False, True])
def test_patches_move_as_pixels_do(backbone, down, right, mirrored):
    patches = torch.tensor([[0, 7, 20], [5, 14, 35]])
    image = torch.zeros(2, 36).scatter(1, patches, 1.0).view(2, 1, 6, 6)
    pixels = image.repeat_interleave(6, 2).repeat_interleave(6, 3).roll((down, right), (2, 3))
    if mirrored:
        pixels = pixels.flip(3)
    moved = shift_patches(patches, Shift(down, right, mirrored), backbone)
    assert torch.equal(pixels[:, 0, ::6, ::6].flatten(1).nonzero()[:, 1].view(2, 3), moved)


def test_a_prior_at_every_second_step_is_asked_half_as_often(backbone):
    net, calls = load_prior(), []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    for every, asked in ((1, 6), (2, 3), (4, 2)):
        calls.clear()
        config = replace(LITTLE, steps=6, alpha_bn=0.01, bn_every=every)
        invert(backbone, tuned_lora(n=1), config, generator(0), Priors(net))
        assert len(calls) == asked


def test_a_rule_keeps_what_its_inverse_drops(backbone, pool):
    market = tuned_lora(n=6)
    best, worst, chance = (
        sparse_patches(backbone, market, pool.images, 0.5, generator(0), rule) for rule in RULES
    )
    everyone = torch.arange(36).expand(6, 5, 8, -1)
    assert torch.equal(torch.cat([best, worst], -1).sort(-1).values, everyone)
    assert not torch.equal(best, chance)


# Distillation


SHORT = DistillConfig(steps=3, tasks=2, n_query=3, flip=0.0)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda: DistillConfig(distance='cosine'), 'plain'),
        (lambda: DistillConfig(start='average products'), "'average'"),
        (lambda: DistillConfig(mix=1.5), 'mix'),
        (lambda: DistillConfig(warmup=100), 'warmup'),
        (lambda: DistillConfig(distance='head'), 'mixed tasks have no head'),
        (lambda: draw_tasks((4, 5, 10), DistillConfig(), True, generator(0)), '10 images a class'),
        (lambda: draw_tasks((4, 3, 20), DistillConfig(), False, generator(0)), 'the 3 classes'),
        (lambda: Pool(torch.zeros(2, 5, 4, 3, 6, 6), torch.zeros(2, 5, 3, 9)), 'does not fit'),
    ],
)
def test_distillation_refuses(wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert message in str(refused.value)


def test_the_rate_warms_up_and_falls_in_every_cycle():
    config = DistillConfig()
    assert rate_at(24, config) == rate_at(124, config) == pytest.approx(1e-3)
    assert rate_at(0, config) < 1e-4 and rate_at(99, config) < 2e-5


def test_squared_distances():
    support = torch.tensor([0.0, 2.0, 10.0, 12.0]).view(1, 2, 2, 1)
    query = torch.tensor([[1.0], [4.0]]).view(1, 2, 1, 1)
    assert prototype_logits(support, query, 'squared')[0, 1, 0].tolist() == [-9, -49]


def test_mixed_tasks_have_different_classes():
    m, c, rows = draw_tasks((4, 5, 20), replace(SHORT, tasks=9), True, generator(0))
    assert all(len(set(row)) == 5 for row in (m * 5 + c).tolist())
    assert torch.equal(rows // 20, (m * 5 + c)[..., None].expand(rows.shape))


@pytest.mark.parametrize('start', ['zero', 'average'])
def test_same_seed_same_meta_lora(backbone, pool, start):
    market = tuned_lora(n=6)
    config = replace(SHORT, layers=(2, 3), start=start, affine=1.0, colour=1.0)
    (a, curve), (b, again) = (
        distill(backbone, market, pool, config, generator(0, 'again')) for _ in range(2)
    )
    assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and torch.equal(curve, again)
    assert a.B[:2].abs().max() == 0 and a.B[2:].abs().max() > 0


def test_a_meta_lora_changes_what_its_teachers_change(backbone, pool):
    for start in ('zero', 'average'):
        market = tuned_lora(n=6, targets=TARGETS)
        meta, _ = distill(backbone, market, pool, replace(SHORT, start=start), generator(0))
        assert meta.targets == TARGETS and meta.B.abs().amax((0, 2, 3)).min() > 0
        assert not meta.A[:, :5, D:].any() and not meta.B[:, [0, 1, 2, 3, 5], :, D:].any()


def test_answers_looked_up_are_the_answers_given(backbone, masked):
    "A long run on mirrored, masked images, where it pays, against one that always asks"
    market = tuned_lora(n=6)
    long = replace(SHORT, steps=70, way=3, mix=0.1, flip=0.5)
    assert worth_caching_teachers(240, long)
    assert not worth_caching_teachers(240, replace(long, steps=7))
    assert not worth_caching_teachers(240, replace(long, affine=1.0))
    ask = lambda *args: task_loss(*args)
    (_, cached), (_, asked) = (
        distill(backbone, market, masked, long, generator(0, 'long'), loss)
        for loss in (task_loss, ask)
    )
    torch.testing.assert_close(cached[:, 2], asked[:, 2], atol=1e-3, rtol=0)


def test_teachers_are_asked_about_both_views(backbone, masked):
    teachers = Embedder(backbone, tuned_lora(n=6))
    known = pool_logits(teachers, masked).view(2, 6, 5, 8, 5)[:, 3, :, :1]
    x, kept = normalise(masked.images[3, :, :1], backbone), masked.kept[3, :, :1]
    m, c = torch.full((1, 5), 3), torch.arange(5)[None]
    for view, image, patches in zip(
        known, (x, x.flip(-1)), (kept, mirror_patches(kept, backbone.n_patches))
    ):
        task = Task(image[None], False, m, c, patches[None])
        asked = teacher_log_probs(teachers, task, shot=0)
        torch.testing.assert_close(reorder_classes(view[None], c), asked, atol=1e-4, rtol=0)


def test_the_teachers_features_under_its_head_are_its_answers(backbone, pool):
    market = tuned_lora(n=6)
    m, c, rows = draw_tasks((6, 5, 8), SHORT, False, generator(0))
    task = Task(normalise(pool.images.flatten(0, 2)[rows], backbone), False, m, c)
    asked = teacher_log_probs(Embedder(backbone, market), task, shot=1)
    features = Embedder(backbone, market[m[:, 0]]).features(task.images[:, :, 1:])
    torch.testing.assert_close(head_log_probs(features, market, task), asked, atol=1e-4, rtol=0)


def darken(data, share):
    "The set with a share of its pixels one grey level off, as another processor draws it."
    hit = torch.rand(data.images.shape, generator=generator(0, 'pixels')) < share
    return replace(data, images=(data.images.int() - hit.int()).clamp(min=0).to(torch.uint8))


@pytest.mark.parametrize('name', IN_DOMAIN)
def test_the_shipped_market_is_known_where_images_round_otherwise(name):
    "And is not taken for other images, other labels, another config or another seed."
    chain = Chain(load_miniature(), Tuned((name,)))
    (inputs,) = list_tune_inputs(chain)
    market = shipped_market(inputs, chain.data)
    assert market is not None, 'a first run of the main job would tune it again'
    near = shipped_market(replace(inputs, data='other bits'), darken(chain.data, 0.001))
    assert all(torch.equal(near[k], market[k]) for k in market)
    assert shipped_market(inputs, darken(chain.data, 0.1)) is None
    turned = replace(chain.data, labels=chain.data.labels.flip(0))
    assert shipped_market(inputs, turned) is None
    assert shipped_market(replace(inputs, seed=1), chain.data) is None
    longer = replace(inputs, config=replace(inputs.config, steps=61))
    assert shipped_market(longer, chain.data) is None


def test_shipped_loras_know_their_classes_on_this_machine():
    "The accuracies that the manifest tells, on images as this processor draws them."
    chain = Chain(load_miniature(), Tuned(('armenian',)))
    market = chain.market()
    _, _, held = private_data(chain.data, chain.settings.market, 0)
    found = teacher_accuracy(chain.backbone, market.lora, chain.data.images[held])
    assert (found - market.accuracy).abs().max() < 0.03


@pytest.mark.parametrize('source', [Tuned, Named])
def test_sources_that_do_not_divide_a_market_share_it(source):
    "Six LoRAs of four sets: two of each."
    settings = SETTINGS['smoke']
    settings = replace(settings, market=replace(settings.market, n_loras=6, steps=1))
    market = Chain(load_miniature(), source(IN_DOMAIN), settings).market()
    assert market.lora.size == 8
