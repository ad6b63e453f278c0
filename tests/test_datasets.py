"Data sets in their real layouts, every kind of image, every error, downloads that break."

import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR100, EuroSAT, Flowers102
from torchvision.transforms import Resize

from lora_recycle.paper import datasets
from lora_recycle.suite import folders
from lora_recycle.paper.datasets import (
    ARCHIVES,
    Archive,
    check_set,
    download,
    fetch,
    inventory,
    open_set,
    read_set,
)
from lora_recycle.suite.episodes import EpisodeSize, draw_episodes
from lora_recycle.suite.folders import (
    FileSet,
    check_images,
    load,
    read_collection,
    read_folders,
)
from lora_recycle.suite.images import PAPER_SETS, SPLITS, class_splits, load_set
from lora_recycle.suite.photos import (
    PHOTO_SETS,
    deal_tiny_imagenet,
    find_photo_files,
    photo_splits,
    read_photos,
)
from lora_recycle.suite.reading import list_image_files, read_image, to_rgb, turn_upright

PER_CLASS = 4


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    "All sets, tiny, not to be changed by a test"
    return layouts.make_all(tmp_path_factory.mktemp('sets'), PER_CLASS)


@pytest.fixture
def root(shared, monkeypatch):
    layouts.trust(shared, monkeypatch)
    return shared


@pytest.fixture
def one(tmp_path, monkeypatch):
    "A function that makes one set in a folder of its own"

    def make(name, **kwargs):
        layouts.MAKERS[name](tmp_path, PER_CLASS, **kwargs)
        return tmp_path

    return make


# ---- the eight sets


@pytest.mark.parametrize('name', PAPER_SETS)
def test_set_has_all_classes_and_images(root, name):
    data, published = read_set(name, root), class_splits(name)
    assert len(data.classes) == sum(len(published[s]) for s in SPLITS) and len(
        set(data.classes)
    ) == len(data.classes)
    assert torch.bincount(data.labels, minlength=len(data.classes)).tolist() == [PER_CLASS] * len(
        data.classes
    )
    assert data.labels.dtype == torch.int64
    text = lambda c: published['names'][str(c)] if name == 'vgg_flower' else c
    for split in SPLITS:
        assert [data.classes[c] for c in data.splits[split]] == [text(c) for c in published[split]]
    images = data.images(torch.tensor([0, len(data) - 1]))
    assert images.shape == (2, 3, 224, 224) and images.dtype == torch.uint8


@pytest.mark.parametrize('name', PAPER_SETS)
def test_label_belongs_to_image(root, name):
    "The makers give each class a colour: the mean colour of an image tells its class"
    data, order = read_set(name, root), sorted(map(str, layouts.classes_of(name)))
    numbers = dict(vgg_flower=lambda c: c + 1).get(
        name,
        lambda c: (
            order.index(data.classes[c]) if name in ('cifar_fs', 'mini_imagenet', 'cub') else c
        ),
    )
    rows = torch.arange(0, len(data), max(1, len(data) // 40))
    mean = data.images(rows, side=16).float().mean((2, 3))
    for row, found in zip(rows.tolist(), mean):
        colour = torch.tensor(
            np.random.default_rng(numbers(int(data.labels[row]))).integers(40, 216, 3)
        ).float()
        if name == 'chestx':
            colour = (colour @ torch.tensor([0.299, 0.587, 0.114])).expand(3)
        assert (found - colour).abs().max() < 20, data.classes[data.labels[row]]


@pytest.mark.parametrize('name', PAPER_SETS)
def test_episodes_and_split(root, name):
    data = read_set(name, root)
    test = data.split('test')
    episodes = draw_episodes(test, 'test', 3, EpisodeSize(5, 1, 3))
    assert set(test.labels.tolist()) == set(data.splits['test']) and test.splits['train'] == ()
    assert (test.labels[episodes.query] == episodes.classes[:, :, None]).all()
    assert test.images(episodes.support[0], side=8).shape == (5, 1, 3, 8, 8)
    assert torch.equal(load(test, side=8).images[:3], test.images(range(3), side=8))
    with pytest.raises(ValueError, match='has 4 images, but shot'):
        draw_episodes(test, 'test', 1, EpisodeSize(5, 1))


def test_torchvision_reads_the_same(root):
    data, theirs = read_set('eurosat', root), EuroSAT(root)
    assert [str(root / p) for p in data.source] == [
        p for p, _ in theirs.samples
    ] and data.labels.tolist() == theirs.targets
    cifar, parts = read_set('cifar_fs', root), [CIFAR100(root, train=t) for t in (True, False)]
    assert len(cifar) == sum(map(len, parts)) and np.array_equal(
        np.asarray(parts[1][7][0]), cifar.source[len(parts[0]) + 7]
    )
    flowers = read_set('vgg_flower', root)
    image, label = Flowers102(root, split='train')[3]
    assert label == flowers.labels[3] and image.size == read_image(root / flowers.source[3]).size


def test_class_texts_stay_as_published(root):
    "CUB's label order is that of its numbered folders, flowers' that of the ids"
    assert read_set('cub', root).classes[:2] == (
        '001.Black_footed_Albatross',
        '002.Laysan_Albatross',
    )
    assert (
        read_set('vgg_flower', root).classes[0] == 'pink primrose'
        and read_set('vgg_flower', root).classes[-1] == 'blackberry lily'
    )


def test_chestx_filter(one):
    for parts, csv_name in ((False, 'Data_Entry_2017.csv'), (True, 'Data_Entry_2017_v2020.csv')):
        root = one('chestx', parts=parts, csv_name=csv_name)
        data = read_set('chestx', root)
        assert len(data) == 7 * PER_CLASS and 'Pneumonia' not in data.classes
        assert all(('images_00' in p) == parts for p in data.source)
        shutil.rmtree(root / 'chestx')


def test_mini_imagenet_parts_are_pooled(one):
    data = read_set('mini_imagenet', one('mini_imagenet', parts=True))
    assert len(data) == 100 * PER_CLASS
    wnid = class_splits('mini_imagenet')['train'][0]
    found = [p for p, c in zip(data.source, data.labels.tolist()) if data.classes[c] == wnid]
    assert {Path(p).parts[1] for p in found} == set(SPLITS) and all(
        Path(p).parts[2] == wnid for p in found
    )


def test_crop_diseases_leaves_the_test_folder_out(root):
    assert all(
        p.startswith('crop_diseases/dataset/train/') for p in read_set('crop_diseases', root).source
    )


def test_collection(root):
    found = read_collection(root / 'meta_dataset')
    assert list(found) == ['aircraft', 'omniglot']
    for data in found.values():
        assert {s: [data.classes[c] for c in data.splits[s]] for s in SPLITS} == {
            s: [f'{s}_{c}' for c in range(5)] for s in SPLITS
        }
        assert len(draw_episodes(data, 'val', 2, EpisodeSize(5, 1, 3))) == 2


def test_collection_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='<set>/<split>/<class>'):
        read_collection(tmp_path / 'none')
    layouts.make_collection(tmp_path, 1, sets=('birds',))
    birds = tmp_path / 'meta_dataset' / 'birds'
    layouts.write_image(birds / 'test' / 'train_0' / '0.png', 0, 0)
    with pytest.raises(ValueError, match='train_0 stands in two splits'):
        read_folders(birds)
    shutil.rmtree(birds / 'test' / 'train_0')
    (birds / 'extra').mkdir()
    with pytest.raises(ValueError, match='other folders'):
        read_folders(birds)
    (birds / 'extra').rmdir()
    (birds / 'val' / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'missing or empty \(empty\)'):
        read_folders(birds)


def test_flat_folder_is_for_testing(tmp_path):
    for c in 'ab':
        layouts.write_image(tmp_path / 'flat' / c / '0.png', 0, 0)
    assert read_folders(tmp_path / 'flat').splits == dict(train=(), val=(), test=(0, 1))


# ---- a set stays on disk


def test_images_are_read_when_asked(one, monkeypatch):
    data, opened = read_set('eurosat', one('eurosat')), []
    monkeypatch.setattr(folders, 'read_image', lambda path: opened.append(path) or read_image(path))
    data.split('test')
    draw_episodes(data, 'test', 2, EpisodeSize(5, 1, 3))
    assert not opened
    data.images([3, 1])
    assert len(opened) == 2


def test_order_and_shape_of_rows(root):
    data = read_set('cub', root)
    rows = torch.tensor([[700, 3], [3, 5]])
    images = data.images(rows, side=6)
    assert images.shape == (2, 2, 3, 6, 6) and torch.equal(images[0, 1], images[1, 0])
    assert torch.equal(images[1, 1], data.images([5], side=6)[0]) and data.images(
        [], side=6
    ).shape == (0, 3, 6, 6)


def test_squash_is_torchvisions_resize(tmp_path):
    path = layouts.write_image(tmp_path / 'a' / '0.png', 1, 1, size=(61, 37))
    expected = np.asarray(Resize((224, 224))(Image.open(path)))
    assert np.array_equal(read_folders(tmp_path).images([0])[0].permute(1, 2, 0).numpy(), expected)


def test_load_refuses_what_is_too_large(root):
    with pytest.raises(ValueError, match='limit_gb'):
        load(read_set('cub', root), limit_gb=0.1)


def test_digest_does_not_depend_on_the_place(one, tmp_path):
    root = one('isic')
    before = read_set('isic', root).digest
    shutil.copytree(root / 'isic', tmp_path / 'elsewhere' / 'isic')
    assert read_set('isic', tmp_path / 'elsewhere').digest == before
    path = Path(list_image_files(root / 'isic')[0])
    path.write_bytes(path.read_bytes() + b'x')
    assert read_set('isic', root).digest != before


def test_hidden_files_are_passed_over(one):
    root = one('eurosat')
    folder = root / 'eurosat' / '2750'
    (folder / '.DS_Store').touch()
    (folder / '__MACOSX').mkdir()
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / 'Forest' / '._Forest_1.jpg').write_bytes(b'x')
    assert len(read_set('eurosat', root)) == 10 * PER_CLASS


