"Recycling resumes, heeds its seed and says what it lacks; a meta-LoRA is shared whole or refused."

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import SIDE, noise, tiny, tiny_market

from lora_recycle.jobs import Executor
from lora_recycle.method.backbone import normalise
from lora_recycle.method.chain import SETTINGS, Chain, Tuned, load_priors
from lora_recycle.use.classifier import FewShotClassifier
from lora_recycle.use.recycling import (
    _choose_settings,
    inversion_terms,
    load_meta_lora,
    recycle,
    recycled_figure,
    save_meta_lora,
)
from lora_recycle.core import digest
from lora_recycle.use.advice import Trial, synthetic_scores
from lora_recycle.method.distill import DistillConfig
from lora_recycle.suite.miniature import load_miniature
from lora_recycle.use.exchange import Limits, read_adapter
from lora_recycle.method.inversion import InvertConfig, bn_gaps
from lora_recycle.method.lora import LoRA, average_products, new_lora, stack_loras

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(
    invert_config=InvertConfig(steps=2, per_class=4, alpha_bn=0.0),
    distill_config=DistillConfig(steps=3, n_query=2, rank=2, cycle=3, warmup=1),
    n_tasks=5,
    executor=Executor('here'),
)


@pytest.fixture(scope='module')
def backbone():
    return tiny()


@pytest.fixture(scope='module')
def recycled(backbone):
    return recycle(backbone, tiny_market(3), **QUICK)


# recycling


def test_recycled_parts_fit(backbone, recycled):
    r = recycled
    assert (
        r.lora.rank == 2
        and r.lora.size is None
        and r.images.shape == (3, 5, 4, 3, SIDE, SIDE)
        and r.held.shape == (3, 5, 4, 3, SIDE, SIDE)
        and r.curve.shape == (3, 4)
    )
    assert r.images.dtype == torch.uint8 and len(r.report['teacher_accuracy']) == 3
    assert [s['method'] for s in r.report['scores']] == [
        'plain backbone',
        'average of the LoRAs',
        'meta-LoRA',
    ]
    assert r.report['advice'].startswith('Take the ')
    assert json.loads(json.dumps(r.report)) == r.report
    assert len(recycled_figure(r).axes) == 3


def test_recycling_repeats_itself_and_heeds_the_seed(backbone, recycled):
    again, other = (
        recycle(backbone, tiny_market(3), **QUICK),
        recycle(backbone, tiny_market(3), seed=1, **QUICK),
    )
    assert digest(again.lora.tensors(), again.images, again.report['scores']) == digest(
        recycled.lora.tensors(), recycled.images, recycled.report['scores']
    )
    assert digest(other.images) != digest(recycled.images)


def test_held_out_images_are_not_trained_on(backbone, recycled, monkeypatch):
    import lora_recycle.method.chain as module

    seen, real = [], module.distill
    monkeypatch.setattr(
        module,
        'distill',
        lambda b, m, pool, *rest: (seen.append(pool), real(b, m, pool, *rest))[1],
    )
    again = recycle(backbone, tiny_market(3), **QUICK)
    assert torch.equal(seen[0].images, again.images)
    trained = {digest(i) for i in again.images.flatten(0, 2)}
    assert not trained & {digest(i) for i in again.held.flatten(0, 2)}


