"Names become backbones: equal to their makers' forward, read without running code."

import hashlib
import os
import pickle
import warnings
import zipfile
from argparse import Namespace
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lora_recycle.paper import models
from lora_recycle.method.backbone import embed_patches, encode
from lora_recycle.core import digest, generator, save_tensors, write_json
from lora_recycle.bench.cost import ViTShape, random_backbone
from lora_recycle.paper.datasets import NORMALISATIONS
from lora_recycle.use.exchange import hf_state
from lora_recycle.method.lora import new_lora
from lora_recycle.suite.miniature import load_clip, load_miniature
from lora_recycle.paper.models import (
    MODELS,
    Model,
    backbone_from_weights,
    check_backbone,
    check_keys,
    expected_shapes,
    half_precise,
    load_backbone,
    model_table,
    published,
    random_weights,
    read_checkpoint,
    stem_flops_g,
)

TINY = Model(
    ViTShape('tiny', 8, 4, 16, 2, 2, 6),
    'clip',
    'quick_gelu',
    url='https://nowhere.example/tiny.pt',
    sha256='0' * 64,
    hub=('someone/tiny', 'tiny.safetensors'),
)


@pytest.fixture
def tiny(monkeypatch):
    "A small model of CLIP's layout under the name 'tiny', and a checkpoint of it"
    monkeypatch.setitem(MODELS, 'tiny', TINY)
    return random_weights('tiny')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Whatever asks the hub is told that there is no network"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


def images(n=1, side=224, key=0):
    return torch.randn(n, 3, side, side, generator=generator(0, 'models test', key))


def open_clip_tower(name, tensors):
    "open_clip's own image tower of its model `name` with these weights"
    with torch.device('meta'):
        tower = open_clip.model.CLIP(**open_clip.get_model_config(name)).visual
    tower.load_state_dict(
        {k.removeprefix('visual.'): t.float() for k, t in tensors.items()}, strict=True, assign=True
    )
    return tower.eval()


# ---- numerics


@pytest.mark.parametrize('name', ['ViT-B-16', 'ViT-B-32'])
@torch.no_grad()
def test_clip_equals_open_clip(name):
    tensors, x = random_weights(name), images(2)
    backbone, theirs = (
        backbone_from_weights(name, tensors),
        open_clip_tower(f'{name}-quickgelu', tensors)(x),
    )
    assert (encode(backbone, x).features - theirs).abs().max() < 1e-5 < theirs.abs().mean()
    assert (encode(replace(backbone, act='gelu'), x).features - theirs).abs().max() > 1e-3, (
        'the test would see the wrong activation'
    )
    assert backbone.side == 224
    assert (
        sum(t.numel() for t in new_lora(backbone.layers, backbone.width, 4).tensors().values())
        == 147_456
    )


@torch.no_grad()
def test_miniature_equals_open_clip():
    backbone, x = load_backbone('miniature'), images(4, 36)
    assert backbone.digest == load_miniature().digest == 'e7a5c37547574b09', (
        'the shipped market and all caches are keyed by it'
    )
    assert (encode(backbone, x).features - load_clip().encode_image(x)).abs().max() < 1e-5


def test_without_a_stem_the_patches_are_a_plain_convolution():
    backbone, x = load_miniature(), images(4, 36)
    w = backbone.weights
    plain = F.conv2d(x, w['conv1.weight'], w.get('conv1.bias'), stride=6).flatten(2).transpose(1, 2)
    expected = (
        torch.cat([w['class_embedding'].expand(4, 1, -1), plain], 1) + w['positional_embedding']
    )
    assert torch.equal(embed_patches(backbone, x), expected)


@torch.no_grad()
def test_deit_equals_timm():
    tensors, x = random_weights('DeiT-B'), images(2)
    with torch.device('meta'):
        theirs = timm.create_model('deit_base_patch16_224')
    head = {'head.weight': torch.zeros(1000, 768), 'head.bias': torch.zeros(1000)}
    theirs.load_state_dict(tensors | head, strict=True, assign=True)
    theirs = theirs.eval().forward_head(theirs.forward_features(x), pre_logits=True)
    backbone = backbone_from_weights('DeiT-B', tensors | head)
    ours = encode(backbone, x).features
    assert ((ours - theirs).norm() / theirs.norm()) < 1e-5 and (ours - theirs).abs().max() < 1e-4
    wrong = encode(replace(backbone, eps=0.1), x).features
    assert ((wrong - theirs).norm() / theirs.norm()) > 1e-3
    config = timm.get_pretrained_cfg('deit_base_patch16_224')
    assert (
        (backbone.mean, backbone.std) == (config.mean, config.std)
        and MODELS['DeiT-B'].hub[0] == config.hf_hub_id
        and MODELS['DeiT-B'].url == config.url
    )