def test_file_set_checks_itself():
    with pytest.raises(ValueError, match='2 images but 1 labels'):
        FileSet('x', ('a', 'b'), torch.zeros(1), ('c',), dict(train=(), val=(), test=(0,)))
    with pytest.raises(ValueError, match='two splits'):
        FileSet('x', ('a',), torch.zeros(1), ('c',), dict(train=(0,), val=(), test=(0,)))


# ---- kinds of images


def png(path, pixels, colour, bits=16):
    "A png with 16 bits a channel, which Pillow cannot write in colour; uint16 [h,w,channels]"
    h, w = pixels.shape[:2]
    raw = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    chunk = lambda kind, data: (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    )
    head = struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + chunk(b'IDAT', zlib.compress(raw))
        + chunk(b'IEND', b'')
    )
    return path


def test_16_bit_is_scaled_not_clipped(tmp_path):
    grey = np.array([[[0], [256], [32768], [65535]]], dtype=np.uint16)
    got = np.asarray(read_image(png(tmp_path / 'grey.png', grey, 0)))
    assert got.tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]
    colour = np.array([[[65535, 32896, 0]]], dtype=np.uint16)
    assert np.asarray(read_image(png(tmp_path / 'rgb.png', colour, 2)))[0, 0].tolist() == [
        255,
        128,
        0,
    ]
    for dtype in ('<u2', '>u2'):
        Image.fromarray(grey[..., 0].astype(dtype)).save(tmp_path / 'grey.tif')
        assert np.asarray(read_image(tmp_path / 'grey.tif'))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('1', 'png'),
        ('L', 'png'),
        ('LA', 'png'),
        ('P', 'png'),
        ('P', 'gif'),
        ('RGBA', 'png'),
        ('RGB', 'jpg'),
        ('L', 'jpg'),
        ('CMYK', 'jpg'),
        ('CMYK', 'tif'),
        ('YCbCr', 'jpg'),
        ('RGB', 'webp'),
        ('I;16', 'png'),
        ('I', 'tif'),
    ],
)
def test_kinds_of_images(tmp_path, mode, suffix):
    "A white and a black half come out as such, and a colour where the kind has one"
    base, colourful = np.zeros((32, 32, 3), np.uint8), mode in ('RGB', 'RGBA', 'P', 'CMYK', 'YCbCr')
    base[:, 16:] = 255
    image = Image.fromarray(base)
    if colourful:
        image.paste((200, 30, 30), (0, 0, 16, 16))  # 16 pixels: a block of the jpeg's colours
    if mode[0] == 'I':
        image = Image.fromarray(
            (base[..., 0].astype(np.int32) * 257).astype(np.uint16 if mode == 'I;16' else np.int32)
        )
    else:
        image = image.convert(mode)
    (tmp_path / 'set' / 'a').mkdir(parents=True)
    image.save(tmp_path / 'set' / 'a' / f'0.{suffix}')
    got = read_folders(tmp_path / 'set').images([0], side=32)[0].int()
    assert got.shape == (3, 32, 32) and got[:, 20:, 20:].min() > 240 and got[:, 20:, :12].max() < 15
    if colourful:
        assert (
            got[:, :12, :12].float().mean((1, 2)) - torch.tensor([200.0, 30.0, 30.0])
        ).abs().max() < 12


