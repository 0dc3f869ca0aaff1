"""Every page's notebook runs from top to bottom, each in a process of its own: Unsloth must be imported before transformers.

With UNSLOTH_NB_FORKS=1 pages that start the engine are forks of a process that has it (`forking/server.py`). Tutorials have a file of their own."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
import nbformat
import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells
from unsloth_nb.core.spec import JOBS
from conftest import FORK

ROOT = Path(__file__).resolve().parent.parent
JOB_PAGES = {ROOT / 'nbs' / 'jobs' / f'{n}.ipynb' for n in JOBS}  # Run as jobs, by test_jobs
NBS = [
    p
    for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
    if p not in JOB_PAGES and not {'tutorials', '.ipynb_checkpoints'} & set(p.parts)
]


def page(p):
    return p and str(p.relative_to(ROOT / 'nbs').with_suffix(''))


FLAGS = list(get_config(ROOT).tst_flags)
COVERED = (
    'jobs/runner',
    'jobs/benchmarking',
    'training/launching',
    'jobs/sweep_running',
)  # Their slow cells are whole jobs, which test_jobs, test_survival, test_benchmark, test_launch and test_sweeping run


@cache
def _cells(nb, *force):
    return nb_test_cells(nb, skip_flags=FLAGS, force_flags=force)


def cells(nb, force):
    return _cells(nb, *force)


def environment(*without):
    "Pages test what settings.ini does, unaided"
    return {k: v for k, v in os.environ.items() if k not in ('UNSLOTH_NB_RUNS_DIR', *without)}


def run_page(nb, force, env):
    "(exit code, what it printed) of a page"
    r = subprocess.run(
        [sys.executable, '-m', 'run_page', str(nb), ','.join(FLAGS), ','.join(force), str(ROOT)],
        cwd=nb.parent,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return r.returncode, r.stdout + r.stderr


def run_nb(nb, force, record_property, *without):
    "The cells of `nb` but those that are flagged; a failing cell is shown with its traceback"
    n = len(cells(nb, force))
    record_property('cells', n)
    assert n, f'{nb.name} has no cell that runs'
    code, said = run_page(nb, force, environment(*without))
    print(f'{nb.name}: {n} cells\n{said}')
    if code:
        pytest.fail(f'{nb.name}: exit code {code}\n{said}', pytrace=False)


def wanted(p):
    return [] if page(p) in COVERED else ['slow']  # Flagged cells that run all the same


def heavy(p):
    return bool(re.search(r'start_engine\(|load_model\(|load_tokenizer\(', '\n'.join(c.source for c in cells(p, []))))


def slow(p):
    return heavy(p) or len(cells(p, ['slow'])) > len(cells(p, []))


def param(p):
    return pytest.param(p, marks=[pytest.mark.slow] if slow(p) else [])


FORKED = [p for p in NBS if heavy(p) and page(p) != 'core/engine']  # That page is about how the engine starts


@pytest.mark.parametrize('nb', [param(p) for p in NBS], ids=page)
def test_notebook(nb, record_property):
    "Slow cells included, GPU cells not"
    run_nb(nb, wanted(nb), record_property, *([] if nb in FORKED else [FORK]))


@pytest.mark.long
@pytest.mark.parametrize('nb', FORKED, ids=page)
def test_notebook_alone(nb, record_property):
    "What `test_notebook` runs in a fork, in a process that starts with nothing"
    run_nb(nb, wanted(nb), record_property, FORK)


def write_page(folder, *sources):
    "A page of these cells"
    file = folder / 'page.ipynb'
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell('# A page'), *map(nbformat.v4.new_code_cell, sources)]
        ),
        file,
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    'first,why',
    [
        ('import transformers', 'was imported before Unsloth'),
        ('from peft.utils import constants', 'was imported before Unsloth'),
        ('1/0', 'ZeroDivisionError'),
        ('import os; os.kill(os.getpid(), 9)', ''),
        ('import sys; assert not {"unsloth", "transformers", "trl", "peft"} & {*sys.modules}', None),
    ],
    ids=['transformers first', 'peft first', 'error', 'killed', 'good'],
)
def test_a_fork_refuses_what_a_process_refuses(tmp_path, first, why):
    "A page that fails, or imports transformers too early, fails in a fork too; one that is right finds Unsloth as soon as it starts the engine"
    page = write_page(
        tmp_path,
        first,
        'from unsloth_nb.core.engine import start_engine\nstart_engine()',
        'import sys,unsloth,transformers\nassert sys.modules["transformers"].__version__',
    )
    code, said = run_page(page, [], environment())
    assert (code == 0) == (why is None) and (why or '') in said, said


GPU = [p for p in NBS if len(cells(p, ['slow', 'gpu'])) > len(cells(p, ['slow']))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    'nb', GPU or [pytest.param(None, marks=pytest.mark.skip('no notebook has GPU cells'))], ids=page
)
def test_notebook_gpu(nb, record_property):
    "Notebooks with GPU cells, all cells"
    run_nb(nb, ['slow', 'gpu'], record_property)
