"Today's backbones, from the files of two libraries: their own forward, pruning, sparse tokens, LoRA."

from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from lora_recycle.bench.cost import flops_true_g, inversion_step, meta_step, shape_of
from lora_recycle.core import generator, save_tensors, write_json
from lora_recycle.method.backbone import encode, encode_tokens, most_attended
from lora_recycle.method.lora import TARGETS, new_lora, widen_targets
from lora_recycle.use.exchange import class_for, hf_state, read_adapter, read_adapter_for
from lora_recycle.use.exchange import write_adapter
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
    'SigLIP-B-16': ('SiglipVision', 'vit_base_patch16_siglip_224'),
    'DINOv3-S': ('DINOv3ViT', 'vit_small_patch16_dinov3'),
}
SIZES = dict(width=WIDTH, layers=LAYERS, heads=HEADS, out_dim=WIDTH)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "The models with few narrow layers, for images of 2 x 2 patches, from positions for 3 x 3"
    for name in CLASSES:
        model = MODELS[name]
        patch = model.shape.patch
        shape = replace(model.shape, side=2 * patch, **SIZES)
        monkeypatch.setitem(MODELS, name, replace(model, shape=shape, grid=3 * patch))


def fill(module, seed=0):
    "`module` with random numbers in every tensor"
    gen = generator(seed, 'architectures')
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=gen) + 0.7 * (p.ndim == 1)
    return module.eval().requires_grad_(False)


def of_transformers(name, **config):
    "A small model of the class in transformers"
    kind = CLASSES[name][0]
    patch = MODELS[name].shape.patch
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    sizes |= dict(image_size=3 * patch, patch_size=patch)
    if not kind.startswith('Dinov2'):
        sizes['intermediate_size'] = 4 * WIDTH
    if kind == 'DINOv3ViT':
        sizes['num_register_tokens'] = 4
    made = getattr(transformers, f'{kind}Config')(**sizes | config)
    return fill(getattr(transformers, f'{kind}Model')(made))


def of_timm(named, patch):
    "A small model of timm"
    sizes = dict(embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, img_size=3 * patch)
    return fill(timm.create_model(named, dynamic_img_size=True, **sizes))


def images(n=2, side=28):
    return torch.randn(n, 3, side, side, generator=generator(0, 'architectures', side))


def images_for(name, n=2):
    return images(n, MODELS[name].shape.side)


def asked(module, x):
    "Features of images by a module of transformers"
    more = dict(interpolate_pos_encoding=True) if 'Siglip' in type(module).__name__ else {}
    return module(pixel_values=x, **more).pooler_output


def file_of(name, library, folder):
    "Files of a small model, and its own forward"
    if library == 'transformers':
        module = of_transformers(name)
        module.save_pretrained(folder)
        return folder, lambda x: asked(module, x)
    named = CLASSES[name][1] + '_qkvb' * (library == 'timm, qkvb')
    module = of_timm(named, MODELS[name].shape.patch)
    save_tensors(folder / 'a.safetensors', module.state_dict())
    if 'dinov3' in named:  # it would take the mean of the patches
        return folder / 'a.safetensors', lambda x: module.forward_features(x)[:, 0]
    return folder / 'a.safetensors', module


# ---- numerics


@pytest.mark.parametrize(
    'name, library',
    [
        (name, layout.library)
        for name in CLASSES
        for layout in LAYOUTS[MODELS[name].layout]
        if layout.library != 'the authors'  # their code is no package
    ],
)
@torch.no_grad()
def test_encode_equals_the_library_at_every_size(name, library, tmp_path):
    weights, forward = file_of(name, library, tmp_path)
    patch = MODELS[name].shape.patch
    for side in (2 * patch, 3 * patch, 4 * patch):
        backbone, x = load_backbone(name, weights, side=side), images(side=side)
        theirs = forward(x)
        assert (encode(backbone, x).features - theirs).abs().max() < 1e-5 < theirs.std()
        assert (backbone.side, shape_of(backbone).side) == (side, side)
    assert load_backbone(name, weights).side == 2 * patch
    assert shape_of(backbone).lead == MODELS[name].shape.lead == backbone.lead