def test_palette_with_transparency(tmp_path):
    image = Image.new('P', (4, 4))
    image.putpalette([10, 20, 30] + [0] * 765)
    image.save(tmp_path / 'p.png', transparency=b'\x00' * 256)
    warnings.simplefilter(
        'error'
    )  # Pillow warns where this kind goes straight to RGB; pytest restores the filter
    assert read_image(tmp_path / 'p.png').getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / 'p.png', background=None).getpixel((0, 0)) == (10, 20, 30)


def test_what_has_no_white_is_refused(tmp_path):
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / 'f.tif')
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / 'i.tif')
    with pytest.raises(ValueError, match='f.tif.*floats'):
        read_image(tmp_path / 'f.tif')
    with pytest.raises(ValueError, match='i.tif.*16 bits'):
        read_image(tmp_path / 'i.tif')


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(
        dict(
            empty=b'',
            text=b'<html>not found</html>',
            cut=content[: len(content) // 2],
            header=content[:20],
        )[how]
    )


@pytest.mark.parametrize('how', ['empty', 'text', 'cut', 'header'])
@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_damaged_image_is_named(tmp_path, how, suffix):
    for i in range(3):
        layouts.write_image(tmp_path / 'a' / f'{i}.{suffix}', 0, i, size=(40, 40))
    damage(tmp_path / 'a' / f'1.{suffix}', how)
    data = read_folders(tmp_path)
    assert len(data.images([0, 2])) == 2
    with pytest.raises(ValueError, match=f'1.{suffix} cannot be read as an image'):
        data.images([0, 1, 2])
    with pytest.raises(ValueError, match=f'1 of 3 images.*\n.*1.{suffix}'):
        check_images(data)
    check_images(data, rows=[0, 2])


def test_image_that_went_away_is_named(tmp_path):
    path = layouts.write_image(tmp_path / 'a' / '0.png', 0, 0)
    data = read_folders(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match='0.png is gone'):
        data.images([0])
    with pytest.raises(ValueError, match='0.png is gone'):
        check_images(data)


# ---- what is absent or wrong


@pytest.mark.parametrize('name', PAPER_SETS)
def test_absent_set_names_the_remedy(tmp_path, name):
    with pytest.raises(FileNotFoundError) as err:
        check_set(name, tmp_path / 'nothing')
    text = str(err.value)
    assert (
        datasets.PLACES[name].get in text
        and datasets.PLACES[name].put in text
        and str(tmp_path) in text
    )
    assert ('download(' in text) == (name in ARCHIVES)


@pytest.mark.parametrize(
    'name, folder',
    [
        ('cub', 'CUB_200_2011/images/001.Black_footed_Albatross'),
        ('eurosat', 'eurosat/2750/Forest'),
        ('crop_diseases', 'crop_diseases/dataset/train/Tomato___healthy'),
        ('mini_imagenet', 'mini_imagenet/n01532829'),
    ],
)
def test_wrong_classes_are_named(one, name, folder):
    root = one(name)
    shutil.rmtree(root / folder)
    count = sum(len(class_splits(name)[s]) for s in SPLITS)
    with pytest.raises(
        ValueError,
        match=f'{count - 1} class folders found, {count} expected: '
        f'1 missing or empty .{Path(folder).name}',
    ):
        read_set(name, root)
    (root / folder).mkdir()
    with pytest.raises(ValueError, match=f'missing or empty .{Path(folder).name}'):
        read_set(name, root)
    layouts.write_image(root / folder / '0.jpg', 0, 0)
    layouts.write_image((root / folder).with_name('Unicorn') / '0.jpg', 0, 0)
    with pytest.raises(ValueError, match=r'1 unknown \(Unicorn\)'):
        read_set(name, root)


def test_pickles_with_another_digest_are_not_opened(one, tmp_path):
    "Unpatched, torchvision refuses the tiny pickles; one that would write a file must not run"
    root = one('cifar_fs')

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'exploded'),)

    (root / 'cifar-100-python' / 'train').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='cifar-100-python/{train,test,meta}'):
        read_set('cifar_fs', root)
    assert not (tmp_path / 'exploded').exists()


def test_cifar_with_other_class_names(one, monkeypatch):
    root = one('cifar_fs')
    path = root / 'cifar-100-python' / 'meta'
    path.write_bytes(path.read_bytes().replace(b'crab', b'cray'))
    layouts.MAKERS['vgg_flower'](root, 1)
    layouts.trust(root, monkeypatch)
    with pytest.raises(ValueError, match='missing: crab'):
        read_set('cifar_fs', root)


def test_missing_flower_is_named(one, monkeypatch):
    root = one('vgg_flower')
    layouts.make_cifar(root, 2)
    layouts.trust(root, monkeypatch)
    (root / 'flowers-102' / 'jpg' / 'image_00005.jpg').unlink()
    with pytest.raises(ValueError, match='1 of 408 images are missing .*image_00005.jpg'):
        read_set('vgg_flower', root)


CSVS = dict(
    chestx='chestx/Data_Entry_2017.csv',
    isic='isic/ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv',
)


@pytest.mark.parametrize('name', CSVS)
@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'<html><body>\nlog in, please\n</body></html>',
        b'\xff\xfe\x00\x01,\x80',
        b'image,MEL\n"open',
        b'a,b\n1,2,3,4\n5',
    ],
)
def test_unreadable_csv_is_named(one, name, content):
    root = one(name)
    (root / CSVS[name]).write_bytes(content)
    with pytest.raises(ValueError, match=Path(CSVS[name]).name) as err:
        read_set(name, root)
    assert 'Fetch it again' in str(err.value) and datasets.PLACES[name].get in str(err.value)


def test_isic_row_without_one_class(one):
    root = one('isic')
    path = root / CSVS['isic']
    lines = path.read_text().splitlines()
    for bad in (
        '0.0,0.0,0.0,0.0,0.0,0.0,0.0',
        '1.0,1.0,0.0,0.0,0.0,0.0,0.0',
        'x,0.0,0.0,0.0,0.0,0.0,1.0',
    ):
        path.write_text('\n'.join([*lines[:2], f'ISIC_0024307,{bad}', *lines[3:]]))
        with pytest.raises(ValueError, match='ISIC_0024307 does not mark exactly one class'):
            read_set('isic', root)
    path.write_text('\n'.join([*lines, lines[1]]))
    with pytest.raises(ValueError, match='lists ISIC_0024306 twice'):
        read_set('isic', root)


@pytest.mark.parametrize('name', CSVS)
def test_csv_image_that_is_missing_is_named(one, name):
    root = one(name)
    gone = root / read_set(name, root).source[3]
    gone.unlink()
    with pytest.raises(
        ValueError, match=f'1 of 28 images that the csv lists are missing .{gone.name}'
    ):
        read_set(name, root)


def test_csv_beside_the_images_and_with_bom(one):
    root = one('isic')
    path = root / CSVS['isic']
    (root / 'isic' / path.name).write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    shutil.rmtree(path.parent)
    assert len(read_set('isic', root)) == 28


