"Runs that are stopped, killed, starved and changed, on a small random model; the long campaign is `benchmarks/survival.py`."

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
import pytest

SMALL = dict(
    max_rows=24,
    test_size=4,
    max_steps=6,
    max_seq_length=256,
    learning_rate=1e-3,
    warmup_steps=1,
    save_steps=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_new_tokens=4,
)


def trace(run):
    return [(m['loss'], m['grad_norm']) for m in run.metrics]


def weights(model):
    from unsloth_nb.training.resuming import weights_sha256

    return weights_sha256(model.model)


class Still:
    "A view that shows nothing, and can act on a step"

    def __init__(self, at=None, act=None):
        self.at = at
        self.act = act

    def show(self, progress, final=False):
        if not final and progress.metrics[-1]['step'] == self.at:
            self.act()


class Lab:
    "Trains the small model in runs of one folder"

    def __init__(self, lib, model, home):
        self.lib = lib
        self.model = model
        self.home = home

    def train(self, run=None, stop_at=None, rows=None, watch=None, **kw):
        "Train, or go on; (model, run, metrics)"
        lib = self.lib
        job = self.lib.FinetuneJob(**dict(model=str(self.model), **SMALL) | kw)
        data = lib.load_data(job)
        model = lib.load_model(job, lib.make_plan(job, data, runs_dir=self.home / 'none'))
        run = run or lib.start_run(job, self.home)
        if watch:
            watch(model)
        m = lib.train(
            model,
            lib.make_examples(data.train[:rows], model.formatter, job.max_seq_length),
            job,
            run,
            Still(stop_at, lambda: run.stop('a test')),
        )
        return model, run, m

    def stopped(self, at, **kw):
        "A run that was asked to stop while it did step `at`"
        with pytest.raises(self.lib.Interrupted, match='go on with') as e:
            self.train(stop_at=at, **kw)
        return next(r for r in map(self.lib.Run, self.home.glob('*-finetune-*')) if r.name in str(e.value))


@pytest.fixture
def lab(lib, tiny, tmp_path):
    return Lab(lib, tiny, tmp_path)


