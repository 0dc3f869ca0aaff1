"The recipes of CONTRIBUTING.md, followed step by step in a copy of the repository."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CELL = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])

OBJECTIVE = """#| export
from unsloth_nb.tokens.formatting import Formatter
from unsloth_nb.training.objectives.sft import SupervisedFinetuning


class Questions(SupervisedFinetuning):
    "What users ask, learned instead of the answers"

    method = 'LoRA, questions'
    tags = ('questions',)
    scores = ('loss',)

    def formatter(self, job, tok, rows):
        return Formatter(tok, loss_on=['user'], special_tokens=job.special_tokens)


OBJECTIVE = Questions()"""

JOB = """#| export
class QuestionsJob(SaveParams, GenerateParams, FormatParams, DataParams, TrainingJob):
    "Learn what users ask"

    trains_by: ClassVar[str] = 'questions'
    weight: float = param(1.0, 'A parameter of its own', 'Objective', gt=0)


JOBS['questions'] = QuestionsJob"""


def page(path, *sources):
    "A notebook of these cells"
    nb = json.loads((Path(__file__).parent.parent / 'nbs' / 'core' / 'errors.ipynb').read_text())
    title = dict(cell_type='markdown', id='title', metadata={}, source=[f'# {path.stem}\n', '\n', '> A page.'])
    cells = [CELL | dict(id=f'cell{i}', source=s.splitlines(keepends=True)) for i, s in enumerate(sources)]
    path.write_text(json.dumps(nb | dict(cells=[title, *cells]), indent=1))


def add_cell(path, source, after):
    "A code cell behind the one that holds a text"
    nb = json.loads(path.read_text())
    at = next(i for i, c in enumerate(nb['cells']) if after in ''.join(c['source']))
    nb['cells'].insert(at + 1, CELL | dict(id='added', source=source.splitlines(keepends=True)))
    path.write_text(json.dumps(nb, indent=1))


def python(tree, code, **env):
    "What a program of that copy prints"
    env = os.environ | dict(PYTHONPATH=str(tree)) | env
    r = subprocess.run([sys.executable, '-c', code], cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout.strip()


def add_objective(tree, tool):
    "The steps of the recipe, but for its guide"
    page(tree / 'nbs/training/objectives/questions.ipynb', '#| default_exp training.objectives.questions', OBJECTIVE)
    add_cell(tree / 'nbs/core/spec.ipynb', JOB, after='JOBS = dict(')
    tool('nbdev-export', cwd=tree)
    job = tree / 'nbs/jobs/questions.ipynb'
    nb = json.loads((tree / 'nbs/jobs/finetune.ipynb').read_text())
    cell = 'from unsloth_nb.core import spec, schema; print(schema.parameters_cell(spec.JOBS["questions"]))'
    for c in nb['cells']:
        if 'parameters' in c['metadata'].get('tags', ()):
            c['source'] = python(tree, cell).splitlines(keepends=True)
        c['source'] = [line.replace('FinetuneJob.', "JOBS['questions'].") for line in c['source']]
        if ''.join(c['source']) == 'from unsloth_nb import *':
            c['source'].append('\nfrom unsloth_nb.core.spec import JOBS')
    job.write_text(json.dumps(nb, indent=1))


@pytest.mark.slow
def test_add_an_objective(tree, tool, tiny, tmp_path):
    "A page, a job class and a notebook are a new kind of job: it is planned, trained, resumed, exported and listed"
    add_objective(tree, tool)
    tool('lint-imports', '--no-cache', cwd=tree)
    code = f"""
from unsloth_nb.jobs.runner import run_job
from unsloth_nb.runs.run import list_runs, open_run
run = run_job('questions', runs_dir={str(tmp_path)!r}, show=False, model={str(tiny)!r}, max_steps=2, batch_size=2,
    max_rows=12, test_size=4, max_seq_length=256, weight=2.0)
assert run.status == 'finished', run.result
assert run.kind == 'questions' and run.trains and open_run('latest', {str(tmp_path)!r}, trained=True).name == run.name
assert 'questions' in (run.path/'adapter'/'README.md').read_text()
assert set(run.result['metrics']['tuned']) >= {{'loss', 'perplexity'}} and 'exact_match' not in run.result['metrics']['tuned']
import json
identity = json.loads((run.path/'capsule.json').read_text())
assert identity['parameters']['weight'] == 2.0
print('trained')
"""
    assert python(tree, code, UNSLOTH_NB_RUNS_DIR=str(tmp_path)).endswith('trained')
    assert 'questions' in python(
        tree,
        "import sys; sys.argv = ['unsloth-nb', 'launch', '--help']\nfrom unsloth_nb.cli import app\napp(standalone_mode=False)",
    )


def test_add_a_family(tree):
    "One YAML file is a family: its models have names, shapes and plans"
    (tree / 'nbs/jobs/presets/acme.yaml').write_text(
        'family: acme\nabout: Acme models\nlicense: MIT\nchat_template: chatml\ncontext_length: 4096\n'
        'models:\n  acme-1b:\n    hub: acme/acme-1b\n    parameters: 1.24e+9\n'
        '    shape: {hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16, num_attention_heads: 32, '
        'num_key_value_heads: 8, head_dim: 64, vocab_size: 128256, tie_word_embeddings: true}\n'
    )
    code = (
        "from unsloth_nb import *; p = make_plan(FinetuneJob(model='acme-1b'), device='RTX 4090'); "
        "print(preset('acme-1b').family, p.fits)"
    )
    assert python(tree, code) == 'acme True'


def test_add_a_file_format(tree, tool):
    "One function and one entry are a format: rows are read, counted and refused as in the others"
    reader = """#| export
def read_toml(f):
    import tomllib

    with f.open('rb') as h:
        yield from tomllib.load(h)['row']


READERS['.toml'] = read_toml"""
    add_cell(tree / 'nbs/data/sources.ipynb', reader, after='READERS = {')
    tool('nbdev-export', cwd=tree)
    (tree / 'rows.toml').write_text(''.join(f'[[row]]\nprompt = "{i}+1"\ncompletion = "{i + 1}"\n' for i in range(6)))
    code = "from unsloth_nb import *; d = load_data(FinetuneJob(dataset='rows.toml', test_size=1)); print(len(d.train))"
    assert python(tree, code) == '5'
