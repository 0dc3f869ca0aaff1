"The job form and the run browser as a person uses them: in JupyterLab, in a browser, by mouse and by keyboard."

import re
import shlex
import pytest
from browser import browser, lab, notebook  # noqa: F401
from hostile import PAYLOADS
from unsloth_nb.jobs.runner import read_pairs
from unsloth_nb.core.spec import FinetuneJob, make_job

pytestmark = pytest.mark.browser

FORM = ["from unsloth_nb import *", "form = JobForm(device='RTX 4090')\nform"]
RUNS = [
    """from pathlib import Path
from unsloth_nb import *
def past(lr, steps=20):
    run = start_run(FinetuneJob(learning_rate=lr, max_steps=20), 'two_runs')
    for i in range(1, steps+1): run.log(step=i, loss=3*(1-400*lr)**i, grad_norm=1/i, learning_rate=lr)
    (run.path/'report.html').write_text('<h1>the report</h1>')
    return run.finish(base=dict(exact_match=0.0), tuned=dict(exact_match=400*lr))
a,b = past(2e-4),past(1e-3)""",
    "RunBrowser('two_runs')",
]


def quiet(nb):
    "Nothing went wrong on the page, and nothing was asked of another machine"
    assert (nb.errors, nb.failed, nb.outside, nb.dialogs) == ([], [], [], [])


def test_form(notebook):
    "Fill it wrongly, read why, mend it, see the plan change, and take the code along"
    nb = notebook(*FORM, 'print(form.job.max_steps, form.job.model)')
    nb.run(0, 1)
    form = nb.output(1)
    form.get_by_text('Memory: about').wait_for()
    before = form.get_by_text('Memory: about').inner_text()
    form.get_by_role('button', name='Training').click()
    form.get_by_label('max_steps').fill('many')
    said = "got 'many'; expected a whole number or null (at least 1)"
    form.get_by_role('alert').filter(has_text=said).first.wait_for()
    form.get_by_text('There is no plan').wait_for()
    nb.shot('form_refused')
    form.get_by_label('max_steps').fill('30')
    form.get_by_text(said).first.wait_for(state='detached')
    form.get_by_role('button', name='Model').click()
    form.get_by_label('Preset').select_option(
        label=next(
            o for o in form.get_by_label('Preset').locator('option').all_inner_texts() if o.startswith('llama-3.1-8b:')
        )
    )
    nb.page.wait_for_function(
        "before => { const t = [...document.querySelectorAll('.jp-OutputArea div')].find(d => d.children.length === 0 && d.innerText.startsWith('Memory: about')); return t && t.innerText !== before }",
        arg=before,
    )
    nb.shot('form_8b')
    want = make_job('finetune', 'llama-3.1-8b', max_steps=30)
    form.get_by_label('Notebook cell').focus()
    for keys in ('Control+a', 'Control+c'):
        nb.page.keyboard.press(keys)
    scope = {}
    exec(nb.page.evaluate('navigator.clipboard.readText()'), scope)
    assert scope['job'] == want
    argv = shlex.split(form.get_by_label('Command line').input_value())
    assert FinetuneJob(**read_pairs(FinetuneJob, [p for p in argv if '=' in p])) == want
    nb.run(2)
    assert nb.output(2).inner_text().strip() == '30 llama-3.1-8b'
    assert nb.violations('.jp-OutputArea') == []
    quiet(nb)


def test_notebook_7(notebook):
    "The same in Jupyter Notebook: form, run browser and explorer are there, and react"
    pytest.importorskip('notebook', minversion='7')
    nb = notebook(
        'from unsloth_nb import *',
        'JobForm()',
        'RunBrowser()',
        'DataExplorer(load_data(FinetuneJob()))',
        app='notebooks',
    )
    nb.run()
    form = nb.output(1)
    form.get_by_label('max_seq_length').fill('1')
    form.get_by_role('alert').filter(has_text='at least 8').first.wait_for()
    assert nb.output(2).get_by_role('button').count() and nb.output(3).get_by_label('search').is_visible()
    nb.shot('notebook_7')
    assert (nb.failed, nb.outside, nb.dialogs) == (
        [],
        [],
        [],
    )  # An empty notebook logs errors there too: about a command and a schema


