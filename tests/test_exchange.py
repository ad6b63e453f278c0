"Files from strangers: whatever is in them, the readers answer with what is there or with ValueError or FileNotFoundError, soon, and in bounded memory."

import copy
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lora_recycle.core import generator, save_tensors, write_json
from lora_recycle.use import exchange
from lora_recycle.use.exchange import (
    Limits,
    backbone_from_hf,
    hf_names,
    parse_json,
    pattern_fits,
    read_adapter,
    read_json,
    read_market,
    tensor_header,
    write_adapter,
    write_market,
)
from lora_recycle.method.lora import TARGETS, LoRA, new_lora, stack_loras

LAYERS, WIDTH, OUT, WAY = 2, 8, 6, 3
CONFIG = dict(
    model_type='clip_vision_model',
    hidden_size=WIDTH,
    intermediate_size=12,
    projection_dim=OUT,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    hidden_act='gelu',
)


def tiny_lora(key, rank=2):
    "A LoRA with a head for the tiny backbone"
    gen = generator(0, 'exchange test', key)
    lora = new_lora(LAYERS, WIDTH, rank, gen)
    return LoRA(
        lora.A,
        torch.randn(lora.B.shape, generator=gen),
        torch.randn(OUT, WAY, generator=gen),
        torch.randn(WAY, generator=gen),
    )


def make_backbone(folder):
    "A folder as transformers writes it, and its backbone"
    gen = generator(0, 'exchange backbone')
    names = {t for theirs in hf_names(LAYERS).values() for t in theirs}
    c = exchange._CLIP | CONFIG
    save_tensors(
        folder / 'model.safetensors',
        {t: torch.randn(exchange._hf_shape(t, c), generator=gen) * 0.3 for t in sorted(names)},
    )
    write_json(folder / 'config.json', CONFIG)
    write_json(
        folder / 'preprocessor_config.json',
        dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.2, 0.2, 0.2]),
    )
    return backbone_from_hf(folder)


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp('backbone'))


def make_peft(folder, n=2):
    "A market of `n` PEFT adapters"
    for i in range(n):
        write_adapter(folder / f'p{i}', tiny_lora(i, i + 1), 'tiny', classes=['a', 'b', 'c'])
    return folder


@pytest.fixture(scope='module')
def shm():
    "A folder in memory where there is one: thousands of small files are written"
    with tempfile.TemporaryDirectory(
        dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    ) as folder:
        yield Path(folder)


# ---- damage

NASTY = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**18,
    1.5,
    1e308,
    -1e308,
    '',
    'x',
    '../../etc/passwd',
    '/etc/passwd',
    '\ud800',
    '\0',
    'é' * 50,
    'A' * 5000,
    '(a+)+$',
    'F32',
    'I64',
    'LORA',
    [],
    [[]],
    {},
    [0],
    [-1, 2],
    [2**40, 2**40],
    [1] * 100,
    {'a': {}},
    ['q_proj'],
    {'(a|a)*b': 3},
    {'.': 2},
    [None],
    'NaN',
    'sha256',
    'a/../b',
]
LENGTHS = [0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def places(value, at=()):
    "The path of every value within `value`"
    yield at
    if isinstance(value, dict):
        for k in value:
            yield from places(value[k], (*at, k))
    if isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*at, i))


def damaged_value(value, rng):
    "`value` with one place replaced, removed, renamed or nested"
    value = copy.deepcopy(value)
    at = rng.choice(list(places(value)) or [()])
    if not at:
        return rng.choice(NASTY)
    holder = value
    for step in at[:-1]:
        holder = holder[step]
    last, deed = at[-1], rng.randrange(6)
    if deed <= 2:
        holder[last] = rng.choice(NASTY)
    elif deed == 3:
        del holder[last]
    elif deed == 4 and isinstance(holder, dict):
        holder[
            rng.choice(
                ['', '__metadata__', '../x', '\ud800', 'r', 'A', str(last) + 'x', str(last)[:-1]]
            )
        ] = holder.pop(last)
    else:
        for _ in range(rng.choice([1, 15, 17, 300])):
            holder[last] = [holder[last]]
    return value


def nested(text, rng):
    "JSON text that is nested deeper than Python's parser can go"
    opening, closing = rng.choice([('[', ']'), ('{"a":', '}')])
    return text.replace(
        rng.choice(['0', '1', '2', '{']), opening * 3000 + rng.choice(['', '1' + closing * 3000]), 1
    )


def damaged_text(data, rng):
    "JSON text with one place changed: its values, or its letters"
    if rng.random() < 0.6:
        text = json.dumps(damaged_value(json.loads(data), rng))
        if rng.random() < 0.1:
            text = text.replace(
                rng.choice(['2', '0', '1']),
                rng.choice(['NaN', 'Infinity', '-Infinity', '9' * 400, '1e999', '0x1', '-']),
                1,
            )
        if rng.random() < 0.05:
            text = text.replace('{', '{"r": 2, "r": 3, ', 1)
        if rng.random() < 0.05:
            text = nested(text, rng)
        return text.encode(errors='surrogatepass')
    return damaged_bytes(data, rng)


