"""The page answers as FewShotClassifier does, says what is wrong in one sentence, lets nobody else in, and works in headless Chromium without a network.

The browser tests need chromium on the path and the package playwright, and are skipped, with the reason, where either is missing.
`python tests/test_page.py` makes the screenshot nbs/2_use/images/page.png."""

import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from lora_recycle.use import page as page_module
from lora_recycle.method.backbone import encode, normalise
from lora_recycle.use.classifier import FewShotClassifier
from lora_recycle.use.recycling import recycle, save_meta_lora
from lora_recycle.core import generator
from lora_recycle.use.exchange import read_market
from lora_recycle.method.lora import new_lora
from lora_recycle.use.page import (
    MOST,
    classify,
    decode_image,
    example,
    image_url,
    kept_patches,
    launch,
    make_page,
    make_server,
    page_files,
    read_request,
    respond,
)

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
MISSING = (
    'no chromium on the path'
    if CHROMIUM is None
    else 'the package playwright is not installed'
    if importlib.util.find_spec('playwright') is None
    else None
)


@pytest.fixture(scope='module')
def page():
    return make_page('miniature')


@pytest.fixture(scope='module')
def sent():
    return example('digits', n_query=1)


def data_of(image, kind='PNG', **options):
    "A PIL image as the browser sends its file"
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}'


def said(page, request):
    "The message with which the page refuses `request`"
    status, kind, content = respond(page, 'POST', '/classify', json.dumps(request).encode())
    assert (status, kind) == (400, 'application/json'), content[:200]
    return json.loads(content)['error']


def test_it_answers_as_the_classifier_does(page, sent):
    for with_lora in (True, False):
        asked = read_request(sent | dict(lora=with_lora), page.backbone.side)
        answer = classify(page, asked)
        model = FewShotClassifier(
            page.backbone, page.lora if with_lora else None, page.temperature
        ).fit(asked.support, asked.labels)
        found = np.array([p['probabilities'] for p in answer['predictions']])
        np.testing.assert_allclose(found, model.predict_proba(asked.queries), atol=1e-5)
        assert [p['label'] for p in answer['predictions']] == [
            asked.names[i] for i in model.predict(asked.queries)
        ]
    assert 'LoRAs' not in answer['about']


def test_a_support_image_is_its_own_nearest_and_the_numbers_fit(page, sent):
    "Classes of 1, 2 and 3 images; every support image asked again"
    supports = [sent['supports'][c][: c + 1] for c in range(3)]
    asked = read_request(
        dict(sent, names=['a', 'b', 'c'], supports=supports, queries=sum(supports, [])),
        page.backbone.side,
    )
    answer = classify(page, asked)
    assert [tuple(p['nearest'][0]) for p in answer['predictions']] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert [len(s) for s in answer['supports']] == [1, 2, 3]
    for p in answer['predictions']:
        c, i = p['nearest'][0]
        assert p['seen'] == answer['supports'][c][i]
        assert len({tuple(place) for place in p['nearest']}) == 3
    model = FewShotClassifier(page.backbone, page.lora).fit(asked.support, asked.labels)
    features = FewShotClassifier(page.backbone, page.lora).fit(asked.support, range(6)).prototypes_
    for c, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, 6))):
        away = np.square(features[rows] - model.prototypes_[c]).sum(1)
        assert away[answer['central'][c]] <= away.min() + 1e-3, 'of two images both are as near'


def test_kept_patches_are_the_most_attended(page, sent):
    images = read_request(sent, page.backbone.side).queries
    for share in (0.0, 0.3, 0.95):
        shown, kept = kept_patches(page.backbone, page.lora, images, share)
        assert kept.shape[1] == 36 - int(36 * share)
        patches = lambda x: (
            x.unfold(2, 6, 6).unfold(3, 6, 6).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        )
        stays = torch.zeros(len(images), 36, dtype=torch.bool).scatter(1, kept, True)
        assert (
            torch.equal(patches(shown[:, :3])[stays], patches(images)[stays])
            and patches(shown[:, 3:])[stays].all()
        )
        assert not patches(shown)[~stays].any()
    half = kept_patches(page.backbone, page.lora, images, 0.5)[1]
    assert not torch.equal(half, kept_patches(page.backbone, None, images, 0.5)[1]), (
        'the LoRA has no say'
    )
    assert torch.equal(
        half, encode(page.backbone, normalise(images, page.backbone), page.lora, {3: 0.5}).kept
    )


