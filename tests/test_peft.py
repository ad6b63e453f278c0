"Adapters go to the real peft and come back: the same features through peft and transformers as through our encode."

import csv
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = os.environ['TRANSFORMERS_OFFLINE'] = (
    '1'  # before the imports that read them
)

import huggingface_hub
import open_clip
import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_recycle.method.backbone import Backbone, encode, from_open_clip, normalise
from lora_recycle.core import generator
from lora_recycle.use.exchange import (
    _CLIP,
    read_clip_lora,
    Limits,
    backbone_from_hf,
    backbone_from_state,
    hf_state,
    read_adapter,
    read_market,
    write_adapter,
    write_market,
)
from lora_recycle.method.lora import LoRA, average_products, new_lora
from lora_recycle.suite.miniature import load_miniature

TINY = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=6,
    projection_dim=10,
)


def tiny_model(**changes):
    "A CLIPVisionModelWithProjection with random weights, larger than transformers starts them, so that a mistake shows"
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**TINY | changes)
    ).eval()
    gen = generator(0, 'tiny')
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * 0.3
    return model


def trained(model, **settings):
    "`model` under a peft LoRA whose factors are random, as if trained"
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(**dict(r=2, lora_alpha=2, target_modules=['q_proj', 'v_proj']) | settings),
    ).eval()
    gen = generator(1, 'trained')
    for name, weight in adapted.named_parameters():
        if '.lora_' in name:
            weight.data = torch.randn(weight.shape, generator=gen) * 0.3
    return adapted


@torch.no_grad()
def features(model, x):
    return model(pixel_values=x).image_embeds


@pytest.fixture
def x():
    return torch.randn(5, 3, 12, 12, generator=generator(2, 'x'))


@pytest.fixture
def saved(tmp_path):
    "A tiny model in a folder, as transformers writes it"
    tiny_model().save_pretrained(tmp_path / 'base')
    return tmp_path / 'base'


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(hidden_act='gelu'),
        dict(layer_norm_eps=1e-3),
        dict(num_attention_heads=4),
        dict(patch_size=4),
    ],
    ids=str,
)
def test_a_backbone_of_transformers_gives_its_features(tmp_path, x, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        encode(backbone_from_hf(tmp_path), x).features, features(model, x), atol=1e-5, rtol=0
    )


def test_a_whole_clip_is_read_without_its_text_tower(tmp_path, x):
    text = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        max_position_embeddings=5,
    )
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=TINY, projection_dim=10)
    ).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(x).pooler_output)
    torch.testing.assert_close(
        encode(backbone_from_hf(tmp_path), x).features, expected, atol=1e-5, rtol=0
    )


def test_what_is_silent_in_config_json_is_what_transformers_takes(tmp_path):
    defaults = transformers.CLIPVisionConfig()
    assert {k: getattr(defaults, k) for k in _CLIP} == _CLIP


def test_the_miniature_becomes_a_model_of_transformers():
    backbone = load_miniature()
    config = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=36,
        patch_size=6,
        projection_dim=128,
        hidden_act='gelu',
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(hf_state(backbone), strict=True)
    x = torch.randn(3, 3, 36, 36, generator=generator(0, 'x'))
    torch.testing.assert_close(features(model, x), encode(backbone, x).features, atol=1e-5, rtol=0)
    again = backbone_from_state(model.state_dict(), config.to_dict(), 'miniature')
    assert all(torch.equal(again.weights[k], w) for k, w in backbone.weights.items())


SETTINGS = dict(
    plain={},
    alpha=dict(lora_alpha=7),
    rslora=dict(r=4, lora_alpha=3, use_rslora=True),
    only_v=dict(target_modules=['v_proj']),
    patterns=dict(
        rank_pattern={'layers.0.self_attn.q_proj': 5, 'v_proj': 1},
        alpha_pattern={'layers.2.self_attn.v_proj': 9, 'q_proj': 3},
    ),
    full_name=dict(rank_pattern={'^vision_model.encoder.layers.1.self_attn.q_proj': 6}),
    dots=dict(alpha_pattern={r'layers\.1\.self_attn.v.proj': 8}),
    rslora_patterns=dict(use_rslora=True, lora_alpha=5, rank_pattern={'q_proj': 4}),
    gaussian=dict(init_lora_weights='gaussian'),
    some_layers=dict(layers_to_transform=[0, 2]),
    last_layer=dict(target_modules=['layers.2.self_attn.v_proj']),
    regex=dict(target_modules=r'.*\.[qv]_proj'),
)


@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_of_peft_gives_its_features(saved, tmp_path, x, settings):
    adapted = trained(tiny_model(), **settings)
    adapted.save_pretrained(tmp_path / 'a')
    backbone = backbone_from_hf(saved)
    adapter = read_adapter(tmp_path / 'a', 3, 16, 10)
    found, plain = encode(backbone, x, adapter.lora).features, encode(backbone, x).features
    torch.testing.assert_close(found, features(adapted, x), atol=1e-5, rtol=0)
    assert (
        found - plain
    ).abs().max() > 1e-2  # the adapter does something, so that the line above means something
    torch.testing.assert_close(found, features(adapted.merge_and_unload(), x), atol=1e-5, rtol=0)
    assert adapter.ignored == () and adapter.lora.W is None