def test_a_stopped_run_goes_on(backbone, recycled, tmp_path, monkeypatch):
    import lora_recycle.method.chain as module

    calls, real = [], module.invert

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, 'invert', stopping)
    run = lambda: recycle(backbone, tiny_market(3), cache_dir=tmp_path, chunk=1, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = run()
    assert len(calls) == 7  # two done, one stopped, this one again, three held out
    monkeypatch.setattr(module, 'distill', None)
    assert digest(run().lora.tensors()) == digest(first.lora.tensors()) and len(calls) == 7
    monkeypatch.undo()
    assert digest(recycle(backbone, tiny_market(3), chunk=1, **QUICK).lora.tensors()) == digest(
        first.lora.tensors()
    )  # and as without a cache


def test_statistics_that_lack_are_done_without_and_it_is_said(backbone):
    with pytest.warns(UserWarning) as said:
        config, prior, stats, notes = inversion_terms(backbone, InvertConfig(alpha_tokens=1.0))
    assert (config.alpha_bn, config.alpha_tokens, stats) == (InvertConfig().alpha_bn, 0.0, None)
    assert len(bn_gaps(prior, torch.rand(2, 3, SIDE, SIDE))) == 52
    words = [str(w.message) for w in said if w.category is UserWarning]
    assert 'pass stats=' in notes[0] and words == notes
    own = torch.ones(2, 2, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        config, _, stats, notes = inversion_terms(
            backbone, InvertConfig(alpha_bn=0.0, alpha_tokens=1.0), stats=own
        )
    assert config.alpha_tokens == 1.0 and stats is own and not notes
    with pytest.raises(ValueError, match='do not fit'):
        inversion_terms(backbone, InvertConfig(), stats=own[:1])


def test_heads_of_fewer_classes_and_five_shots(backbone):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = recycle(
            backbone,
            tiny_market(2, ways=3),
            settings='smoke',
            shot=5,
            n_tasks=3,
            executor=Executor('here'),
        )
    assert found.report['distill']['way'] == 3 and found.report['distill']['shot'] == 5
    assert len(found.report['notes']) == 2 and 'drawn letters' in found.report['notes'][1]


@pytest.mark.parametrize('name', ['miniature', 'miniature-12', 'miniature-photo'])
def test_recycle_takes_the_settings_and_the_prior_of_the_tables(name):
    "What `recycle` does without `settings` is what the tables measured with this backbone."
    backbone = load_miniature(name)
    settings, notes = _choose_settings(backbone, None)
    assert settings == SETTINGS['photos' if name == 'miniature-photo' else 'embedded']
    assert not notes
    config, network, stats, notes = inversion_terms(backbone, settings.invert)
    assert config == settings.invert and not notes
    of_tables = load_priors(Chain(backbone, Tuned(('greek',)), settings))
    x = normalise(noise(2, 64), backbone)
    assert torch.equal(bn_gaps(network, x), bn_gaps(of_tables.network, x))
    assert (stats is None) == (of_tables.token_stats is None)
    assert stats is None or torch.equal(stats, of_tables.token_stats)


def test_recycle_from_the_average(backbone):
    found = recycle(backbone, tiny_market(2), start='average', **QUICK)
    assert found.report['distill']['start'] == 'average'
    zero = recycle(backbone, tiny_market(2), **QUICK)
    assert zero.report['distill']['start'] == 'zero'
    assert not torch.equal(found.lora.B, zero.lora.B)
    with pytest.raises(ValueError, match='start'):
        recycle(backbone, tiny_market(2), start='one', **QUICK)


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(market=tiny_market(2)[0]), 'single LoRA'),
        (dict(market=LoRA(*vars(average_products(tiny_market(2))).values())), 'single LoRA'),
        (dict(market='x'), 'not LoRAs'),
        (dict(market=stack_loras([new_lora(2, 16)] * 2)), 'no heads'),
        (dict(market=tiny_market(2).map(lambda t: t * float('nan'))), 'NaN'),
        (dict(market=replace(tiny_market(2), W=torch.zeros(2, 9, 5))), 'heads'),
        (dict(settings='huge'), 'settings'),
        (dict(shot=0), 'shot'),
        (dict(chunk=0), 'chunk'),
        (dict(held_out=1), 'held_out'),
        (dict(invert_config=InvertConfig(steps=1, per_class=1)), 'per_class'),
        (dict(seed=-1), 'seed'),
        (dict(distill_config=DistillConfig(way=6, steps=1)), 'way=6|per_class'),
    ],
)
def test_bad_requests_are_refused_early(backbone, change, says):
    with pytest.raises(ValueError, match=says):
        recycle(backbone, **(dict(market=tiny_market(2)) | QUICK | change))


def test_synthetic_scores_find_what_is_planted(backbone):
    images = noise(5)[None, :, None].expand(
        1, 5, 6, 3, SIDE, SIDE
    )  # every image of a class is the same
    assert (
        synthetic_scores(backbone, {'plain': None}, images, Trial(n_tasks=3))[0]['accuracy'] == 100
    )
    blank = synthetic_scores(
        backbone,
        {'plain': None},
        torch.zeros(1, 5, 6, 3, SIDE, SIDE, dtype=torch.uint8),
        Trial(n_tasks=10),
    )[0]
    assert abs(blank['accuracy'] - 20) < 10


# sharing


