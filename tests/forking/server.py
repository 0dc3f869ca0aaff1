"""The process that has imported Unsloth and forks; `sitecustomize.py` asks it. It ends with its standard input.

A fork sees none of that: what Unsloth has brought along is hidden until the engine is started, and who imports transformers before it is refused as in a process of its own. Nothing runs on a GPU and no thread is alive before a fork."""

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading

FIRST = 'transformers', 'trl', 'peft'  # What must not be there before Unsloth
HIDDEN = 'unsloth', 'unsloth_zoo', *FIRST
# Environment variables that libraries read while they are imported: who has other ones starts alone
READ = 'HF_', 'HUGGINGFACE_', 'TRANSFORMERS_', 'UNSLOTH_', 'CUDA_', 'TORCH', 'PYTORCH_', 'TRITON_', 'ACCELERATE_'
EXCEPT = (
    'UNSLOTH_NB_',
    'HF_TOKEN',
    'HF_HUB_DISABLE_PROGRESS_BARS',
    'TORCHELASTIC_',
    'TORCH_NCCL_',
    'UNSLOTH_COMPILE_LOCATION',
)  # Read later, or by nothing that runs here
CACHE = 'UNSLOTH_NB_CACHE_DIR'


def read_at_import(env):
    "Those of `env` that the import has read"
    return {k: v for k, v in env.items() if k == CACHE or (k.startswith(READ) and not k.startswith(EXCEPT))}


class Engine:
    "Unsloth, imported for the first who asks"

    def __init__(self):
        self.env = read_at_import(os.environ)
        self.set = None  # What the import has set in the environment

    def suits(self, env):
        "Would a process with this environment import the same?"
        if self.set is None:
            self.load()
        read = read_at_import(env)
        same = all(v in (self.env.get(k), self.set.get(k)) for k, v in read.items())
        return same and self.env.keys() <= read.keys()

    def load(self):
        from unsloth_nb.core import engine

        was = dict(os.environ)
        engine.start_engine()
        self.set = {k: v for k, v in os.environ.items() if was.get(k) != v}
        import ipykernel.kernelapp  # noqa: F401
        import nbdev.test  # noqa: F401

        if (alive := threading.active_count()) > 1:
            raise RuntimeError(f'{alive - 1} threads are alive after the import, and a fork would lose them')
        gc.collect()
        gc.freeze()  # Else each fork would copy what the collector looks at


def hide():
    "Take Unsloth and what must come after it away; starting the engine brings them back"
    from unsloth_nb.core import engine

    kept = {n: m for n, m in sys.modules.items() if n.split('.')[0] in HIDDEN}
    for n in kept:
        del sys.modules[n]
    engine._import_unsloth = lambda: sys.modules.update(kept)


def read_request(connection):
    "(what is asked for, its standard input, output and error)"
    head, fds, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile('rb') as f:
        return json.loads(f.read(int.from_bytes(head, 'big'))), fds


def serve(listener, engine):
    "Fork for each request and pass exit codes back, until the tests end; in the fork: what it is asked to do"
    running = {}  # The process that asked, by the fork's id
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *running.values()], [], [], 0.05 if running else None)
        for pid, connection in [*running.items()]:
            if sys.stdin in ready or connection in ready:  # It was killed, or the tests are over
                kill(pid)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                answer(running.pop(pid), os.waitstatus_to_exitcode(status))
        if sys.stdin in ready:
            return None
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        try:
            request, fds = read_request(connection)
        except (OSError, ValueError):
            connection.close()  # Who asked was killed meanwhile
            continue
        if not engine.suits(request['env']):
            answer(connection, 0)
        elif pid := os.fork():
            running[pid] = connection
            lead_group(pid)
            connection.sendall(b'%d\n' % pid)
        else:
            lead_group(0)
            end_with_parent()
            for c in (*running.values(), connection, listener):
                c.close()
            return request | dict(fds=fds)
        for fd in fds:
            os.close(fd)


def lead_group(pid):
    "A fork leads its group, so that signals reach its children too; told by both sides, since either may come first"
    try:
        os.setpgid(pid, 0)
    except (ProcessLookupError, PermissionError):
        pass  # It has ended


def end_with_parent():
    "No fork outlives the server, as nobody would be told how it ended (Linux)"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill(pid):
    "A fork and its children, if there are any left"
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def answer(connection, number):
    "A last line, if anybody is there to read it"
    try:
        connection.sendall(b'%d\n' % number)
    except OSError:
        pass
    connection.close()


def become(engine, module, args, env, path, cwd, umask, fds):
    "In the fork: what `python -m` does"
    for n, fd in enumerate(fds):
        os.dup2(fd, n)
        os.close(fd)
    sys.stdin = open(0, closefd=False)
    os.umask(umask)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(engine.set | env)
    sys.path[:] = [cwd, *path]
    sys.argv[:] = [module, *args]
    import numpy as np
    import torch

    np.random.seed()
    if 'OMP_NUM_THREADS' in env:
        torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    hide()
    atexit.register(gc.unfreeze)  # As where it ends by itself: nothing is left for libraries to complain of
    runpy.run_module(module, run_name='__main__', alter_sys=True)


def main():
    listener = socket.socket(fileno=int(sys.argv[1]))
    engine = Engine()
    request = serve(listener, engine)
    if not request:
        os._exit(0)  # Nothing is left to do, and taking five thousand modules down takes a second
    become(engine, **request)


if __name__ == '__main__':
    main()
