"One's own image sets in a table: by folder, as torchvision leaves them, counted before any work."

import json
import pickle
from dataclasses import replace

import layouts
import numpy as np
import pytest
from scipy.io import savemat
from tools import run_cells
from torchvision.datasets import CIFAR10

from lora_recycle.bench.methods import SCALES
from lora_recycle.bench.results import read_rows
from lora_recycle.bench.tables import (
    Place,
    choose_columns,
    list_cells,
    name_columns,
    own_scale,
    read_shots,
    table_at,
)
from lora_recycle.core import Cache
from lora_recycle.method.chain import Files
from lora_recycle.paper import datasets
from lora_recycle.paper.datasets import VISION_NAMES, fetch_absent, fetch_set, find_set, open_set
from lora_recycle.paper.preflight import check_sets, refuse
from lora_recycle.suite import vision
from lora_recycle.suite.vision import find_vision_set

KINDS = ('ape', 'bee', 'cat')


def write(path, c, i):
    "An image of class `c`, written as the file `path` below folders that are made"
    return layouts.write_image(path, c, i)


def write_dtd(root, parts=('train1', 'val1', 'test1')):
    for n, part in enumerate(parts):
        lines = []
        for c, kind in enumerate(KINDS):
            write(root / 'dtd' / 'dtd' / 'images' / kind / f'{kind}_{n}.jpg', c, n)
            lines.append(f'{kind}/{kind}_{n}.jpg')
        (root / 'dtd' / 'dtd' / 'labels').mkdir(exist_ok=True)
        (root / 'dtd' / 'dtd' / 'labels' / f'{part}.txt').write_text('\n'.join(lines))


def write_food(root):
    (root / 'food-101' / 'meta').mkdir(parents=True)
    for n, part in enumerate(('train', 'test')):
        found = {}
        for c, kind in enumerate(KINDS):
            write(root / 'food-101' / 'images' / kind / f'{n}.jpg', c, n)
            found[kind] = [f'{kind}/{n}']
        (root / 'food-101' / 'meta' / f'{part}.json').write_text(json.dumps(found))


def write_pets(root):
    notes = root / 'oxford-iiit-pet' / 'annotations'
    notes.mkdir(parents=True)
    for n, part in enumerate(('trainval', 'test')):
        lines = []
        for c, kind in enumerate(KINDS):
            write(root / 'oxford-iiit-pet' / 'images' / f'{kind}_{n}.jpg', c, n)
            lines.append(f'{kind}_{n} {c + 1} 1 1')
        (notes / f'{part}.txt').write_text('\n'.join(lines))


def write_aircraft(root):
    data = root / 'fgvc-aircraft-2013b' / 'data'
    data.mkdir(parents=True)
    (data / 'variants.txt').write_text('\n'.join(KINDS))
    for n, part in enumerate(('train', 'val', 'test')):
        lines = []
        for c, kind in enumerate(KINDS):
            write(data / 'images' / f'{n}{c}.jpg', c, n)
            lines.append(f'{n}{c} {kind}')
        (data / f'images_variant_{part}.txt').write_text('\n'.join(lines))


def write_cars(root):
    base = root / 'stanford_cars'
    (base / 'devkit').mkdir(parents=True)
    savemat(base / 'devkit' / 'cars_meta.mat', dict(class_names=np.array(KINDS, dtype=object)))
    kind = [('fname', object), ('class', int)]
    for n, part in enumerate(('train', 'test')):
        rows = [(f'{c}.jpg', c + 1) for c in range(len(KINDS))]
        for c in range(len(KINDS)):
            write(base / f'cars_{part}' / f'{c}.jpg', c, n)
        name = 'devkit/cars_train_annos.mat' if not n else 'cars_test_annos_withlabels.mat'
        savemat(base / name, dict(annotations=np.array(rows, dtype=kind)))


def write_mnist(root):
    folder = root / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for part in ('train', 't10k'):
        head = lambda magic, *sizes: b''.join(n.to_bytes(4, 'big') for n in (magic, *sizes))
        pixels = np.stack([np.full((28, 28), 80 * c, np.uint8) for c in range(3)])
        (folder / f'{part}-images-idx3-ubyte').write_bytes(head(2051, 3, 28, 28) + pixels.tobytes())
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(head(2049, 3) + bytes([0, 1, 2]))


def write_cifar10(root, monkeypatch):
    folder = root / 'cifar-10-batches-py'
    folder.mkdir()
    monkeypatch.setattr(CIFAR10, 'train_list', [['data_batch_1', None]])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', None]])
    monkeypatch.setitem(CIFAR10.meta, 'md5', None)
    rows = np.stack(
        [np.full((32, 32, 3), 80 * c, np.uint8).transpose(2, 0, 1).ravel() for c in range(3)]
    )
    for name in ('data_batch_1', 'test_batch'):
        (folder / name).write_bytes(pickle.dumps(dict(data=rows, labels=[0, 1, 2])))
    (folder / 'batches.meta').write_bytes(pickle.dumps(dict(label_names=list(KINDS))))


