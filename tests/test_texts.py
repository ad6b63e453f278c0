"LoRAs without heads: the text towers of CLIP and SigLIP as their libraries compute them, and what recycle makes of names."

import json
import os
import warnings
from dataclasses import replace

os.environ['HF_HUB_OFFLINE'] = os.environ['TRANSFORMERS_OFFLINE'] = '1'

import open_clip
import peft
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from lora_recycle.core import generator
from lora_recycle.jobs import Executor
from lora_recycle.method.backbone import encode, from_open_clip
from lora_recycle.method.chain import SETTINGS, Chain, Machine, Named, Recipe
from lora_recycle.method.distill import DistillConfig, Embedder, Task, task_loss
from lora_recycle.method.lora import average_products, new_lora
from lora_recycle.paper.models import MODELS, load_backbone
from lora_recycle.paper.texts import read_text_tower
from lora_recycle.rivals.text import text_logits
from lora_recycle.suite.images import load_set
from lora_recycle.suite.miniature import load_miniature
from lora_recycle.use.exchange import backbone_from_hf, read_market, write_adapter
from lora_recycle.use.names import GivenNamed, check_names, name_heads
from lora_recycle.use.recycling import check_market, recycle

SENTENCES = ['a photo of a fish.', 'a photo of a very long-tailed bird, in the rain.']
HERE = Executor('here')
VISION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=12,
    patch_size=6,
)
WORDS = 'this is a photo of cat dog sea horse'.split()


def fill(module, scale=0.2):
    "`module` with random numbers in every tensor of more than one number."
    gen = generator(0, 'texts')
    for p in module.parameters():
        if p.numel() > 1:
            p.data = scale * torch.randn(p.shape, generator=gen) + 0.7 * (p.ndim == 1)
    return module.eval().requires_grad_(False)


def clip_of_transformers(act='quick_gelu'):
    text = {k: VISION[k] for k in VISION if k not in ('image_size', 'patch_size')}
    text |= dict(vocab_size=49408, eos_token_id=49407, hidden_act=act)
    both = dict(text_config=text, vision_config=VISION | dict(hidden_act=act), projection_dim=10)
    return fill(transformers.CLIPModel(transformers.CLIPConfig(**both)))


def pooled(found):
    "transformers 5 gives an object where 4 gives a tensor."
    return getattr(found, 'pooler_output', found)


def norm(x):
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_the_text_tower_of_a_clip_of_transformers(tmp_path, act):
    model = clip_of_transformers(act)
    model.save_pretrained(tmp_path)
    backbone = backbone_from_hf(tmp_path)
    tower = read_text_tower(backbone)  # from where the backbone was read
    wanted = pooled(model.get_text_features(input_ids=open_clip.SimpleTokenizer()(SENTENCES)))
    torch.testing.assert_close(tower.read(SENTENCES), wanted, atol=1e-5, rtol=1e-5)
    assert tower.scale == pytest.approx(model.logit_scale.exp().item()) and tower.bias == 0
    x = torch.randn(3, 3, 12, 12, generator=generator(1, 'x'))
    names = ['fish', 'sea_horse']
    market = name_heads(new_lora(2, 64, 2, n=1), backbone, [names])
    tokens = open_clip.SimpleTokenizer()(['a photo of a fish.', 'a photo of a sea horse.'])
    wanted = model(input_ids=tokens, pixel_values=x).logits_per_image
    found = text_logits(encode(backbone, x).features, market)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_the_files_of_open_clip_and_openai_hold_the_same_names(tmp_path):
    vision = dict(layers=2, width=64, image_size=12, patch_size=6, head_width=32)
    text = dict(width=64, heads=1, layers=2, vocab_size=49408, context_length=77)
    clip = fill(open_clip.model.CLIP(10, vision_cfg=vision, text_cfg=text, quick_gelu=True))
    backbone = from_open_clip(clip.visual, 'tiny', 'quick_gelu')
    torch.save(clip.state_dict(), tmp_path / 'a.pt')
    found = read_text_tower(backbone, tmp_path / 'a.pt').read(SENTENCES)
    wanted = clip.encode_text(open_clip.SimpleTokenizer()(SENTENCES))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    visual = {k: t for k, t in clip.state_dict().items() if k.startswith('visual.')}
    save_file(visual, tmp_path / 'image.safetensors')
    with pytest.raises(ValueError, match='holds no text tower, the image tower alone'):
        read_text_tower(backbone, tmp_path / 'image.safetensors')
    part = {k: t for k, t in clip.state_dict().items() if 'ln_final' not in k}
    save_file({k: t.clone() for k, t in part.items()}, tmp_path / 'part.safetensors')
    with pytest.raises(ValueError, match='not whole.*ln_final'):
        read_text_tower(backbone, tmp_path / 'part.safetensors')
    narrow = from_open_clip(clip.visual, 'tiny', 'gelu')
    narrow = replace(narrow, weights=narrow.weights | dict(proj=torch.randn(64, 12)))
    with pytest.raises(ValueError, match='10 numbers, the images of tiny 12'):
        read_text_tower(narrow, tmp_path / 'a.pt')


