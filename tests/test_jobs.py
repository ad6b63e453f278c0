"Jobs elsewhere: in order, named when they fail, done again when killed, nothing left running."

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import errands
import psutil
import pytest
import torch

from lora_recycle import jobs as module
from lora_recycle.core import generator
from lora_recycle.jobs import Executor, Job, JobError, run_graph, run_jobs
from lora_recycle.method.lora import new_lora

HERE_ALONE = Executor('here')
TWO = Executor('processes', workers=2)
HERE = Path(__file__).resolve().parent
has_ray = importlib.util.find_spec('ray') is not None


def on(folder, function, numbers=range(5), executor=TWO, **how):
    "Run `function(folder, n)` for `numbers`"
    return run_jobs(partial(function, str(folder)), [(n,) for n in numbers], executor, **how)


def gone(pid):
    "Wait until the process `pid` is no more"
    try:
        psutil.Process(pid).wait(15)
    except psutil.NoSuchProcess:
        pass
    return not psutil.pid_exists(pid)


def begun_by(folder, numbers):
    "The processes in which jobs were begun, once there are some for each of `numbers`"
    for n in numbers:
        errands.wait_for(folder / f'begun-{n}')
    time.sleep(0.1)
    return [pid for n in numbers for pid in errands.pids(folder, n)]


def helpers_of(pid):
    "Nurseries and workers that the process `pid` began, whether forked or not"
    of = psutil.Process(pid).children(recursive=True)
    of = [p for p in of if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in of if {'_nurse;', '_serve;'} & set(' '.join(p.cmdline()).split())]