def test_an_adapter_of_a_bare_vision_model(saved, tmp_path, x):
    "transformers 5 names the modules of CLIPVisionModel without vision_model."
    whole = tiny_model()

    def bare():
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)).eval()
        model.load_state_dict(
            {
                k.removeprefix('vision_model.'): v
                for k, v in whole.state_dict().items()
                if k.startswith('vision_model.')
            },
            strict=True,
        )
        return model

    @torch.no_grad()
    def projected(model):
        return whole.visual_projection(model(pixel_values=x).pooler_output)

    adapted = trained(bare(), lora_alpha=3)
    adapted.save_pretrained(tmp_path / 'a')
    lora = read_adapter(tmp_path / 'a', 3, 16).lora
    torch.testing.assert_close(
        encode(backbone_from_hf(saved), x, lora).features, projected(adapted), atol=1e-5, rtol=0
    )
    write_adapter(tmp_path / 'b', lora, 'tiny', model='CLIPVisionModel')
    torch.testing.assert_close(
        projected(peft.PeftModel.from_pretrained(bare(), tmp_path / 'b').eval()),
        projected(adapted),
        atol=1e-5,
        rtol=0,
    )


class Scaled(torch.nn.Module):
    "A tower with one more layer behind it."

    def __init__(self):
        super().__init__()
        self.clip = tiny_model()
        self.mix = torch.nn.Linear(10, 10)


def test_other_modules_are_named_and_refused_or_left_out(tmp_path):
    trained(Scaled(), target_modules=['q_proj', 'fc1', 'mix']).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='mix.*allow_partial'):
        read_adapter(tmp_path, 3, 16)
    adapter = read_adapter(tmp_path, 3, 16, allow_partial=True)
    assert len(adapter.used) == 6 and adapter.lora.targets == ('q', 'fc1')
    assert adapter.ignored == ('mix',)


def check_features(folder, adapted, backbone, x, wanted=None):
    "The adapter in `folder` gives our backbone the features `wanted`; returns it."
    adapter = read_adapter(folder, backbone.layers, backbone.width)
    found = encode(backbone, x, adapter.lora).features
    wanted = features(adapted, x) if wanted is None else wanted
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - encode(backbone, x).features).abs().max() > 1e-2, 'it does nothing'
    return adapter


TARGETS = ['q', 'k', ('out',), 'qk', 'qkv', ('q', 'k', 'v', 'out')]
TARGETS += [('fc1',), ('fc2',), ('fc1', 'fc2'), ('v', 'fc2'), ('q', 'k', 'v', 'out', 'fc1', 'fc2')]


@pytest.mark.parametrize('targets', TARGETS, ids=''.join)
def test_any_products_of_a_block(saved, tmp_path, x, targets):
    ranks = {'layers.1.self_attn.out_proj': 5, 'k_proj': 3, 'layers.2.mlp.fc1': 1, 'fc2': 4}
    patterns = dict(rank_pattern=ranks, alpha_pattern={'fc1': 5, 'layers.0.mlp.fc2': 9})
    names = [t if t[:2] == 'fc' else f'{t}_proj' for t in targets]
    adapted = trained(tiny_model(), target_modules=names, lora_alpha=3, **patterns)
    adapted.save_pretrained(tmp_path / 'a')
    backbone = backbone_from_hf(saved)
    lora = check_features(tmp_path / 'a', adapted, backbone, x).lora
    assert lora.targets == (('q', 'v') if set(targets) <= {'q', 'v'} else tuple(targets))
    model = ('CLIPVisionModelWithProjection', 16)
    write_adapter(tmp_path / 'b', lora, 'tiny', model=model)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / 'b').eval()
    torch.testing.assert_close(features(again, x), features(adapted, x), atol=1e-5, rtol=0)


def test_a_market_of_differing_targets(saved, tmp_path, x):
    "Zeros where one LoRA has nothing; each still gives peft's features, and so from our files."
    backbone = backbone_from_hf(saved)
    wanted = []
    for i, targets in enumerate((['q_proj'], ['k_proj', 'out_proj'], ['v_proj', 'fc1'])):
        adapted = trained(tiny_model(), target_modules=targets, r=i + 1)
        adapted.save_pretrained(tmp_path / 'market' / f'{i}')
        wanted.append(features(adapted, x))
    market, report = read_market(tmp_path / 'market', backbone, head='drop')
    assert market.targets == ('q', 'k', 'v', 'out', 'fc1') and report[1].targets == ('k', 'out')
    write_market(tmp_path / 'ours', market, backbone)
    again, _ = read_market(tmp_path / 'ours', backbone, head='drop')
    for i in range(3):
        found = encode(backbone, x, again[i]).features
        torch.testing.assert_close(found, wanted[i], atol=1e-5, rtol=0)


class Wrapper(torch.nn.Module):
    "A tower and a head in a model of somebody's own."

    def __init__(self, tower='clip', head='classifier'):
        super().__init__()
        self.names = tower, head
        setattr(self, tower, tiny_model())
        setattr(self, head, torch.nn.Linear(10, 4))

    def forward(self, pixel_values):
        tower, head = (getattr(self, name) for name in self.names)
        return head(tower(pixel_values=pixel_values).image_embeds)


@pytest.mark.parametrize('tower, head', [('clip', 'classifier'), ('backbone', 'head'), ('m', 'fc')])
def test_wrapped_towers_are_read_with_their_heads(saved, tmp_path, x, tower, head):
    adapted = trained(Wrapper(tower, head).eval(), modules_to_save=[head])
    adapted.save_pretrained(tmp_path / 'a')
    backbone = backbone_from_hf(saved)
    lora = read_adapter(tmp_path / 'a', 3, 16, 10).lora
    with torch.no_grad():
        wanted = adapted(x)
    found = encode(backbone, x, lora).features @ lora.W + lora.b
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def rename(folder, change):
    "Give each tensor of the adapter in `folder` the name that `change` makes of its own."
    path = folder / 'adapter_model.safetensors'
    save_file({change(k): t for k, t in load_file(path).items()}, path)


