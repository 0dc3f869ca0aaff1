"Sweeps: refused before they start, carried out by worker processes that are killed, stopped and resumed."

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import pytest

from unsloth_nb.jobs import sweep_running
from unsloth_nb.cli import sweep_command
from unsloth_nb.runs.run import Run, append_line, read_json, read_lines, run_dirs, start_run, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob
from unsloth_nb.jobs.sweep_report import SweepResult, Trial, open_sweep, sweep_dirs
from unsloth_nb.jobs.sweep_running import Conductor, Search, end_leftovers, resume_sweep, run_sweep
from unsloth_nb.jobs.sweeping import Sweep, draw, forecast, read_sweep

HERE = Path(__file__).resolve().parent
PATHS = os.environ | dict(PYTHONPATH=f'{HERE}:{HERE.parent}')  # For a process that imports this file


def quick(path, pause=0.05):
    "A trial without a model: a real run that logs steps, stops when asked, goes on where it was, and fails at rank 666"
    run = Run(path)
    end_leftovers(run)
    if run.status == 'finished':
        return
    if run.result or (run.path / 'heartbeat.json').exists():
        run.reopen()
    run.start_heart()
    job = run.job
    done = len(run.metrics)
    if job.r == 666:
        run.fail('TrainingError: the loss has exploded')
        return
    with run.stage('training'):
        for step in range(done + 1, job.max_steps + 1):
            time.sleep(pause)
            run.log(step=step, loss=job.r / (10 + step))
            run.beat(step)
            if by := run.stop_asked():
                run.interrupt(f'stopped by {by} after step {step}, with a checkpoint')
                return
    run.finish(tuned=dict(loss=job.r / (10 + job.max_steps)))


def once(run):
    return [m['step'] for m in run.metrics] == list(range(1, run.job.max_steps + 1))


def when(ready, act, limit=60):
    "Act in a thread as soon as something is ready; joins with whether it was"

    def look():
        for _ in range(limit * 50):
            if got := ready():
                act(got)
                hit.append(got)
                return
            time.sleep(0.02)

    hit = []
    t = threading.Thread(target=look, daemon=True)
    t.start()
    return lambda: (t.join(), hit)[1]


def at_step(folder, n):
    "A function that gives the first run that has done n steps and is not over"
    return lambda: next((r for p in run_dirs(folder) if len((r := Run(p)).metrics) >= n and r.result is None), None)


def kill_writer(run):
    os.kill(read_json(run.path / 'heartbeat.json')['pid'], signal.SIGKILL)


@pytest.mark.parametrize(
    'bad, says',
    [
        (dict(grid=dict(r=[8]), search=dict(r=[8])), 'both are here'),
        (dict(), 'neither is here'),
        (dict(grid=dict(r=[8, 16]), trials=3), '2 here; leave trials out'),
        (dict(grid=dict(r=[8]), params=dict(r=16)), 'r is under params as well'),
        (dict(grid=dict(r=[])), 'the list is empty'),
        (dict(grid=dict(r=[8, '8'])), '8 is there twice'),
        (dict(search=dict(r=dict(low=4.5, high=8))), '4.5 is no whole number'),
        (dict(search=dict(r=dict(low=0, high=8))), 'r: got 0; expected a whole number'),
        (dict(search=dict(r=dict(low=4, high=32, step=2.5))), '2.5 is no whole number'),
        (dict(grid=dict(r=[True, 8])), 'r: got True; expected a whole number'),
        (dict(search=dict(learning_rate=dict(low=0, high=1, log=True))), 'log needs ends above 0'),
        (dict(grid=dict(r=[8]), method='tpe'), 'does not go with grid'),
        (dict(grid=dict(r=[8]), objective='tuned.exact_mach'), "did you mean 'exact_match'"),
        (dict(grid=dict(r=[8]), objective='tund.loss'), "did you mean 'tuned'"),
        (dict(job='evaluate', grid=dict(seed=[1]), objective='tasks.mine.acc_x'), 'say minimize or maximize'),
        (dict(grid=dict(r=[8]), name='../elsewhere'), 'take letters, digits'),
        (dict(grid=dict(dataset=['a', 'b']), pruner='median'), 'cannot be compared'),
        (
            dict(
                grid={f: [i / 1000 for i in range(1, 101)] for f in ('learning_rate', 'weight_decay', 'warmup_steps')}
            ),
            'more than 10,000',
        ),
        (dict(grid=dict(r=[8]), params=dict(dataset='https://x:secret@host/d')), 'token or a password'),
    ],
)
def test_refused(bad, says):
    with pytest.raises(SpecError) as e:
        Sweep(**bad)
    assert says in str(e.value)


