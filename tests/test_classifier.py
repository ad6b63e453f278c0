"The estimator takes images and labels of any kind or says what is wrong; what is saved comes back."

import json
import pickle
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from tiny import SIDE, noise, tiny, tiny_market

import lora_recycle
from lora_recycle.use import classifier
from lora_recycle.use.classifier import FewShotClassifier, PrototypeClassifier
from lora_recycle.core import digest, generator, save_tensors
from lora_recycle.use.calibration import measure_spread, squared_distances
from lora_recycle.use.inputs import image_tensor
from lora_recycle.suite.evaluate import embed, nearest_prototype
from lora_recycle.suite.episodes import Episodes
from lora_recycle.suite.images import load_set
from lora_recycle.method.lora import LoRA, new_lora


@pytest.fixture(scope='module')
def backbone():
    return tiny()


@pytest.fixture(scope='module')
def lora():
    return tiny_market(1).map(lambda t: t[0])


# scikit-learn's checks: everything but the encoder, on tables of numbers

SKIPPED = dict(
    check_classifiers_regression_target='labels may be of any hashable type, 0.5 among them',
    check_supervised_y_2d='a column of labels is refused, not flattened with a warning',
)


@parametrize_with_checks([PrototypeClassifier()], expected_failed_checks=lambda e: SKIPPED)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_clone_and_parameters(backbone, lora):
    model = FewShotClassifier(backbone, lora, temperature=2.0).fit(noise(2), [0, 1])
    copy = clone(model)
    assert (
        copy.backbone is backbone
        and copy.meta_lora is lora
        and copy.temperature == 2.0
        and not hasattr(copy, 'classes_')
    )
    assert repr(copy) == 'FewShotClassifier(tiny, LoRA of rank 3, temperature=2.0)'
    assert (
        copy.set_params(temperature=3.0).get_params()['temperature'] == 3.0
        and model.temperature == 2.0
    )


def test_before_fit(backbone, tmp_path):
    model = FewShotClassifier(backbone)
    for use in (
        lambda: model.predict(noise(1)),
        lambda: model.predict_proba(noise(1)),
        lambda: model.score(noise(1), [0]),
        lambda: model.save(tmp_path / 'x'),
    ):
        with pytest.raises(NotFittedError):
            use()
    assert not [k for k in vars(model) if k.endswith('_')]


def test_grid_search_over_temperatures(backbone):
    images = np.moveaxis(noise(12).numpy(), 1, -1)
    found = GridSearchCV(
        FewShotClassifier(backbone), dict(temperature=[0.5, 2.0]), cv=2, error_score='raise'
    ).fit(images, list('ab') * 6)
    assert found.best_estimator_.predict(images).shape == (12,)


# images


def pil(mode='RGB', size=(SIDE, SIDE)):
    gradient = Image.fromarray(
        np.linspace(0, 255, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    ).resize(size)
    return gradient.quantize(16) if mode == 'P' else gradient.convert(mode)


def test_forms_of_one_image_agree(tmp_path):
    image = pil()
    array = np.array(image)
    image.save(tmp_path / 'image.png')
    chw = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        image,
        array,
        array[::-1][::-1],
        np.asfortranarray(array),
        array / 255,
        (array / 255).astype('>f4'),
        (array.astype(np.uint16) * 257).astype('>u2'),
        chw,
        chw / 255,
        (chw / 255).double(),
        str(tmp_path / 'image.png'),
        tmp_path / 'image.png',
        np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        image.convert('RGBA'),
        (chw.to(torch.int32) * 257).to(torch.uint16),
    ]
    for form in forms:
        torch.testing.assert_close(image_tensor(form, SIDE), chw / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    'mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16']
)
def test_modes(backbone, mode):
    image = (
        Image.fromarray(np.array(pil('L')).astype(np.uint16) * 257) if mode == 'I;16' else pil(mode)
    )
    near = image_tensor(image, SIDE)
    assert near.shape == (3, SIDE, SIDE) and near.dtype == torch.float32
    if mode not in ('1',):
        assert (near.mean() - image_tensor(pil(), SIDE).mean()).abs() < 0.1
    assert FewShotClassifier(backbone).fit([image, pil('L', (50, 20))], ['a', 'b']).predict(
        image
    ) == ['a']


def test_16_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    for form in (Image.fromarray(ramp), tmp_path / 'ramp.png', ramp, ramp[..., None]):
        assert (
            image_tensor(form, SIDE)[0] - torch.from_numpy(ramp / 65535).float()
        ).abs().max() < 0.003


def test_grey_and_truth():
    grey = np.array(pil('L'))
    for form in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        torch.testing.assert_close(image_tensor(form, SIDE)[2], torch.from_numpy(grey) / 255)
    assert image_tensor(grey > 100, SIDE).unique().tolist() == [0.0, 1.0]