@pytest.fixture(scope='module')
def photo_page():
    return make_page()


@pytest.mark.parametrize('name', page_module.EXAMPLES)
def test_examples_are_recognised(page, photo_page, name):
    "Most of the queries, by what is meant for them; the file names tell the truth"
    right = []
    for used in (photo_page,) if name == 'photos' else (page, photo_page):
        for seed in range(8 if used is page else 3):
            request = example(name, seed, n_query=1)
            answer = classify(used, read_request(request, used.backbone.side))
            right += [
                p['label'] == q['name'].removesuffix('.png')
                for p, q in zip(answer['predictions'], request['queries'])
            ]
    assert sum(right) > 0.6 * len(right), (name, sum(right), len(right))


def test_the_photos_that_ship_name_their_source(photo_page):
    about = json.loads((files('lora_recycle') / 'assets' / 'page' / 'photos.json').read_text())
    assert 'Caltech-101' in about['source'] and 'licence' in about['source']
    request = example()
    assert len(request['names']) == 4 and set(request['names']) == set(about['classes'])
    asked = read_request(request, photo_page.backbone.side)
    assert (len(asked.support), len(asked.queries)) == (12, 8)
    assert 'miniature-photo with the average of the 4 shipped LoRAs' in photo_page.about


@pytest.mark.parametrize('kind', ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF'))
def test_common_kinds_and_modes_are_read(kind):
    for mode in ('RGB', 'L') if kind in ('JPEG', 'WEBP', 'BMP') else ('RGB', 'L', '1'):
        assert decode_image(data_of(Image.new(mode, (5, 3)), kind), 'x').size == (5, 3)


def test_upside_down_photos_are_turned(page, sent):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 36, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = 3
    turned = photo.transpose(Image.Transpose.ROTATE_180)
    queries = [
        dict(name='straight', data=data_of(photo)),
        dict(name='turned', data=data_of(turned, exif=exif)),
    ]
    x = read_request(sent | dict(queries=queries), page.backbone.side).queries
    assert torch.equal(x[0], x[1])


def test_wrong_forms_get_one_sentence(page, sent):
    names, supports = sent['names'], sent['supports']
    broken = dict(name='torn.jpg', data=data_of(Image.new('RGB', (9, 9)), 'JPEG')[:-400])
    cases = {
        'at least 2': dict(names=[], supports=[]),
        '1 class: ': dict(names=names[:1], supports=supports[:1]),
        '9 classes': dict(names=list('abcdefghi'), supports=supports + supports[:4]),
        '4 class names but images for 5': dict(names=names[:4]),
        'class 2 has no name': dict(names=[names[0], '  ', *names[2:]]),
        'has no images': dict(supports=[[]] + supports[1:]),
        'two classes are called': dict(names=['cat'] * 5),
        '21 images; 20': dict(supports=[supports[0] * 7] + supports[1:]),
        '0 images to classify': dict(queries=[]),
        'torn.jpg) cannot be read': dict(queries=[broken]),
        'image 2 (torn.jpg) cannot be read': dict(
            supports=[[supports[0][0], broken]] + supports[1:]
        ),
        'is an empty file': dict(queries=[dict(name='x', data='data:,')]),
        'not base64': dict(queries=[dict(name='x', data='data:;base64,ä')]),
        'must be lists': dict(names='cats'),
        'share=1': dict(share=1),
        "share='": dict(share='half'),
        'share=True': dict(share=True),
        'is no image': dict(queries=['x']),
        'letters': dict(names=['a' * 101, *names[1:]]),
        'image 1 to classify (f.tif): ': dict(
            queries=[dict(name='f.tif', data=data_of(Image.new('F', (4, 4)), 'TIFF'))]
        ),
    }
    for message, change in cases.items():
        found = said(page, sent | change)
        assert message in found and 'Traceback' not in found and '\n' not in found, found
    assert respond(page, 'POST', '/classify', b'\xff')[0] == 400
    assert respond(page, 'POST', '/classify', b'[' * 10**5)[0] == 400


def test_huge_images_are_refused_before_they_are_unpacked(page, sent):
    for side in (
        7_100,
        9_900,
        14_000,
    ):  # beyond our limit; where Pillow warns; where Pillow refuses
        bomb = data_of(Image.new('1', (side, side)))
        assert len(bomb) < 10**6
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            assert 'bomb.png) has more than 50,000,000 pixels' in said(
                page, sent | dict(queries=[dict(name='bomb.png', data=bomb)])
            )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(('name', 'data', 'x')), x, max_size=2)
        ),
        max_leaves=8,
    ),
    key=st.sampled_from(('names', 'supports', 'queries', 'share', 'all')),
)
def test_no_request_brings_it_down(page, sent, value, key):
    request = value if key == 'all' else dict(sent, **{key: value})
    assert respond(page, 'POST', '/classify', json.dumps(request).encode())[0] in (200, 400)


