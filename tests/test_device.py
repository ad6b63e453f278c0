"""Every public function on a device that is not the CPU, and no step for which the host waits.

There need be no GPU: see `far`. What a kernel of a GPU computes is not asked here.
"""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from far import META, Far

import lora_recycle
from lora_recycle.bench import cost, device, reference, tables
from lora_recycle.bench.methods import METHODS, SCALES, Cell, answer_cell
from lora_recycle.core import Cache, generator
from lora_recycle.jobs import Executor
from lora_recycle.method import backbone as bb
from lora_recycle.method import chain, distill, inversion, lora, market
from lora_recycle.method.chain import Chain, Recipe, Tuned, compute
from lora_recycle.rivals.cmi import CmiConfig, invert_cmi
from lora_recycle.rivals.finetune import HubConfig, TuneConfig, tune_lora
from lora_recycle.rivals.merge import MERGES, merge
from lora_recycle.suite.episodes import EpisodeSize, draw_episodes
from lora_recycle.suite.images import ImageSet
from lora_recycle.suite.miniature import load_prior
from lora_recycle.use import advice, names
from lora_recycle.use.classifier import compare_loras
from lora_recycle.use.recycling import recycle

SHAPE = cost.ViTShape('miniature', 36, 6, 32, 2, 2, 128)


def make_backbone():
    "A tiny one that goes by the name of one with a text tower"
    return replace(cost.random_backbone(SHAPE, generator(0)), name='miniature')


def make_set(name, root, side, per_class):
    "Noise in the place of a set: 18 classes of 8 images"
    images = torch.randint(256, (144, 3, side, side), dtype=torch.uint8, generator=generator(0))
    splits = dict(zip(('train', 'val', 'test'), (range(6), range(6, 12), range(12, 18))))
    splits = {k: tuple(v) for k, v in splits.items()}
    classes = tuple('abcdefghijklmnopqr')
    return ImageSet(name, images, torch.arange(18).repeat_interleave(8), classes, splits)


SMOKE = SCALES['smoke']
TINY = replace(
    SMOKE,
    **dict(n_tasks=2, n_tuned=1, n_val=2, shots=(1,), n_query=2),
    tune=replace(SMOKE.tune, steps=1),
    hub=HubConfig(steps=1, views=1),
    caml=replace(SMOKE.caml, steps=1, way=5, classes=6),
    machine=replace(SMOKE.machine, executor=Executor('here'), chunk=2),
    chain=replace(
        SMOKE.chain,
        market=replace(SMOKE.chain.market, n_loras=2, steps=1, batch=5),
        invert=replace(SMOKE.chain.invert, steps=3, per_class=3, alpha_tokens=0.0),
        distill=replace(SMOKE.chain.distill, steps=2, n_query=1),
    ),
)


@pytest.fixture
def world(monkeypatch, tmp_path):
    "A chain on the far device, and the device"
    monkeypatch.setattr(chain, '_open_set', lambda: make_set)
    with warnings.catch_warnings(), Far() as far:
        warnings.simplefilter('ignore')
        how = dict(settings=TINY.chain, store=Cache(tmp_path), machine=TINY.machine)
        yield Chain(make_backbone().to(META), Tuned(('cyrillic',)), **how), far


# ---- the fake device itself


def test_the_far_device_finds_what_a_gpu_would_refuse_and_where_it_is_waited_for():
    near = torch.arange(6.0).view(2, 3)
    with Far() as far:
        there = near.to(META)
        for wrong in (
            lambda: there + near,
            lambda: torch.cat([there, near]),
            lambda: there.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
            lambda: near[there[0].long() * 0],
            lambda: torch.rand(2, device=META, generator=generator(0)),
        ):
            with pytest.raises(RuntimeError, match='CPU'):
                wrong()
        far.waits.clear()
        found = (there * torch.tensor(2.0) + torch.ones(3, device=META)).square()
        assert found.device == META and not far.waits
        assert torch.equal(found.cpu(), (near * 2 + 1).square())
        assert found.sum().item() == (near * 2 + 1).square().sum()
        there[torch.tensor([0])]
        there[there > 1]
        near.to(META, non_blocking=True)
        assert sorted(far.waits.values()) == [1, 1, 1, 1]


