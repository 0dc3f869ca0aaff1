"The first tutorial as a newcomer goes through it: opened in a real JupyterLab, cell by cell, by keyboard and mouse, from the cell that installs the package."

import re
import time
import nbformat
import pytest
from browser import Lab, browser, notebook  # noqa: F401
from conftest import ROOT, installed

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAGE = ROOT / 'nbs' / 'tutorials' / 'first_finetune.ipynb'


@pytest.fixture(scope='module')
def lab(browser, bare, tmp_path_factory):
    "A server whose kernels have nothing of ours, beside a clone"
    l = Lab(tmp_path_factory.mktemp('lab'), 'bare', JUPYTER_PATH=str(bare / 'jupyter'))
    (l.folder / 'unsloth_nb').symlink_to(ROOT)
    yield l
    l.stop()


def fresh():
    "Its cells but those for a GPU, without what they showed when the page was made"
    cells = [
        c for c in nbformat.read(PAGE, as_version=4).cells if not re.search(r'^#\| (gpu|eval: false)$', c.source, re.M)
    ]
    for c in cells:
        c.metadata = {}
        c.cell_type == 'code' and c.update(outputs=[], execution_count=None)
    return cells


def test_quickstart(notebook, bare, record_property):
    "A form filled in wrongly and mended, a monitor that moves, answers side by side, and a conversation; the time to the first tuned answer is kept"
    cells = fresh()

    def at(text):
        return next(i for i, c in enumerate(cells) if c.cell_type == 'code' and text in c.source)

    form = at('JobForm(')
    train = at('finetune(')
    answers = at("talk('")
    panel = at('ChatPanel(')
    nb = notebook(*cells)
    install = at('setup_env.py')
    nb.run(*range(install + 1), seconds=600)
    assert installed(bare)
    begun = time.perf_counter()
    nb.run(*range(install + 1, form + 1))
    out = nb.output(form)
    out.get_by_label('Find').fill('learning_rate')
    field = out.get_by_label('learning_rate', exact=True)
    field.fill('0,002')
    field.press('Tab')
    wrong = out.get_by_role('alert').filter(has_text='expected a number')
    wrong.first.wait_for()
    nb.shot('quickstart_form_wrong')
    field.fill('0.002')
    field.press('Tab')
    wrong.first.wait_for(state='hidden')
    nb.run(*range(form + 1, train))
    nb.cells.nth(train).locator('.jp-InputArea-prompt').first.click()
    nb.page.keyboard.press('Control+Enter')
    steps = set()
    monitor = nb.output(train)
    monitor.get_by_text('time left').wait_for(timeout=60000)
    while (
        'finished' not in (said := monitor.inner_text())
        and monitor.get_by_role('button', name='Stop with a checkpoint').count()
    ):
        steps.add(said)
        if len(steps) == 5:
            nb.shot('quickstart_trains')
        nb.page.wait_for_timeout(500)
        assert time.perf_counter() - begun < 900
    nb.wait(60)
    assert len(steps) > 5
    nb.run(*range(train + 1, answers + 1), seconds=300)
    record_property('seconds to the first tuned answer', seconds := round(time.perf_counter() - begun))
    print(f'{seconds} s from the first import to the first tuned answer')
    assert '"who": "Amelia"' in nb.output(answers).inner_text()
    nb.shot('quickstart_answers')
    nb.run(panel)
    out = nb.output(panel)
    out.get_by_label('question').fill('Lunch with Nora at Oak Hall on Friday, 12:30')
    out.get_by_role('button', name='Ask').click()
    out.get_by_text('"who": "Nora"').first.wait_for(timeout=60000)
    nb.shot('quickstart_chat')
    nb.run(*range(panel + 1, len(cells)), seconds=300)
    assert not [o for c in nb.saved().cells for o in c.get('outputs', []) if o.output_type == 'error']
    assert not nb.errors and not nb.outside and not nb.failed and not nb.violations('.jp-OutputArea')