def damaged_bytes(data, rng):
    "`data` cut, with bits flipped, or with bytes put in, taken out, doubled or overwritten"
    data, deed = bytearray(data), rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    span = rng.choice([1, 2, 8, 64, 1000])
    if deed == 0:
        data = data[:at]
    elif deed == 1:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif deed == 2:
        data[at:at] = rng.randbytes(span)
    elif deed == 3:
        del data[at : at + span]
    elif deed == 4:
        data[at:at] = data[at : at + span]
    elif deed == 5:
        data[at : at + span] = rng.choice([b'\0', b'\xff', b'[', b'{"a":', b'"', b'9']) * span
    else:
        data = bytearray(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100])))
    return bytes(data)


def damaged_tensors(data, rng):
    "A safetensors file with its header, its length or its numbers changed"
    (length,) = struct.unpack('<Q', data[:8])
    head, body, deed = data[8 : 8 + length], data[8 + length :], rng.randrange(5)
    if deed == 0:
        return (
            struct.pack(
                '<Q', rng.choice(LENGTHS + [length - 1, length + 1, len(data), len(data) - 8])
            )
            + data[8:]
        )
    if deed in (1, 2):
        head = damaged_text(head, rng)
        return struct.pack('<Q', len(head)) + head + body
    if deed == 3:
        at, value = (
            rng.randrange(len(body) // 4) * 4,
            rng.choice([math.nan, math.inf, -math.inf, 1e38, 20_000.0, -1.0, 0.0]),
        )
        return data[:8] + head + body[:at] + struct.pack('<f', value) + body[at + 4 :]
    return damaged_bytes(data, rng)


def damaged(path, data, rng):
    "The bytes `data` of the file `path`, damaged as its kind allows"
    return (damaged_tensors if path.suffix == '.safetensors' else damaged_text)(data, rng)


# ---- what is asked of every read


@contextmanager
def no_hang(seconds=30):
    "A read that takes this long hangs"

    def stop(*_):
        raise TimeoutError('a reader hangs')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read):
    "What `read` returns, None for one of the two documented errors; any other error is the test's failure"
    try:
        with no_hang():
            return read()
    except (ValueError, FileNotFoundError) as err:
        assert type(err) in (ValueError, FileNotFoundError), (
            f'{type(err)} is not one of the documented kinds'
        )
        assert len(str(err)) < 3000 and str(err).encode()  # a message that can be shown
        return None


def check_lora(lora):
    "A LoRA that was read is finite and fits"
    assert (
        lora.A.shape[-4:-1] == (LAYERS, 2, WIDTH) and lora.A.dtype == lora.B.dtype == torch.float32
    )
    assert all(t.abs().max() <= 10_000 for t in lora.tensors().values())


def memory():
    "Bytes of this process now, and at its highest"
    return psutil.Process().memory_info().rss, resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss * 1024


def fuzz(folder, read, check, n, seed, mend=None):
    "`n` times damage one file in `folder`, read, put it back. Returns how many were read in spite of it"
    files = {
        p: p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and p.suffix in ('.json', '.safetensors') and p.name != 'made.json'
    }
    rng, sound = random.Random(seed), 0
    for i in range(n):
        if i == n // 5:
            start, peak = memory()  # by now everything is loaded and warm
        path = rng.choice(list(files))
        path.write_bytes(damaged(path, files[path], rng))
        if mend and rng.random() < 0.7:
            mend(path)
        result = outcome(read)
        if result is not None:
            check(result)
            sound += 1
        for p in {path, *([folder / 'manifest.json'] if mend else [])}:
            p.write_bytes(files[p])
    end, highest = memory()
    assert end - start < 48 * 2**20, 'memory grows from read to read'
    assert highest - peak < 200 * 2**20, 'one read took much memory'
    assert outcome(read) is not None, 'the undamaged files can be read'
    assert sound < 0.8 * n, 'hardly anything was damaged'
    return sound


WRITTEN = {  # kind of adapter -> class, targets, damaged files; with 3,000 of CLIP-LoRA 10,000
    'q v of CLIP': ('CLIPVisionModelWithProjection', ('q', 'v'), 2000),
    'all of CLIP': ('CLIPVisionModel', TARGETS, 1500),
    'all of SigLIP': ('SiglipVisionModel', TARGETS, 1000),
    'all of DINOv2': ('Dinov2Model', TARGETS, 1000),
    'attention of DINOv3': ('DINOv3ViTModel', TARGETS[:4], 500),
    'all of timm': ('VisionTransformer', TARGETS, 1000),
}