def test_what_is_computed_there_is_what_is_computed_here():
    near = cost.inversion_step(make_backbone(), load_prior(), 5, {1: 0.5})
    with Far():
        there = cost.inversion_step(make_backbone().to(META), load_prior().to(META), 5, {1: 0.5})
        assert [there().item() for _ in range(2)] == pytest.approx([near().item() for _ in '12'])


# ---- the walk: methods first, then what they did not reach

TENSORS = re.compile(r'\b(Tensor|Backbone|LoRA|Market|Pool|Embedder|Task|Canvas|Chain|Module)\b')
KINDS = (
    *('nn', 'average-factors', 'linear-probe', 'full-paper-rate', 'linear-probe-paper-rate'),
    *('lora-linear-paper-rate', 'mole', 'lorahub', 'lorahub-nn', 'caml', 'simpleshot'),
    *('zero-shot', 'tip-adapter', 'recycle', 'recycle-average', 'recycle-mask75-random'),
    *('recycle-smi', 'recycle-plan-1x75', 'recycle-backbone', 'recycle-plain-distillation'),
    *('average-text', 'mole-text', 'recycle-text', 'lorahub-text', 'pmf'),
    *('average-cut', 'merge-ties-cut', 'bdcspn', 'average-laplacian'),
)


# what never sees a device: numbers in files, pictures, features that `embed` has brought back
HOST = re.compile(
    r'bench\.plots\.|suite\.(folders|glyphs|mobilenet)\.|use\.(calibration|exchange|inputs)\.'
    r'|paper\.models\.|suite\.miniature\.(build|load)_|suite\.evaluate\.interval'
    r'|method\.chain\.(cnn_prior|list_tune_inputs)|method\.backbone\.from_open_clip'
    r'|use\.recycling\.(save|load)_meta_lora|use\.classifier\.check_made_for'
    r'|bench\.tables\.price_table'
)
# of the notebook that trains the backbone for photos, which has run on a GPU
PRETRAINING = re.compile(r'suite\.photo_backbone\.')


def list_public():
    "Name -> function of all of the package that take or give tensors, by their annotations"
    found = {}
    for info in pkgutil.walk_packages(lora_recycle.__path__, 'lora_recycle.'):
        module_name = info.name.removeprefix('lora_recycle.')
        if info.ispkg or module_name == 'use.page':
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, '__all__', ()):
            value = getattr(module, name)
            full = f'{module_name}.{name}'
            if HOST.match(full) or PRETRAINING.match(full) or not inspect.isfunction(value):
                continue
            if TENSORS.search(str(inspect.signature(value))):
                found[full] = value
    return found


class Reached:
    "Which functions are called meanwhile"

    def __enter__(self):
        self.codes = set()
        sys.setprofile(lambda frame, event, arg: event == 'call' and self.codes.add(frame.f_code))
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


def answer_all(there):
    "A cell of every kind of method"
    for name in KINDS:
        method = METHODS[name]
        shot = 0 if method.family == 'zero-shot' else 1
        right = answer_cell(Cell(there, 'greek', method, shot, TINY))['right']
        assert right.device.type == 'cpu', name
    varied = replace(TINY, sampler='meta')
    for name in ('nn', 'linear-probe', 'tip-adapter', 'recycle', 'bdcspn'):
        answer_cell(Cell(there, 'greek', METHODS[name], 1, varied))


def show_all(there):
    "What pictures and further rows are made of"
    tables.pair_images(there)
    tables.mask_images(there)
    tables.plan_images(there, {'smi': Recipe(drop=inversion.SMI_DROP)})
    tables.patch_rows(there, (), TINY)
    tables.every_class_rows(there, ('greek',), TINY, ('zero-shot-prompt',))
    compute([there], there.stages([Recipe(pool='noise')], [1]))