def test_photos_are_turned_as_the_camera_noted(tmp_path):
    photo = Image.fromarray(
        np.vstack([np.zeros((8, 16, 3), np.uint8), np.full((8, 16, 3), 255, np.uint8)])
    )
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(tmp_path / 'photo.jpg', exif=exif, quality=95)
    for form in (tmp_path / 'photo.jpg', Image.open(tmp_path / 'photo.jpg')):
        assert image_tensor(form, SIDE)[:, :2].mean() > 0.9


def test_resizing_squashes_with_antialias():
    stripes = np.tile(
        np.array([0, 255], np.uint8), (64, 32)
    )  # finer than the target: grey, not black or white
    assert (image_tensor(stripes, SIDE) - 0.5).abs().max() < 0.02
    half = np.zeros((10, 300), np.uint8)
    half[:, 150:] = 255  # nothing is cropped
    found = image_tensor(half, SIDE)
    assert found[:, :, :3].max() < 0.05 and found[:, :, 5:].min() > 0.95
    assert image_tensor(np.full((1, 1), 200, np.uint8), SIDE).unique().numel() == 1


@pytest.mark.parametrize(
    'bad, says',
    [
        (torch.full((3, 8, 8), float('nan')), 'NaN'),
        (np.full((8, 8), np.inf), 'infinity'),
        (np.full((8, 8), 200.0), 'must lie in'),
        (np.full((8, 8), -0.1), 'must lie in'),
        (np.full((8, 8), 1e300), 'infinity'),
        (np.zeros((3, 8, 8)), 'shape'),
        (np.zeros((8, 8), np.int64), 'int64'),
        (np.zeros((8, 8), complex), 'complex'),
        (np.zeros((0, 8, 3)), 'shape'),
        (torch.zeros(2, 8, 8), 'shape'),
        (torch.zeros(1, 3, 8, 8), 'shape'),
        (np.zeros((8, 8, 2)), 'shape'),
        (None, 'NoneType'),
        ([[0.0]], 'list'),
        (pil('L').convert('F'), 'F'),
    ],
)
def test_bad_images_are_named(backbone, bad, says):
    with pytest.raises(ValueError, match=f'image 1: .*{says}'):
        FewShotClassifier(backbone).fit([pil(), bad], ['a', 'b'])


def test_bad_files_are_named(backbone, tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    Image.fromarray(np.moveaxis(noise(1, 90)[0].numpy(), 0, -1)).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:-2000])
    model = FewShotClassifier(backbone).fit([pil()], [0])
    for name in ('text.png', 'cut.png'):
        with pytest.raises(ValueError, match=f'image 0: .*{name}'):
            model.predict(tmp_path / name)
    with pytest.raises(ValueError, match='cannot be made RGB'):
        model.predict(Image.open(tmp_path / 'cut.png'))
    with pytest.raises(FileNotFoundError, match='image 0'):
        model.predict(str(tmp_path / 'none.png'))


@pytest.mark.parametrize('images', [3.0, None, {'a': 1}, {1}])
def test_what_is_no_list_of_images(backbone, images):
    with pytest.raises(ValueError, match='images is a'):
        FewShotClassifier(backbone).fit(images, ['a'])


def test_one_image_at_a_time(backbone, tmp_path):
    images = noise(6)
    model = FewShotClassifier(backbone)
    for i, image in enumerate(images):
        model.partial_fit(image, [i % 3])
    whole = FewShotClassifier(backbone).fit(images, [0, 1, 2] * 2)
    np.testing.assert_allclose(model.prototypes_, whole.prototypes_, atol=1e-5)
    array = np.moveaxis(images.numpy(), 1, -1)
    Image.fromarray(array[0]).save(tmp_path / 'a.png')
    for one in (
        images[0],
        array[0],
        Image.fromarray(array[0]),
        tmp_path / 'a.png',
        str(tmp_path / 'a.png'),
        [images[0]],
        images[:1],
        array[:1],
        iter([images[0]]),
    ):
        assert model.predict(one).tolist() == whole.predict(images)[:1].tolist()
    assert model.predict_proba(images[0]).shape == (1, 3)


def test_mixed_forms_and_sizes_in_one_list(backbone, tmp_path):
    pil(size=(30, 9)).save(tmp_path / 'a.png')
    mixed = [
        tmp_path / 'a.png',
        pil('CMYK', (5, 70)),
        np.zeros((4, 4), np.uint8),
        torch.zeros(3, 11, 2),
    ]
    assert FewShotClassifier(backbone, batch=3).fit(mixed, range(4)).prototypes_.shape == (4, 12)


# labels


