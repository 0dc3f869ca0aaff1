"""What survives: runs killed, stopped, starved of disk and damaged, and the stock trainer beside them, on a small real training.

    python benchmarks/survival.py [--only SECTION …] [--kills 20] [--kernel-kills 10] [--out FILE]

Sections: kills, one_save, failpoints, files, disk, notebooks, kernels, signals. A random model with the embedded tokenizer (two layers of width 64)
is trained for eight steps with a checkpoint after each; "the same" means that every loss, every gradient norm and all trained weights
after going on are the bits of a run that nobody disturbed. Children are forked after the libraries are imported. Run it alone, with
OMP_NUM_THREADS=1."""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
from unsloth_nb import (
    FinetuneJob,
    load_data,
    load_model,
    make_examples,
    make_plan,
    random_model,
    resume_run,
    run_job,
    start_engine,
    start_run,
    train,
)
from unsloth_nb.core.engine import device_info, quiet, versions

STEPS = 8
SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=49152,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


class Quiet:
    "A view that shows nothing"

    def show(self, progress, final=False):
        pass


def job(home, four_bit=False):
    return FinetuneJob(
        model=str(home / 'model'),
        max_rows=64,
        test_size=4,
        max_steps=STEPS,
        max_seq_length=256,
        learning_rate=1e-3,
        warmup_steps=1,
        save_steps=1,
        load_in_4bit=four_bit,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_new_tokens=8,
    )


def trace(run):
    return [(m['loss'], m['grad_norm']) for m in run.metrics]


def ours(home, path, four_bit):
    "Train, or go on, in a run directory; what came out goes into out.json"
    from unsloth_nb.training.resuming import weights_sha256
    from unsloth_nb.runs.run import RUN_DIR_VARIABLE

    j = job(home, four_bit)
    Path(path).mkdir(parents=True, exist_ok=True)
    os.environ[RUN_DIR_VARIABLE] = str(path)
    data = load_data(j)
    model = load_model(j, make_plan(j, data, runs_dir=home / 'none'))
    run = start_run(j)
    m = train(model, make_examples(data.train, model.formatter, j.max_seq_length), j, run, Quiet())
    Path(path, 'out.json').write_text(
        json.dumps(dict(trace=trace(run), weights=weights_sha256(model.model), train_loss=m['train_loss']))
    )


def stock(home, path, four_bit):
    "The same training by the stock trainer, which saves and resumes as it does"
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig, SFTTrainer
    from unsloth_nb.training.resuming import weights_sha256
    from unsloth_nb.training.trainer import trainer_arguments

    j = job(home, four_bit)
    data = load_data(j)
    model = load_model(j, make_plan(j, data, runs_dir=home / 'none'))
    from datasets import Dataset

    exs = make_examples(data.train, model.formatter, j.max_seq_length)
    args = trainer_arguments(j, model.plan, path) | dict(save_strategy='steps', save_steps=1)
    with quiet():
        t = SFTTrainer(
            model=model.model,
            processing_class=model.tok,
            train_dataset=Dataset(exs.table()),
            args=SFTConfig(**args),
            data_collator=DataCollatorForSeq2Seq(model.tok, padding=True, label_pad_token_id=-100),
        )
        out = t.train(resume_from_checkpoint=any(Path(path).glob('checkpoint-*')))
    logs = {m['step']: (m['loss'], m['grad_norm']) for m in t.state.log_history if 'loss' in m}
    Path(path, 'out.json').write_text(
        json.dumps(
            dict(
                trace=[logs[k] for k in sorted(logs)], weights=weights_sha256(model.model), train_loss=out.training_loss
            )
        )
    )


def forked(f, *args, kill_after=None, before=None, log=None):
    "Run in a child; its exit status, negative for a signal, and the seconds that it took"
    start = time.time()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if log:
                fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
            if before:
                before()
            f(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(max(0, kill_after - (time.time() - start)))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), time.time() - start


def read(path):
    return json.loads((Path(path) / 'out.json').read_text()) if (Path(path) / 'out.json').exists() else None


def judge(path, want, rc):
    "What became of a run that was gone on with"
    got = read(path)
    if rc or got is None:
        return 'crashed'
    if got == want:
        return 'the same'
    return (
        'the same steps, other figures'
        if got['trace'][-1] == want['trace'][-1] and got['weights'] == want['weights']
        else 'other bits'
    )


def count(names):
    return {n: names.count(n) for n in dict.fromkeys(names)}


def kills(home, a):
    "kill -9 at random moments, then going on"
    res = {}
    for bits, four in (('16 bit', False), ('NF4', True)):
        for name, f in (('ours', ours), ('stock', stock)):
            ref = home / f'{name}-{four}-ref'
            rc, took = forked(f, home, ref, four, log=home / 'log')
            if rc:
                raise RuntimeError((home / 'log').read_text()[-3000:])
            begin = took * 0.3
            ends = []
            r = random.Random(20)
            for i in range(a.kills):
                path = home / f'{name}-{four}-{i}'
                rc, _ = forked(f, home, path, four, kill_after=r.uniform(begin, took), log=home / 'log')
                (path / 'out.json').unlink(missing_ok=True)
                rc, _ = forked(f, home, path, four, log=home / 'log')
                ends.append(judge(path, read(ref), rc))
                shutil.rmtree(path, ignore_errors=True)
            res[f'{bits}, {name}'] = dict(kills=a.kills, **count(ends))
            print(bits, name, res[f'{bits}, {name}'], flush=True)
    return res


