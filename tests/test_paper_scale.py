"From files in their real layout to tables: the paper's data sets and backbones at scale `paper`, shrunk only in counts, with random weights."

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import layouts
import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet50

from lora_recycle.paper import models
from lora_recycle.core import Cache
from lora_recycle.bench.cost import ViTShape
from lora_recycle.rivals.finetune import HubConfig, TuneConfig
from lora_recycle.bench.methods import BOUNDS
from lora_recycle.method.chain import SCALES, Files
from lora_recycle.paper.preflight import (
    bytes_an_image,
    calibrate,
    data_row,
    disk_row,
    plan_of,
    preflight,
    refuse,
    weight_row,
    works,
)
from lora_recycle.bench.results import comparison, write_episodes, write_rows
from lora_recycle.bench.tables import AT_PAPER_SCALE, TABLES, chosen_methods, make_table, table_runs

PAPER = SCALES['paper']
# counts only: what an image is, how it is read, and every kind of step are those of the paper's scale
FEW = replace(
    PAPER,
    n_query=1,
    shots=(1,),
    n_tasks=3,
    n_tuned=2,
    n_val=2,
    rounds=2,
    market=replace(PAPER.market, n_loras=4, steps=1, batch=1),
    invert=replace(PAPER.invert, steps=2, per_class=2),
    distill=replace(PAPER.distill, steps=1, n_query=1, cycle=2, warmup=1),
    tune=TuneConfig(steps=1, batch=2),
    hub=HubConfig(steps=1, views=1),
)
ALONE = replace(
    FEW, market=replace(FEW.market, n_loras=2)
)  # a market of one set needs no shares for four


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


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "The eight sets, all classes, three images each"
    return layouts.make_all(tmp_path_factory.mktemp('sets'), 3)


@pytest.fixture
def root(sets, monkeypatch):
    layouts.trust(sets, monkeypatch)
    return sets


def made(table, settings, files, cache, methods, folder):
    "The table from loading to page: rows, page, stages"
    names = chosen_methods(table, methods)
    runs = table_runs(table, settings, 0, cache, 'cpu', files)
    rows, counts = make_table(table, runs, names, note=lambda line: None)
    frame = write_rows(folder, rows)
    right = {k: v.numpy() for k, v in counts.items()}
    write_episodes(folder, right, settings.way * settings.n_query)
    page = comparison(
        frame,
        {k: 100 * v / (settings.way * settings.n_query) for k, v in right.items()},
        TABLES[table].gains,
        BOUNDS,
        TABLES[table].best,
    )
    return SimpleNamespace(frame=frame, page=page, runs=runs, log=list(cache.log))


def check(found, table, methods, backbones):
    "Every cell is there, in percent, for the paper's sets and backbones"
    frame, sets = found.frame, {AT_PAPER_SCALE[target] for _, target in TABLES[table].runs}
    assert (
        set(frame['dataset']) == sets
        and set(frame['backbone']) == set(backbones)
        and set(frame['scale']) == {'paper'}
    )
    cells = frame[frame['metric'] == 'accuracy']
    assert (
        len(cells) == len(sets) * len(backbones) * len(methods.split('|'))
        and cells['value'].between(0, 100).all()
    )
    for name in sets:
        assert name in found.page


def count(log, kind, outcome='made'):
    return sum(k == kind and o == outcome for k, _, o, _ in log)


# ---- tiny models under the paper's names: the same path in seconds


@pytest.fixture
def small(root, monkeypatch, tmp_path):
    "Tiny sets and tiny models in their places"
    for name, patch in (('ViT-B-16', 16), ('ViT-B-32', 32), ('DeiT-B', 16)):
        model = models.MODELS[name]
        monkeypatch.setitem(
            models.MODELS,
            name,
            replace(model, shape=ViTShape(model.shape.name, 32, patch, 64, 2, 4, 64)),
        )
    return Files(str(root), str(write_weights(tmp_path / 'weights')))