def write_words(folder, second=False):
    "A tokenizer.json of few words: like T5's for SigLIP, with Gemma's signs for SigLIP 2."
    signs = ['<pad>', '<eos>', '<bos>', '<unk>'] if second else ['<pad>', '</s>', '<unk>']
    vocabulary = {w: i for i, w in enumerate(signs + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / 'tokenizer.json'))
    return words


@pytest.fixture
def siglip(monkeypatch):
    "SigLIP of transformers, small; and the table of models with its size."
    text = {k: VISION[k] for k in VISION if k not in ('image_size', 'patch_size')}
    text |= dict(vocab_size=16, max_position_embeddings=8, projection_size=64)
    both = dict(vision_config=VISION, text_config=text)
    for name in ('SigLIP-B-16', 'SigLIP2-B-16'):
        size = dict(width=64, layers=2, heads=1, out_dim=64, side=12, patch=6, mlp_ratio=1.5)
        shape = replace(MODELS[name].shape, **size)
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], shape=shape))
    return fill(transformers.SiglipModel(transformers.SiglipConfig(**both)))


@pytest.mark.parametrize('name', ['SigLIP-B-16', 'SigLIP2-B-16'])
def test_siglip_by_names_gives_the_logits_of_transformers(siglip, tmp_path, name):
    "Attention pooling, the bias and the scale of the sigmoid, 64 tokens (8 here) without a mask."
    siglip.logit_scale.data.fill_(1.5)
    siglip.logit_bias.data.fill_(-3.0)
    siglip.save_pretrained(tmp_path)
    second = name == 'SigLIP2-B-16'
    write_words(tmp_path, second)
    backbone = load_backbone(name, tmp_path)
    names = ['Cat', 'sea_horse']
    market = name_heads(new_lora(2, 64, 2, n=1), backbone, [names])
    tower = read_text_tower(backbone)
    assert tower.bias == -3.0 and torch.allclose(market.b, torch.full((1, 2), -3.0))
    ids = tower.tokens([tower.prompt.format(n.replace('_', ' ')) for n in names])
    words = ['<pad>', '<eos>', '<bos>', '<unk>'] if second else ['<pad>', '</s>', '<unk>']
    words += WORDS
    read = [[words[i] for i in row] for row in ids.tolist()]
    if second:  # the full stop stays, and is no word of these few
        assert read[0] == 'this is a photo of cat <unk> <eos>'.split()
    else:
        assert read[0] == 'this is a photo of cat </s> </s>'.split()
    assert len(read[1]) == 8 and read[1][-1] == ('<eos>' if second else '</s>')
    x = torch.randn(3, 3, 12, 12, generator=generator(1, 'x'))
    wanted = siglip(input_ids=ids, pixel_values=x).logits_per_image
    found = text_logits(encode(backbone, x).features, market)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_siglip_in_the_names_of_open_clip(siglip, tmp_path):
    "Its text tower is open_clip's own, with the exact GELU for SigLIP."
    from functools import partial

    siglip.save_pretrained(tmp_path)
    write_words(tmp_path)
    backbone = load_backbone('SigLIP-B-16', tmp_path)
    sizes = dict(context_length=8, vocab_size=16, width=64, heads=1, layers=2, mlp_ratio=1.5)
    how = dict(no_causal_mask=True, pool_type='last', proj_bias=True, output_dim=64)
    norms = partial(torch.nn.LayerNorm, eps=1e-6)
    text = fill(open_clip.transformer.TextTransformer(**sizes, **how, norm_layer=norms))
    named = {f'text.{k}': t.clone() for k, t in text.state_dict().items()}
    save_file(named | {'logit_bias': torch.tensor([-9.0])}, tmp_path / 'open.safetensors')
    tower = read_text_tower(backbone, tmp_path / 'open.safetensors')
    ids = tower.tokens(['a photo of a dog'])
    torch.testing.assert_close(tower.net(ids), text(ids), atol=1e-5, rtol=1e-5)
    assert tower.bias == -9.0


