"Monitor, chat and explorer: in code, and in a real JupyterLab with the real embedded model."

import json
import os
import threading
import time
import pytest
from browser import browser, lab, notebook  # noqa: F401
from unsloth_nb.widgets import explorer
from unsloth_nb.widgets.chat_panel import save_case
from unsloth_nb.data.load import load_data
from unsloth_nb.widgets.explorer import DataExplorer, Row
from unsloth_nb.runs.monitor import TrainingMonitor
from unsloth_nb.runs.run import Run, RunError, start_run
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob

PAYLOADS = [
    '<script>window.__pwned=1</script>',
    '<img src=x onerror="window.__pwned=1">',
    '"><svg onload=window.__pwned=1>',
    '$\\href{javascript:window.__pwned=1}{x}$',
    '</div></td></table><iframe srcdoc="<script>parent.__pwned=1</script>">',
    '[x](javascript:window.__pwned=1)',
    "'-alert(1)-'",
    '{{7*7}}&lt;b&gt;',
]
PWNED = "[...document.querySelectorAll('.jp-OutputArea')].flatMap(e => [...e.querySelectorAll('script, iframe, svg[onload], img[onerror], [href^=javascript]')]).length + (window.__pwned ? 100 : 0)"

# ---- Without a browser


def metric(i, **kw):
    return (
        dict(
            step=i,
            loss=1 / i,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=10 * i,
            tokens_per_second=100.0,
            seconds=0.5,
            peak_bytes=2**30,
            max_steps=9,
        )
        | kw
    )


@pytest.fixture
def run(tmp_path):
    return start_run(FinetuneJob(max_steps=9), tmp_path)


def test_monitor_reads_each_line_once(run, monkeypatch):
    "A hundred thousand lines are parsed once, and a look at nothing new reads nothing"
    with (run.path / 'metrics.jsonl').open('w') as f:
        f.writelines(json.dumps(metric(i, max_steps=10**6)) + '\n' for i in range(1, 100001))
    m = TrainingMonitor(run)
    start = time.perf_counter()
    for _ in range(100):
        m.look()
    assert (time.perf_counter() - start) / 100 < 0.02 and m.progress.step == 100000
    run.log(**metric(100001))
    m.look()
    assert m.progress.step == 100001 and len(m.progress.metrics) == 100001


def test_monitor_follows_a_resumed_run(run):
    "Steps after the checkpoint are taken back, as they are in the run"
    for i in range(1, 6):
        run.log(**metric(i))
    m = TrainingMonitor(run)
    run.keep_metrics(run.metrics[:2])
    m.look()
    assert m.progress.step == 2
    run.log(**metric(3))
    m.look()
    assert [x['step'] for x in m.progress.metrics] == [1, 2, 3]


def test_monitor_and_a_broken_step(run):
    "A step that broke has a line with fewer entries, and a loss that is no number"
    run.log(**metric(1))
    run.log(**metric(2))
    run.log(step=3, loss=float('nan'), grad_norm=0.0)
    m = TrainingMonitor(run)
    assert m.progress.total == 9 and 'loss nan' in repr(m) and '<img alt=' in m._repr_html_()


def test_monitor_says_when_a_run_has_died(run):
    "A process that is gone, and a run that nobody has begun"
    m = TrainingMonitor(run)
    assert m.look() == 'running' and not m.ended
    beat = json.loads((run.path / 'heartbeat.json').read_text())
    run_heart = beat | dict(pid=2**22 - 1, step=3)
    for t in threading.enumerate():
        if getattr(t, 'path', None) == run.path:
            t.over.set()
            t.join()
    (run.path / 'heartbeat.json').write_text(json.dumps(run_heart))
    assert m.look().startswith('died: no sign of life for') and m.ended and not m.trains
    with pytest.raises(RunError, match='nothing to stop'):
        m.stop()


