"""From files in their real layout to tables: the paper's data sets and backbones at scale `paper`.

Shrunk in counts, and weights are random; one test has the whole ViT-B/16, all others tiny models
under the paper's names, which take the same path.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import layouts
import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tools import run_cells, try_papermill
from torchvision.models import resnet50

from lora_recycle.bench.claims import claims_of, judge
from lora_recycle.bench.cost import ViTShape
from lora_recycle.bench.methods import SCALES, stretch_scale
from lora_recycle.bench.report import write_page
from lora_recycle.bench.results import write_episodes, write_rows
from lora_recycle.bench.runs import SeedRun
from lora_recycle.bench.tables import (
    AT_PAPER_SCALE,
    TABLES,
    Place,
    Scene,
    chosen_methods,
    make_table,
    own_scale,
    table_at,
    table_columns,
)
from lora_recycle.core import Cache
from lora_recycle.jobs import Executor
from lora_recycle.method.chain import Chain, Files, Recipe, Tuned, cnn_prior
from lora_recycle.paper import models
from lora_recycle.paper import preflight as module
from lora_recycle.paper.preflight import (
    Rehearsal,
    bytes_an_image,
    data_row,
    disk_row,
    list_work,
    memory_rows,
    plan_of,
    preflight,
    refuse,
    rehearse,
    weight_row,
)
from lora_recycle.rivals.finetune import HubConfig, TuneConfig
from lora_recycle.rivals.merge import MergeGrid
from lora_recycle.suite.miniature import load_miniature

PAPER = SCALES['paper']


def alter(scale, **changes):
    "The scale with its chain's configs changed: market=dict(n_loras=2), ..."
    parts = {name: replace(getattr(scale.chain, name), **new) for name, new in changes.items()}
    return replace(scale, chain=replace(scale.chain, **parts))


# counts only: what an image is, how it is read, and every kind of step are those of the paper
FEW = alter(
    replace(
        PAPER,
        n_query=1,
        shots=(1,),
        n_tasks=3,
        n_tuned=2,
        n_val=2,
        tune=TuneConfig(steps=1, batch=2),
        hub=HubConfig(steps=1, views=1),
        machine=replace(PAPER.machine, rounds=2, executor=Executor('here')),
    ),
    market=dict(n_loras=4, steps=1, batch=1),
    invert=dict(steps=2, per_class=2),
    distill=dict(steps=1, n_query=1, cycle=2, warmup=1),
)
ALONE = alter(FEW, market=dict(n_loras=2))  # a market of one set needs no shares for four


def write_weights(folder, seed=0):
    "Checkpoints with random numbers, named as the models, each in another kind of file"
    folder.mkdir()
    save_file(models.random_weights('ViT-B-16', seed), folder / 'ViT-B-16.safetensors')
    torch.save(models.random_weights('ViT-B-32', seed), folder / 'ViT-B-32.pth')
    torch.save(dict(model=models.random_weights('DeiT-B', seed)), folder / 'DeiT-B.pth')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(resnet50(weights=None).state_dict(), folder / 'resnet50.pth')
    return folder


def shrink_models(patch):
    "Tiny models in the places of the paper's"
    for name, side in (('ViT-B-16', 16), ('ViT-B-32', 32), ('DeiT-B', 16)):
        model = models.MODELS[name]
        shape = ViTShape(model.shape.name, 32, side, 64, 2, 4, 64)
        patch.setitem(models.MODELS, name, replace(model, shape=shape))


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "The eight sets, all classes, three images each"
    return layouts.make_all(tmp_path_factory.mktemp('sets'), 3)


@pytest.fixture(scope='module')
def tiny_weights(tmp_path_factory):
    "Checkpoints of tiny models; no test changes them"
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch)
        return write_weights(tmp_path_factory.mktemp('tiny') / 'weights')


@pytest.fixture
def small(sets, tiny_weights, monkeypatch):
    "Tiny sets and tiny models in their places; nothing is rehearsed unless a test says so"
    layouts.trust(sets, monkeypatch)
    monkeypatch.setattr(module, 'rehearse', lambda to, stages: dict.fromkeys(stages, 1.0))
    shrink_models(monkeypatch)
    return Files(str(sets), str(tiny_weights))


def make(table, scale, place, methods, folder):
    "The table from loading to page"
    names = chosen_methods(table, methods, scale)
    columns = table_columns(table, scale, place)
    rows, counts = make_table(table, columns, names, scale)
    frame = write_rows(folder, rows)
    questions = scale.way * scale.n_query
    right = {k: v.numpy() for k, v in counts.items()}
    write_episodes(folder, right, questions)
    run = SeedRun(0, frame, {k: 100 * v / questions for k, v in right.items()}, folder)
    page = write_page(run, judge(claims_of(table), {table: [run]}))
    scene = Scene(table_at(table, scale), tuple(chain for chain, _ in columns), frame, scale)
    return SimpleNamespace(frame=frame, page=page, columns=columns, scene=scene)


def check(found, table, methods, backbones):
    "Every cell is there, in percent, for the paper's sets and backbones"
    frame = found.frame
    sets = {AT_PAPER_SCALE[target] for _, target in TABLES[table].columns}
    assert set(frame['dataset']) == sets and set(frame['backbone']) == set(backbones)
    assert set(frame['scale']) == {'paper'}
    cells = frame[frame['metric'] == 'accuracy']
    assert len(cells) == len(sets) * len(backbones) * len(methods.split('|'))
    assert cells['value'].between(0, 100).all()
    for name in sets:
        assert name in found.page


def count(log, kind, outcome='made'):
    return sum(k == kind and o == outcome for k, _, o, _ in log)


def test_the_network_of_r_bn_is_torchvisions(tiny_weights, tmp_path):
    "Nothing of it is left as it came, not even counters that old checkpoints lack; none is shared"
    path = tiny_weights / 'resnet50.pth'
    given = torch.load(path)
    backbone = load_miniature()
    nets = [cnn_prior('resnet50', path, backbone) for _ in range(2)]
    for name, tensor in nets[0][1].state_dict().items():
        assert torch.equal(tensor, given[name]), name
    assert not any(p.requires_grad for p in nets[0].parameters()) and not nets[0][1].training
    nets[0][1].fc.bias.zero_()
    assert torch.equal(nets[1][1].fc.bias, given['fc.bias'])
    old = {k: t for k, t in given.items() if not k.endswith('num_batches_tracked')}
    torch.save(old, tmp_path / 'old.pth')
    found = cnn_prior('resnet50', tmp_path / 'old.pth', backbone)[1].state_dict()
    assert all(found[k].item() == 0 for k in given if k not in old)


# ---- tiny models under the paper's names: the same path in seconds


def test_all_tables_on_small_models(small, tmp_path):
    cache = Cache(tmp_path / 'cache')
    place = Place(cache, files=small)
    few = 'nn|recycle'
    found = make('cross_domain', FEW, place, few, tmp_path / 'a')
    check(found, 'cross_domain', few, ['ViT-B-16'])
    stages = lambda: [count(cache.log, kind) for kind in ('market', 'inverted', 'meta')]
    assert stages() == [4, 4, 1]
    figures = {}
    for draw in found.scene.table.pictures:
        figures |= draw(found.scene)
    assert set(figures) == {'images', 'curves'}
    assert stages() == [4, 4, 1], 'pictures show what is there; nothing is made for them'
    cache.log.clear()
    make('cross_domain', FEW, place, few, tmp_path / 'again')
    assert {outcome for *_, outcome, _ in cache.log} == {'hit'}
    found = make('in_domain', ALONE, place, few, tmp_path / 'b')
    check(found, 'in_domain', few, ['ViT-B-16'])
    few = 'nn|lorahub|recycle'
    found = make('backbones', ALONE, place, few, tmp_path / 'c')
    check(found, 'backbones', few, ['ViT-B-16', 'ViT-B-32', 'DeiT-B'])
    plt.close('all')


MORE = alter(FEW, market=dict(n_loras=8), invert=dict(per_class=6))


@pytest.mark.parametrize('scale', [FEW, MORE], ids=['few', 'more'])
def test_the_plan_counts_what_is_made_and_the_disk_holds_it(small, tmp_path, scale):
    "A market and its images stay under the figure of the preflight"
    cache = Cache(tmp_path / 'cache')
    wanted = 'nn|average|recycle|recycle-average|recycle-mask75'
    methods = chosen_methods('cross_domain', wanted, scale)
    assert len(methods) == 5
    plan = plan_of('cross_domain', scale, methods).set_index('stage')
    found = list_work('cross_domain', scale, methods)
    row = disk_row(found, cache.folder)
    columns = table_columns('cross_domain', scale, Place(cache, files=small))
    make_table('cross_domain', columns, methods, scale)
    kinds = dict(market='tuning', inverted='inversion', meta='meta-training', answers='testing')
    for kind, stage in kinds.items():
        assert count(cache.log, kind) == plan['jobs'][stage], stage
    size = sum(p.stat().st_size for p in Path(cache.folder).rglob('*') if p.is_file()) / 1e9
    need = float(row['need'].split()[0])
    # the plan is of ViT-B/16, the stand-in is smaller: what it keeps must fit with room
    assert size < need
    assert abs(need - plan['gb'].sum()) < 0.01, 'and the figure is no idle guess'
    rest = float(disk_row(found, cache.folder)['need'].split()[2])
    assert abs(rest - (need - size)) < 0.002, 'a run that goes on needs only the rest'


def remedies(files, tmp_path, table='in_domain', scale=ALONE, exact=False):
    "What the preflight says of a run that must not start, and that nothing was computed"
    cache = Cache(tmp_path / 'cache')
    names = chosen_methods(table, 'nn|recycle', scale)
    checks = preflight(table, scale, names, Place(cache, files=files), exact, seconds=0.1)
    assert {kind for kind, *_ in cache.log} <= {'decoded'}
    with pytest.raises(ValueError) as err:
        refuse(checks)
    return str(err.value)


@pytest.mark.parametrize('table', ['cross_domain', 'backbones'])
def test_all_right_is_not_refused(small, tmp_path, monkeypatch, table):
    if table == 'cross_domain':
        monkeypatch.setattr(module, 'rehearse', rehearse)
    names = chosen_methods(table, 'nn|recycle', FEW)
    place = Place(Cache(tmp_path / 'cache'), files=small)
    checks = preflight(table, FEW, names, place, exact=False, seconds=0.1)
    refuse(checks)
    assert set(checks['kind']) == {'weights', 'data', 'disk', 'memory', 'time'}
    assert checks['fits'].all()


def test_the_preflight_refuses_what_is_no_table_and_what_reads_no_files(tmp_path):
    with pytest.raises(ValueError, match="table='nonsense'"):
        plan_of('nonsense', PAPER)
    with pytest.raises(ValueError, match="scale 'smoke' reads no files; preflight is for one on"):
        preflight('in_domain', SCALES['smoke'], ('nn',), Place(Cache(tmp_path)))


def test_a_full_disk_is_refused_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**9))
    row = disk_row(list_work('in_domain', PAPER, ('recycle',)), tmp_path)
    lacking = float(row['need'].split()[0]) - 1
    assert not row['fits'] and row['have'] == '1.0 GB free'
    assert f'Free {lacking:.1f} GB on the disk of {tmp_path}' in row['remedy']
    assert 'set cache_dir to another disk' in row['remedy']


def test_wrong_counts_are_refused_unless_allowed(small, tmp_path):
    said = remedies(small, tmp_path, exact=True)
    for words in (
        'cifar_fs: 300 images of 60000',
        'cub: 600 images of 11788',
        '4 of',
        'exact=False',
    ):
        assert words in said


def test_too_few_images_for_an_episode(small, tmp_path):
    assert 'shot + n_query = 6 images a class are needed, but' in remedies(
        small, tmp_path, scale=replace(ALONE, n_query=5)
    )


def test_absent_set_and_wrong_classes(small, sets, tmp_path):
    copy = shutil.copytree(sets, tmp_path / 'copy')
    shutil.rmtree(copy / 'mini_imagenet')
    shutil.rmtree(sorted((copy / 'CUB_200_2011' / 'images').iterdir())[0])
    said = remedies(replace(small, data=str(copy)), tmp_path)
    for words in (
        'mini_imagenet',
        'image-net.org',
        '199 class folders found, 200 expected',
        '001.Black_footed_Albatross',
        '2 of',
    ):
        assert words in said


def test_damaged_image_and_unreadable_csv(small, sets, tmp_path):
    copy = shutil.copytree(sets, tmp_path / 'copy')
    picture = sorted((copy / 'eurosat' / '2750' / 'Forest').iterdir())[1]
    picture.write_bytes(picture.read_bytes()[:200])
    next((copy / 'chestx').glob('*.csv')).write_bytes(b'"never closed')
    said = remedies(replace(small, data=str(copy)), tmp_path, 'cross_domain', FEW)
    for words in (picture.name, '1 of 30 images cannot be read', 'Data_Entry_2017.csv', '2 of'):
        assert words in said


def test_weights_absent_or_not_fitting(small, tmp_path):
    folder = Path(shutil.copytree(small.weights, tmp_path / 'weights'))
    small = replace(small, weights=str(folder))
    tensors = load_file(folder / 'ViT-B-16.safetensors')
    save_file(
        {k: t for k, t in tensors.items() if k != 'visual.proj'} | dict(strange=torch.zeros(1)),
        folder / 'ViT-B-16.safetensors',
    )
    (folder / 'ViT-B-32.pth').unlink()
    torch.save(dict(state=SimpleNamespace(a=1)), folder / 'DeiT-B.pth')
    state = torch.load(folder / 'resnet50.pth')
    torch.save(state | dict(other=torch.zeros(1)), folder / 'resnet50.pth')
    said = remedies(small, tmp_path, 'backbones', ALONE)
    for words in (
        '1 of 32 keys are missing: visual.proj',
        '1 keys are not known: strange',
        'holds no ViT-B-32.pt',
        'more than weights',
        "is not torchvision's ResNet-50: 1 keys are not known: other",
        '4 of',
    ):
        assert words in said, said


def test_class_names_need_a_text_tower(small):
    assert 'holds no text tower' in weight_row('ViT-B-16', small.weights, text=True)['remedy']
    assert 'trained without text' in weight_row('DeiT-B', small.weights, text=True)['remedy']
    assert weight_row('ViT-B-16', small.weights)['fits']


def test_too_little_disk_and_memory(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr('lora_recycle.paper.preflight.free_memory_gb', lambda device: 0.1)
    said = remedies(small, tmp_path)
    assert (
        'set cache_dir to another disk' in said
        and 'more rounds' in said
        and 'inversion, ViT-B-16' in said
    )


def test_images_are_decoded_once(small, tmp_path):
    cache = Cache(tmp_path / 'cache')
    for outcome in ('made', 'hit'):
        assert (
            data_row('eurosat', small.data, 2, False, cache)['fits'] and cache.log[-1][2] == outcome
        )


def test_memory_is_what_autograd_keeps():
    "More images keep as much more, and a longer network keeps more"
    shape = ViTShape(
        'a', 32, 8, 64, 4, 4, 32
    )  # of the last layer, which is for [CLS] alone, little is kept
    one, deep = bytes_an_image(shape), bytes_an_image(replace(shape, layers=8))
    assert one['prior'] == deep['prior'] and 1.8 < deep['frozen'] / one['frozen'] < 2.1


# ---- the first hour

HOUR = SCALES['hour']
SHORT = alter(
    replace(
        HOUR,
        **dict(n_query=1, shots=(1,), n_tasks=3, merge=MergeGrid((1.0,), (0.5,), 2, 1)),
        machine=replace(HOUR.machine, executor=Executor('here')),
    ),
    market=dict(n_loras=2, steps=1, batch=2),
    invert=dict(steps=4, per_class=2, plan=((1, 0.75),)),
    distill=dict(steps=1, n_query=1, tasks=1, cycle=2, warmup=1),
)


def test_the_first_hour_runs_from_files_to_the_table(small, tmp_path):
    "Counts shrunk; the plan, bfloat16 and every row are those of the hour"
    names = 'nn|average|average-factors|recycle|recycle-average|merge-ties|merge-tsv-m'
    place = Place(Cache(tmp_path / 'cache'), files=small)
    methods = chosen_methods('in_domain', names, SHORT)
    checks = preflight('in_domain', SHORT, methods, place, exact=False, seconds=0.1)
    refuse(checks)
    assert checks.iloc[-1]['need'] == '60 min' and 'of the paper' in checks.iloc[-1]['have']
    found = make('in_domain', SHORT, place, names, tmp_path / 'a')
    cells = found.frame[found.frame['metric'] == 'accuracy']
    assert cells['method'].tolist() == list(methods)
    assert set(cells['dataset']) == {'cifar_fs'} and set(cells['scale']) == {'hour'}
    plan = plan_of('in_domain', SHORT, methods).set_index('stage')['jobs']
    kinds = dict(tuning='market', inversion='inverted')
    kinds |= {'meta-training': 'meta', 'testing': 'answers'}
    made = {stage: count(place.store.log, kind) for stage, kind in kinds.items()}
    assert made == plan.to_dict()


def test_the_hour_fits_where_it_is_meant_to():
    "By operations at 30 x 10^12 a second, and by memory"
    methods = chosen_methods('in_domain', 'quick', HOUR)
    assert {'nn', 'average', 'average-factors', 'recycle', 'recycle-average'} < set(methods)
    assert {'merge-ties', 'merge-tsv-m'} < set(methods)
    assert not {'merge-ties'} & set(chosen_methods('in_domain', 'quick'))
    assert plan_of('in_domain', HOUR, methods, tflops=30.0)['hours'].sum() < 1
    kept = {'ViT-B-16': dict(forward=1.1e7, frozen=9.2e7, full=1.2e8, prior=8.6e7)}
    for row in memory_rows(list_work('in_domain', HOUR, methods), 'cpu', kept):
        assert float(row['need'].split()[0]) < 40
    four = stretch_scale(HOUR, 4.0)
    both = [plan_of('in_domain', s, methods)['hours'].sum() for s in (HOUR, four)]
    assert 3 < both[1] / both[0] < 5
    with pytest.raises(ValueError, match="hours=4 cannot be used with scale 'embedded'"):
        stretch_scale(SCALES['embedded'], 4)
    small = own_scale('hour', backbone='ViT-B-32')
    assert table_at('in_domain', small).backbones == ('ViT-B-32',)
    assert table_at('in_domain', small).columns == ((('cifar_fs',), 'cifar_fs'),)


def test_who_is_too_slow_for_the_hour_is_told_before(small, tmp_path, monkeypatch):
    slow = dict.fromkeys(('tuning', 'inversion', 'meta-training', 'testing'), 1e9)
    monkeypatch.setattr(module, 'rehearse', lambda to, stages: slow)
    place = Place(Cache(tmp_path), files=small)
    checks = preflight('in_domain', SHORT, ('nn', 'recycle'), place, exact=False)
    with pytest.raises(ValueError, match='time, all stages: Take a faster GPU.*-p hours'):
        refuse(checks)


@pytest.mark.parametrize('stage', ['inversion', 'meta-training'])
def test_the_estimate_of_a_stage_is_what_it_takes(stage):
    """In time of this process, on the miniature.

    A wrong count or unit would be many times off; how near it comes is for an idle machine."""
    base = SCALES['smoke']
    scale = alter(
        replace(base, shots=(1,), machine=replace(base.machine, tune_chunk=0)),
        market=dict(n_loras=2, steps=24, batch=10),
        invert=dict(steps=16, per_class=4),
        distill=dict(steps=40, mix=1.0, n_query=2, tasks=1, cycle=40),
    )
    backbone = load_miniature()
    to = Rehearsal('miniature', backbone, scale, scale.machine, 5.0, time.process_time)
    plan = plan_of('data', scale, ('recycle',), scale.machine).set_index('stage')
    expected = rehearse(to, (stage,))[stage] * plan['pflop'][stage]
    chain = Chain(backbone, Tuned(('cyrillic',)), scale.chain, machine=to.machine)
    chain.data  # drawn before
    run = dict(tuning=chain.market, inversion=chain.images, **{'meta-training': chain.meta})
    for name in list(run)[: list(run).index(stage) + 1]:
        start = time.process_time()
        run[name]()
    assert 1 / 3 < expected / (time.process_time() - start) < 3


# ---- the real model


def test_a_table_at_paper_scale(sets, tmp_path, monkeypatch):
    """The whole ViT-B/16 and ResNet-50 at 224 pixels, from files to page.

    In float32: bfloat16, which scale `hour` has, is emulated on many a processor."""
    layouts.trust(sets, monkeypatch)
    files = Files(str(sets), str(write_whole(tmp_path / 'weights')))
    few = dict(market=dict(n_loras=1, way=2), invert=dict(steps=1, per_class=2))
    scale = replace(alter(ALONE, **few, distill=dict(way=2, tasks=1)), n_tasks=2, way=2)
    place = Place(Cache(tmp_path / 'cache'), files=files)
    found = make('interpolation', scale, place, 'recycle', tmp_path / 'a')
    check(found, 'interpolation', 'recycle', ['ViT-B-16'])
    chain = found.columns[0][0]
    backbone = chain.backbone
    assert (backbone.width, backbone.layers, backbone.n_patches) == (768, 12, 196)
    lora = chain.market().lora[:1]
    assert sum(t.numel() for t in lora.tensors().values()) > 147_456
    inverted = chain.images(Recipe())
    assert inverted.images.shape == (1, 2, 2, 3, 224, 224)
    assert inverted.images.dtype == torch.uint8 and len(inverted.images.unique()) > 100
    assert inverted.loss.isfinite().all()


def write_whole(folder):
    "ViT-B/16 and the network of R_BN at their real size"
    folder.mkdir()
    save_file(models.random_weights('ViT-B-16', 0), folder / 'ViT-B-16.safetensors')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(resnet50(weights=None).state_dict(), folder / 'resnet50.pth')
    return folder


# ---- the notebook


def run_table(folder, **parameters):
    "papermill to its end: exit status and what is in the executed notebook and on the screen"
    values = dict(out_dir=folder / 'results', cache_dir=folder / 'cache') | parameters
    code, said = try_papermill('run_table.ipynb', folder / 'out.ipynb', **values)
    return code, said + (folder / 'out.ipynb').read_text()


def test_dry_run_stops_after_the_plan(tmp_path):
    code, said = run_table(tmp_path, scale='smoke', dry_run=True)
    between = said.split('A dry run stops here')[1].split('## The run')[0]
    assert code == 0 and 'meta-training' in said and 'LoRA Recycle' not in between
    assert not list((tmp_path / 'cache').glob('*/*'))
    assert not (tmp_path / 'results/in_domain/rows.csv').exists()


def test_what_is_needed_at_paper_scale(tmp_path, monkeypatch):
    """CIFAR-FS alone, twenty images a class: all is there for NN.

    Without the weights nothing begins, and nothing is rehearsed."""
    layouts.make_cifar(tmp_path / 'data', 20)
    layouts.make_flowers(tmp_path / 'data', 1)  # `trust` reads both
    layouts.trust(tmp_path / 'data', monkeypatch)
    weights = tmp_path / 'weights'
    weights.mkdir()
    save_file(models.random_weights('ViT-B-16', 0), weights / 'ViT-B-16.safetensors')
    how = dict(table='interpolation', scale='paper', methods='nn', exact_sets=False)
    how |= dict(data_dir=tmp_path / 'data', executor='here')
    how |= dict(out_dir=tmp_path / 'results', cache_dir=tmp_path / 'cache')
    monkeypatch.setattr(module, 'rehearse', lambda to, stages: dict.fromkeys(stages, 100.0))
    names = run_cells('run_table.ipynb', 'refuse(checks)', weights_dir=weights, **how)
    said = names['checks'].to_string()
    for words in ('100 classes, 2000 images', 'ViT-B-16.safetensors', 'GB free', 'min on cpu'):
        assert words in said
    monkeypatch.setattr(module, 'rehearse', None)
    with pytest.raises(ValueError, match='holds no ViT-B-16.pt'):
        run_cells('run_table.ipynb', weights_dir=tmp_path / 'none', **how)
    assert not list((tmp_path / 'cache').glob('answers/*'))
