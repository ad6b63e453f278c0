"Counts by hand and by torch, memory of a block of known size, and rows that fit the tables."

import ast
import math
import subprocess
import sys
from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_recycle.bench import cost
from lora_recycle.method.backbone import encode_tokens
from lora_recycle.core import generator
from lora_recycle.bench.cost import (
    ViTShape,
    VIT_B16,
    VIT_B32,
    flops_g,
    flops_true_g,
    n_kept_patches,
    tokens_per_layer,
)
from lora_recycle.method.lora import new_lora
from lora_recycle.bench.results import COLUMNS, paper_table

TINY = ViTShape('tiny', 24, 6, 16, 3, 2, 10)
# the paper prints 40.00 beside it, which is the cost of {6, 8, 11: 0.3}
LABELLED = '{3: 0.3, 6: 0.3, 8: 0.3, 11: 0.3}'

plans = st.dictionaries(
    st.integers(0, 2), st.sampled_from((0.0, 0.1, 0.3, 0.5, 0.75, 0.99)), max_size=3
)


def test_every_printed_entry_of_the_paper_but_one():
    printed = {
        v: f for v, f in paper_table(4).query("metric == 'flops_g'")[['variant', 'value']].values
    }
    assert len(printed) == 5
    for variant, value in printed.items():
        if variant != LABELLED:
            assert f'{flops_g(VIT_B16, ast.literal_eval(variant)):.2f}' == f'{value:.2f}'
    assert (
        printed[LABELLED] == 40 and f'{flops_g(VIT_B16, ast.literal_eval(LABELLED)):.2f}' == '32.43'
    )
    assert f'{flops_g(VIT_B16, {6: 0.3, 8: 0.3, 11: 0.3}):.2f}' == '40.00'
    sparse = paper_table(5).query("metric == 'flops_g'").value
    assert [f'{v:.2f}' for v in sparse] == [
        f'{flops_g(VIT_B16, n_in=n_kept_patches(196, s)):.2f}' for s in (0, 0.25, 0.5, 0.75)
    ]


def test_a_count_by_hand():
    "Two patches of 1 pixel, width 2, one layer, one head: every product written out"
    shape = ViTShape('hand', 2, 1, 2, 1, 1, 3, 2.0)  # 4 patches, hidden width 4
    embed, norms = (
        4 * 3 * 2,
        4 * 2 * 5 + 4 * 2 * 5 + 4 * 2 * 5 + 4 * 2,
    )  # ln_pre, ln_1, ln_2 on 5 tokens, ln_post on [CLS]
    qkv_out, mlp, project = 5 * 4 * 2 * 2, 5 * 2 * 2 * 4, 2 * 3
    assert flops_g(shape) * 1e9 == pytest.approx(3 * (embed + norms + qkv_out + mlp + project))
    assert flops_true_g(shape) * 1e9 == pytest.approx(
        2 * (embed + qkv_out + 2 * 5 * 5 * 2 + mlp + project)
    )
    halved_norms, halved_mlp, row = (
        norms - 4 * 2 * 2,
        3 * 2 * 2 * 4,
        5 * 2,
    )  # two patches leave before ln_2
    assert flops_g(shape, {0: 0.5}) * 1e9 == pytest.approx(
        3 * (embed + halved_norms + qkv_out + halved_mlp + project)
    )
    assert flops_true_g(shape, {0: 0.5}) * 1e9 == pytest.approx(
        2 * (embed + qkv_out + 2 * 5 * 5 * 2 + row + halved_mlp + project)
    )