WAYS = dict(
    plain={},
    nf4=dict(load_in_4bit=True),
    dropout=dict(lora_dropout=0.2, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    passes=dict(max_steps=None, num_train_epochs=2.5),
    grouped=dict(max_steps=None, num_train_epochs=2.5, group_by_length=True),
)


@pytest.mark.parametrize('at', [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize('way', WAYS)
def test_same_bits(lab, way, at):
    "Gone on after a stop: losses, gradient norms, weights and train_loss are those of a run that nobody stopped"
    kw = WAYS[way]
    if 'num_train_epochs' in kw:
        at *= 3  # In the second and the third pass
    model, whole, want = lab.train(**kw)
    run = lab.stopped(at, **kw)
    assert [m['step'] for m in run.metrics][-1] < want['steps']
    again, _, got = lab.train(run, **kw)
    assert trace(run) == trace(whole) and weights(again) == weights(model)
    assert (got['train_loss'], got['steps'], got['tokens']) == (want['train_loss'], want['steps'], want['tokens'])


def test_between_logged_steps(lab):
    "A stop between two logged steps: the sums go on, so that train_loss and weights are the same"
    kw = dict(logging_steps=4, save_steps=4, max_steps=8)
    model, whole, want = lab.train(**kw)
    run = lab.stopped(4, **kw)
    assert run.metrics[-1]['step'] == 5
    again, _, got = lab.train(run, **kw)
    assert weights(again) == weights(model) and got['train_loss'] == pytest.approx(want['train_loss'], rel=1e-6)


def test_finished_does_nothing(lab):
    "A run that has done its steps does none when it is asked again"
    model, run, want = lab.train()
    before = run.metrics
    again, _, got = lab.train(run)
    assert got == want and run.metrics == before and weights(again) == weights(model)


def test_stopped_before_it_begins(lib, lab, tmp_path):
    "A request is kept until there is a step; one that comes after the training is refused"
    run = lib.start_run(lib.FinetuneJob(model=str(lab.model), **SMALL), tmp_path)

    def stop():
        p = cli('runs', 'stop', run.path)
        return p.communicate(timeout=60)[0], p.returncode

    assert 'will stop after its first step' in stop()[0]
    with pytest.raises(lib.Interrupted, match='stopped by unsloth-nb runs stop after step 1'), run.stage('training'):
        lab.train(run)
    run.stop('a test')
    run.interrupt('a test')
    lab.train(run.reopen())
    with run.stage('training'):
        pass
    said, code = stop()
    assert code == 2 and 'no training ahead' in said and not (run.path / 'stop.json').exists()


def test_stopped_at_the_end(lab):
    "Asked to stop during the last step, and again after a longer run was allowed: no step too many, no step too few"
    model, whole, want = lab.train()
    run = lab.stopped(5)  # It stops after the sixth, which is the last one
    again, _, got = lab.train(run)
    assert (
        got['steps'] == 6
        and weights(again) == weights(model)
        and trace(run) == trace(whole)
        and got['train_loss'] == want['train_loss']
    )
    run.interrupt('a test')
    run.reopen(max_steps=8)
    _, _, more = lab.train(run, max_steps=8)
    assert more['steps'] == 8 and [m['step'] for m in run.metrics] == list(range(1, 9))


CHANGES = dict(
    learning_rate=dict(learning_rate=2e-3),
    per_device_train_batch_size=dict(per_device_train_batch_size=2),
    r=dict(r=8),
    seed=dict(seed=1),
    data=dict(rows=12),
    model=dict(model='other'),
)


@pytest.mark.parametrize('change', CHANGES)
def test_changes_refused(lab, change):
    "What would make it another run is refused, with the difference; a model of the same shape by its hash"
    run = lab.stopped(2)
    kw = dict(CHANGES[change])
    before = trace(run)
    if change == 'model':
        kw['model'] = f'{lab.model}-other'
    with pytest.raises(lab.lib.CheckpointError) as e:
        lab.train(run, **kw)
    assert (
        f'{change}: ' in str(e.value)
        and ' then, ' in str(e.value)
        and f'--allow {change}' in str(e.value).replace('data,seed', 'seed')
        and trace(run) == before
    )


def test_hub_weights(lib, tmp_path, monkeypatch):
    "A model in the Hub's cache is known by the hashes that its files are named by"
    import huggingface_hub.constants as c
    from unsloth_nb.training.loading import base_fingerprint

    home = tmp_path / 'models--a--b'
    sha = 'ab' * 32
    for p, text in (
        (home / 'refs' / 'main', 'c0ffee'),
        (home / 'blobs' / sha, 'weights'),
        (home / 'snapshots' / 'c0ffee' / 'config.json', '{}'),
    ):
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text)
    (home / 'snapshots' / 'c0ffee' / 'model.safetensors').symlink_to(home / 'blobs' / sha)
    monkeypatch.setattr(c, 'HF_HUB_CACHE', str(tmp_path))
    assert base_fingerprint('a/b') == {'model.safetensors': sha} and base_fingerprint('a/c') == {}


def test_code_refused(lab, monkeypatch):
    "Another version of a package is a difference as well"
    from unsloth_nb.training import resuming

    run = lab.stopped(2)
    honest = resuming.code_hashes
    monkeypatch.setattr(resuming, 'code_hashes', lambda: honest() | dict(torch='0.1'))
    with pytest.raises(lab.lib.CheckpointError, match='code: torch: .* then, 0.1 now'):
        lab.train(run)


def test_allowed_change(lab):
    "What a person allows is done, and said in the run"
    run = lab.stopped(2)
    run.interrupt('a test')
    run.reopen(max_steps=8)
    _, _, got = lab.train(run, max_steps=8)
    assert got['steps'] == 8 and any(
        'max_steps: 6 then, 8 now' in p.get('note', '') for p in map(json.loads, (run.path / 'progress.jsonl').open())
    )


def test_damage_passed_over(lab):
    "A damaged newest checkpoint is named, and the one before is taken: the same bits"
    model, whole, _ = lab.train()
    run = lab.stopped(4)
    newest = sorted((run.path / 'checkpoints').iterdir())[-1]
    (newest / 'state.safetensors').write_bytes((newest / 'state.safetensors').read_bytes()[:-9])
    again, _, _ = lab.train(run)
    said = (run.path / 'progress.jsonl').read_text()
    assert (
        f'{newest.name}: state.safetensors has ' in said
        and 'goes on after step 4' in said
        and weights(again) == weights(model)
        and trace(run) == trace(whole)
    )


def test_rotation(lab):
    "The newest ones stay, and the best"
    _, run, _ = lab.train(max_steps=8, save_steps=1)
    losses = {m['step']: m['loss'] for m in run.metrics}
    have = sorted(int(p.name[5:]) for p in (run.path / 'checkpoints').iterdir())
    assert have == sorted({7, 8, min(losses, key=losses.get)})


def test_one_writer(lab):
    "A second process may not train into the same run"
    _, run, _ = lab.train(max_steps=1)
    code = f'from unsloth_nb.runs.run import Run\nfrom unsloth_nb.runs.checkpoints import only_writer\nimport time\nwith only_writer(Run({str(run.path)!r})): print("has it", flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == 'has it\n'
            with pytest.raises(lab.lib.runs.run.RunError, match=f'process {p.pid} '):
                lab.train(run)
        finally:
            p.kill()
    lab.train(run, max_steps=1)


def test_nan_stops(lab):
    "A gradient that is not a number at step 4: the step is not taken, and the checkpoint of step 2 stays"

    def spoil(model):
        p = next(p for p in model.model.parameters() if p.requires_grad)
        calls = []

        def hook(g):
            calls.append(1)
            return g * float('nan') if len(calls) == 4 else g

        p.register_hook(hook)
        lab.spoiled = model

    with pytest.raises(lab.lib.TrainingError, match='step 4: the gradient norm is nan'):
        lab.train(watch=spoil)
    run = lab.lib.Run(next(lab.home.glob('*-finetune-*')))
    assert [(m['step'], m['grad_norm']) for m in run.metrics][2:] == [
        (3, run.metrics[2]['grad_norm']),
        (4, 'nan'),
    ] and [p.name for p in (run.path / 'checkpoints').iterdir()] == ['step-000002']
    assert all(p.isfinite().all() for p in lab.spoiled.model.parameters() if p.requires_grad)
    _, _, m = lab.train(run)
    assert m['steps'] == 6


def test_explosion_stops(lib, trained):
    "A learning rate that blows the model up ends the run, with the reason"
    with pytest.raises(lib.TrainingError, match='exploded|exactly zero|is nan|is inf'):
        trained(learning_rate=1.0, max_steps=30, warmup_steps=0, lr_scheduler_type='constant', weight_decay=0.0)


def test_room(lab, tmp_path):
    "A disk that is too small, or a place that cannot be written, is found before training"
    _, run, _ = lab.train(max_steps=1)
    plan = lab.lib.make_plan(run.job, [[0] * 100] * 8)
    file = tmp_path / 'file'
    file.write_text('')
    with pytest.raises(lab.lib.SpecError, match='cannot be written'):
        plan.check_room(run.job, file)
    plan = replace(plan, disk=dict(plan.disk, checkpoint=10**18))
    with pytest.raises(lab.lib.SpecError, match='GB free, and up to'):
        plan.check_room(run.job, run.path)


@pytest.mark.slow
def test_room_estimate(trained, tmp_path):
    "Adapter, checkpoint and merged model take what the plan says, within a fifth"
    from unsloth_nb.export import artifacts as export
    from unsloth_nb.runs.run import read_json

    model, run, data = trained(max_steps=1)
    plan = read_json(run.path / 'plan.json')

    def size(d):
        return sum(p.stat().st_size for p in d.rglob('*') if p.is_file())

    have = dict(checkpoint=size(next((run.path / 'checkpoints').iterdir())))
    for to, write in dict(adapter=export.write_adapter, merged_16bit=export._write_merged).items():
        (tmp_path / to).mkdir()
        write(model, tmp_path / to)
        have[to] = size(tmp_path / to)
    for k, v in have.items():
        assert plan['disk'][k] == pytest.approx(v, rel=0.2), (k, v, plan['disk'])


def test_unwritable_runs_dir(tmp_path):
    "A runs directory under a file is refused before a kernel starts"
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.core.schema import SpecError

    (tmp_path / 'file').write_text('')
    with pytest.raises(SpecError, match='cannot be written'):
        run_job('finetune', runs_dir=tmp_path / 'file' / 'runs', show=False, max_rows=8, test_size=2)


def cli(*args, **kw):
    return subprocess.Popen(
        [sys.executable, '-c', 'from unsloth_nb.cli import main; main()', *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def params(model, **kw):
    return [x for k, v in (dict(model=model, **SMALL) | kw).items() for x in ('-p', f'{k}={v}')]


def wait_for_step(home, n):
    "The run under `home` and its kernel's process, once it has done a step"
    from unsloth_nb.runs.run import read_json

    for _ in range(2400):
        for p in home.glob('*-finetune-*'):
            b = read_json(p / 'heartbeat.json')
            if b and (b['step'] or 0) >= n:
                return p, b['pid']
        time.sleep(0.05)
    raise AssertionError(f'no step {n} within two minutes')


SLOWLY = dict(max_steps=200, save_steps=50)  # Long enough to be caught in the middle


@pytest.fixture(scope='session')
def whole(tiny, tmp_path_factory):
    "A job that nobody disturbs"
    from unsloth_nb.jobs.runner import run_job

    run = run_job(
        'finetune', runs_dir=tmp_path_factory.mktemp('whole'), show=False, **dict(model=str(tiny), **SMALL) | SLOWLY
    )
    assert run.status == 'finished', run.result
    return run


def adapter(run):
    return run.result['artifacts']['adapter']['adapter_model.safetensors']['sha256']


@pytest.mark.slow
def test_sigterm_and_resume(tiny, whole, tmp_path, no_forks):
    "SIGTERM to the runner: a checkpoint, exit code 3; `run --resume`: the same adapter as without it, and exit code 0"
    import nbformat
    from unsloth_nb.runs.run import Run

    p = cli('run', 'finetune', '--runs-dir', tmp_path, *params(tiny, **SLOWLY))
    path, _ = wait_for_step(tmp_path, 5)
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=120)[0]
    run = Run(path)
    assert p.returncode == 3 and run.status == 'interrupted' and 'stopped by SIGTERM' in run.result['reason'], out
    assert f'unsloth-nb run --resume {run.name}' in out and 5 <= run.metrics[-1]['step'] < 200
    nbformat.read(path / 'notebook.ipynb', 4)
    p = cli('run', '--resume', run.name, '--runs-dir', tmp_path)
    out = p.communicate(timeout=180)[0]
    assert p.returncode == 0 and run.status == 'finished', out
    assert trace(run) == trace(whole) and adapter(run) == adapter(whole) and 'base_evaluation: kept' in out
    assert (path / 'attempts' / '1' / 'notebook.ipynb').exists()


@pytest.mark.slow
def test_lost_terminal(tiny, tmp_path, no_forks):
    "The terminal of a run goes away: a checkpoint and a result, as after SIGTERM, although nobody reads what it prints"
    import fcntl
    import pty
    import termios
    from unsloth_nb.runs.run import Run

    def take_terminal():
        "Where the tests themselves run under nohup, SIGHUP would stay ignored"
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    command = [sys.executable, '-c', 'from unsloth_nb.cli import main; main()', 'run', 'finetune']
    p = subprocess.Popen(
        [*command, '--runs-dir', tmp_path, *params(tiny, **SLOWLY)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    path, _ = wait_for_step(tmp_path, 5)
    os.close(ours)
    assert p.wait(timeout=120) == 3
    run = Run(path)
    assert run.status == 'interrupted' and 'stopped by SIGHUP' in run.result['reason']
    assert 5 <= run.metrics[-1]['step'] < 200 and [*(path / 'checkpoints').iterdir()]


@pytest.mark.slow
def test_killed_and_retried(tiny, whole, tmp_path, no_forks):
    "kill -9 of the kernel, and one retry: the same adapter; the first notebook says where it ended"
    import nbformat
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.runs.run import read_json

    def kill():
        os.kill(wait_for_step(tmp_path, 60)[1], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    run = run_job('finetune', runs_dir=tmp_path, show=False, retries=1, **dict(model=str(tiny), **SMALL) | SLOWLY)
    assert (
        run.status == 'finished' and run.attempt == 2 and adapter(run) == adapter(whole) and trace(run) == trace(whole)
    )
    first = run.path / 'attempts' / '1'
    assert 'the kernel died' in read_json(first / 'result.json')['reason']
    nb = nbformat.read(first / 'notebook.ipynb', 4)
    states = [c.metadata.papermill.status for c in nb.cells if c.cell_type == 'code']
    assert (
        states.count('failed') == 1
        and set(states[states.index('failed') + 1 :]) == {'pending'}
        and 'completed' in states
    )


@pytest.mark.slow
def test_killed_after_a_request_to_stop(tiny, tmp_path, no_forks):
    "A kernel that dies before it has heard the request is not started again"
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.runs.run import Run

    def kill():
        path, pid = wait_for_step(tmp_path, 5)
        os.kill(pid, signal.SIGSTOP)
        Run(path).stop('a test')
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    run = run_job('finetune', runs_dir=tmp_path, show=False, retries=1, **dict(model=str(tiny), **SMALL) | SLOWLY)
    assert (
        run.status == 'failed'
        and run.attempt == 1
        and 'not tried again: a test' in (run.path / 'progress.jsonl').read_text()
    )


@pytest.mark.slow
def test_hang_and_timeout(tiny, tmp_path, no_forks):
    "A stopped kernel is found by its silence and killed; a time limit asks for a checkpoint"
    from unsloth_nb.jobs.runner import run_job, resume_run

    def stop():
        os.kill(wait_for_step(tmp_path, 5)[1], signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    run = run_job(
        'finetune',
        runs_dir=tmp_path,
        show=False,
        hang_after=12,
        **dict(model=str(tiny), **SMALL) | dict(max_steps=100000, save_steps=20),
    )
    assert run.status == 'failed' and 'no sign of life' in run.result['reason']
    run = resume_run(run, show=False, timeout=1)
    assert run.status == 'interrupted' and 'it took longer than its 1 s' in run.result['reason']


def test_request_that_was_not_heard_is_made_again(tmp_path, no_forks):
    "A kernel ignores SIGINT between two cells: one that goes on is asked again, one that ends its steps is not"
    from unsloth_nb.runs.run import Run, write_json
    from unsloth_nb.jobs.supervising import Supervisor

    deaf = "import signal,time; signal.signal(signal.SIGINT, lambda *a: print('asked', flush=True)); print('ready', flush=True)\nwhile True: time.sleep(1)"
    with subprocess.Popen([sys.executable, '-c', deaf], stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout.readline() == 'ready\n'
        sup = Supervisor(Run(tmp_path), timeout=1)
        calls = []
        for at, step in ((2, 10), (5, 90), (12, 200), (13, 202), (14, 203), (15, 204)):
            write_json(
                tmp_path / 'heartbeat.json',
                dict(time=sup.started + at, pid=kernel.pid, step=step, step_time=sup.started + at),
            )
            sup.look(sup.started + at)
            calls.append(sup.called)
        assert len({*calls[:4]}) == 1 and len({*calls}) == 2 and calls[3] != calls[4] and sup.asked == calls[0]
        assert [kernel.stdout.readline() for _ in range(2)] == ['asked\n'] * 2
        kernel.kill()


@pytest.mark.slow
def test_replay(whole):
    "A finished run, done again from its record: the same bits, exit code 0"
    p = cli('runs', 'replay', whole.name, '--runs-dir', whole.path.parent)
    out = p.communicate(timeout=180)[0]
    assert p.returncode == 0 and 'bit-identical: 200 steps and the adapter' in out, out


def test_refused(whole, tmp_path):
    "Options in the wrong place, unknown names, a finished run and none at all: one line, exit code 2"
    said = {}
    for args in (
        ('run', '-p', 'max_steps=5', 'finetune'),
        ('run', '--hang-after', '20', 'finetune'),
        ('run', '--resume', 'nosuch'),
        ('run', '--resume', 'latest', '--allow', 'learnin_rate'),
        ('run', '--resume', 'latest', '-p', 'max_steps=9'),
        ('runs', 'stop'),
    ):
        p = cli(*args, *(() if args[-1] == 'finetune' else ('--runs-dir', whole.path.parent)))
        said[args] = p.communicate(timeout=60)[0]
        assert p.returncode == 2 and said[args].startswith('unsloth-nb: ') and 'Traceback' not in said[args], said[args]
    for text, why in zip(
        said.values(),
        (
            'come after its name',
            'come after its name',
            'there is no run',
            "did you mean 'learning_rate'",
            'takes over what it has',
            'nothing to stop',
        ),
    ):
        assert why in text


@pytest.mark.slow
def test_reuse(tiny, whole):
    "Another run of the edited job takes over what it need not do: training is not done again, the evaluation is"
    from unsloth_nb.jobs.runner import run_job

    run = run_job(
        'finetune',
        runs_dir=whole.path.parent,
        show=False,
        reuse=whole.name,
        **dict(model=str(tiny), **SMALL) | SLOWLY | dict(max_new_tokens=5),
    )
    said = (run.path / 'progress.jsonl').read_text()
    assert run.status == 'finished' and adapter(run) == adapter(whole)
    assert 'all 200 steps are done already' in said and 'evaluation: kept' not in said and 'adapter: kept from' in said