WRITERS = dict(
    DTD=write_dtd,
    Food101=write_food,
    OxfordIIITPet=write_pets,
    FGVCAircraft=write_aircraft,
    StanfordCars=write_cars,
    MNIST=write_mnist,
)


@pytest.mark.parametrize('name', WRITERS)
def test_sets_as_torchvision_leaves_them(tmp_path, name):
    WRITERS[name](tmp_path)
    data = open_set(name, tmp_path, side=8)
    n = 3 if name in ('DTD', 'FGVCAircraft') else 2
    assert len(data.classes) == 3 and data.labels.bincount().tolist() == [n] * 3
    assert sorted(sum(data.splits.values(), ())) == [0, 1, 2]
    names = [c.lower() for c in data.classes]
    assert names == sorted(KINDS) or name == 'MNIST' and names[0].startswith('0')
    for c, kind in enumerate(KINDS):
        colour = 80.0 * c if name == 'MNIST' else layouts.picture(c, 0).mean()
        mean = data.images[data.labels == c].float().mean().item()
        assert abs(mean - colour) < 12, kind
    few = find_set(f'{name}:test', tmp_path, per_class=1)
    assert len(few) == 3 and len(few.splits['test']) == 3


def test_pixels_in_one_array(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    data = open_set('CIFAR10', tmp_path, side=8)
    assert data.classes == KINDS and len(data.labels) == 6
    assert data.images[data.labels == 2].unique().tolist() == [160]


def test_patches_of_tissue(tmp_path):
    h5py = pytest.importorskip('h5py')
    (tmp_path / 'pcam').mkdir()
    for part, files in vision._sets().PCAM._FILES.items():
        with h5py.File(tmp_path / 'pcam' / files['images'][0], 'w') as file:
            file['x'] = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones(
                (1, 96, 96, 3), np.uint8
            )
        with h5py.File(tmp_path / 'pcam' / files['targets'][0], 'w') as file:
            file['y'] = np.array([0, 1, 1, 0], np.uint8).reshape(4, 1, 1, 1)
    data = find_vision_set('PCAM', tmp_path)
    assert data.classes == ('normal', 'tumour') and len(data) == 12
    assert data.images([0, 1, 2, 3], 4)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_split_that_is_not_there_is_told(tmp_path):
    write_dtd(tmp_path, ('train1', 'val1'))
    with pytest.warns(UserWarning, match="DTD: read without split='test'"):
        assert len(find_vision_set('DTD', tmp_path)) == 6


@pytest.mark.parametrize('name', ['DTD', 'Food101', 'StanfordCars', 'CIFAR10', 'MNIST'])
def test_an_absent_set_of_torchvision_has_a_remedy(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f'{name} is not below .*-p download True') as err:
        open_set(name, tmp_path)
    assert 'download=True' not in str(err.value)


def test_names_of_torchvision_with_a_reader_of_ours(tmp_path, monkeypatch):
    layouts.make_photos(tmp_path)
    for theirs in ('Caltech101', 'GTSRB', 'Omniglot'):
        assert find_set(theirs, tmp_path).digest == find_set(VISION_NAMES[theirs], tmp_path).digest
    layouts.make_eurosat(tmp_path, 2)
    assert len(find_set('EuroSAT', tmp_path).classes) == 10


def test_nothing_is_fetched_unless_it_is_absent_and_can_be_had(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, 'download', lambda name, root: asked.append(name))
    monkeypatch.setattr(datasets, 'download_vision_set', lambda name, root: asked.append(name))
    write_dtd(tmp_path)
    names = ['DTD', 'digits', 'CIFAR100:train', 'CIFAR100', 'Food101', 'caltech101']
    assert fetch_absent(names, tmp_path) == ['CIFAR100', 'Food101', 'caltech101']
    assert asked == ['cifar_fs', 'Food101', 'Caltech101']
    with pytest.raises(ValueError, match='cannot be downloaded'):
        fetch_set('tiny-imagenet', tmp_path)


def test_a_download_that_fails_names_the_way_by_hand(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, root, **how):
            raise RuntimeError('the server is gone')

    monkeypatch.setattr(vision._sets(), 'DTD', Broken)
    with pytest.raises(ConnectionError, match='the server is gone.*by hand'):
        vision.download_vision_set('DTD', tmp_path)


# ---- columns and scales


def test_columns_of_ones_own():
    assert choose_columns() == ()
    assert choose_columns('a| b') == ((('a',), 'a'), (('b',), 'b'))
    assert choose_columns('', 'a') == choose_columns('a', 'a') == ((('a',), 'a'),)
    assert choose_columns('a|b', 'c|d') == ((('a', 'b'), 'c'), (('a', 'b'), 'd'))
    assert name_columns(()) == '' and '`c` with LoRAs of a, b' in name_columns(((('a', 'b'), 'c'),))


@pytest.mark.parametrize('text', ['a||b', '/data/a', '~/a', 'a|a', '|'])
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match='targets=.*below data_dir'):
        choose_columns('x', text)


