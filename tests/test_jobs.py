"Jobs end to end: by our runner, by plain papermill and from the command line, when all is well and when it is not."

import json
import os
import re
import subprocess
import sys
from pathlib import Path
import nbformat
import papermill
import pytest
import yaml
from conftest import TINY
from unsloth_nb.jobs.runner import run_job
from unsloth_nb.runs.run import Run, read_json
from unsloth_nb.core.schema import fields, parameters_cell
from unsloth_nb.core.spec import JOBS, jobs_dir

CLI = str(Path(sys.executable).parent / 'unsloth-nb')


def cli(*args, **kw):
    "The command line as a person calls it"
    return subprocess.run([CLI, *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


def test_names_apart():
    "No job has a parameter that `run_job` takes for itself: it could not be given"
    import inspect

    assert not {n for cls in JOBS.values() for n in cls.model_fields} & set(inspect.signature(run_job).parameters)


@pytest.mark.parametrize('name', JOBS)
def test_parameters_cell(name):
    "The cell that papermill finds is the schema, letter by letter"
    nb = nbformat.read(jobs_dir() / f'{name}.ipynb', as_version=4)
    cells = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    assert [c.source for c in cells] == [parameters_cell(JOBS[name])]


@pytest.mark.parametrize('name', JOBS)
def test_papermill_reads_all_parameters(name, tool):
    "Plain papermill lists every parameter of every job with its default and help, and complains of none"
    page = jobs_dir() / f'{name}.ipynb'
    read = papermill.inspect_notebook(page)
    rows = {r['name']: r for r in fields(JOBS[name])}
    assert {n: p['default'] for n, p in read.items()} == {n: repr(r['default']) for n, r in rows.items()}
    assert all(p['help'].startswith(rows[n]['help']) and p['inferred_type_name'] != 'None' for n, p in read.items())
    shown = tool('papermill', '--help-notebook', page)
    assert 'Unable to parse' not in shown and shown.count('(default ') == len(rows)


def test_run_directory(finished_run):
    "What a finished job leaves behind"
    names = {p.name for p in finished_run.path.iterdir()}
    assert {
        'job.json',
        'env.json',
        'data.json',
        'plan.json',
        'notebook.ipynb',
        'report.html',
        'metrics.jsonl',
        'adapter',
        'samples.jsonl',
        'result.json',
    } <= names
    res = finished_run.result
    assert res['status'] == 'finished'
    assert all(0 <= res['metrics'][s][m] <= 1 for s in ('base', 'tuned') for m in ('exact_match', 'valid_json'))
    assert all(re.fullmatch('[0-9a-f]{64}', f['sha256']) for f in res['artifacts']['adapter'].values())
    assert {
        'engine',
        'data',
        'formatting',
        'loading',
        'base_evaluation',
        'training',
        'tuned_evaluation',
        'saving',
    } <= set(res['seconds'])
    assert [m['step'] for m in finished_run.metrics] == [1, 2, 3]


def test_counts_add_up(finished_run):
    "Rows and tokens in are rows and tokens out"
    d = read_json(finished_run.path / 'data.json')
    for l in (d['ledger'], d['examples']['rows'], d['examples']['tokens']):
        assert l['came'] == sum(l['kept'].values()) + sum(l['left_out'].values())
    assert d['ledger']['kept'] == dict(train=24, held_out=4) and d['examples']['rows']['came'] == 24
    assert d['examples']['tokens']['came'] == d['profile']['tokens'] and d['profile']['over'] == 0


def test_requested_and_effective(finished_run):
    "What the backend changed stands in the plan, with what was asked for"
    plan = read_json(finished_run.path / 'plan.json')
    if plan['device']['kind'] == 'cpu':
        assert dict(optim=('adamw_8bit', 'adamw_torch_fused')) == {
            c['parameter']: (c['requested'], c['effective']) for c in plan['changes']
        }
    assert plan['measured']['steps'] == 3 and plan['measured']['peak_bytes'] > 0


def test_report(finished_run):
    "The report holds the plot and loads nothing from elsewhere"
    html = (finished_run.path / 'report.html').read_text()
    assert 'data:image/png;base64' in html and 'step 3 of 3' in re.sub('<[^>]+>', '', html)
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)


def test_no_token(finished_run):
    "The Hub token of the environment is in no file of the run"
    from conftest import TOKEN

    assert not [p for p in finished_run.path.rglob('*') if p.is_file() and TOKEN.encode() in p.read_bytes()]


@pytest.mark.slow
def test_plain_papermill(tiny, tmp_path, monkeypatch):
    "The notebook works under papermill alone, and makes its own run"
    monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', str(tmp_path))
    papermill.execute_notebook(
        jobs_dir() / 'finetune.ipynb',
        tmp_path / 'out.ipynb',
        TINY | dict(model=str(tiny), max_steps=1),
        progress_bar=False,
    )
    (run,) = (Run(p) for p in tmp_path.iterdir() if p.is_dir())
    assert run.status == 'finished' and run.job.max_steps == 1


def test_plain_papermill_refuses(tmp_path, monkeypatch):
    "A wrong name is refused by the notebook itself"
    monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'learning_rate'"):
        papermill.execute_notebook(
            jobs_dir() / 'finetune.ipynb', tmp_path / 'out.ipynb', dict(learning_rat=1.0), progress_bar=False
        )


@pytest.mark.parametrize(
    'args,message',
    [
        (['-p', 'learning_rat=1'], "learning_rat: FinetuneJob has no such parameter; did you mean 'learning_rate'?"),
        (['-p', 'max_steps=many'], "max_steps: got 'many'; expected a whole number or null (at least 1)"),
        (['-p', 'r=4096'], "r: got '4096'; expected a whole number (at least 1, at most 1024)"),
        (['-p', 'max_steps'], 'expected name=value'),
        (['-p', 'dataset=event'], "did you mean 'events'?"),
        (['-p', 'model=smolm2-135m'], "did you mean 'smollm2-135m'?"),
        (['-p', 'model=llama-3.2-1b-instruct'], 'the Hugging Face Hub cannot be reached (HF_HUB_OFFLINE is set)'),
        (['-p', 'model=openelm-270m-instruct'], 'allow_remote_code='),
        (['--preset', 'llama'], 'there is no preset'),
        (['-f', 'absent.yaml'], 'does not exist'),
        (['-p', "x='a'; import os=1"], 'has no such parameter'),
    ],
)
def test_refused(tmp_path, args, message):
    "Exit code 2 with the reason, and nothing has been made"
    r = cli('run', 'finetune', '--runs-dir', tmp_path / 'runs', *args)
    assert r.returncode == 2 and message in r.stderr, r.stderr
    assert not (tmp_path / 'runs').exists() and 'Traceback' not in r.stderr


@pytest.mark.parametrize(
    'files,message',
    [
        (['readme.txt'], 'holds neither config.json nor adapter_config.json'),
        (['config.json', 'pytorch_model.bin'], 'pickled ones are not loaded'),
    ],
)
def test_refused_folder(tmp_path, files, message):
    "A folder that is no model, or one of pickled weights"
    (tmp_path / 'm').mkdir()
    for f in files:
        (tmp_path / 'm' / f).write_text('{}')
    r = cli('run', 'finetune', '--runs-dir', tmp_path / 'runs', '-p', f'model={tmp_path}/m')
    assert r.returncode == 2 and message in r.stderr and not (tmp_path / 'runs').exists()


def test_refused_run(tmp_path):
    "Export and evaluate need a finished run"
    for name in ('export', 'evaluate'):
        r = cli('run', name, '--runs-dir', tmp_path)
        assert r.returncode == 2 and 'no training run' in r.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'template,rows',
    [
        ('auto', [dict(text=f'Line {i} of a text for continued pretraining.') for i in range(12)]),
        ('alpaca', [dict(instruction='Double it.', input=str(i), output=str(2 * i)) for i in range(12)]),
    ],
    ids=['text', 'alpaca'],
)
def test_other_data(tiny, tmp_path, template, rows):
    "Plain text and the Alpaca prompt go all the way, to artefacts with their certificates"
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    run = run_job(
        'finetune',
        runs_dir=tmp_path / 'runs',
        show=False,
        **TINY
        | dict(
            model=str(tiny),
            dataset=str(tmp_path / 'rows.jsonl'),
            max_rows=None,
            template=template,
            max_steps=1,
            save='merged_16bit',
        ),
    )
    assert run.status == 'finished', run.result
    assert run.result['metrics']['tuned']['loss'] > 0 and {'adapter', 'merged_16bit'} == set(run.result['artifacts'])
    config = json.loads((run.path / 'merged_16bit' / 'generation_config.json').read_text())
    assert config['eos_token_id'] == [2] and config['pad_token_id'] == 0  # Other programs stop where ours does
    assert ('exact_match' in run.result['metrics']['tuned']) == (template == 'alpaca')