def test_what_is_our_fault_shows_no_traceback(page, sent, monkeypatch, capsys):
    monkeypatch.setattr(page_module, 'classify', lambda *_: 1 / 0)
    status, _, content = respond(page, 'POST', '/classify', json.dumps(sent).encode())
    assert (
        status == 500
        and 'ZeroDivisionError' in json.loads(content)['error']
        and b'File' not in content
    )
    assert 'ZeroDivisionError' in capsys.readouterr().err


def test_a_saved_meta_lora_is_loaded(page, sent, tmp_path):
    market, _ = read_market(files('lora_recycle') / 'assets/market', page.backbone)
    meta = recycle(page.backbone, market[:2], 'smoke')
    save_meta_lora(tmp_path / 'meta', meta, name='mine')
    loaded = make_page('miniature', tmp_path / 'meta')
    assert loaded.about == "miniature with the meta-LoRA 'mine'"
    torch.testing.assert_close(loaded.lora.A @ loaded.lora.B, meta.lora.A @ meta.lora.B)
    assert (
        classify(loaded, read_request(sent, 36))['predictions']
        != classify(page, read_request(sent, 36))['predictions']
    )


def test_other_backbones_and_loras(page, tmp_path):
    lora = new_lora(4, 128, 2, generator(0))
    assert make_page(page.backbone, lora).about == 'miniature with a LoRA of rank 2'
    with pytest.raises(ValueError, match='not a Backbone'):
        make_page(3)
    with pytest.raises(ValueError, match="backbone='ViT-B-32'.*'miniature-photo', 'miniature'"):
        make_page('ViT-B-32')
    with pytest.raises(ValueError, match='not a LoRA'):
        make_page(page.backbone, 3)
    with pytest.raises(FileNotFoundError):
        make_page(page.backbone, tmp_path)
    assert '"lora": false' in page_files(make_page(page.backbone))['/settings.js'][1]