def kinds():
    yield ['b', 'a', 'c'], ['a', 'b', 'c'], 'U'
    yield [3, 1, 2], [1, 2, 3], 'i'
    yield np.array([3, 1, 2], np.int16), [1, 2, 3], 'i'
    yield torch.tensor([3, 1, 2]), [1, 2, 3], 'i'
    yield [torch.tensor(3), torch.tensor(1), np.int64(2)], [1, 2, 3], 'i'
    yield pd.Series(['b', 'a', 'c'], index=[7, 8, 9]), ['a', 'b', 'c'], 'U'
    yield [True, False, True], [False, True], 'b'
    yield [2.5, 0.5, 1.5], [0.5, 1.5, 2.5], 'f'
    yield [('b', 1), ('a', 2), ('c', 3)], [('a', 2), ('b', 1), ('c', 3)], 'O'
    yield ['b', ('b',), frozenset()], ['b', ('b',), frozenset()], 'O'
    yield (
        [frozenset('b'), frozenset('a'), frozenset('ab')],
        [frozenset('b'), frozenset('a'), frozenset('ab')],
        'O',
    )
    yield [b'y', b'x', b'z'], [b'x', b'y', b'z'], 'O'
    yield [10**30, 1, 2], [1, 2, 10**30], 'O'
    yield ['a\0', 'a', 'b'], ['a', 'a\0', 'b'], 'O'


@pytest.mark.parametrize('labels, classes, kind', list(kinds()))
def test_labels_of_any_hashable_type(backbone, labels, classes, kind):
    images = noise(3)
    model = FewShotClassifier(backbone).fit(images, labels)
    assert (
        model.classes_.tolist() == classes
        and [type(c) for c in model.classes_.tolist()] == [type(c) for c in classes]
        and model.classes_.dtype.kind == kind
    )
    if len(classes) == 3:
        assert model.score(images, labels) == 1 and [model.predict(i)[0] for i in images] == [
            x.item() if hasattr(x, 'item') else x for x in labels
        ]


@pytest.mark.parametrize(
    'labels, says',
    [
        (None, 'y'),
        ('ab', 'one label for each image'),
        (5, 'one label'),
        ([['a'], ['b']], 'not hashable'),
        ([{}, 1], 'not hashable'),
        (['a'], '2 images but 1 labels'),
        (['a', 'b', 'c'], '2 images but 3 labels'),
        ([float('nan'), 1.0], 'NaN'),
        ([float('inf'), 1.0], 'NaN'),
        (torch.zeros(2, 2), 'not hashable'),
        ([], 'labels'),
    ],
)
def test_bad_labels(backbone, labels, says):
    with pytest.raises(ValueError, match=says):
        FewShotClassifier(backbone).fit(noise(2), labels)


def test_empty_support_and_empty_queries(backbone):
    for images in ([], noise(2)[:0], np.zeros((0, 8, 8, 3))):
        with pytest.raises(ValueError, match='support is empty'):
            FewShotClassifier(backbone).fit(images, [])
    with pytest.raises(ValueError, match='at least one'):
        FewShotClassifier(backbone).fit(noise(1), [0]).predict([])


def test_one_class_and_one_image(backbone):
    model = FewShotClassifier(backbone).fit(noise(1), ['only'])
    assert (
        model.predict(noise(4)).tolist() == ['only'] * 4
        and (model.predict_proba(noise(4)) == 1).all()
    )


# what is computed


def test_prototypes_probabilities_and_predictions_by_hand(backbone, lora):
    images, labels = noise(9), np.array(list('abc') * 3)
    model = FewShotClassifier(backbone, lora, temperature=2.0).fit(images, labels)
    features = embed(backbone, images, lora)
    prototypes = torch.stack([features[torch.from_numpy(labels == c)].mean(0) for c in 'abc'])
    np.testing.assert_allclose(model.prototypes_, prototypes, atol=1e-5)
    queries = noise(20, seed=1)
    d = torch.cdist(embed(backbone, queries, lora), prototypes).square()
    np.testing.assert_allclose(model.predict_proba(queries), (-d / 2).softmax(1), atol=1e-4)
    assert (model.predict(queries) == np.array(list('abc'))[d.argmin(1)]).all()
    assert not np.allclose(
        FewShotClassifier(backbone).fit(images, labels).prototypes_, model.prototypes_
    )  # the LoRA counts


def test_same_answers_as_the_tables(backbone, lora):
    images = noise(20)
    at = torch.randperm(20, generator=generator(0)).view(1, 4, 5)
    episodes = Episodes(at[..., :2], at[..., 2:], torch.arange(4)[None])
    model = FewShotClassifier(backbone, lora).fit(
        images[episodes.support.flatten()], np.repeat(range(4), 2)
    )
    assert (
        model.predict(images[episodes.query.flatten()]).tolist()
        == nearest_prototype(embed(backbone, images, lora), episodes).flatten().tolist()
    )