@pytest.mark.parametrize('name', ['DeiT-B', 'ViT-B-16-in21k'])
@torch.no_grad()
def test_a_plain_transformer_of_timm_at_two_sizes(name, monkeypatch):
    shape = replace(MODELS[name].shape, side=48, **SIZES)
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], shape=shape))
    module = of_timm('vit_base_patch16_224', 16)
    for side in (32, 48, 64):
        backbone = backbone_from_weights(name, module.state_dict(), side)
        x = images(side=side)
        theirs = module.forward_head(module.forward_features(x), pre_logits=True)
        assert (encode(backbone, x).features - theirs).abs().max() < 1e-5 < theirs.std()


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


@pytest.mark.parametrize('side', [28, 56])
@torch.no_grad()
def test_clip_l_14_equals_open_clip_and_transformers_at_two_sizes(side, tmp_path, monkeypatch):
    "open_clip smooths positions that get fewer, transformers does not"
    model = MODELS['ViT-L-14']
    shape = replace(model.shape, side=42, width=WIDTH, layers=LAYERS, heads=HEADS, out_dim=24)
    monkeypatch.setitem(MODELS, 'ViT-L-14', replace(model, shape=shape))
    tensors, x = random_weights('ViT-L-14'), images(side=side)
    vision = dict(image_size=side, layers=LAYERS, width=WIDTH, head_width=16, patch_size=14)
    text = dict(context_length=8, vocab_size=9, width=16, heads=2, layers=1)
    clip = open_clip.model.CLIP(24, vision, text, quick_gelu=True).eval()
    state = clip.state_dict() | {k: t.float() for k, t in tensors.items()}
    open_clip.model.resize_pos_embed(state, clip)
    clip.load_state_dict(state)
    backbone = backbone_from_weights('ViT-L-14', tensors, side)
    assert (encode(backbone, x).features - clip.encode_image(x)).abs().max() < 1e-5
    config = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    config |= dict(intermediate_size=4 * WIDTH, projection_dim=24, image_size=42, patch_size=14)
    config = transformers.CLIPVisionConfig(**config)
    module = transformers.CLIPVisionModelWithProjection(config).eval()
    module.load_state_dict(hf_state(backbone_from_weights('ViT-L-14', tensors)))
    module.save_pretrained(tmp_path)
    theirs = module(pixel_values=x, interpolate_pos_encoding=True).image_embeds
    ours = encode(load_backbone('ViT-L-14', tmp_path, side=side), x).features
    assert (ours - theirs).abs().max() < 1e-5


def test_the_large_clips_are_those_of_open_clip(monkeypatch):
    monkeypatch.undo()
    for name in ('ViT-L-14', 'ViT-L-14-336'):
        model = MODELS[name]
        with torch.device('meta'):
            config = open_clip.get_model_config(f'{name}-quickgelu')
            visual = open_clip.model.CLIP(**config).visual
        found = {f'visual.{k}': tuple(t.shape) for k, t in visual.state_dict().items()}
        assert found == expected_shapes(name)
        assert visual.transformer.resblocks[0].attn.num_heads == model.shape.heads
        url = open_clip.get_pretrained_url(f'{name}-quickgelu', 'openai')
        assert (model.url, model.sha256) == (url, url.split('/')[-2])