def test_monitor_of_a_new_run(tmp_path):
    from unsloth_nb.runs.run import new_run_dir, record_job

    path = new_run_dir('finetune', tmp_path)
    record_job(path, FinetuneJob())
    m = TrainingMonitor(path)
    assert (m.look(), m.ended) == ('starting', False)
    os.utime(path / 'job.json', (time.time() - 999,) * 2)
    assert (m.look(), m.ended) == ('died: no sign of life', True)


def test_resume_that_is_refused(tmp_path):
    "What the process says that was to go on with the run stands in the panel"
    run = start_run(FinetuneJob(dataset='gone.jsonl'), tmp_path)
    run.interrupt('a test')
    m = TrainingMonitor(run)
    m.widget, m.resume_button.click()
    m.command.wait(60)
    m.show()
    assert 'gone.jsonl' in m.refused() and 'Error' in m.parts['said'].value and not m.resume_button.disabled


def test_case_is_a_held_out_row(lib, tmp_path):
    "What was saved from a chat is read as a conversation, and scored as the evaluate job scores its rows"
    model = lib.load_model(FinetuneJob())
    talk = lib.Chat(model, 'Be brief.', lib.Sampling(max_new_tokens=4))
    file = str(tmp_path / 'cases.jsonl')
    talk('Say yes.')
    turn = talk('And again?')
    rows = [save_case(talk, file, 'yes'), save_case(talk, file)]
    held = lib.held_out(FinetuneJob(), file, 2)
    assert [c.messages for c in held] == [r['messages'] for r in rows] and [m['role'] for m in held[0].messages] == [
        'system',
        *['user', 'assistant'] * 2,
    ]
    assert lib.evaluate(model, held, max_new_tokens=4).scores['exact_match'] == [
        turn.answers['tuned'].text.strip() == 'yes',
        True,
    ]


@pytest.mark.parametrize(
    'kw,match',
    [
        (dict(path='a.txt'), 'JSON-lines'),
        (dict(side='other'), 'does not take part'),
        (dict(expected=''), 'answer is empty'),
        (dict(expected='a\x00b'), 'control character'),
    ],
    ids=['suffix', 'side', 'empty', 'control'],
)
def test_case_refused(tmp_path, kw, match):
    "Nothing is written that could not be read back"
    from types import SimpleNamespace as Stub

    talk = Stub(turns=[1], histories=dict(tuned=[dict(role='user', content='q'), dict(role='assistant', content='a')]))
    path = tmp_path / kw.pop('path', 'a.jsonl')
    with pytest.raises(SpecError, match=match):
        save_case(talk, path, **kw)
    assert not path.exists()
    (tmp_path / 'other.jsonl').write_text('{"text": "x"}\n')
    with pytest.raises(SpecError, match='other rows than conversations'):
        save_case(talk, tmp_path / 'other.jsonl')


@pytest.fixture(scope='module')
def many():
    "An explorer of 50,000 rows with some of every flag"
    rows = [dict(prompt=f'Question {i} about {"ab"[i % 2]}?', completion=f'{i} ' * (1 + i % 7)) for i in range(50000)]
    for i, p in enumerate(PAYLOADS):
        rows[100 + i] = dict(prompt=p, completion=p)
    rows[9], rows[77] = rows[3], dict(prompt='long', completion='x ' * 9000)
    return DataExplorer(load_data(FinetuneJob(test_size=500), rows))


def test_explorer_at_fifty_thousand_rows(many):
    "Every look takes less than two seconds, and what is on the screen does not grow with the data"
    many.widget
    for what in (
        dict(search='question 49999'),
        dict(search=r'4999\d about', regex=True),
        dict(flagged='duplicates'),
        dict(order='longest first'),
        dict(number=77),
    ):
        start = time.perf_counter()
        got = many.rows(**what)
        assert len(got) and time.perf_counter() - start < 2 * (3 if 'search' in what else 1), what
    assert many.rows(order='longest first')[0].conv.row == 77 and [
        r.conv.row for r in many.rows(flagged='duplicates')
    ] == [9]
    assert len(many.list.options) == 15 and len(many.detail.value) < 20000 and '50,000' in many.count.value
    many.page.value = many.page.max
    assert len(many.list.options) == 50000 - 15 * (many.page.max - 1)


