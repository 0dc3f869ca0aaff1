"Jobs on Modal: the real client against a server on loopback, which runs what it is asked to run and can lose its machines. And other machines: the Dockerfile, and the Slurm script among stand-ins for Slurm's programs."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ROOT, TOKEN

pytest.importorskip('modal')
from modal_server import TOKEN_ID, TOKEN_SECRET, ModalServer
from unsloth_nb.runs.checkpoints import CheckpointError, check_whole
from unsloth_nb.cloud import remote
from unsloth_nb.cloud.modal_request import HOME, CloudError, lock_file, request_job, uploads_of
from unsloth_nb.runs.run import Run, RunError, open_run, record_job, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import JOBS, FinetuneJob

TINY = dict(
    max_steps=6, max_rows=24, test_size=2, max_seq_length=256, max_new_tokens=8, save_steps=1, learning_rate=1e-3
)


def until(what, seconds=240):
    "Wait for something that is being done elsewhere"
    end = time.time() + seconds
    while not (got := what()):
        assert time.time() < end, 'waited too long'
        time.sleep(0.1)
    return got


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with ModalServer(tmp_path_factory.mktemp('modal'), secrets=['huggingface']) as s:
        old = {
            k: os.environ.get(k)
            for k in ('MODAL_SERVER_URL', 'MODAL_TOKEN_ID', 'MODAL_TOKEN_SECRET', 'MODAL_CONFIG_PATH')
        }
        os.environ.update(MODAL_SERVER_URL=s.url, MODAL_TOKEN_ID=TOKEN_ID, MODAL_TOKEN_SECRET=TOKEN_SECRET)
        yield s
        for k, v in old.items():
            os.environ.pop(k, None) if v is None else os.environ.update({k: v})


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    return tmp_path_factory.mktemp('here')


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    f = tmp_path_factory.mktemp('data') / 'rows.jsonl'
    f.write_text(
        '\n'.join(json.dumps(dict(prompt=f'What is {i} and {i}?', completion=f'It is {2 * i}.')) for i in range(40))
    )
    return f


@pytest.fixture(scope='module')
def sent(server, here, rows):
    "A submitted job whose machine was lost as soon as a checkpoint was committed, and went on by itself; (submission, lines said)"
    from unsloth_nb.cloud.submissions import submit

    said = []
    sub = submit(
        request_job(dataset=str(rows), gpu='T4', secrets=['huggingface'], timeout=3600, **TINY), here, said.append
    )
    call = server.calls[sub.call]
    done = server.volume.committed / 'runs' / sub.run_name / 'checkpoints'
    until(lambda: call.result or [*done.glob('step-*')])
    assert call.result is None, call.log
    call.kill()
    return sub, said


@pytest.mark.slow
def test_submitted_lost_continued_and_fetched(server, sent, here):
    from unsloth_nb.cloud.submissions import fetch, logs, status

    sub, said = sent
    with pytest.raises(CloudError, match='running'):
        fetch(sub.run_name, here)
    now = status('latest', here, timeout=400)
    call = server.calls[sub.call]
    assert (now.state, now.step, call.attempts) == ('finished', 6, 2), call.log
    torn = server.volume.committed / 'runs' / sub.run_name / 'adapter/adapter_model.safetensors'
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match='has changed'):
        fetch(sub.run_name, here)
    assert [p.name for p in here.iterdir()] == ['modal']  # Whole or not at all
    torn.write_bytes(whole)
    run = fetch('latest', here)
    assert run.status == 'finished' and open_run(run.name, here).job.max_steps == 6
    assert [m['step'] for m in run.metrics if 'loss' in m] == [1, 2, 3, 4, 5, 6]
    assert (
        len((run.path / 'attempts.jsonl').read_text().splitlines()) == 1
    )  # One attempt was lost, and what it had committed was taken up
    assert all(map(check_whole, [run.path / 'adapter', *(run.path / 'checkpoints').glob('step-*')])) and [
        *(run.path / 'checkpoints').glob('step-*')
    ]
    assert any(run.name in l for l in logs(run.name, here))
    with pytest.raises(CloudError, match='here already'):
        fetch(run.name, here)
    assert sorted(p.name for p in here.iterdir()) == sorted([run.name, 'modal'])


