"""Python runs this at the start of each process of the tests. One that would import Unsloth for ten seconds is forked from `server.py`, which has it.

The process itself stays: it passes signals on to the fork and ends as the fork ends; when it is killed, so is the fork."""

import os
import sys

PLACE = 'UNSLOTH_NB_TESTS_FORK'  # Environment variable with the server's socket; without it every process starts alone
MODULES = (
    'ipykernel_launcher',
    'unsloth_nb.training.worker',
    'unsloth_nb.jobs.benchmarking',
    'run_page',
)  # What is started by `python -m` and needs Unsloth


def asked_module():
    "(module, its arguments) of `python -m`"
    args = iter(sys.orig_argv[1:])
    for a in args:
        if a == '-m':
            return next(args, None), [*args]
        if not a.startswith('-') or a == '-c':
            break
    return None, []


def receive(connection, line=b''):
    "One line; empty when the other side has ended"
    while not line.endswith(b'\n') and (got := connection.recv(1)):
        line += got
    return line.decode().strip()


def stand_for_fork(place, module, args):
    "Have the work done by a fork; comes back where the server does not take it"
    import json
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(place)
    except OSError:
        return  # The tests are over, or a sandbox hides the socket
    request = json.dumps(
        dict(module=module, args=args, env=dict(os.environ), path=sys.path, cwd=os.getcwd(), umask=mask())
    ).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, 'big')], [0, 1, 2])
    connection.sendall(request)
    if not (pid := int(receive(connection) or 0)):
        return
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(s, lambda number, frame: os.killpg(pid, number))
    for fd in (0, 1, 2):
        os.close(fd)  # Whoever reads from a pipe sees its end when the fork has ended
    code = int(receive(connection) or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def mask():
    "The bits that new files do not get"
    os.umask(was := os.umask(0))
    return was


if place := os.environ.get(PLACE):
    module, args = asked_module()
    if module in MODULES:
        stand_for_fork(place, module, args)