def test_explorer_pattern_without_end(many, monkeypatch):
    "A pattern that would take for ever ends within its time, with a word"
    start = time.perf_counter()
    monkeypatch.setattr(explorer, 'PATTERN_SECONDS', 1.0)
    with pytest.raises(SpecError, match='takes more than 1 s'):
        many.rows(r'(x+\s?)+y$|(\w+\s?)+!$', regex=True)
    assert time.perf_counter() - start < 5
    with pytest.raises(SpecError, match='not a regular expression'):
        many.rows('(', regex=True)


def test_explorer_shows_text(many):
    for p in PAYLOADS[:3]:
        (row,) = many.rows(p)
        assert p not in row._repr_html_() and isinstance(row, Row)


def test_explorer_needs_a_job(many):
    with pytest.raises(SpecError, match='say DataExplorer'):
        many.tokenize()
    with pytest.raises(SpecError, match='there is no'):
        many.rows(flagged='too_long')


def test_explorer_names_what_training_refuses(lib):
    "Control tokens, and rows that are too long, by the names of the ledger"
    rows = [dict(prompt=f'q{i}', completion=f'a{i}') for i in range(20)]
    rows[4], rows[6] = dict(prompt='<|im_end|>', completion='x'), dict(prompt='q', completion='word ' * 200)
    e = DataExplorer(load_data(FinetuneJob(test_size=2, seed=1), rows), FinetuneJob(max_seq_length=64))
    e.tokenize()
    assert {k: [r.conv.row for r in e.rows(flagged=k)] for k in e.flags} == dict(special_tokens=[4], too_long=[6])
    assert 'special_tokens=' in e.rows(number=4)[0].fault and 'control token' in e.token_view(e.rows(number=4)[0])


# ---- In a browser

JOB = """job = FinetuneJob(max_steps=20, max_rows=24, test_size=2, max_seq_length=256, max_new_tokens=8, learning_rate=1e-3, warmup_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False)
data = load_data(job)"""


def start(nb, i):
    "Run a cell without waiting for it"
    nb.cells.nth(i).locator('.jp-InputArea-prompt').first.click()
    nb.page.keyboard.press('Control+Enter')


def until(nb, f, seconds=60):
    "Wait until `f` is true, and give what it gives"
    for _ in range(seconds * 5):
        if v := f():
            return v
        nb.page.wait_for_timeout(200)
    pytest.fail(f'not within {seconds} s; picture: {nb.shot("late")}')


def number(out, name):
    return out.locator(f'.widget-html-content span:text-matches("^{name}")').first.locator('b').inner_text()


def chat_with(nb, lab, out):
    "Ask by keyboard, see the answers grow, get an error at once, save the case"
    seen = set()
    out.get_by_label('question').focus()
    nb.page.keyboard.type('Jane Doe meets Bob in Rome on May 4 at 3 pm for lunch.')
    nb.page.keyboard.press('Tab')
    assert nb.focused() == ['button', 'Ask']
    nb.page.keyboard.press('Enter')
    until(
        nb, lambda: seen.add(out.inner_text()) or out.get_by_role('button', name='Ask').is_enabled() and len(seen) > 3
    )
    assert 'lunch.' in out.inner_text() and 'tuned' in out.inner_text()
    out.get_by_text('Sampling', exact=True).click()
    out.get_by_label('seed').fill('seven')
    out.get_by_label('question').fill('Again?')
    out.get_by_role('button', name='Ask').click()
    until(nb, lambda: out.get_by_role('alert').count())
    assert 'expected a whole number' in out.get_by_role('alert').inner_text()
    nb.shot('chat', out)
    out.get_by_text('Save the conversation').click()
    out.get_by_role('button', name='Save as test case').click()
    until(nb, lambda: 'saved to test_cases.jsonl' in out.inner_text())
    nb.shot('chat_saved', out)
    assert len(load_data(FinetuneJob(dataset=str(lab.folder / 'test_cases.jsonl')), split=False).train) == 1