def test_unknown_name(tmp_path):
    for call in (read_set, check_set, download):
        with pytest.raises(ValueError, match="'cub'"):
            call('cubs', tmp_path)


@pytest.mark.parametrize('name', PAPER_SETS)
def test_counts_are_compared(root, name):
    data = check_set(name, root, least=PER_CLASS, exact=False)
    with pytest.raises(
        ValueError, match=f'{len(data)} images of {class_splits(name)["images"]["total"]}'
    ):
        check_set(name, root)
    with pytest.raises(ValueError, match='shot . n_query = 16 images a class are needed'):
        check_set(name, root, least=16, exact=False)


def test_right_counts_pass(monkeypatch, root):
    "A set whose counts are the published ones is complete; one image less is named with its class"
    monkeypatch.setattr(
        datasets,
        'class_splits',
        lambda name: (
            class_splits(name)
            | dict(images=dict(total=40, per_class=dict.fromkeys(class_splits(name)['test'], 4)))
        ),
    )
    data = check_set('eurosat', root, least=4)
    assert len(data) == 40
    less = FileSet(
        'eurosat', data.source[1:], data.labels[1:], data.classes, data.splits, data.root
    )
    assert datasets.count_differences(less) == [
        '39 images of 40',
        '1 classes differ: AnnualCrop 3 of 4',
    ]


def test_inventory(root, tmp_path):
    found = inventory(root).set_index('set')
    assert list(found.index) == list(PAPER_SETS) and (found.state == 'differs').all()
    assert found.loc['cub', ['classes', 'of_classes', 'images', 'of_images']].tolist() == [
        200,
        200,
        200 * PER_CLASS,
        11788,
    ]
    assert (
        'images of 60000' in found.loc['cifar_fs', 'missing']
        and found['get'].str.contains('http').all()
    )
    empty = inventory(tmp_path / 'none').set_index('set')
    assert (
        (empty.state == 'absent').all()
        and (empty.images == 0).all()
        and empty.missing.str.len().min() > 10
    )
    layouts.make_isic(tmp_path, 2)
    (tmp_path / CSVS['isic']).write_text('')
    assert inventory(tmp_path).set_index('set').loc['isic', 'state'] == 'wrong'


def test_other_processes_can_trust_the_tiny_sets(shared, tmp_path):
    folder = layouts.trust_file(shared, tmp_path)
    names = '("cifar_fs", "vgg_flower")'
    code = 'from lora_recycle.paper.datasets import read_set; '
    code += f'print(*(len(read_set(name, {str(shared)!r})) for name in {names}))'
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ['400', '408'], done.stderr


# ---- images from people: one reader


def write_exif(path, orientation, size=(8, 4)):
    "A photo, left half white, stored as the sensor lay."
    image = Image.new('RGB', size)
    image.paste('white', (0, 0, size[0] // 2, size[1]))
    note = Image.Exif()
    note[0x0112] = orientation
    image.save(path, exif=note, quality=95)
    return path


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
def test_orientation_is_followed(tmp_path, orientation, suffix):
    path = write_exif(tmp_path / f'x.{suffix}', orientation)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert('RGB')
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))


BAD_EXIF = [b'Exif\0\0not a header at all', b'Exif\0\0II*\0\xff\xff', b'Exif\0\0']


@pytest.mark.parametrize('raw', BAD_EXIF)
def test_damaged_exif_is_ignored_with_a_warning(tmp_path, raw):
    path = tmp_path / 'x.jpg'
    Image.new('RGB', (8, 4), 'red').save(path, exif=raw)
    with pytest.warns(UserWarning, match='x.jpg: its EXIF data are damaged'):
        assert read_image(path).size == (8, 4)


@pytest.mark.parametrize('info', ['a text', 7, {}])
def test_exif_that_is_no_bytes_is_ignored_with_a_warning(info):
    image = Image.new('RGB', (8, 4))
    image.info['exif'] = info
    with pytest.warns(UserWarning, match='not bytes'):
        assert turn_upright(image, 'mine').size == (8, 4)


@pytest.mark.parametrize('orientation', [9, 65000])
def test_orientation_that_does_not_exist_is_told(tmp_path, orientation):
    with pytest.warns(UserWarning, match=f'orientation is {orientation}'):
        assert read_image(write_exif(tmp_path / 'x.jpg', orientation)).size == (8, 4)


def test_sound_exif_gives_no_warning(tmp_path):
    empty = b'Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0'
    Image.new('RGB', (8, 4)).save(tmp_path / 'empty.jpg', exif=empty)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_image(write_exif(tmp_path / 'zero.jpg', 0))
        read_image(tmp_path / 'empty.jpg')
        read_image(layouts.write_image(tmp_path / 'none.png', 0, 0))


def test_a_data_set_and_the_reader_see_the_same(tmp_path):
    path = write_exif(tmp_path / 'a.jpg', 6)
    (tmp_path / 'set' / 'a').mkdir(parents=True)
    path.rename(tmp_path / 'set' / 'a' / 'a.jpg')
    data = read_folders(tmp_path / 'set')
    seen = read_image(tmp_path / 'set' / 'a' / 'a.jpg').resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(data.images([0], side=8)[0].permute(1, 2, 0).numpy(), np.asarray(seen))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'P', 'L', 'RGB', 'La', 'RGBa'])
def test_transparency_shows_white(mode):
    "Two logos, black on nothing, stay two pictures."
    marks = []
    for box in ((0, 0, 4, 8), (4, 0, 8, 8)):
        image = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), box)
        if mode in ('P', 'L', 'RGB'):  # one value is transparent
            inside = Image.new('L', (8, 8), 255)
            inside.paste(0, box)
            image = inside.convert(mode)
            image.info['transparency'] = (255, 255, 255) if mode == 'RGB' else 255
        elif mode == 'PA':
            alpha = image.getchannel('A')
            image = image.convert('RGB').convert('P')
            image.putalpha(alpha)
        elif mode == 'La':
            image = image.convert('LA').convert(mode)
        else:
            image = image.convert(mode)
        marks.append(np.asarray(to_rgb(image)))
    assert not np.array_equal(*marks) and {*np.unique(marks)} == {0, 255}