def test_form_by_keyboard(notebook):
    "Tab reaches every control, and a choice is made without a mouse, in the dark theme"
    nb = notebook(*FORM, theme='dark')
    nb.run()
    form = nb.output(1)
    form.get_by_text('Memory: about').wait_for()
    form.get_by_label('Preset').focus()
    seen = []
    for _ in range(20):
        seen.append(nb.focused()[1])
        nb.page.keyboard.press('Tab')
    assert seen[:2] == ['Preset', 'Find'] and [s for s in seen if s in FinetuneJob.model_fields] == [
        'model',
        'revision',
        'load_in_4bit',
        'load_in_8bit',
        'dtype',
        'max_seq_length',
        'allow_remote_code',
    ]
    assert (
        seen.index('Plan for') > seen.index('allow_remote_code') and 'Notebook cell' in seen and 'Command line' in seen
    )
    form.get_by_label('dtype').focus()
    for key in ('Space', 'ArrowDown', 'Enter'):
        nb.page.keyboard.press(key)
    nb.page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(t => t.value.includes('-p dtype=bfloat16'))"
    )
    form.get_by_label('Find').focus()
    nb.page.keyboard.type('warm')
    form.get_by_label('warmup_steps').wait_for()
    nb.shot('form_dark')
    assert nb.violations('.jp-OutputArea') == []
    quiet(nb)


def test_runs(notebook):
    "Pick two runs, see what differs; what cannot be done is refused in place; a report opens"
    nb = notebook(*RUNS)
    nb.run()
    runs = nb.output(1)
    boxes = runs.get_by_role('checkbox')
    assert boxes.count() == 2
    for i in range(2):
        boxes.nth(i).check()
    runs.get_by_text('differ in learning_rate').wait_for()
    assert runs.get_by_role('img', name=re.compile('loss by step of .*-finetune-')).is_visible()
    runs.get_by_role('button', name='Resume').click()
    runs.get_by_role('alert').filter(has_text='pick one run, not 2').wait_for()
    nb.shot('runs_two')
    assert nb.violations('.jp-OutputArea') == []
    boxes.nth(1).uncheck()
    runs.get_by_role('button', name='Resume').click()
    runs.get_by_role('alert').filter(has_text='finished; there is nothing to go on with').wait_for()
    quiet(nb)
    runs.get_by_role('link', name='Report of').click()
    nb.page.frame_locator('iframe').get_by_text('the report').wait_for()


def test_hostile(notebook):
    "Payloads in the names of runs, in data and in parameters are shown as text, and none of them runs"
    nb = notebook(
        f"import sys\nPAYLOADS = {PAYLOADS!r}",
        """from pathlib import Path
from unsloth_nb import *
from unsloth_nb.runs.run import record_job,write_json
for i,p in enumerate(PAYLOADS):
    d = Path('hostile_runs')/f"{p.replace('/', '')}-{i}"
    d.mkdir(parents=True)
    record_job(d, FinetuneJob(dataset=p, dataset_columns={p:p}, revision=p))
    write_json(d/'result.json', dict(status='failed', reason=p, metrics=dict(base={p:0.1}, tuned={p:0.2}), artifacts={}, seconds={}))
    Run = open_run(d)
    Run.log(step=1, loss=2.0, grad_norm=1.0)
    (d/'report.html').write_text('x')
b = RunBrowser('hostile_runs')
b""",
        "all_of = ' '.join(PAYLOADS)\nform = JobForm(FinetuneJob(dataset=all_of, revision=all_of), device='T4').set(max_steps=all_of)\nform",
        "form.set(max_steps='5')",
        theme='dark',
    )
    nb.run(0, 1, 2)
    runs = nb.output(1)
    form = nb.output(2)
    boxes = runs.get_by_role('checkbox')
    assert boxes.count() == len(PAYLOADS)
    for i in range(len(PAYLOADS)):
        boxes.nth(i).check()
        if i:
            boxes.nth(i - 1).uncheck()  # By turns one, with its reason, and two, with their difference
    boxes.nth(0).check()
    runs.get_by_text('differ in revision').wait_for()
    nb.shot('hostile_runs')
    form.get_by_role('alert').first.wait_for()
    assert PAYLOADS[1] in form.get_by_role('alert').first.inner_text()
    nb.run(3)
    form.get_by_text('No plan').or_(form.get_by_text('Memory:')).first.wait_for()
    nb.page.wait_for_timeout(500)
    nb.shot('hostile_form')
    found = "document.querySelectorAll('.jp-OutputArea :is(script, iframe, svg[onload], #PWN, mjx-container, [onerror], [onload], [onmouseover], [href^=\"javascript\"], img[src=\"x\"])').length"
    assert nb.page.evaluate(f'[window.__pwned ?? null, {found}]') == [None, 0]
    quiet(nb)
