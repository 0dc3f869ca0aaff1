"""The main job: the embedded model learns the built-in set on a CPU, as `make run` does it, and what it has learned goes out in every common form.

`make test` trains 60 of the 100 steps; the whole job, with all its exports, is among the long tests."""

import json
import subprocess
import sys
from pathlib import Path
import pytest
from unsloth_nb.data.events import SYSTEM
from unsloth_nb.runs.run import Run

BIN = Path(sys.executable).parent


WHOLE = 100  # Steps of the preset
LEARNED = {60: 0.75, WHOLE: 0.90}  # Share of held-out rows that are exactly right after so many steps


@pytest.fixture(scope='module')
def main_job(request, tmp_path_factory):
    "(the finished process, where its runs are, its steps)"
    runs = tmp_path_factory.mktemp('runs')
    shorter = [] if request.param == WHOLE else ['-p', f'max_steps={request.param}']
    return (
        subprocess.run(
            [BIN / 'unsloth-nb', 'run', 'finetune', '--preset', 'smollm2-135m', '--runs-dir', runs, *shorter],
            capture_output=True,
            text=True,
            timeout=1800,
        ),
        runs,
        request.param,
    )


@pytest.mark.slow
@pytest.mark.parametrize('main_job', [60, pytest.param(WHOLE, marks=pytest.mark.long)], indirect=True)
def test_main_job(main_job, record_property):
    "Base at most 5% exact, tuned at least 90% exact after all steps, and 98% valid JSON, on 64 held-out rows"
    r, runs, steps = main_job
    print(r.stdout[-3000:])
    assert r.returncode == 0, r.stdout + r.stderr
    (run,) = (r for r in map(Run, runs.iterdir()) if r.kind == 'finetune')
    m = run.result['metrics']
    record_property('exact_match', m['tuned']['exact_match'])
    assert m['training']['steps'] == steps and m['base']['rows'] >= 64
    assert m['base']['exact_match'] <= 0.05
    assert m['tuned']['exact_match'] >= LEARNED[steps] and m['tuned']['valid_json'] >= 0.98
    assert 'exact_match' in r.stdout and str(run.path) in r.stdout and 'report.html' in r.stdout


@pytest.mark.long
@pytest.mark.parametrize('main_job', [WHOLE], indirect=True)
def test_exports(main_job, converter, tmp_path):
    "Adapter, merged model and GGUF are loaded by PEFT, transformers and llama.cpp, and answer held-out rows as exactly as the model in memory"
    _, runs, _ = main_job
    run = next(r for r in map(Run, runs.iterdir()) if r.kind == 'finetune')
    rows = 16
    kinds = 'gguf_q8_0', 'adapter', 'merged_16bit'
    r = subprocess.run(
        [
            sys.executable,
            Path(__file__).parent.parent / 'benchmarks/exports.py',
            run.path,
            '--kinds',
            *kinds,
            '--rows',
            str(rows),
            '--check-rows',
            '4',
            '--out',
            tmp_path / 'exports.json',
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(r.stdout[-5000:])
    assert r.returncode == 0, r.stdout + r.stderr
    res = json.loads((tmp_path / 'exports.json').read_text())
    assert set(res['exports']) == set(kinds)
    for to, e in res['exports'].items():
        assert e['certificate']['passed'], to
        assert abs(e['exact'] - res['in_memory']) <= (1 if to != 'gguf_q8_0' else 2) / rows, to
    (modelfile,) = runs.glob('*/gguf_q8_0/Modelfile')
    assert f'SYSTEM """{SYSTEM}"""' in modelfile.read_text()  # Which all its rows have