def test_all_tables_on_small_models(small, tmp_path):
    cache, few = Cache(tmp_path / 'cache'), 'NN|LoRA Recycle'
    found = made('cross_domain', FEW, small, cache, few, tmp_path / 'a')
    check(found, 'cross_domain', few, ['ViT-B-16'])
    assert (count(cache.log, 'market'), count(cache.log, 'inverted'), count(cache.log, 'meta')) == (
        4,
        4,
        1,
    )
    figures = TABLES['cross_domain'].pictures(
        'cross_domain', [run for run, _ in found.runs], found.frame
    )
    assert set(figures) == {'accuracy', 'images', 'curves'}
    assert (count(cache.log, 'market'), count(cache.log, 'inverted'), count(cache.log, 'meta')) == (
        4,
        4,
        1,
    ), 'pictures show what is there; nothing is made for them'
    cache.log.clear()
    made('cross_domain', FEW, small, cache, few, tmp_path / 'again')
    assert {outcome for *_, outcome, _ in cache.log} == {'hit'}
    check(
        made('in_domain', ALONE, small, cache, few, tmp_path / 'b'), 'in_domain', few, ['ViT-B-16']
    )
    few = 'NN|LoRAHub|LoRA Recycle'
    check(
        made('backbones', ALONE, small, cache, few, tmp_path / 'c'),
        'backbones',
        few,
        ['ViT-B-16', 'ViT-B-32', 'DeiT-B'],
    )
    plt.close('all')


@pytest.mark.parametrize(
    'settings',
    [
        FEW,
        replace(
            FEW, market=replace(FEW.market, n_loras=8), invert=replace(FEW.invert, per_class=6)
        ),
    ],
)
def test_the_plan_counts_what_is_made_and_the_disk_holds_it(small, tmp_path, settings):
    "A market and its images stay under the figure of the preflight"
    cache, methods = (
        Cache(tmp_path / 'cache'),
        chosen_methods(
            'cross_domain',
            'NN|LoRAs Avg + NN|LoRA Recycle|LoRA Recycle, start at zero|LoRA Recycle_75',
        ),
    )
    plan = plan_of('cross_domain', settings, methods).set_index('stage')
    row = disk_row(works('cross_domain', settings, methods), cache.folder)
    make_table(
        'cross_domain',
        table_runs('cross_domain', settings, 0, cache, 'cpu', small),
        methods,
        note=lambda line: None,
    )
    for kind, stage in (
        ('market', 'tuning'),
        ('inverted', 'inversion'),
        ('meta', 'meta-training'),
        ('answers', 'testing'),
    ):
        assert count(cache.log, kind) == plan['jobs'][stage]
    size = sum(p.stat().st_size for p in Path(cache.folder).rglob('*') if p.is_file()) / 1e9
    need = float(row['need'].split()[0])
    assert size < need < size + 0.003, 'and the figure is no idle guess'
    assert (
        float(disk_row(works('cross_domain', settings, methods), cache.folder)['need'].split()[2])
        < 0.003
    ), 'a run that goes on needs only the rest'


def remedies(
    files, tmp_path, table='in_domain', settings=ALONE, methods='NN|LoRA Recycle', exact=False
):
    "What the preflight says of a run that must not start, and that nothing was computed"
    cache = Cache(tmp_path / 'cache')
    checks = preflight(table, settings, chosen_methods(table, methods), files, cache, exact=exact)
    assert {kind for kind, *_ in cache.log} <= {'decoded'}
    with pytest.raises(ValueError) as err:
        refuse(checks)
    return str(err.value)


def test_all_right_is_not_refused(small, tmp_path):
    for table in ('in_domain', 'cross_domain', 'backbones'):
        checks = preflight(
            table,
            FEW,
            chosen_methods(table, 'NN|LoRA Recycle'),
            small,
            Cache(tmp_path / 'cache'),
            exact=False,
        )
        refuse(checks)
        assert (
            set(checks['kind']) == {'weights', 'data', 'disk', 'memory', 'time'}
            and checks['fits'].all()
        )


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
        small, tmp_path, settings=replace(ALONE, n_query=5)
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
    folder = Path(small.weights)
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
    assert set(calibrate(shape, prior=False)) == {'forward', 'frozen', 'full'}


