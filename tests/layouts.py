"""Tiny copies of data sets as their publishers ship them: all classes, few and small images.

make_all(root, per_class=4)       # the eight sets and a collection in root/meta_dataset
trust(root, monkeypatch)          # torchvision then takes the digests of the tiny files
"""

import csv
import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, Flowers102

from lora_recycle.suite.images import SPLITS, class_splits
from lora_recycle.suite.photos import photo_splits


def classes_of(name):
    "The published class names of a set, in the order train, val, test"
    return [c for split in SPLITS for c in class_splits(name)[split]]


def picture(c, i, size=(12, 10)):
    "Image i of class c: the class has a colour, the image has noise; uint8 [h,w,3]"
    colour = np.random.default_rng(c).integers(40, 216, 3)
    noise = np.random.default_rng((c, i)).integers(-40, 41, (size[1], size[0], 3))
    return (colour + noise).astype(np.uint8)


def write_image(path, c, i, **kwargs):
    "`picture(c, i)` as a file, its folder made"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(c, i, **kwargs)).save(path)
    return path


def write_csv(path, rows):
    "`rows`, the first of them the header, as a csv file"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(rows)


def make_cifar(root, per_class=4):
    "cifar-100-python: pickles like the originals; the last image of a class is in the test part"
    folder, names = Path(root) / 'cifar-100-python', sorted(classes_of('cifar_fs'))
    folder.mkdir(parents=True, exist_ok=True)
    for part, numbers in (('train', range(per_class - 1)), ('test', [per_class - 1])):
        rows = [(c, i) for i in numbers for c in range(len(names))]
        data = np.stack(
            [picture(c, i, size=(32, 32)).transpose(2, 0, 1).reshape(-1) for c, i in rows]
        )
        batch = dict(
            filenames=[f'{names[c]}_s_{i:06d}.png' for c, i in rows],
            batch_label=part,
            fine_labels=[c for c, _ in rows],
            coarse_labels=[c // 5 for c, _ in rows],
            data=data,
        )
        (folder / part).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / 'meta').write_bytes(
        pickle.dumps(
            dict(fine_label_names=names, coarse_label_names=[f'group {i}' for i in range(20)]),
            protocol=2,
        )
    )