BASE = 'base_model.model.'
RENAMED = dict(
    compiled_before=lambda k: k.replace(BASE, BASE + '_orig_mod.'),
    compiled_after=lambda k: '_orig_mod.' + k,
    doubled_prefix=lambda k: BASE + k,
    data_parallel=lambda k: k.replace(BASE, BASE + 'module.'),
    no_prefix=lambda k: k.removeprefix(BASE),
    named_adapter=lambda k: k.replace('.weight', '.default.weight'),
    compiled_blocks=lambda k: k.replace('.self_attn', '._orig_mod.self_attn'),
)


@pytest.mark.parametrize('change', RENAMED.values(), ids=RENAMED)
def test_renamed_layers_are_read(saved, tmp_path, x, change):
    adapted = trained(tiny_model(), lora_alpha=3)
    adapted.save_pretrained(tmp_path / 'a')
    rename(tmp_path / 'a', change)
    check_features(tmp_path / 'a', adapted, backbone_from_hf(saved), x)


def test_two_towers_in_one_adapter_are_refused(tmp_path):
    trained(tiny_model()).save_pretrained(tmp_path)
    double = load_file(tmp_path / 'adapter_model.safetensors')
    double |= {k.replace(BASE, BASE + 'twin.'): t.clone() for k, t in double.items()}
    save_file(double, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(ValueError, match='stands for the same layer as'):
        read_adapter(tmp_path, 3, 16)


TEXT = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=20,
    max_position_embeddings=5,
    bos_token_id=0,
    eos_token_id=1,
)


def text_model():
    "A text tower as wide and deep as the image tower."
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()


def siglip_model():
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**{k: v for k, v in TINY.items() if k[:4] != 'proj'})
    ).eval()


@pytest.mark.parametrize('make, name', [(text_model, 'CLIPTextModel'), (siglip_model, 'Siglip')])
def test_an_adapter_of_another_class_is_refused_by_name(tmp_path, make, name):
    trained(make()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'{name}.*classes that fit: CLIPVisionModelWithProj'):
        read_adapter(tmp_path, 3, 16)


def test_where_no_class_is_recorded_a_warning_says_so(tmp_path):
    "With a task type peft records no class; nobody can tell a text tower from an image tower then."
    for make in (text_model, tiny_model):
        folder = tmp_path / make.__name__
        trained(make(), task_type='FEATURE_EXTRACTION').save_pretrained(folder)
        with pytest.warns(UserWarning, match='do not record the class'):
            read_adapter(folder, 3, 16)


def test_the_text_tower_of_a_whole_clip_is_named(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=TINY, projection_dim=10)
    whole = lambda: transformers.CLIPModel(config).eval()
    only_text = r'.*text_model.*\.q_proj'
    trained(whole(), target_modules=only_text).save_pretrained(tmp_path / 'text')
    with pytest.raises(ValueError, match='no q, k, v or out, fc1.*text_model.*text tower'):
        read_adapter(tmp_path / 'text', 3, 16)
    trained(whole()).save_pretrained(tmp_path / 'both')
    with pytest.raises(ValueError, match='text_model.*allow_partial'):
        read_adapter(tmp_path / 'both', 3, 16)
    adapter = read_adapter(tmp_path / 'both', 3, 16, allow_partial=True)
    assert len(adapter.used) == 6 and all('text_model' in m for m in adapter.ignored)


def vit_backbone(weights, names, **settings):
    "A backbone from another library's weights by a map: our name -> its names."
    found = {ours: torch.cat([weights[t] for t in theirs]) for ours, theirs in names.items()}
    width = found['ln_post.weight'].numel()
    found['class_embedding'] = found['class_embedding'].flatten()
    found['positional_embedding'] = found['positional_embedding'].flatten(0, 1)
    found.setdefault('proj', torch.eye(width))
    return Backbone('vit', {k: t.detach() for k, t in found.items()}, **settings)


def vit_names(top, block, layers=2):
    "The map for `vit_backbone` from maps for the top and for a block."
    names = {k: (v,) if isinstance(v, str) else v for k, v in top.items()}
    for i in range(layers):
        for ours, theirs in block.items():
            theirs = (theirs,) if isinstance(theirs, str) else theirs
            for kind in ('weight', 'bias'):
                at = f'transformer.resblocks.{i}.{ours}{kind}'
                names[at] = tuple(t.format(i=i) + kind for t in theirs)
    return names


def randomise(model):
    gen = generator(0, 'tiny')
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * 0.3
    return model.eval()


def timm_model():
    return randomise(
        timm.models.VisionTransformer(
            img_size=12, patch_size=6, embed_dim=16, depth=2, num_heads=2, num_classes=5
        )
    )


TIMM = vit_names(
    {
        'class_embedding': 'cls_token',
        'positional_embedding': 'pos_embed',
        'conv1.weight': 'patch_embed.proj.weight',
        'conv1.bias': 'patch_embed.proj.bias',
        'ln_post.weight': 'norm.weight',
        'ln_post.bias': 'norm.bias',
    },
    {
        'ln_1.': 'blocks.{i}.norm1.',
        'ln_2.': 'blocks.{i}.norm2.',
        'attn.in_proj_': 'blocks.{i}.attn.qkv.',
        'attn.out_proj.': 'blocks.{i}.attn.proj.',
        'mlp.c_fc.': 'blocks.{i}.mlp.fc1.',
        'mlp.c_proj.': 'blocks.{i}.mlp.fc2.',
    },
)


