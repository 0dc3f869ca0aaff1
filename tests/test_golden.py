"""Training repeats: seeded steps against the traces on record, and whose change it is when they part.

`tools/golden.py --write` records them anew, `tools/two_legs.py` holds them against the newest releases as well."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import golden
import two_legs


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_traces(kind):
    "Loss and gradient norm of every step are within the bands of the record; with its processor and versions every bit is the same"
    want = golden.read(kind)
    if want is None:
        pytest.skip(f'no traces of a {kind} device are on record: tools/golden.py --write makes them')
    env = os.environ | (dict(CUDA_VISIBLE_DEVICES='') if kind == 'cpu' else {})
    r = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'golden.py'), '--json'],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    got = json.loads(r.stdout.splitlines()[-1])
    if got['device']['kind'] != kind:
        pytest.skip(f"this machine trains on {got['device']['kind']}, not on {kind}")
    assert {*got['traces'], *got['left_out']} == set(golden.configurations(kind)) and 'dropout' in got['traces']
    if why := golden.report(want, got):
        pytest.fail(why, pytrace=False)


def example():
    "A record as `tools/golden.py --json` prints it, of one configuration"
    t = dict(
        parameters=dict(r=16),
        bands=dict(loss=1e-4, grad_norm=1e-3),
        loss=[2.0, 1.5, 1.0],
        grad_norm=[0.5, 0.4, 0.3],
        adapter='aa',
    )
    return dict(
        date='2026-01-01',
        device=dict(kind='cpu', name='A', processor='A 1'),
        versions=dict(torch='2.13.0', trl='1.0'),
        packages=dict(torch='2.13.0', trl='1.0', numpy='2.0'),
        left_out=[],
        traces=dict(lora=t),
    )


def but(**changes):
    "The example with some of it changed: versions, packages, device, left_out; others go into its trace"
    d = copy.deepcopy(example())
    for k, v in changes.items():
        if k in d:
            d[k] = d[k] | v if isinstance(v, dict) else v
        else:
            d['traces']['lora'][k] = v
    return d


@pytest.mark.parametrize(
    'change,say',
    [
        (
            dict(loss=[2.0, 1.51, 1.0]),
            ['lora: loss parts at step 2', '1.5 on record, 1.51 now', '0.667% apart, 0.01% allowed', 'our change'],
        ),
        (dict(grad_norm=[0.5, 0.4, 0.31]), ['grad_norm parts at step 3']),
        (
            dict(loss=[2.0, 1.51, 1.0], versions=dict(trl='1.1')),
            ['loss parts at step 2', 'their release: trl 1.0 -> 1.1'],
        ),
        (dict(loss=[2.0, float('nan'), 1.0]), ['loss parts at step 2', 'inf% apart']),
        (dict(loss=[2.0, 1.5]), ['loss parts at step 3']),
        (dict(adapter='bb'), ['not the same bits', 'other adapter weights']),
        (dict(loss=[2.0, 1.500001, 1.0]), ['within its bands, but not the same bits', 'loss parts at step 2']),
        (dict(parameters=dict(r=32)), ['its parameters are not those on record: r']),
        (
            dict(loss=[1.0, 1.0, 1.0], device=dict(name='B', processor='B 2')),
            ['loss parts at step 1', 'recorded on A (A 1), this is B (B 2)'],
        ),
    ],
)
def test_report(change, say):
    "The message names configuration, curve, step, size, and whose change it is"
    text = golden.report(example(), but(**change))
    assert not [s for s in say if s not in text], text


@pytest.mark.parametrize(
    'change',
    [
        {},
        dict(adapter='bb', versions=dict(trl='1.1')),
        dict(loss=[2.0001, 1.5, 1.0], adapter='bb', device=dict(processor='B 2')),
        dict(left_out=['lora'], loss=[9.0, 9.0, 9.0]),
    ],
)
def test_within(change):
    "Another processor or other versions may differ within the bands, and what a device leaves out is not judged"
    assert golden.report(example(), but(**change)) == ''


def test_write(tmp_path, monkeypatch, capsys):
    "A record is made; other bits within the bands replace it, what is outside only with --accept; a failed write changes nothing"
    monkeypatch.setattr(golden, 'HOME', tmp_path)
    golden.write(example(), accept=False)
    first = golden.path('cpu').read_text()
    assert 'packages' not in json.loads(first)
    with pytest.raises(SystemExit, match='(?s)loss parts at step 1.*not recorded'):
        golden.write(but(loss=[1.0, 1.5, 1.0]), accept=False)
    with pytest.raises(SystemExit, match='emulates bfloat16'):
        golden.write(but(left_out=['lora']), accept=True)
    assert golden.path('cpu').read_text() == first
    golden.write(but(adapter='bb'), accept=False)
    golden.write(but(loss=[1.0, 1.5, 1.0]), accept=True)
    assert golden.read('cpu')['traces']['lora']['loss'][0] == 1.0 and 'accepted' in capsys.readouterr().out


OURS = dict(loss=[2.0, 1.7, 1.0])
NEW = dict(packages=dict(trl='1.1'), versions=dict(trl='1.1'))


@pytest.mark.parametrize(
    'leg1,leg2,verdict,say',
    [
        ({}, NEW, 'nothing changed', ''),
        ({}, {}, 'nothing changed', 'nothing newer'),
        (OURS, OURS | NEW, 'our change', 'leg 1: lora: loss parts at step 2'),
        ({}, OURS | NEW, 'their release', 'releases: trl 1.0 -> 1.1'),
        (OURS, NEW | dict(loss=[2.0, 1.2, 1.0]), 'both', 'leg 2: lora'),
        (
            dict(versions=dict(torch='2.14.0'), **OURS),
            OURS | NEW | dict(versions=dict(torch='2.14.0', trl='1.1')),
            'our change',
            'the record was made with other versions',
        ),
        (
            dict(packages=dict(numpy='9.9')),
            NEW | dict(packages=dict(numpy='9.9', trl='1.1')),
            'nothing changed',
            '.venv is not as locked: numpy 9.9',
        ),
    ],
)
def test_two_legs(leg1, leg2, verdict, say):
    "Leg 1 against the record is ours, leg 2 against leg 1 is theirs"
    res = two_legs.judge(example(), but(**leg1), but(**leg2))
    assert res['verdict'] == verdict and res['ok'] == (verdict == 'nothing changed')
    assert say in '\n'.join(res['why'] + res['notes'])


@pytest.mark.parametrize(
    'broken1,broken2,verdict',
    [
        ('', 'ImportError: x', 'their release'),
        ('SyntaxError: y', '', 'our change'),
        ('SyntaxError: y', 'SyntaxError: y', 'our change'),
        ('SyntaxError: y', 'ImportError: x', 'both'),
    ],
)
def test_two_legs_broken(broken1, broken2, verdict):
    "A leg that does not run has parted, and says with what; the same failure in both is ours"
    legs = [dict(error=e) if e else example() for e in (broken1, broken2)]
    res = two_legs.judge(example(), *legs)
    assert res['verdict'] == verdict and all(
        e in '\n'.join(res['why']) for e in (broken1, broken2) if verdict == 'both'
    )