@pytest.mark.slow
def test_failing_job(tmp_path):
    "A failed job leaves its notebook, its report and the reason; exit code 1"
    f = tmp_path / 'long.jsonl'
    f.write_text('\n'.join(json.dumps(dict(prompt=f'Say it {i} times.', completion='word ' * 400)) for i in range(6)))
    r = cli(
        'run',
        'finetune',
        '--runs-dir',
        tmp_path / 'runs',
        '-p',
        f'dataset={f}',
        '-p',
        'test_size=2',
        '-p',
        'max_seq_length=64',
    )
    (run,) = map(Run, (tmp_path / 'runs').iterdir())
    assert r.returncode == 1 and run.status == 'failed'
    assert 'more than max_seq_length=64' in run.result['reason'] and run.result['reason'] in r.stdout
    assert (run.path / 'notebook.ipynb').exists() and (run.path / 'report.html').exists()


@pytest.mark.slow
def test_follow_up_jobs(finished_run, tmp_path):
    "Evaluate, with a task from a folder, and export a finished run, by name, from the command line"
    runs = finished_run.path.parent
    (tmp_path / 'rows.jsonl').write_text(
        '\n'.join(json.dumps(dict(q=f'{n} plus {n} is', options=['red', str(2 * n)], gold=1)) for n in range(1, 4))
    )
    (tmp_path / 'sums.yaml').write_text(
        yaml.safe_dump(
            dict(
                task='sums',
                dataset_path='json',
                dataset_kwargs=dict(data_files=dict(test='rows.jsonl')),
                test_split='test',
                output_type='multiple_choice',
                doc_to_text='{{q}}',
                doc_to_choice='options',
                doc_to_target='gold',
                metric_list=[dict(metric='acc')],
            )
        )
    )
    r = cli(
        'run',
        'evaluate',
        '--runs-dir',
        runs,
        '-p',
        f'run={finished_run.name}',
        '-p',
        'test_size=2',
        '-p',
        'max_new_tokens=8',
        '-p',
        'scorers=exact_match,json_fields',
        '-p',
        'tasks=sums',
        '-p',
        f'task_dir={tmp_path}',
        '-p',
        'task_limit=2',
    )
    assert r.returncode == 0 and 'exact_match' in r.stdout, r.stdout + r.stderr
    run = next(x for x in map(Run, runs.iterdir()) if x.kind == 'evaluate')
    stats, tasks = (json.loads((run.path / f'{n}.json').read_text()) for n in ('statistics', 'tasks'))
    assert stats['scores']['json_fields']['difference']['n'] == 2 and len(tasks['values']['base']['sums/acc']) == 2
    assert (
        set(run.result['metrics']['tasks']) == {'base', 'tuned'} and 'McNemar' in (run.path / 'report.html').read_text()
    )
    r = cli('run', 'export', '--runs-dir', runs, '-p', f'run={finished_run.name}', '-p', 'check_rows=2')
    assert r.returncode == 0, r.stdout + r.stderr
    run = next(x for x in map(Run, runs.iterdir()) if x.kind == 'export')
    assert (
        run.result['metrics']['certificate']['passed']
        and 'model.safetensors' in run.result['artifacts']['merged_16bit']
    )