@pytest.mark.parametrize('targets', [['qkv'], ['attn.proj'], ['qkv', 'attn.proj']], ids=str)
def test_the_fused_projection_of_timm(tmp_path, x, targets):
    model = timm_model()
    backbone = vit_backbone(model.state_dict(), TIMM, heads=2, patch=6, eps=1e-6)
    adapted = trained(model, target_modules=targets, lora_alpha=3, modules_to_save=['head'])
    adapted.save_pretrained(tmp_path / 'a')
    lora = read_adapter(tmp_path / 'a', 2, 16, 16).lora
    with torch.no_grad():
        wanted = adapted(x)
    found = encode(backbone, x, lora).features @ lora.W + lora.b
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert len(lora.targets) == dict(qkv=3).get(targets[0], 1) + len(targets) - 1


def test_the_patch_embedding_of_timm_is_refused_by_name(tmp_path):
    trained(timm_model(), target_modules=['qkv', 'proj']).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='patch_embed.proj'):
        read_adapter(tmp_path, 2, 16)


@pytest.mark.parametrize('wrapped', [False, True], ids=['tower', 'clip'])
def test_the_attention_of_open_clip(tmp_path, wrapped):
    "Of a whole CLIP the image tower is read, and the text tower is named."
    vision = dict(layers=2, width=64, image_size=12, patch_size=6, head_width=32)
    text = dict(width=16, heads=2, layers=2, vocab_size=20, context_length=5)
    clip = randomise(open_clip.model.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text))
    backbone = from_open_clip(clip.visual, 'tiny', 'gelu')
    x = torch.randn(4, 3, 12, 12, generator=generator(2, 'x'))
    model = clip if wrapped else clip.visual
    adapted = trained(model, target_modules=['attn'], lora_alpha=3)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        tower = adapted.base_model.model
        wanted = tower.encode_image(x) if wrapped else tower(x)
    if wrapped:
        with pytest.raises(ValueError, match='resblocks.*allow_partial'):
            read_adapter(tmp_path, 2, 64)
    with pytest.warns(UserWarning, match='out_proj of a MultiheadAttention twice'):
        adapter = read_adapter(tmp_path, 2, 64, allow_partial=wrapped)
    assert adapter.lora.targets == ('q', 'k', 'v', 'out')
    found = encode(backbone, x, adapter.lora).features
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_vit_of_transformers(tmp_path, x):
    sizes = {k: v for k, v in TINY.items() if k != 'projection_dim'} | dict(num_hidden_layers=2)
    model = randomise(transformers.ViTModel(transformers.ViTConfig(**sizes), False))
    weights = model.state_dict()
    block = 'layers.{i}.' if 'layers.0.layernorm_before.weight' in weights else 'encoder.layer.{i}.'
    new = f'{block}attention.q_proj.weight'.format(i=0) in weights
    split = [f'{c}_proj' for c in 'qkv'] if new else ['query', 'key', 'value']
    at = f'{block}attention.' + ('' if new else 'attention.')
    out = f'{block}attention.' + ('o_proj.' if new else 'output.dense.')
    mlp = [f'{block}mlp.fc1.', f'{block}mlp.fc2.'] if new else None
    mlp = mlp or [f'{block}intermediate.dense.', f'{block}output.dense.']
    top = {
        'class_embedding': 'embeddings.cls_token',
        'positional_embedding': 'embeddings.position_embeddings',
        'conv1.weight': 'embeddings.patch_embeddings.projection.weight',
        'conv1.bias': 'embeddings.patch_embeddings.projection.bias',
        'ln_post.weight': 'layernorm.weight',
        'ln_post.bias': 'layernorm.bias',
    }
    blocks = {
        'ln_1.': f'{block}layernorm_before.',
        'ln_2.': f'{block}layernorm_after.',
        'attn.in_proj_': tuple(f'{at}{s}.' for s in split),
        'attn.out_proj.': out,
        'mlp.c_fc.': mlp[0],
        'mlp.c_proj.': mlp[1],
    }
    settings = dict(heads=2, patch=6, eps=model.config.layer_norm_eps)
    backbone = vit_backbone(weights, vit_names(top, blocks), **settings)
    names = [split[0], split[2], out.split('}.')[1].rstrip('.')]
    adapted = trained(model, target_modules=names, lora_alpha=3)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = adapted(pixel_values=x).last_hidden_state[:, 0]
    adapter = check_features(tmp_path, adapted, backbone, x, wanted)
    assert adapter.lora.targets == ('q', 'v', 'out')


def test_an_adapter_of_numbers_of_8_bits(saved, tmp_path, x):
    "Cast, not called damaged: the features are those of the rounded factors."
    adapted = trained(tiny_model(), target_modules=['q_proj', 'out_proj'])
    for name, weight in adapted.named_parameters():
        if '.lora_' in name:
            weight.data = weight.data.to(torch.float8_e4m3fn).float()
    adapted.save_pretrained(tmp_path / 'a')
    path = tmp_path / 'a' / 'adapter_model.safetensors'
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(path).items()}, path)
    check_features(tmp_path / 'a', adapted, backbone_from_hf(saved), x)