def test_the_words_of_siglip_are_asked_for_by_name(siglip, tmp_path):
    siglip.save_pretrained(tmp_path)
    backbone = load_backbone('SigLIP-B-16', tmp_path)
    with pytest.raises(FileNotFoundError, match='tokenizer.json is missing.*google/siglip-base'):
        read_text_tower(backbone)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match='no file of words'):
        read_text_tower(backbone)
    few = {w: i for i, w in enumerate('a b c d e f g h i j k l m n o p q r'.split())}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(few, unk_token='a'))
    words.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match='18 words, the text tower 16'):
        read_text_tower(backbone)
    few = dict(list(few.items())[:9])
    tokenizers.Tokenizer(tokenizers.models.WordLevel(few, unk_token='a')).save(
        str(tmp_path / 'tokenizer.json')
    )
    with pytest.raises(ValueError, match='neither </s> nor <eos>'):
        read_text_tower(backbone).read(['a'])


# ---- from a folder without heads to a meta-LoRA


@pytest.fixture(scope='module')
def backbone():
    return load_miniature()


@pytest.fixture(scope='module')
def bare(backbone, tmp_path_factory):
    "A folder of two adapters that were tuned by class names, and the names."
    chain = Chain(backbone, Named(('greek',)), SETTINGS['smoke'], machine=Machine(executor=HERE))
    market = chain.market(Recipe(n_loras=2))
    folder = tmp_path_factory.mktemp('bare')
    for m in range(2):
        write_adapter(folder / f'l{m}', replace(market.lora[m], W=None, b=None), 'tiny')
    greek = load_set('greek')
    return folder, [[greek.classes[c] for c in own] for own in market.classes.tolist()]


def test_a_folder_without_heads_is_recycled_by_names(bare, backbone, tmp_path):
    folder, names = bare
    with pytest.raises(ValueError, match="no head; head='drop'.*names="):
        read_market(folder, backbone)
    market, _ = read_market(folder, backbone, head='drop')
    assert average_products(market).size is None
    with pytest.raises(ValueError, match=r'\(1\).*no, .*\(2\).*yes, miniature.*\(3\).*yes'):
        recycle(backbone, market)
    quick = dict(settings='smoke', n_tasks=5, executor=HERE, names=names)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        made = recycle(backbone, market, cache_dir=str(tmp_path), **quick)
        again = recycle(backbone, market, cache_dir=str(tmp_path), **quick)
    assert torch.equal(made.lora.B, again.lora.B)
    assert torch.tensor(made.report['teacher_accuracy']).mean() > 0.3  # chance is 0.2
    assert made.images.shape[:2] == (2, 5) and made.report['market']['classes'] == 5
    assert made.lora.W is None and check_market(name_heads(market, backbone, names), backbone)


