"Today's backbones, from the files of two libraries: their own forward, pruning, sparse tokens, LoRA."

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from lora_recycle.bench.cost import shape_of
from lora_recycle.core import generator, save_tensors, write_json
from lora_recycle.method.backbone import encode, encode_tokens, most_attended
from lora_recycle.method.lora import TARGETS, new_lora
from lora_recycle.paper import models
from lora_recycle.paper.models import (
    LAYOUTS,
    MODELS,
    backbone_from_weights,
    expected_shapes,
    load_backbone,
    random_weights,
    resize_positions,
)

transformers = pytest.importorskip('transformers')
WIDTH, LAYERS, HEADS = 48, 3, 3
# name -> class of transformers (its config is called alike), name in timm
CLASSES = {
    'DINOv2-S': ('Dinov2', 'vit_small_patch14_dinov2'),
    'DINOv2-S-reg': ('Dinov2WithRegisters', 'vit_small_patch14_reg4_dinov2'),
}
TINY = dict(side=28, width=WIDTH, layers=LAYERS, heads=HEADS, out_dim=WIDTH)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "The models with few narrow layers, for images of 28 pixels, from positions for 42"
    for name in CLASSES:
        model = MODELS[name]
        shape = replace(model.shape, **TINY)
        monkeypatch.setitem(MODELS, name, replace(model, shape=shape, grid=model.grid and 42))


def fill(module, seed=0):
    "`module` with random numbers in every tensor"
    gen = generator(seed, 'architectures')
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=gen) + 0.7 * (p.ndim == 1)
    return module.eval().requires_grad_(False)


def of_transformers(name, **config):
    "A small model of the class in transformers"
    kind = CLASSES[name][0]
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    sizes |= dict(image_size=42, patch_size=MODELS[name].shape.patch)
    made = getattr(transformers, f'{kind}Config')(**sizes | config)
    return fill(getattr(transformers, f'{kind}Model')(made))


def of_timm(name):
    "The same in timm"
    sizes = dict(embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS)
    return fill(timm.create_model(CLASSES[name][1], img_size=42, dynamic_img_size=True, **sizes))


def images(n=2, side=28):
    return torch.randn(n, 3, side, side, generator=generator(0, 'architectures', side))


def file_of(name, library, folder):
    "Files of a small model, and its own forward"
    if library == 'transformers':
        module = of_transformers(name)
        module.save_pretrained(folder)
        return folder, lambda x: module(pixel_values=x).pooler_output
    module = of_timm(name)
    save_tensors(folder / 'a.safetensors', module.state_dict())
    return folder / 'a.safetensors', module


# ---- numerics


@pytest.mark.parametrize('library', ['transformers', 'timm'])
@pytest.mark.parametrize('name', CLASSES)
@torch.no_grad()
def test_encode_equals_the_library_at_every_size(name, library, tmp_path):
    weights, forward = file_of(name, library, tmp_path)
    patch = MODELS[name].shape.patch
    for side in (2 * patch, 3 * patch, 4 * patch):
        backbone, x = load_backbone(name, weights, side=side), images(side=side)
        theirs = forward(x)
        assert (encode(backbone, x).features - theirs).abs().max() < 1e-5 < theirs.std()
        assert (backbone.side, shape_of(backbone).side) == (side, side)
    assert load_backbone(name, weights).side == 28


@torch.no_grad()
def test_the_authors_resize_positions_by_a_scale_that_is_off():
    "Their offset of 0.1 moves every place a little; smoothing came with the registers"
    for name, how in (
        ('DINOv2-S', dict(scale_factor=2.1 / 3)),
        ('DINOv2-S-reg', dict(size=(2, 2), antialias=True)),
    ):
        tensors = random_weights(name, library='the authors')
        tensors |= {'mask_token': torch.zeros(1, WIDTH)}
        ours = backbone_from_weights(name, tensors).weights['positional_embedding']
        table = tensors['pos_embed'][:, 1:].view(1, 3, 3, WIDTH).permute(0, 3, 1, 2)
        theirs = F.interpolate(table, mode='bicubic', **how).permute(0, 2, 3, 1).view(4, WIDTH)
        assert torch.allclose(ours[1:], theirs, atol=1e-6)
        assert torch.equal(ours[0], tensors['pos_embed'][0, 0])
        other = {k: t for k, t in tensors.items() if k != 'mask_token'}
        if name == 'DINOv2-S':  # without its mask token it is a file of timm
            timms = backbone_from_weights(name, other).weights['positional_embedding']
            assert (timms - ours).abs().max() > 1e-2


def pieces_of_transformers(name):
    "Embedding, layers and last norm of a small model, and the backbone of the same weights"
    module = of_transformers(name, attn_implementation='eager')
    backbone = backbone_from_weights(name, module.state_dict())
    return module, module.encoder.layer, module.layernorm, backbone