class Pieces:
    "The steps of a module of transformers, whatever they are called there"

    def __init__(self, module):
        self.module = module
        kind = type(module).__name__
        self.pooled = 'Siglip' in kind
        self.turned = 'DINOv3' in kind
        inner = module.model if self.turned else module.encoder
        self.layers = inner.layers if self.pooled else inner.layer

    def start(self, x):
        more = dict(interpolate_pos_encoding=True) if self.pooled else {}
        return self.module.embeddings(x, **more)

    def attend(self, layer, h, x, kept):
        "What attention adds, and its weights; `kept` are the patches among h"
        if self.pooled:
            return layer.self_attn(layer.layer_norm1(h), None)
        more = {}
        if self.turned:
            more['position_embeddings'] = [t[kept][:, None] for t in self.module.rope_embeddings(x)]
        mixed, weights = layer.attention(layer.norm1(h), **more)
        return layer.layer_scale1(mixed), weights

    def think(self, layer, h):
        "What the perceptron adds"
        if self.pooled:
            return layer.mlp(layer.layer_norm2(h))
        return layer.layer_scale2(layer.mlp(layer.norm2(h)))

    def end(self, h):
        if self.pooled:
            return self.module.head(self.module.post_layernorm(h))
        return (self.module.norm if self.turned else self.module.layernorm)(h)[:, 0]

    def product(self, layer, target):
        "The linear map that a LoRA on `target` changes"
        attention = layer.self_attn if self.pooled else layer.attention
        if target == 'out':
            return attention.out_proj if self.pooled else attention.o_proj
        if target in 'qkv':
            return getattr(attention, f'{target}_proj')
        named = dict(fc1='up_proj', fc2='down_proj') if self.turned else dict(fc1='fc1', fc2='fc2')
        return getattr(layer.mlp, named[target])


@pytest.mark.parametrize('name', CLASSES)
@torch.no_grad()
def test_sparse_and_pruned_tokens_equal_the_library_with_fewer_tokens(name):
    pieces = Pieces(of_transformers(name, attn_implementation='eager'))
    backbone = backbone_from_weights(name, pieces.module.state_dict())
    lead, x = backbone.lead, images_for(name)
    keep, stay = torch.tensor([[0, 2, 3], [1, 2, 3]]), torch.tensor([[0, 2], [1, 2]])

    def pick(h, at):
        "[CLS], registers and the patches `at` of tokens"
        index = torch.cat([torch.arange(lead).expand(2, -1), at + lead], 1)
        return h.gather(1, index[..., None].expand(-1, -1, WIDTH))

    h, kept, seen = pick(pieces.start(x), keep), keep, []
    for i, layer in enumerate(pieces.layers):
        added, weights = pieces.attend(layer, h, x, kept)
        h = h + added
        readers = weights[:, :, :1] if lead else weights
        seen.append(readers[..., lead:].mean((1, 2)))
        h, kept = (pick(h, stay), kept.gather(1, stay)) if i == 1 else (h, kept)
        h = h + pieces.think(layer, h)
    scores = []

    def select(found, ratio):
        "The places wanted, whatever the scores"
        scores.append(found)
        return stay

    out = encode(backbone, x, plan={1: 0.4}, keep=keep, select=select)
    theirs = pieces.end(h)
    assert (out.features - theirs).abs().max() < 1e-5 * max(1, theirs.std())
    assert (scores[0] - seen[1]).abs().max() < 1e-6 and torch.equal(out.kept, kept)
    full = encode_tokens(backbone, x, plan={1: 0.4}, keep=keep, select=select)
    assert [t.shape[1] - lead for t in full.tokens] == [3, 2, 2]
    assert (full.features - out.features).abs().max() < 1e-5


@pytest.mark.parametrize('name', CLASSES)
@torch.no_grad()
def test_a_lora_equals_changed_weights_of_the_library(name):
    "Beside LayerScale too: what a LoRA on `out` adds is scaled with the rest"
    pieces = Pieces(of_transformers(name))
    module = pieces.module
    backbone = backbone_from_weights(name, module.state_dict())
    lora = new_lora(LAYERS, backbone.widths, 4, generator(0), targets=TARGETS)
    lora = replace(lora, B=0.05 * torch.randn(lora.B.shape, generator=generator(1)))
    x = images_for(name)
    if pieces.pooled:  # asked at the size of its positions, 3 x 3 patches
        backbone = backbone_from_weights(name, module.state_dict(), 48)
        x = images(side=48)
    before = encode(backbone, x).features
    for i, layer in enumerate(pieces.layers):
        for place, target in enumerate(TARGETS):
            W = pieces.product(layer, target).weight.data
            W += (lora.A[i, place] @ lora.B[i, place]).T[: W.shape[0], : W.shape[1]]
    theirs = asked(module, x)
    size = max(1, theirs.std())
    assert (encode(backbone, x, lora).features - theirs).abs().max() < 1e-5 * size
    assert (before - theirs).abs().max() > 1e-2 * size


