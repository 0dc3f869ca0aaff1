"A run made when all modules lay flat in one folder: it is still read, goes on to the same bits, chats and exports."

import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
import pytest
from safetensors.numpy import load_file
from unsloth_nb.core.engine import versions
from unsloth_nb.jobs.runner import resume_run
from unsloth_nb.runs.run import Run, list_runs, open_run

ARCHIVE = Path(__file__).parent / 'fixtures' / 'run_before_wings.tar.xz'


@pytest.fixture
def old(tmp_path):
    "The run as it was written, in a folder of its own"
    with tarfile.open(ARCHIVE) as t:
        t.extractall(tmp_path, filter='data')
    return Run(tmp_path / 'run-before-wings')


@pytest.fixture
def here(old):
    "Skips where the bits cannot be the same for reasons that are not ours"
    had = json.loads((old.path / 'env.json').read_text())['versions']
    libraries = 'torch', 'transformers', 'trl', 'peft', 'unsloth', 'unsloth_zoo', 'bitsandbytes', 'accelerate'
    other = [n for n in libraries if versions().get(n) != had[n]]
    if other:
        pytest.skip(f"the run was made with other versions of {', '.join(other)}")
    return old


def halfway(run):
    "The run as it was after its second step of four, when someone stopped it"
    for n in ('checkpoints/step-000004', 'adapter', 'stages'):
        shutil.rmtree(run.path / n)
    for n in ('result.json', 'trained.json', 'samples.jsonl', 'statistics.json'):
        (run.path / n).unlink()
    run.interrupt('stopped by someone')
    return run


def processor(run):
    "(its name, threads) of the machine that has trained last"
    plan, capsule = (json.loads((run.path / f).read_text()) for f in ('plan.json', 'capsule.json'))
    return plan['device']['name'], capsule['threads']


def test_read(old):
    "Its record is read as any other"
    assert open_run('before-wings', old.path.parent).status == 'finished'
    assert [m['step'] for m in old.metrics] == [1, 2, 3, 4] and old.job.target_modules == ['q_proj']
    assert 'before-wings' in repr(list_runs(old.path.parent))


@pytest.mark.slow
def test_goes_on(here, monkeypatch):
    "Stopped half way, it ends with the adapter that it had when nobody stopped it, and nothing has to be allowed"
    machine = processor(here)
    monkeypatch.setenv('OMP_NUM_THREADS', str(machine[1]))  # With others, sums differ in their last bits
    want = load_file(here.path / 'adapter' / 'adapter_model.safetensors')
    losses = [m['loss'] for m in here.metrics]
    run = resume_run(halfway(here), show=False)
    assert run.status == 'finished', run.result['reason']
    assert any(
        'goes on after step 2' in l.get('note', '')
        for l in map(json.loads, (run.path / 'progress.jsonl').read_text().splitlines())
    )
    got = load_file(run.path / 'adapter' / 'adapter_model.safetensors')
    assert [m['loss'] for m in run.metrics] == pytest.approx(
        losses, rel=0.03
    )  # The band of the golden traces in bfloat16
    if processor(run) == machine:
        assert [m['loss'] for m in run.metrics] == losses and all((got[n] == want[n]).all() for n in want)


@pytest.mark.slow
def test_answers_and_exports(here, lib):
    "Loaded, it answers as its own record says, and its export passes"
    model = lib.load_run(here)
    want = [json.loads(l)['tuned'] for l in (here.path / 'samples.jsonl').read_text().splitlines()]
    answers = lib.generate(model, lib.held_out(here.job), lib.Sampling(max_new_tokens=here.job.max_new_tokens))
    assert [a.text for a in answers] == want
    assert lib.export_run(here, 'adapter').status == 'finished'


@pytest.mark.parametrize('kind,said', [('cpu', True), ('cuda', False)])
def test_other_threads(old, kind, said):
    "With other threads, sums on a CPU may end in other bits than before: the run says so"
    from unsloth_nb.training.trainer import _record_threads

    old.save('capsule', dict(threads=1000))
    _record_threads(old, {}, SimpleNamespace(device=SimpleNamespace(kind=kind)))
    assert ('threads: 1000 until here' in (old.path / 'progress.jsonl').read_text()) is said
    assert json.loads((old.path / 'capsule.json').read_text())['threads'] < 1000