@pytest.mark.slow
def test_the_wire_carries_what_was_shown(server, sent, rows):
    sub, said = sent
    f = {
        r.function.function_name: r.function
        for r in server.asked('FunctionCreate')
        if r.function.function_name != 'serve'
    }
    assert set(f) == {'finetune', 'evaluate', 'export'} and {x.module_name for x in f.values()} == {
        'unsloth_nb.cloud.remote'
    }
    (mount,) = f['finetune'].volume_mounts
    assert (mount.mount_path, f['finetune'].timeout_secs, f['finetune'].single_use_containers) == ('/vol', 86400, True)
    arguments = {a.name: a for a in f['finetune'].function_schema.arguments}
    assert (
        list(arguments) == ['run_name', 'seconds', *JOBS['finetune'].model_fields]
        and arguments['max_seq_length'].has_default
    )
    how = server.asked('FunctionBindParams')[0]
    o = how.function_options
    assert (
        o.resources.gpu_config.gpu_type,
        o.resources.gpu_config.count,
        o.resources.milli_cpu,
        o.resources.memory_mb,
    ) == ('T4', 1, 4000, 16384)
    assert (o.timeout_secs, o.retry_policy.retries, list(o.secret_ids)) == (3600, 2, ['st-huggingface'])
    assert (
        sub.params['dataset'].startswith('/vol/data/')
        and (server.volume.committed / sub.params['dataset'].removeprefix('/vol/')).read_bytes() == rows.read_bytes()
    )
    assert any('deploying' in s for s in said) and any('uploading rows.jsonl' in s for s in said)


@pytest.mark.slow
def test_the_image_is_built_from_the_lock(server, sent):
    commands = [c for i in server.images.values() for c in i.dockerfile_commands]
    text = '\n'.join(commands)
    assert (
        re.search(r'FROM python:3\.\d+.*slim', text)
        and 'ENV HF_HOME=/vol/hf' in text
        and 'ENV UNSLOTH_DISABLE_STATISTICS=1' in text
    )
    (install,) = [c for c in commands if 'uv pip install' in c and 'requirements' in c]
    assert '--no-deps' in install
    assert lock_file().read_bytes() in [f.data for i in server.images.values() for f in i.context_files]
    names = {f.filename for m in server.mounts.values() for f in m.files}
    assert {
        f'{HOME}/{n}' for n in ('unsloth_nb/cloud/remote.py', 'nbs/jobs/finetune.ipynb', 'nbs/jobs/presets/llama3.yaml')
    } <= names


def test_the_name_of_the_app_changes_with_a_table(monkeypatch):
    "What decides is code and data: another YAML file next to a module makes another app"
    from unsloth_nb.cloud.modal_request import app_name

    before = app_name()
    read = Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda p: read(p) + (b'#' if p.name == 'axolotl.yaml' else b''))
    assert app_name() != before


@pytest.mark.slow
def test_no_token_leaves_or_stays(server, sent, here):
    for name, request, metadata in server.requests:
        raw = request.SerializeToString()
        assert TOKEN.encode() not in raw and TOKEN_SECRET.encode() not in raw, name
    for f in here.rglob('*'):
        if f.is_file():
            assert TOKEN.encode() not in f.read_bytes() and TOKEN_SECRET.encode() not in f.read_bytes(), f


@pytest.mark.slow
def test_evaluated_and_exported_over_there(server, sent, here):
    from unsloth_nb.cloud.submissions import gather, status, submit

    status(sent[0].run_name, here, timeout=400)
    asks = [
        request_job(
            'evaluate',
            gpu='L4',
            run=sent[0].run_name,
            test_size=2,
            bootstrap_samples=99,
            max_new_tokens=8,
            compare_base=False,
        ),
        request_job('export', gpu='L4', run=sent[0].run_name, to='adapter', check_rows=1),
    ]
    runs = gather([submit(a, here) for a in asks], here, 400)
    for a, run in zip(asks, runs.values()):
        assert getattr(run, 'status', run) == 'finished', server.calls[f'fc-{len(server.calls)}'].log
        assert run.kind == a.kind
    assert check_whole(runs[asks[1].run_name].path / 'adapter')
    assert [p.name for p in server.asked('AppPublish')].count(sent[0].app) == 1  # It was there already


def test_a_server_is_an_app_of_its_own_that_asks_for_a_token(server):
    from unsloth_nb.cloud.submissions import serve_remote

    assert serve_remote('20261125-1200-finetune-a1b2', 'adapter', 'A10') == 'http://127.0.0.1/web/v1'
    f = server.asked('FunctionCreate')[-1].function
    assert (
        f.function_name,
        f.webhook_config.web_server_port,
        f.webhook_config.requires_proxy_auth,
        f.resources.gpu_config.gpu_type,
    ) == ('serve', 8000, True, 'A10')
    assert dict(next(r for r in server.asked('SecretGetOrCreate') if r.env_dict).env_dict) == {
        'UNSLOTH_NB_SERVED': '20261125-1200-finetune-a1b2/adapter'
    }
    extra = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']['serve']
    assert any(all(w in c for w in extra) for i in server.images.values() for c in i.dockerfile_commands)