@pytest.mark.parametrize('kind', WRITTEN)
def test_damaged_peft_adapters(shm, kind):
    name, targets, n = WRITTEN[kind]
    gen = generator(0, 'damaged', kind)
    bare = new_lora(LAYERS, (WIDTH, 12), 2, gen, targets=targets)
    gen_b = torch.randn(bare.B.shape, generator=gen)
    lora = LoRA(bare.A, gen_b, tiny_lora(0).W, tiny_lora(0).b, targets)
    folder = shm / kind
    write_adapter(folder, lora, 'tiny', classes=['a', 'b', 'c'], model=(name, WIDTH))
    family = {'Siglip': 'SigLIP', 'Dinov2': 'DINOv2', 'DINOv3': 'DINOv3'}.get(name[:6])
    tower = exchange._Tower(LAYERS, WIDTH, OUT, 12, family)

    def check(adapter):
        found = adapter.lora
        assert found.A.shape[:2] == (LAYERS, len(found.targets)) and found.B.isfinite().all()
        assert all(t.abs().max() <= 10_000 for t in found.tensors().values())

    read = lambda: exchange._read_folder(folder, tower, False, Limits())
    assert fuzz(folder, read, check, n, 1) > 20


def test_damaged_files_of_a_market(shm, backbone):
    write_market(shm / 'm', stack_loras([tiny_lora(0), tiny_lora(1, 3)]), backbone)

    def mend(path):
        "As a stranger would: the manifest gets size and digest of the damaged file, so that the reader looks into it"
        if path.suffix != '.safetensors':
            return
        manifest, data = json.loads((shm / 'm' / 'manifest.json').read_text()), path.read_bytes()
        manifest['files'][path.name] = dict(
            bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        (shm / 'm' / 'manifest.json').write_text(json.dumps(manifest))

    def check(result):
        check_lora(result[0])

    assert fuzz(shm / 'm', lambda: read_market(shm / 'm', backbone), check, 4000, 2, mend) > 50


def test_damaged_backbones(shm):
    folder = shm / 'backbone'
    make_backbone(folder)

    def check(b):
        assert all(torch.isfinite(w).all() for w in b.weights.values())

    assert fuzz(folder, lambda: backbone_from_hf(folder), check, 2500, 3) > 20


def test_one_bad_adapter_is_skipped_never_a_crash(shm, backbone):
    "Whatever was done to one adapter, the other one is read, and the report names both"
    make_peft(shm / 'two')
    expected = tiny_lora(1, 2)

    def check(result):
        market, report = result
        check_lora(market)
        assert [e.name for e in report] == ['p0', 'p1'] and market.size == sum(
            e.loras for e in report
        )
        assert all(e.ok != bool(e.why) for e in report)
        if report[1].ok and not report[0].ok:
            assert torch.equal(market.A[0], expected.A)

    sound = fuzz_skip(shm / 'two', backbone, check, 1500)
    assert 0 < sound < 1500


def fuzz_skip(folder, backbone, check, n):
    "`n` times damage one file of adapter p0; reading with 'skip' must never fail. Returns how often p0 was read in spite of it"
    files = {
        p: p.read_bytes()
        for p in sorted((folder / 'p0').iterdir())
        if p.suffix in ('.json', '.safetensors') and p.name != 'made.json'
    }
    rng, sound = random.Random(4), 0
    for _ in range(n):
        path = rng.choice(list(files))
        path.write_bytes(damaged(path, files[path], rng))
        with no_hang():
            result = read_market(folder, backbone, on_error='skip')
        check(result)
        assert result[1][1].ok or result[1][0].ok
        sound += result[1][0].ok
        path.write_bytes(files[path])
    return sound


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=9), v, max_size=4),
)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_json(data):
    outcome(lambda: parse_json(data, 'x'))


@settings(max_examples=500, deadline=None)
@given(values)
def test_json_is_read_as_it_was_written_or_refused(value):
    text = json.dumps(value)
    found = outcome(lambda: [parse_json(text.encode(), 'x')])
    assert found is None or found == [json.loads(text)]


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(['A', 'B', 'W', 'b', 'x', '__metadata__']),
        values
        | st.fixed_dictionaries(
            dict(
                dtype=st.sampled_from(['F32', 'F16', 'U8']),
                shape=st.lists(st.integers(-1, 2**50), max_size=9),
                data_offsets=st.lists(st.integers(-1, 99), max_size=3),
            )
        ),
    ),
    st.integers(0, 99),
)
def test_any_header_of_safetensors(shm, header, size):
    path, text = shm / 'any.safetensors', json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + b'\0' * size)
    found = outcome(lambda: tensor_header(path))
    if found:
        assert (
            sum(exchange._BYTES[kind] * math.prod(shape) for kind, shape in found.values()) == size
        )


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(exchange._NEUTRAL + ['use_dora', 'x']), values, max_size=4))
def test_any_settings_of_an_adapter(shm, changes):
    folder = shm / 'any_settings'
    if not folder.exists():
        write_adapter(folder, tiny_lora(0), 'tiny')
    path = folder / 'adapter_config.json'
    good = path.read_text()
    path.write_text(json.dumps(json.loads(good) | changes))
    try:
        outcome(lambda: read_adapter(folder, LAYERS, WIDTH, OUT))
    finally:
        path.write_text(good)


name = st.text('qv_proj.layersk01', min_size=1, max_size=12)


@settings(max_examples=500, deadline=None)
@given(name, name)
def test_patterns_fit_as_in_peft(pattern, module):
    import re  # what peft does, see peft.utils.other.get_pattern_key

    assert pattern_fits(pattern, module) == bool(re.match(rf'(.*\.)?({pattern})$', module))