def test_results_come_in_order_from_workers_that_share_the_cores(tmp_path):
    found = on(tmp_path, errands.report)
    assert [n for n, *_ in found] == list(range(5)) and all(
        errands.times(tmp_path, n) == 1 for n in range(5)
    )
    ran = {pid for _, pid, _, _ in found}
    assert (
        len(ran) == 2
        and os.getpid() not in ran
        and all(map(gone, ran))
        and not helpers_of(os.getpid())
    )
    assert {(threads, device) for *_, threads, device in found} == {
        (max(1, module._cores() // 2), 'cpu')
    }


def test_no_jobs_no_workers():
    assert on('', errands.report, []) == on('', errands.report, [], HERE_ALONE) == []


@pytest.mark.parametrize(
    'executor', [HERE_ALONE, Executor('processes', workers=1)], ids=lambda e: e.kind
)
def test_a_failed_job_is_named_and_ends_the_work(tmp_path, executor):
    with pytest.raises(
        JobError, match=r"fail_at_one\('.*', 1\) failed: .*Unsendable: this and that"
    ) as caught:
        on(tmp_path, errands.fail_at_one, executor=executor)
    assert [errands.times(tmp_path, n) for n in range(5)] == [
        1,
        1,
        0,
        0,
        0,
    ]  # nothing is tried again, nothing new begins
    if executor.kind == 'processes':
        assert 'in fail_at_one' in str(caught.value)  # where it happened
    else:
        assert isinstance(caught.value.__cause__, errands.Unsendable)


def test_what_cannot_be_sent_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='top of a module'):
        run_jobs(lambda n: n, [(1,)], TWO)
    with pytest.raises(ValueError, match=r'job report.*cannot be sent'):
        run_jobs(errands.report, [(tmp_path, threading.Lock())], TWO)
    monkeypatch.setattr(errands.report, '__module__', '__main__')
    monkeypatch.setattr(sys.modules['__main__'], 'report', errands.report, raising=False)
    with pytest.raises(ValueError, match='notebook or script'):
        on(tmp_path, errands.report)


def test_executors_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'ray'"):
        Executor('rai')
    with pytest.raises(ValueError, match='retries=-1'):
        Executor('processes', retries=-1)
    with pytest.raises(ValueError, match='workers=-1 is not legal'):
        Executor(workers=-1)
    with pytest.raises(ValueError, match='Set workers to at most 2'):
        module.worker_devices('cuda', 3, cores=16, gpus=2)
    with pytest.raises(ValueError, match='cuda:1'):
        run_jobs(errands.fail_at_one, [('', 0)], TWO, device='cuda:1')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    with pytest.raises(ValueError, match='no GPU is seen'):
        run_jobs(errands.fail_at_one, [('', 0)], TWO, device='cuda')
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install lora_recycle\[ray\]'):
        Executor('ray')


def test_each_gpu_serves_one_worker(monkeypatch, tmp_path):
    "Without a GPU a worker told to use one ends at once; with two of them seen, two workers are told so"
    told = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(module, '_ask', lambda worker, *messages: told.append(messages[0][1]))
    monkeypatch.setattr(
        module,
        '_start',
        lambda threads: subprocess.Popen(
            ['sleep', '0'], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ),
    )
    with pytest.raises(JobError, match='lost its worker 1 times'):
        on(tmp_path, errands.report, executor=Executor('processes', retries=0), device='cuda')
    assert set(told) <= {'cuda:0', 'cuda:1'} and told


def killed_half_way(folder, executor, **how):
    "Results of five jobs, the process of job 2 being killed while jobs 1 and 2 run"

    def kill():
        os.kill(begun_by(folder, (1, 2))[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = on(folder, errands.slow_two, executor=executor, shared=folder, **how)
    killer.join()
    return found


def test_a_killed_worker_costs_its_job_only(tmp_path):
    with pytest.warns(UserWarning, match=r"slow_two\('.*', 2\) lost its worker \(exit status -9\)"):
        assert killed_half_way(tmp_path, TWO) == [0, 1, 4, 9, 16]
    assert [errands.times(tmp_path, n) for n in range(5)] == [1, 1, 2, 1, 1]
    assert len(set(errands.pids(tmp_path, 2))) == 2  # a fresh worker
    assert on(tmp_path, errands.slow_two, executor=HERE_ALONE) == [0, 1, 4, 9, 16]  # from the cache
    assert [errands.times(tmp_path, n) for n in range(5)] == [1, 1, 2, 1, 1]
    assert not list(tmp_path.glob('.seen*')) and not helpers_of(os.getpid())


@pytest.mark.filterwarnings('ignore:.*lost its worker')
def test_a_job_that_kills_every_worker_is_given_up(tmp_path):
    with pytest.raises(
        JobError, match=r"suicide\('.*', 1\) failed: it lost its worker 2 times, .*-9"
    ):
        on(tmp_path, errands.suicide, executor=Executor('processes', 1, retries=1))
    assert [errands.times(tmp_path, n) for n in range(5)] == [1, 2, 0, 0, 0]


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, 'sleep', lambda seconds: None)
    wrong, _ = module._answer(b'', b'', 'cpu', str(tmp_path / 'elsewhere' / '.seen'))
    assert (
        'FileNotFoundError' in wrong
        and 'elsewhere is not the same folder' in wrong
        and 'cache_dir' in wrong
    )


GRAPH = [
    Job('sum', errands.sum_of, ('sum', 'left', 'right'), ('left', 'right', 'made long ago')),
    Job('left', errands.sum_of, ('left', 'root'), ('root',)),
    Job('right', errands.sum_of, ('right', 'root'), ('root',), title='the right one'),
    Job('root', errands.sum_of, ('root',)),
]


@pytest.mark.parametrize('executor', [HERE_ALONE, TWO, Executor(workers=2)], ids=lambda e: e.kind)
def test_a_graph_is_done_in_its_order(tmp_path, executor):
    "Each job adds 1 to what those before it left in the folder; results are the same everywhere"
    found = run_graph(GRAPH, str(tmp_path), executor, shared=tmp_path)
    assert found == dict(root=1, left=2, right=2, sum=5)
    ends = {id: (tmp_path / id).stat().st_mtime_ns for id in found}
    assert ends['root'] < min(ends['left'], ends['right']) < ends['sum']


@pytest.mark.parametrize('executor', [HERE_ALONE, TWO], ids=lambda e: e.kind)
def test_a_failed_job_of_a_graph_is_called_by_its_title(tmp_path, executor):
    "Nothing that needs it begins"
    (tmp_path / 'right').mkdir()  # it cannot write its number
    with pytest.raises(JobError, match='the right one failed: IsADirectoryError'):
        run_graph(GRAPH, str(tmp_path), executor)
    assert not (tmp_path / 'sum').exists()


def test_a_killed_worker_of_a_graph_costs_its_job_only(tmp_path):
    (tmp_path / 'die').write_text('left')  # the first that makes it is killed
    with pytest.warns(UserWarning, match=r'left lost its worker \(exit status -9\)'):
        found = run_graph(GRAPH, str(tmp_path), TWO)
    assert found == dict(root=1, left=2, right=2, sum=5)
    assert (tmp_path / 'begun').read_text().split().count('left') == 2


def test_rings_and_double_ids_are_refused():
    ring = [Job('a', print, needs=('b',)), Job('b', print, needs=('a',))]
    with pytest.raises(ValueError, match='cycle'):
        run_graph(ring, executor=HERE_ALONE)
    with pytest.raises(ValueError, match='two jobs have the same id'):
        run_graph([Job('a', print), Job('a', print)], executor=HERE_ALONE)


def test_a_kind_is_chosen_where_none_is_named(monkeypatch):
    choose = lambda *how: module._choose_kind(Executor(), *how)
    monkeypatch.setattr(module, '_cores', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert [choose(1, 'cpu'), choose(5, 'cpu'), choose(5, 'cuda')] == ['here', 'processes', 'here']
    assert module._choose_kind(Executor(workers=1), 5, 'cpu') == 'here'


@pytest.mark.parametrize('address', ['127.0.0.1:{}', 'ray://127.0.0.1:{}'])
def test_a_dead_head_is_named_within_seconds(address):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))  # bound, but nobody listens
        address = address.format(s.getsockname()[1])
        begun = time.time()
        with pytest.raises(ConnectionError, match=f"RAY_ADDRESS='{address}': no Ray head"):
            module._check_head(address)
    assert time.time() - begun < 10
    assert all(module._check_head(name) is None for name in (None, 'auto', 'local'))


@contextmanager
def driver(folder, executor):
    "A Python that runs three endless jobs, two at a time, and whose errors can be read"
    code = f"""from functools import partial
import errands
from lora_recycle.jobs import Executor, run_jobs
run_jobs(partial(errands.sleep, {str(folder)!r}), [(0,), (1,), (2,)], {executor})"""
    places = [HERE / 'light', HERE, *sys.path]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, places))}
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.skipif(os.name != 'posix', reason='signals')
@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_outlives_the_one_that_began(tmp_path, sent):
    with driver(tmp_path, TWO) as process:
        ran = begun_by(tmp_path, (0, 1))
        assert len(ran) == 2 and all(map(psutil.pid_exists, ran))
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and ('KeyboardInterrupt' in said) == (sent == signal.SIGINT)
    assert all(map(gone, ran)) and errands.times(tmp_path, 2) == 0