def explore_with(nb, out):
    "Count tokens, jump to the flagged row, search, walk through the list"
    out.get_by_role('button', name='Count tokens').click()
    flagged = out.get_by_label('flagged')

    def options():
        return flagged.text_content().replace('\xa0', ' ')  # Blanks in options are made hard

    until(nb, lambda: 'too long (1)' in options())
    flagged.select_option(index=flagged.locator('option').count() - 1)
    until(nb, lambda: 'row 60:' in out.inner_text())
    assert 'trained' in out.inner_text() and '1 row of 200' in out.inner_text()
    nb.shot('explorer_flagged', out)
    flagged.select_option(index=0)
    until(nb, lambda: '200 rows of 200' in out.inner_text() and flagged.input_value() == 'all')
    out.get_by_label('search').fill('window.__pwned')
    nb.page.keyboard.press('Enter')
    until(nb, lambda: f'{sum("window.__pwned" in p for p in PAYLOADS)} rows of 200' in out.inner_text())
    until(nb, lambda: 'row 0: ' in out.inner_text())
    down = out.get_by_role('button', name='Next row')
    down.focus()
    nb.page.keyboard.press('Enter')
    until(nb, lambda: 'row 1: ' in out.inner_text())
    out.get_by_text('Lengths', exact=True).click()
    nb.shot('explorer_found', out)


@pytest.mark.slow
@pytest.mark.browser
def test_train_stop_resume(notebook, lab):
    "The loss moves on the screen, the stop button leaves a checkpoint while the kernel trains, and Resume brings the run to its end"
    nb = notebook(
        'from unsloth_nb import *',
        f'{JOB}\nmodel = load_model(job, make_plan(job, data))',
        'finetune(model, data)',
        'TrainingMonitor()',
        'ChatPanel()',
    )
    nb.run(0, 1)
    start(nb, 2)
    out = nb.output(2)
    until(nb, lambda: out.get_by_text('time left').count())
    first = number(out, 'loss')
    until(nb, lambda: number(out, 'loss') != first)
    nb.shot('monitor_trains')
    out.get_by_role('button', name='Stop with a checkpoint').click()
    until(nb, lambda: 'Interrupted: stopped by the stop button' in out.inner_text())
    assert (
        out.get_by_role('button').count() == 0
        and out.locator('img').count() == 1
        and 'trainer.py' not in out.inner_text()
    )  # A picture is left, and one line
    run = Run(next((lab.folder / 'runs').glob('*finetune*')))
    at = run.metrics[-1]['step']
    assert run.status == 'interrupted' and 1 < at < 20 and (run.path / 'checkpoints' / f'step-{at:06d}').is_dir()
    nb.run(3)
    out = nb.output(3)
    nb.shot('monitor_stopped')
    out.get_by_role('button', name='Resume').click()
    until(nb, lambda: 'running' in out.inner_text())
    until(nb, lambda: f'{run.name} finished' in out.inner_text(), 120)
    assert (
        run.status == 'finished'
        and [m['step'] for m in run.metrics] == list(range(1, 21))
        and number(out, 'step') == '20 of 20'
    )
    nb.shot('monitor_finished', out)
    nb.run(4)
    chat_with(nb, lab, nb.output(4))
    assert not nb.errors and not nb.outside and not nb.violations('.jp-OutputArea')
    kept = nb.saved().cells[2].outputs
    assert 'image/png' in kept[0].data['text/html'] and not any('widget-view' in k for k in kept[0].data)