def test_teachers_by_name_see_features_of_length_1(bare, backbone):
    "The length of a feature is nothing to a teacher by names, and much to a tuned head."
    folder, names = bare
    market = name_heads(read_market(folder, backbone, head='drop')[0], backbone, names)
    longer = replace(backbone, weights=backbone.weights | dict(proj=4 * backbone.weights['proj']))
    x = torch.randn(2, 5, 3, 3, 36, 36, generator=generator(0, 'length'))
    m = torch.arange(2)[:, None].expand(-1, 5)
    task = Task(x, False, m, torch.arange(5).expand(2, -1))
    losses = [
        loss_of(Embedder(backbone), Embedder(b, market), task, DistillConfig())[0]
        for loss_of in (GivenNamed.loss_of, task_loss)
        for b in (backbone, longer)
    ]
    assert losses[0] == losses[1] and losses[2] != losses[3] and losses[0] != losses[2]
    logits = [
        GivenNamed.classify(encode(b, x[:, :, 0].flatten(0, 1), market).features, market)
        for b in (backbone, longer)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    'names, says',
    [
        ([['a', 'b']], '1 lists for 2 LoRAs'),
        ([['a', 'b'], ['a', 'b', 'c']], r'\[2, 3\] names.*own\[:2\]'),
        ([['a'], ['b']], '2 or more'),
        (['ab', 'cd'], '2 or more'),
        ([['a', 'a'], ['b', 'c']], r'names\[0\] must hold different'),
        ([['a', 'b'], ['b', ' ']], r'names\[1\]'),
        ([['a', 'b'], ['b', 3]], r'names\[1\]'),
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_said(names, says):
    with pytest.raises(ValueError, match=says):
        check_names(names, 2)


def test_what_cannot_be_done_by_names_is_said_before_any_work(bare, backbone):
    folder, names = bare
    market, _ = read_market(folder, backbone, head='drop')
    config = DistillConfig(steps=1, distance='head', mix=0.0)
    with pytest.raises(ValueError, match="distance='head'"):
        recycle(backbone, market, names=names, distill_config=config)
    dino = replace(backbone, name='DINOv2-S')
    with pytest.raises(ValueError, match='DINOv2-S was trained without text'):
        recycle(dino, market, names=names)
    with pytest.raises(ValueError, match=r'\(2\).*no, DINOv2-S was trained without text.*\(3\)'):
        recycle(dino, market)
    unknown = replace(backbone, name='somebodys')
    with pytest.raises(ValueError, match='not known where somebodys came from.*texts='):
        recycle(unknown, market, names=names)


def test_where_a_backbone_came_from_is_no_part_of_its_digest(backbone):
    moved = replace(backbone, origin='elsewhere')
    assert moved.digest == backbone.digest and 'elsewhere' not in repr(moved)


def test_a_market_as_knots_publishes_it(tmp_path):
    "Rank 16 on q, k, v and out of CLIPVisionModel, no heads, a whole CLIP beside: all three ways."
    model = clip_of_transformers()
    model.save_pretrained(tmp_path / 'clip')
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / 'clip')
    targets = ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=targets)
    adapted = fill(peft.get_peft_model(tower, config), 0.05)
    for task in ('dtd', 'svhn'):
        adapted.save_pretrained(tmp_path / 'market' / f'KnOTS-ViT-B-32_lora_R16_{task}')
    backbone = backbone_from_hf(tmp_path / 'clip')
    market, report = read_market(tmp_path / 'market', backbone, head='drop')
    assert market.targets == ('q', 'k', 'v', 'out') and market.rank == 16
    assert json.loads((tmp_path / 'market' / report[0].name / 'adapter_config.json').read_text())
    quick = dict(settings='smoke', n_tasks=3, executor=HERE)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        made = recycle(backbone, market, names=[['dots', 'zigzag'], ['one', 'two']], **quick)
    assert made.report['market']['classes'] == 2 and made.lora.targets == market.targets


def test_without_open_clip_the_other_ways_are_named(backbone, monkeypatch):
    monkeypatch.setattr('lora_recycle.paper.texts.find_spec', lambda name: None)
    bare = new_lora(4, 128, 2, n=2)
    with pytest.raises(ValueError, match=r'no, class names are read by way of: pip.*\(3\)'):
        recycle(backbone, bare)


@pytest.mark.parametrize('words', [True, False])
def test_the_words_of_siglip_come_with_its_weights(siglip, tmp_path, monkeypatch, words):
    "Asked for on the hub, where the weights are; without them the image tower is read all the same."
    siglip.save_pretrained(tmp_path)
    if words:
        write_words(tmp_path)

    def fetch(repository, file):
        assert repository == 'google/siglip-base-patch16-224'
        if not (tmp_path / file).is_file():
            raise OSError('404')
        return str(tmp_path / file)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fetch)
    backbone = load_backbone('SigLIP-B-16', 'download')
    if words:
        assert read_text_tower(backbone).read(['a cat']).shape == (1, 64)
    else:
        with pytest.raises(FileNotFoundError, match='tokenizer.json is missing'):
            read_text_tower(backbone)