@pytest.mark.parametrize('name', CLASSES)
@torch.no_grad()
def test_sparse_and_pruned_tokens_equal_the_library_with_fewer_tokens(name):
    module, layers, norm, backbone = pieces_of_transformers(name)
    lead, x = backbone.lead, images()
    keep, stay = torch.tensor([[0, 2, 3], [1, 2, 3]]), torch.tensor([[0, 2], [1, 2]])
    front = torch.arange(lead).expand(2, -1)
    pick = lambda h, at: h.gather(
        1, torch.cat([front, at + lead], 1)[..., None].expand(-1, -1, WIDTH)
    )
    h = pick(module.embeddings(x), keep)
    seen = []
    for i, layer in enumerate(layers):
        mixed, weights = layer.attention(layer.norm1(h))
        h = h + layer.layer_scale1(mixed)
        seen.append(weights[:, :, 0, lead:].mean(1))
        h = pick(h, stay) if i == 1 else h
        h = h + layer.layer_scale2(layer.mlp(layer.norm2(h)))
    scores = []

    def select(found, ratio):
        "The places wanted, whatever the scores"
        scores.append(found)
        return stay

    out = encode(backbone, x, plan={1: 0.4}, keep=keep, select=select)
    assert (out.features - norm(h)[:, 0]).abs().max() < 1e-5
    assert (scores[0] - seen[1]).abs().max() < 1e-6
    assert torch.equal(out.kept, keep.gather(1, stay))
    full = encode_tokens(backbone, x, plan={1: 0.4}, keep=keep, select=select)
    assert [t.shape[1] - lead for t in full.tokens] == [3, 2, 2]
    assert (full.features - out.features).abs().max() < 1e-5


@pytest.mark.parametrize('name', CLASSES)
@torch.no_grad()
def test_a_lora_equals_changed_weights_of_the_library(name):
    "Beside LayerScale too: what a LoRA on `out` adds is scaled with the rest"
    module = of_transformers(name)
    backbone = backbone_from_weights(name, module.state_dict())
    names = ('q', 'k', 'v', 'out')
    lora = new_lora(LAYERS, WIDTH, 4, generator(0), targets=names)
    lora = replace(lora, B=0.3 * torch.randn(lora.B.shape, generator=generator(1)))
    x = images()
    before = encode(backbone, x).features
    for i, layer in enumerate(layers_of(module)):
        for place, target in enumerate(names):
            product = getattr(layer.attention, f'{target[0]}_proj')
            product.weight.data += (lora.A[i, place] @ lora.B[i, place]).T
    theirs = module(pixel_values=x).pooler_output
    assert (encode(backbone, x, lora).features - theirs).abs().max() < 2e-5
    assert (before - theirs).abs().max() > 1e-2


def layers_of(module):
    return module.encoder.layer


@pytest.mark.parametrize('name', CLASSES)
def test_a_market_prunes_and_images_have_gradients(name):
    backbone, x = load_backbone(name, 'random'), images(4).requires_grad_()
    fresh = new_lora(LAYERS, WIDTH, 4, generator(0), n=2)
    lora = replace(fresh, B=torch.randn(fresh.B.shape, generator=generator(1)))
    out = encode(backbone, x, lora, plan={0: 0.5, 1: 0.5})
    alone = encode(backbone, x[2:], lora[1], plan={0: 0.5, 1: 0.5})
    assert torch.equal(out.kept[2:], alone.kept) and out.kept.shape == (4, 1)
    assert torch.allclose(out.features[2:], alone.features, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.features.sum(), x)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


# ---- keys


@pytest.mark.parametrize('name', CLASSES)
def test_missing_unknown_and_misshapen_keys_are_named_in_every_layout(name):
    for layout in LAYOUTS[MODELS[name].layout]:
        tensors = random_weights(name, library=layout.library)
        backbone_from_weights(name, tensors)
        for key in list(tensors)[::9]:
            rest = {k: t for k, t in tensors.items() if k != key}
            for broken, said in (
                (rest, f'1 of {len(tensors)} keys are missing: {key}'),
                (
                    tensors | {key: tensors[key][None]},
                    f'1 of {len(tensors)} have another shape: {key}',
                ),
                (tensors | {f'{key}_more': tensors[key]}, f'1 keys are not known: {key}_more'),
            ):
                with pytest.raises(ValueError) as err:
                    backbone_from_weights(name, broken)
                assert said in str(err.value)


REAL = {
    'DINOv2-S': (384, 12, 6),
    'DINOv2-B': (768, 12, 12),
    'DINOv2-L': (1024, 24, 16),
    'DINOv2-S-reg': (384, 12, 6),
    'DINOv2-B-reg': (768, 12, 12),
    'DINOv2-L-reg': (1024, 24, 16),
}


