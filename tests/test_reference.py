"The plain reference computes what the fast code computes; the benchmark runs and compares."

from dataclasses import replace

import pandas as pd
import pytest
import torch
from tools import ROOT, read_cells, run_cells

from lora_recycle.method.backbone import blank_dropped, encode
from lora_recycle.core import generator
from lora_recycle.bench.cost import ViTShape, inversion_step, meta_step, random_backbone
from lora_recycle.method.distill import DistillConfig, Embedder, Task, task_loss
from lora_recycle.method.inversion import InversionProblem, InvertConfig, Priors
from lora_recycle.method.lora import LoRA, new_lora
from lora_recycle.suite.miniature import load_prior
from lora_recycle.bench.reference import (
    HookedPrior,
    PlainViT,
    drop_tokens,
    market_step,
    plain_fresh_step,
    plain_inversion_step,
    plain_losses,
    plain_meta_step,
    seen_patches,
    solve_step,
    wrap_lora,
)
from lora_recycle.method.distill import prototype_logits
from lora_recycle.bench.results import COLUMNS, read_rows

BENCHMARK = ROOT / 'nbs' / 'benchmark.ipynb'
SHAPE = ViTShape('small', 36, 6, 48, 4, 4, 24)
WITHIN = 1e-4  # relative, float32


def lora_of(backbone, seed=0, rank=4):
    "One LoRA with a head and a B that is not zero"
    gen = generator(seed, 'lora')
    fresh = new_lora(backbone.layers, backbone.width, rank, gen)
    return LoRA(
        fresh.A,
        torch.randn(fresh.B.shape, generator=gen) * 0.1,
        torch.randn(backbone.out_dim, 5, generator=gen) * 0.3,
        torch.randn(5, generator=gen),
    )


def apart(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(params=['gelu', 'quick_gelu'])
def backbone(request):
    return random_backbone(SHAPE, generator(0, 'reference'), request.param)


@pytest.mark.parametrize('with_prior', [False, True], ids=['', 'prior'])
@pytest.mark.parametrize('plan', [None, {1: 0.5}, {0: 0.3, 2: 0.6, 3: 0.5}], ids=str)
def test_inversion_loss_and_image_gradient_agree(backbone, plan, with_prior):
    lora, x = lora_of(backbone), torch.randn(10, 3, 36, 36, generator=generator(1)).requires_grad_()
    labels, config = torch.arange(10) % 5, InvertConfig(alpha_bn=0.01 * with_prior)
    priors = Priors(load_prior() if with_prior else None)
    problem = InversionProblem(backbone, lora.map(lambda t: t[None]), labels, config, priors)
    ours, _, _ = problem.losses(x, plan)
    prior = HookedPrior(load_prior()) if with_prior else None
    plain = plain_losses(wrap_lora(backbone, lora), x, labels, plan, prior)
    assert apart(ours, plain) < WITHIN
    assert apart(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, plain))) < WITHIN


def test_agreement_would_notice_a_wrong_factor(backbone):
    lora, x = lora_of(backbone), torch.randn(10, 3, 36, 36, generator=generator(1))
    with torch.no_grad():
        right, wrong = (
            encode(backbone, x, l).features for l in (lora, replace(lora, A=lora.A * 1.01))
        )
    assert apart(wrong, right) > WITHIN


@pytest.mark.parametrize('kept', [36, 9])
def test_meta_training_loss_and_lora_gradient_agree(backbone, kept):
    gen, lora = (
        generator(2),
        replace(lora_of(backbone), W=None, b=None).map(lambda t: t.requires_grad_()),
    )
    keep = torch.stack([torch.randperm(36, generator=gen)[:kept].sort().values for _ in range(20)])
    x, config = torch.randn(20, 3, 36, 36, generator=gen), DistillConfig(n_query=3)
    task = Task(x.view(1, 5, 4, 3, 36, 36), mixed=True, kept=keep.view(1, 5, 4, kept))
    ours, _ = task_loss(Embedder(backbone, lora), None, task, config)
    model = wrap_lora(backbone, lora.map(torch.Tensor.detach))
    features = model(blank_dropped(x, keep, 6), masked=True).view(1, 5, 4, -1)
    plain = torch.nn.functional.cross_entropy(
        prototype_logits(features[:, :, :1], features[:, :, 1:]).flatten(0, 2),
        torch.arange(5).repeat_interleave(3),
    )
    plain.backward()
    theirs = torch.stack(
        [torch.stack([p.A.grad for p in (b.attn.q_proj, b.attn.v_proj)]) for b in model.blocks]
    )
    assert (
        apart(ours, plain) < WITHIN and apart(torch.autograd.grad(ours, lora.A)[0], theirs) < WITHIN
    )


def test_twin_steps_draw_the_same(backbone):
    "First losses agree: the same images, LoRA, head and view"
    for plan in (None, {1: 0.5}):
        assert float(inversion_step(backbone, None, 10, plan, seed=3)()) == pytest.approx(
            float(plain_inversion_step(backbone, None, 10, plan, seed=3)()), rel=WITHIN
        )
    for share in (0.0, 0.75):
        assert float(meta_step(backbone, 20, share, seed=3)()) == pytest.approx(
            float(plain_meta_step(backbone, 20, share, seed=3)()), rel=WITHIN
        )


