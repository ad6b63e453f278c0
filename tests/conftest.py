"What holds for every test: Ctrl-C works, each test process has a core, long files begin first."

import os
import signal
from pathlib import Path

# A shell that runs the tests in the background has Ctrl-C ignored; what they start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take longest, the longest first: with several test processes no one waits at the end.
LONG = ('pipeline', 'paper_scale', 'baselines', 'claims', 'recycle', 'device', 'jobs', 'page')
LONG += ('exchange', 'figures', 'reference', 'cost', 'zero_shot', 'models', 'datasets', 'sources')
LONG += ('method', 'package')


def take_a_core():
    "With `pytest -n`, the core of this worker: it and what it starts then begin no more workers."
    worker = os.environ.get('PYTEST_XDIST_WORKER')
    if worker is None or not hasattr(os, 'sched_setaffinity'):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix('gw'))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def pytest_collection_modifyitems(items):
    "The long files first; `--dist loadfile` (pyproject.toml) deals whole files in this order."
    place = {f'test_{name}.py': n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def start_lightly():
    "Let the processes that tests begin find what is in `light` first."
    folder = str(Path(__file__).parent / 'light')
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    if folder not in paths:
        os.environ['PYTHONPATH'] = os.pathsep.join([folder, *filter(None, paths)])


take_a_core()
start_lightly()