@contextlib.contextmanager
def serving(page):
    "The address of a running server of `page`"
    server = make_server(page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_only_this_machine_and_this_page_are_let_in(page, sent):
    with serving(page) as url:
        port = int(url.rpartition(':')[2])

        def fetch(method, path, body=None, **heads):
            line = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            line.request(method, path, body, {k.replace('_', '-'): v for k, v in heads.items()})
            reply = line.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()

        status, heads, _ = fetch('GET', '/')
        assert (
            status == 200
            and "default-src 'none'" in heads['Content-Security-Policy']
            and 'Access-Control-Allow-Origin' not in heads
        )
        body = json.dumps(sent)
        assert fetch('POST', '/classify', body, Content_Type='application/json')[0] == 200
        for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data'):
            assert fetch('POST', '/classify', body, Content_Type=kind)[0] == 415
        assert fetch('OPTIONS', '/classify')[0] == 501
        for host in (
            'evil.example',
            '127.0.0.1.evil.example',
            f'evil.example:{port}',
            '127.0.0.1@evil.example',
            '[',
            '',
        ):
            assert fetch('GET', '/', Host=host)[0] == 403, host
        for path in (
            '/../page.py',
            '/example/digits',
            '/example/digits/-1',
            '/example//',
            '//etc/passwd',
            '//[',
        ):
            assert fetch('GET', path)[0] in (400, 404), path
        assert (
            fetch(
                'POST',
                '/classify',
                None,
                Content_Type='application/json',
                Content_Length=str(MOST['request_bytes'] + 1),
            )[0]
            == 413
        )
        with socket.socket() as other:  # another address of this machine is not listened on
            with pytest.raises(OSError):
                other.settimeout(5)
                other.connect(('127.0.0.2', port))
        with pytest.raises(ValueError, match='cannot be opened'):
            launch(page.backbone, port=port)


def test_the_command_says_what_is_wrong_before_it_loads_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page_module, 'make_page', None)
    with pytest.raises(SystemExit) as ended:
        page_module.main(['--meta', str(tmp_path)])
    assert ended.value.code == 2 and 'meta.json' in capsys.readouterr().err


def test_the_command_serves_another_backbone_and_ends_on_ctrl_c(sent, tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        projection_dim=16,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / 'clip')
    command = [
        sys.executable,
        '-m',
        'lora_recycle.use.page',
        '--backbone',
        str(tmp_path / 'clip'),
        '--port',
        '0',
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as running:
        try:
            said_first = running.stdout.readline()
            assert 'with no LoRA' in said_first, running.stderr.read()
            port = int(re.search(r'127\.0\.0\.1:(\d+)', said_first)[1])
            line = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            line.request(
                'POST', '/classify', json.dumps(sent), {'Content-Type': 'application/json'}
            )
            answer = json.loads(line.getresponse().read())
            assert answer['n_patches'] == 16 and decode_image(
                answer['predictions'][0]['kept'], 'x'
            ).size == (64, 64)
            running.send_signal(signal.SIGINT)
            assert running.wait(180) == 0 and 'Traceback' not in running.stderr.read()
        finally:
            running.kill()


@contextlib.contextmanager
def browsing(page, **window):
    "A tab of headless Chromium with the page open, the addresses it asked for, and what its console said"
    from playwright.sync_api import sync_playwright

    with serving(page) as url, sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage']
        )
        tab, asked, noise = browser.new_page(**window), [], []
        tab.set_default_timeout(60_000)
        tab.on('request', lambda r: asked.append(r.url))
        tab.on('console', lambda m: noise.append(m.text))
        tab.on('pageerror', lambda e: noise.append(str(e)))
        tab.goto(url + '/')
        try:
            yield tab, asked, noise, url
        finally:
            browser.close()


def classified(tab):
    "Press 'classify' and wait; for each query the name of its file and the prediction in the page"
    tab.click('#go')
    tab.wait_for_selector('tr.prediction')
    return [
        (
            row.query_selector('small').inner_text(),
            row.query_selector('.bar.best span').inner_text(),
        )
        for row in tab.query_selector_all('tr.prediction')
    ]


def wrong(tab):
    "Press 'classify' and wait for the message"
    tab.click('#go')
    tab.wait_for_selector('#error:not([hidden])')
    return tab.inner_text('#error')


browser_test = pytest.mark.skipif(
    MISSING is not None, reason=f'the page is not tried in a browser: {MISSING}'
)