@settings(deadline=None, max_examples=25)
@given(
    plan=plans,
    n_in=st.integers(1, 16),
    n=st.integers(1, 3),
    rank=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_true_count_is_torchs(plan, n_in, n, rank, seed):
    backbone, gen = cost.random_backbone(TINY, generator(seed)), generator(seed, 'x')
    keep = torch.stack([torch.randperm(16, generator=gen)[:n_in].sort().values for _ in range(n)])
    lora = new_lora(3, 16, rank, gen) if rank else None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x = torch.randn(n, 3, 24, 24, generator=gen)
        out = encode_tokens(backbone, x, lora, plan=plan, keep=keep)
    assert counter.get_total_flops() == round(n * flops_true_g(TINY, plan, n_in, rank) * 1e9)
    assert [t.shape[1] for t in out.tokens] == [
        mlp for _, mlp in tokens_per_layer(TINY, plan, n_in)
    ]


@settings(deadline=None, max_examples=50)
@given(
    plan=st.dictionaries(st.integers(0, 11), st.floats(0, 1, exclude_max=True), max_size=5),
    n_in=st.integers(1, 49),
)
def test_dropping_never_costs_more(plan, n_in):
    tokens = [n for layer in tokens_per_layer(VIT_B32, plan, n_in) for n in layer]
    assert tokens[0] == n_in + 1 and tokens[-1] >= 2 and tokens == sorted(tokens, reverse=True)
    assert flops_g(VIT_B32, plan, n_in) <= flops_g(VIT_B32, {}, n_in) <= flops_g(VIT_B32)
    later = {layer + 1: ratio for layer, ratio in plan.items() if layer < 11}
    earlier = {layer - 1: ratio for layer, ratio in later.items()}
    assert flops_g(VIT_B32, earlier, n_in) <= flops_g(VIT_B32, later, n_in)


@pytest.mark.parametrize(
    'call,what',
    [
        (lambda: flops_g(VIT_B16, {12: 0.5}), '0 to 11'),
        (lambda: flops_true_g(VIT_B16, {3: 1.0}), r'\[0, 1\)'),
        (lambda: flops_g(VIT_B16, n_in=197), 'n_in=197'),
        (lambda: tokens_per_layer(VIT_B16, n_in=0), 'n_in=0'),
        (lambda: ViTShape('odd', 224, 15, 768, 12, 12, 512), 'no multiple of patch=15'),
        (lambda: ViTShape('odd', 224, 16, 768, 12, 7, 512), 'no multiple of heads=7'),
        (lambda: ViTShape('none', 224, 16, 768, 0, 12, 512), 'layers=0'),
        (
            lambda: cost.shape_of(
                replace(
                    b := cost.random_backbone(TINY, generator(0)),
                    weights=b.weights | {'positional_embedding': torch.zeros(7, 16)},
                )
            ),
            'no square',
        ),
        (lambda: cost.measure_costs(cost.make_pruning_study(), 5, TINY), '0 to 2'),
        (lambda: cost.measure_costs(cost.make_sparsity_study(), 12, TINY), 'batch=12 makes no'),
        (lambda: cost.measure_costs(cost.make_pruning_study(()), 0, TINY), 'batch=0'),
        (lambda: cost.interleaved({'a': print}, warmup=-1), 'warmup=-1'),
        (lambda: cost.peak_memory('a:b:c'), 'module:function'),
        (lambda: cost.peak_memory('a:b', x=torch.ones(1)), 'handed over'),
    ],
)
def test_wrong_arguments_are_named(call, what):
    with pytest.raises(ValueError, match=what):
        call()


def block(mebibytes, kept=0, device='cpu'):
    "Holds `kept` MiB from now on; a step fills `mebibytes` more and frees them"
    held = torch.ones(kept, 2**18)

    def step():
        return float(torch.ones(mebibytes, 2**18).sum() + held.sum())

    return step


def broken():
    raise KeyError('this cannot be built')


def killed():
    "Ends its own process as a system without memory would"
    import os, signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_of_a_block_is_its_size():
    "However much this process holds itself, now or before, and whatever was measured before it"
    ballast = torch.ones(300, 2**18)
    calls = [dict(mebibytes=120, kept=80), dict(mebibytes=40)]
    large, small = cost.peak_memories(f'{__name__}:block', calls)
    assert 198 < large < 225 and 38 < small < 65
    assert ballast.sum() > 0


def test_a_failure_in_the_fresh_process_is_told():
    with pytest.raises(RuntimeError, match='this cannot be built'):
        cost.peak_memory(f'{__name__}:broken')
    with pytest.raises(RuntimeError, match='want of memory'):
        cost.peak_memories(f'{__name__}:killed', [{}, {}])


@pytest.mark.parametrize('kind', ['pruning', 'sparsity'])
def test_rows_fit_the_tables(kind):
    "One plan only, so that few processes are started; each line of the paper has its id."
    one = cost.make_pruning_study((((1, 0.5),),))
    study = one if kind == 'pruning' else cost.make_sparsity_study()
    memory = kind == 'pruning'
    timing = cost.Timing(repeats=1, warmup=0, memory=memory)
    rows = cost.measure_costs(study, 10, TINY, timing)
    assert set(rows.columns) < set(COLUMNS)
    assert not rows.duplicated(['method', 'metric']).any()
    measured = ['flops_g', 'flops_true_g', 'throughput_its_per_s', 'peak_mem_mb'][: 3 + memory]
    first = rows['metric'][: 2 * len(measured)].tolist()
    assert first == [f'{m}_ratio' for m in measured] + measured
    assert len(rows) == 2 * len(measured) * len(study.lines)
    assert rows['value'].map(math.isfinite).all() and (rows['value'] > 0).all()
    dense = rows[rows['method'].isin(['recycle', 'recycle-no-bn'])]
    assert (dense[dense['metric'].str.endswith('_ratio')]['value'] == 1).all()


def test_the_plans_are_the_papers_and_one_more():
    printed = [v for v in dict.fromkeys(paper_table(4)['variant'])]
    ours = [str(dict(plan)) for plan in cost.PAPER_PLANS]
    assert ours == [*printed[1:], '{6: 0.3, 8: 0.3, 11: 0.3}']


@pytest.mark.parametrize(
    'make',
    [lambda b: cost.inversion_step(b, None, 5, {1: 0.5}), lambda b: cost.meta_step(b, 10, 0.5)],
    ids=['inversion', 'meta'],
)
def test_a_step_changes_neither_the_backbone_nor_the_random_state(make):
    backbone = cost.random_backbone(TINY, generator(0))
    before, state = backbone.digest, torch.get_rng_state()
    step = make(backbone)
    losses = [float(step()) for _ in range(3)]
    assert backbone.digest == before and torch.equal(torch.get_rng_state(), state)
    assert not any(w.requires_grad or w.grad is not None for w in backbone.weights.values())
    again = make(backbone)
    assert [float(again()) for _ in range(3)] == losses and len(set(losses)) == 3


def test_a_script_without_a_main_guard_can_measure(tmp_path):
    "multiprocessing would start such a script over and over"
    script = tmp_path / 'script.py'
    script.write_text(
        'from lora_recycle.bench.cost import *\n'
        f'how = dict(shape={astuple(TINY)!r}, batch=5, line=dict(plan={{1: .5}}))\n'
        'print(peak_memory(FRESH, **how) > 0)\n'
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == 'True\n', done.stderr