# ---- what a clever stranger would try


class Trap:
    "A pickle that leaves a trace when it is read"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize('name', ['adapter_model.bin', 'adapter_model.safetensors'])
def test_pickles_are_not_read(tmp_path, name):
    folder = make_peft(tmp_path, 1) / 'p0'
    (folder / 'adapter_model.safetensors').unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / 'trace')))
    with pytest.raises(ValueError, match='pickle' if name.endswith('bin') else 'damaged'):
        read_adapter(folder, LAYERS, WIDTH)
    assert not (tmp_path / 'trace').exists()


def test_a_pickled_backbone_is_not_read(tmp_path):
    make_backbone(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError):
        backbone_from_hf(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(tmp_path / 'trace')))
    with pytest.raises(ValueError, match='pickle'):
        backbone_from_hf(tmp_path)
    assert not (tmp_path / 'trace').exists()


@pytest.mark.parametrize(
    'file', ['adapter_config.json', 'adapter_model.safetensors', 'head.safetensors', 'classes.json']
)
def test_links_are_not_followed(tmp_path, backbone, file):
    folder = make_peft(tmp_path / 'm', 1) / 'p0'
    (folder / file).rename(tmp_path / 'secret')
    (folder / file).symlink_to(tmp_path / 'secret')
    with pytest.raises(ValueError, match='is a link'):
        read_adapter(folder, LAYERS, WIDTH)
    with pytest.raises(ValueError, match='is a link'):
        read_market(tmp_path / 'm', backbone)
    assert read_adapter(folder, LAYERS, WIDTH, limits=Limits(links=True)).classes == (
        'a',
        'b',
        'c',
    )  # as in the cache of the hub


def test_a_linked_folder_is_not_followed(tmp_path, backbone):
    make_peft(tmp_path / 'm', 1)
    make_peft(tmp_path / 'elsewhere', 1)
    (tmp_path / 'm' / 'q').symlink_to(tmp_path / 'elsewhere' / 'p0')
    market, report = read_market(tmp_path / 'm', backbone, on_error='skip')
    assert market.size == 1 and 'is a link' in report[1].why


@pytest.mark.parametrize(
    'name',
    [
        '../out.safetensors',
        'a/../../out.safetensors',
        '{abs}',
        'link.safetensors',
        'linked/out.safetensors',
        '.hidden',
        '',
        'a\0b',
        'C:\\x',
        'x' * 300,
    ],
)
def test_a_manifest_cannot_lead_out(tmp_path, backbone, name):
    record = save_tensors(tmp_path / 'out.safetensors', tiny_lora(0).tensors())
    write_market(tmp_path / 'm', stack_loras([tiny_lora(0)]), backbone)
    (tmp_path / 'm' / 'link.safetensors').symlink_to(tmp_path / 'out.safetensors')
    (tmp_path / 'm' / 'linked').symlink_to(tmp_path)
    manifest = read_json(tmp_path / 'm' / 'manifest.json')
    manifest['files'][name.format(abs=tmp_path / 'out.safetensors')] = record
    write_json(tmp_path / 'm' / 'manifest.json', manifest)
    with pytest.raises(ValueError, match='is not legal|is a link'):
        read_market(tmp_path / 'm', backbone)
    market, report = read_market(tmp_path / 'm', backbone, on_error='skip')
    assert market.size == 1 and [e.ok for e in report] == [True, False]


@pytest.mark.parametrize(
    'file', ['adapter_config.json', 'adapter_model.safetensors', 'head.safetensors']
)
def test_a_pipe_is_not_waited_for(tmp_path, file):
    folder = make_peft(tmp_path, 1) / 'p0'
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with no_hang(), pytest.raises(ValueError, match='not a plain file'):
        read_adapter(folder, LAYERS, WIDTH)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(ValueError, match='not a plain file'):
        read_adapter(folder, LAYERS, WIDTH)


def test_a_file_of_holes_is_not_read(tmp_path):
    "A sparse file takes no space on the disk and 10 TB in memory"
    folder = make_peft(tmp_path, 1) / 'p0'
    for file, why in (
        ('adapter_model.safetensors', 'bytes; 8 to'),
        ('adapter_config.json', 'is the most'),
    ):
        shutil.copy(folder / file, tmp_path / 'kept')
        os.truncate(folder / file, 10 * 2**30)
        before = memory()[1]
        with no_hang(), pytest.raises(ValueError, match=why):
            read_adapter(folder, LAYERS, WIDTH)
        assert memory()[1] - before < 64 * 2**20
        shutil.copy(tmp_path / 'kept', folder / file)