@browser_test
def test_example_in_a_browser(page):
    sent = example('digits')
    with browsing(page) as (tab, asked, noise, url):
        tab.click('#digits')
        tab.wait_for_selector('#classes .drop >> nth=4')
        found = classified(tab)
        truth = [
            p['label']
            for p in classify(page, read_request(sent, page.backbone.side))['predictions']
        ]
        assert found == [(q['name'], label) for q, label in zip(sent['queries'], truth)]
        assert len(
            tab.query_selector_all('#prototypes img.central')
        ) == 5 and '18 of 36' in tab.inner_text('#legend')
        before = tab.get_attribute('tr.prediction td:nth-child(2) img', 'src')
        tab.fill('#share', '0.9')
        tab.wait_for_selector("#legend:has-text('the 4 of 36')")
        assert tab.get_attribute('tr.prediction td:nth-child(2) img', 'src') != before
        tab.uncheck('#lora')
        tab.wait_for_selector("#legend:has-text('miniature alone')")
        shown = tab.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 0)')
        assert shown and not noise, noise
        assert [a for a in asked if not a.startswith((url + '/', 'data:'))] == [], (
            'it asked another machine'
        )


@browser_test
def test_own_files_and_wrong_ones_in_a_browser(page, tmp_path):
    red, blue = Image.new('RGB', (60, 40), (220, 30, 30)), Image.new('RGB', (60, 40), (30, 30, 220))
    red.save(tmp_path / 'red 1.jpg')
    red.resize((20, 20)).save(tmp_path / 'red 2.png')
    blue.save(tmp_path / 'blue 1.webp')
    (tmp_path / 'torn.png').write_bytes((tmp_path / 'red 2.png').read_bytes()[:40])
    with browsing(page) as (tab, asked, noise, url):
        put = lambda where, *names: tab.set_input_files(
            f'{where} input[type=file]', [tmp_path / n for n in names]
        )
        first, second = '#classes .drop:nth-child(1)', '#classes .drop:nth-child(2)'
        assert 'class 1 has no name' in wrong(tab)
        tab.fill(f'{first} input[type=text]', '<img src=x onerror=alert(1)>')
        tab.fill(f'{second} input[type=text]', 'blue')
        assert 'has no images' in wrong(tab)
        put(first, 'red 1.jpg')
        tab.wait_for_selector(f'{first} img')
        put(second, 'blue 1.webp')
        tab.wait_for_selector(f'{second} img')
        assert '0 images to classify' in wrong(tab)
        put('#queries', 'red 2.png', 'torn.png')
        tab.wait_for_selector('#queries img >> nth=1', state='attached')
        assert 'torn.png) cannot be read as an image' in wrong(tab)
        tab.click('#queries button.thumb >> nth=1')
        assert classified(tab) == [('red 2.png', '<img src=x onerror=alert(1)>')]
        tab.click(f"{second} button:has-text('×')")
        assert '1 class: give at least 2' in wrong(tab) and tab.is_hidden('#result')
        assert [a for a in asked if not a.startswith((url + '/', 'data:'))] == []
        assert [n for n in noise if '400' not in n] == [], noise


@browser_test
def test_files_can_be_dropped_and_a_stopped_server_is_named(page):
    with browsing(page) as (tab, *_):
        tab.evaluate(
            """data => { const t = new DataTransfer(); t.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], 'dropped.png', {type: 'image/png'}));
                        document.querySelector('#queries .drop').dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true})); }""",
            data_of(Image.new('RGB', (8, 8))).rpartition(',')[2],
        )
        tab.wait_for_selector("#queries img[alt='dropped.png']")
        tab.route('**/classify', lambda route: route.abort())
        assert 'does not answer' in wrong(tab)


_DROP = """([data, n, where]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const t = new DataTransfer();
  for (let i = 0; i < n; i++) t.items.add(new File([bytes], `photo ${i}.jpg`, {type: 'image/jpeg'}));
  window.gap = 0;
  let last = performance.now();
  setInterval(() => {
    window.gap = Math.max(window.gap, performance.now() - last);
    last = performance.now();
  }, 20);
  const zone = document.querySelector(where);
  const how = {dataTransfer: t, bubbles: true, cancelable: true};
  zone.dispatchEvent(new DragEvent('drop', how));
}"""


