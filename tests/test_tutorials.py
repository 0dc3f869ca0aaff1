"""Every tutorial from its own first cell: in an environment that has a kernel and nothing else, as on Colab.

`test_quickstart.py` does that for the first one; the others wait for the long tests. Those that train nothing run here too, in this environment."""

import re
import tomllib
from pathlib import Path
import nbformat
import pytest
from browser import find_browser
from conftest import installed
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))
INSTALL = """import importlib.util
import subprocess
import sys

if not getattr(importlib.util.find_spec('unsloth_nb'), 'origin', None):
    subprocess.run([sys.executable, 'unsloth_nb/tools/setup_env.py', '--here'], check=True)
    importlib.invalidate_caches()"""
# Where a page needs extras, the package may be there already, installed by a page that needs none
EXTRAS = INSTALL.replace(
    "if not getattr(importlib.util.find_spec('unsloth_nb'), 'origin', None):",
    "if not all(getattr(importlib.util.find_spec(m), 'origin', None) for m in ('unsloth_nb', MODULES)):",
).replace("'--here'", "'--here', 'EXTRAS'")


@pytest.mark.parametrize('page', TUTORIALS, ids=lambda p: p.stem)
def test_beginning(page):
    "The same install cell everywhere, but for extras that exist; before it, what hardware the page needs and how long it took, when and where"
    cells = nbformat.read(page, as_version=4).cells
    first = next(i for i, c in enumerate(cells) if c.cell_type == 'code')
    extras = re.search(r"'--here', '([a-z,]+)'", cells[first].source)
    if extras:
        modules = re.search(r"\('unsloth_nb', ([^)]+)\)", cells[first].source)[1]
        assert cells[first].source == EXTRAS.replace('MODULES', modules).replace('EXTRAS', extras[1])
        asked = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
        packages = ' '.join(r for e in extras[1].split(',') for r in asked[e])
        assert all(m in packages for m in re.findall(r"'(\w+)'", modules))
    else:
        assert cells[first].source == INSTALL
    said = '\n'.join(c.source for c in cells[:first])
    assert '**Hardware and time.**' in said and re.search(r'20\d\d-\d\d-\d\d', said)


def test_badge(monkeypatch):
    "The site links each tutorial to Colab, in the repository that builds it, whichever that is"
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import docs

    monkeypatch.setenv('GITHUB_REPOSITORY', 'someone/fork')
    page = Path('tutorials/first_finetune.ipynb')
    assert 'github/someone/fork/blob/main/nbs/tutorials/first_finetune.ipynb"' in docs.badge(page, docs.repository())
    assert docs.badge(page, None) is None and docs.badge(Path('spec.ipynb'), 'someone/fork') is None


def checks_of(page) -> dict:  # Id of a cell to what must hold after it
    "What a page does not show: its checks, which stand in tests/tutorials"
    file = ROOT / 'tests' / 'tutorials' / f'{page.stem}.py'
    head, *parts = re.split(r'^# %% (\w+)\n', file.read_text(), flags=re.M) if file.exists() else ['']
    checks = dict(zip(parts[::2], parts[1::2]))
    return {k: head + v for k, v in checks.items()}


@pytest.mark.parametrize('page', TUTORIALS, ids=lambda p: p.stem)
def test_no_test_code(page):
    "What a reader runs is what a reader needs: no checks, nothing hidden, no folder that goes away with the runs in it"
    cells = nbformat.read(page, as_version=4).cells
    code = '\n'.join(c.source for c in cells if c.cell_type == 'code')
    scaffolding = r'#\| *hide|fastcore\.test|test_eq|expect_fail|^ *assert |UNSLOTH_NB_RUNS_DIR|\.cleanup\('
    assert not re.findall(scaffolding, code, re.M)
    assert set(checks_of(page)) <= {c.id for c in cells}


def execute(page, kernel, folder):
    "Top to bottom, each cell with its check behind it; cells for a GPU are left out"
    nb = nbformat.read(page, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| (gpu|eval: false)$', c.source, re.M)]
    checks = checks_of(page)
    pairs = [[c, nbformat.v4.new_code_cell(checks[c.id])] if c.id in checks else [c] for c in nb.cells]
    nb.cells = [c for pair in pairs for c in pair]
    NotebookClient(nb, kernel_name=kernel, timeout=1200, resources=dict(metadata=dict(path=str(folder)))).execute()


FIRST = 'first_finetune'
QUICKSTART = pytest.mark.skipif(bool(find_browser()), reason='test_quickstart runs it, likewise from nothing')


@pytest.mark.slow
@pytest.mark.parametrize(
    'page',
    [pytest.param(p, marks=QUICKSTART if p.stem == FIRST else pytest.mark.long) for p in TUTORIALS],
    ids=lambda p: p.stem,
)
def test_from_nothing(bare, page, monkeypatch, tmp_path):
    "In an environment with a kernel alone, which the first cell fills"
    for k in ('PYTHONPATH', 'VIRTUAL_ENV'):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', str(tmp_path))
    monkeypatch.setenv('JUPYTER_PATH', str(bare / 'jupyter'))
    execute(page, 'bare', bare / 'work')
    assert installed(bare)


TRAIN = FIRST, 'export_and_serve', 'reading_a_run', 'scale_out'


@pytest.mark.slow
@pytest.mark.parametrize('page', [p for p in TUTORIALS if p.stem not in TRAIN], ids=lambda p: p.stem)
def test_here(page, tmp_path, monkeypatch):
    "Where the package is installed, the first cell does nothing, and the others show what they show"
    monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', str(tmp_path / 'runs'))
    (tmp_path / 'unsloth_nb').symlink_to(ROOT)
    execute(page, 'python3', tmp_path)