def test_transparency_on_another_colour_or_dropped():
    image = Image.new('RGBA', (2, 2), (0, 0, 255, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(image, 'red').getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(image, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert to_rgb(image, None).getpixel((0, 0)) == (0, 0, 255)


def test_integer_greys_have_their_own_white(tmp_path):
    levels = lambda white, kind: (np.array([[0, white]]).repeat(4, 0)).astype(kind)
    for white in (255, 65535):
        got = np.asarray(to_rgb(Image.fromarray(levels(white, np.int32))))
        assert got[0, :, 0].tolist() == [0, 255]
    Image.fromarray(levels(255, np.int32)).save(tmp_path / '32bit.tif')
    assert np.asarray(read_image(tmp_path / '32bit.tif'))[0, :, 0].tolist() == [0, 255]
    dark = png(tmp_path / 'dark.png', levels(255, np.uint16)[..., None], 0)
    assert np.asarray(read_image(dark))[0, :, 0].tolist() == [0, 1]  # a png's white is 65535
    (tmp_path / 'x.pgm').write_bytes(b'P5 2 1 4095\n\x00\x00\x0f\xff')
    assert np.asarray(read_image(tmp_path / 'x.pgm'))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize('bits, white', [(12, 4095), (10, 1023)])
def test_a_tiff_of_fewer_bits(bits, white):
    image = Image.fromarray(np.array([[0, white]], np.uint16))
    image.tag_v2 = {258: (bits,)}
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255]
    image.tag_v2 = {258: (bits,), 262: 0}  # white is zero
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 0]


def test_pixel_limit_is_named_with_the_way_to_raise_it(tmp_path, monkeypatch):
    path = layouts.write_image(tmp_path / 'a' / 'big.png', 0, 0, size=(60, 40))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ValueError, match='big.png.*limit is 1000 pixels') as err:
        read_image(path)
    assert 'MAX_IMAGE_PIXELS = ' in str(err.value) and 'Fetch' not in str(err.value)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10**9)  # the remedy works
    assert read_image(path).size == (60, 40)


@pytest.mark.parametrize('name', ['cat1.jgp', 'CAT1.JPG', 'cta1.jpg'])
def test_misspelt_path_comes_with_what_is_beside_it(tmp_path, name):
    layouts.write_image(tmp_path / 'cat1.jpg', 0, 0)
    layouts.write_image(tmp_path / 'zebra.jpg', 0, 0)
    with pytest.raises(FileNotFoundError, match=f'{name} is gone or misspelt') as err:
        read_image(tmp_path / name)
    assert 'Did you mean cat1.jpg?' in str(err.value) and 'zebra.jpg' in str(err.value)


def test_misspelt_folder_of_a_path(tmp_path):
    layouts.write_image(tmp_path / 'photos' / 'cat.jpg', 0, 0)
    with pytest.raises(FileNotFoundError, match='Did you mean photos'):
        read_image(tmp_path / 'fotos' / 'cat.jpg')
    with pytest.raises(FileNotFoundError, match='Did you mean photos'):
        read_folders(tmp_path / 'photo')


@pytest.mark.parametrize(
    'name, word',
    [('x.heic', 'pillow-heif'), ('x.svg', 'export it as PNG'), ('x.pdf', 'pages, not pixels')],
)
def test_other_kinds_of_files_have_a_remedy(tmp_path, name, word):
    (tmp_path / name).write_bytes(b'whatever')
    with pytest.raises(ValueError, match=word):
        read_image(tmp_path / name)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ValueError, match='It is a folder'):
        read_image(tmp_path)


# ---- images from people: folders


def make_tree(root, *places):
    "One picture of its own at each of `places`."
    for i, place in enumerate(places):
        layouts.write_image(Path(root) / place, i, i)
    return Path(root)


@pytest.mark.parametrize('junk', ['.ipynb_checkpoints', '@eaDir', '__MACOSX', '.AppleDouble'])
@pytest.mark.parametrize('at', ['', 'a', 'a/deep', 'train', 'train/a'])
def test_system_folders_are_skipped_at_every_depth(tmp_path, junk, at):
    split = at.startswith('train')
    sound = ('train/a/0.png', 'test/b/0.png') if split else ('a/0.png', 'b/0.png', 'a/deep/1.png')
    make_tree(tmp_path, *sound, f'{at}/{junk}/0.png'.lstrip('/'))
    with pytest.warns(UserWarning, match='1 hidden or system folders'):
        data = read_folders(tmp_path)
    assert data.classes == ('a', 'b') and len(data) == len(sound)


def test_links_are_not_walked_twice(tmp_path):
    make_tree(tmp_path / 'set', 'a/0.png', 'b/0.png')
    make_tree(tmp_path / 'elsewhere', '7.png', '8.png')
    (tmp_path / 'set' / 'a' / 'up').symlink_to(tmp_path / 'set')
    (tmp_path / 'set' / 'a' / 'other').symlink_to(tmp_path / 'set' / 'b')
    (tmp_path / 'set' / 'a' / 'same.png').symlink_to(tmp_path / 'set' / 'a' / '0.png')
    (tmp_path / 'set' / 'c').symlink_to(tmp_path / 'elsewhere')  # a class that lies elsewhere
    (tmp_path / 'set' / 'b' / 'again').symlink_to(tmp_path / 'elsewhere')
    with pytest.warns(UserWarning, match='4 links to what is read anyway'):
        data = read_folders(tmp_path / 'set')
    assert data.classes == ('a', 'b', 'c') and len(data) == 4


def test_links_into_a_hidden_pool_are_read(tmp_path):
    make_tree(tmp_path, '.pool/0.png', '.pool/1.png', 'a/2.png')
    (tmp_path / 'b').mkdir()
    for i in range(2):
        (tmp_path / 'b' / f'{i}.png').symlink_to(tmp_path / '.pool' / f'{i}.png')
    with pytest.warns(UserWarning, match='hidden'):
        assert read_folders(tmp_path).labels.bincount().tolist() == [1, 2]


def test_equal_pictures_are_reported(tmp_path):
    make_tree(tmp_path, 'a/0.png', 'a/1.png', 'b/2.png')
    shutil.copy(tmp_path / 'a' / '0.png', tmp_path / 'a' / 'copy.png')
    shutil.copy(tmp_path / 'a' / '1.png', tmp_path / 'b' / 'copy.png')
    with pytest.warns(UserWarning, match='2 pictures stand there more than once') as caught:
        assert len(read_folders(tmp_path)) == 5
    assert 'a/0.png = a/copy.png' in str(caught[-1].message)


def test_every_usual_name_of_an_image_is_read(tmp_path):
    names = ('a.jfif', 'b.JPE', 'c', 'd.jpg', 'e.JPEG', 'f.download', 'g.webp', 'h.Tif')
    kinds = dict(g='WEBP', h='TIFF', c='PNG', f='BMP')
    (tmp_path / 'a').mkdir()
    for i, name in enumerate(names):
        image = Image.fromarray(layouts.picture(i, i))
        image.save(tmp_path / 'a' / name, format=kinds.get(name[0], 'JPEG'))
    for name in ('notes.txt', 'labels.csv', 'BM.md'):
        (tmp_path / 'a' / name).write_text('BM is a text too')
    for name in ('.DS_Store', 'Thumbs.db', 'desktop.ini'):
        (tmp_path / 'a' / name).write_bytes(b'x')
    with pytest.warns(UserWarning, match='3 files that are no images') as caught:
        data = read_folders(tmp_path)
    assert len(data) == len(names) and data.images(range(len(names)), 8).shape[0] == len(names)
    assert 'notes.txt' in str(caught[0].message) and 'Thumbs' not in str(caught[0].message)