def test_distances_do_not_cancel():
    q = torch.randn(5, 8, generator=generator(1))
    torch.testing.assert_close(
        squared_distances(q + 1000, q + 1000).diagonal(), torch.zeros(5).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize('temperature', [0, -1.0, float('nan'), float('inf'), 'warm', True, None])
def test_bad_temperature(backbone, temperature):
    with pytest.raises(ValueError, match='temperature'):
        FewShotClassifier(backbone, temperature=temperature).fit(noise(1), [0])


def test_a_broken_lora_is_found_out(backbone, lora):
    with pytest.raises(ValueError, match='not finite'):
        FewShotClassifier(backbone, lora.map(lambda t: t * float('nan'))).fit(noise(2), [0, 1])


def test_temperature_does_not_change_the_answer(backbone):
    images, queries = noise(5), noise(30, seed=3)
    soft, hard = (
        FewShotClassifier(backbone, temperature=t).fit(images, range(5)) for t in (50.0, 0.01)
    )
    assert (soft.predict(queries) == hard.predict(queries)).all() and soft.predict_proba(
        queries
    ).max() < hard.predict_proba(queries).min(1).max() + 1


@pytest.mark.parametrize(
    'bad, says',
    [
        (tiny_market(2), 'market of 2'),
        (new_lora(2, 32), 'does not fit tiny'),
        (new_lora(3, 16), 'does not fit tiny'),
        ('lora', 'is a str'),
    ],
)
def test_wrong_meta_lora(backbone, bad, says):
    with pytest.raises(ValueError, match=says):
        FewShotClassifier(backbone, bad).fit(noise(1), [0])


@pytest.mark.parametrize(
    'labels', [list('abcab') * 4, ['2', 'x', (None,), ('t',)] * 5, [True, False] * 10]
)
def test_partial_fit_equals_fit_on_everything(backbone, labels):
    images, order = noise(20), torch.randperm(20, generator=generator(4)).tolist()
    whole, parts = FewShotClassifier(backbone).fit(images, labels), FewShotClassifier(backbone)
    for rows in (order[:1], order[1:4], order[4:]):
        parts.partial_fit(images[rows], [labels[r] for r in rows])
    again = parts.classes_.tolist()
    rows = [again.index(c) for c in whole.classes_.tolist()]
    np.testing.assert_allclose(parts.prototypes_[rows], whole.prototypes_, atol=1e-5)
    assert (parts.counts_[rows] == whole.counts_).all() and parts.counts_.sum() == 20
    queries = noise(30, seed=9)
    assert parts.predict(queries).tolist() == whole.predict(queries).tolist()


def test_a_failed_partial_fit_learns_nothing(backbone):
    model = FewShotClassifier(backbone).fit(noise(2), ['a', 'b'])
    before = digest(model.prototypes_, model.sums_, model.counts_)
    for images, labels in (([pil(), None], ['a', 'c']), (noise(2), ['c']), (noise(1), [[]])):
        with pytest.raises(ValueError):
            model.partial_fit(images, labels)
    assert digest(
        model.prototypes_, model.sums_, model.counts_
    ) == before and model.classes_.tolist() == ['a', 'b']
    assert model.fit(noise(1), ['z']).classes_.tolist() == ['z']  # fit forgets


def test_ten_thousand_classes(backbone, tmp_path):
    images = noise(10_000)
    model = FewShotClassifier(backbone, batch=512).fit(
        images, [f'class {i}' for i in range(10_000)]
    )
    some = slice(0, 10_000, 37)
    assert (
        np.mean(model.predict(images[some]) == [f'class {i}' for i in range(10_000)][some]) > 0.99
    )
    p = model.predict_proba(images[some])
    assert p.shape == (271, 10_000) and np.allclose(p.sum(1), 1)
    assert FewShotClassifier.load(model.save(tmp_path / 'many'), backbone).predict(
        images[:3]
    ).tolist() == ['class 0', 'class 1', 'class 2']


# on disk


@pytest.fixture()
def saved(backbone, lora, tmp_path):
    return (
        FewShotClassifier(backbone, lora, temperature=3.0)
        .fit(noise(6), ['a', 'b', 'ü'] * 2)
        .save(tmp_path / 'saved')
    )


def test_saved_and_loaded(backbone, lora, saved):
    assert sorted(p.name for p in saved.iterdir()) == ['classifier.json', 'classifier.safetensors']
    model = FewShotClassifier(backbone, lora, temperature=3.0).fit(noise(6), ['a', 'b', 'ü'] * 2)
    back, queries = FewShotClassifier.load(saved, backbone), noise(20, seed=2)
    assert (back.predict(queries) == model.predict(queries)).all() and back.temperature == 3.0
    np.testing.assert_array_equal(back.predict_proba(queries), model.predict_proba(queries))
    for m in (back, model):
        m.partial_fit(noise(4, seed=5), ['a', 'new', 'new', 'b'])
    np.testing.assert_allclose(back.prototypes_, model.prototypes_, atol=1e-5)
    with pytest.raises(ValueError, match='not empty'):
        model.save(saved)


@pytest.mark.parametrize(
    'labels', [[0.5, 1.5, 2, False, -1], [10, -3, 7, 2, 0], [1.5, 2.0, 3.0, 4.0, 5.0]]
)
def test_labels_come_back_with_their_types(backbone, tmp_path, labels):
    model = FewShotClassifier(backbone).fit(noise(5), labels)
    found = FewShotClassifier.load(model.save(tmp_path / 'x'), backbone).classes_.tolist()
    assert found == model.classes_.tolist() and [type(c) for c in found] == [
        type(c) for c in model.classes_.tolist()
    ]


@pytest.mark.parametrize('label', [('a', 1), b'a', frozenset('a'), 10**30, '\ud800', Path('a')])
def test_labels_that_json_cannot_hold_are_refused(backbone, tmp_path, label):
    with pytest.raises(ValueError, match='classes_ cannot be saved'):
        FewShotClassifier(backbone).fit(noise(1), [label]).save(tmp_path / 'x')
    assert not list(tmp_path.iterdir())  # nothing is left half-way


def test_another_backbone_is_refused(saved):
    with pytest.raises(ValueError, match='was made for the backbone'):
        FewShotClassifier.load(saved, tiny(1))


def test_missing_files(backbone, saved):
    with pytest.raises(FileNotFoundError):
        FewShotClassifier.load(saved / 'none', backbone)
    (saved / 'classifier.safetensors').unlink()
    with pytest.raises(FileNotFoundError):
        FewShotClassifier.load(saved, backbone)


def test_damaged_weights_are_refused(backbone, saved):
    path = saved / 'classifier.safetensors'
    whole, gen = path.read_bytes(), np.random.default_rng(0)
    for i in range(150):
        at = int(gen.integers(len(whole)))
        path.write_bytes(
            whole[:at]
            if i % 3 == 0
            else whole[:at] + bytes([whole[at] ^ (1 << i % 8)]) + whole[at + 1 :]
        )
        with pytest.raises(ValueError):
            FewShotClassifier.load(saved, backbone)


def test_damaged_json_is_refused_or_harmless(backbone, saved):
    path = saved / 'classifier.json'
    found = json.loads(path.read_text())
    for key, value in [
        ('format', 'x'),
        ('classes', ['a', 'b']),
        ('classes', ['a', 'a', 'b']),
        ('classes', [['a'], 'b', 'c']),
        ('classes', 'abc'),
        ('classes', []),
        ('files', {}),
        ('files', []),
        ('files', {'classifier.safetensors': {}}),
        ('backbone', None),
        ('backbone', {}),
        ('temperature', 'x'),
        ('temperature', None),
    ]:
        path.write_text(json.dumps(found | {key: value}))
        with pytest.raises(ValueError):
            FewShotClassifier.load(saved, backbone)
    whole, gen = json.dumps(found).encode(), np.random.default_rng(1)
    for _ in range(150):
        at = int(gen.integers(len(whole)))
        path.write_bytes(
            whole[:at] + gen.integers(256, size=1).astype(np.uint8).tobytes() + whole[at + 1 :]
        )
        try:
            FewShotClassifier.load(saved, backbone)
        except ValueError:
            pass


# labels: what is missing, what never equals


@pytest.mark.parametrize(
    'missing', [pd.NA, pd.NaT, None, np.nan, np.float32('nan'), Decimal('nan')], ids=repr
)
def test_missing_labels_are_refused_with_their_rows(backbone, missing):
    "They would be a class of their own."
    labels = ['a', missing, 'b', missing]
    with pytest.raises(ValueError, match=r'missing value.* in rows 1, 3\.'):
        FewShotClassifier(backbone).fit(noise(4), labels)
    model = FewShotClassifier(backbone).fit(noise(2), ['a', 'b'])
    for use in (model.partial_fit, model.score):
        with pytest.raises(ValueError, match='in rows 1, 3'):
            use(noise(4), labels)


@pytest.mark.parametrize(
    'labels',
    [
        pd.Series([1, None, 2, 1], dtype='Int64'),
        pd.Series(['a', None, 'b', 'a'], dtype='string'),
        pd.Categorical(['a', None, 'b', 'a']),
        np.array(['2020-01-01', 'NaT', '2021-01-01', '2020-01-01'], 'datetime64[D]'),
        torch.tensor([0.0, float('nan'), 1.0, 0.0]),
    ],
    ids=lambda x: str(getattr(x, 'dtype', x)),
)
def test_columns_with_holes_are_refused(backbone, labels):
    with pytest.raises(ValueError, match='in rows 1'):
        FewShotClassifier(backbone).fit(noise(4), labels)


def test_labels_of_two_types_are_an_error_as_in_scikit_learn(backbone):
    texts = FewShotClassifier(backbone).fit(noise(4), list('0101'))
    numbers = FewShotClassifier(backbone).fit(noise(4), [0, 1, 0, 1])
    for model, other in ((texts, [0, 1]), (texts, [0.0, True]), (numbers, ['0', '1'])):
        for use in (model.score, model.partial_fit):
            with pytest.raises(ValueError, match='Mix of label input types'):
                use(noise(2), other)
    with pytest.raises(ValueError, match='Mix of label input types'):
        texts.fit(noise(2), ['0', 1])
    with pytest.raises(ValueError, match='Mix of label input types'):
        texts.score(noise(2), [b'0', b'1'])
    assert texts.classes_.tolist() == ['0', '1'], 'nothing was learnt'
    numbers.fit(noise(2), [0, 1])
    assert numbers.score(noise(2), [0.0, True]) == 1.0


# stale state


def test_what_was_learnt_with_another_lora_is_refused(backbone, lora, tmp_path):
    for change in (dict(meta_lora=lora), dict(backbone=tiny(1)), dict(meta_lora=None)):
        start = lora if change.get('meta_lora', 0) is None else None
        model = FewShotClassifier(backbone, start).fit(noise(4), list('abab'))
        model.set_params(**change)
        for use in (
            lambda: model.predict(noise(1)),
            lambda: model.predict_proba(noise(1)),
            lambda: model.score(noise(1), ['a']),
            lambda: model.partial_fit(noise(1), ['c']),
            lambda: model.save(tmp_path / 'stale'),
        ):
            with pytest.raises(NotFittedError, match='stale: call fit again'):
                use()
        model.fit(noise(4), list('abab')).predict(noise(1))


def test_the_same_encoder_in_another_object_is_not_stale(backbone, lora):
    model = FewShotClassifier(backbone, lora).fit(noise(4), list('abab'))
    before = model.predict(noise(4)).tolist()
    model.set_params(backbone=backbone.to('cpu'), meta_lora=lora.map(torch.clone))
    assert model.predict(noise(4)).tolist() == before
    again = pickle.loads(pickle.dumps(model))
    assert again.predict(noise(4)).tolist() == before


# how sure, and none of these


def test_probabilities_are_calibrated_unless_a_temperature_is_given(backbone):
    images, labels = noise(40), list(range(4)) * 10
    model = FewShotClassifier(backbone).fit(images, labels)
    given = FewShotClassifier(backbone, temperature=model.temperature_).fit(images, labels)
    queries = noise(9, seed=5)
    np.testing.assert_allclose(given.predict_proba(queries), model.predict_proba(queries))
    sharp = given.set_params(temperature=model.temperature_ / 1000).predict_proba(queries)
    assert sharp.max(1).mean() > model.predict_proba(queries).max(1).mean()
    # pixels of chance say nothing of their class: the answer is close to a guess
    assert model.predict_proba(queries).max(1).mean() < 0.6


def test_a_single_class_and_twins_have_a_temperature(backbone):
    same = noise(1).expand(4, -1, -1, -1)
    for labels in ([0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]):
        model = FewShotClassifier(backbone, reject=-1).fit(same, labels)
        assert np.isfinite(model.predict_proba(noise(3))).all() and model.temperature_ > 0
        assert model.predict(noise(3)).tolist() == [0, 0, 0]


def test_what_rounding_leaves_between_prototypes_is_no_spread():
    "Processors differ in the last bits of a product: the same images lie up to that far apart"
    prototypes = torch.randn(1, 64, generator=generator(0)).expand(3, -1)
    rounded = prototypes * (1 + 1e-7 * torch.tensor([[-1.0], [0.0], [1.0]]))
    assert measure_spread(rounded) == measure_spread(prototypes[:1]) == 0
    apart = prototypes + 1e-3 * torch.eye(64)[:3]
    assert measure_spread(apart) == pytest.approx(2e-6, rel=1e-3)


@pytest.mark.parametrize(
    'labels, reject, kind',
    [([0, 1], -1, 'i'), (['a', 'b'], 'none', 'U'), (['a', 'b'], -1, 'O')],
)
def test_far_images_are_none_of_the_classes(labels, reject, kind):
    points = np.array([[0.0, 0.0], [1.0, 0.0]])
    model = PrototypeClassifier(reject=reject).fit(points, labels)
    answers = model.predict([[0.1, 0.0], [0.9, 0.1], [30.0, 4.0]])
    assert answers.tolist() == [*labels, reject] and answers.dtype.kind == kind
    assert model.predict(points).dtype.kind == kind, 'the type does not depend on the images'
    assert model.score([[0.0, 0.1], [50.0, 1.0]], [labels[0], reject]) == 1.0
    assert model.set_params(reject=None).predict([[30.0, 4.0]]).tolist() == [labels[1]]


def test_a_stricter_share_refuses_more(backbone):
    model = FewShotClassifier(backbone, reject=-1).fit(noise(20), list(range(4)) * 5)
    refused = []
    for share in (0.01, 0.2, 0.9):
        model.set_params(false_rejects=share)
        refused.append((model.predict(noise(60, seed=3)) == -1).sum())
    assert refused[0] <= refused[1] < refused[2]


@pytest.mark.parametrize(
    'change, why',
    [
        (dict(reject='a'), 'is the label of a class'),
        (dict(reject=float('nan')), 'missing value'),
        (dict(reject=[1]), 'not hashable'),
        (dict(false_rejects=0), 'false_rejects=0'),
        (dict(false_rejects=True), 'false_rejects=True'),
        (dict(false_rejects='few'), "false_rejects='few'"),
        (dict(temperature='cold'), "temperature='cold'.*'auto'"),
        (dict(temperature=None), 'temperature=None'),
    ],
    ids=str,
)
def test_settings_that_are_not_legal(backbone, change, why):
    with pytest.raises(ValueError, match=why):
        FewShotClassifier(backbone).set_params(**change).fit(noise(2), ['a', 'b'])


def test_what_is_saved_is_as_sure_as_before(backbone, lora, tmp_path):
    wide = LoRA(torch.rand(2, 3, 16, 2), torch.rand(2, 3, 2, 16), targets=('k', 'v', 'out'))
    for i, meta in enumerate((None, lora, wide)):
        model = FewShotClassifier(backbone, meta, reject='none', false_rejects=0.3)
        model.fit(noise(20), list('abcd') * 5)
        again = FewShotClassifier.load(model.save(tmp_path / f'{i}'), backbone)
        queries = noise(30, seed=4)
        assert again.predict(queries).tolist() == model.predict(queries).tolist()
        np.testing.assert_allclose(again.predict_proba(queries), model.predict_proba(queries), 1e-4)
        assert again.threshold_ == pytest.approx(model.threshold_, rel=1e-4)


def test_a_folder_of_the_first_format_is_read(backbone, tmp_path):
    "It holds no features: the temperature is a guess, unless it was saved as a number."
    model = FewShotClassifier(backbone, temperature=2.0).fit(noise(6), list('ababab'))
    model.save(tmp_path / 'x')
    path = tmp_path / 'x' / 'classifier.json'
    old = json.loads(path.read_text())
    tensors = load_file(tmp_path / 'x' / 'classifier.safetensors')
    kept = {k: tensors[k] for k in ('prototypes', 'counts')}
    record = save_tensors(tmp_path / 'x' / 'classifier.safetensors', kept)
    for key in ('reject', 'false_rejects', 'targets'):
        del old[key]
    old |= dict(format='lora_recycle classifier 1', files={'classifier.safetensors': record})
    path.write_text(json.dumps(old))
    again = FewShotClassifier.load(tmp_path / 'x', backbone)
    queries = noise(5, seed=9)
    np.testing.assert_allclose(again.predict_proba(queries), model.predict_proba(queries), 1e-5)
    assert again.partial_fit(noise(2), ['a', 'c']).classes_.tolist() == ['a', 'b', 'c']


# one reader of images


def test_transparency_lies_on_white_whatever_the_form(tmp_path):
    "Two logos, black on nothing, are two pictures."
    logo = Image.new('RGBA', (SIDE, SIDE), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (2, 2, 6, 6))
    logo.save(tmp_path / 'logo.png')
    array = np.array(logo)
    forms = [logo, array, array / 255, torch.from_numpy(array).permute(2, 0, 1)]
    forms += [tmp_path / 'logo.png', logo.convert('LA')]
    expected = torch.ones(3, SIDE, SIDE)
    expected[:, 2:6, 2:6] = 0
    for form in forms:
        torch.testing.assert_close(image_tensor(form, SIDE), expected)


def test_damaged_exif_is_ignored_with_a_warning(tmp_path):
    pil().save(tmp_path / 'x.png', exif=b'this is text')
    with pytest.warns(UserWarning, match='EXIF'):
        image_tensor(tmp_path / 'x.png', SIDE)


def test_a_misspelt_path_is_called_that(tmp_path):
    pil().save(tmp_path / 'photo.png')
    with pytest.raises(FileNotFoundError, match='image 1: .*photo.png'):
        FewShotClassifier(tiny()).fit([pil(), tmp_path / 'phto.png'], [0, 1])


# ---- all queries at once, and several LoRAs on one support set


def pile(n=30, seed=0):
    "Points of two classes, one labelled point of each, far from the middle of its class"
    gen = generator(seed, 'pile')
    centres = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    points = torch.cat([c + torch.randn(n, 3, generator=gen) for c in centres])
    return [[1.2, 0.9, 0.0], [-1.5, 2.2, 0.0]], points.numpy(), np.repeat(['a', 'b'], n)


@pytest.mark.parametrize('how', [True, 'bdcspn', 'laplacian'])
def test_queries_that_are_seen_at_once_help_each_other(how):
    support, points, truth = pile()
    model = PrototypeClassifier().fit(support, ['a', 'b'])
    alone = (model.predict(points) == truth).mean()
    answers = model.predict(points, together=how)
    assert answers.dtype == model.predict(points).dtype
    assert (answers == truth).mean() > alone + 0.05
    order = np.random.default_rng(0).permutation(len(points))
    assert (model.predict(points[order], together=how) == answers[order]).all()
    assert model.predict(support, together=how).tolist() == ['a', 'b']
    assert model.predict(support[:1], together=how).shape == (1,)


def test_at_once_with_unequal_classes_and_a_far_image():
    support, points, truth = pile()
    far = np.array([[0.0, 0.0, 90.0]])
    model = PrototypeClassifier(reject='none').fit([*support, [2.0, 0.1, 0]], ['a', 'b', 'a'])
    answers = model.predict(np.concatenate([points, far]), together='laplacian')
    assert answers[-1] == 'none' and set(answers[:-1]) <= {'a', 'b', 'none'}
    one = PrototypeClassifier().fit(support[:1], ['a'])
    assert one.predict(points[:3], together=True).tolist() == ['a'] * 3
    with pytest.raises(ValueError, match="together='tim'.*'bdcspn', 'laplacian'"):
        model.predict(points, together='tim')


def test_at_once_is_refused_where_it_is_stale(backbone, lora):
    letters = load_set('digits')
    model = FewShotClassifier(backbone).fit(letters.images[:10], letters.labels[:10])
    model.predict(letters.images[:3], together=True)
    model.set_params(meta_lora=lora)
    with pytest.raises(NotFittedError, match='stale'):
        model.predict(letters.images[:3], together=True)


def by_name(lines):
    return pd.DataFrame(lines).set_index('name')


def test_loras_are_compared_on_the_same_images(backbone, lora):
    digits = load_set('digits')
    images, labels = digits.images[:30], digits.labels[:30].tolist()
    loras = {'plain': None, 'mine': lora, 'again': None}
    found = by_name(lora_recycle.compare(backbone, loras, images, labels))
    assert found.index.tolist() == list(loras) and (found['n_images'] == 30).all()
    assert found.loc['again', 'gain'] == 0 and 0 < found.loc['again', 'ci95'] < 15
    assert found.loc['plain', ['gain', 'ci95']].tolist() == [0, 0]
    right = []  # by hand: fit on all but one
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        model = FewShotClassifier(backbone, lora).fit(images[rest], [labels[j] for j in rest])
        right.append(model.predict(images[i])[0] == labels[i])
    assert found.loc['mine', 'right'] == pytest.approx(100 * np.mean(right))
    named = by_name(lora_recycle.compare(backbone, {'plain': None}, images, [f'{c}' for c in labels]))
    assert named.loc['plain', 'right'] == found.loc['plain', 'right']


def test_what_cannot_be_compared(backbone, lora):
    images = load_set('digits').images[:4]
    for given, labels, why in (
        ({}, [0, 0, 1, 1], 'a dict of one LoRA or more'),
        ([None], [0, 0, 1, 1], 'a dict of one LoRA or more'),
        ({'plain': None}, [0, 1, 2, 3], 'no class has two images'),
        ({'plain': None}, [0, 0, 1], '4 images but 3 labels'),
        ({'market': 3}, [0, 0, 1, 1], 'meta_lora is a int'),
    ):
        with pytest.raises(ValueError, match=why):
            lora_recycle.compare(backbone, given, images, labels)


def test_the_gain_of_one_lora_over_another_is_paired():
    base = torch.tensor([True] * 50 + [False] * 50)
    better = torch.tensor([True] * 60 + [False] * 40)
    gain, half = classifier._paired_interval(better, base)
    assert gain == pytest.approx(10 / 102) and 0 < gain - half
    assert classifier._paired_interval(base, better)[0] == -gain
