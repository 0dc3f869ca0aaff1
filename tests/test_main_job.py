"The main job: the embedded model learns the built-in set on a CPU, as `make run` does it."
import subprocess,sys
from pathlib import Path
import pytest
from unsloth_nb.runs import Run

@pytest.mark.slow
def test_main_job(tmp_path, record_property):
    "Base at most 5% exact, tuned at least 90% exact and 98% valid JSON, on 64 held-out rows"
    r = subprocess.run([str(Path(sys.executable).parent/'unsloth-nb'), 'run', 'finetune', '--preset', 'smollm2-135m', '--runs-dir', str(tmp_path)], capture_output=True, text=True, timeout=1800)
    print(r.stdout[-3000:])
    assert r.returncode == 0, r.stdout+r.stderr
    run, = map(Run, tmp_path.iterdir())
    m = run.result['metrics']
    record_property('exact_match', m['tuned']['exact_match'])
    assert m['base']['rows'] >= 64
    assert m['base']['exact_match'] <= 0.05
    assert m['tuned']['exact_match'] >= 0.90 and m['tuned']['valid_json'] >= 0.98
    assert 'exact_match' in r.stdout and str(run.path) in r.stdout and 'report.html' in r.stdout