@pytest.mark.parametrize(
    'parts',
    [('Training', 'Test'), ('TRAIN', 'val', 'TEST'), ('train', 'Validation', 'testing')],
)
def test_split_folders_in_any_case(tmp_path, parts):
    places = [f'{part}/class_{i}{c}/0.png' for i, part in enumerate(parts) for c in 'xy']
    data = read_folders(make_tree(tmp_path, *places))
    sizes = [len(data.splits[s]) for s in SPLITS]
    assert sizes == ([2, 0, 2] if len(parts) == 2 else [2, 2, 2])


def test_a_split_by_image_is_pooled(tmp_path):
    make_tree(tmp_path, 'train/cat/0.png', 'train/dog/1.png', 'test/cat/2.png', 'test/dog/3.png')
    with pytest.warns(UserWarning, match='split is not by class'):
        data = read_folders(tmp_path)
    assert data.splits['test'] == (0, 1) and data.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('names', [('bus', 'car', 'train'), ('test', 'exam'), ('Val', 'Base', 'x')])
def test_a_class_may_be_called_as_a_split(tmp_path, names):
    data = read_folders(make_tree(tmp_path, *(f'{name}/0.png' for name in names)))
    assert data.classes == tuple(sorted(names)) and len(data.splits['test']) == len(names)


@pytest.mark.parametrize('parts', [('train', 'val'), ('Train', 'Test', 'Valid'), ('testing',)])
def test_flat_split_folders_are_refused(tmp_path, parts):
    make_tree(tmp_path, *(f'{part}/{i}.png' for part in parts for i in range(3)))
    with pytest.raises(ValueError, match='no class folders, so nothing says') as err:
        read_folders(tmp_path)
    assert '<split>/<class>/*.jpg' in str(err.value) and '(3 images)' in str(err.value)


@pytest.mark.parametrize('above', ['photos', 'photos/photos', 'train/photos'])
def test_one_level_too_high(tmp_path, above):
    make_tree(tmp_path, *(f'{above}/{c}/{i}.png' for c in ('cat', 'dog') for i in range(2)))
    with pytest.raises(ValueError, match='level too high') as err:
        read_folders(tmp_path)
    assert "folder='" in str(err.value) and above.split('/')[-1] + '/' in str(err.value)
    assert read_folders(tmp_path / above).classes == ('cat', 'dog')  # the remedy works


def test_one_level_too_low(tmp_path):
    make_tree(tmp_path, 'photos/cat/0.png', 'photos/dog/1.png', 'wrapped/cat/images/0.png')
    for low in ('photos/cat', 'wrapped/cat'):
        with pytest.raises(ValueError, match='level too low') as err:
            read_folders(tmp_path / low)
    assert 'cat/' in str(err.value)


def test_level_says_what_a_class_is(tmp_path):
    make_tree(tmp_path, *(f'{a}/{c}/0.png' for a in ('Greek', 'Latin') for c in ('c1', 'c2', 'c3')))
    assert read_folders(tmp_path, level=1).classes == ('Greek', 'Latin')
    assert read_folders(tmp_path, level=2).classes[:2] == ('Greek/c1', 'Greek/c2')
    with pytest.raises(ValueError, match='level=3'):
        read_folders(tmp_path, level=3)


def test_classes_wrapped_in_a_folder_each(tmp_path):
    make_tree(tmp_path, *(f'{c}/images/{i}.png' for c in ('n01', 'n02') for i in range(2)))
    assert read_folders(tmp_path).classes == ('n01', 'n02')


def test_two_folders_for_one_split(tmp_path):
    make_tree(tmp_path, 'val/a/0.png', 'valid/b/0.png')
    with pytest.raises(ValueError, match='two folders stand for val'):
        read_folders(tmp_path)


# ---- photos, and the door to every set


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    "The archives of real images, tiny, not to be changed by a test"
    root = tmp_path_factory.mktemp('photos')
    layouts.make_photos(root)
    return root


CLASSES = {'tiny-imagenet': 60, 'caltech101': 19, 'gtsrb': 12, 'omniglot': 18}


@pytest.mark.parametrize('name', PHOTO_SETS)
def test_photos_in_their_published_layouts(photos, name):
    data = read_photos(name, photos, side=16)
    assert len(data.classes) == CLASSES.get(name, 6) == len(set(data.classes))
    per_class = 8 if name == 'gtsrb' else 4
    assert data.labels.bincount().tolist() == [per_class] * len(data.classes)
    assert data.images.shape[1:] == (3, 16, 16) and data.images.dtype == torch.uint8
    assert sorted(sum(data.splits.values(), ())) == list(range(len(data.classes)))
    assert all(data.splits.values()) or name.startswith('pacs-') and len(data.splits['test']) == 6
    few = read_photos(name, photos, side=8, per_class=2)
    assert few.labels.bincount().tolist() == [2] * len(data.classes)
    if name == 'gtsrb':
        assert len(few.groups.unique()) == len(few.groups)  # frames of as many films as there are


def test_an_alphabet_in_two_parts_of_omniglot_is_there_once(tmp_path):
    "As Greek and Latin are in the published small1 and small2; what only one part has stays"
    one = 'images_background_small1/Greek/character01'
    two = 'images_background_small2/Greek/character01'
    make_tree(tmp_path, f'{one}/0394_01.png', f'{one}/0394_02.png')
    shutil.copytree(tmp_path / one, tmp_path / two)
    shutil.copy(tmp_path / one / '0394_01.png', tmp_path / two / '0394_03.png')
    make_tree(tmp_path, 'images_background_small2/Latin/character01/0684_01.png')
    data = open_set('omniglot', tmp_path)
    assert data.classes == ('Greek/character01', 'Latin/character01')
    assert data.labels.bincount().tolist() == [3, 1]


def test_tables_show_no_class_that_the_backbone_saw(photos):
    seen, dealt = photo_splits(), deal_tiny_imagenet()
    assert [len(seen[s]) for s in ('train', 'validation', 'test')] == [140, 20, 40]
    assert [len(dealt[s]) for s in SPLITS] == [30, 10, 20]
    assert not set(sum(dealt.values(), ())) & set(seen['train'])
    assert set(dealt['test']) <= set(seen['test'])
    assert set(dealt['val']) <= set(seen['validation'])
    files = find_photo_files('tiny-imagenet', photos)
    assert not {Path(p).parts[2] for p in files.source} & set(seen['train'])
    assert (
        'n0' not in files.classes[0]
        and BACKGROUND not in find_photo_files('caltech101', photos).classes
    )