# ---- the real models


@pytest.fixture(scope='module')
def real(sets, tmp_path_factory):
    "Tiny sets, whole models, a cache that the tables below share"
    with pytest.MonkeyPatch.context() as patch:
        layouts.trust(sets, patch)
        folder = tmp_path_factory.mktemp('real')
        yield Files(str(sets), str(write_weights(folder / 'weights'))), Cache(folder / 'cache')


@pytest.mark.parametrize(
    'table, settings, methods, backbones',
    [
        ('in_domain', ALONE, 'NN|LoRA Recycle', ['ViT-B-16']),
        ('cross_domain', FEW, 'LoRA Recycle', ['ViT-B-16']),
        ('backbones', ALONE, 'NN|LoRAHub|LoRA Recycle', ['ViT-B-16', 'ViT-B-32', 'DeiT-B']),
        ('interpolation', replace(ALONE, precision='bfloat16'), 'LoRA Recycle', ['ViT-B-16']),
    ],
)
def test_tables_at_paper_scale(real, tmp_path, table, settings, methods, backbones):
    files, cache = real
    found = made(table, settings, files, cache, methods, tmp_path)
    check(found, table, methods, backbones)
    run = found.runs[0][0]
    assert (run.backbone.width, run.backbone.layers, run.backbone.n_patches) == (
        768,
        12,
        196,
    ) and sum(t.numel() for t in run.market.lora[:1].tensors().values()) > 147_456
    n, side = settings.market.n_loras, 224
    assert (
        run.inverted['images'].shape == (n, 5, 2, 3, side, side)
        and run.inverted['images'].dtype == torch.uint8
    )
    assert run.inverted['loss'].isfinite().all() and len(run.inverted['images'].unique()) > 100


# ---- the notebook

ROOT = Path(__file__).resolve().parent.parent


def run_table(folder, env=None, **parameters):
    "papermill to its end: exit status and what is in the executed notebook and on the screen"
    values = dict(out_dir=folder / 'results', cache_dir=folder / 'cache') | parameters
    command = [
        sys.executable,
        '-m',
        'papermill',
        'nbs/run_table.ipynb',
        str(folder / 'out.ipynb'),
        '--no-progress-bar',
        *(w for k, v in values.items() for w in ('-p', k, str(v))),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr + (folder / 'out.ipynb').read_text()


def test_dry_run_stops_after_the_plan(tmp_path):
    code, said = run_table(tmp_path, scale='smoke', dry_run=True)
    assert (
        code == 0
        and 'meta-training' in said
        and 'LoRA Recycle' not in said.split('A dry run stops here')[1].split('## The run')[0]
    )
    assert (
        not list((tmp_path / 'cache').glob('*/*'))
        and not (tmp_path / 'results/in_domain/rows.csv').exists()
    )


def test_dry_run_at_paper_scale(real, tmp_path):
    "CIFAR-FS alone, twenty images a class: all is there for NN, and without the weights nothing begins"
    layouts.make_cifar(tmp_path / 'data', 20)
    layouts.make_flowers(tmp_path / 'data', 1)  # `trusted` reads both
    path = layouts.trust_file(tmp_path / 'data', tmp_path / 'site')
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')]),
    }
    how = dict(
        table='interpolation',
        scale='paper',
        methods='NN',
        exact_sets=False,
        data_dir=tmp_path / 'data',
        env=env,
    )
    code, said = run_table(tmp_path, weights_dir=real[0].weights, dry_run=True, **how)
    assert code == 0, said[-3000:]
    for words in ('100 classes, 2000 images', 'ViT-B-16.safetensors', 'GB free', 'h on cpu'):
        assert words in said
    code, said = run_table(tmp_path, weights_dir=tmp_path / 'none', **how)
    assert (
        code != 0
        and 'holds no ViT-B-16.pt' in said
        and not list((tmp_path / 'cache').glob('answers/*'))
    )
