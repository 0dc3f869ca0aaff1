"""Make `.venv` for this checkout: uv, one resolver call, and the torch build that fits the machine.

Standard library only; run it with any Python that the project supports: `python3 tools/setup_env.py`.
It does nothing, quickly, when nothing has changed since the last time; `--force` installs anyway. The variable
UNSLOTH_NB_VENV names another folder for the environment.

`--here [EXTRA,…]` installs the package, without what only its developers need, into the Python that runs this, as the
first cell of a tutorial does on Colab."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get('UNSLOTH_NB_VENV') or ROOT / '.venv').absolute()
PY, CLI = (VENV / 'bin' / n for n in ('python', 'unsloth-nb'))
STAMP = VENV / '.setup.json'
OLDEST, NEWEST = (3, 11), (3, 13)
START = time.time()


def say(msg):
    "One line of progress, with the seconds since the start"
    print('[setup %4.0fs] %s' % (time.time() - START, msg), flush=True)


def stop(msg):
    sys.exit('setup: ' + msg)


def check_python():
    "Stop unless this Python is one that the project supports"
    v = sys.version_info[:2]
    if not OLDEST <= v <= NEWEST:
        stop(
            'this is Python %d.%d (%s); the project needs Python 3.11, 3.12 or 3.13.\nName one: make setup PYTHON=python3.12'
            % (*v, sys.executable)
        )


def output(*cmd):
    "What `cmd` prints, or None when it cannot run or fails"
    try:
        r = subprocess.run(
            [str(c) for c in cmd], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True
        )
    except OSError:
        return None
    return r.stdout.strip() if r.returncode == 0 else None


def call(what, *cmd, **env):
    "Run `cmd` with its output shown; stop with `what` failed"
    r = subprocess.run([str(c) for c in cmd], env=dict(os.environ, **env), cwd=str(ROOT))
    if r.returncode:
        stop(
            '%s failed (exit %d); the lines above say why. Mend that, then run this again: it goes on from here.'
            % (what, r.returncode)
        )


def venv_version():
    "`3.12` for a working `.venv`, else None"
    return output(PY, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])')


def key(version, gpu):
    "Changes whenever the environment has to be installed again"
    parts = [
        (ROOT / 'pyproject.toml').read_bytes(),
        Path(__file__).read_bytes(),
        json.dumps([str(VENV), version, gpu]).encode(),
    ]
    return hashlib.sha256(b'\0'.join(parts)).hexdigest()


def stamped():
    "The key of the last finished set-up, or None"
    try:
        return json.loads(STAMP.read_text()).get('key') if CLI.exists() else None
    except (OSError, ValueError):
        return None


def can_install():
    "Is there a uv, or a pip in `.venv` to get one with?"
    return any(output(*c) for c in (['uv', '--version'], [PY, '-m', 'uv', '--version'], [PY, '-m', 'pip', '--version']))


def make_venv():
    "Create `.venv`, or a new one in place of one that does not work; returns its Python's version"
    v, script = venv_version(), VENV / 'bin' / 'activate'
    here = script.exists() and str(VENV) in script.read_text()
    if v and here and OLDEST <= tuple(map(int, v.split('.'))) <= NEWEST and can_install():
        return v
    if VENV.exists():
        say('.venv was moved, is incomplete or has another Python: making it anew')
    else:
        say('making .venv with Python %d.%d' % sys.version_info[:2])
    if shutil.which('uv'):
        call('uv venv', 'uv', 'venv', '-q', '--seed', '--clear', '--python', sys.executable, VENV)
    else:
        r = subprocess.run([sys.executable, '-m', 'venv', '--clear', str(VENV)])
        if r.returncode:
            stop(
                'this Python cannot make a virtual environment. Install its venv module (on Debian and Ubuntu the package python3-venv), or put uv on the PATH; then run this again.'
            )
    return venv_version()


def find_uv(py):
    "The command for uv: from the PATH, else installed for the interpreter `py`"
    found = shutil.which('uv')
    if found and output(found, '--version'):
        return [found]
    own = [str(py), '-m', 'uv']
    if not output(*own, '--version'):
        say('getting uv')
        call('pip install uv', py, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', 'uv')
    return own


def find_links():
    "Folders and pages that pip or uv was told to look in for wheels"
    uv = os.environ.get('UV_FIND_LINKS')
    if uv:
        return [s for s in uv.split(',') if s]
    return (
        os.environ.get('PIP_FIND_LINKS')
        or output(sys.executable, '-m', 'pip', 'config', 'get', 'global.find-links')
        or ''
    ).split()


def fits(tags, version):
    "Does a wheel's `python-abi-platform` tail fit this machine?"
    py, abi, plat = tags.split('-')
    glibc = tuple(int(x) for x in (platform.libc_ver()[1] or '0').split('.')[:2])

    def ok(p):
        m = re.match(r'(?:manylinux_(\d+)_(\d+)|linux)_(.+)$', p)
        return (
            m
            and m.group(3) == platform.machine()
            and (m.group(1) is None or (int(m.group(1)), int(m.group(2))) <= glibc)
        )

    return 'cp' + version.replace('.', '') in py.split('.') and abi == py and any(map(ok, plat.split('.')))


def number(v):
    return tuple(int(x) for x in re.findall(r'\d+', v)[:3])


def cpu_wheel(links, version):
    "Newest CPU build of torch in the local folders of `links` that fits, as a requirement; or None"
    m = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / 'pyproject.toml').read_text())
    if not m:
        stop('pyproject.toml has no line "torch>=A,<B" to choose a torch by')
    found = set()
    for d in (Path(re.sub('^file://', '', l)) for l in links):
        for f in d.glob('torch-*+cpu*.whl') if d.is_dir() else []:
            w = re.match(r'torch-([^-]+)-(.+)\.whl$', f.name)
            if w and fits(w.group(2), version) and number(m.group(1)) <= number(w.group(1)) < number(m.group(2)):
                found.add(w.group(1))
    return 'torch==' + max(found, key=number) if found else None


def torch_choice(uv, py, links, version, gpu):
    "Arguments for uv that settle which build of torch is installed"
    if os.environ.get('UV_TORCH_BACKEND'):
        return [], 'the torch build of UV_TORCH_BACKEND=' + os.environ['UV_TORCH_BACKEND']
    local = None if gpu else cpu_wheel(links, version)
    if local:
        return [local], local + ' from the find-links folder'
    probe = dict(os.environ, UV_HTTP_TIMEOUT='5', UV_HTTP_RETRIES='1')
    r = subprocess.run(
        [
            *uv,
            'pip',
            'install',
            '-q',
            '--python',
            str(py),
            '--dry-run',
            '--no-deps',
            '--reinstall',
            '--torch-backend=auto',
            'torch',
        ],
        env=probe,
        cwd=str(ROOT),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if r.returncode == 0:
        return ['--torch-backend=auto'], 'the torch build that uv finds for ' + (gpu or 'this CPU')
    return [], "torch from the default index, because PyTorch's own cannot be reached" + (
        '' if gpu else '; on Linux that is the CUDA build, several GB'
    )


def find_gpu():
    "Name of the first NVIDIA GPU, or an empty text"
    name = (output('nvidia-smi', '-L') or '').split(' (UUID')[0]
    return name if name.startswith('GPU') else ''


def install(py, version, gpu, *what):
    "Install `what` for the interpreter `py`; returns which torch was chosen and why"
    uv, links = find_uv(py), find_links()
    torch, why = torch_choice(uv, py, links, version, gpu)
    say('%s: installing with %s' % (gpu or 'no NVIDIA GPU', why))
    env = dict(UV_FIND_LINKS=','.join(links)) if links else {}
    bytecode = (
        ['--compile-bytecode'] if sys.dont_write_bytecode else []
    )  # Else every start would compile thousands of modules again
    call('uv pip install', *uv, 'pip', 'install', '--python', py, *bytecode, *torch, *what, **env)
    call(
        'the check of the new environment',
        py,
        '-c',
        'import importlib.metadata as m, torch; print("torch", torch.__version__, "| unsloth", m.version("unsloth"), "| GPU:", torch.cuda.is_available())',
    )
    return why


def install_here(extras):
    "The package itself for the Python that runs this; torch stays where there is one that fits"
    install(sys.executable, '%d.%d' % sys.version_info[:2], find_gpu(), '-q', '.[%s]' % extras if extras else '.')
    say('unsloth_nb is installed in %s' % sys.prefix)


def main(args):
    check_python()
    if args[:1] == ['--here']:
        return install_here(''.join(args[1:2]))
    gpu, v = find_gpu(), venv_version()
    if v and '--force' not in args and stamped() == key(v, gpu):
        return say('.venv is up to date (Python %s)' % v)
    v = make_venv()
    STAMP.unlink() if STAMP.exists() else None
    why = install(PY, v, gpu, '-e', '.[dev]')
    STAMP.write_text(json.dumps(dict(key=key(v, gpu), torch=why)))
    say('.venv is ready (Python %s)' % v)


if __name__ == '__main__':
    main(sys.argv[1:])