BACKGROUND = 'BACKGROUND_Google'


@pytest.mark.parametrize('shot', [1, 2, 3])
def test_frames_of_a_film_are_not_on_both_sides(photos, shot):
    data = read_photos('gtsrb', photos, side=8)
    tasks = draw_episodes(data, 'train', 20, EpisodeSize(3, shot, 3))
    assert (data.labels[tasks.query] == tasks.classes[:, :, None]).all()
    for support, query in zip(tasks.support.flatten(0, 1), tasks.query.flatten(0, 1)):
        assert len(support.unique()) == shot and len(query.unique()) == 3
        assert not set(data.groups[support].tolist()) & set(data.groups[query].tolist())
    test = data.split('test')
    assert len(test.groups) == len(test.labels)


def test_too_few_films_are_told(photos):
    data = read_photos('gtsrb', photos, side=8)
    with pytest.raises(ValueError, match='8 frames of 4 films, too few for 1 supports and 7'):
        draw_episodes(data, 'train', 1, EpisodeSize(3, 1, 7))


@pytest.mark.parametrize('name', PHOTO_SETS)
def test_absent_photos_say_where_they_are_looked_for(tmp_path, name):
    (tmp_path / 'holidays').mkdir()
    with pytest.raises(FileNotFoundError, match=f'{name} is not below data_dir') as err:
        read_photos(name, tmp_path)
    assert 'holidays' in str(err.value) and '<' in str(err.value)


def test_half_unpacked_tiny_imagenet(tmp_path):
    wnid = deal_tiny_imagenet()['test'][0]
    layouts.write_image(tmp_path / 'tiny-imagenet-200' / 'train' / wnid / 'images' / '0.JPEG', 0, 0)
    with pytest.raises(ValueError, match='59 of 60 classes are missing'):
        read_photos('tiny-imagenet', tmp_path)
    with pytest.raises(ValueError, match='tiny-imagenet'):
        read_photos('imagenet', tmp_path)


def test_open_set_knows_every_kind(root, photos, tmp_path):
    assert len(open_set('greek', per_class=2).classes) == len(load_set('greek').classes)
    cub = open_set('cub', root, side=16, per_class=2)
    assert cub.labels.bincount().tolist() == [2] * 200 and len(cub.splits['train']) == 100
    sketch = open_set('pacs-sketch', photos, side=16)
    assert sketch.splits['test'] == tuple(range(6))
    assert open_set('pacs-photo:train', photos).splits == dict(
        train=tuple(range(6)), val=(), test=()
    )
    own = open_set('PACS/photo', photos, side=16)
    assert own.name == 'PACS/photo' and len(own.classes) == 6
    assert [len(own.splits[s]) for s in SPLITS] == [4, 1, 1]
    make_tree(tmp_path, 'mine/train/a/0.png', 'mine/test/b/1.png')
    assert open_set('mine', tmp_path).splits == dict(train=(0,), val=(), test=(1,))


def test_open_set_is_fresh_after_a_change(tmp_path):
    make_tree(tmp_path, 'mine/a/0.png', 'mine/b/1.png')
    first = open_set('mine', tmp_path, side=8)
    assert torch.equal(open_set('mine', tmp_path, side=8).images, first.images)
    Image.new('RGB', (30, 30), 'red').save(tmp_path / 'mine' / 'a' / '0.png')
    assert open_set('mine', tmp_path, side=8).images[0, :, 0, 0].tolist() == [255, 0, 0]


def test_open_set_errors(tmp_path):
    make_tree(tmp_path, 'flowers/a/0.png')
    with pytest.raises(FileNotFoundError, match='Did you mean flowers.*Known names: greek'):
        open_set('flower', tmp_path)
    with pytest.raises(ValueError, match='data_dir is None'):
        open_set('flowers')
    with pytest.raises(ValueError, match="'train'"):
        open_set('flowers:trian', tmp_path)
    with pytest.raises(ValueError, match=r'level too high[\s\S]*data_dir'):
        make_tree(tmp_path, 'nest/in/a/1.png', 'nest/in/b/2.png')
        open_set('nest', tmp_path)


# ---- downloads, from a server on this machine


class Handler(BaseHTTPRequestHandler):
    "Sends `server.files`; breaks off after `server.cut` bytes while `server.breaks` lasts"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path.strip('/'))
        server.asked.append((self.path.strip('/'), self.headers.get('Range')))
        if server.status:
            return self.send_error(server.status.pop())
        if body is None:
            return self.send_error(404)
        start = int(self.headers['Range'][6:-1]) if 'Range' in self.headers and server.ranges else 0
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        broken, server.breaks = server.breaks > 0, server.breaks - 1
        self.wfile.write(body[start : start + server.cut] if broken else body[start:])


@pytest.fixture
def server():
    made = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    made.files, made.asked, made.status, made.cut, made.breaks, made.ranges = (
        {},
        [],
        [],
        1000,
        0,
        True,
    )
    made.url = f'http://127.0.0.1:{made.server_port}/'
    thread = threading.Thread(
        target=made.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
    )
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


BLOB = np.random.default_rng(0).bytes(3_000_000)
MD5, SHA = hashlib.md5(BLOB).hexdigest(), hashlib.sha256(BLOB).hexdigest()


def test_fetch_whole(server, tmp_path):
    server.files['x.bin'] = BLOB
    path = fetch(server.url + 'x.bin', tmp_path / 'new' / 'x.bin', md5=MD5.upper(), sha256=SHA)
    assert path.read_bytes() == BLOB and [p.name for p in path.parent.iterdir()] == ['x.bin']
    assert (
        fetch(server.url + 'x.bin', path, sha256=SHA) == path and len(server.asked) == 1
    )  # not fetched twice


@pytest.mark.parametrize('ranges', [True, False])
def test_fetch_goes_on_after_breaks(server, tmp_path, ranges):
    server.files['x.bin'], server.breaks, server.cut, server.ranges = BLOB, 2, 1_000_000, ranges
    assert fetch(server.url + 'x.bin', tmp_path / 'x.bin', sha256=SHA, wait=0).read_bytes() == BLOB
    assert [r for _, r in server.asked] == [
        None,
        'bytes=1000000-',
        'bytes=2000000-' if ranges else 'bytes=1000000-',
    ]


def test_fetch_goes_on_in_another_call(server, tmp_path):
    server.files['x.bin'], server.breaks, server.cut = BLOB, 2, 1_000_000
    with pytest.raises(ConnectionError, match='x.bin.part; call again'):
        fetch(server.url + 'x.bin', tmp_path / 'x.bin', sha256=SHA, tries=2, wait=0)
    assert (
        not (tmp_path / 'x.bin').exists() and (tmp_path / 'x.bin.part').stat().st_size == 2_000_000
    )
    assert fetch(server.url + 'x.bin', tmp_path / 'x.bin', sha256=SHA).read_bytes() == BLOB
    assert server.asked[-1][1] == 'bytes=2000000-'