class Part(nn.Module):
    "Attention or MLP of LV-ViT, with the names of its makers' checkpoint"

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class LVViT(nn.Module):
    "LV-ViT-M written out from its paper: what the conversion is compared with"

    def __init__(self, D=512, depth=20, heads=8):
        super().__init__()
        self.heads, conv = heads, lambda n, k, s: nn.Conv2d(n, 64, k, s, k // 2, bias=False)
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, D)),
            nn.Parameter(torch.zeros(1, 197, D)),
        )
        self.patch_embed = Part(
            conv1=conv(3, 7, 2),
            bn1=nn.BatchNorm2d(64),
            conv2=conv(64, 3, 1),
            bn2=nn.BatchNorm2d(64),
            conv3=conv(64, 3, 1),
            bn3=nn.BatchNorm2d(64),
            proj=nn.Conv2d(64, D, 8, 8),
        )
        self.blocks = nn.ModuleList(
            Part(
                norm1=nn.LayerNorm(D),
                attn=Part(qkv=nn.Linear(D, 3 * D, bias=False), proj=nn.Linear(D, D)),
                norm2=nn.LayerNorm(D),
                mlp=Part(fc1=nn.Linear(D, 3 * D), fc2=nn.Linear(3 * D, D)),
            )
            for _ in range(depth)
        )
        self.norm, self.head, self.aux_head = (
            nn.LayerNorm(D),
            nn.Linear(D, 1000),
            nn.Linear(D, 1000),
        )

    def attend(self, attn, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x):
        stem = self.patch_embed
        for i in '123':
            x = F.relu(getattr(stem, f'bn{i}')(getattr(stem, f'conv{i}')(x)))
        x = stem.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + self.attend(block.attn, block.norm1(x)) / 2
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))) / 2
        return self.norm(x)[:, 0]


@torch.no_grad()
def test_lvvit_equals_a_plain_module():
    tensors, x = random_weights('LV-ViT-M'), images(1)
    with torch.device('meta'):
        theirs = LVViT()
    rest = {k: torch.zeros(t.shape) for k, t in theirs.state_dict().items() if k not in tensors}
    assert all('head' in k or 'num_batches' in k for k in rest) and len(rest) == 7
    theirs.load_state_dict(tensors | rest, strict=True, assign=True)
    backbone = backbone_from_weights('LV-ViT-M', tensors | rest)  # 248 keys, 241 of them used
    theirs, ours = theirs.eval()(x), encode(backbone, x).features
    assert ((ours - theirs).norm() / theirs.norm()) < 1e-5
    unscaled = backbone_from_weights('LV-ViT-M', tensors).weights | {
        k: 2 * w for k, w in backbone.weights.items() if '.c_proj.' in k
    }
    assert (
        (encode(replace(backbone, weights=unscaled), x).features - theirs).norm() / theirs.norm()
    ) > 1e-2, 'the test would see a forgotten scale'


def test_lvvit_works_with_lora_plan_and_sparse_tokens(monkeypatch):
    monkeypatch.setitem(
        MODELS, 'lv', replace(MODELS['LV-ViT-M'], shape=ViTShape('lv', 64, 16, 32, 3, 2, 32, 3.0))
    )
    backbone, x, keep = (
        load_backbone('lv', 'random'),
        images(2, 64).requires_grad_(),
        torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4]]),
    )
    zero = new_lora(3, 32, 4, generator(0), n=2)
    lora = replace(zero, B=torch.randn(zero.B.shape, generator=generator(1)))
    assert torch.equal(encode(backbone, x, zero).features, encode(backbone, x).features)
    out = encode(backbone, x, lora, plan={1: 0.5}, keep=keep)
    alone = encode(backbone, x[1:], lora[1], plan={1: 0.5}, keep=keep[1:])
    assert (
        out.features.shape == (2, 32)
        and torch.equal(out.kept[1:], alone.kept)
        and torch.allclose(out.features[1:], alone.features, atol=1e-4)
    )
    (gradient,) = torch.autograd.grad(out.features.sum(), x)
    assert gradient.abs().sum() > 0, 'images can be inverted through the stem'
    assert backbone.side == 64