def test_file(tmp_path):
    "A file is data: no code in it runs; what YAML takes for text is the number that the job reads"
    f = tmp_path / 'grid.yaml'
    f.write_text('grid: {learning_rate: [1e-4, 2e-4], load_in_4bit: [auto, false]}\nparams: {max_steps: 5}\n')
    s = read_sweep(f, 'finetune', dict(max_steps=7))
    assert (
        s.points()[0] == dict(learning_rate=1e-4, load_in_4bit='auto')
        and s.points()[-1] == dict(learning_rate=2e-4, load_in_4bit=False)
        and s.params['max_steps'] == 7
    )
    with pytest.raises(SpecError, match="of 'finetune', not of 'evaluate'"):
        read_sweep(_with(f, 'job: finetune'), 'evaluate')
    f.write_text(f'grid: !!python/object/apply:os.mkdir [{tmp_path}/made]')
    with pytest.raises(SpecError, match='not YAML'):
        read_sweep(f)
    assert not (tmp_path / 'made').exists()


def _with(f, line):
    f.write_text(f'{f.read_text()}{line}\n')
    return f


def test_search():
    "Random draws are known beforehand; those of TPE come one by one, within their ranges, and learn from what is told"
    ranges = dict(
        learning_rate=dict(low=1e-5, high=1e-2, log=True),
        r=dict(low=4, high=32, step=4),
        target_modules=[['q_proj'], ['q_proj', 'v_proj']],
    )
    a, b = (Sweep(search=ranges, method='random', trials=5, seed=s).points() for s in (1, 2))
    assert a != b and all(
        p['r'] % 4 == 0 and 4 <= p['r'] <= 32 and isinstance(p['target_modules'], list) for p in a + b
    )
    s = Sweep(
        search=dict(batch_size=[4, 6, 8], weight_decay=dict(low=0, high=1)), params=dict(gradient_accumulation_steps=2)
    )
    assert s.how == 'tpe' and s.points() is None and s.count() == 20
    assert Search(s).point(0) == Search(s).point(0)


def test_draws_that_the_job_refuses():
    "An optimizer step of 5 rows in parts of 4 is drawn again; where nearly all draws are like that, the ranges are refused"

    def make(low, high, part, **kw):
        return Sweep(
            search=dict(batch_size=dict(low=low, high=high)),
            params=dict(per_device_train_batch_size=part, max_rows=40, max_steps=2, test_size=4),
            **kw,
        )

    for m in ('random', 'tpe'):
        s = make(4, 12, 4, method=m)
        assert {p['batch_size'] for p in [*draw(s, 8), *(s.points() or [])]} == {4, 8, 12} and Search(s).point(0)[
            'batch_size'
        ] in (4, 8, 12)
    assert len(forecast(s, 1).rows) == 8
    with pytest.raises(SpecError, match='100 draws in a row were refused by finetune'):
        make(500, 1000, 500, method='random').points()


def test_hyperband_replayed():
    "Trials that are told again when a sweep goes on leave their losses at the steps where they were: a better one is not behind them"

    def losses(top):
        return [dict(step=s, loss=top / s) for s in range(1, 31)]

    search = Search(
        Sweep(
            search=dict(learning_rate=dict(low=1e-5, high=1e-2, log=True)), pruner='hyperband', prune_after=1, trials=15
        ),
        'again',
        5,
    )
    for i in range(5):
        search.end(Trial(i, dict(learning_rate=1e-4 * (i + 1)), '', 'finished', 1 + i / 10), losses(1 + i / 10))
    for i in range(5, 15):
        t = Trial(i, search.point(i), '')
        told = losses(0.9 - i / 100)
        assert not [why for n in range(1, 31) if (why := search.behind(t, told[:n]))]
        t.state = 'finished'
        t.value = told[-1]['loss']
        search.end(t)


