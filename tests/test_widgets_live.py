"Monitor, chat and explorer in a real JupyterLab, with the real embedded model."
import pytest
from browser import browser,lab,notebook # noqa: F401

pytestmark = pytest.mark.browser
FLOW = ['from unsloth_nb import *', '''job = FinetuneJob(max_steps=40, max_rows=24, test_size=2, max_seq_length=256, max_new_tokens=8, learning_rate=1e-3, warmup_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False)
data = load_data(job)
plan = make_plan(job, data)
model = load_model(job, plan)''', 'finetune(model, data, job, plan)', 'TrainingMonitor()']

def start(nb, i):
    "Run a cell without waiting for it"
    nb.cells.nth(i).locator('.jp-InputArea-prompt').first.click()
    nb.page.keyboard.press('Control+Enter')

def test_train_stop_resume(notebook, lab):
    nb = notebook(*FLOW)
    nb.run(0, 1)
    start(nb, 2)
    out = nb.output(2)
    stop = out.get_by_role('button', name='Stop with a checkpoint')
    stop.wait_for(timeout=30000)
    loss = out.locator('.widget-html-content span:has-text("loss") b').first
    loss.wait_for(timeout=60000)
    first = loss.inner_text()
    for _ in range(100):
        if loss.inner_text() != first: break
        nb.page.wait_for_timeout(200)
    print(first, loss.inner_text())
    nb.shot('monitor_training')
    stop.click()
    nb.page.wait_for_timeout(700)
    nb.shot('monitor_asked')
    nb.page.wait_for_function("/\\d/.test(document.querySelectorAll('.jp-Notebook .jp-Cell')[2].querySelector('.jp-InputArea-prompt').innerText)")
    nb.shot('monitor_stopped')
    print(nb.output(2).inner_text()[-600:])
    start(nb, 3)
    nb.page.wait_for_timeout(2000)
    nb.shot('monitor_interrupted')
    nb.output(3).get_by_role('button', name='Resume').click()
    nb.page.wait_for_timeout(500)
    nb.shot('monitor_resuming')
    nb.output(3).get_by_text('finished', exact=False).first.wait_for(timeout=120000)
    nb.shot('monitor_finished')
    print(nb.errors, nb.failed, nb.outside, nb.violations('.jp-OutputArea'))