@torch.no_grad()
def test_vit_b_32_equals_transformers_at_full_size():
    transformers = pytest.importorskip('transformers')
    backbone, x = load_backbone('ViT-B-32', 'random'), images(1)
    with torch.device('meta'):
        theirs = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig()
        )  # its defaults are this model
    state = hf_state(backbone)
    ids = {k: torch.arange(50)[None] for k in dict(theirs.named_buffers())}
    theirs.load_state_dict(state, strict=True, assign=True)
    for k in ids:
        theirs.get_submodule(k.rpartition('.')[0]).register_buffer(
            k.rpartition('.')[2], ids[k], persistent=False
        )
    assert (
        encode(backbone, x).features - theirs.eval()(pixel_values=x).image_embeds
    ).abs().max() < 1e-5


# ---- keys


def test_number_of_keys():
    theirs = timm.create_model(
        'deit_base_patch16_224', num_classes=0, depth=1, embed_dim=48, num_heads=3
    ).state_dict()
    assert {k for k in expected_shapes('DeiT-B') if 'blocks' not in k or 'blocks.0.' in k} == set(
        theirs
    )
    assert {
        name: len(expected_shapes(name))
        for name in ('ViT-B-16', 'ViT-B-32', 'DeiT-B', 'LV-ViT-M', 'miniature')
    } == {'ViT-B-16': 152, 'ViT-B-32': 152, 'DeiT-B': 150, 'LV-ViT-M': 241, 'miniature': 56}


@pytest.mark.parametrize('name', list(MODELS))
def test_missing_and_extra_keys_are_counted_and_named(name):
    shapes = expected_shapes(name)
    check_keys(name, shapes)
    for key in list(shapes)[::17]:
        with pytest.raises(ValueError, match=f'1 of {len(shapes)} keys are missing: {key}'):
            check_keys(name, {k: s for k, s in shapes.items() if k != key})
        with pytest.raises(ValueError, match=f'1 of {len(shapes)} have another shape: {key}'):
            check_keys(name, shapes | {key: (3, *shapes[key])})
        with pytest.raises(ValueError, match=f'1 keys are not known: {key}_scale'):
            check_keys(name, shapes | {key + '_scale': (1,)})
    with pytest.raises(
        ValueError,
        match=f'{len(shapes)} of {len(shapes)} keys are missing.* and {len(shapes) - 4} more',
    ):
        check_keys(name, {})


def test_only_the_known_rest_may_be_there():
    text = [
        k
        for k in open_clip.model.CLIP(
            8,
            dict(image_size=8, layers=1, width=16, head_width=8, patch_size=4),
            dict(context_length=8, vocab_size=9, width=16, heads=2, layers=2),
        ).state_dict()
        if not k.startswith('visual.')
    ]
    check_keys(
        'ViT-B-16',
        expected_shapes('ViT-B-16')
        | {k: (1,) for k in [*text, 'input_resolution', 'context_length', 'vocab_size']},
    )
    for name, strange in (
        ('ViT-B-16', 'head.weight'),
        ('DeiT-B', 'aux_head.weight'),
        ('DeiT-B', 'dist_token'),
        ('DeiT-B', 'head_dist.bias'),
        ('LV-ViT-M', 'logit_scale'),
        ('ViT-B-16', 'visual.transformer.resblocks.12.ln_1.bias'),
        ('LV-ViT-M', 'blocks.20.norm1.weight'),
    ):
        with pytest.raises(ValueError, match='1 keys are not known'):
            check_keys(name, expected_shapes(name) | {strange: (1,)})


def test_a_file_of_transformers_is_recognised(tiny):
    state = hf_state(backbone_from_weights('tiny', tiny))
    with pytest.raises(ValueError, match='names of transformers: give the folder'):
        backbone_from_weights('tiny', state)


def test_numbers_must_be_finite(tiny):
    tiny['visual.proj'][0, 0] = float('nan')
    with pytest.raises(ValueError, match='1 tensors hold NaN or infinity: visual.proj'):
        backbone_from_weights('tiny', tiny)


