"""Write `requirements.lock`, for installing with plain pip: every package pinned, for Python 3.11 to 3.13.

`tools/lock.py` resolves pyproject.toml once with uv, and prefers the versions that `.venv` holds, so that what is
locked is what was tested. `--check` compares the lock with pyproject.toml, without a network. `--cpu` prints the lock
without the packages that only a CUDA build of torch needs; it runs on any Python, with nothing installed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / 'requirements.lock'
CUDA_ONLY = re.compile(r'(nvidia-|cuda-|triton\b|triton-|xformers\b)')
HEADER = """\
# Every package of unsloth_nb, pinned, for installing without uv. Written by `make lock`; do not edit.
# --no-deps is needed everywhere: pip has no way to leave out what pyproject.toml leaves out for uv.
#
# With an NVIDIA GPU (torch comes as its CUDA build, several GB):
#   pip install --no-deps -r requirements.lock
#   pip install --no-deps -e .
#
# On a CPU: install the CPU build of {torch} first, as PyTorch's installation page says, then
#   python3 tools/lock.py --cpu > cpu.lock
#   pip install --no-deps -r cpu.lock
#   pip install --no-deps -e .
"""


def norm(name):
    return re.sub(r'[-_.]+', '-', name).lower()


def pyproject():
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def pins():
    "The lines of the lock that pin something"
    if not LOCK.exists():
        sys.exit('requirements.lock is missing: run `make lock`')
    return [l for l in LOCK.read_text().splitlines() if l.strip() and not l.startswith('#')]


def find_uv():
    uv = shutil.which('uv') or str(ROOT / '.venv' / 'bin' / 'uv')
    return uv if Path(uv).exists() else sys.exit('uv is neither on the PATH nor in .venv: run `make setup`')


def installed(uv):
    "`name==version` of what `.venv` holds, without the tails that name a build"
    r = subprocess.run(
        [uv, 'pip', 'freeze', '-q', '--python', str(ROOT / '.venv' / 'bin' / 'python')], capture_output=True, text=True
    )
    return [re.sub(r'\+.*', '', l) for l in r.stdout.splitlines() if re.match(r'[\w.-]+==', l)]


def write():
    "One resolver call; the file that is there when uv starts holds the versions it prefers"
    uv = find_uv()
    tmp = LOCK.with_name('.requirements.lock')
    tmp.write_text('\n'.join(installed(uv)) + '\n')
    env = {
        k: v for k, v in os.environ.items() if k not in ('UV_FIND_LINKS', 'UV_TORCH_BACKEND')
    }  # A local build must not leak into the lock
    cmd = [
        uv,
        'pip',
        'compile',
        'pyproject.toml',
        '--universal',
        '--python-version',
        '3.11',
        '--no-annotate',
        '--no-header',
        '-q',
        '-o',
        tmp.name,
    ]
    try:
        if subprocess.run(cmd, cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode:
            sys.exit('uv could not resolve pyproject.toml; the lines above say why')
        lines = [l for l in tmp.read_text().splitlines() if l.strip() and not l.startswith('#')]
    finally:
        tmp.unlink(missing_ok=True)
    torch = next(l for l in lines if l.startswith('torch==')).split(';')[0].strip()
    LOCK.write_text(HEADER.format(torch=torch) + '\n' + '\n'.join(lines) + '\n')
    print(f'{LOCK.name}: {len(lines)} pins')


def problems():
    "What is wrong with the lock, one line each"
    from packaging.requirements import Requirement

    proj = pyproject()
    locked = {}
    bad = []
    for l in pins():
        if not re.fullmatch(r'[A-Za-z0-9][\w.-]*==[\w.!]+( ; .+)?', l):
            bad.append(f'not a plain pin: {l}')
        else:
            r = Requirement(l)
            locked.setdefault(norm(r.name), []).append(str(r.specifier)[2:])
    for d in map(Requirement, proj['project']['dependencies']):
        if not (vs := locked.get(norm(d.name))):
            bad.append(f'{d.name} is not in the lock')
        else:
            bad += [
                f'{d.name}=={v} is outside {d.specifier}' for v in vs if not d.specifier.contains(v, prereleases=True)
            ]
    return bad + [
        f'{n} should not be in the lock' for n in proj['tool']['uv']['exclude-dependencies'] if norm(n) in locked
    ]


def main(args):
    if '--cpu' in args:
        return print('\n'.join(l for l in pins() if not CUDA_ONLY.match(l)))
    if '--check' not in args:
        write()
    if bad := problems():
        sys.exit('\n'.join(bad + ['requirements.lock does not fit pyproject.toml: run `make lock`']))
    if '--check' in args:
        print(f'requirements.lock fits pyproject.toml: {len(pins())} pins')


if __name__ == '__main__':
    main(sys.argv[1:])
