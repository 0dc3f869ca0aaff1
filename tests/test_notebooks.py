"Every page's notebook runs from top to bottom, each in a process of its own: Unsloth must be imported before transformers. Tutorials have a file of their own."
import os,re,subprocess,sys
from pathlib import Path
import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted([*(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'nbs'/'guides').glob('*.ipynb')])
FLAGS = list(get_config(ROOT).tst_flags)
COVERED = ('jobs', 'benchmarking', 'launching', 'sweep_running') # Their slow cells are whole jobs, which test_jobs, test_survival, test_benchmark, test_launch and test_sweeping run

CHILD = """
import sys
from nbdev.test import test_nb
passed,seconds = test_nb(sys.argv[1], skip_flags={flags}, force_flags={force}, basepath={root}, cell_timing_min=5)
sys.exit(not passed)
"""

def cells(nb, force): return nb_test_cells(nb, skip_flags=FLAGS, force_flags=force)

def run_nb(nb, force, record_property):
    "The cells of `nb` but those that are flagged; a failing cell is shown with its traceback"
    n = len(cells(nb, force))
    record_property('cells', n)
    assert n, f'{nb.name} has no cell that runs'
    env = {k:v for k,v in os.environ.items() if k != 'UNSLOTH_NB_RUNS_DIR'} # Pages test what settings.ini does, unaided
    code = CHILD.format(flags=FLAGS, force=force, root=repr(str(ROOT)))
    r = subprocess.run([sys.executable, '-c', code, str(nb)], cwd=nb.parent, env=env, capture_output=True, text=True, timeout=1800)
    print(f'{nb.name}: {n} cells\n{r.stdout}')
    if r.returncode: pytest.fail(f'{nb.name}\n{r.stdout}{r.stderr}', pytrace=False)

def param(p):
    "A notebook with slow cells, or one that starts the engine, is a slow test"
    heavy = re.search(r'start_engine\(|load_model\(|load_tokenizer\(', '\n'.join(c.source for c in cells(p, [])))
    return pytest.param(p, marks=[pytest.mark.slow] if heavy or len(cells(p, ['slow'])) > len(cells(p, [])) else [])

@pytest.mark.parametrize('nb', [param(p) for p in NBS], ids=lambda p: p.stem)
def test_notebook(nb, record_property):
    "Slow cells included, GPU cells not"
    run_nb(nb, [] if nb.stem in COVERED else ['slow'], record_property)

GPU = [p for p in NBS if len(cells(p, ['slow', 'gpu'])) > len(cells(p, ['slow']))]

@pytest.mark.gpu
@pytest.mark.parametrize('nb', GPU or [pytest.param(None, marks=pytest.mark.skip('no notebook has GPU cells'))], ids=lambda p: p and p.stem)
def test_notebook_gpu(nb, record_property):
    "Notebooks with GPU cells, all cells"
    run_nb(nb, ['slow', 'gpu'], record_property)