def test_the_backbone_is_a_copy(tiny):
    backbone = backbone_from_weights('tiny', tiny)
    before = backbone.digest
    for t in tiny.values():
        t.zero_()
    assert backbone.digest == before and all(
        w.dtype == torch.float32 for w in backbone.weights.values()
    )


def test_random_weights_follow_the_seed(tiny):
    a, b, c = (load_backbone('tiny', 'random', seed=s) for s in (0, 0, 1))
    assert a.digest == b.digest != c.digest and 'random' in a.name
    assert half_precise(a) and not half_precise(random_backbone(TINY.shape, generator(0)))


# ---- files


def tiny_clip(tensors, act=True):
    "The whole CLIP of open_clip around these weights"
    model = open_clip.model.CLIP(
        6,
        dict(image_size=8, layers=2, width=16, head_width=8, patch_size=4),
        dict(context_length=8, vocab_size=9, width=16, heads=2, layers=1),
        quick_gelu=act,
    ).eval()
    model.load_state_dict(model.state_dict() | {k: t.float() for k, t in tensors.items()})
    return model


def archive(path, model):
    "Write `model` as TorchScript"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.trace(
            model,
            (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, dtype=torch.int64)),
            check_trace=False,
        ).save(path)


def test_every_kind_of_file_gives_the_same_backbone(tiny, tmp_path):
    whole, expected = tiny_clip(tiny).state_dict(), backbone_from_weights('tiny', tiny).digest
    save_tensors(tmp_path / 'tower.safetensors', tiny)
    save_tensors(tmp_path / 'whole.safetensors', whole)
    torch.save(whole, tmp_path / 'a.pt')
    torch.save(whole, tmp_path / 'old.bin', _use_new_zipfile_serialization=False)
    torch.save(
        dict(
            state_dict={f'module.{k}': t for k, t in whole.items()}, epoch=1, args=Namespace(lr=1.0)
        ),
        tmp_path / 'b.pth.tar',
    )
    torch.save(dict(model=tiny), tmp_path / 'c.pth')
    for path in sorted(tmp_path.iterdir()):
        for given in (path, str(path)):
            with pytest.warns(UserWarning, match='does not tell with which activation'):
                assert load_backbone('tiny', given).digest == expected, path


def test_torchscript_is_read_without_running_it(tiny, tmp_path, monkeypatch):
    archive(tmp_path / 'a.pt', tiny_clip(tiny))

    def no(*args, **kwargs):
        raise AssertionError('code of the archive would be prepared')

    monkeypatch.setattr(torch.jit, 'load', no)
    found = read_checkpoint(tmp_path / 'a.pt')
    assert found.act == 'quick_gelu' and found.archive
    with pytest.warns(UserWarning, match='is not the archive that was published'):
        assert (
            load_backbone('tiny', tmp_path / 'a.pt').digest
            == backbone_from_weights('tiny', tiny).digest
        )
    archive(tmp_path / 'gelu.pt', tiny_clip(tiny, act=False))
    with pytest.raises(
        ValueError, match='the activation in this archive is gelu; tiny was trained with quick_gelu'
    ):
        load_backbone('tiny', tmp_path / 'gelu.pt')


def test_half_precision_in_torchscript(tiny, tmp_path):
    "OpenAI's archives hold 16-bit matrices"
    model = tiny_clip(tiny)

    class Two(nn.Module):
        "Nothing but weights, some of them half"

        def __init__(self):
            super().__init__()
            self.visual = model.visual
            self.visual.conv1.half()
            self.visual.proj = nn.Parameter(self.visual.proj.half())

        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.trace(Two(), torch.zeros(1), check_trace=False).save(tmp_path / 'a.pt')
    found = read_checkpoint(tmp_path / 'a.pt')
    assert found.tensors['visual.proj'].dtype == torch.float16
    assert (
        backbone_from_weights('tiny', found.tensors).digest
        == backbone_from_weights('tiny', tiny).digest
    )


