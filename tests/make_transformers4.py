"""Writes tests/transformers4.zip: small models as transformers 4 saves them, LoRAs that peft put on
them, and the features that both compute. In an environment of its own:

    pip install "transformers==4.57.6" "peft==0.21.2" && python tests/make_transformers4.py
"""

import json
import tempfile
import zipfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

SIZES = dict(
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=12,
    patch_size=6,
)
RATIO = {k: v for k, v in SIZES.items() if k != 'intermediate_size'} | dict(mlp_ratio=3)
CLIP = [f'{c}_proj' for c in ('q', 'k', 'v', 'out')], ['fc1', 'fc2']
VIT = ['query', 'key', 'value', 'attention.output.dense'], ['intermediate.dense', '1.output.dense']
DINO = ['query', 'key', 'value', 'output.dense'], ['fc1', 'fc2']
DINO3 = [f'{c}_proj' for c in 'qkvo'], ['up_proj', 'down_proj']
# class -> settings beside the sizes, modules of attention and perceptron, its feature
CLASSES = dict(
    CLIPVisionModelWithProjection=(SIZES | dict(projection_dim=10), CLIP, 'image_embeds'),
    CLIPVisionModel=(SIZES, CLIP, 'pooler_output'),
    CLIPVisionTransformer=(SIZES, CLIP, 'pooler_output'),  # a part of CLIPVisionModel
    SiglipVisionModel=(SIZES, CLIP, 'pooler_output'),
    ViTModel=(SIZES, VIT, 'last_hidden_state'),
    Dinov2Model=(RATIO, DINO, 'last_hidden_state'),
    Dinov2WithRegistersModel=(RATIO | dict(num_register_tokens=2), DINO, 'last_hidden_state'),
    DINOv3ViTModel=(SIZES | dict(num_register_tokens=2), DINO3, 'last_hidden_state'),
)
POOL = ['head.attention.out_proj', 'head.mlp.fc1', 'head.mlp.fc2']


def fill(model, like, scale):
    "`model` with random numbers in the weights whose name holds `like`."
    gen = torch.Generator().manual_seed(len(like))
    for name, weight in model.named_parameters():
        if like in name:
            weight.data = torch.randn(weight.shape, generator=gen) * scale
    return model.eval()


def make(name):
    "A small model of the class, or of the one that has it as a part."
    sizes, _, _ = CLASSES[name]
    kind = getattr(transformers, name.replace('Transformer', 'Model'))
    more = dict(add_pooling_layer=False) if name == 'ViTModel' else {}
    return fill(kind(kind.config_class(**sizes), **more), '', 0.3)


def tuned(name, model):
    "What peft is given: the model, or its part."
    return model.vision_model if name == 'CLIPVisionTransformer' else model


@torch.no_grad()
def feature(model, name, x):
    "What the class gives for images."
    found = getattr(model(pixel_values=x), CLASSES[name][2])
    return found[:, 0] if found.ndim == 3 else found


def write_class(folder, name):
    "Model, two adapters, images and features of a class."
    _, (attention, perceptron), _ = CLASSES[name]
    if name == 'ViTModel':  # `output.dense` alone would be both
        attention, perceptron = attention, ['intermediate.dense', r'0.output.dense', '1.output.dense']
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    make(name).save_pretrained(folder / 'model')
    kinds = dict(
        attention=dict(target_modules=attention, r=16, use_rslora=True),
        all=dict(target_modules=attention + perceptron, rank_pattern={attention[0]: 5}),
    )
    tensors = dict(x=x, plain=feature(tuned(name, make(name)), name, x))
    for kind, settings in kinds.items():
        exclude = POOL if name == 'SiglipVisionModel' else None
        config = peft.LoraConfig(**dict(r=2, lora_alpha=3, exclude_modules=exclude) | settings)
        adapted = fill(peft.get_peft_model(tuned(name, make(name)), config), '.lora_', 0.2)
        adapted.save_pretrained(folder / kind / 'adapter')
        tensors[kind] = feature(adapted, name, x)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / 'features.safetensors')


if __name__ == '__main__':
    assert transformers.__version__.startswith('4.'), transformers.__version__
    versions = {m.__name__: m.__version__ for m in (transformers, peft, torch)}
    with tempfile.TemporaryDirectory() as made:
        for name in CLASSES:
            write_class(Path(made) / name, name)
        (Path(made) / 'versions.json').write_text(json.dumps(versions))
        with zipfile.ZipFile(Path(__file__).parent / 'transformers4.zip', 'w') as packed:
            for path in sorted(p for p in Path(made).rglob('*') if p.suffix != '.md'):
                if path.is_file():
                    packed.write(path, path.relative_to(made), zipfile.ZIP_DEFLATED)
    print(versions)