def test_adapters_that_name_different_base_models(tmp_path, saved):
    backbone = backbone_from_hf(saved)
    bases = ('openai/clip-vit-base-patch6', 'laion/CLIP-ViT-B-6', 'openai/clip-vit-base-patch32')
    for i, base in enumerate(bases):
        lora = new_lora(3, 16, 2, generator(i))
        write_adapter(tmp_path / 'm' / f'a{i}', lora, base)
    with pytest.warns(UserWarning) as seen:
        market, _ = read_market(tmp_path / 'm', backbone, head='drop')
    words = [str(w.message) for w in seen]
    assert market.size == 3 and all(base in words[0] for base in bases)
    assert any('patches have 32 pixels' in w and 'a2' in w for w in words)
    assert any('which has GELU' in w and 'a1' in w for w in words)  # tiny has QuickGELU
    strict = Limits(mixed_bases='refuse')
    with pytest.raises(ValueError, match='name 3 base models'):
        read_market(tmp_path / 'm', backbone, head='drop', limits=strict)
    for name in ('a1', 'a2'):
        shutil.rmtree(tmp_path / 'm' / name)
    read_market(tmp_path / 'm', backbone, head='drop', limits=strict)


def test_what_the_folder_says_about_pixels_is_used(tmp_path, x):
    "transformers 5 writes processor_config.json; pixels may be left as they are."
    model = tiny_model()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 12, 12, generator=generator(0, 'pixels'))
    found = lambda: encode(b := backbone_from_hf(tmp_path), normalise(images, b)).features
    for settings in (
        dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        dict(do_normalize=False),
        dict(rescale_factor=1 / 127.5),
        dict(do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3),
    ):
        processor = transformers.CLIPImageProcessor(
            **dict(do_resize=False, do_center_crop=False, size=12) | settings
        )
        pixels = (images * 255).round()
        wanted = features(model, processor(pixels, return_tensors='pt')['pixel_values'])
        say = json.loads(processor.to_json_string())
        for name, content in (
            ('processor_config.json', dict(image_processor=say)),
            ('preprocessor_config.json', say),
        ):
            (tmp_path / name).write_text(json.dumps(content))
            torch.testing.assert_close(found(), wanted, atol=0.2, rtol=0.02)
            (tmp_path / name).unlink()
    (tmp_path / 'processor_config.json').write_text(
        json.dumps(dict(image_processor=dict(do_normalize=False)))
    )
    (tmp_path / 'preprocessor_config.json').write_text('{}')
    with pytest.raises(ValueError, match='different things about pixels'):
        backbone_from_hf(tmp_path)


def test_a_trained_projection_is_no_head(tmp_path):
    trained(tiny_model(), modules_to_save=['visual_projection']).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='visual_projection'):
        read_adapter(tmp_path, 3, 16)
    assert 'visual_projection.weight' in read_adapter(tmp_path, 3, 16, allow_partial=True).ignored


@pytest.mark.parametrize(
    'settings, why',
    [
        (dict(use_dora=True), 'use_dora'),
        (dict(bias='all'), 'bias'),
        (dict(bias='lora_only'), 'bias'),
        (dict(modules_to_save=['post_layernorm']), 'post_layernorm'),
        (dict(lora_bias=True), 'lora_bias'),
        (dict(init_lora_weights='pissa'), 'init_lora_weights'),
        (dict(init_lora_weights='olora'), 'init_lora_weights'),
        (dict(rank_pattern={'.*q_proj': 3}), 'regular expression'),
    ],
    ids=str,
)
@pytest.mark.filterwarnings('ignore')
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, settings, why):
    trained(tiny_model(), **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=why):
        read_adapter(tmp_path, 3, 16)


def test_other_methods_are_refused(tmp_path):
    peft.get_peft_model(
        tiny_model(), peft.LoHaConfig(r=2, target_modules=['q_proj'])
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='LOHA'):
        read_adapter(tmp_path, 3, 16)


class Classifier(torch.nn.Module):
    "A tower and a linear head on its feature, as people write it"

    def __init__(self):
        super().__init__()
        self.vision_model, self.visual_projection, self.classifier = (
            (m := tiny_model()).vision_model,
            m.visual_projection,
            torch.nn.Linear(10, 4),
        )

    def forward(self, pixel_values):
        return self.classifier(
            self.visual_projection(self.vision_model(pixel_values).pooler_output)
        )


def test_a_head_in_modules_to_save_gives_the_logits(saved, tmp_path, x):
    adapted = trained(Classifier().eval(), lora_alpha=5, modules_to_save=['classifier'])
    adapted.save_pretrained(tmp_path / 'a')
    lora = read_adapter(tmp_path / 'a', 3, 16, 10).lora
    with torch.no_grad():
        expected = adapted(x)
    torch.testing.assert_close(
        encode(backbone_from_hf(saved), x, lora).features @ lora.W + lora.b,
        expected,
        atol=1e-5,
        rtol=0,
    )


def test_the_head_of_an_image_classifier_of_transformers_is_refused(tmp_path):
    "It reads the mean of the patch tokens, which is not the feature that ours reads"
    text = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
    )
    model = transformers.CLIPForImageClassification(
        transformers.CLIPConfig(
            text_config=text, vision_config=TINY | dict(hidden_size=10), num_labels=4
        )
    )
    trained(model, modules_to_save=['classifier']).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='patch tokens'):
        read_adapter(tmp_path, 3, 10, 10)
    adapter = read_adapter(tmp_path, 3, 10, 10, allow_partial=True)
    assert adapter.lora.W is None and any('classifier' in m for m in adapter.ignored)


def test_a_market_of_peft_adapters_of_differing_ranks(saved, tmp_path, x):
    backbone, expected = backbone_from_hf(saved), []
    for i, rank in enumerate((1, 2, 6)):
        adapted = trained(Classifier().eval(), r=rank, lora_alpha=4, modules_to_save=['classifier'])
        adapted.save_pretrained(tmp_path / 'market' / f'{i}')
        with torch.no_grad():
            expected.append(adapted(x))
    market, report = read_market(tmp_path / 'market', backbone)
    assert [e.rank for e in report] == [1, 2, 6] and market.rank == 6
    write_market(tmp_path / 'ours', market, backbone)
    again, _ = read_market(tmp_path / 'ours', backbone)
    for i in range(3):
        found = encode(backbone, x, again[i]).features @ again[i].W + again[i].b
        torch.testing.assert_close(found, expected[i], atol=1e-5, rtol=0)


