"A backbone of random weights that runs in a blink, LoRAs with heads for it, images of noise."

import torch

from lora_recycle.core import generator
from lora_recycle.method.backbone import Backbone
from lora_recycle.method.lora import LoRA
from lora_recycle.use.exchange import hf_names

SIDE = 8


def tiny(seed=0, name='tiny'):
    "A backbone with random weights: 2 layers, width 16, 4 patches of images of 8 pixels, features of 12"
    gen, D = generator(seed, 'tiny'), 16
    shapes = {
        'class_embedding': (D,),
        'conv1.weight': (D, 3, 4, 4),
        'positional_embedding': (5, D),
        'proj': (D, 12),
    }

    def shape(key):
        if key in shapes:
            return shapes[key]
        if 'in_proj' in key:
            return (3 * D, D) if key.endswith('weight') else (3 * D,)
        if 'c_fc' in key:
            return (4 * D, D) if key.endswith('weight') else (4 * D,)
        if 'c_proj' in key:
            return (D, 4 * D) if key.endswith('weight') else (D,)
        return (D, D) if 'out_proj.weight' in key else (D,)

    return Backbone(
        name, {k: torch.randn(shape(k), generator=gen) * 0.3 for k in hf_names(2)}, heads=2, patch=4
    )


def tiny_market(n, ways=5, seed=0):
    gen = generator(seed, 'tiny market')
    return LoRA(
        torch.randn(n, 2, 2, 16, 3, generator=gen) * 0.2,
        torch.randn(n, 2, 2, 3, 16, generator=gen) * 0.2,
        torch.randn(n, 12, ways, generator=gen),
        torch.zeros(n, ways),
    )


def noise(n, side=SIDE, seed=0):
    return torch.randint(256, (n, 3, side, side), generator=generator(seed, 'noise', n, side)).to(
        torch.uint8
    )
