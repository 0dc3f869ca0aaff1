"Training in several real processes: the same losses as one, whatever is killed, stopped or raised on the way"

import os
import signal
import subprocess
import sys
import time

import pytest
from fastcore.basics import AttrDict

from unsloth_nb.runs import attempts  # noqa: F401 (Run.stop)
from unsloth_nb.training.launching import first_failure
from unsloth_nb.core.settings import settings
from unsloth_nb.planning.plan import make_plan
from unsloth_nb.training.resuming import PassOrder
from unsloth_nb.runs.run import Run, RunError, read_json, start_run, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob

pytestmark = pytest.mark.slow
SMALL = dict(
    max_rows=30,
    test_size=2,
    max_seq_length=256,
    batch_size=8,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    gradient_checkpointing=False,
    max_steps=6,
    save_steps=2,
    max_new_tokens=4,
)
LOSSES = 1e-5
NORMS = 1e-4  # What several processes may differ by from one: sums in another order


def curve(run, key='loss'):
    return [m[key] for m in run.metrics]


def alive(pid):
    try:
        return open(f'/proc/{pid}/stat').read().split(')')[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(run):
    return {int(f.parent.name[5:]): read_json(f)['pid'] for f in (run.path / 'launch').glob('rank-*/heartbeat.json')}


def wait(what, seconds=240):
    end = time.time() + seconds
    while time.time() < end:
        if got := what():
            return got
        time.sleep(0.05)
    pytest.fail(f'waited {seconds} s')


def command(*args, **kw):
    return subprocess.Popen(
        [sys.executable, '-c', 'from unsloth_nb.cli import main; main()', *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def launch(runs_dir, params, *more):
    "`unsloth-nb launch finetune` and the run that it makes"
    p = command(
        'launch', 'finetune', '--runs-dir', runs_dir, *more, *(w for k, v in params.items() for w in ('-p', f'{k}={v}'))
    )
    return p, Run(
        wait(
            lambda: (
                next((d for d in runs_dir.iterdir() if (d / 'job.json').exists()), None) if runs_dir.exists() else None
            )
        )
    )


@pytest.fixture(scope='module', autouse=True)
def one_thread(lib):
    "In every process alike: where a processor multiplies 16-bit numbers in tiles (Intel's AMX), the order of a sum depends on the number of threads"
    import torch

    was = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1')
        yield
    torch.set_num_threads(was)


@pytest.fixture(scope='module', params=['tiny', pytest.param('embedded', marks=pytest.mark.long)])
def small(request):
    "The job, on a random model of two layers; in the long tests on the embedded model too"
    return SMALL if request.param == 'embedded' else SMALL | dict(model=str(request.getfixturevalue('tiny')))


@pytest.fixture(scope='module')
def data(lib, small):
    return lib.load_data(FinetuneJob(**small))


@pytest.fixture(scope='module')
def alone(lib, data, small, tmp_path_factory):
    "One process: what all others are compared with"
    job = FinetuneJob(**small)
    model = lib.load_model(job, make_plan(job, data))
    run = lib.finetune(model, data, job, run=start_run(job, tmp_path_factory.mktemp('alone')))
    return AttrDict(model=model, run=run)


def same(run, alone):
    "The curve of one process, step by step"
    assert curve(run, 'step') == [1, 2, 3, 4, 5, 6] and curve(run, 'tokens') == curve(alone.run, 'tokens')
    assert curve(run) == pytest.approx(curve(alone.run), abs=LOSSES) and curve(run, 'grad_norm') == pytest.approx(
        curve(alone.run, 'grad_norm'), abs=NORMS
    )


def test_order_is_the_trainers(alone):
    "Rows come in the order in which one process has them, which accelerate makes from the seed and the number of the pass"
    import torch
    from accelerate.data_loader import SeedableRandomSampler

    theirs = SeedableRandomSampler(range(26), data_seed=3407, generator=torch.Generator())
    ours = PassOrder([5] * 26, 3407)
    for epoch in (0, 1, 2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(theirs) == list(ours)


def test_from_a_cell(lib, small, data, alone, tmp_path):
    "`finetune(…, devices=2)` on a model that is loaded; the pass over 30 rows ends in the middle of a step, and is filled up"
    job = FinetuneJob(**small)
    model = lib.load_model(job, make_plan(job, data))
    run = lib.finetune(model, data, job, run=start_run(job.replace(devices=2), tmp_path), devices=2)
    same(run, alone)
    trained = read_json(run.path / 'trained.json')
    assert (
        trained['ranks'] == 2
        and trained['rows'] == 30
        and len(trained['rank_peak_bytes']) == 2
        and trained['launch_seconds'] > 0
    )
    assert '2 rows without anything to train fill up each pass' in (run.path / 'progress.jsonl').read_text()
    assert not list((run.path / 'launch').glob('*.safetensors')) and not any(map(alive, pids(run).values()))
    theirs, ours = (dict(m.model.named_parameters()) for m in (alone.model, model))
    assert max(float((ours[n].detach() - p.detach()).abs().max()) for n, p in theirs.items() if p.requires_grad) < 1e-4


def test_killed_and_resumed(small, alone, tmp_path):
    "A rank is killed: the run fails with its number and signal, the other rank ends, and a second attempt goes on to the same curve"
    p, run = launch(tmp_path / 'runs', small, '--devices', 2)
    wait(lambda: len(run.metrics) >= 3 and pids(run))
    os.kill(pids(run)[1], signal.SIGKILL)
    said, _ = p.communicate(timeout=120)
    assert (
        p.returncode == 1 and 'rank 1 of 2 was killed by SIGKILL' in run.result['reason'] and 'rank 1 of 2' in said
    ), said[-2000:]
    wait(lambda: not any(map(alive, pids(run).values())), 10)
    again = command('run', '--resume', run.path)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    same(run, alone)
    assert (
        run.status == 'finished'
        and 'goes on after step' in (run.path / 'progress.jsonl').read_text()
        and run.result['metrics']['training']['ranks'] == 2
    )
    assert (run.path / 'attempts' / '1' / 'launch' / 'rank-1' / 'log.txt').exists()


def test_sharded_and_stopped(small, alone, tmp_path):
    "FSDP2: a request to stop reaches all ranks; its checkpoint holds whole tensors, from which one process goes on when it is allowed to"
    p, run = launch(tmp_path / 'runs', small, '--devices', 2, '--parallel', 'fsdp')
    wait(lambda: len(run.metrics) >= 2)
    run.stop('a test')
    said, _ = p.communicate(timeout=200)
    assert p.returncode == 3 and run.status == 'interrupted' and 'a test' in run.result['reason'], said[-2000:]
    again = command(
        'run', '--resume', run.path, '--allow', 'gradient_accumulation_steps', '-p', 'devices=1', '-p', 'parallel=auto'
    )
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    same(run, alone)


def test_nobody_is_left_behind(small, tmp_path, no_forks):
    "The process that asked is killed with its kernel: torchrun and all ranks end by themselves"
    p, run = launch(tmp_path / 'runs', small | dict(max_steps=500), '--devices', 2)
    wait(lambda: run.metrics and len(pids(run)) == 2)
    kernel = read_json(run.path / 'heartbeat.json')['pid']
    ranks = pids(run)
    for pid in (p.pid, kernel):
        os.kill(pid, signal.SIGKILL)
    wait(lambda: not any(map(alive, ranks.values())), 15)
    steps = len(run.metrics)
    time.sleep(3)
    assert len(run.metrics) == steps


@pytest.mark.long
def test_two_machines(small, alone, tmp_path):
    "Two launches that meet on loopback, one rank each, write one run; a signal to the second stops both with a checkpoint, from which both go on"
    import socket

    def free(port):
        with socket.socket() as s:
            return s.connect_ex(('127.0.0.1', port))

    place = f'127.0.0.1:{next(p for p in range(20000 + os.getpid() % 5000, 30000) if free(p))}'  # Below those that other processes are given
    first, run = launch(tmp_path / 'runs', small, '--devices', 1, '--nodes', 2, '--rendezvous', place)
    second = command(
        'launch',
        'finetune',
        '--devices',
        1,
        '--nodes',
        2,
        '--rendezvous',
        place,
        '--runs-dir',
        tmp_path / 'runs',
        '--node-rank',
        1,
    )
    wait(lambda: len(run.metrics) >= 2)
    second.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=200)
    assert first.returncode == 3 and 'stopped by SIGTERM' in run.result['reason'] and len(run.metrics) < 6, said[-2000:]
    assert second.wait(60) == 0
    again = command('run', '--resume', run.path, env=os.environ | dict(UNSLOTH_NB_RENDEZVOUS=place))
    wait(lambda: run.status == 'running')
    second = command('launch', 'join', run.path)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    assert second.wait(60) == 0 and f'takes part in {run.name}' in second.stdout.read()
    same(run, alone)
    assert run.result['metrics']['training']['ranks'] == 2


@pytest.mark.long
def test_broken_training_is_said_once(lib, tmp_path):
    "What all ranks raise is raised here as in one process, with the run's last numbers on record; on the embedded model, since the tiny one does not explode"
    from unsloth_nb.training.guards import TrainingError

    job = FinetuneJob(**SMALL | dict(learning_rate=1.0, save_steps='auto', max_steps=20, devices=2))
    data = lib.load_data(job)
    run = start_run(job, tmp_path)
    model = lib.load_model(job, make_plan(job, data))
    examples = lib.make_examples(data.train, model.formatter, 256)
    with pytest.raises(TrainingError, match='exploded'):
        lib.train(model, examples, job, run)
    assert len(run.metrics) >= 3 and first_failure(run)['type'] == 'TrainingError'


REPORT = """Failures:
[1]:
  time      : 2026-11-29_16:36:18
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 11787)  (SIGKILL)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_16:35:48
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 11788)  (SIGKILL)
  error_file: <N/A>
"""


def test_the_rank_that_hung_is_not_blamed(tmp_path):
    "torchrun kills a rank that waits for the lost one and does not end on SIGTERM; the one killed first is named"
    (tmp_path / 'launch').mkdir()
    (tmp_path / 'launch' / 'torchrun-host.log').write_text(REPORT)
    assert first_failure(Run(tmp_path)) == dict(rank=1, signal='SIGKILL')


def test_what_a_killed_kernel_leaves(monkeypatch, tmp_path):
    "What a library of a rank has quoted is masked in its log, and the tokens of the rows are removed, by whoever concludes the run or goes on with it"
    from conftest import TOKEN
    from unsloth_nb.jobs import runner as jobs

    run = start_run(FinetuneJob(devices=2), tmp_path)
    home = run.path / 'launch'
    for d in ('rank-0', 'examples'):
        (home / d).mkdir(parents=True)
    logs = 'torchrun-host-1.log', 'rank-0/log.txt'
    for f in logs:
        (home / f).write_text(f'before {TOKEN} after')
    (home / 'weights.safetensors').touch()
    run.interrupt('a test')

    def no_kernel(*args):
        raise RuntimeError('a test')

    monkeypatch.setattr(jobs, 'execute', no_kernel)
    jobs.resume_run(run, show=False)
    aside = run.path / 'attempts' / '1' / 'launch'
    for f in logs:
        assert TOKEN not in (aside / f).read_text() and (aside / f).read_text().startswith('before')
    assert {p.name for p in aside.iterdir()} == {logs[0], 'rank-0'} and not home.exists()


def test_a_zombie_is_gone():
    "Where nobody waits for a killed kernel, it stays in the table of processes, and its ranks end all the same"
    import socket
    from unsloth_nb.training.worker import gone

    with subprocess.Popen(['sleep', '60']) as p:
        asked = dict(host=socket.gethostname(), pid=p.pid)
        assert not gone(asked, os.getppid())
        p.kill()
        wait(lambda: gone(asked, os.getppid()), 10)


def test_options_and_parameters(monkeypatch, tmp_path):
    "What is given by -p or in a file counts as much as an option; the same twice is refused"
    from typer.testing import CliRunner
    from unsloth_nb import cli

    got = []
    monkeypatch.setattr(
        cli,
        'run_job',
        lambda name, preset, file, runs_dir, **kw: got.append(
            cli.make_job(name, preset, file, **{k: kw[k] for k in kw if k in FinetuneJob.model_fields})
        ),
    )
    monkeypatch.setattr(cli, '_over', lambda run: None)
    (tmp_path / 'p.yaml').write_text('devices: 2\nnodes: 2\nparallel: fsdp\n')
    for args, want in (
        (['--devices', '8', '-p', 'parallel=fsdp'], (8, 1, 'fsdp')),
        (['-f', tmp_path / 'p.yaml', '--rendezvous', 'a:1'], (2, 2, 'fsdp')),
        (['-p', 'nodes=2', '--rendezvous', 'a:1'], ('auto', 2, 'auto')),
        ([], ('auto', 1, 'auto')),
    ):
        monkeypatch.setenv('UNSLOTH_NB_RENDEZVOUS', '')
        r = CliRunner().invoke(cli.app, ['launch', 'finetune', *map(str, args)], catch_exceptions=False)
        assert r.exit_code == 0 and (got[-1].devices, got[-1].nodes, got[-1].parallel) == want
    with pytest.raises(SpecError, match='by --devices and by -p'):
        CliRunner().invoke(cli.app, ['launch', 'finetune', '--devices', '2', '-p', 'devices=4'], catch_exceptions=False)


def test_who_may_take_part(tmp_path):
    "A run on one machine, one that is over, what an attempt before has left, and retries that nobody would join"
    from unsloth_nb.jobs.runner import resume_run, run_job
    from unsloth_nb.training.launching import find_launch, join

    with pytest.raises(SpecError, match='wait for them in vain'):
        run_job('finetune', runs_dir=tmp_path / 'none', retries=1, nodes=2, devices=2)
    runs = [start_run(FinetuneJob(devices=2, nodes=n), tmp_path) for n in (1, 2)]
    for run in runs:
        (run.path / 'launch').mkdir()
        write_json(
            run.path / 'launch' / 'launch.json', dict(rendezvous=settings().rendezvous, plan=dict(nodes=run.job.nodes))
        )
    with pytest.raises(RunError, match='trains on one machine'):
        join(runs[0])
    assert find_launch(tmp_path, 5).name == runs[1].name
    runs[1].interrupt('a test')
    with pytest.raises(RunError, match='is interrupted'):
        join(runs[1])
    with pytest.raises(SpecError, match='wait for them in vain'):
        resume_run(runs[1], retries=1)
    with pytest.raises(RunError, match='no run waits'):
        find_launch(tmp_path, 1)
    assert (
        not (runs[1].reopen().path / 'launch').exists()
        and (runs[1].path / 'attempts' / '1' / 'launch' / 'launch.json').exists()
    )


def test_a_request_to_stop_forbids_a_retry(lib, monkeypatch, tmp_path):
    "A rank that is lost after somebody has asked for an end does not bring another attempt"
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from unsloth_nb.training import trainer as training
    from unsloth_nb.training.launching import RankLost
    from unsloth_nb.jobs.supervising import Supervisor, reason

    run = start_run(FinetuneJob(**SMALL, devices=2), tmp_path)

    def lost(*args, **kw):
        run.stop('a test')
        raise RankLost('rank 1 of 2')

    monkeypatch.setattr(training, 'train_in_ranks', lost)
    model = AttrDict(plan=AttrDict(ranks=2, check_room=lambda *a: None))
    with pytest.raises(RankLost):
        lib.train(model, None, run.job, run)
    assert run.stop_asked() == 'a test'
    sup = Supervisor(run)
    ends = (PapermillExecutionError(1, 1, '', 'RankLost', '', []), DeadKernelError())
    assert [reason(e, sup)[2] for e in ends] == [True, True]
    sup.why = 'stopped by SIGINT'
    assert [reason(e, sup)[2] for e in ends] == [False, False]