@pytest.mark.parametrize('name', CLASSES)
def test_a_market_prunes_and_images_have_gradients(name):
    backbone, x = load_backbone(name, 'random'), images_for(name, 4).requires_grad_()
    fresh = new_lora(LAYERS, WIDTH, 4, generator(0), n=2)
    lora = replace(fresh, B=torch.randn(fresh.B.shape, generator=generator(1)))
    out = encode(backbone, x, lora, plan={0: 0.5, 1: 0.5})
    alone = encode(backbone, x[2:], lora[1], plan={0: 0.5, 1: 0.5})
    assert torch.equal(out.kept[2:], alone.kept) and out.kept.shape == (4, 1)
    assert torch.allclose(out.features[2:], alone.features, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.features.sum(), x)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize('name', CLASSES)
def test_inversion_and_meta_training_take_a_step(name):
    backbone = load_backbone(name, 'random')
    steps = (
        inversion_step(backbone, None, 5, plan={1: 0.5}),
        meta_step(backbone, 10, sparsity=0.5),
    )
    for step in steps:
        first, second = step(), step()
        assert first.isfinite().all() and second.isfinite().all() and not torch.equal(first, second)


def test_registers_are_counted_among_the_operations():
    plain, more = (MODELS[name].shape for name in ('DINOv2-S', 'DINOv2-S-reg'))
    assert plain.n_patches == more.n_patches == 4
    grown = (flops_true_g(more) - flops_true_g(plain)) * 1e9 / LAYERS
    assert grown == pytest.approx(2 * (4 * 12 * WIDTH**2 + 2 * WIDTH * (9**2 - 5**2)))


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


REAL = {  # width, layers, heads; in timm
    'DINOv2-S': (384, 12, 6),
    'DINOv2-B': (768, 12, 12),
    'DINOv2-L': (1024, 24, 16),
    'DINOv2-S-reg': (384, 12, 6),
    'DINOv2-B-reg': (768, 12, 12),
    'DINOv2-L-reg': (1024, 24, 16),
    'SigLIP-B-16': (768, 12, 12),
    'DINOv3-S': (384, 12, 6),
    'DINOv3-B': (768, 12, 12),
}


@pytest.mark.parametrize('name', REAL)
def test_real_sizes_are_those_of_the_libraries(name, monkeypatch):
    monkeypatch.undo()
    width, layers, heads = REAL[name]
    model, size = MODELS[name], name.split('-')[1]
    small = name if name in CLASSES else name.replace(f'-{size}', '-S')
    kind, named = CLASSES[small]
    word = dict(S='small', B='base', L='large')[size]
    named = named.replace('small', word)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    sizes |= dict(image_size=model.grid or 224, patch_size=model.shape.patch)
    sizes |= {} if kind.startswith('Dinov2') else dict(intermediate_size=4 * width)
    sizes |= dict(num_register_tokens=4) if kind == 'DINOv3ViT' else {}
    config = getattr(transformers, f'{kind}Config')(**sizes)
    with torch.device('meta'):
        theirs = getattr(transformers, f'{kind}Model')(config).state_dict()
        timms = timm.create_model(named).state_dict()
    theirs = models._rename(theirs, LAYOUTS[model.layout][0])
    found = {k: tuple(t.shape) for k, t in theirs.items() if k != 'embeddings.mask_token'}
    assert found == expected_shapes(name, 'transformers')
    assert {k: tuple(t.shape) for k, t in timms.items()} == expected_shapes(name, 'timm')
    cfg = timm.get_pretrained_cfg(named)
    assert (cfg.mean, cfg.std) == (model.mean, model.std)
    assert (cfg.url or model.url) == model.url
    assert model.theta or cfg.input_size[1] == (model.grid or model.shape.side)


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


