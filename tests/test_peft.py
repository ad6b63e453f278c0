"Adapters go to the real peft and come back: the same features through peft and transformers as through our encode."

import json
import os

os.environ['HF_HUB_OFFLINE'] = os.environ['TRANSFORMERS_OFFLINE'] = (
    '1'  # before the imports that read them
)

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_recycle.method.backbone import encode
from lora_recycle.core import generator
from lora_recycle.use.exchange import (
    _CLIP,
    backbone_from_hf,
    backbone_from_state,
    hf_state,
    read_adapter,
    read_market,
    write_adapter,
    write_market,
)
from lora_recycle.method.lora import LoRA, new_lora
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
    write_adapter(tmp_path / 'b', lora, 'tiny', prefix='')
    torch.testing.assert_close(
        projected(peft.PeftModel.from_pretrained(bare(), tmp_path / 'b').eval()),
        projected(adapted),
        atol=1e-5,
        rtol=0,
    )


def test_other_modules_are_named_and_refused_or_left_out(tmp_path):
    trained(
        tiny_model(), target_modules=['q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2']
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='k_proj.*allow_partial'):
        read_adapter(tmp_path, 3, 16)
    adapter = read_adapter(tmp_path, 3, 16, allow_partial=True)
    assert (
        len(adapter.used) == 6
        and {m.rsplit('.', 1)[1] for m in adapter.ignored} == {'k_proj', 'out_proj', 'fc1', 'fc2'}
        and len(adapter.ignored) == 12
    )


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
    )
    write_adapter(tmp_path / 'meta', lora, 'someone/tiny-clip', made, name='Ünïcode: "quoted"')
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
