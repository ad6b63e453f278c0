"""Recycle a market of LoRAs into one: the names that most people need, loaded when asked for."""

__version__ = "0.1.0"

from importlib import import_module

_DOOR = {
    'LoRA': 'method.lora.LoRA',
    'load_backbone': 'paper.models.load_backbone',
    'load_set': 'suite.images.load_set',
    'read_market': 'use.exchange.read_market',
    'average': 'method.lora.average_products',
    'add': 'method.lora.add_products',
    'merge': 'rivals.merge.merge',
    'advise': 'use.advice.advise',
    'recycle': 'use.recycling.recycle',
    'FewShotClassifier': 'use.classifier.FewShotClassifier',
    'compare': 'use.classifier.compare_loras',
}
__all__ = list(_DOOR)


def __getattr__(name: str):
    "The object behind `name`: its module is imported now, once."
    if name not in _DOOR:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, _, attribute = _DOOR[name].rpartition('.')
    globals()[name] = getattr(import_module(f'{__name__}.{module}'), attribute)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *_DOOR})