def test_a_job_that_was_stopped_is_over(server, tmp_path):
    from unsloth_nb.cloud.submissions import cancel, find_submission, status, submit

    sub = submit(request_job(gpu='T4', max_steps=2), tmp_path, lambda _: None)
    until(lambda: server.calls[sub.call].process)
    assert status(sub.run_name, tmp_path).state == 'running'
    assert cancel('latest', tmp_path) == sub == find_submission('latest', tmp_path)
    assert status(sub.run_name, tmp_path, timeout=20).over


def test_a_request_is_sent_once_and_with_a_place_for_its_record(server, tmp_path):
    from unsloth_nb.cloud.submissions import cancel, submit

    req = request_job(gpu='T4', max_steps=2)
    submit(req, tmp_path, lambda _: None)
    n = len(server.calls)
    with pytest.raises(SpecError, match='submitted already'):
        submit(req, tmp_path, lambda _: None)
    (tmp_path / 'file').touch()
    with pytest.raises(SpecError, match='runs_dir: .*file.* cannot be written'):
        submit(request_job(gpu='T4', max_steps=2), tmp_path / 'file', lambda _: None)
    assert len(server.calls) == n
    until(lambda: server.calls[f'fc-{n}'].process)
    cancel(req.run_name, tmp_path)


def test_what_is_refused_over_there_is_not_tried_again(server, tmp_path):
    from unsloth_nb.cloud.submissions import fetch, status, submit

    sub = submit(replace(request_job(gpu='T4', max_steps=2), params=dict(max_step=2)), tmp_path, lambda _: None)
    now = status(sub.run_name, tmp_path, timeout=120)
    assert (now.state, server.calls[sub.call].attempts) == ('failed', 1) and "did you mean 'max_steps'" in now.reason
    with pytest.raises(CloudError, match="left nothing on the disk: .*did you mean 'max_steps'"):
        fetch(sub.run_name, tmp_path)


def test_a_hub_that_is_away_is_worth_another_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(remote.Unfinished, match='Hub cannot be reached'):
        remote.run_remote('finetune', dict(dataset='me/rows'), 'x', tmp_path)


@pytest.fixture
def recorded(tmp_path):
    "A run that was begun, and a function that is its writer's beat"
    run = Run(tmp_path / 'runs/x')
    run.path.mkdir(parents=True)
    record_job(run.path, FinetuneJob())
    return run, lambda age=0: write_json(
        run.path / 'heartbeat.json', dict(time=time.time() - age, pid=1, host='elsewhere', step=3, step_time=None)
    )


def test_another_writer_is_seen_where_its_beats_come_by_reloading(recorded, tmp_path):
    run, beat = recorded
    beat(28.5)
    with pytest.raises(RunError, match='another machine'):
        remote.run_remote('finetune', {}, run.name, tmp_path, wait=3, reload=beat)


def test_beats_are_committed_and_reloaded(recorded, monkeypatch):
    run = recorded[0]
    commits = []
    with remote.keeping(run, lambda: commits.append(1), every=0.02, beat=0.1):
        until(lambda: len(commits) > 1, 10)
    disk = SimpleNamespace(commit=1, reload=2)
    monkeypatch.setenv(remote.KEPT, '/vol')
    monkeypatch.setattr(remote, '_volume', lambda: disk)
    monkeypatch.setattr(remote, 'run_remote', lambda *a, **k: (a[4], k['reload']))
    assert remote.finetune(run_name='x') == (1, 2)


def test_a_mistyped_file_is_not_taken_for_the_hub_s(rows, monkeypatch):
    monkeypatch.chdir(rows.parent.parent)
    here = rows.parent.name
    for k in ('dataset', 'test_dataset'):
        with pytest.raises(SpecError, match="did you mean 'rows.jsonl'"):
            request_job(**{k: f'{here}/rowz.jsonl'})
    with pytest.raises(SpecError, match='task_dir: there is no folder'):
        request_job('evaluate', gpu='L4', run='x', tasks=['t'], task_dir=f'{here}/tasks')
    assert request_job(dataset='yahma/alpaca-cleaned').params['dataset'] == 'yahma/alpaca-cleaned'