def test_a_large_tensor_is_refused_by_its_header(tmp_path):
    "200 MB of zeros where a rank of 2 was announced: nothing of it is read"
    folder = make_peft(tmp_path, 1) / 'p0'
    entry = dict(dtype='F32', shape=[6_000_000, 8], data_offsets=[0, 192_000_000])
    text = json.dumps(
        {'base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight': entry}
    ).encode()
    (folder / 'adapter_model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)
    os.truncate(folder / 'adapter_model.safetensors', 8 + len(text) + 192_000_000)
    before = memory()[1]
    with pytest.raises(ValueError):
        read_adapter(folder, LAYERS, WIDTH)
    assert memory()[1] - before < 64 * 2**20


F32 = lambda shape, begin, end: dict(dtype='F32', shape=shape, data_offsets=[begin, end])


@pytest.mark.parametrize(
    'header, why',
    [
        (dict(a=F32([2], 0, 8), b=F32([2], 8, 16)), None),
        (dict(a=F32([2], 0, 8), b=F32([2], 4, 12)), 'overlap'),
        (dict(a=F32([1], 0, 4), b=F32([2], 8, 16)), 'gap'),
        (dict(a=F32([3], 0, 16)), 'does not fill'),
        (dict(a=F32([2], 0, 8)), 'fill 8 of 16'),
        (dict(a=F32([2**40, 2**40], 0, 16)), 'does not fill'),
        (dict(a=F32([True, 4], 0, 16)), 'shape'),
        (dict(a=F32([4.0], 0, 16)), 'shape'),
        (dict(a=F32([0], 0, 0), b=F32([4], 0, 16)), 'shape'),
        (dict(a=F32([4], 16, 0)), 'does not fill'),
        (dict(a=F32([4], 0, -16)), 'data_offsets'),
        (dict(a=F32([4], 0, 10**20)), 'digits'),
        (dict(a=dict(dtype='U8', shape=[16], data_offsets=[0, 16])), 'type'),
        ([1], 'no object'),
        (dict(__metadata__=dict(a=1)), '__metadata__'),
        ({'x' * 3000: F32([4], 0, 16)}, 'is the most'),
    ],
    ids=str,
)
def test_a_header_must_account_for_every_byte(tmp_path, header, why):
    text = json.dumps(header).encode()
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + b'\0' * 16)
    read = lambda: tensor_header(tmp_path / 'x.safetensors', Limits(header_bytes=2000))
    if why is None:
        assert read() == {k: ('F32', (2,)) for k in 'ab'}
    else:
        with pytest.raises(ValueError, match=why):
            read()


def test_a_header_cannot_change_between_check_and_read(tmp_path):
    save_tensors(tmp_path / 'x.safetensors', dict(x=torch.ones(2)))
    header = tensor_header(tmp_path / 'x.safetensors')
    save_tensors(tmp_path / 'x.safetensors', dict(x=torch.ones(3)))
    with pytest.raises(ValueError, match='changed'):
        exchange.read_tensors(tmp_path / 'x.safetensors', header)


def test_one_large_rank_cannot_blow_up_a_market(tmp_path, backbone):
    "Padding to the highest rank is counted before it is done"
    for i, rank in enumerate((1, 1, 1, 64)):
        write_adapter(tmp_path / f'{i}', tiny_lora(i, rank), 'tiny')
    limits = Limits(market_bytes=4 * 4 * 2 * LAYERS * 2 * WIDTH * 60)
    market, report = read_market(tmp_path, backbone, on_error='skip', limits=limits)
    assert market.size == 3 and market.rank == 1 and 'would have 4 LoRAs' in report[3].why
    with pytest.raises(ValueError, match='r=64 is not legal'):
        read_market(tmp_path, backbone, limits=Limits(rank=63))
    with pytest.raises(ValueError, match='holds 4 adapters'):
        read_market(tmp_path, backbone, limits=Limits(loras=3))


@pytest.mark.parametrize(
    'pattern', ['(a+)+$', '(.*)*x', '.*q_proj', '[q]_proj', 'q_proj|v_proj', '', 'q' * 70 + '+']
)
def test_no_regular_expression_of_a_stranger_is_run(tmp_path, pattern):
    folder = make_peft(tmp_path, 1) / 'p0'
    config = read_json(folder / 'adapter_config.json')
    for key in ('rank_pattern', 'alpha_pattern'):
        write_json(folder / 'adapter_config.json', config | {key: {pattern: 1}})
        with no_hang(), pytest.raises(ValueError, match='regular expression'):
            read_adapter(folder, LAYERS, WIDTH)


def test_a_scale_cannot_make_numbers_too_large(tmp_path):
    folder = make_peft(tmp_path, 1) / 'p0'
    write_json(
        folder / 'adapter_config.json',
        read_json(folder / 'adapter_config.json') | dict(lora_alpha=10**6),
    )
    with pytest.raises(ValueError, match='its scale'):
        read_adapter(folder, LAYERS, WIDTH)


# ---- markets and heads


def test_heads_must_agree_or_are_dropped(tmp_path, backbone):
    make_peft(tmp_path)
    other, bare = tiny_lora(5), tiny_lora(6)
    write_adapter(
        tmp_path / 'p2', LoRA(other.A, other.B, torch.zeros(OUT, 4), torch.zeros(4)), 'tiny'
    )
    write_adapter(tmp_path / 'p3', LoRA(bare.A, bare.B), 'tiny')
    with pytest.raises(ValueError, match="'p2'.*4 classes, the first adapter 3"):
        read_market(tmp_path, backbone)
    market, report = read_market(tmp_path, backbone, on_error='skip')
    assert market.size == 2 and 'has no head' in report[3].why and market.W.shape == (2, OUT, WAY)
    market, _ = read_market(tmp_path, backbone, head='drop')
    assert market.size == 4 and market.W is None


