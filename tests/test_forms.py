"Forms and the run browser without a browser: code, command and form give back the job they were made from; hostile text stays text."

import os
import re
import subprocess
import time
import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from typer.testing import CliRunner
import unsloth_nb.cli as cli
import unsloth_nb.jobs.runner as jobs
from unsloth_nb.widgets.forms import JobForm, check_values, job_code, job_command
from unsloth_nb.widgets.run_browser import RunBrowser
from unsloth_nb.runs.run import Run, record_job, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import BenchmarkJob, EvaluateJob, ExportJob, FinetuneJob, JOBS, make_job, presets
from hostile import PAYLOADS, Injected

STUB = '#!/bin/sh\nprintf "%s\\0" "$@" > "$STUB_OUT/argv"\ncat > "$STUB_OUT/stdin"\n'


@pytest.fixture(scope='module')
def read_command(tmp_path_factory):
    "A function: the job that a shell and our command line make of a line"
    home = tmp_path_factory.mktemp('stub')
    (home / 'unsloth-nb').write_text(STUB)
    (home / 'unsloth-nb').chmod(0o755)
    env = os.environ | dict(PATH=f"{home}:{os.environ['PATH']}", STUB_OUT=str(home))

    def f(line, monkeypatch):
        subprocess.run(['sh', '-c', line], env=env, stdin=subprocess.DEVNULL, check=True, timeout=20)
        argv = (home / 'argv').read_text().split('\0')[:-1]
        got = {}

        def stop(job, runs_dir):
            got['job'] = job
            raise SystemExit

        with monkeypatch.context() as m:
            m.setattr(jobs, 'preflight', stop)  # As far as the check before the start
            r = CliRunner().invoke(cli.app, [str(home / 'stdin') if a == '/dev/stdin' else a for a in argv])
        assert 'job' in got, r.exception
        return got['job']

    return f


def read_code(code):
    scope = {}
    exec(compile(code, 'cell', 'exec'), scope)
    return scope['job']


SAMPLES = [
    *(make_job('finetune', n, **({'allow_remote_code': p.hub} if p.remote_code else {})) for n, p in presets().items()),
    *(c() for c in JOBS.values()),
    FinetuneJob(
        max_steps=None,
        num_train_epochs=1.5,
        loss_on=['user', 'assistant'],
        target_modules=['q_proj'],
        load_in_4bit=True,
        gradient_checkpointing=False,
        save_steps=None,
        dataset_columns={'prompt': 'question'},
        near_duplicates=1e-07,
    ),
    EvaluateJob(scorers=['numeric:0.01', 'regex:a,b'], compare_base=False),
    ExportJob(to='gguf_q8_0'),
    BenchmarkJob(configurations=['plan', 'classic'], time_limit=1e-3),
]


@pytest.mark.parametrize('job', SAMPLES, ids=lambda j: f"{type(j).__name__}-{getattr(j, 'model', '')}")
def test_round_trip(job, read_command, monkeypatch):
    "Cell, command and form of every preset, and of every kind of value, give the job"
    assert read_code(job_code(job)) == job
    assert read_command(job_command(job), monkeypatch) == job
    assert JobForm(job, device='T4').job == job