class Evil:
    "A pickle of this makes a file when it is read"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_with_code_is_refused_by_name(tiny, tmp_path, zipped):
    torch.save(
        tiny | {'visual.proj': Evil(tmp_path / 'ran')},
        tmp_path / 'evil.pt',
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        ValueError,
        match=rf'evil.pt is a pickle that holds more than weights \({os.mkdir.__module__}.mkdir\)',
    ):
        load_backbone('tiny', tmp_path / 'evil.pt')
    torch.save(tiny_clip(tiny), tmp_path / 'model.pt', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match='more than weights'):
        load_backbone('tiny', tmp_path / 'model.pt')
    for protocol in (2, 4):
        (tmp_path / 'raw.bin').write_bytes(
            pickle.dumps({'visual.proj': Evil(tmp_path / 'ran')}, protocol)
        )
        with pytest.raises(ValueError, match='raw.bin is'):
            load_backbone('tiny', tmp_path / 'raw.bin')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('evil', ['reduce', 'global', 'persistent', 'memo', 'bytes'])
def test_a_torchscript_archive_with_code_is_refused_by_name(tiny, tmp_path, evil):
    ran = tmp_path / 'ran'
    data, said = {
        'reduce': (pickle.dumps(Evil(ran), 2), f'{os.mkdir.__module__}.mkdir'),
        'global': (b'\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.', 'builtins.eval'),
        'persistent': (
            b'\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000tQ.',
            'os.system',
        ),
        'memo': (b'\x80\x02}r\x00\x00\x00\x7f.', 'place 2130706432'),  # would take 16 GB
        'bytes': (b'\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x00.', 'BYTEARRAY8'),
    }[evil]
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as z:
        z.writestr('x/constants.pkl', b'\x80\x02).')
        z.writestr('x/data.pkl', data)
    with pytest.raises(
        ValueError, match=f'x.pt is a TorchScript archive that holds more than weights: {said}'
    ):
        load_backbone('tiny', tmp_path / 'x.pt')
    assert not ran.exists()


def test_a_compressed_archive_is_refused(tiny, tmp_path):
    "A few kilobytes could become gigabytes"
    archive(tmp_path / 'a.pt', tiny_clip(tiny))
    with (
        zipfile.ZipFile(tmp_path / 'a.pt') as old,
        zipfile.ZipFile(tmp_path / 'b.pt', 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match='is compressed'):
        load_backbone('tiny', tmp_path / 'b.pt')


def test_a_module_that_holds_itself_ends(tiny, tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as z:
        z.writestr('x/constants.pkl', b'\x80\x02).')
        z.writestr('x/data.pkl', b'\x80\x02c__torch__.m\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.')
    with pytest.raises(ValueError, match='keys are missing'):
        load_backbone('tiny', tmp_path / 'x.pt')


def test_what_is_no_checkpoint_is_said(tiny, tmp_path):
    save_tensors(tmp_path / 'good.safetensors', tiny)
    torch.save(tiny, tmp_path / 'good.pt')
    archive(tmp_path / 'script.pt', tiny_clip(tiny))
    data = {n: (tmp_path / n).read_bytes() for n in ('good.safetensors', 'good.pt', 'script.pt')}
    for name, whole in data.items():
        for cut in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
            path = tmp_path / f'cut_{name}'
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=f'cut_{name}'):
                load_backbone('tiny', path)
    for value in (3, [torch.zeros(1)], {'visual.proj': 3}, {}, {'state_dict': {}}, torch.zeros(2)):
        torch.save(value, tmp_path / 'value.pt')
        with pytest.raises(ValueError):
            load_backbone('tiny', tmp_path / 'value.pt')
    (tmp_path / 'text.pt').write_text('<html>404 Not Found</html>')
    with pytest.raises(ValueError, match='text.pt is'):
        load_backbone('tiny', tmp_path / 'text.pt')


def test_a_damaged_archive_is_an_error_not_a_crash(tiny, tmp_path):
    archive(tmp_path / 'script.pt', tiny_clip(tiny))
    gen = generator(0, 'damage')
    with zipfile.ZipFile(tmp_path / 'script.pt') as z:
        parts = {n: z.read(n) for n in z.namelist()}
    name = next(n for n in parts if n.endswith('/data.pkl'))
    ended = 0
    for _ in range(300):
        at = torch.randint(len(parts[name]), (2,), generator=gen).tolist()
        bad = bytearray(parts[name])
        for i in at:
            bad[i] = int(torch.randint(256, (1,), generator=gen))
        with zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as z:
            for n, part in parts.items():
                z.writestr(n, bytes(bad) if n == name else part)
        try:
            read_checkpoint(tmp_path / 'bad.pt')
        except ValueError:
            ended += 1
    assert ended > 50


# ---- what is asked for, and what is not there


@pytest.mark.parametrize('name', ['ViT-B-16', 'ViT-B-32', 'DeiT-B', 'LV-ViT-M'])
def test_without_weights_the_ways_to_get_them_are_told(name, tmp_path):
    for wanted, error in ((None, ValueError), (tmp_path / 'absent.pt', FileNotFoundError)):
        with pytest.raises(error) as err:
            load_backbone(name, wanted)
        assert (
            MODELS[name].url in str(err.value)
            and "'random'" in str(err.value)
            and ("'download'" in str(err.value)) == (name != 'LV-ViT-M')
        )
    with pytest.raises(ValueError, match="Did you mean 'ViT-B-16'"):
        load_backbone('ViT-B16')


def test_download_is_only_on_request_and_strict(tiny, tmp_path, monkeypatch):
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        save_tensors(tmp_path / file, tiny)
        return str(tmp_path / file)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fetch)
    with pytest.raises(ValueError, match='comes without weights'):
        load_backbone('tiny')
    assert not asked
    assert load_backbone('tiny', 'download').digest == backbone_from_weights(
        'tiny', tiny
    ).digest and asked == [TINY.hub]
    tiny['visual.surprise'] = torch.zeros(1)
    with pytest.raises(ValueError, match='1 keys are not known: visual.surprise'):
        load_backbone('tiny', 'download')
    with pytest.raises(ValueError, match='LV-ViT-M is on no hub. Fetch https'):
        load_backbone('LV-ViT-M', 'download')