def step_all(there):
    "The steps that are timed, ours and the plain ones"
    far = there.backbone
    images = make_set('x', '', 36, 0).images[:10]
    lora_there = there.market().lora[0].map(lambda t: t.to(META))
    gen = generator(0)
    cost.random_backbone(SHAPE, gen)
    cost.shape_of(far)
    small = device.DeviceSize(SHAPE, 10, 2, 8, 1)
    parts = device.compute_parts(far, small)
    near = device.compute_parts(far.to('cpu'), small)
    for part, value in parts.items():
        assert device.measure_gap(part, value, near[part]) < 1e-4, part
    device.list_steps(far, small)
    cost.meta_step(far, 10, 0.5)()
    cost.inversion_step(far, cost.random_prior().to(META), 5)()
    reference.plain_meta_step(far, 10, 0.5)()
    reference.plain_inversion_step(far, None, 5, {1: 0.5})()
    config = replace(TINY.chain.invert, alpha_bn=0.0, two_colours=False, smooth_start=0)
    reference.plain_invert(far, lora_there, config, gen)
    model = reference.plain_tune(far, images, torch.arange(10) % 5, 5, TINY.chain.market, gen)
    episodes = draw_episodes(make_set('x', '', 36, 0), 'test', 2, EpisodeSize(5, 1, 2))
    reference.plain_evaluate(far, model, make_set('x', '', 36, 0).images, episodes)


def call_rest(there):
    "Parts of the method that nothing above calls"
    far = there.backbone
    loras = there.market().lora.map(lambda t: t.to(META))
    x = bb.normalise(make_set('x', '', 36, 0).images[:4], far)
    out = bb.encode_tokens(far, x, loras, {0: 0.5}, select=bb.least_attended)
    bb.blank_dropped(x, out.kept, far.patch)
    whole = bb.encode_tokens(far, x).tokens
    stats = torch.ones(2, 2, whole[0].shape[1], 32, device=META)
    inversion.token_prior(whole, stats)
    inversion.random_view(x, replace(TINY.chain.invert, affine=1.0), generator(0))
    wide = lora.widen_targets(lora.pad_rank(loras, 6), lora.TARGETS, 96)
    lora.stack_loras([wide[0], wide[1]])
    distill.pool_logits(distill.Embedder(far, loras), there.pool())
    few = replace(TINY.chain.invert, steps=1, alpha_bn=0.0, per_class=2)
    invert_cmi(far, loras, CmiConfig(few, batch=1), generator(0))
    recycled = recycle(
        far,
        there.market(),
        **dict(settings=TINY.chain, held_out=2, n_tasks=2, executor=Executor('here')),
    )
    moved = loras.map(lambda t: t + 0.01)  # one step leaves B at zero
    for how in MERGES:
        assert merge(moved, how, gen=generator(0)).A.device == far.device
    judge = make_set('x', '', 36, 0)
    rest = dict(hows=('ties',), recycled=recycled, trial=advice.Trial(n_tasks=2))
    advice.advise(there.market(), far, judge.images, judge.labels, **rest)
    compare_loras(far, {'plain': None, 'mine': loras[0]}, judge.images, judge.labels)
    advice.rate_advice(recycled.report['scores'], {advice.AVERAGE: 1.0})
    bare = replace(loras, W=None, b=None)
    assert 'has a text tower' in names.say_ways(bare, far)
    how = dict(settings=TINY.chain, held_out=2, n_tasks=2, executor=Executor('here'))
    recycle(far, bare, names=[list('abcde'), list('fghij')], **how)


def test_every_public_function_runs_on_a_device_that_is_not_the_cpu(world):
    there, _ = world
    with Reached() as reached:
        for walk in (answer_all, show_all, step_all, call_rest):
            walk(there)
    public = list_public()
    missing = [n for n, f in public.items() if inspect.unwrap(f).__code__ not in reached.codes]
    assert len(public) > 130 and not missing, f'reached by no call above: {missing}'


# ---- what the host waits for


def count_waits(far, step):
    "Waits of three steps after a first one"
    step()
    far.waits.clear()
    for _ in range(3):
        step()
    return dict(far.waits)


def test_no_step_of_inversion_or_meta_training_waits(world):
    there, far = world
    backbone = there.backbone
    for plan in ({}, {1: 0.5}):
        step = cost.inversion_step(backbone, load_prior().to(META), 5, plan)
        assert count_waits(far, step) == {}
    assert count_waits(far, cost.meta_step(backbone, 10, 0.5)) == {}


LONG = dict(affine=1.0, colour=1.0, flip=0.5)


@pytest.mark.parametrize('pool', ['inverted', 'smi'])
def test_no_step_of_a_whole_meta_training_waits(world, pool):
    "Its waits do not grow with its steps"
    there, far = world
    recipe = Recipe() if pool == 'inverted' else Recipe(drop=inversion.SMI_DROP)
    images = there.pool(recipe)
    teachers = there.market().lora
    found = []
    for steps in (2, 5):
        config = replace(TINY.chain.distill, steps=steps, shot=1, cycle=5, **LONG)
        far.waits.clear()
        distill.distill(there.backbone, teachers, images, config, generator(0))
        found.append(far.waits.total())
    assert found[0] == found[1], far.waits