@pytest.fixture(scope='module')
def inverted():
    "Two LoRAs and what their inversion in this process, with one thread, gives"
    gen, before = generator(0, 'jobs'), torch.get_num_threads()
    lora = new_lora(4, 128, 4, gen, n=2)
    lora = type(lora)(
        lora.A,
        torch.randn(lora.B.shape, generator=gen) * 0.02,
        torch.randn(2, 128, 5, generator=gen),
        torch.zeros(2, 5),
    )
    torch.set_num_threads(1)
    try:
        return lora, run_jobs(partial(errands.invert_one, lora), [(0,), (1,)], HERE_ALONE)
    finally:
        torch.set_num_threads(before)


def same_bits(inverted, executor):
    lora, expected = inverted
    found = run_jobs(partial(errands.invert_one, lora), [(0,), (1,)], executor)
    assert not torch.equal(found[0]['images'], found[1]['images'])
    return all(
        torch.equal(a[k], b[k])
        for a, b in zip(found, expected)
        for k in ('images', 'kept', 'loss', 'accuracy')
    )


def test_processes_give_the_same_bits(inverted):
    assert same_bits(inverted, Executor('processes', workers=max(2, module._cores())))


@pytest.mark.skipif(sys.platform != 'linux', reason='forked on Linux only')
def test_workers_share_what_is_imported(tmp_path):
    "One process imports; what its forks hold beyond it is less than half of what it holds"
    with driver(tmp_path, TWO) as process:
        ran = begun_by(tmp_path, (0, 1))
        of = psutil.Process(process.pid).children()
        assert len(of) == 1 and {p.pid for p in of[0].children()} == set(ran)
        own = of[0].memory_full_info()
        assert own.uss < own.rss / 2  # shared with the two
        assert all(psutil.Process(pid).memory_full_info().uss < own.rss / 2 for pid in ran)