@pytest.fixture
def ours(tmp_path):
    "A meta-LoRA of ours, written as an adapter"
    gen = generator(3, 'ours')
    lora = new_lora(3, 16, 4, gen)
    lora = LoRA(lora.A, torch.randn(lora.B.shape, generator=gen) * 0.5)
    made = dict(
        market='5e1f',
        backbone='tiny',
        config=dict(steps=3, note='a | b'),
        scores=[dict(set='greek', way=5, shot=1, accuracy=93.1, ci95=0.4)],
        name='Ünïcode: "quoted"',
    )
    write_adapter(tmp_path / 'meta', lora, 'someone/tiny-clip', made)
    return lora, tmp_path / 'meta'


@pytest.mark.filterwarnings('error:.*missing.*', 'error:.*unexpected.*')
def test_our_lora_gives_its_features_in_peft(saved, x, ours):
    lora, folder = ours
    expected = encode(backbone_from_hf(saved), x, lora).features
    adapted = peft.PeftModel.from_pretrained(
        transformers.CLIPVisionModelWithProjection.from_pretrained(saved), folder
    ).eval()
    torch.testing.assert_close(features(adapted, x), expected, atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        assert (features(adapted, x) - expected).abs().max() > 1e-2
    torch.testing.assert_close(features(adapted.merge_and_unload(), x), expected, atol=1e-5, rtol=0)


def test_our_lora_survives_a_round_trip_through_peft(saved, tmp_path, ours):
    lora, folder = ours
    peft.PeftModel.from_pretrained(tiny_model(), folder).save_pretrained(tmp_path / 'again')
    again = read_adapter(tmp_path / 'again', 3, 16).lora
    assert torch.equal(again.A, lora.A) and torch.equal(again.B, lora.B)


def test_peft_finds_every_tensor_of_ours(saved, ours):
    model = trained(tiny_model(), r=4, lora_alpha=4)
    result = peft.set_peft_model_state_dict(model, load_file(ours[1] / 'adapter_model.safetensors'))
    assert not result.unexpected_keys and not [k for k in result.missing_keys if 'lora_' in k]
    assert peft.PeftConfig.from_pretrained(ours[1]).peft_type == 'LORA'


def test_model_hubs_understand_the_card(ours):
    card = huggingface_hub.ModelCard.load(ours[1] / 'README.md')
    assert (card.data.library_name, card.data.base_model) == ('peft', 'someone/tiny-clip')
    assert (
        'base_model:adapter:someone/tiny-clip' in card.data.tags
        and card.data.pipeline_tag == 'image-feature-extraction'
    )
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value, result.task_name) == (
        'greek',
        93.1,
        '5-way 1-shot',
    )
    assert card.data.model_name == 'Ünïcode: "quoted"' and 'a \\| b' in card.text
    assert json.loads((ours[1] / 'made.json').read_text())['market'] == '5e1f'


@pytest.fixture(scope='module')
def layouts():
    "What nbs/layouts.ipynb defines, up to where it makes its table."
    names = {}
    path = Path(__file__).parents[1] / 'nbs' / 'layouts.ipynb'
    for cell in json.loads(path.read_text())['cells']:
        source = ''.join(cell['source'])
        if source.startswith('found = []'):
            return names
        if cell['cell_type'] == 'code':
            exec(compile(source, cell['id'], 'exec'), names)
    raise AssertionError('there is no table')


@pytest.mark.parametrize(
    'name', ['Dinov2WithRegistersModel', 'DINOv3ViTModel', 'VisionTransformer']
)
def test_every_class_of_the_page_is_read_and_written(layouts, name):
    case = next(c for c in layouts['CASES'] if c.name == name)
    every = layouts['KINDS']['all, patterns of rank and alpha']
    assert layouts['compare_case'](case, **every)[0] < 1e-5


def test_an_adapter_of_another_family_is_refused(layouts, tmp_path):
    "As wide and as deep, but a DINOv2 is no plain ViT, and the other way round."
    cases = {c.name: c for c in layouts['CASES']}
    vit, dino = cases['ViTModel'], cases['Dinov2Model']
    for theirs, ours in ((dino, vit), (vit, dino)):
        folder = tmp_path / theirs.name
        layouts['adapt'](theirs, theirs.make(), ('q', 'v')).save_pretrained(folder / 'a')
        backbone = layouts['make_backbone'](ours, layouts['randomise'](ours.make(), 'x'))
        with pytest.raises(ValueError, match=f'tuned on .{theirs.name}.*that fit: .*{ours.name}'):
            read_market(folder, backbone, head='drop')


def test_the_published_page_has_every_class(layouts):
    with open(Path(__file__).parents[1] / 'results' / 'layouts' / 'rows.csv') as file:
        rows = list(csv.DictReader(file))
    known = {c.name for c in layouts['CASES']} | {'CLIPVisionTransformer'}
    assert len(rows) >= 25 and {r['class'] for r in rows} == known
    assert {r['library'] for r in rows} == {c.library for c in layouts['CASES']} | {'transformers 4'}
    assert all(0 < float(r['max_difference']) <= 1e-5 for r in rows)
    assert {'library', 'class', 'targets', 'max_difference'} <= set(rows[0])