def test_what_asks_for_gradients():
    "In ours the images alone; in the plain one the LoRA, its head and the prior too"
    backbone, prior = random_backbone(SHAPE, generator(0)), load_prior()
    inversion_step(backbone, prior, 5)()
    assert not any(p.requires_grad for p in prior.parameters()) and not any(
        w.requires_grad for w in backbone.weights.values()
    )
    hooked = HookedPrior(prior)
    model = wrap_lora(backbone, lora_of(backbone))
    x = torch.randn(5, 3, 36, 36)
    plain_losses(model, x, torch.arange(5), None, hooked).backward()
    assert {n.split('.')[-1] for n, p in model.named_parameters() if p.grad is not None} == {
        'A',
        'B',
        'weight',
        'bias',
    }
    assert prior[0].weight.grad.abs().sum() > 0


def test_tokens_are_chosen_image_by_image():
    gen = generator(4)
    x, weights = torch.randn(3, 10, 4, generator=gen), torch.rand(3, 2, 10, 10, generator=gen)
    kept = drop_tokens(x, weights, 0.5)
    for i in range(3):
        best = weights[i].mean(0)[0, 1:].topk(9 - 4).indices.sort().values
        assert torch.equal(kept[i], torch.cat([x[i, :1], x[i, 1:][best]]))
    images = torch.ones(2, 3, 12, 12)
    images[1, :, :6, 6:] = 0
    assert [s.tolist() for s in seen_patches(images, 6)] == [[0, 1, 2, 3], [0, 2, 3]]


def test_towers_that_are_not_clips_are_refused(backbone):
    other = replace(
        backbone, weights={k: w for k, w in backbone.weights.items() if not k.startswith('ln_pre')}
    )
    with pytest.raises(ValueError, match='no tower of CLIP'):
        PlainViT(other)


@pytest.mark.parametrize(
    'make, what',
    [
        (lambda: plain_inversion_step(random_backbone(SHAPE, generator(0)), None, 0), 'batch=0'),
        (lambda: market_step(images=0), 'images=0'),
        (lambda: market_step(loras=0), 'loras=0'),
        (lambda: plain_fresh_step((*'a',), 5), 'argument|position'),
        (lambda: solve_step(episodes=0)(), 'n_tasks=0'),
    ],
)
def test_wrong_sizes_are_named(make, what):
    with pytest.raises((ValueError, TypeError), match=what):
        make()


def test_the_benchmark_runs_and_tells_what_moved(tmp_path, capsys):
    given = dict(size='smoke', repeats=1, memory=False, out_dir=tmp_path / 'results')
    run_cells('benchmark.ipynb', **given)
    out = tmp_path / 'results' / 'benchmark'
    rows = read_rows(out)
    assert list(rows.columns) == list(COLUMNS) and (rows['scale'] == 'smoke').all()
    assert {p.name for p in out.iterdir()} == {
        'rows.csv',
        'table.md',
        'run.json',
        'growth.png',
        'steps.png',
    }
    shares = rows[rows['metric'] == 'share_of_limit']
    whole = shares['backbone'] == 'miniature'
    assert (
        set(shares[whole]['method']) == {'plain', 'one at a time', 'four at once', 'all at once'}
        and (shares['value'] > 0).all()
    )
    steps = shares[~whole]
    assert (
        set(steps['method']) == {'ours', 'ours, bfloat16', 'plain'} and (steps['value'] > 0).all()
    )
    assert {
        'inversion step, dense',
        'inversion step, {6: 0.75}, with R_BN',
        'meta-training step, 75 % dropped',
        'embedding',
    } <= set(steps['title'])
    assert rows[rows['metric'].str.endswith('_difference')]['value'].max() < WITHIN
    runs = rows[rows['title'].str.startswith('whole inversion')]
    assert {'plain', 'ours, dense', 'ours, dropped', 'ours, {6: 0.75}'} <= set(runs['method'])
    held = rows.pivot_table(index='method', columns='metric', values='value').loc['2 workers']
    assert 0 < held['largest_share_mb'] < held['largest_mb']
    assert 'no rows were here before' in capsys.readouterr().out


def test_ratios_that_moved_are_told(capsys, tmp_path):
    "As if it had been three times as fast before"
    names = run_cells(
        'benchmark.ipynb', "check_folder('out_dir'", size='smoke', out_dir=str(tmp_path)
    )
    line = dict(scale='smoke', device='a CPU', backbone='miniature', dataset='noise', method='ours')
    line |= dict(commit='0123456789', created='before', title='a step')
    rows = pd.DataFrame([dict(line, metric=m, value=0.5) for m in ('share_of_limit', 'seconds')])
    earlier = rows.assign(value=rows['value'] * 3)
    source = next(c['source'] for c in read_cells(BENCHMARK) if 'def moved(' in c['source'])
    exec(source, names | dict(frame=rows, earlier=None))
    assert 'no rows were here before' in capsys.readouterr().out
    exec(source, names | dict(frame=rows, earlier=earlier, display=print))
    told = capsys.readouterr().out
    assert '1 of 1 ratios moved by more than 10 % since 01234567 of before' in told
    assert 'share_of_limit' in told and 'seconds' not in told


@pytest.mark.parametrize(
    'parameters, words',
    [
        (dict(size='big'), ["size='big'", "'full'"]),
        (dict(repeat=3), ["'repeat'", "Did you mean 'repeats'"]),
        (dict(repeats=0), ['repeats=0']),
        (dict(device='gpu'), ["device='gpu'"]),
    ],
)
def test_bad_parameters_end_before_any_work(tmp_path, parameters, words):
    given = dict(out_dir=str(tmp_path / 'results')) | parameters
    with pytest.raises(ValueError) as caught:
        run_cells('benchmark.ipynb', "check_folder('out_dir'", **given)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / 'results').exists()