@pytest.mark.parametrize('text', ['a', '1,5', '-1', '1.5', '5||1'])
def test_shots_that_are_none(text):
    with pytest.raises(ValueError, match='1|5|50'):
        read_shots(text)


def test_scales_of_ones_own():
    columns = choose_columns('a|b|c|d', 'e')
    assert own_scale('embedded', columns).name == 'photos'
    glyphs = own_scale('smoke', columns, 'miniature')
    assert (glyphs.name, glyphs.backbone) == ('smoke', 'miniature')
    paper = own_scale('paper', columns)
    assert paper.backbone == '' and table_at('in_domain', paper).backbones == ('ViT-B-16',)
    assert own_scale('photos', columns, shots=(50,)).chain.per_class == 65
    assert {name: own_scale(name) for name in SCALES} == SCALES
    for how in (dict(backbone='ViT-B-16'), dict(shots=(51,)), dict(shots=(0,))):
        with pytest.raises(ValueError, match='backbone|shots'):
            own_scale('photos', columns, **how)


@pytest.mark.parametrize('name', SCALES)
def test_shots_that_inversion_has_too_few_images_for_are_told_before_any_work(name):
    scale = SCALES[name]
    size = scale.chain.invert.per_class, scale.chain.distill.n_query
    cells = lambda shots, *methods: list_cells(
        table_at('interpolation', scale), [(None, 'a')], methods, replace(scale, shots=shots)
    )
    assert {cell.shot for cell in cells(scale.shots, 'recycle', 'nn')} == {*scale.shots}
    most = size[0] - size[1]
    assert len(cells((most,), 'recycle')) == 1
    with pytest.raises(ValueError, match=f'inverts {size[0]}.*fewer shots'):
        cells((1, most + 1), 'nn', 'recycle-average')
    assert len(cells((most + 1,), 'nn', 'average')) == 2  # they need no images


# ---- counted before any work


def make_own(root, name, n_classes, n_images):
    "A folder of classes, class c with n_images[c % len] images"
    for c in range(n_classes):
        for i in range(n_images[c % len(n_images)]):
            write(root / name / f'kind {c}' / f'{i}.png', c, i)


def check(root, sources, targets, **how):
    "The rows of a run on these sets, by the name of the set"
    scale = own_scale('photos-quick', choose_columns(sources, targets), **how)
    place = Place(Cache(root / 'cache'), files=Files(str(root)))
    found = check_sets('in_domain', scale, place)
    return found, dict(zip(found['what'], found['remedy']))


def test_sets_are_counted_and_the_remedy_works(tmp_path):
    make_own(tmp_path, 'mine', 9, [20])
    found, remedies = check(tmp_path, 'mine', 'mine')
    assert '9 classes (6 train, 1 val, 2 test) of 20 to 20 images' in found['have'].tolist()
    assert 'Name it mine:test to use all of its 9' in remedies['mine']
    with pytest.raises(ValueError, match='mine:test'):
        refuse(found)
    found, _ = check(tmp_path, 'mine:train', 'mine:test')
    refuse(found)


def test_classes_that_are_too_small_are_named(tmp_path):
    make_own(tmp_path, 'mine', 9, [20, 3])
    _, remedies = check(tmp_path, 'mine:train', 'mine:test', shots=(5,))
    assert '20 images are needed in each class, but kind 1 has 3' in remedies['mine:test']
    assert not remedies['mine:train']  # LoRAs are tuned on what the smallest class has


def test_sets_that_are_not_there(tmp_path):
    _, remedies = check(tmp_path, 'greek', 'nothing|DTD|pacs-photo')
    assert 'greek' not in remedies  # drawn, not read
    assert 'no class folders' in remedies['nothing'] and 'DTD' in remedies['DTD']
    assert 'pacs-photo is not below data_dir' in remedies['pacs-photo']


def test_a_table_of_ones_own_folders_in_one_command(tmp_path):
    make_own(tmp_path, 'mine', 9, [20, 24])
    make_own(tmp_path, 'other', 6, [20])
    given = dict(sources='mine:train', targets='other:test', data_dir=tmp_path, scale='smoke')
    given |= dict(backbone='miniature', methods='nn|average', shots='1|5', executor='here')
    given |= dict(out_dir=tmp_path / 'out', cache_dir=tmp_path / 'cache')
    run_cells('run_table.ipynb', **given)
    folder = tmp_path / 'out' / 'in_domain'
    rows = read_rows(folder)
    assert set(rows['dataset']) == {'other:test'} and set(rows['shot']) == {1, 5}
    assert rows['value'].min() > 30  # the classes are colours; one in five is a guess
    page = (folder / 'table.md').read_text()
    assert '`other:test` with LoRAs of mine:train' in page and 'Claims' not in page
    command = json.loads((folder / 'run.json').read_text())['command']
    assert '-p sources mine:train' in command and '-p data_dir data ' in command