def test_a_link_keeps_its_name(rows, tmp_path):
    (tmp_path / 'abc123').write_bytes(rows.read_bytes())
    (tmp_path / 'rows.jsonl').symlink_to('abc123')
    params, (up,) = uploads_of(FinetuneJob(dataset=str(tmp_path / 'rows.jsonl')))
    assert params['dataset'].endswith('/rows.jsonl') and up.local.name == 'rows.jsonl'


def test_as_many_cards_as_there_are():
    big = dict(
        preset='llama-3.3-70b-instruct',
        load_in_4bit=False,
        dataset='yahma/alpaca-cleaned',
        max_steps=10,
        devices='auto',
    )
    with pytest.raises(SpecError, match='devices: 16; one machine has 8'):
        request_job(devices=16)
    with pytest.raises(SpecError, match='expected a card and a count'):
        request_job(gpu='H100:0')
    req = request_job(gpu='H100', **big)
    assert (
        req.gpu == next(o.gpu for o in req.offers.offers if o.card == 'H100') == f"H100:{req.params['devices']}"
        and req.params['devices'] > 1
    )
    with pytest.raises(SpecError, match='does not fit on T4, T4:2, T4:4'):
        request_job(gpu='T4', **big)


def test_the_stand_in_shows_no_half_commit(tmp_path, monkeypatch):
    from modal_proto import api_pb2 as pb

    s = ModalServer(tmp_path)
    copy = shutil.copytree
    s.blocks.server_close()
    s.volume.put('a', b'1')
    monkeypatch.setattr(shutil, 'copytree', lambda *a, **k: (time.sleep(0.5), copy(*a, **k)))
    threading.Thread(target=s.volume.commit).start()
    until(s.volume.lock.locked, 5)
    time.sleep(0.2)
    (answer,) = s.VolumeListFiles(pb.VolumeListFilesRequest(path='/'))
    assert [e.path for e in answer.entries] == ['a']


def test_without_the_package_the_extra_is_named(monkeypatch):
    from unsloth_nb.cloud.modal_request import make_app

    monkeypatch.setitem(sys.modules, 'modal', None)
    with pytest.raises(CloudError, match=r'unsloth_nb\[cloud\]'):
        make_app()
    assert 'uv_pip_install' in str(request_job(max_steps=2))  # What would be asked is known without it


def test_a_missing_secret_is_told_before_anything_is_uploaded(server, here, rows):
    from unsloth_nb.cloud.submissions import submit

    before = len(server.asked('VolumePutFiles'))
    with pytest.raises(CloudError, match="no secret 'wandb'"):
        submit(request_job(dataset=str(rows), secrets=['wandb'], **TINY), here)
    assert len(server.asked('VolumePutFiles')) == before