@browser_test
def test_200_large_photos_at_once_neither_block_nor_exhaust_it(page):
    photo = data_of(Image.new('RGB', (2400, 1800), (200, 60, 30)), 'JPEG').rpartition(',')[2]
    with browsing(page) as (tab, _, noise, _):
        tab.set_default_timeout(240_000)
        tab.click('#digits')
        tab.wait_for_selector('#classes .drop >> nth=4')
        tab.evaluate(_DROP, [photo, 200, '#queries .drop'])
        tab.wait_for_selector("#state:has-text('reading')")
        assert tab.evaluate('document.body.clientWidth') > 0  # it still answers
        tab.wait_for_selector('#queries button.thumb >> nth=209')
        assert tab.evaluate('window.gap') < 3000  # milliseconds in which nothing could be clicked
        sizes = tab.evaluate('queries.map(q => q.data.length)')
        assert len(sizes) == 210 and max(sizes) < 2**20
        found = classified(tab)
        assert len(found) == 210 and '210 predictions' in tab.inner_text('#state')
        assert len({label for name, label in found if name.startswith('photo')}) == 1
        assert not noise, noise


@browser_test
def test_the_keyboard_alone_is_enough(photo_page):
    with browsing(photo_page) as (tab, _, noise, _):
        tab.focus('#photos')
        tab.keyboard.press('Enter')
        tab.wait_for_selector('#classes .drop >> nth=3')
        tab.focus('#reject')
        tab.keyboard.press('Space')
        tab.focus('#go')
        tab.keyboard.press('Enter')
        tab.wait_for_selector('tr.prediction >> nth=7')
        assert tab.evaluate('document.activeElement.id') == 'predictions'
        assert '8 predictions' in tab.inner_text('#state')
        assert len(tab.query_selector_all('tr.prediction >> nth=0 >> figure img')) == 3
        tab.focus('#queries button.thumb >> nth=1')
        tab.keyboard.press('Enter')  # removes it, and the next one has the focus
        assert tab.evaluate('document.activeElement.dataset.key') == 'the queries 1'
        assert len(tab.query_selector_all('#queries button.thumb')) == 7
        assert not noise, noise


_UNNAMED = """() => [...document.querySelectorAll('button, input, img, [role=group]')]
  .filter(e => !(e.ariaLabel || e.alt || e.textContent.trim() || e.labels?.length))
  .map(e => e.outerHTML.slice(0, 120))"""


@browser_test
def test_a_screen_reader_finds_a_name_for_everything(photo_page):
    with browsing(photo_page) as (tab, *_):
        tab.click('#photos')
        tab.wait_for_selector('#classes .drop >> nth=3')
        classified(tab)
        assert tab.evaluate(_UNNAMED) == []
        assert tab.get_attribute('#state', 'aria-live') == 'polite'
        assert tab.query_selector('table caption') and tab.query_selector('html[lang=en]')
        alts = [i.get_attribute('alt') for i in tab.query_selector_all('tr.prediction img')]
        assert len(alts) == 8 * 5 and len(set(alts[:3])) == 3


def screenshot(path):
    "The page with its first example, 20 photos of 4 classes, classified; a PNG of few colours"
    with browsing(make_page(), viewport=dict(width=900, height=600), color_scheme='light') as (
        tab,
        *_,
    ):
        tab.click('#photos')
        tab.wait_for_selector('#classes .drop >> nth=3')
        classified(tab)
        picture = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert('RGB')
    Path(path).parent.mkdir(exist_ok=True)
    picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3))
    picture.quantize(64).save(path, optimize=True)
    return picture.size, os.path.getsize(path)


if __name__ == '__main__':
    print(MISSING or screenshot(ROOT / 'nbs/2_use/images/page.png'))