@pytest.mark.parametrize('name', REAL)
def test_real_sizes_are_those_of_the_libraries(name, monkeypatch):
    monkeypatch.undo()
    width, layers, heads = REAL[name]
    model, size = MODELS[name], name.split('-')[1]
    kind, _ = CLASSES[name.replace(f'-{size}', '-S')]
    config = getattr(transformers, f'{kind}Config')(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=model.grid,
        patch_size=model.shape.patch,
    )
    with torch.device('meta'):
        theirs = getattr(transformers, f'{kind}Model')(config).state_dict()
        word = dict(S='small', B='base', L='large')[size]
        named = CLASSES[name.replace(f'-{size}', '-S')][1].replace('small', word)
        timms = timm.create_model(named).state_dict()
    layout = LAYOUTS[model.layout][0]
    theirs = models._rename(theirs, layout)
    unused = {'embeddings.mask_token'}
    found = {k: tuple(t.shape) for k, t in theirs.items() if k not in unused}
    assert found == expected_shapes(name, 'transformers')
    assert {k: tuple(t.shape) for k, t in timms.items()} == expected_shapes(name, 'timm')
    cfg = timm.get_pretrained_cfg(named)
    assert (cfg.mean, cfg.std, cfg.input_size[1]) == (model.mean, model.std, model.grid)
    assert cfg.url == model.url


# ---- a folder of transformers


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(num_attention_heads=4), 'num_attention_heads is 4, not 3'),
        (dict(hidden_act='relu'), "hidden_act is 'relu', not gelu"),
        (dict(layer_norm_eps=1e-5), 'layer_norm_eps is 1e-05, not 1e-06'),
        (dict(use_swiglu_ffn=True), 'use_swiglu_ffn is True, not False'),
        (dict(model_type='vit'), "model_type is 'vit', not dinov2"),
        (dict(image_size=[42, 42]), r'image_size is \[42, 42\], not 42'),
    ],
)
def test_settings_that_no_tensor_shows_are_compared(change, said, tmp_path):
    name = 'DINOv2-S'
    of_transformers(name).save_pretrained(tmp_path)
    config = transformers.Dinov2Config.from_pretrained(tmp_path).to_dict()
    write_json(tmp_path / 'config.json', config | change)
    with pytest.raises(ValueError, match=f'is not DINOv2-S as published: {said}'):
        load_backbone(name, tmp_path)


def test_pixels_and_files_of_a_folder_are_checked(tmp_path):
    name = 'DINOv2-S'
    of_transformers(name).save_pretrained(tmp_path)
    pixels = dict(image_mean=list(MODELS[name].mean), image_std=list(MODELS[name].std))
    write_json(tmp_path / 'preprocessor_config.json', pixels)
    load_backbone(name, tmp_path)
    write_json(tmp_path / 'preprocessor_config.json', pixels | dict(image_std=[0.5] * 3))
    with pytest.raises(ValueError, match=r'image_std is \[0.5, 0.5, 0.5\], not \[0.229'):
        load_backbone(name, tmp_path)
    (tmp_path / 'preprocessor_config.json').unlink()
    (tmp_path / 'model.safetensors').rename(tmp_path / 'model.safetensors.index.json')
    with pytest.raises(ValueError, match='weights in several files'):
        load_backbone(name, tmp_path)


def test_names_in_memory_and_in_files_are_both_read(tmp_path):
    "transformers 5 calls a query otherwise in memory than in its files"
    module = of_transformers('DINOv2-S')
    inside = module.state_dict()
    assert any('q_proj' in k for k in inside)
    module.save_pretrained(tmp_path)
    expected = load_backbone('DINOv2-S', tmp_path).digest
    assert backbone_from_weights('DINOv2-S', inside).digest == expected
    head = {'classifier.weight': torch.zeros(2, 96), 'classifier.bias': torch.zeros(2)}
    whole = {f'dinov2.{k}': t for k, t in inside.items()} | head
    assert backbone_from_weights('DINOv2-S', whole).digest == expected
    with pytest.raises(ValueError, match='which is there, too'):
        backbone_from_weights('DINOv2-S', whole | inside)


# ---- sizes of images


def test_sides_are_checked():
    with pytest.raises(ValueError, match='side=30 does not divide into patches of 14 .* does: 28'):
        load_backbone('DINOv2-S', 'random', side=30)
    with pytest.raises(ValueError, match='side=72: miniature ships for images of 36'):
        load_backbone('miniature', side=72)
    with pytest.raises(ValueError, match='4 patches; .* has positions for 9'):
        encode(load_backbone('DINOv2-S', 'random', side=42), images())
    table = torch.randn(10, 4)
    assert resize_positions(table, 3) is table
    assert resize_positions(table[1:], 5).shape == (25, 4)