def clip_lora(layers=3, width=64, r=2, alpha=3, names=('q_proj', 'k_proj', 'v_proj'), **settings):
    "What CLIP-LoRA saves: random factors of `layers` tuned layers, and its settings."
    gen = generator(0, 'clip-lora')
    draw = lambda *size: torch.randn(*size, generator=gen) * 0.3
    pair = lambda: dict(w_lora_A=draw(r, width), w_lora_B=draw(width, r))
    weights = {f'layer_{i}': {name: pair() for name in names} for i in range(layers)}
    given = dict(r=r, alpha=alpha, encoder='vision', params=['q'], position='all')
    return dict(weights=weights, metadata=given | settings)


def merge_clip_lora(visual, saved, places):
    "Change the weights of an open_clip tower as CLIP-LoRA does: W + alpha / sqrt(r) B A."
    rank, alpha = (saved['metadata'][k] for k in ('r', 'alpha'))
    for place, entry in zip(places, saved['weights'].values()):
        block = visual.transformer.resblocks[place].attn
        for name, f in entry.items():
            change = alpha / rank**0.5 * f['w_lora_B'] @ f['w_lora_A']
            rows = dict(q_proj=0, k_proj=64, v_proj=128).get(name)
            if rows is None:
                block.out_proj.weight.data += change
            else:
                block.in_proj_weight.data[rows : rows + 64] += change


def open_tower(layers):
    vision = dict(layers=layers, width=64, image_size=12, patch_size=6, head_width=32)
    text = dict(width=16, heads=2, layers=1, vocab_size=20, context_length=5)
    clip = open_clip.model.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text)
    return randomise(clip).visual


@torch.no_grad()
@pytest.mark.parametrize(
    'layers, n, settings, places',
    [
        (3, 3, {}, (0, 1, 2)),
        (3, 2, {}, (0, 1)),  # "all" of their L/14 are 21 of 24
        (12, 3, dict(position='top3'), (9, 10, 11)),
        (12, 4, dict(position='mid', names=('q_proj', 'proj'), r=3), (4, 5, 6, 7)),
    ],
    ids=str,
)
def test_a_file_of_clip_lora_gives_its_features(tmp_path, layers, n, settings, places):
    saved = clip_lora(n, **settings)
    torch.save(saved, tmp_path / 'a.pt')
    backbone = from_open_clip(open_tower(layers), 'tiny', 'gelu')
    merged = open_tower(layers)
    merge_clip_lora(merged, saved, places)
    x = torch.randn(4, 3, 12, 12, generator=generator(2, 'x'))
    wanted = merged(x)
    scale = wanted.abs().max().clamp(min=1)
    lora = read_clip_lora(tmp_path / 'a.pt', layers, 64)
    found = encode(backbone, x, lora).features
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match='on which CLIP'):
        market, report = read_market(tmp_path, backbone, head='drop')
    assert torch.equal(market[0].B, lora.B) and report[0].name == 'a.pt'


def test_the_text_tower_of_clip_lora_is_left_out_when_asked(tmp_path):
    both = clip_lora(12 + 3, encoder='both')
    alone = clip_lora(3)
    keys = [f'layer_{12 + i}' for i in range(3)]
    alone['weights'] = {f'layer_{i}': both['weights'][k] for i, k in enumerate(keys)}
    torch.save(both, tmp_path / 'both.pt')
    torch.save(alone, tmp_path / 'alone.pt')
    with pytest.raises(ValueError, match='text tower; allow_partial'):
        read_clip_lora(tmp_path / 'both.pt', 3, 64)
    found = read_clip_lora(tmp_path / 'both.pt', 3, 64, allow_partial=True)
    assert torch.equal(found.B, read_clip_lora(tmp_path / 'alone.pt', 3, 64).B)


BAD_FILES = {
    'text only': (dict(encoder='text'), 'no image tower'),
    'unknown position': (dict(position='middle'), "position='middle'"),
    'too deep': (dict(layers=4), 'no image tower of 3 layers'),
    'other names': (dict(names=('fc1',)), 'holds more than'),
    'alpha': (dict(alpha=float('nan')), 'lora_alpha'),
    'narrow': (dict(width=32), r'numbers \[2, 64\]'),
}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_a_wrong_file_of_clip_lora_is_refused(tmp_path, kind):
    settings, why = BAD_FILES[kind]
    torch.save(clip_lora(**settings), tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=why):
        read_clip_lora(tmp_path / 'a.pt', 3, 64)


class Evil:
    "Runs code where a pickle is trusted."

    def __reduce__(self):
        return (os.mkdir, ('EVIL',))