def test_without_a_network_download_tells_what_to_do(monkeypatch):
    def fetch(*args):
        raise FileNotFoundError('no connection')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fetch)
    with pytest.raises(
        OSError,
        match='timm/vit_base_patch16_clip_224.openai/open_clip_model.safetensors '
        'could not be fetched .*Without a network',
    ):
        load_backbone('ViT-B-16', 'download')


def test_published_digests_are_those_of_open_clip_and_torch_hub(tmp_path, monkeypatch):
    for name in ('ViT-B-16', 'ViT-B-32'):
        url = open_clip.get_pretrained_url(f'{name}-quickgelu', 'openai')
        config = open_clip.get_pretrained_cfg(f'{name}-quickgelu', 'openai')
        assert (
            MODELS[name].url == url
            and MODELS[name].sha256 == url.split('/')[-2]
            and config['hf_hub'].strip('/') == MODELS[name].hub[0]
        )
        assert config['quick_gelu'] and (config['mean'], config['std']) == (
            MODELS[name].mean,
            MODELS[name].std,
        )
    assert MODELS['DeiT-B'].sha256 in MODELS['DeiT-B'].url
    (tmp_path / 'a').write_bytes(b'weights')
    assert published(tmp_path / 'a') is None
    monkeypatch.setitem(
        MODELS, 'known', replace(TINY, sha256=hashlib.sha256(b'weights').hexdigest()[:8])
    )
    assert published(tmp_path / 'a') == 'known'


def test_a_file_with_the_published_name_must_be_it(tiny, tmp_path, monkeypatch):
    torch.save(tiny, tmp_path / 'tiny.pt')
    with pytest.raises(
        ValueError, match='has the name of https://nowhere.example/tiny.pt but another sha256'
    ):
        load_backbone('tiny', tmp_path / 'tiny.pt')
    monkeypatch.setitem(
        MODELS,
        'tiny',
        replace(TINY, sha256=hashlib.sha256((tmp_path / 'tiny.pt').read_bytes()).hexdigest()),
    )
    assert (
        load_backbone('tiny', tmp_path / 'tiny.pt').digest
        == backbone_from_weights('tiny', tiny).digest
    )


# ---- wrong settings are named


def hf_folder(folder, tensors, config=(), pixels=None):
    "The folder of transformers with these weights"
    save_tensors(folder / 'model.safetensors', hf_state(backbone_from_weights('tiny', tensors)))
    write_json(
        folder / 'config.json',
        dict(
            model_type='clip_vision_model',
            hidden_size=16,
            intermediate_size=64,
            projection_dim=6,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            hidden_act='quick_gelu',
        )
        | dict(config),
    )
    if pixels:
        write_json(folder / 'preprocessor_config.json', pixels)
    return folder