def test_two_heads_are_refused(tmp_path):
    folder = make_peft(tmp_path, 1) / 'p0'
    tensors = exchange.read_tensors(
        folder / 'adapter_model.safetensors', tensor_header(folder / 'adapter_model.safetensors')
    )
    save_tensors(
        folder / 'adapter_model.safetensors',
        tensors | {'base_model.model.classifier.weight': torch.zeros(WAY, OUT)},
    )
    with pytest.raises(ValueError, match='two heads'):
        read_adapter(folder, LAYERS, WIDTH)
    (folder / 'head.safetensors').unlink()
    head = read_adapter(folder, LAYERS, WIDTH, OUT).lora
    assert head.W.shape == (OUT, WAY) and head.b.abs().max() == 0  # no bias was saved


@pytest.mark.parametrize(
    'change',
    [
        lambda t: t[..., :1, :],
        lambda t: t[..., :1],
        lambda t: t[None],
        lambda t: t[0],
        lambda t: t.long(),
    ],
)
@pytest.mark.parametrize('key', ['A', 'B', 'W', 'b'])
def test_our_files_must_fit_the_backbone(tmp_path, backbone, key, change):
    write_market(tmp_path / 'm', stack_loras([tiny_lora(0)]), backbone)
    tensors = tiny_lora(0).tensors()
    if tensors[key].ndim == 1 and change(torch.ones(2, 2)).shape == (1, 2):
        tensors[key] = tensors[key][:2]
    else:
        tensors[key] = change(tensors[key])
    manifest = read_json(tmp_path / 'm' / 'manifest.json')
    manifest['files'] = {
        '00000.safetensors': save_tensors(tmp_path / 'm' / '00000.safetensors', tensors)
    }
    write_json(tmp_path / 'm' / 'manifest.json', manifest)
    with pytest.raises(ValueError):
        read_market(tmp_path / 'm', backbone)


def test_a_market_in_one_file(tmp_path, backbone):
    "M LoRAs in one file are M LoRAs; a second file of another rank joins them"
    market = stack_loras([tiny_lora(i) for i in range(3)])
    files = {
        'a.safetensors': save_tensors(
            tmp_path / 'a.safetensors',
            market.tensors() | dict(classes=torch.arange(3), accuracy=torch.ones(3)),
        ),
        'b.safetensors': save_tensors(tmp_path / 'b.safetensors', tiny_lora(9, 5).tensors()),
    }
    write_json(tmp_path / 'manifest.json', dict(files=files))
    again, report = read_market(tmp_path, backbone)
    assert again.size == 4 and again.rank == 5 and [e.loras for e in report] == [3, 1]
    assert torch.equal(again.A[:3, ..., :2], market.A) and torch.equal(
        again.A[3], tiny_lora(9, 5).A
    )


def test_folders_that_are_none(tmp_path, backbone):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(ValueError, match='no folder'):
        read_market(tmp_path / 'file', backbone)
    with pytest.raises(FileNotFoundError, match='no folder'):
        read_market(tmp_path / 'none', backbone)
    with pytest.raises(ValueError, match='cannot be read'):
        read_adapter(tmp_path / 'file', LAYERS, WIDTH)
    with pytest.raises(ValueError, match='cannot be read'):
        read_adapter(tmp_path / ('x' * 300), LAYERS, WIDTH)
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_market(tmp_path, backbone, on_error='ignore')


def test_shards_and_foreign_backbones_are_refused(tmp_path, backbone):
    make_backbone(tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'model-00001-of-00002.safetensors')
    write_json(tmp_path / 'model.safetensors.index.json', {})
    with pytest.raises(ValueError, match='several files'):
        backbone_from_hf(tmp_path)
    with pytest.raises(ValueError, match='no plain CLIP'):
        exchange.hf_state(
            replace(backbone, weights=backbone.weights | {'conv1.bias': torch.zeros(WIDTH)})
        )
    assert backbone.mean == (0.5, 0.5, 0.5) and backbone.std == (
        0.2,
        0.2,
        0.2,
    )  # of preprocessor_config.json


@pytest.mark.parametrize(
    'made',
    [
        dict(scores=[dict(set='a', way=5, shot=1, accuracy=math.nan)]),
        dict(scores=[dict(set='a\nb', way=5, shot=1, accuracy=1.0)]),
        dict(license='mit\ntags: x'),
    ],
)
def test_nothing_can_break_out_of_the_card(tmp_path, made):
    with pytest.raises(ValueError):
        write_adapter(tmp_path, tiny_lora(0), 'tiny', made)
    assert not list(tmp_path.iterdir())  # refused before the first file


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read_as_float32(tmp_path, dtype):
    lora = tiny_lora(0)
    write_adapter(tmp_path, lora.map(lambda t: t.to(dtype)), 'tiny')
    assert torch.equal(read_adapter(tmp_path, LAYERS, WIDTH).lora.A, lora.A.to(dtype).float())


