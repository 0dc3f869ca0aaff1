"The main job: the embedded model learns the built-in set on a CPU, as `make run` does it, and what it has learned goes out in every common form."

import json
import subprocess
import sys
from pathlib import Path
import pytest
from unsloth_nb.data.events import SYSTEM
from unsloth_nb.runs.run import Run

BIN = Path(sys.executable).parent


@pytest.fixture(scope='module')
def main_job(tmp_path_factory):
    "The finished process, and where its runs are"
    runs = tmp_path_factory.mktemp('runs')
    return subprocess.run(
        [BIN / 'unsloth-nb', 'run', 'finetune', '--preset', 'smollm2-135m', '--runs-dir', runs],
        capture_output=True,
        text=True,
        timeout=1800,
    ), runs


@pytest.mark.slow
def test_main_job(main_job, record_property):
    "Base at most 5% exact, tuned at least 90% exact and 98% valid JSON, on 64 held-out rows"
    r, runs = main_job
    print(r.stdout[-3000:])
    assert r.returncode == 0, r.stdout + r.stderr
    (run,) = (r for r in map(Run, runs.iterdir()) if r.kind == 'finetune')
    m = run.result['metrics']
    record_property('exact_match', m['tuned']['exact_match'])
    assert m['base']['rows'] >= 64
    assert m['base']['exact_match'] <= 0.05
    assert m['tuned']['exact_match'] >= 0.90 and m['tuned']['valid_json'] >= 0.98
    assert 'exact_match' in r.stdout and str(run.path) in r.stdout and 'report.html' in r.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    'kinds', [['gguf_q8_0'], pytest.param(['adapter', 'merged_16bit'], marks=pytest.mark.long)], ids='+'.join
)
def test_exports(main_job, converter, tmp_path, kinds):
    "Adapter, merged model and GGUF are loaded by PEFT, transformers and llama.cpp, and answer held-out rows as exactly as the model in memory"
    _, runs = main_job
    run = next(r for r in map(Run, runs.iterdir()) if r.kind == 'finetune')
    rows = 16
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
    if 'gguf_q8_0' in kinds:
        (modelfile,) = runs.glob('*/gguf_q8_0/Modelfile')
        assert f'SYSTEM """{SYSTEM}"""' in modelfile.read_text()  # Which all its rows have
