"A process that is forked from the one with Unsloth behaves as one that starts from nothing: output, signals, death and environment"

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
import psutil
import pytest
from conftest import FORK, WANTED
from test_notebooks import write_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not WANTED, reason='forks are off: UNSLOTH_NB_FORKS=1')]


@contextmanager
def start(folder, *sources, **env):
    "A page of these cells as a process, which ends with the test"
    with subprocess.Popen(
        [sys.executable, '-m', 'run_page', write_page(folder, *sources), '', '', folder],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as p:
        try:
            yield p
        finally:
            p.kill()


WHO = 'import os,sys\nprint(os.getpid(), os.getppid(), file=open("who", "w"))'


def who(folder, process):
    "(id of the process that runs the page, its parent's), as soon as it has said so"
    while not (said := (folder / 'who').read_text() if (folder / 'who').exists() else '').endswith('\n'):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    return map(int, said.split())


def end(pid, seconds=20):
    "Wait until a process is gone"
    until = time.time() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.time() < until, f'{pid} is alive'
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_killed(tmp_path, monkeypatch, number):
    "A signal reaches the fork, and the process that stands for it ends of the same; when that one is killed, so is the fork"
    monkeypatch.chdir(tmp_path)
    with start(tmp_path, WHO, 'import time\ntime.sleep(600)') as p:
        pid, _ = who(tmp_path, p)
        assert pid != p.pid
        p.send_signal(number)
        assert p.wait(20) == -number
        end(pid)


def test_fork_is_killed(tmp_path, monkeypatch):
    "Whoever waits for a fork that is killed sees that"
    monkeypatch.chdir(tmp_path)
    with start(tmp_path, WHO, 'import time\ntime.sleep(600)') as p:
        os.kill(next(who(tmp_path, p)), signal.SIGKILL)
        assert p.wait(20) == -signal.SIGKILL


def test_interrupted(tmp_path, monkeypatch):
    "SIGINT interrupts the page in the fork, whose exit code says so"
    monkeypatch.chdir(tmp_path)
    with start(tmp_path, WHO, 'import time\ntime.sleep(600)') as p:
        who(tmp_path, p)
        p.send_signal(signal.SIGINT)
        said, _ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'nbdev-test interrupted' in said, said


@pytest.mark.parametrize('env', [{FORK: ''}, dict(HF_HUB_OFFLINE='0'), dict(TRANSFORMERS_VERBOSITY='info')], ids=str)
def test_alone(tmp_path, monkeypatch, env):
    "What libraries would read otherwise while they are imported starts from nothing; so does all that is not to be forked"
    monkeypatch.chdir(tmp_path)
    with start(tmp_path, WHO, **env) as p:
        assert [*who(tmp_path, p)] == [p.pid, os.getpid()]
        assert p.wait(120) == 0


def test_environment(tmp_path, monkeypatch):
    "Folder, environment and threads are those of who asked"
    monkeypatch.chdir(tmp_path)
    check = 'import os,torch\nassert os.environ["OF_THIS_TEST"]=="1" and torch.get_num_threads()==1'
    with start(tmp_path, WHO, check, OF_THIS_TEST='1', OMP_NUM_THREADS='1') as p:
        assert [*who(tmp_path, p)][1] not in (p.pid, os.getpid())
        assert p.wait(120) == 0, p.stdout.read()


def test_cut_off(tmp_path, monkeypatch):
    "Whoever is killed while he asks leaves the server as it is"
    for said in (b'', b'1', (1000).to_bytes(8, 'big') + b'{"module": '):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(os.environ[FORK])
            s.sendall(said)
    test_environment(tmp_path, monkeypatch)