def test_fetch_after_a_kill_before_the_rename(server, tmp_path):
    server.files['x.bin'] = BLOB
    (tmp_path / 'x.bin.part').write_bytes(BLOB)
    assert fetch(server.url + 'x.bin', tmp_path / 'x.bin', md5=MD5).read_bytes() == BLOB


def test_fetch_starts_again_where_the_part_is_too_long(server, tmp_path):
    server.files['x.bin'] = BLOB
    (tmp_path / 'x.bin.part').write_bytes(BLOB + b'more')
    assert fetch(server.url + 'x.bin', tmp_path / 'x.bin').read_bytes() == BLOB


@pytest.mark.parametrize('kind', ['md5', 'sha256'])
def test_wrong_digest(server, tmp_path, kind):
    server.files['x.bin'] = BLOB
    with pytest.raises(ValueError, match=f'{kind} .*thrown away'):
        fetch(server.url + 'x.bin', tmp_path / 'x.bin', **{kind: '0' * 32})
    assert not list(tmp_path.iterdir())
    (tmp_path / 'x.bin').write_bytes(b'mine')
    with pytest.raises(ValueError, match='Delete it'):
        fetch(server.url + 'x.bin', tmp_path / 'x.bin', **{kind: '0' * 32})
    assert (tmp_path / 'x.bin').read_bytes() == b'mine'


def test_part_of_another_edition_is_thrown_away(server, tmp_path):
    server.files['x.bin'] = BLOB
    (tmp_path / 'x.bin.part').write_bytes(b'old' * 100)
    with pytest.raises(ValueError, match='thrown away'):
        fetch(server.url + 'x.bin', tmp_path / 'x.bin', md5=MD5)
    assert fetch(server.url + 'x.bin', tmp_path / 'x.bin', md5=MD5).read_bytes() == BLOB


def test_refusals(server, tmp_path):
    with pytest.raises(ConnectionError, match='404'):
        fetch(server.url + 'none', tmp_path / 'x', wait=0)
    assert len(server.asked) == 1  # a refusal is not asked again
    server.files['x'], server.status = BLOB, [503, 429]
    assert fetch(server.url + 'x', tmp_path / 'x', wait=0).read_bytes() == BLOB
    with pytest.raises(ValueError, match='http://'):
        fetch('file:///etc/passwd', tmp_path / 'y')
    with pytest.raises(ConnectionError, match='call again'):
        fetch('http://127.0.0.1:9/x', tmp_path / 'y', tries=2, wait=0)


MEMBERS = {
    'cifar-100-python.tar.gz': 'cifar-100-python',
    '102flowers.tgz': 'jpg',
    'CUB_200_2011.tgz': 'CUB_200_2011',
    'EuroSAT.zip': '2750',
    'ISIC2018_Task3_Training_GroundTruth.zip': 'ISIC2018_Task3_Training_GroundTruth',
    'ISIC2018_Task3_Training_Input.zip': 'ISIC2018_Task3_Training_Input',
}


def packed(source, archive, folder):
    "The content of `archive` as its publisher would pack the tiny set below `source`"
    file = Path(archive.path).name
    if archive.unpack is None:
        return (source / archive.path).read_bytes()
    kind = 'zip' if file.endswith('.zip') else 'gztar'
    return Path(
        shutil.make_archive(str(folder / file), kind, source / archive.unpack, MEMBERS[file])
    ).read_bytes()


@pytest.mark.parametrize('name', ARCHIVES)
def test_download_unpacks_and_reads(server, tmp_path, monkeypatch, name):
    source, root, archives = tmp_path / 'source', tmp_path / 'root', []
    for made in {name, 'cifar_fs', 'vgg_flower'}:
        layouts.MAKERS[made](source, 2)
    layouts.trust(source, monkeypatch)
    for old in ARCHIVES[name]:
        file = Path(old.path).name
        server.files[file] = packed(source, old, tmp_path)
        archives.append(
            Archive(
                server.url + file,
                old.path,
                old.md5 and hashlib.md5(server.files[file]).hexdigest(),
                old.unpack,
            )
        )
    place = datasets.PLACES[name]
    monkeypatch.setitem(
        datasets.PLACES, name, datasets.Origin(place.get, place.put, tuple(archives))
    )
    data = download(name, root)
    assert len(data) == 2 * len(data.classes) and data.digest == read_set(name, source).digest
    first = next(a for a in archives if a.unpack is not None)
    unpacked = root / first.unpack / MEMBERS[Path(first.path).name]
    shutil.rmtree(unpacked)
    asked = len(server.asked)
    assert (
        len(download(name, root)) == len(data) and len(server.asked) == asked
    )  # unpacked again, not fetched again
    whole = (root / first.path).read_bytes()
    for bad in (whole[: len(whole) // 2], whole[:60] + bytes(20) + whole[80:]):
        (root / first.path).write_bytes(bad)
        with pytest.raises(ValueError, match='Delete it'):
            download(name, root)


@pytest.mark.parametrize('suffix, old', [('tar.gz', False), ('tar.gz', True), ('zip', False)])
def test_archive_cannot_write_outside(tmp_path, monkeypatch, suffix, old):
    "Nor where `tarfile` has no filters, as in Python 3.11.2"
    if old:
        monkeypatch.delattr(tarfile, 'data_filter', raising=False)
    path = tmp_path / f'evil.{suffix}'
    (tmp_path / 'x').write_text('x')
    if suffix == 'zip':
        with zipfile.ZipFile(path, 'w') as file:
            file.write(tmp_path / 'x', '../outside')
    else:
        with tarfile.open(path, 'w:gz') as file:
            file.add(tmp_path / 'x', '../outside')
    (tmp_path / 'into').mkdir()
    try:
        datasets._unpack(path, tmp_path / 'into')
    except ValueError as err:
        assert 'cannot be unpacked' in str(err)
    assert not (tmp_path / 'outside').exists()


@pytest.mark.parametrize('name', [n for n in PAPER_SETS if n not in ARCHIVES])
def test_download_by_hand_only(tmp_path, name):
    with pytest.raises(ValueError, match='account or a licence') as err:
        download(name, tmp_path)
    assert datasets.PLACES[name].get in str(err.value)


def test_archives_are_torchvisions():
    assert (ARCHIVES['cifar_fs'][0].url, ARCHIVES['cifar_fs'][0].md5) == (
        CIFAR100.url,
        CIFAR100.tgz_md5,
    )
    known = {
        Flowers102._download_url_prefix + file: md5 for file, md5 in Flowers102._file_dict.values()
    }
    assert {a.url: a.md5 for a in ARCHIVES['vgg_flower']} == known