@pytest.mark.slow
def test_look_at_runs(finished_run):
    "list, show, plan and chat"
    runs = finished_run.path.parent
    assert finished_run.name in cli('runs', 'list', '--runs-dir', runs).stdout
    assert '| exact_match |' in cli('runs', 'show', finished_run.name, '--runs-dir', runs).stdout
    assert 'it fits' in cli('plan', '-p', 'max_rows=20').stdout
    assert json.loads(cli('plan', '-p', 'max_rows=20', '--json').stdout)['fits'] is True
    r = cli('chat', finished_run.name, '--runs-dir', runs, input='Lunch with Ann at Oak Hall, Friday, 12:30\n')
    assert r.returncode == 0 and 'base:' in r.stdout and 'tuned:' in r.stdout, r.stdout + r.stderr


def test_help():
    "Every parameter stands in the help of its job, with its bounds"
    out = cli('run', 'finetune', '--help').stdout
    assert all(n in out for n in JOBS['finetune'].model_fields) and 'at least 1, at most 1024' in out


@pytest.mark.slow
def test_wheel(tiny, tmp_path, tool):
    "An installed wheel runs the job outside a checkout"
    tool(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '-o', tmp_path / 'dist')
    (wheel,) = (tmp_path / 'dist').glob('*.whl')
    tool(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', tmp_path / 'site', wheel)
    env = os.environ | dict(PYTHONPATH=str(tmp_path / 'site'), UNSLOTH_NB_RUNS_DIR=str(tmp_path / 'runs'))
    code = 'import unsloth_nb,unsloth_nb.cli as j,unsloth_nb.core.spec as s,sys; print(unsloth_nb.__file__, s.jobs_dir()); sys.argv[0] = "unsloth-nb"; j.main()'
    pairs = [a for k, v in (TINY | dict(model=tiny, max_steps=1)).items() for a in ('-p', f'{k}={v}')]
    r = subprocess.run(
        [sys.executable, '-c', code, 'run', 'finetune', *pairs],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.count(str(tmp_path / 'site')) == 2 and (tmp_path / 'runs').is_dir()