def test_whole_numbers_are_refused(tmp_path):
    write_adapter(tmp_path, tiny_lora(0).map(lambda t: t.to(torch.int8)), 'tiny')
    with pytest.raises(ValueError, match="'I8'"):
        read_adapter(tmp_path, LAYERS, WIDTH)
    write_adapter(tmp_path, tiny_lora(0).map(lambda t: t.to(torch.int64)), 'tiny')
    with pytest.raises(ValueError, match='whole numbers'):
        read_adapter(tmp_path, LAYERS, WIDTH)


def test_a_market_that_was_not_finished_is_no_market(tmp_path, backbone, monkeypatch):
    "The manifest is the last file to be written"

    def full(*_):
        raise OSError('no space left')

    monkeypatch.setattr(exchange, 'write_json', full)
    with pytest.raises(OSError):
        write_market(tmp_path / 'm', stack_loras([tiny_lora(0)]), backbone)
    with pytest.raises(OSError):
        write_adapter(tmp_path / 'a', tiny_lora(0), 'tiny')
    with pytest.raises(ValueError, match='0 adapters'):
        read_market(tmp_path / 'm', backbone)
    with pytest.raises(FileNotFoundError):
        read_adapter(tmp_path / 'a', LAYERS, WIDTH)


def test_a_market_is_read_as_it_was_written(tmp_path, backbone):
    market = stack_loras([tiny_lora(i, i + 1) for i in range(3)])
    write_market(tmp_path / 'm', market, backbone, ["Zoë's", 'b c', 'd'])
    again, report = read_market(tmp_path / 'm', backbone)
    assert (
        all(torch.equal(again.tensors()[k], t) for k, t in market.tensors().items())
        and len(report) == 3
    )
    with pytest.raises(ValueError, match='not empty'):
        write_market(tmp_path / 'm', market, backbone)
    with pytest.raises(ValueError, match='names'):
        write_market(tmp_path / 'n', market, backbone, ['a', 'a', 'b'])
    with pytest.raises(ValueError, match='not legal'):
        write_market(tmp_path / 'n', market, backbone, ['a', '../a', 'b'])
    with pytest.raises(ValueError, match='single LoRA'):
        write_market(tmp_path / 'n', market[0], backbone)


# ---- what is refused, with the word that helps


@pytest.mark.parametrize(
    'text',
    [
        b'[' * 100_000,
        b'1' * 100_000,
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b'\xff\xfe',
        b'"' + b'\\"' * 100_000,
    ],
    ids=['deep', 'digits', 'nan', 'twice', 'bytes', 'open'],
)
def test_json_that_is_none(text):
    with pytest.raises(ValueError, match='x is not sound JSON'):
        parse_json(text, 'x')


def test_json_files_have_a_largest_size_and_are_objects(tmp_path):
    (tmp_path / 'list.json').write_text('[1]')
    with pytest.raises(ValueError, match='not an object'):
        read_json(tmp_path / 'list.json')
    with pytest.raises(ValueError, match='2 is the most'):
        read_json(tmp_path / 'list.json', Limits(json_bytes=2))


SOUND = dict(peft_type='LORA', r=4, lora_alpha=8, target_modules=['q_proj'], use_dora=False)


@pytest.mark.parametrize(
    'change',
    [
        dict(peft_type='LOHA'),
        dict(use_dora=True),
        dict(bias='all'),
        dict(fan_in_fan_out=True),
        dict(init_lora_weights='pissa'),
        dict(init_lora_weights=[]),
        dict(new_setting=3),
    ],
    ids=str,
)
def test_settings_that_are_no_plain_lora_are_named(change):
    exchange.check_adapter_config(SOUND | dict(another_setting=None))
    with pytest.raises(ValueError, match=next(iter(change))):
        exchange.check_adapter_config(SOUND | change)


@pytest.mark.parametrize(
    'change, why',
    [
        (dict(r=True), 'r=True'),
        (dict(r=200), 'r=200'),
        (dict(lora_alpha='8'), 'lora_alpha='),
        (dict(use_rslora=1), 'use_rslora='),
        (dict(rank_pattern=[1]), 'rank_pattern must map'),
    ],
)
def test_ranks_and_scales_are_numbers(change, why):
    with pytest.raises(ValueError, match=why):
        exchange.module_scaling(SOUND | change, 'encoder.layers.0.self_attn.q_proj')


def test_sizes_that_do_not_fit_are_said(tmp_path, backbone):
    folder = make_peft(tmp_path, 2) / 'p1'
    for sizes, why in (
        ((LAYERS + 1, WIDTH), 'layer 2 of 3'),
        ((1, WIDTH), 'layers 0 to 0'),
        ((LAYERS, 9), r'\(2, 9\)'),
        ((LAYERS, WIDTH, 7), r'\[7,C\]'),
    ):
        with pytest.raises(ValueError, match=why):
            read_adapter(folder, *sizes)
    with pytest.raises(ValueError, match='name the folder above it'):
        read_market(folder, backbone)
    with pytest.raises(ValueError, match='a market of 1'):
        write_adapter(tmp_path / 'x', stack_loras([tiny_lora(0)]), 'tiny')
    with pytest.raises(ValueError, match='do not fit the head'):
        write_adapter(tmp_path / 'x', tiny_lora(0), 'tiny', classes=['a'])
    write_market(tmp_path / 'm', stack_loras([tiny_lora(0)]), backbone)
    with pytest.raises(ValueError, match='was made for the backbone'):
        read_market(tmp_path / 'm', replace(backbone, name='another'))