def undisturbed(home):
    "A whole run to compare with, and its directory"
    path = home / 'whole'
    if not read(path):
        rc, _ = forked(ours, home, path, False, log=home / 'log')
        if rc:
            raise RuntimeError((home / 'log').read_text()[-3000:])
    return path


class Die:
    "Ends the process at the n-th call of a function that makes something lasting"

    def __init__(self, n):
        self.left = n

    def wrap(self, f):
        def g(*args, **kw):
            if self.left == 0:
                os._exit(9)
            self.left -= 1
            return f(*args, **kw)

        return g

    def __call__(self):
        import safetensors.torch as st

        os.fsync, os.rename, os.replace, st.save_file = map(self.wrap, (os.fsync, os.rename, os.replace, st.save_file))


def failpoints(home, a):
    "The process ends at every write, flush and rename of saving: always, sooner or later in the run"
    want = read(undisturbed(home))
    ends = []
    n = 0
    calls = 400
    for n in range(0, calls, max(1, calls // a.points)):
        path = home / f'fail-{n}'
        rc, _ = forked(ours, home, path, False, before=Die(n), log=home / 'log')
        if rc == 0:
            break
        rc, _ = forked(ours, home, path, False, log=home / 'log')
        ends.append(judge(path, want, rc))
        shutil.rmtree(path, ignore_errors=True)
    return dict(points=len(ends), **count(ends))


def one_save(home, a):
    "The process ends at each call of a single save"
    from unsloth_nb.runs.checkpoints import newest_checkpoint
    from unsloth_nb.runs.run import Run

    src = undisturbed(home)
    left = []

    def save(path):
        import safetensors.torch as st
        from unsloth_nb.runs.checkpoints import write_whole
        import torch

        def write(d):
            for k in range(3):
                st.save_file({'w': torch.full((1000,), float(k))}, d / f'{k}.safetensors')

        write_whole(path / 'checkpoints' / 'step-000009', write, step=9)

    n = 0
    while True:
        path = home / f'save-{n}'
        shutil.copytree(src, path)
        rc, _ = forked(save, path, before=Die(n), log=home / 'log')
        got = newest_checkpoint(Run(path))
        left.append('the new one, whole' if got[1]['step'] == 9 else 'the one before, whole')
        shutil.rmtree(path)
        n += 1
        if rc == 0:
            break
    return dict(points=n, **count(left))


def files(home, a):
    "Every file of the newest checkpoint missing, cut or with one bit flipped"
    src = undisturbed(home)
    r = random.Random(3)
    ends = []
    newest = sorted((src / 'checkpoints').glob('step-*'))[-1].name
    want = read(src)
    from unsloth_nb.runs.checkpoints import CheckpointError, check_whole

    for f in sorted(p.name for p in (src / 'checkpoints' / newest).iterdir()):
        for how in ('missing', 'cut', 'bit flipped'):
            path = home / 'damaged'
            shutil.copytree(src, path)
            (path / 'out.json').unlink()
            p = path / 'checkpoints' / newest / f
            b = bytearray(p.read_bytes())
            if how == 'missing':
                p.unlink()
            elif how == 'cut':
                p.write_bytes(b[: r.randrange(len(b))])
            else:
                b[r.randrange(len(b))] ^= 1 << r.randrange(8)
                p.write_bytes(b)
            try:
                check_whole(p.parent)
                named = False
            except CheckpointError as e:
                named = f in str(e)
            rc, _ = forked(ours, home, path, False, log=home / 'log') if named else (1, 0)
            ends.append(f'named, {judge(path, want, rc)}' if named else f'not noticed: {f} {how}')
            shutil.rmtree(path)
    return dict(cases=len(ends), **count(ends))


def disk(home, a):
    "A disk of its own that is full at ten sizes, then larger (as root; else no file may grow beyond a size)"
    import subprocess

    whole = undisturbed(home)
    want = read(whole)
    ends = []
    total = sum(p.stat().st_size for p in whole.rglob('*') if p.is_file())

    def mount(*args):
        return os.geteuid() == 0 and subprocess.run(['mount', *args], capture_output=True).returncode == 0

    for i in range(10):
        path = home / f'disk-{i}'
        log = home / f'disk-{i}.log'
        size = 4096 * (4 + int(total * i / 11) // 4096)
        path.mkdir()
        real = mount('-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path))

        def small():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, resource.RLIM_INFINITY))

        rc, _ = forked(ours, home, path / 'run', False, before=None if real else small, log=log)
        said = any(w in log.read_text() for w in ('No space left', 'File too large', 'GB free'))
        torn = list(path.rglob('.saving-*'))
        if real:
            mount('-o', 'remount,size=100m', str(path))
        rc2, _ = forked(ours, home, path / 'run', False, log=home / 'log')
        ends.append(
            f"{'stopped, with the reason' if rc and said else 'no reason' if rc else 'had room'}{', left a torn folder' if torn else ''}; then {judge(path / 'run', want, rc2)}"
        )
        print(size, ends[-1], flush=True)
        if real:
            subprocess.run(['umount', str(path)])
    return dict(sizes=len(ends), full='a disk of that size' if real else 'no file may grow larger', **count(ends))


def notebooks(home, a):
    "kill -9 while a notebook of 30 MB is saved again and again"
    import nbformat
    from papermill.iorw import write_ipynb
    from unsloth_nb.jobs.supervising import write_notebook

    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell('1', outputs=[nbformat.v4.new_output('stream', text='x' * 30_000_000)])]
    )
    r = random.Random(5)
    res = {}

    def save(f, path):
        while True:
            f(nb, str(path))

    for name, f in (('ours', write_notebook), ('papermill', write_ipynb)):
        torn = 0
        for i in range(a.kills):
            path = home / f'{name}.ipynb'
            f(nb, str(path))
            forked(save, f, path, kill_after=r.uniform(0.2, 1.5), log=home / 'log')
            try:
                nbformat.read(path, 4)
            except Exception:
                torn += 1
        res[name] = dict(kills=a.kills, torn=torn)
        print(name, res[name], flush=True)
    return res