def cli(*args, **kw):
    return subprocess.run(
        [sys.executable, '-c', 'from unsloth_nb.cli import main; main()', 'sweep', *map(str, args)],
        capture_output=True,
        text=True,
        **kw,
    )


def test_dry_run(tmp_path):
    "Shows the trials and starts nothing; a combination that the job refuses is refused with its place"
    f = tmp_path / 'grid.yaml'
    f.write_text('params: {max_steps: 4, test_size: 4}\ngrid: {learning_rate: [1e-4, 1e-3], r: [8, 16]}')
    r = cli('finetune', f, '--dry-run', '--runs-dir', tmp_path / 'runs', '-p', 'max_rows=40')
    assert (
        r.returncode == 0
        and '4 trials' in r.stdout
        and 'too few to tell' in r.stdout
        and not (tmp_path / 'runs').exists()
    ), r.stderr
    with pytest.raises(SpecError, match='scheduler: --dry-run predicts for this machine'):
        sweep_command([], 'finetune', f, scheduler='tcp://127.0.0.1:9', dry_run=True)
    r = cli('finetune', f, '-p', 'max_steps=0', '--runs-dir', tmp_path / 'runs')
    assert (
        r.returncode == 2
        and 'combination 1 (learning_rate=0.0001, r=8): max_steps: got' in r.stderr
        and not (tmp_path / 'runs').exists()
    )


GRID = Sweep(name='killed', params=dict(max_steps=30), grid=dict(r=[2, 4, 8, 16]))


def test_killed_worker(tmp_path):
    "A cluster of two worker processes, one killed in mid-trial: its trial goes on from where it was, the others are untouched"
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs='CRITICAL') as cluster:
        killed = when(at_step(tmp_path, 8), kill_writer)
        res = run_sweep(GRID, tmp_path, scheduler=cluster.scheduler_address, execute=quick, show=False)
        victim = killed()[0]
    assert [t.state for t in res.trials] == ['finished'] * 4 and [t.params['r'] for t in res.trials] == [2, 4, 8, 16]
    assert all(once(res.run_of(t)) for t in res.trials)
    assert [t.run for t in res.trials if res.run_of(t).attempt != 1] == [victim.name]
    assert res.best.number == 0 and res.status == 'finished'
    nb = json.loads((res.path / 'sweep.ipynb').read_text())
    assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert open_sweep('kill', tmp_path).path == res.path
    with pytest.raises(SpecError, match='exists already'):
        run_sweep(GRID, tmp_path, execute=quick)


def test_workers_with_threads(tmp_path):
    "Two trials in one process would mix, so a worker with two threads is refused"
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol='tcp',
        dashboard_address=None,
        silence_logs='CRITICAL',
    ) as cluster:
        with pytest.raises(SpecError, match='--nthreads 1'):
            run_sweep(GRID, tmp_path, scheduler=cluster.scheduler_address, execute=quick, show=False)
    assert not sweep_dirs(tmp_path)  # What was refused has not taken the name


@pytest.mark.parametrize(
    'how, says',
    [
        (dict(parallel=0), "parallel: got 0; expected 'auto', or a whole number"),
        (dict(parallel=2, scheduler='tcp://127.0.0.1:9'), 'parallel: got 2, and a scheduler'),
    ],
)
def test_refused_at_once(tmp_path, how, says):
    with pytest.raises(SpecError, match=says):
        run_sweep(GRID, tmp_path, execute=quick, show=False, **how)
    assert not sweep_dirs(tmp_path)


