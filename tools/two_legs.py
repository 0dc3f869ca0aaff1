"""Two legs: is it our change, or their release?

Leg 1 runs the golden traces in `.venv`, the environment as locked. Leg 2 runs them from the same checkout in a fresh
environment, with the newest releases that pyproject.toml allows, made by `tools/setup_env.py`. What leg 1 has and the record
in `tests/golden/` has not is ours; what leg 2 has and leg 1 has not is theirs. Exit code 0: nothing changed, 1: something did.

`--env FOLDER` keeps leg 2's environment there, or takes the one that is there already; else it is made in a temporary folder
and deleted. It takes some gigabytes, of a CUDA torch many."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import golden
from lock import norm, pins

ROOT = Path(__file__).resolve().parent.parent
TABLE = {
    (True, True): 'nothing changed',
    (False, True): 'our change',
    (True, False): 'their release',
    (False, False): 'both',
}  # (leg 1 ok, leg 2 ok)


def python(venv):
    return Path(venv) / 'bin' / 'python'


def make_newest(folder):
    "A fresh environment by the same installer"
    r = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'setup_env.py'), '--force'],
        env=dict(os.environ, UNSLOTH_NB_VENV=str(folder)),
        stdout=sys.stderr,
    )
    if r.returncode:
        sys.exit('leg 2: its environment could not be made; the lines above say why')


def leg(venv, **env) -> dict:  # What `tools/golden.py --json` prints; where it does not run, `error`
    "The golden traces in one environment"
    r = subprocess.run(
        [str(python(venv)), str(ROOT / 'tools' / 'golden.py'), '--json'],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    if r.returncode == 0:
        return json.loads(r.stdout.splitlines()[-1])
    return dict(error=(r.stderr.strip().splitlines() or ['no message'])[-1])


def off_lock(packages):
    "Packages that are not in the version that the lock pins"
    pinned = {}
    for l in pins():
        pinned.setdefault(norm(l.split('==')[0]), set()).add(l.split('==')[1].split(' ')[0])
    have = {norm(n): v.split('+')[0] for n, v in packages.items()}
    return [
        f"{n} {have[n]}, locked {' or '.join(sorted(vs))}"
        for n, vs in sorted(pinned.items())
        if n in have and have[n] not in vs
    ]


def said(what, want, got):
    "Why a leg parted from what it is held against; nothing when it did not"
    if 'error' in got:
        return [f"{what} does not run: {got['error']}"]
    return [f'{what}: {l}' for l in golden.parted(want, got)]


def judge(recorded, locked, newest) -> dict:  # verdict, ok, why, notes
    "The verdict of both legs: leg 1 against the record, leg 2 against leg 1"
    ours = said('leg 1', recorded, locked)
    base = (
        recorded
        if 'error' in locked
        else locked
        | dict(traces={n: t | dict(bands=recorded['traces'].get(n, t)['bands']) for n, t in locked['traces'].items()})
    )
    theirs = [] if 'error' in locked and newest.get('error') == locked['error'] else said('leg 2', base, newest)
    releases = [] if 'error' in locked or 'error' in newest else golden.changed(locked, newest, 'packages')
    notes = []
    if releases:
        notes.append('releases: ' + ', '.join(releases))
    if not releases and 'error' not in {**locked, **newest}:
        notes.append('nothing newer than the locked releases is allowed, so leg 2 repeats leg 1')
    if ours and 'error' not in locked and (since := golden.changed(recorded, locked)):
        notes.append(
            'the record was made with other versions, so leg 1 may show a release as well: ' + ', '.join(since)
        )
    if 'error' not in locked and (off := off_lock(locked['packages'])):
        notes.append('.venv is not as locked: ' + ', '.join(off))
    verdict = TABLE[not ours, not theirs]
    return dict(verdict=verdict, ok=verdict == 'nothing changed', why=ours + theirs, notes=notes)


def show(res):
    print(res['verdict'], *(f'  {l}' for l in res['why']), *(f'  note: {n}' for n in res['notes']), sep='\n')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--env', type=Path, help='folder of the environment of leg 2')
    p.add_argument('--json', action='store_true', help='print both legs and the verdict as JSON')
    a = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        newest = (a.env or Path(tmp) / 'newest').absolute()
        if not python(newest).exists():
            make_newest(newest)
        locked = leg(ROOT / '.venv')
        recorded = golden.read(locked['device']['kind'] if 'device' in locked else 'cpu')
        if recorded is None:
            sys.exit('there is no record for this kind of device: tools/golden.py --write makes one')
        fresh = leg(
            newest, UNSLOTH_NB_CACHE_DIR=str(Path(tmp) / 'cache')
        )  # What other releases have compiled or converted is not mixed with ours
    res = judge(recorded, locked, fresh)
    print(json.dumps(res | dict(locked=locked, newest=fresh))) if a.json else show(res)
    sys.exit(0 if res['ok'] else 1)


if __name__ == '__main__':
    main()