@pytest.mark.skipif(sys.platform != 'linux', reason='forked on Linux only')
def test_a_killed_nursery_costs_nothing(tmp_path):
    "Its workers go on; the one that is lost afterwards comes from a new nursery"

    def kill():
        pids = begun_by(tmp_path, (1, 2))
        psutil.Process(pids[-1]).parent().kill()
        os.kill(pids[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert on(tmp_path, errands.slow_two, shared=tmp_path) == [n * n for n in range(5)]
    killer.join()
    assert not helpers_of(os.getpid())


def ray_head(port, folder):
    "The process that heads a cluster of two workers on this machine, once it is there"
    command = [
        sys.executable,
        '-m',
        'ray.scripts.scripts',
        'start',
        '--head',
        '--block',
        f'--port={port}',
        '--num-cpus=2',
        '--object-store-memory=100000000',
        '--include-dashboard=false',
        '--disable-usage-stats',
        f'--temp-dir={folder}',
    ]
    head, said = (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
        '',
    )
    for line in head.stdout:
        said += line
        if 'block forever' in line:
            threading.Thread(target=head.stdout.read, daemon=True).start()
            return head
    raise RuntimeError(f'exit status {head.wait()}: {said}')


@pytest.fixture(scope='module')
def ray():
    "A local cluster, started as a user would, with a token of its own and without a word to anyone"
    if not has_ray:
        pytest.skip('needs ray')
    folder, patch = (
        tempfile.mkdtemp(prefix='ray'),
        pytest.MonkeyPatch(),
    )  # a short name: sockets go there
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    for name, value in dict(
        RAY_ADDRESS=f'127.0.0.1:{port}',
        RAY_AUTH_MODE='token',
        RAY_AUTH_TOKEN=secrets.token_hex(16),
        RAY_worker_niceness='0',
    ).items():
        patch.setenv(name, value)
    places = [HERE / 'light', HERE, *filter(None, sys.path)]
    patch.setenv('PYTHONPATH', os.pathsep.join(map(str, places)))
    patch.delenv('OMP_NUM_THREADS', raising=False)  # what Ray does without being told
    for left in (
        2,
        1,
        0,
    ):  # Ray gives its own processes 30 s, in which they may not come up on a busy machine
        try:
            head = ray_head(port, folder)
        except RuntimeError:
            if not left:
                raise
        else:
            break
    import ray

    yield ray
    began = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    head.wait(60)
    patch.undo()
    assert not ray.is_initialized() and not psutil.wait_procs(began, 20)[1]
    shutil.rmtree(folder)


def test_ray_begins_a_killed_job_anew(ray, tmp_path):
    assert killed_half_way(tmp_path, Executor('ray')) == [0, 1, 4, 9, 16]
    assert [errands.times(tmp_path, n) for n in range(5)] == [1, 1, 2, 1, 1]
    assert len(set(errands.pids(tmp_path, 2))) == 2


@pytest.fixture(scope='module')
def joined(ray):
    "Who has joined before a run stays, and so do its workers: two tests share them"
    ray.init(log_to_driver=False)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def test_ray_gives_the_same_bits(joined, inverted):
    assert same_bits(inverted, Executor('ray'))


def test_ray_names_what_failed(joined, tmp_path):
    found = on(tmp_path, errands.report, range(2), Executor('ray'))
    expected = [(0, 1, 'cpu'), (1, 1, 'cpu')]
    assert [(n, threads, device) for n, _, threads, device in found] == expected
    with pytest.raises(JobError, match=r"fail_at_one\('.*', 1\) failed: .*this and that"):
        on(tmp_path, errands.fail_at_one, executor=Executor('ray', workers=1))
    assert errands.times(tmp_path, 2) == 0
    with pytest.raises(JobError, match=r"suicide\('.*', 1\) failed: it lost its worker 1 times"):
        on(tmp_path, errands.suicide, (1,), Executor('ray', retries=0))
    with pytest.raises(ValueError, match='no GPU is seen'):
        on(tmp_path, errands.report, executor=Executor('ray'), device='cuda')
    assert joined.is_initialized()


def test_a_stopped_run_takes_its_jobs_on_ray_along(ray, tmp_path):
    with driver(tmp_path, Executor('ray')) as process:
        ran = begun_by(tmp_path, (0, 1))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert 'KeyboardInterrupt' in said and process.returncode != 0
    assert all(map(gone, ran)) and errands.times(tmp_path, 2) == 0


@pytest.mark.skipif(not has_ray, reason='needs ray')
def test_without_a_cluster_the_way_to_one_is_told(monkeypatch):
    import ray

    def none(*args, **kwargs):
        raise ConnectionError('Could not find any running Ray instance')

    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    monkeypatch.setattr(ray, 'init', none)
    with pytest.raises(ConnectionError, match='ray start --head'):
        run_jobs(errands.fail_at_one, [('', 0)], Executor('ray'))