def _pid(run, step):
    "The kernel's process once it has done a step"
    from unsloth_nb.runs.run import read_json

    for _ in range(1200):
        b = read_json(run / 'heartbeat.json') if run.exists() else None
        if b and (b.get('step') or 0) >= step:
            return b['pid']
        time.sleep(0.05)
    raise RuntimeError('no step was done')


def _runs(root):
    return [p for p in root.glob('*-finetune-*')]


def disturbed(home, name, number, step, **kw):
    "A job whose kernel gets a signal after some step; the run"
    import threading

    root = home / name

    def send():
        while not _runs(root):
            time.sleep(0.05)
        os.kill(_pid(_runs(root)[0], step), number)

    threading.Thread(target=send, daemon=True).start()
    return run_job('finetune', runs_dir=root, show=False, **long_job(home) | kw)


def long_job(home):
    return job(home).replace(max_steps=200, save_steps=10).to_dict()  # Long enough for a signal to hit it


def kernels(home, a):
    "kill -9 of the kernel of a job under papermill, and one retry"
    whole = run_job('finetune', runs_dir=home / 'k', show=False, **long_job(home))
    ends = []
    r = random.Random(7)
    for i in range(a.kernel_kills):
        run = disturbed(home, f'k{i}', signal.SIGKILL, r.randrange(1, 150), retries=1)
        ends.append(
            'the same'
            if run.status == 'finished'
            and trace(run) == trace(whole)
            and run.attempt == 2
            and run.result['artifacts']['adapter']['adapter_model.safetensors']
            == whole.result['artifacts']['adapter']['adapter_model.safetensors']
            else f"{run.status} after {run.attempt}: {run.result.get('reason', 'other bits')}"
        )
        print(i, ends[-1], flush=True)
    return dict(kills=len(ends), **count(ends))


def signals(home, a):
    "SIGTERM, SIGINT and SIGSTOP to the kernel of a job"
    whole = run_job('finetune', runs_dir=home / 's', show=False, **long_job(home))
    res = {}
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
        run = disturbed(home, f's{int(s)}', s, 3, hang_after=12)
        said = f"{run.status}: {run.result['reason']}"
        run = resume_run(run, show=False)
        res[s.name] = dict(said=said, then='the same' if trace(run) == trace(whole) else 'other bits')
        print(s.name, res[s.name], flush=True)
    return res


SECTIONS = dict(
    kills=kills,
    one_save=one_save,
    failpoints=failpoints,
    files=files,
    disk=disk,
    notebooks=notebooks,
    kernels=kernels,
    signals=signals,
)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--points', type=int, default=40)
    p.add_argument('--kernel-kills', type=int, default=10)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    start_engine()
    from transformers import DataCollatorForSeq2Seq  # noqa: F401 (imported once, before the forks)
    import peft  # noqa: F401
    import trl  # noqa: F401

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        home = Path(tmp)
        os.environ['UNSLOTH_NB_RUNS_DIR'] = str(home / 'runs')
        random_model(SHAPE, home / 'model')
        res = dict(
            date=time.strftime('%Y-%m-%d'), device=device_info().name, versions=versions(), steps=STEPS, sections={}
        )
        if a.out and a.out.exists():
            res['sections'] = json.loads(a.out.read_text())['sections']
        for n in a.only:
            start = time.time()
            res['sections'][n] = SECTIONS[n](home, a)
            print(n, json.dumps(res['sections'][n]), f'{time.time() - start:.0f} s', flush=True)
            if a.out:
                a.out.write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