def test_a_whole_siglip_is_read_and_its_activation_is_the_librarys(tmp_path):
    "Beside a text tower; timm takes the exact GELU for the same weights"
    vision = of_transformers('SigLIP-B-16')
    config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    both = dict(vision_config=vision.config.to_dict(), text_config=config | dict(vocab_size=9))
    whole = fill(transformers.SiglipModel(transformers.SiglipConfig(**both)))
    whole.vision_model.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path)
    backbone = load_backbone('SigLIP-B-16', tmp_path)
    assert backbone.digest == backbone_from_weights('SigLIP-B-16', vision.state_dict()).digest
    timms = random_weights('SigLIP-B-16', library='timm')
    assert (backbone.act, backbone_from_weights('SigLIP-B-16', timms).act) == ('gelu_tanh', 'gelu')
    trunk = {f'visual.trunk.{k}': t for k, t in timms.items()} | {'logit_scale': torch.zeros(())}
    found = backbone_from_weights('SigLIP-B-16', trunk)
    assert found.digest == backbone_from_weights('SigLIP-B-16', timms).digest
    write_json(tmp_path / 'config.json', dict(both, model_type='siglip', vision_config={}))
    with pytest.raises(ValueError, match='hidden_size is 768, not 48'):
        load_backbone('SigLIP-B-16', tmp_path)


def test_the_rope_of_another_dino_is_named(tmp_path):
    of_transformers('DINOv3-S', rope_theta=50.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='rope_theta is 50.0, not 100.0'):
        load_backbone('DINOv3-S', tmp_path)


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


@pytest.mark.parametrize(
    'file, say, said',
    [
        ('processor_config.json', dict(image_processor=dict(do_normalize=False)), 'mean is .0.0,'),
        ('processor_config.json', dict(image_processor=dict(image_std=[0.5] * 3)), 'std is .0.5,'),
        ('preprocessor_config.json', dict(do_rescale=False), 'image_std is .0.00'),
        ('preprocessor_config.json', dict(image_mean=[0.5, 0.5]), 'must be three numbers'),
    ],
)
@pytest.mark.parametrize('name', ['DINOv2-S', 'SigLIP-B-16'])
def test_pixels_are_looked_at_wherever_a_folder_tells_of_them(name, file, say, said, tmp_path):
    if name == 'SigLIP-B-16' and 'std is .0.5' in said:
        pytest.skip('that is what SigLIP takes')
    of_transformers(name).save_pretrained(tmp_path)
    write_json(tmp_path / file, say)
    with pytest.raises(ValueError, match=said):
        load_backbone(name, tmp_path)


@pytest.mark.parametrize('name', CLASSES)
def test_what_is_saved_for_a_backbone_is_for_its_class_and_comes_back(name, tmp_path):
    backbone = load_backbone(name, 'random')
    assert class_for(backbone) == f'{CLASSES[name][0]}Model'
    lora = new_lora(LAYERS, backbone.widths, 4, generator(0), targets=TARGETS)
    lora = replace(lora, B=torch.randn(lora.B.shape, generator=generator(1)))
    lora = widen_targets(lora, TARGETS, 4 * WIDTH)
    write_adapter(tmp_path, lora, name, model=(class_for(backbone), WIDTH))
    found = read_adapter_for(backbone, tmp_path).lora
    x = images_for(name)
    assert torch.allclose(encode(backbone, x, found).features, encode(backbone, x, lora).features)
    with pytest.raises(ValueError, match=f'tuned on .{CLASSES[name][0]}Model'):
        read_adapter(tmp_path, LAYERS, WIDTH)