def test_no_code_of_a_pt_is_run_and_nothing_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(weights=Evil(), metadata={}), 'evil.pt')
    with zipfile.ZipFile('bomb.pt', 'w', zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr('archive/data.pkl', b'0' * 10**6)
    for name, why in (('evil.pt', 'no sound file'), ('bomb.pt', 'is compressed')):
        with pytest.raises(ValueError, match=why):
            read_clip_lora(tmp_path / name, 3, 64)
    with pytest.raises(FileNotFoundError):
        read_clip_lora(tmp_path / 'none.pt', 3, 64)
    assert not (tmp_path / 'EVIL').exists()


def damaged(data, gen):
    "`data` with something wrong: bits, a piece cut out, its end lost, a piece twice."
    at = lambda: int(torch.randint(len(data), (1,), generator=gen))
    kind = int(torch.randint(4, (1,), generator=gen))
    if kind == 0:
        wrong = bytearray(data)
        for _ in range(1 + at() % 8):
            wrong[at()] ^= 1 << at() % 8
        return bytes(wrong)
    a, b = sorted((at(), at()))
    return (data[:a] + data[b:], data[:a], data[:b] + data[a:])[kind - 1]


@pytest.mark.filterwarnings('ignore')
def test_damaged_files_of_clip_lora_are_documented_errors(tmp_path):
    torch.save(clip_lora(3, width=8), tmp_path / 'a.pt')
    data = (tmp_path / 'a.pt').read_bytes()
    gen = generator(int(os.environ.get('FUZZ_SEED', 0)), 'damage')
    refused = 0
    for _ in range(int(os.environ.get('FUZZ_FILES', 3000))):
        (tmp_path / 'b.pt').write_bytes(damaged(data, gen))
        try:
            lora = read_clip_lora(tmp_path / 'b.pt', 3, 8)
        except ValueError:
            refused += 1
        else:
            assert lora.A.shape == (3, 3, 8, 2) and lora.A.isfinite().all()
    assert refused > 1000


def test_a_market_of_peft_becomes_one_adapter_that_peft_loads(saved, tmp_path, x):
    "Averaged exactly: against the summed products of peft's own factors, and through peft."
    names = [f'{t}_proj' for t in ('q', 'k', 'v', 'out')]
    for i in range(4):
        adapted = trained(tiny_model(), r=3, lora_alpha=3, target_modules=names)
        gen = generator(i, 'market')
        for name, weight in adapted.named_parameters():
            if '.lora_' in name:
                weight.data = torch.randn(weight.shape, generator=gen) * 0.3
        adapted.save_pretrained(tmp_path / 'm' / f'{i}')
    backbone = backbone_from_hf(saved)
    mean = average_products(read_market(tmp_path / 'm', backbone, head='drop')[0])
    files = [load_file(tmp_path / 'm' / f'{i}' / 'adapter_model.safetensors') for i in range(4)]
    for layer in range(3):
        for place, name in enumerate(names):
            at = f'{BASE}vision_model.encoder.layers.{layer}.self_attn.{name}.lora_'
            wanted = sum(f[f'{at}B.weight'] @ f[f'{at}A.weight'] for f in files) / 4
            found = (mean.A[layer, place] @ mean.B[layer, place]).T
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    write_adapter(tmp_path / 'one', mean, 'tiny')
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / 'one').eval()
    wanted = encode(backbone, x, mean).features
    torch.testing.assert_close(features(again, x), wanted, atol=1e-5, rtol=0)


OLD = ('CLIPVisionModel', 'CLIPVisionTransformer', 'SiglipVisionModel', 'ViTModel', 'Dinov2Model')


@pytest.mark.parametrize('kind', ['attention', 'all'])
@pytest.mark.parametrize('name', OLD)
def test_adapters_that_transformers_4_wrote(layouts, tmp_path, name, kind):
    "KnOTS and FusionBench tuned CLIPVisionTransformer, which transformers 5 has no more."
    assert layouts['open_old'](tmp_path)['transformers'].startswith('4.')
    config = json.loads((tmp_path / name / kind / 'adapter' / 'adapter_config.json').read_text())
    assert config['auto_mapping']['base_model_class'] == name
    worst, targets = layouts['compare_old'](tmp_path / name, kind)
    wanted = layouts['TARGETS'][:4] if kind == 'attention' else layouts['TARGETS']
    assert worst < 1e-5 and targets == wanted


def test_a_market_that_agrees_on_another_base_model_than_ours(tmp_path, saved):
    "All name one model, but not the backbone: as wide and deep, so no size betrays it."
    for i in range(2):
        write_adapter(tmp_path / 'm' / f'a{i}', new_lora(3, 16, 2), 'laion/CLIP-ViT-B-6-laion2B')
    with pytest.warns(UserWarning, match='a0., .a1.: it names .laion.*another model of the same'):
        read_market(tmp_path / 'm', backbone_from_hf(saved), head='drop')


def bert():
    config = dict(vocab_size=20, max_position_embeddings=9) | {k: TINY[k] for k in list(TINY)[:4]}
    return transformers.BertModel(transformers.BertConfig(**config)).eval()


def text_with_projection():
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT)).eval()


@pytest.mark.parametrize(
    'make, targets, said',
    [
        (text_with_projection, ['q_proj', 'v_proj'], 'text_model.*of a text tower'),
        (bert, ['attention.output.dense'], 'BertModel'),
        (bert, ['query', 'value'], 'no q, k, v or out'),
    ],
)
def test_text_models_whose_layers_are_called_alike(tmp_path, make, targets, said):
    "A BERT has attention.output.dense, as a ViT has, and may be as wide and deep."
    trained(make(), target_modules=targets).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        read_adapter(tmp_path, 3, 16)


@pytest.mark.parametrize('name', ['visual', 'backbone'])
def test_towers_of_other_libraries_in_a_model_of_ones_own(tmp_path, name):
    "timm under a name of one's own, its head beside; torch.compile around both."

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = dict(img_size=12, patch_size=6, embed_dim=16, depth=2, num_heads=2)
            setattr(self, name, timm.models.VisionTransformer(**sizes, num_classes=0))
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x):
            return self.head(getattr(self, name)(x))

    adapted = trained(Own().eval(), target_modules=['qkv', 'mlp.fc1'], modules_to_save=['head'])
    adapted.save_pretrained(tmp_path / 'a')
    rename(tmp_path / 'a', lambda k: k.replace(BASE, f'{BASE}_orig_mod.'))
    lora = read_adapter(tmp_path / 'a', 2, 16, 16).lora
    assert lora.targets == ('q', 'k', 'v', 'fc1') and lora.W.shape == (16, 4)
