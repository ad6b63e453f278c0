"Advice: what is planted is found, the average is the default, and it says what it lacks."

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lora_recycle as lr
from lora_recycle.method.chain import Chain, Tuned
from lora_recycle.method.lora import average_products
from lora_recycle.suite.images import load_set
from lora_recycle.suite.miniature import load_miniature
from lora_recycle.use.advice import AVERAGE, PLAIN, Trial, pick_lora, rate_advice, score_loras
from lora_recycle.use.advice import synthetic_set

QUICK = dict(hows=(), trial=Trial(n_tasks=40))


@pytest.fixture(scope='module')
def market():
    "Greek LoRAs, and images of letters that none was tuned on"
    backbone = load_miniature()
    letters = load_set('greek', per_class=6).split('val')
    return backbone, Chain(backbone, Tuned(('greek',))).market().lora, letters


def test_a_better_lora_is_found_and_a_worse_one_is_not(market):
    backbone, loras, letters = market
    noise = replace(loras, B=torch.randn(loras.B.shape, generator=torch.Generator().manual_seed(0)))
    labelled = (letters.images, letters.labels)
    good = average_products(loras)
    found = lr.advise(noise, backbone, *labelled, recycled=good, **QUICK)
    assert found.best == 'recycled LoRA' and found.lora is good
    assert 'points above the average' in found.sentence
    found = lr.advise(loras, backbone, *labelled, recycled=average_products(noise), **QUICK)
    assert found.best == AVERAGE and 'nothing is surely above it' in found.sentence
    harm = lr.advise(noise, backbone, *labelled, **QUICK)
    assert harm.best == PLAIN and harm.lora is None


def test_labels_may_be_words_and_inverted_images_need_none(market):
    backbone, loras, letters = market
    words = [f'letter {c}' for c in letters.labels.tolist()]
    by_word = lr.advise(loras, backbone, letters.images, words, **QUICK)
    assert (
        by_word.scores == lr.advise(loras, backbone, letters.images, letters.labels, **QUICK).scores
    )
    held = letters.images[:30].view(1, 5, 6, *letters.images.shape[1:])
    recycled = SimpleNamespace(held=held, lora=average_products(loras))
    found = lr.advise(loras, backbone, recycled=recycled, **QUICK)
    gains = {s['method']: s['gain'] for s in found.scores}
    assert gains['recycled LoRA'] == 0 and 'inverted' in found.sentence
    both = 'average and half of the recycled LoRA'  # here the average, half as long again
    assert found.best in (AVERAGE, both), 'an equal one is not above'


def test_half_of_the_recycled_lora_is_tried_on_top_of_the_average(market):
    backbone, loras, letters = market
    meta = loras[0]
    found = lr.advise(loras, backbone, letters.images, letters.labels, recycled=meta, **QUICK)
    both = found.loras['average and half of the recycled LoRA']
    wanted = (loras.A @ loras.B).mean(0) + 0.5 * meta.A @ meta.B
    torch.testing.assert_close(both.A @ both.B, wanted)
    other = lr.LoRA(meta.A, meta.B, targets=('k', 'v'))
    found = lr.advise(loras, backbone, letters.images, letters.labels, recycled=other, **QUICK)
    assert list(found.loras)[-1] == 'recycled LoRA', 'other products cannot be added'


def test_merges_are_tried_at_their_best_scale(market):
    backbone, loras, letters = market
    found = lr.advise(loras, backbone, letters.images, letters.labels, hows=('average', 'iso-c'))
    assert [s['method'] for s in found.scores[2:]] == ['merge average', 'merge iso-c']
    assert found.scores == score_loras(backbone, found.loras, judged(letters))


def judged(letters):
    held = torch.stack([letters.images[letters.labels == c] for c in letters.labels.unique()])
    return replace(synthetic_set(held[None]), name='labelled images')


def test_intervals_are_of_differences(market):
    backbone, loras, letters = market
    pair = {PLAIN: None, AVERAGE: average_products(loras)}
    line = score_loras(backbone, pair, judged(letters), Trial(n_tasks=100))[0]
    assert line['gain95'] < line['ci95'], 'paired by task'


def line(name, gain, half):
    return dict(
        method=name, gain=gain, gain95=half, accuracy=70.0, n_tasks=9, way=5, shot=1, set='x'
    )


def test_the_rule():
    base = line(AVERAGE, 0.0, 0.0)
    assert pick_lora([base, line('a', 1.0, 1.1), line(PLAIN, -5.0, 1.0)])[0] == AVERAGE
    assert pick_lora([base, line('a', 1.0, 0.9), line('b', 2.0, 0.9)])[0] == 'b'
    rated = rate_advice([base, line('a', 1.0, 0.5)], {AVERAGE: 71.0, 'a': 70.5})
    assert rated == dict(advised='a', best=AVERAGE, lost=0.5)


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(), 'nothing to judge by'),
        (dict(images=torch.zeros(4, 3, 36, 36, dtype=torch.uint8)), 'must be inverted ones'),
        (dict(images=torch.zeros(4, 3, 36, 36), labels=[0, 1]), '4 images but 2 labels'),
        (dict(images=torch.zeros(3, 3, 36, 36), labels=[0, 1, 1]), 'a class has 1 images'),
    ],
)
def test_refusals(market, given, words):
    backbone, loras, _ = market
    with pytest.raises(ValueError, match=words):
        lr.advise(loras, backbone, **given)