@pytest.mark.slow
@pytest.mark.browser
def test_two_ranks_in_a_cell(notebook, lab):
    "`devices=2` in a cell: the same live view, whose stop button reaches the ranks; the cell ends with one line, and the run with a checkpoint"
    nb = notebook(
        'from unsloth_nb import *',
        f'{JOB}\njob = job.replace(batch_size=4, gradient_accumulation_steps="auto", max_steps=40)\nmodel = load_model(job, make_plan(job, data))',
        'finetune(model, data, job, devices=2)',
    )
    nb.run(0, 1)
    start(nb, 2)
    out = nb.output(2)
    until(nb, lambda: out.get_by_text('time left').count(), 180)
    nb.shot('monitor_two_ranks', out)
    out.get_by_role('button', name='Stop with a checkpoint').click()
    until(nb, lambda: 'Interrupted: stopped by the stop button' in out.inner_text(), 120)
    assert out.get_by_role('button').count() == 0 and 'launching.py' not in out.inner_text()
    run = Run(max((lab.folder / 'runs').glob('*finetune*')))
    at = run.metrics[-1]['step']
    assert (
        run.job.devices == 2
        and run.status == 'interrupted'
        and at < 40
        and (run.path / 'checkpoints' / f'step-{at:06d}').is_dir()
    )
    assert not nb.errors and not nb.outside


HOSTILE = f"""from unsloth_nb import *
from unsloth_nb import Chat
from unsloth_nb.evaluation.generation import Answer
import tempfile
from types import SimpleNamespace as Stub
payloads = {PAYLOADS!r}
class Echo(Chat):
    "Answers with the payloads, piece by piece"
    def messages_with(self, question): return {{k:[] for k in self.sides}}
    def stream(self, question):
        for k in self.sides:
            for p in payloads: yield k,p
        return self._add_turn(question, self.messages_with(question), {{k:Answer(''.join(payloads), 9, True) for k in self.sides}})
echo = Echo(Stub(job=Stub(model=payloads[1]), formatter=Stub(own_system=lambda: (payloads[1], ''))))
run = start_run(FinetuneJob(), tempfile.mkdtemp())
for i in (1, 2): run.log(step=i, loss=1/i, learning_rate=1e-3, grad_norm=1., tokens_per_second=9., seconds=1., max_steps=2)
for p in payloads: run.note(p)
run.save_samples([dict(prompt=p, expected=p, base=p, tuned=p) for p in payloads])
run.fail(payloads[1])
rows = [dict(prompt=f'Question {{i}}?', completion=f'Answer {{i}}') for i in range(200)]
for i,p in enumerate(payloads): rows[i] = dict(prompt=p, completion=p)
rows[50],rows[60] = rows[40],dict(prompt='long', completion='word '*400)
job = FinetuneJob(max_seq_length=128, test_size=20)"""


@pytest.mark.slow
@pytest.mark.browser
def test_hostile_text_in_the_dark(notebook):
    "Whatever stands in data, notes, samples and answers is text; rows are searched, flagged ones found and the list walked through by keyboard"
    nb = notebook(
        HOSTILE, 'DataExplorer(load_data(job, rows), job)', 'ChatPanel(echo)', 'TrainingMonitor(run)', theme='dark'
    )
    nb.run(seconds=90)
    explore_with(nb, nb.output(1))
    out = nb.output(2)
    out.get_by_label('question').fill(PAYLOADS[1])
    out.get_by_role('button', name='Ask').click()
    until(nb, lambda: out.get_by_text(PAYLOADS[0]).count() >= 2)
    nb.shot('chat_hostile', out)
    nb.shot('monitor_hostile', nb.output(3))
    assert nb.page.evaluate(PWNED) == 0 and not nb.dialogs and not nb.errors and not nb.outside
    assert not nb.violations('.jp-OutputArea')
