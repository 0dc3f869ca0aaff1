"Runs and exports behind an OpenAI-compatible endpoint: real servers as processes on loopback, the real client."

import http.client
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
import pytest
from openai import BadRequestError, OpenAI

from unsloth_nb.training.loading import embedded_model
from unsloth_nb.runs.run import new_run_dir, open_run, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.export.serving import BACKENDS, ServeError, find_backend, find_served, serve, serve_command
from unsloth_nb.core.spec import FinetuneJob

QUESTION = [dict(role='user', content='What is the capital of France?')]


class Proxy(threading.Thread):
    "A proxy that refuses everybody and counts them: whoever leaves this machine comes by here"

    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.calls = []
        self.start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.socket.getsockname()[1]}'

    def run(self):
        while True:
            con, _ = self.socket.accept()
            self.calls.append(con.recv(200))
            con.close()


@pytest.fixture(scope='module')
def proxy():
    p = Proxy()
    patch = pytest.MonkeyPatch()
    for k in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        patch.setenv(k, p.url)
        patch.setenv(k.lower(), p.url)
    patch.setenv('NO_PROXY', '127.0.0.1')
    patch.setenv('no_proxy', '127.0.0.1')
    patch.delenv('HF_HUB_OFFLINE', raising=False)
    yield p
    patch.undo()


def servers():
    for b in ('transformers', 'xllamacpp', 'llama_cpp'):
        lacks = [m for m in BACKENDS[b][1] if not importlib.util.find_spec(m)]
        yield pytest.param(
            b,
            marks=[
                *([pytest.mark.llama_cpp] if b == 'llama_cpp' else []),
                pytest.mark.skipif(bool(lacks), reason=f'{b} needs {lacks}'),
            ],
        )


@pytest.fixture(scope='module', params=servers())
def service(request, proxy):
    what = embedded_model() if request.param == 'transformers' else request.getfixturevalue('gguf_file')
    with serve(what, backend=request.param, timeout=180) as s:
        yield s
    assert s.process.poll() is not None


@pytest.fixture
def client(service):
    return OpenAI(base_url=service.url, api_key='none', max_retries=0)


def ask(client, service, messages=QUESTION, **kw):
    return client.chat.completions.create(
        model=service.model, messages=messages, temperature=0, **dict(dict(max_tokens=16), **kw)
    )


# --- one server of each kind, one client


def test_lists_its_model_and_nothing_else(service, client):
    assert [m.id for m in client.models.list()] == [service.model] == service.models()
    assert str(Path.home()) not in service.model and service.model in repr(service)


def test_answers_and_stops_by_itself(service, client):
    r = ask(client, service)
    assert r.choices[0].message.content == 'The capital of France is Paris.'
    assert r.choices[0].finish_reason == 'stop' and r.usage.completion_tokens < 16


@pytest.mark.skipif(not shutil.which('curl'), reason='there is no curl')
def test_curl_line_works(service):
    "The printed line, pasted into a shell, asks the server; quotes in a question do not break it"
    line = service.curl("What's the capital of France?")
    r = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(r.stdout)['choices'][0]['message']['content'].strip(), r.stderr
    assert '127.0.0.1' in line and '\n' not in line


def test_stops_at_the_limit(service, client):
    r = ask(client, service, max_tokens=3)
    assert r.choices[0].finish_reason == 'length' and r.choices[0].message.content == 'The capital of'


def test_streams_what_it_answers(service, client):
    messages = [
        dict(role='system', content='Answer briefly.'),
        *QUESTION,
        dict(role='assistant', content='Paris.'),
        dict(role='user', content='Count from 1 to 9.'),
    ]
    chunks = list(ask(client, service, messages, stream=True, max_tokens=24))
    text = ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices)
    assert len(chunks) > 5 and text == ask(client, service, messages, max_tokens=24).choices[0].message.content


def test_unknown_model(service, client):
    "transformers refuses it; llama.cpp's servers have one model and answer with it"

    def call():
        return client.chat.completions.create(model='other/model', messages=QUESTION, temperature=0, max_tokens=16)

    if service.backend != 'transformers':
        assert 'Paris' in call().choices[0].message.content
    else:
        with pytest.raises(BadRequestError) as e:
            call()
        assert f"pinned to '{service.model}'; requested 'other/model'" in e.value.response.text


def test_other_origins_may_not_read(service):
    con = http.client.HTTPConnection(service.host, service.port)
    con.request('GET', '/v1/models', headers=dict(Origin='http://elsewhere.example'))
    allowed = con.getresponse().getheader('Access-Control-Allow-Origin')
    con.close()
    assert allowed in (None, 'none')


def test_nobody_leaves_this_machine(service, client, proxy):
    ask(client, service)
    assert proxy.calls == []


# --- adapters