@pytest.mark.parametrize('change', ['affine', 'rule'])
def test_no_step_of_a_whole_inversion_waits(world, change):
    there, far = world
    more = dict(affine=dict(affine=1.0))
    more['rule'] = dict(plan=((1, 0.5),), plan_after=0.0, rule='random')
    found = []
    for steps in (2, 5):
        config = replace(TINY.chain.invert, steps=steps, **more[change])
        given = (there.market().lora, config, generator(0), chain.load_priors(there))
        far.waits.clear()
        inversion.invert(there.backbone, *given)
        found.append(far.waits.total())
    assert found[0] == found[1], far.waits


def test_no_step_of_tuning_waits(world):
    "Neither of a market nor of episodes"
    there, far = world
    data = there.data
    found = []
    for steps in (2, 5):
        config = replace(TINY.chain.market, steps=steps)
        far.waits.clear()
        market.tune_market(there.backbone, data, config)
        found.append(far.waits.total())
    assert found[0] == found[1], far.waits
    episodes = draw_episodes(data.split('test'), 'test', 2, EpisodeSize(5, 1, 2))
    start = lora.new_lora(2, 32, 4, generator(0))
    found = []
    for steps in (2, 5):
        tuning = TuneConfig(steps=steps)
        far.waits.clear()
        given = (data.split('test').images, episodes, start, tuning, generator(0))
        tune_lora(there.backbone, *given)
        found.append(far.waits.total())
    assert found[0] == found[1], far.waits


# ---- the check of a card


@pytest.mark.parametrize('fast', [True, False])
def test_the_precision_that_is_faster_here_is_taken(fast, monkeypatch):
    def step():
        low = torch.is_autocast_enabled('cpu')
        time.sleep(0.01 if low == fast else 0.1)

    monkeypatch.setattr(device, 'market_step', lambda *sizes, device: step)
    assert device.choose_precision('cpu') == ('bfloat16' if fast else 'float32')


def test_other_programs_do_not_choose_the_precision(monkeypatch):
    "They made four of five rounds of the faster one slower: tables of one folder differed by that"
    turns = []

    def step():
        low = torch.is_autocast_enabled('cpu')
        turns.append(low)
        busy = not low and turns.count(False) != 4
        time.sleep(0.02 + 0.06 * busy)

    monkeypatch.setattr(device, 'market_step', lambda *sizes, device: step)
    assert device.choose_precision('cpu') == 'float32'


def test_published_scales_ask_no_clock():
    published = ('embedded', 'photos', 'photos-quick', 'paper')
    assert {SCALES[name].precision for name in published} == {''}


FEW_MODULES = """
import sys
for name in ('matplotlib', 'torchvision', 'sklearn', 'scipy', 'open_clip', 'timm', 'papermill'):
    sys.modules[name] = None
from lora_recycle.bench.device import *
size = choose_device_size('cpu')
rows = compare_with_cpu('cpu', size) + try_switches('cpu', size) + plan_hour('cpu')
print(rows[0]['value'], rows[-1]['note'])
"""


def test_a_card_can_be_checked_where_little_is_installed():
    done = subprocess.run(
        [sys.executable, '-c', FEW_MODULES], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith('0.0 not estimated: '), done.stderr


def test_the_check_names_what_differs_and_says_so_by_its_status(tmp_path, monkeypatch, capsys):
    row = dict(part='encode', precision='float32', metric='gap', limit=1e-4)
    row |= dict(note='', device_name='a card', torch='2')
    for value, status in ((1e-6, 0), (1e-3, 1), (float('nan'), 1)):
        rows = pd.DataFrame([row | dict(value=value)])
        monkeypatch.setattr(device, 'check_device', lambda name: rows)
        out = tmp_path / 'there' / 'rows.csv'
        assert device.run_check(['--device', 'cpu', '--out', str(out)]) == status
        assert ('encode in float32' in capsys.readouterr().out) == bool(status)
        assert pd.read_csv(out)['device_name'].tolist() == ['a card']