def test_without_a_token_nothing_is_sent(tmp_path):
    code = "from unsloth_nb.cloud.modal_request import request_job; from unsloth_nb.cloud.submissions import submit; submit(request_job(max_steps=2))"
    env = {**os.environ, 'MODAL_CONFIG_PATH': str(tmp_path / 'none.toml'), 'MODAL_SERVER_URL': 'http://127.0.0.1:9'}
    for k in ('MODAL_TOKEN_ID', 'MODAL_TOKEN_SECRET'):
        env.pop(k, None)
    r = subprocess.run([sys.executable, '-c', code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert 'modal token new' in r.stderr, r.stderr


# Other machines


def test_the_dockerfile_takes_the_lock_and_leaves_root():
    text = (ROOT / 'deploy/Dockerfile').read_text().replace('\\\n', ' ')
    steps = [l.split(None, 1) for l in text.splitlines() if l.strip() and not l.startswith('#')]
    known = {'FROM', 'RUN', 'ENV', 'COPY', 'USER', 'WORKDIR', 'VOLUME', 'STOPSIGNAL', 'ENTRYPOINT', 'CMD'}
    assert {k for k, _ in steps} <= known and steps[0][0] == 'FROM'
    for src in (w for k, v in steps if k == 'COPY' for w in v.split()[:-1]):
        assert (ROOT / src).exists(), src
    ignored = (ROOT / 'deploy/Dockerfile.dockerignore').read_text().splitlines()
    assert ignored[0] == '*' and {f'!{w}' for k, v in steps if k == 'COPY' for w in v.split()[:-1]} <= set(ignored)
    order = [f'{k} {v}' for k, v in steps]
    install = next(i for i, l in enumerate(order) if '--no-deps -r /src/requirements.lock' in l)
    user = next(i for i, l in enumerate(order) if l.startswith('USER trainer'))
    assert order.index('ENV UV_COMPILE_BYTECODE=1') < install < user and order[-2:] == [
        'ENTRYPOINT ["unsloth-nb"]',
        'CMD ["--help"]',
    ]
    for k, v in steps:
        if k == 'RUN':
            subprocess.run(['bash', '-n', '-c', v], check=True)
    from unsloth_nb.cloud.modal_request import UV

    assert f'uv=={UV}' in text


@pytest.fixture
def slurm(tmp_path):
    "The script among stand-ins for Slurm's programs and ours, which write down what they are called with"
    bin = tmp_path / 'bin'
    bin.mkdir()
    stubs = dict(
        scontrol='[ "$1" = show ] && echo node1 || echo "scontrol $*" >>"$CALLS"',
        scancel='echo "scancel $*" >>"$CALLS"; touch "$STOP"; sleep ${SLOW:-0}; exit ${REFUSED:-0}',
        srun='shift; SLURM_NODEID=${NODE:-0} exec "$@"',
        **{
            'unsloth-nb': 'echo "unsloth-nb $*" >>"$CALLS"; mkdir -p "$UNSLOTH_NB_RUNS_DIR/r"; touch "$UNSLOTH_NB_RUNS_DIR/r/job.json"; [ -z "$LONG" ] || until [ -e "$STOP" ]; do sleep 0.05; done; exit ${CODE:-0}'
        },
    )
    for n, body in stubs.items():
        (bin / n).write_text(f'#!/bin/bash\n{body}\n')
        (bin / n).chmod(0o755)
    base = {
        **os.environ,
        'PATH': f"{bin}:{os.environ['PATH']}",
        'CALLS': str(tmp_path / 'calls'),
        'STOP': str(tmp_path / 'stop'),
        'UNSLOTH_NB_RUNS_DIR': str(tmp_path / 'runs'),
    }
    base |= dict(
        SLURM_JOB_ID='123',
        SLURM_JOB_NODELIST='node[1-2]',
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_GPUS_ON_NODE='8',
        SLURM_NNODES='2',
    )

    def start(*args, **env):
        return subprocess.Popen(['bash', ROOT / 'deploy/finetune.slurm', *args], env={**base, **env})

    start.calls = lambda: (tmp_path / 'calls').read_text().splitlines() if (tmp_path / 'calls').exists() else []
    return start


def test_slurm_begins_and_after_a_requeue_goes_on(slurm):
    assert slurm('-p', 'model=a b', '-f', 'p.yaml').wait(20) == 0
    assert slurm('-p', 'model=a b').wait(20) == 0
    assert slurm('-p', 'model=a b', NODE='1', CODE='1').wait(20) == 1
    launch = 'unsloth-nb launch finetune --devices 8 --nodes 2 --rendezvous node1:20123 --node-rank'
    assert slurm.calls() == [
        f'{launch} 0 -p model=a b -f p.yaml',
        'unsloth-nb run --resume latest',
        f'{launch} 1 -p model=a b',
    ]


@pytest.mark.parametrize(
    'more', [{}, dict(REFUSED='1'), dict(SLOW='0.5'), dict(POSIXLY_CORRECT='1'), dict(SLOW='0.5', POSIXLY_CORRECT='1')]
)
def test_slurm_stops_with_a_checkpoint_and_requeues(slurm, more):
    "Also when srun is over before scancel is, and when scancel says that something went wrong"
    p = slurm(LONG='1', CODE='3', **more)
    until(slurm.calls, 20)
    p.send_signal(signal.SIGUSR1)
    assert p.wait(20) == 3
    assert slurm.calls()[1:] == ['scancel --signal=TERM 123', 'scontrol requeue 123']


def test_slurm_does_not_requeue_what_failed(slurm):
    p = slurm(LONG='1', CODE='1')
    until(slurm.calls, 20)
    p.send_signal(signal.SIGUSR1)
    assert p.wait(20) == 1 and not [c for c in slurm.calls() if 'requeue' in c]


def test_the_script_is_sound_and_its_options_exist(tool):
    script = ROOT / 'deploy/finetune.slurm'
    if check := shutil.which('shellcheck'):
        subprocess.run([check, script], check=True)
    subprocess.run(['bash', '-n', script], check=True)
    pytest.importorskip('unsloth_nb.training.launching')
    text = script.read_text()
    line = next(l for l in text.splitlines() if 'launch finetune' in l)
    shown = tool('unsloth-nb', 'launch', 'finetune', '--help')
    assert all(o in shown for o in re.findall(r'--[a-z-]+', line))
    assert '--resume' in tool('unsloth-nb', 'run', '--help')
