"What holds for every test: Ctrl-C works, and each of several test processes has a core of its own."

import os
import signal

# A shell that runs the tests in the background has Ctrl-C ignored; what they start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def take_a_core():
    "With `pytest -n`, the core of this worker: it and what it starts then begin no more workers."
    worker = os.environ.get('PYTEST_XDIST_WORKER')
    if worker is None or not hasattr(os, 'sched_setaffinity'):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix('gw'))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


take_a_core()