def orphaned(path):
    "A trial in a process of its own, which outlives its worker"
    subprocess.Popen(
        [sys.executable, '-c', 'import sys; from test_sweeping import quick; quick(sys.argv[1])', path], env=PATHS
    )
    while len(Run(path).metrics) < 2:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def test_given_up_too_soon(tmp_path, monkeypatch):
    "Dask gives a trial up with its worker; the trial is over when its run is"
    monkeypatch.setattr(sweep_running, 'write_sweep_notebook', lambda res: None)
    res = run_sweep(
        Sweep(name='orphan', params=dict(max_steps=60), grid=dict(r=[2]), retries=0),
        tmp_path,
        parallel=1,
        execute=orphaned,
        show=False,
    )
    assert [t.state for t in res.trials] == ['finished'] and once(res.run_of(res.trials[0]))


def broken(path):
    run = Run(path)
    run.start_heart()
    raise ValueError('no such engine')


def test_broken_engine(tmp_path):
    "A run that its engine has left open is over at once, though the worker lives on"
    res = run_sweep(Sweep(grid=dict(r=[2, 4]), max_failures=1), tmp_path, parallel=1, execute=broken, show=False)
    assert read_json(res.path / 'result.json')['seconds'] < 25
    assert [(t.state, t.reason) for t in res.trials] == [
        ('failed', 'its task ended: ValueError: no such engine')
    ] and res.status == 'failed'


def test_over_already(tmp_path, monkeypatch):
    "Who asks for an end when all trials are over interrupts nothing; a result that is missing or wrong is mended, whatever becomes of the notebook"

    def no_kernel(res):
        raise RuntimeError('no kernel')

    class Late:
        by = property(lambda _: next(('SIGINT' for p in run_dirs(tmp_path) if Run(p).result), None))

    monkeypatch.setattr(sweep_running, 'write_sweep_notebook', no_kernel)
    monkeypatch.setattr(sweep_running, 'stop_requests', lambda: nullcontext(Late()))
    res = run_sweep(
        Sweep(name='late', params=dict(max_steps=2), grid=dict(r=[2])), tmp_path, parallel=1, execute=quick, show=False
    )

    def again():
        return (
            resume_sweep('late', tmp_path, execute=quick, show=False).status,
            *(read_json(res.path / 'result.json')[k] for k in ('reason', 'seconds')),
        )

    assert res.status == 'finished' and read_json(res.path / 'result.json')['reason'] == ''
    write_json(res.path / 'result.json', dict(status='interrupted', reason='stopped by SIGINT', seconds=7))
    assert again() == ('finished', '', 7)
    (res.path / 'result.json').unlink()
    assert again() == ('finished', '', None)