odd = st.text(
    st.one_of(
        st.sampled_from('\'"\\$`!{}[],:;#&|<>*?~= \t\n\r\x00\x1b\u2028\u202e\ud800é漢😀%@-'),
        st.characters(exclude_categories=()),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dataset=odd,
    revision=odd,
    columns=st.dictionaries(odd, odd, max_size=2),
    modules=st.lists(odd, min_size=1, max_size=2),
)
@example('null', 'none', {}, ['null'])
@example("' $(touch PWNED) `touch PWNED` ;", '-f', {'a,b': 'c:d'}, ['a,b', ' c '])
@example('\ud800', 'a\x00b', {'{': '}'}, ['[q]'])
@example('%run x', '!ls', {'\n': '\n%%bash\n'}, ['?'])
def test_round_trip_odd(read_command, monkeypatch, dataset, revision, columns, modules):
    "Whatever the text: it comes back as it was, and no shell and no notebook runs it"
    try:
        job = FinetuneJob(dataset=dataset, revision=revision, dataset_columns=columns, target_modules=modules)
    except SpecError:
        assume(False)
    code = job_code(job)
    line = job_command(job)
    assert read_code(code) == job and read_command(line, monkeypatch) == job and JobForm(job, device='T4').job == job
    assert line.isprintable() and '\n' not in line
    from IPython.core.inputtransformer2 import TransformerManager

    assert TransformerManager().transform_cell(code) == code + '\n'


def test_messages_are_the_schemas():
    "What the form says beside a field is what the schema says of the parameter"
    for wrong in (
        dict(r=0),
        dict(learning_rate='fast'),
        dict(model='llama-3.1-8'),
        dict(max_steps=None),
        dict(batch_size=10, per_device_train_batch_size=4),
        dict(template='chatty'),
    ):
        with pytest.raises(SpecError) as e:
            FinetuneJob(**wrong)
        said = check_values(FinetuneJob, wrong)
        assert '\n'.join(f'{k}: {v}' for k, v in said.items()) == str(e.value)
        assert JobForm(device='T4').set(**wrong).problems.keys() == said.keys()


def test_form_follows(monkeypatch):
    "A change shows at once in messages, code and command, and a moment later in the plan"
    form = JobForm(device='RTX 4090')
    assert form.planned.done.wait(60)
    small = form.plan
    form.set(model='llama-3.1-8b', max_steps=30)
    assert '-p max_steps=30' in form.texts.value and form.planned.done.wait(60)
    assert form.plan.peak > 5 * small.peak and f'{form.plan.peak / 2**30:.2f} GiB' in form.plan_panel.value
    form.set(max_steps='0')
    assert (
        'at least 1' in form.notes['max_steps'].value
        and 'alert' in form.summary.value
        and 'unsloth-nb run' not in form.texts.value
    )
    form.controls['max_steps'].value = ''  # An empty box is the default
    assert form.job == FinetuneJob(model='llama-3.1-8b') and 'alert' not in form.summary.value
    form.device.value = 'T4'
    assert form.planned.done.wait(60) and form.plan.device.name == 'T4'


def test_plan_never_fails(tmp_path):
    "Rows that are not there, or not as they should be, do not keep the form from planning, and it says so"
    (tmp_path / 'bad.jsonl').write_text('{"x": 1}\n')
    for dataset, said in (
        (str(tmp_path / 'none.jsonl'), 'is not'),
        (str(tmp_path / 'bad.jsonl'), 'bad.jsonl'),
        ('owner/name', 'Hub'),
    ):
        form = JobForm(FinetuneJob(dataset=dataset), device='T4')
        assert form.planned.done.wait(60) and form.plan.fits and said in form.plan_panel.value, form.plan_panel.value


def test_form_shows_text(tmp_path):
    "No payload becomes markup: in the form, its static picture, messages and the plan"
    for p in PAYLOADS:
        form = JobForm(FinetuneJob(dataset=p, dataset_columns={'prompt': p.replace(',', ' ')}), device='T4').set(
            max_steps=p, model=p
        )
        assert form.planned.done.wait(60)
        for h in (
            form._repr_html_(),
            form.summary.value,
            form.texts.value,
            form.plan_panel.value,
            *(n.value for n in form.notes.values()),
        ):
            assert not Injected.of(h), h
        good = JobForm(FinetuneJob(dataset=p, revision=p), device='T4')
        assert good.planned.done.wait(60)
        for h in (good._repr_html_(), good.texts.value, good.plan_panel.value):
            assert not Injected.of(h), h


def fabricated(runs_dir, name, payload, **more):
    "A run directory with a payload wherever one can be"
    path = runs_dir / name
    path.mkdir(parents=True)
    record_job(path, FinetuneJob(dataset=payload, dataset_columns={payload: payload}, **more))
    write_json(
        path / 'result.json',
        dict(
            status='failed',
            reason=payload,
            metrics=dict(base={payload: 0.1}, tuned={payload: 0.2}),
            artifacts={payload: {'f': dict(bytes=1, sha256='')}},
            seconds={},
        ),
    )
    (path / 'report.html').write_text('<h1>the report</h1>')
    run = Run(path)
    run.log(step=1, loss=2.0, grad_norm=1.0)
    return run


def test_browser_shows_text(tmp_path):
    "No payload becomes markup in the table, the curves, the difference or a link"
    for i, p in enumerate(PAYLOADS):
        runs = tmp_path / f'runs{i}'
        name = re.sub('[/\x00]', '', p)[:80]
        for k in 'ab':
            fabricated(runs, f'{name}-{k}', p + k)
        b = RunBrowser(runs).select(f'{name}-a', f'{name}-b')
        assert len(b.selected) == 2 and b.diff.parameters
        live = [
            b.widget and b.about.value,
            *(o['data']['text/html'] for o in b.links.outputs),
            *(row.children[1].value for row in b.table.children),
        ]
        for h in (b._repr_html_(), *live, b.select(f'{name}-a')._repr_html_()):
            assert not Injected.of(h, links=True), h


def test_resume_in_its_own_process(tmp_path):
    "The button runs the real command, shows what it says, and the kernel is free meanwhile"
    run = fabricated(tmp_path, '20260101-0000-finetune-aaaa', str(tmp_path / 'gone.jsonl'))
    b = RunBrowser(tmp_path).select(run)
    _ = b.widget
    b._act(b.resume)
    assert b.command.wait(60).code == 2
    until = time.monotonic() + 10
    while 'ended with' not in b.news.value and time.monotonic() < until:
        time.sleep(0.1)
    assert 'gone.jsonl' in b.news.value and 'ended with 2' in b.news.value
    b._act(b.stop)
    assert 'nothing that was started here is running' in b.news.value


def test_many_runs(tmp_path):
    "Pages of twelve, all of them reachable"
    for i in range(30):
        fabricated(tmp_path, f'r{i:02}', 'x', seed=i)
    b = RunBrowser(tmp_path)
    seen = set()
    _ = b.widget
    for page in range(3):
        b._draw(page=page)
        seen |= {row.children[0].description for row in b.table.children[1:]}
    assert seen == {f'r{i:02}' for i in range(30)}
    assert [x.disabled for x in b.pages.children[:2]] == [False, True]