def make_flowers(root, per_class=4):
    "flowers-102: jpg/image_00001.jpg ..., imagelabels.mat (ids from 1), setid.mat (three parts)"
    folder, n = Path(root) / 'flowers-102', 102 * per_class
    ids = np.random.default_rng(0).permutation(np.arange(n) % 102 + 1)
    for i, c in enumerate(ids, 1):
        write_image(folder / 'jpg' / f'image_{i:05d}.jpg', int(c), i)
    order = np.random.default_rng(1).permutation(n) + 1
    savemat(folder / 'imagelabels.mat', dict(labels=ids[None].astype(np.uint8)))
    savemat(
        folder / 'setid.mat',
        dict(
            trnid=order[None, : n // 8],
            valid=order[None, n // 8 : n // 4],
            tstid=order[None, n // 4 :],
        ),
    )


def make_mini(root, per_class=4, parts=False):
    "mini_imagenet/<wnid>/, or below train, val, test with every class in every part"
    for c, wnid in enumerate(sorted(classes_of('mini_imagenet'))):
        for i in range(per_class):
            write_image(
                Path(root)
                / 'mini_imagenet'
                / (SPLITS[i % 3] if parts else '')
                / wnid
                / f'{wnid}_{i + 7}.JPEG',
                c,
                i,
            )


def make_cub(root, per_class=4):
    "CUB_200_2011: images/<class>/ and the index files"
    folder, names, index = Path(root) / 'CUB_200_2011', sorted(classes_of('cub')), []
    for c, name in enumerate(names):
        for i in range(per_class):
            index.append(
                write_image(folder / 'images' / name / f'{name[4:]}_{i:04d}_{c * 97 + i}.jpg', c, i)
            )
    (folder / 'classes.txt').write_text(''.join(f'{c} {name}\n' for c, name in enumerate(names, 1)))
    (folder / 'images.txt').write_text(
        ''.join(f'{i} {p.relative_to(folder / "images")}\n' for i, p in enumerate(index, 1))
    )


def make_chestx(root, per_class=4, parts=False, csv_name='Data_Entry_2017.csv'):
    "chestx: pngs in images/ or images_001/images/ ..., and a csv that lists more than is used"
    folder, seven = Path(root) / 'chestx', class_splits('chestx')['test']
    findings = [
        *seven * per_class,
        'No Finding',
        'Pneumonia',
        'Hernia',
        'Mass|Nodule',
        'Pneumonia|Effusion',
    ]
    rows = [
        (
            'Image Index',
            'Finding Labels',
            'Follow-up #',
            'Patient ID',
            'Patient Age',
            'Patient Gender',
            'View Position',
            'OriginalImage[Width',
            'Height]',
            'OriginalImagePixelSpacing[x',
            'y]',
        )
    ]
    for i, finding in enumerate(findings):
        name = f'{i // 3 + 1:08d}_{i % 3:03d}.png'
        at = folder / (f'images_{i % 2 + 1:03d}/images' if parts else 'images')
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i % 7, i)).convert('L').convert('RGBA' if i % 5 == 0 else 'L').save(
            at / name
        )
        rows.append((name, finding, i % 3, i // 3 + 1, 50, 'F', 'PA', 10, 12, 0.14, 0.14))
    write_csv(folder / csv_name, rows)


def make_isic(root, per_class=4):
    "isic: both archives of task 3 unpacked"
    folder, columns = Path(root) / 'isic', class_splits('isic')['test']
    rows = [('image', *columns)]
    for i in range(7 * per_class):
        write_image(
            folder / 'ISIC2018_Task3_Training_Input' / f'ISIC_{24306 + i:07d}.jpg', i % 7, i
        )
        rows.append((f'ISIC_{24306 + i:07d}', *(float(c == i % 7) for c in range(7))))
    (folder / 'ISIC2018_Task3_Training_Input' / 'ATTRIBUTION.txt').write_text('not an image')
    write_csv(
        folder / 'ISIC2018_Task3_Training_GroundTruth' / 'ISIC2018_Task3_Training_GroundTruth.csv',
        rows,
    )


def make_eurosat(root, per_class=4):
    "eurosat/2750/<class>/"
    for c, name in enumerate(class_splits('eurosat')['test']):
        for i in range(per_class):
            write_image(Path(root) / 'eurosat' / '2750' / name / f'{name}_{i + 1}.jpg', c, i)


def make_crop(root, per_class=4):
    "crop_diseases/dataset/train/<class>/, odd names, and dataset/test, which is not used"
    for c, name in enumerate(class_splits('crop_diseases')['test']):
        for i in range(per_class):
            write_image(
                Path(root)
                / 'crop_diseases'
                / 'dataset'
                / 'train'
                / name
                / f'{i:04d}___x 1.{("JPG", "jpg", "png")[i % 3]}',
                c,
                i,
            )
        write_image(Path(root) / 'crop_diseases' / 'dataset' / 'test' / name / 'other.JPG', c, 99)


def make_collection(root, per_class=4, sets=('aircraft', 'omniglot')):
    "meta_dataset/<set>/<split>/<class>/, five classes a split"
    for s, name in enumerate(sets):
        for k, split in enumerate(SPLITS):
            for c in range(5):
                for i in range(per_class):
                    write_image(
                        Path(root) / 'meta_dataset' / name / split / f'{split}_{c}' / f'{i}.png',
                        100 * s + 10 * k + c,
                        i,
                    )


def make_photos(root, per_class=4):
    "The archives of real images, unpacked: Tiny-ImageNet, Caltech-101, GTSRB, Omniglot, PACS"
    root = Path(root)
    seen = photo_splits()
    tiny = root / 'tiny-imagenet-200'
    wnids = [w for split in ('train', 'validation', 'test') for w in sorted(seen[split])]
    for c, wnid in enumerate(wnids):
        for i in range(per_class):
            path = tiny / 'train' / wnid / 'images' / f'{wnid}_{i}.JPEG'
            write_image(path, c, i)
        (tiny / 'train' / wnid / f'{wnid}_boxes.txt').write_text('0 0 9 9')
    (tiny / 'wnids.txt').write_text('\n'.join(wnids))
    words = [f'{w}\t{seen["names"][w]}' for w in wnids]
    (tiny / 'words.txt').write_text('\n'.join(words), encoding='utf-8')
    caltech = root / 'caltech101' / '101_ObjectCategories'
    for c in range(20):
        name = f'thing_{c:02d}' if c else 'BACKGROUND_Google'
        for i in range(per_class):
            write_image(caltech / name / f'image_{i:04d}.jpg', c, i)
    signs = root / 'gtsrb' / 'GTSRB' / 'Training'
    for c in range(12):
        for i in range(2 * per_class):  # tracks of two frames
            write_image(signs / f'{c:05d}' / f'{i // 2:05d}_{i % 2:05d}.ppm', c, i)
        (signs / f'{c:05d}' / f'GT-{c:05d}.csv').write_text('Filename;Width')
    for part, alphabets in (('small1', ('Greek', 'Korean')), ('small2', ('Latin',))):
        for k, alphabet in enumerate(alphabets):
            for c in range(6):
                at = root / f'images_background_{part}' / alphabet / f'character{c + 1:02d}'
                for i in range(per_class):
                    write_image(at / f'{c + 1:04d}_{i + 1:02d}.png', 10 * k + c, i)
    for k, domain in enumerate(('photo', 'art_painting', 'cartoon', 'sketch')):
        for c, name in enumerate(('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house')):
            for i in range(per_class):
                write_image(root / 'PACS' / domain / name / f'pic_{i:03d}.jpg', 10 * k + c, i)


MAKERS = dict(
    cifar_fs=make_cifar,
    mini_imagenet=make_mini,
    vgg_flower=make_flowers,
    cub=make_cub,
    chestx=make_chestx,
    isic=make_isic,
    eurosat=make_eurosat,
    crop_diseases=make_crop,
)


def make_all(root, per_class=4):
    "All eight sets and a collection below `root`, `per_class` images of each class"
    for make in (*MAKERS.values(), make_collection):
        make(root, per_class)
    return Path(root)


def trusted(root):
    "The lists with which torchvision compares, with the digests of the tiny files below `root`"
    md5 = lambda path: hashlib.md5((Path(root) / path).read_bytes()).hexdigest()
    cifar = lambda name: md5(f'cifar-100-python/{name}')
    flowers = {
        k: (file, md5(f'flowers-102/{file}') if k != 'image' else old)
        for k, (file, old) in Flowers102._file_dict.items()
    }
    return dict(
        train_list=[['train', cifar('train')]],
        test_list=[['test', cifar('test')]],
        meta=dict(CIFAR100.meta, md5=cifar('meta')),
    ), flowers


def trust(root, patch):
    "Let torchvision accept the tiny sets below `root`; `patch` is pytest's monkeypatch"
    cifar, flowers = trusted(root)
    for name, value in cifar.items():
        patch.setattr(CIFAR100, name, value)
    patch.setattr(Flowers102, '_file_dict', flowers)


def trust_file(root, folder):
    "The same for Python processes that start with `folder` in PYTHONPATH"
    cifar, flowers = trusted(root)
    lines = [
        'from torchvision.datasets import CIFAR100, Flowers102',
        *(f'CIFAR100.{name} = {value!r}' for name, value in cifar.items()),
        f'Flowers102._file_dict = {flowers!r}',
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / 'sitecustomize.py').write_text('\n'.join(lines) + '\n')
    return Path(folder)