@pytest.mark.slow
def test_lost_scheduler(tmp_path):
    "A scheduler that is killed ends the sweep; its trials can go on, and no more are started"

    def dask(*args):
        return subprocess.Popen(
            [
                Path(sys.executable).with_name('dask'),
                *args,
                '--host',
                '127.0.0.1',
                '--no-dashboard',
                '--scheduler-file',
                tmp_path / 'scheduler.json',
            ],
            env=PATHS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    started = [dask('scheduler', '--port', '0'), dask('worker', '--nthreads', '1')]
    try:
        assert when(lambda: (tmp_path / 'scheduler.json').exists(), lambda _: None)()
        killed = when(at_step(tmp_path, 5), lambda _: started[0].kill())
        res = run_sweep(
            GRID, tmp_path, scheduler=read_json(tmp_path / 'scheduler.json')['address'], execute=quick, show=False
        )
        assert killed()
    finally:
        for p in started:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
    assert [(t.state, t.reason) for t in res.trials] == [('interrupted', 'its scheduler was lost')]
    assert res.status == 'interrupted' and 'the scheduler was lost' in read_json(res.path / 'result.json')['reason']

    def gone():
        raise OSError('closed')

    Conductor(res, None, gone, quick, False).run(SimpleNamespace(by=None))  # Ends, with no trial alive


@pytest.mark.slow
def test_failures_and_pruning(tmp_path):
    "What fails stops nobody else; what is behind is stopped with a checkpoint; neither is repeated unless asked"
    s = Sweep(
        name='mixed',
        params=dict(max_steps=80),
        grid=dict(r=[4, 666, 2, 64, 1]),
        pruner='median',
        prune_after=2,
        prune_trials=2,
    )
    res = run_sweep(s, tmp_path, execute=quick, show=False)
    assert [t.state for t in res.trials] == ['finished', 'failed', 'finished', 'pruned', 'finished'], res
    pruned = res.run_of(res.trials[3])
    assert (
        pruned.status == 'interrupted'
        and 2 < len(pruned.metrics) < 80
        and 'the median pruner (training loss behind' in res.trials[3].reason
    )
    assert res.status == 'failed' and 'exploded' in str(res) and 'repeat them with --retry-failed' in str(res)
    lines = (res.path / 'trials.jsonl').read_text()
    assert (
        resume_sweep('mixed', tmp_path, execute=quick, show=False).status == 'failed'
        and (res.path / 'trials.jsonl').read_text() == lines
    )
    resume_sweep('mixed', tmp_path, retry_failed=True, execute=quick, show=False)
    assert (
        len(read_lines(res.path / 'trials.jsonl')) == len(lines.splitlines()) + 2
        and res.run_of(res.trials[1]).attempt == 2
    )


def test_everything_fails(tmp_path):
    s = Sweep(params=dict(r=666), grid=dict(seed=[1, 2, 3, 4, 5, 6]), max_failures=2)
    res = run_sweep(s, tmp_path, execute=quick, show=False)
    assert (
        [t.state for t in res.trials] == ['failed'] * 2
        and '2 trials in a row' in read_json(res.path / 'result.json')['reason']
        and res.status == 'failed'
    )
    assert '4 trials not carried out yet' in str(res)


SCRIPT = """
import sys
from functools import partial
from test_sweeping import Sweep,quick,resume_sweep,run_sweep
from unsloth_nb.jobs.sweep_report import sweep_dirs
if __name__ == '__main__':
    s = Sweep(name='long', params=dict(max_steps=60), grid=dict(r=[2, 4, 8]))
    how = dict(parallel=2, execute=partial(quick, pause=0.1))
    res = resume_sweep('long', sys.argv[1], **how) if sweep_dirs(sys.argv[1]) else run_sweep(s, sys.argv[1], **how)
    sys.exit(dict(finished=0, failed=1).get(res.status, 3))
"""


@pytest.mark.slow
def test_stopped_and_killed(tmp_path):
    "Ctrl-C, which a terminal sends to the workers as well, leaves checkpoints; the sweep itself killed leaves no worker behind; both go on"
    (tmp_path / 'script.py').write_text(SCRIPT)

    def start():
        return subprocess.Popen(
            [sys.executable, tmp_path / 'script.py', tmp_path],
            cwd=HERE,
            env=PATHS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(p):
        "What it has said, once it is over; nothing of it stays"
        try:
            return p.communicate(timeout=180)[0]
        finally:
            try:
                os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    p = start()
    stopped = when(at_step(tmp_path, 5), lambda run: os.killpg(p.pid, signal.SIGINT))
    said = end(p)
    assert stopped() and p.returncode == 3, said
    res = open_sweep('long', tmp_path)
    assert [t.state for t in res.trials] == ['interrupted'] * 2 and all(
        'stopped by SIGINT' in t.reason for t in res.trials
    ), said
    before = {t.run: len(res.run_of(t).metrics) for t in res.trials}
    p = start()

    def beats():
        return [(read_json(r.path / 'heartbeat.json') or {}).get('pid') for r in map(Run, run_dirs(tmp_path))]

    killed = when(
        lambda: all((r := Run(tmp_path / n)).attempt == 2 and len(r.metrics) > k for n, k in before.items()),
        lambda _: p.kill(),
    )
    end(p)
    assert killed() and p.returncode == -signal.SIGKILL
    resume_sweep('long', tmp_path, parallel=2, execute=quick, show=False)
    assert [t.state for t in res.trials] == ['finished'] * 3 and all(once(res.run_of(t)) for t in res.trials)
    assert [res.run_of(t).attempt for t in res.trials] == [3, 3, 1]
    assert not any(
        os.path.exists(f'/proc/{pid}/cmdline') and 'spawn' in Path(f'/proc/{pid}/cmdline').read_text()
        for pid in beats()
    )


def test_perplexity(tmp_path):
    "Its interval is one of perplexities, though the losses of the rows are compared; a seed has no edge to go beyond"
    s = Sweep(grid=dict(seed=[1, 2]), objective='tuned.perplexity')
    res = SweepResult(tmp_path / 'sweeps' / 'perplexity')
    res.path.mkdir(parents=True)
    write_json(res.path / 'sweep.json', dict(sweep=s.to_dict()))
    for i, p in enumerate(s.points()):
        run = start_run(FinetuneJob(**p), tmp_path)
        losses = [2 + i + (j + i) % 7 / 10 for j in range(35)]
        run.save('statistics', dict(rows_sha256='57c7', values=dict(tuned=dict(loss=losses)), weights={}))
        append_line(res.path / 'trials.jsonl', Trial(i, p, run.name, 'finished', math.exp(sum(losses) / 35)).to_dict())
        run.finish(tuned=dict(perplexity=math.exp(sum(losses) / 35)))
    head, best, _ = res._rows()
    low, high = map(float, best[3].strip('[]').split(', '))
    assert head[4] == 'to the best (loss)' and low < res.best.value < high
    assert [l.get_xdata()[0] for l in res.plot_intervals().lines if l.get_marker() == 'o'] == pytest.approx(
        [t.value for t in res.ranking]
    )
    assert not [*res._edges()]


@pytest.mark.slow
def test_real_trials(tiny, tmp_path, no_forks):
    "Real trials through the command line; the worker of the second is killed while it trains: its kernel ends, the run goes on from its checkpoint"
    import psutil

    (tmp_path / 'data.jsonl').write_text(
        ''.join(json.dumps(dict(prompt=f'Say {n}', completion=str(n))) + '\n' for n in range(24))
    )
    (tmp_path / 'grid.yaml').write_text(
        f'name: real\nparams: {{model: {tiny}, dataset: ./data.jsonl, batch_size: 2, test_size: 8, max_seq_length: 64, max_new_tokens: 4, save_steps: 1, warmup_steps: 1, learning_rate: 4e-3}}\ngrid: {{max_steps: [1, 40]}}\n'
    )

    def kill(run):
        kernel = psutil.Process(read_json(run.path / 'heartbeat.json')['pid'])
        kernel.parent().kill()
        gone.extend(psutil.wait_procs([kernel], 30)[0])

    gone = []
    killed = when(
        lambda: (r := at_step(tmp_path / 'runs', 2)()) and (r.path / 'checkpoints' / 'step-000002').is_dir() and r,
        kill,
        limit=300,
    )
    p = cli('finetune', tmp_path / 'grid.yaml', '--runs-dir', tmp_path / 'runs', cwd=tmp_path)
    assert p.returncode == 0, p.stdout + p.stderr
    victim = killed()[0]
    assert gone
    res = open_sweep('real', tmp_path / 'runs')
    assert [t.state for t in res.trials] == ['finished'] * 2 and [
        [m['step'] for m in res.run_of(t).metrics] for t in res.trials
    ] == [[1], [*range(1, 41)]]
    assert [res.run_of(t).attempt for t in res.trials] == [1, 2] and res.trials[1].run == victim.name
    assert (
        'goes on after step' in (victim.path / 'progress.jsonl').read_text() and (victim.path / 'report.html').exists()
    )
    assert res.best.number == 1 and 'max_steps=40' in p.stdout
    nb = json.loads((res.path / 'sweep.ipynb').read_text())
    outs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    assert sum('image/png' in o.get('data', {}) for o in outs) == 2 and not [
        o for o in outs if o['output_type'] == 'error'
    ]
    assert all(s.estimate.n == 8 for s in res.board().standings['loss'])
