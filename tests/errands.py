"Jobs that tests give to workers: importable from another process, and quick to import."

import os
import signal
import time
from pathlib import Path

import torch

from lora_recycle.core import Cache


def begun(folder, n):
    "Write down that job `n` begins, in which process, and say how often it has begun by now"
    with open(Path(folder) / f'begun-{n}', 'a') as f:
        f.write(f'{os.getpid()}\n')
    return times(folder, n)


def pids(folder, n):
    "The processes in which job `n` was begun, in order"
    path = Path(folder) / f'begun-{n}'
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def times(folder, n):
    return len(pids(folder, n))


def wait_for(path, seconds=240):
    "Wait until there is a file `path`; TimeoutError if it does not come"
    end = time.time() + seconds
    while not Path(path).exists():
        if time.time() > end:
            raise TimeoutError(f'{path} did not come')
        time.sleep(0.02)


def report(folder, n, device):
    "About job `n`: the lower its number the later it ends"
    begun(folder, n)
    print('a job may print', n, flush=True)
    time.sleep(0.3 * (4 - n))
    return n, os.getpid(), torch.get_num_threads(), device


class Unsendable(Exception):
    "An exception that no pickle brings back"

    def __init__(self, one, two):
        super().__init__(f'{one} and {two}')

    def __reduce__(self):
        raise TypeError('stays here')


def fail_at_one(folder, n):
    begun(folder, n)
    if n == 1:
        raise Unsendable('this', 'that')
    return n


def suicide(folder, n):
    "Dies whenever it is begun, if `n` is 1"
    begun(folder, n)
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def slow_two(folder, n):
    """Job 2 never ends when it is begun the first time, and job 1 waits until it is begun anew.

    All keep what they make in the cache of `folder`."""

    def make():
        first = begun(folder, n) == 1
        if n == 2 and first:
            time.sleep(600)
        if n == 2:
            (Path(folder) / 'anew').touch()
        if n == 1:
            wait_for(Path(folder) / 'anew')
        return dict(x=torch.tensor([n * n]))

    return Cache(Path(folder) / 'cache').get('square', n, make)['x'].item()


def ask_stage(folder, seconds, value, said):
    "Ask the cache in `folder` for a stage that takes `seconds` and gives `value`; say how it went"

    def make():
        said.send('started')
        time.sleep(seconds)
        return {'x': torch.full((200, 1000), value)}

    cache = Cache(folder)
    x = cache.get('stage', {'size': 3}, make)['x']
    said.send((int(x[0, 0]), bool((x == x[0, 0]).all()), cache.log[0][2]))


def sum_of(folder, id, *needs):
    "1 more than the numbers that the jobs `needs` left in `folder`; killed once if told to"
    folder = Path(folder)
    with open(folder / 'begun', 'a') as f:
        f.write(f'{id} ')
    die = folder / 'die'
    if die.exists() and die.read_text() == id:
        die.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    total = 1 + sum(int((folder / need).read_text()) for need in needs)
    (folder / id).write_text(str(total))
    return total


def sleep(folder, n):
    begun(folder, n)
    time.sleep(600)


def invert_one(lora, first, device):
    "Invert one LoRA of the miniature, smoke size"
    from lora_recycle.core import generator  # here: few workers need these, and they take seconds
    from lora_recycle.method.inversion import InvertConfig, Priors, invert
    from lora_recycle.suite.miniature import load_miniature, load_prior, load_token_stats

    config = InvertConfig(steps=3, per_class=3, alpha_tokens=1.0, alpha_tv=1.0)
    return vars(
        invert(
            load_miniature().to(device),
            lora[first : first + 1],
            config,
            generator(0, first),
            Priors(load_prior().to(device), load_token_stats().to(device)),
        )
    )
