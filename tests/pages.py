"""Runs pages in forks of one process that has imported Unsloth, so that not each of them imports it for ten seconds.

A page sees none of that: what Unsloth has brought along is hidden until the page starts the engine, and a page that imports transformers before it is refused as in a process of its own."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = 'transformers', 'trl', 'peft'  # What must not be there before Unsloth
HIDDEN = 'unsloth', 'unsloth_zoo', *FIRST

# ---- In the process that forks


def hide():
    "Take Unsloth and what must come after it away; starting the engine brings them back"
    from unsloth_nb.core import engine

    kept = {n: m for n, m in sys.modules.items() if n.split('.')[0] in HIDDEN}
    for n in kept:
        del sys.modules[n]
    engine._import_unsloth = lambda: sys.modules.update(kept)


def run_page(nb, skip, force, out):
    "In the fork: one page from top to bottom; the process ends as that of a page does"
    fd = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
    for n in (1, 2):
        os.dup2(fd, n)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(Path(nb).parent)
    sys.argv = ['-c', nb]
    hide()
    from nbdev.test import test_nb

    passed, _ = test_nb(nb, skip_flags=skip, force_flags=force, basepath=str(ROOT), cell_timing_min=5)
    sys.exit(not passed)


def wait(pid, seconds):
    "Exit code of a fork, which is killed when it takes too long"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return 124


def main():
    import nbdev.test  # noqa: F401
    from unsloth_nb.core.engine import start_engine

    sys.path[0] = ''
    start_engine()
    gc.collect()
    gc.freeze()  # Else each fork would copy what the collector looks at
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = asked.pop('seconds')
        if not (pid := os.fork()):
            run_page(**asked)
        print(wait(pid, seconds), flush=True)


# ---- In the tests


class Pages:
    "The process that forks, started by the first page that asks for it"

    def __init__(self):
        self.process = None

    def run(self, nb, skip, force, env, seconds=1800):
        "(exit code, what it printed) of a page"
        if not self.process:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
            )
        with tempfile.TemporaryDirectory() as d:
            out = Path(d) / 'out'
            print(
                json.dumps(dict(nb=str(nb), skip=skip, force=force, out=str(out), seconds=seconds)),
                file=self.process.stdin,
                flush=True,
            )
            code = self.process.stdout.readline()
            said = out.read_text(errors='replace') if out.exists() else ''
        return (int(code) if code.strip() else 'none: the process that forks has ended'), said

    def stop(self):
        if not self.process:
            return
        self.process.stdin.close()
        self.process.wait(30)


if __name__ == '__main__':
    main()