def test_meta_lora_is_shared_whole(backbone, recycled, tmp_path):
    meta = save_meta_lora(tmp_path / 'meta', recycled, 'someone/tiny-clip', 'tiny meta', 'mit')
    lora, found = load_meta_lora(tmp_path / 'meta', backbone)
    assert digest(lora.tensors()) == digest(recycled.lora.tensors()) and found == meta
    assert found['market']['digest'] == digest(tiny_market(3).tensors())
    kind = dict(width=backbone.width, model='CLIPVisionModelWithProjection')
    assert found['backbone'] == dict(name='tiny', digest=backbone.digest, **kind)
    assert (
        found['invert']['steps'] == 2
        and found['distill']['rank'] == 2
        and found['environment']['versions']['torch']
        and len(found['scores']) == 3
    )
    assert torch.equal(
        read_adapter(tmp_path / 'meta', 2, 16).lora.A, lora.A
    )  # and any reader of PEFT adapters
    assert not list(tmp_path.glob('.tmp*'))
    with pytest.raises(ValueError, match='not empty'):
        save_meta_lora(tmp_path / 'meta', recycled)
    with pytest.raises(ValueError, match='was made for'):
        load_meta_lora(tmp_path / 'meta', tiny(2))


def test_the_card_has_what_hubs_read(recycled, tmp_path):
    yaml = pytest.importorskip('yaml')
    save_meta_lora(tmp_path / 'meta', recycled, 'someone/tiny-clip', licence='mit')
    page = (tmp_path / 'meta/README.md').read_text()
    front = yaml.safe_load(re.match(r'---\n(.*?)\n---\n', page, re.DOTALL)[1])
    assert (
        front['base_model'] == 'someone/tiny-clip'
        and front['library_name'] == 'peft'
        and front['license'] == 'mit'
    )
    result = front['model-index'][0]['results'][0]
    assert (
        result['metrics'][0]['value'] == recycled.report['scores'][2]['accuracy']
        and 'inverted' in result['dataset']['name']
    )
    assert (
        recycled.report['market']['digest'] in page
        and 'no estimate of the accuracy on photos' in page
    )


def test_damaged_meta_loras_are_refused(backbone, recycled, tmp_path):
    folder = tmp_path / 'meta'
    save_meta_lora(folder, recycled)
    gen = np.random.default_rng(0)
    for name in ('adapter_model.safetensors', 'adapter_config.json'):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            at = int(gen.integers(len(whole)))
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError):
                load_meta_lora(folder, backbone)
        (folder / name).write_bytes(whole)
    found = json.loads((folder / 'meta.json').read_text())
    for change in (dict(format=1), dict(files={}), dict(files=None), dict(backbone='x')):
        (folder / 'meta.json').write_text(json.dumps(found | change))
        with pytest.raises(ValueError):
            load_meta_lora(folder, backbone)
    (folder / 'meta.json').unlink()
    with pytest.raises(FileNotFoundError):
        load_meta_lora(folder, backbone)


def test_a_failed_save_leaves_nothing(recycled, tmp_path):
    with pytest.raises(ValueError):
        save_meta_lora(tmp_path / 'meta', recycled, 'two\nlines')
    assert not list(tmp_path.iterdir())


def test_ten_lines_of_the_readme(tmp_path):
    "The block runs as it stands, in a folder without the repository, and names most of the digits"
    page = (ROOT / 'README.md').read_text(encoding='utf-8')
    block = next(
        (
            b
            for b in re.findall(r'```python\n(.*?)```', page, re.DOTALL)
            if 'FewShotClassifier' in b
        ),
        None,
    )
    if block is None:
        pytest.skip('README.md has no such block yet')
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, '-c', block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr
    named = [int(n) for n in re.findall(r'\d', done.stdout)]
    assert len(named) == 10 and sum(a == b for a, b in zip(named, range(10))) >= 5, done.stdout


def test_links_can_be_followed_where_a_folder_is_loaded(backbone, recycled, tmp_path):
    "Of the hub's cache always, others when asked for."
    FewShotClassifier(backbone).fit(noise(2), [0, 1]).save(tmp_path / 'model')
    save_meta_lora(tmp_path / 'meta', recycled)
    loads = {'model': FewShotClassifier.load, 'meta': load_meta_lora}
    for name, load in loads.items():
        linked = tmp_path / f'linked {name}'
        linked.mkdir()
        for path in (tmp_path / name).iterdir():
            (linked / path.name).symlink_to(path)
        with pytest.raises(ValueError, match=r'is a link.*limits=Limits\(links=True\)'):
            load(linked, backbone)
        load(linked, backbone, limits=Limits(links=True))
        repository = tmp_path / f'models--ann--{name}'
        snapshot = repository / 'snapshots' / 'abc'
        snapshot.mkdir(parents=True)
        (repository / 'blobs').mkdir()
        for i, path in enumerate((tmp_path / name).iterdir()):
            shutil.copy(path, repository / 'blobs' / f'{i:040d}')
            (snapshot / path.name).symlink_to(f'../../blobs/{i:040d}')
        load(snapshot, backbone)