@pytest.mark.slow
def test_adapter_of_a_run(finished_run, lib):
    "Without an export, on the base that it was trained on; answers as our own inference does"
    row = lib.held_out(finished_run.job, n=1)[0]
    messages = row.messages[:-1]
    with serve(finished_run, to='adapter', timeout=180) as s:
        assert (s.backend, s.model) == ('transformers', f'{finished_run.name}/adapter')
        r = ask(OpenAI(base_url=s.url, api_key='none'), s, messages, max_tokens=12)
    assert (
        r.choices[0].message.content
        == lib.generate(lib.load_run(finished_run), [messages], lib.Sampling(max_new_tokens=12))[0].text
    )


# --- ends


def gone(pid, within=15):
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


def test_ends_with_its_owner(gguf_file):
    "Killed without a chance to clean up, the owner leaves no server behind"
    code = 'import sys,time; from unsloth_nb.export.serving import serve; print(serve(sys.argv[1]).process.pid, flush=True); time.sleep(600)'
    owner = subprocess.Popen([sys.executable, '-c', code, gguf_file], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    assert not gone(pid, 0.5)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(pid)


def test_dies_by_itself_and_says_why(gguf_file):
    with serve(gguf_file) as s:
        os.kill(s.process.pid, signal.SIGKILL)
        with pytest.raises(ServeError, match='ended with -9'):
            s.wait()
    assert '(ended)' in repr(s) and s.models() == []


def test_taken_port(gguf_file):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        with pytest.raises(ServeError, match="(?s)xllamacpp ended with 1.*couldn't bind"):
            serve(gguf_file, port=taken.getsockname()[1], backend='xllamacpp')


def test_leaves_no_files(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    with serve(gguf_file) as s:
        log = Path(s.log.name)
    assert log.parent == tmp_path
    del s
    assert not list(tmp_path.iterdir())


# --- what is served


def put(parent, to, name):
    (parent / to).mkdir()
    (parent / to / name).write_text('{}')


def test_best_artifact_is_taken(tmp_path):
    path = new_run_dir('finetune', tmp_path)
    write_json(path / 'job.json', dict(job='finetune', parameters=FinetuneJob().to_dict()))
    run = open_run(path)
    with pytest.raises(SpecError, match=f'unsloth-nb export {run.name} --to merged_16bit'):
        find_served(run)
    put(path, 'adapter', 'adapter_config.json')
    assert find_served(run) == ('transformers', path / 'adapter', f'{run.name}/adapter')
    export = new_run_dir('export', tmp_path)
    write_json(export / 'job.json', dict(job='export', parameters=dict(run=run.name, to='merged_16bit')))
    put(export, 'merged_16bit', 'config.json')
    assert find_served(run)[2] == f'{run.name}/adapter'  # The export is not finished
    write_json(export / 'result.json', dict(status='finished'))
    assert find_served(run) == ('transformers', export / 'merged_16bit', f'{run.name}/merged_16bit')
    assert find_served(str(export))[1:] == (export / 'merged_16bit', f'{export.name}/merged_16bit')
    put(path, 'gguf_q8_0', 'model.gguf')
    assert find_served(run, backend='xllamacpp') == ('xllamacpp', path / 'gguf_q8_0', f'{run.name}/gguf_q8_0')
    with pytest.raises(SpecError, match=f'export {run.name} --to gguf_f16'):
        find_served(run, 'gguf_f16')
    with pytest.raises(SpecError, match='serves gguf, and this is adapter'):
        find_served(run, 'adapter', 'xllamacpp')


def test_names_are_plain(tmp_path):
    odd = tmp_path / 'my model--v1 (ü)'
    odd.mkdir()
    (odd / 'config.json').write_text('{}')
    assert find_served(odd)[2] == 'local/my-model-v1'


def test_command_can_be_typed(gguf_file):
    words = shlex.split(serve_command(gguf_file, port=8123, backend='xllamacpp'))
    assert words[0] == sys.executable and words[-5:] == [
        'xllamacpp',
        str(gguf_file),
        'local/model',
        '127.0.0.1',
        '8123',
    ]


def test_missing_servers_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda n, *a: None if n in ('fastapi', 'xllamacpp', 'llama_cpp') else find(n, *a)
    )
    monkeypatch.setenv('UNSLOTH_NB_VLLM', 'none')
    with pytest.raises(ServeError, match=r"pip install 'unsloth_nb\[serve\]'"):
        find_backend('adapter')
    with pytest.raises(
        ServeError, match=r"transformers needs fastapi; install with: pip install 'unsloth_nb\[serve\]'"
    ):
        find_backend('merged', 'transformers')
    with pytest.raises(ServeError, match=r"'unsloth_nb\[gguf\]', pip install 'llama-cpp-python\[server\]'"):
        find_backend('gguf')