def test_a_folder_of_transformers(tiny, tmp_path):
    expected = backbone_from_weights('tiny', tiny).digest
    assert load_backbone('tiny', hf_folder(tmp_path / 'a', tiny)).digest == expected
    for config, said in (
        (
            dict(hidden_act='gelu'),
            'activation is gelu, but the weights were trained with quick_gelu',
        ),
        (dict(num_attention_heads=4), 'heads is 4, not 2'),
        (dict(layer_norm_eps=1e-6), 'epsilon of its LayerNorm is 1e-06, not 1e-05'),
    ):
        with pytest.raises(ValueError, match=said):
            load_backbone('tiny', hf_folder(tmp_path / 'b', tiny, config))
    n = NORMALISATIONS['imagenet']
    with pytest.raises(
        ValueError,
        match=r'other numbers \(imagenet: mean \(0.485.*'
        r'than the model was trained with \(clip: mean',
    ):
        load_backbone(
            'tiny',
            hf_folder(
                tmp_path / 'c',
                tiny,
                pixels=dict(image_mean=list(n['mean']), image_std=list(n['std'])),
            ),
        )
    with pytest.raises(ValueError, match=r'other numbers \(unknown: mean \(0.5'):
        load_backbone(
            'tiny',
            hf_folder(tmp_path / 'd', tiny, pixels=dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        )
    with pytest.raises(ValueError, match='is a folder; DeiT-B takes a file'):
        load_backbone('DeiT-B', tmp_path / 'a')


def test_all_that_is_wrong_is_said_at_once(tiny):
    backbone = backbone_from_weights('tiny', tiny)
    assert check_backbone(backbone, 'tiny') is backbone
    with pytest.raises(ValueError) as err:
        check_backbone(
            replace(backbone, act='gelu', eps=1e-6, std=(0.2, 0.2, 0.2), heads=4), 'tiny'
        )
    assert all(
        word in str(err.value) for word in ('heads is 4', 'activation', 'epsilon', 'normalised')
    )
    check_backbone(
        replace(backbone, mean=tuple(round(m, 5) for m in backbone.mean)), 'tiny'
    )  # rounding is no other normalisation


def test_weights_of_others_raise_a_warning(tiny, tmp_path):
    others = {
        k: t.float() + 1e-7 * torch.randn(t.shape, generator=generator(0)) for k, t in tiny.items()
    }
    save_tensors(tmp_path / 'others.safetensors', others)
    with pytest.warns(UserWarning, match="not 16-bit numbers as all of OpenAI's are"):
        load_backbone('tiny', tmp_path / 'others.safetensors')


def test_a_recorded_activation_is_no_matter_of_guesses(tiny, tmp_path, monkeypatch):
    "A folder that says quick_gelu is not doubted for its 32-bit numbers, nor what was asked for."
    others = {k: t.float() + 1e-7 for k, t in tiny.items()}
    save_tensors(tmp_path / 'others.safetensors', others)
    monkeypatch.setattr(models, '_fetched', lambda name: tmp_path / 'others.safetensors')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_backbone('tiny', hf_folder(tmp_path / 'a', others))
        load_backbone('tiny', 'download')


# ---- the table


def test_table_counts_what_is_there():
    table = model_table()
    for name in ('miniature', 'LV-ViT-M'):
        model = MODELS[name]
        backbone = load_backbone(name, 'random')
        assert (
            table.patches[name],
            table.layers[name],
            table.width[name],
            table.features[name],
        ) == (backbone.n_patches, backbone.layers, backbone.width, backbone.out_dim)
        assert table.lora[name] == sum(
            t.numel() for t in new_lora(backbone.layers, backbone.width, 4).tensors().values()
        )
    assert table.params_m['LV-ViT-M'] + 2 * (512 * 1000 + 1000) / 1e6 == pytest.approx(
        56, abs=0.5
    )  # the authors count both heads: 56 M
    assert table.params_m['DeiT-B'] + (768 * 1000 + 1000) / 1e6 == pytest.approx(86.57, abs=0.01)
    assert table.gflops['LV-ViT-M'] / 2 == pytest.approx(12.7, abs=0.15) and table.gflops[
        'DeiT-B'
    ] / 2 == pytest.approx(17.6, abs=0.15)  # published multiply-accumulates
    assert stem_flops_g('ViT-B-16') == 0