@pytest.mark.parametrize('extra', ['lora_magnitude_vector', 'lora_B.bias', 'lora_embedding_A'])
def test_tensors_that_no_plain_lora_has_are_named(tmp_path, extra):
    folder = make_peft(tmp_path, 1) / 'p0'
    path = folder / 'adapter_model.safetensors'
    tensors = exchange.read_tensors(path, tensor_header(path))
    at = 'base_model.model.vision_model.encoder.layers.0.self_attn.q_proj'
    save_tensors(path, tensors | {f'{at}.{extra}': torch.zeros(WIDTH)})
    with pytest.raises(ValueError, match=f'{extra}.*not part of a plain LoRA'):
        read_adapter(folder, LAYERS, WIDTH)


@pytest.mark.parametrize(
    'change, why',
    [
        (dict(num_hidden_layers=3), '16 of 56 tensors are missing'),
        (dict(num_hidden_layers=1), '16 tensors are not known'),
        (dict(patch_size=2), r'position_embedding.weight is|patch_embedding.weight is'),
        (dict(hidden_act='silu'), "'silu'"),
        (dict(num_channels=1), 'num_channels=1'),
        (dict(model_type='siglip'), "'siglip'"),
    ],
)
def test_a_backbone_must_fit_its_settings(tmp_path, change, why):
    make_backbone(tmp_path)
    write_json(tmp_path / 'config.json', CONFIG | change)
    with pytest.raises(ValueError, match=why):
        backbone_from_hf(tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        dict(image_mean=[0.5, 0.5]),
        dict(image_std=[0.0, 1.0, 1.0]),
        dict(do_normalize=1),
        dict(rescale_factor=-1),
    ],
    ids=str,
)
def test_what_is_said_about_pixels_must_make_sense(tmp_path, change):
    make_backbone(tmp_path)
    write_json(tmp_path / 'preprocessor_config.json', change)
    with pytest.raises(ValueError, match=next(iter(change))):
        backbone_from_hf(tmp_path)


def in_hub_cache(folder, made):
    "The files of the folder `made` as the hub's cache holds them; the snapshot."
    repository = folder / 'models--ann--lora'
    snapshot = repository / 'snapshots' / ('a' * 40)
    (repository / 'blobs').mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in made.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / 'blobs' / name)
        (snapshot / path.name).symlink_to(f'../../blobs/{name}')
    return snapshot


def test_the_cache_of_the_hub_can_be_read(tmp_path):
    made = make_peft(tmp_path / 'made', 1) / 'p0'
    snapshot = in_hub_cache(tmp_path, made)
    found = read_adapter(snapshot, LAYERS, WIDTH, OUT).lora
    assert torch.equal(found.A, tiny_lora(0, 1).A) and found.W is not None


@pytest.mark.parametrize('target', ['/etc/passwd', '../../../secret', '../../blobs/../../secret'])
def test_a_link_that_only_looks_like_the_hubs_is_not_followed(tmp_path, target):
    snapshot = in_hub_cache(tmp_path, make_peft(tmp_path / 'made', 1) / 'p0')
    (tmp_path / 'secret').write_text('{}')
    link = snapshot / 'adapter_config.json'
    link.unlink()
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r'is a link.*limits=Limits\(links=True\)'):
        read_adapter(snapshot, LAYERS, WIDTH)
    blob = snapshot.parent.parent / 'blobs' / ('b' * 64)
    blob.symlink_to(tmp_path / 'secret')  # the right form, but the blob is itself a link
    link.unlink()
    link.symlink_to(f'../../blobs/{blob.name}')
    with pytest.raises(ValueError, match='is a link'):
        read_adapter(snapshot, LAYERS, WIDTH)


def test_numbers_of_a_kind_that_is_not_read_are_called_that_not_damage(tmp_path):
    save_tensors(tmp_path / 'x.safetensors', dict(x=torch.ones(2).to(torch.int8)))
    with pytest.raises(ValueError, match="sound, but cannot be used.*'I8'.*Cast it"):
        tensor_header(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('targets', [['v', 'q'], ['fc1'], 'qv', [], ['q', 'q'], [['q']]])
def test_targets_of_a_manifest_are_checked(tmp_path, backbone, targets):
    write_market(tmp_path / 'm', stack_loras([tiny_lora(0)]), backbone)
    manifest = read_json(tmp_path / 'm' / 'manifest.json')
    write_json(tmp_path / 'm' / 'manifest.json', manifest | dict(targets=targets))
    with pytest.raises(ValueError, match='targets'):
        read_market(tmp_path / 'm', backbone)
