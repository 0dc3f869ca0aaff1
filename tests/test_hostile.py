"Secrets and hostile input: nothing leaks, nothing runs, nothing escapes, nothing goes on for ever, and what is shown is shown as text."

import base64
import contextlib
import copy
import io
import json
import os
import pickle
import re
import resource
import sys
import tempfile
import threading
import time
import zipfile
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
import nbformat
import papermill
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from papermill.parameterize import parameterize_notebook
from conftest import TOKEN
import unsloth_nb.cli as cli
import unsloth_nb.jobs.runner as jobs
import unsloth_nb.jobs.supervising as supervising
from unsloth_nb.core.escaping import html_text, json_text, markdown_code, markdown_text, mask_secrets, plain_text
from unsloth_nb.export.artifacts import save_artifact
from unsloth_nb.core.settings import settings
from unsloth_nb.runs.run import Run, RunError, list_runs, new_run_dir, open_run, read_lines, write_json
from unsloth_nb.core.schema import SpecError, parameters_cell
from unsloth_nb.data.sources import find_source
from unsloth_nb.core.spec import FinetuneJob, make_job, preset

# Beside HF_TOKEN of conftest: a key of no known form, and a token in the file where `hf auth login` puts it
WANDB = 'f0e1d2c3b4a59687' * 2 + '78695a4b'
FILE_TOKEN = 'hf_' + 'AlsoNotARealOne9' * 2
TOKEN_FILE = Path(tempfile.mkdtemp()) / 'token'
TOKEN_FILE.write_text(FILE_TOKEN)
os.environ.update(WANDB_API_KEY=WANDB, HF_TOKEN_PATH=str(TOKEN_FILE))
SECRETS = [TOKEN, WANDB, FILE_TOKEN]


def stand_in(folder, *cells):
    "A job notebook that takes no model: the parameters cell of finetune, then these cells"
    v4 = nbformat.v4
    nb = v4.new_notebook(
        cells=[
            v4.new_code_cell(parameters_cell(FinetuneJob), metadata=dict(tags=['parameters'])),
            *map(v4.new_code_cell, cells),
        ],
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
    )
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / 'finetune.ipynb')
    return nb


# ---- Secrets


def forms(secret):
    "A secret as it is, and in base64 at each of three offsets"
    b = secret.encode()
    yield b
    for k in range(3):
        yield base64.b64encode(bytes(k) + b)[4 if k else 0 :][:-4]


def leaks(folder, secrets=SECRETS):
    "Files that hold a secret, zip members included"
    pats = [f for s in secrets for f in forms(s)]
    for p in sorted(folder.rglob('*')):
        if not p.is_file():
            continue
        parts = [p.read_bytes()]
        if zipfile.is_zipfile(p):
            parts += [zipfile.ZipFile(p).read(n) for n in zipfile.ZipFile(p).namelist()]
        if any(f in b for b in parts for f in pats):
            yield p.name


def shown(o):
    "Everything that an object shows of itself"
    return '\n'.join(
        str(f())
        for f in (o.__repr__, o.__str__, *(getattr(o, n) for n in ('_repr_html_', '_repr_markdown_') if hasattr(o, n)))
    )


def test_search_finds(tmp_path):
    "The search of the tests below sees what it should: plain, zipped, in base64"
    (tmp_path / 'plain.json').write_text(json.dumps(dict(a=[TOKEN])))
    with zipfile.ZipFile(tmp_path / 'z.bin', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('data.pkl', pickle.dumps(dict(t=TOKEN)))
    for k in range(3):
        (tmp_path / f'b{k}').write_bytes(base64.b64encode(b'x' * k + TOKEN.encode() + b'y'))
    assert set(leaks(tmp_path)) == {'plain.json', 'z.bin', 'b0', 'b1', 'b2'}


def test_no_secret_in_a_run(finished_run):
    "No file of a finished run holds a secret of the environment or of the token file, and no object shows one"
    assert os.environ['HF_TOKEN'] == TOKEN and not list(leaks(finished_run.path))
    for o in (finished_run, finished_run.job, list_runs(finished_run.path.parent)):
        assert not any(s in shown(o) for s in SECRETS)


@pytest.mark.parametrize('how', ['raised', 'printed'])
def test_no_secret_in_a_failed_run(tmp_path, monkeypatch, capfd, how):
    "A library that quotes the token in its error, or prints it, puts it into no file of the run and not on the screen"
    stand_in(
        tmp_path / 'jobs',
        'import os',
        'raise RuntimeError("401 for Bearer "+os.environ["HF_TOKEN"]+" "+os.environ["WANDB_API_KEY"])'
        if how == 'raised'
        else 'print(os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"])',
    )
    monkeypatch.setattr(supervising, 'jobs_dir', lambda: tmp_path / 'jobs')
    run = jobs.run_job('finetune', runs_dir=tmp_path / 'runs', max_steps=1)
    cli.print_result(run)
    out = ''.join(capfd.readouterr())
    assert (
        run.status == 'failed'
        and (run.path / 'report.html').exists()
        and ('hf_…' in run.result['reason'] or how == 'printed')
    )
    assert 'hf_…' in (run.path / 'notebook.ipynb').read_text()
    assert not list(leaks(run.path)) and not any(s in out for s in SECRETS)


@pytest.mark.parametrize(
    'name,value',
    [
        ('model', TOKEN),
        ('revision', TOKEN),
        ('dataset', f'https://user:{TOKEN}@huggingface.co/datasets/a/b'),
        ('dataset', 'https://me:pass@host/rows.jsonl'),
        ('dataset_split', WANDB),
        ('target_modules', [TOKEN]),
        ('dataset_columns', {'text': TOKEN}),
        ('dataset_roles', {TOKEN: 'user'}),
        ('allow_remote_code', 'a/' + 'sk-' + 'abc123def456ghi789jkl0'),
        (TOKEN, 1),
    ],
    ids=[
        'model',
        'revision',
        'in-url',
        'password-in-url',
        'wandb-key',
        'in-list',
        'in-dict',
        'in-dict-key',
        'openai-key',
        'as-name',
    ],
)
def test_secret_as_parameter(tmp_path, capsys, name, value):
    "A token that ends up among the parameters is refused, and the refusal does not repeat it"
    with pytest.raises(SpecError) as e:
        jobs.run_job('finetune', runs_dir=tmp_path / 'runs', show=False, **{name: value})
    text = str(e.value) + repr(e.value)
    if name != TOKEN:
        assert f'{name}: the value holds a token or a password' in text
    assert not any(s in text for s in SECRETS) and 'abc123def456' not in text and ':pass' not in text
    assert not (tmp_path / 'runs').exists()


def test_secret_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['unsloth-nb', 'run', 'finetune', '--runs-dir', str(tmp_path / 'runs'), '-p', f'model={TOKEN}']
    )
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = ''.join(capsys.readouterr())
    assert e.value.code == 2 and 'token' in out and TOKEN not in out and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    'value',
    [
        'HuggingFaceTB/SmolLM2-135M-Instruct',
        '5b7b8e8e8c1f4a0d9e0b1c2d3e4f5a6b7c8d9e0f',
        'https://huggingface.co/datasets/a/b',
        'my_token_data.jsonl',
        'hf_internal_testing_tiny_random',
    ],
    ids=['hub-id', 'commit', 'url', 'file', 'hf-name'],
)
def test_no_false_alarm(value):
    assert FinetuneJob(revision=value).revision == value


# ---- Names and values are data

NAMES = [
    "x='a'; import os; os.system('touch {c}'); z",
    'x\nimport os\nos.system("touch {c}")\ny',
    "__import__('os').system('touch {c}')",
    '!touch {c} #',
    '%run {c}',
    '%%bash\ntouch {c}',
    "x\u2028import os; os.system('touch {c}')",
    "a=open('{c}','w'); b",
    'x;y',
    '{{model}}',
    '{model}',
    'mod\u0435l',
    'model\x00',
    '__class__',
    'os.environ["A"]',
]
VALUES = [
    "'; import os; os.system('touch {c}'); '",
    '"; import os; os.system("touch {c}"); "',
    "a\nimport os; os.system('touch {c}')\n#",
    "\\'; __import__('os').system('touch {c}') #",
    "{{{{ ''.__class__ }}}}",
    "{{__import__('os').system('touch {c}')}}",
    "__import__('os').system('touch {c}')",
    '!touch {c}',
    '%run {c}',
    'a\u2028!touch {c}',
    'a\x85%%bash\x0ctouch {c}',
    '$(touch {c})',
    '"""\'\'\'',
    'a\x00b',
    '\\N{{BULLET}}\\x41\\',
]
assert len(NAMES) + len(VALUES) == 30


def ids(vs):
    return [re.sub(r'[^ -~]', '~', v)[:24] for v in vs]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    "A file that must not come to be, in an empty directory"
    monkeypatch.chdir(tmp_path)
    yield 'PWNED'
    assert not list(tmp_path.rglob('PWNED*'))


@pytest.mark.parametrize('name', NAMES, ids=ids(NAMES))
@pytest.mark.parametrize('way', ['command line', 'params file', 'python', 'preset'])
def test_names(canary, tmp_path, monkeypatch, capsys, name, way):
    "A name that no parameter has is refused before a kernel starts, by every way in"
    name = name.replace('{c}', canary)
    argv = ['unsloth-nb', 'run', 'finetune', '--runs-dir', str(tmp_path / 'runs')]
    monkeypatch.setattr(jobs, 'execute', lambda *a: pytest.fail('a kernel was started'))
    if way == 'params file':
        Path('p.yaml').write_text(yaml.safe_dump({name: '1'}))
        argv += ['-f', 'p.yaml']
    if way == 'command line':
        argv += ['-p', f'{name}=1']
    if way == 'preset':
        argv += ['--preset', name]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises((SystemExit, SpecError)) as e:
        jobs.run_job('finetune', runs_dir=tmp_path / 'runs', **{name: '1'}) if way == 'python' else cli.main()
    text = str(e.value) if way == 'python' else capsys.readouterr().err
    assert ('there is no preset' if way == 'preset' else 'has no such parameter') in text and not CONTROL.search(text)
    assert not (tmp_path / 'runs').exists() and (way == 'python' or e.value.code == 2)


@pytest.mark.parametrize('value', VALUES, ids=ids(VALUES))
@pytest.mark.parametrize('way', ['command line', 'params file', 'python'])
def test_values(canary, tmp_path, value, way):
    "A legal text arrives letter by letter, through the cell that papermill writes and IPython rewrites"
    v = value.replace('{c}', canary).replace('{{', '{').replace('}}', '}')
    if way == 'params file':
        Path('p.yaml').write_text(yaml.safe_dump(dict(revision=v, dataset_roles={'a': v})))
    job = (
        make_job('finetune', None, 'p.yaml')
        if way == 'params file'
        else make_job(
            'finetune',
            **(
                jobs.read_pairs(FinetuneJob, [f'revision={v}'])
                if way == 'command line'
                else dict(revision=v, dataset_roles={'a': v})
            ),
        )
    )
    assert job.revision == v
    stand_in(tmp_path / 'jobs')
    nb = parameterize_notebook(
        papermill.iorw.load_notebook_node(str(tmp_path / 'jobs' / 'finetune.ipynb')), job.changed()
    )
    cell = next(c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', []))
    ns = {}
    for c in (parameters_cell(FinetuneJob), cell):
        exec(compile(TransformerManager().transform_cell(c), 'cell', 'exec'), ns)
    assert ns['revision'] == v and FinetuneJob.from_notebook(ns, [parameters_cell(FinetuneJob), cell]) == job


@pytest.mark.parametrize(
    'text',
    [
        'revision: !!python/object/apply:os.system ["touch PWNED"]',
        '!!python/object/new:os.system ["touch PWNED"]',
        'r: !!python/name:os.system',
        '{"r": 4, "revision": !!python/object/apply:subprocess.check_output [["touch", "PWNED"]]}',
    ],
    ids=['apply', 'new', 'name', 'json'],
)
def test_yaml_tags(canary, text):
    Path('p.yaml').write_text(text)
    with pytest.raises(SpecError, match='is not YAML'):
        make_job('finetune', None, 'p.yaml')


def test_yaml_bomb(canary):
    "References that unfold to 10^9 items are refused in a moment and in few words"
    Path('p.yaml').write_text(
        '\n'.join(
            [
                'a: &a [x,x,x,x,x,x,x,x,x,x]',
                *(f'{n}: &{n} [{",".join([f"*{p}"] * 10)}]' for p, n in zip('abcdefgh', 'bcdefghi')),
                'r: *i',
                'dataset_columns: *i',
            ]
        )
    )
    start = time.time()
    with pytest.raises(SpecError) as e:
        make_job('finetune', None, 'p.yaml')
    assert len(str(e.value)) < 50000 and time.time() - start < 5


@pytest.mark.parametrize(
    'value', ['$(touch PWNED)', '`touch PWNED`', '%(x)s${HOME}', "'; touch PWNED; '", '{model}', '!touch PWNED']
)
@pytest.mark.parametrize('way', ['environment', 'settings.ini'])
def test_settings(canary, tmp_path, monkeypatch, value, way):
    "Places are read as they are written: nothing is expanded, filled in or run"
    for k in ('RUNS_DIR', 'KERNEL'):
        monkeypatch.delenv(f'UNSLOTH_NB_{k}', raising=False)
    if way == 'environment':
        monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', value)
        monkeypatch.setenv('UNSLOTH_NB_KERNEL', value)
    else:
        Path('settings.ini').write_text(f'[unsloth_nb]\nruns_dir = {value}\nkernel = {value}\n')
    s = settings()
    assert (s.runs_dir, s.kernel) == (tmp_path / value, value)
    stand_in(tmp_path / 'jobs')
    monkeypatch.setattr(supervising, 'jobs_dir', lambda: tmp_path / 'jobs')
    run = jobs.run_job('finetune', show=False, max_steps=1)
    assert run.status == 'failed' and 'NoSuchKernel' in run.result['reason'] and run.path.parent == tmp_path / value


# ---- Paths

PATHS = [
    '../outside',
    '../../outside',
    'a/../../outside',
    './../outside',
    '~/outside',
    '.',
    '..',
    '',
    '-x',
    '/',
    'x\x00y',
    '..\\outside',
    'a' * 5000,
    'link',
    '{model}',
    'run\x1b[2J\n',
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A runs root with a run, a link out of it, and bait outside and in the working directory"
    for p in ('outside', 'runs/20260101-0000-finetune-0000', 'cwd'):
        (tmp_path / p).mkdir(parents=True)
        write_json(tmp_path / p / 'job.json', dict(job='finetune', parameters=FinetuneJob().to_dict()))
    (tmp_path / 'runs' / 'link').symlink_to(tmp_path / 'outside')
    monkeypatch.chdir(tmp_path / 'cwd')
    monkeypatch.setenv('HOME', str(tmp_path))
    before = sorted(tmp_path.rglob('*'))
    yield tmp_path
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('path', PATHS, ids=[ascii(p)[1:20] or 'empty' for p in PATHS])
def test_paths(place, path):
    "No reference leads out of the runs root; each is refused in words"
    for cwd in (place / 'cwd', place / 'runs'):
        os.chdir(cwd)
        with pytest.raises(SpecError) as e:
            open_run(path, place / 'runs')
        assert 'run: ' in str(e.value) and len(str(e.value)) < 6000 and not CONTROL.search(str(e.value))
    for f in (
        lambda: preset(path),
        lambda: make_job(path),
        lambda: save_artifact(None, place / 'runs', path, []),
        lambda: make_job('export', run='latest', to=path),
        lambda: FinetuneJob(model=path, dataset=1),
        lambda: make_job('finetune', None, path),
    ):
        with pytest.raises(SpecError):
            f()
    for f in (
        lambda: new_run_dir(path, place / 'runs'),
        lambda: Run(place / 'runs' / '20260101-0000-finetune-0000').save(path, {}),
    ):
        if path in ('-x', 'link') and f.__code__.co_names[0] == 'Run':
            continue  # Plain names
        with pytest.raises(RunError):
            f()


def test_links_are_not_listed(place):
    assert [r.name for r in list_runs(place / 'runs')] == ['20260101-0000-finetune-0000']
    assert open_run(place / 'outside').path == place / 'outside'  # A path, given as one, is what the caller wants
    assert open_run(str(place / 'outside')).path == place / 'outside'


@pytest.mark.parametrize('name', ['{model}', '{max_steps}/{x}', '{dataset_revision}', '{{', '{0}{__class__}'])
def test_braces(tmp_path, monkeypatch, name):
    "A runs directory with braces is a directory with braces, not a template for papermill"
    stand_in(tmp_path / 'jobs', '1+1')
    monkeypatch.setattr(supervising, 'jobs_dir', lambda: tmp_path / 'jobs')
    seen = []
    monkeypatch.setattr(
        papermill,
        'execute_notebook',
        lambda i, o, params, **kw: seen.extend(
            papermill.parameterize.parameterize_path(str(x), params) for x in (i, o) if x
        ),
    )
    run = jobs.run_job(
        'finetune', runs_dir=tmp_path / name, show=False, max_steps=1, dataset_revision='../../../outside'
    )
    assert seen == [str(tmp_path / 'jobs' / 'finetune.ipynb')]
    assert run.path.parent == tmp_path / name and {p.name for p in tmp_path.iterdir()} == {'jobs', Path(name).parts[0]}


def test_dataset_out_of_its_folder(tmp_path):
    "A saved dataset may not name files elsewhere"
    (tmp_path / 'd').mkdir()
    (tmp_path / 'private.jsonl').write_text('{"text": "private"}\n')
    for n in ('../private.jsonl', str(tmp_path / 'private.jsonl')):
        (tmp_path / 'd' / 'state.json').write_text(json.dumps(dict(_data_files=[dict(filename=n)])))
        with pytest.raises(SpecError, match='names a file outside its folder'):
            find_source(str(tmp_path / 'd'))


# ---- Code in files


class Evil:
    "Touches a file when it is unpickled"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f'touch {self.path}',))


def torch_file(path, canary):
    "A file as torch.save writes it, with such an object inside"
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', pickle.dumps(Evil(canary), 2))
        z.writestr('archive/version', '3\n')


def test_evil_is_evil(tmp_path):
    "The pickles of the tests below do run code when somebody loads them carelessly"
    torch_file(tmp_path / 'f.bin', tmp_path / 'ran')
    pickle.loads(zipfile.ZipFile(tmp_path / 'f.bin').read('archive/data.pkl'))
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'files',
    [
        ['config.json', 'pytorch_model.bin'],
        ['config.json', 'pytorch_model.bin', 'other.safetensors'],
        ['adapter_config.json', 'adapter_model.bin'],
        ['adapter_config.json', 'adapter_model.bin', 'training_args.bin', 'optimizer.safetensors'],
        ['config.json', 'model.pkl'],
        ['config.json', 'model.ckpt'],
    ],
    ids=' '.join,
)
def test_pickled_model(tmp_path, files):
    "Pickled weights are refused with the reason; a safetensors file of another name does not change that"
    from unsloth_nb.training.loading import check_model

    (tmp_path / 'm').mkdir()
    for f in files:
        torch_file(tmp_path / 'm' / f, tmp_path / 'PWNED') if not f.endswith('json') else (
            tmp_path / 'm' / f
        ).write_text('{"model_type": "llama", "base_model_name_or_path": "smollm2-135m"}')
    with pytest.raises(SpecError, match='pickled ones are not loaded, since they can run code'):
        check_model(FinetuneJob(model=str(tmp_path / 'm')))
    assert not (tmp_path / 'PWNED').exists()


@pytest.mark.parametrize(
    'files,why',
    [
        (['rows.py'], 'holds no .json'),
        (['rows.pkl'], 'holds no .json'),
        (['dataset_infos.json', 'rows.py', 'rows.pkl'], ''),
        (['rows.jsonl', 'loader.py', 'x.pkl'], None),
    ],
    ids=['script', 'pickle', 'script-and-json', 'rows-and-script'],
)
def test_dataset_with_code(tmp_path, files, why):
    "A loading script or a pickle is never run: refused where there is nothing else, else left alone"
    from unsloth_nb.data.load import load_data

    (tmp_path / 'd').mkdir()
    for f in files:
        p = tmp_path / 'd' / f
        if f.endswith('py'):
            p.write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
        elif f.endswith('pkl'):
            p.write_bytes(pickle.dumps(Evil(tmp_path / 'PWNED')))
        else:
            p.write_text(
                '\n'.join(json.dumps(dict(text=f'Line {i}.')) for i in range(8)) if f == 'rows.jsonl' else '{}'
            )
    job = FinetuneJob(dataset=str(tmp_path / 'd'), test_size=2)
    if why is None:
        assert len(load_data(job).train) == 6
    else:
        with pytest.raises(SpecError, match=why):
            load_data(job)
    for f in ('d/rows.pkl', 'd/rows.py'):
        if (tmp_path / f).exists():
            with pytest.raises(SpecError, match='file; expected one of .json|is a Python pickle, which is code'):
                load_data(job.replace(dataset=str(tmp_path / f)))
    assert not (tmp_path / 'PWNED').exists()


def model_folder(lib, folder, canary, **config):
    "The embedded model with code in every place where a library might run it"
    from unsloth_nb.training.loading import embedded_model

    folder.mkdir()
    for f in embedded_model().iterdir():
        (folder / f.name).symlink_to(f)
    for n, more in {
        'config.json': dict(auto_map=dict(AutoConfig='evil.Config', AutoModelForCausalLM='evil.Model'), **config),
        'tokenizer_config.json': dict(
            auto_map=dict(AutoTokenizer=['evil.Tok', 'evil.Tok']), **(dict(tokenizer_class='Tok') if config else {})
        ),
    }.items():
        d = json.loads((folder / n).read_text())
        (folder / n).unlink()
        (folder / n).write_text(json.dumps(d | more))
    (folder / 'evil.py').write_text(f"open({str(canary)!r}, 'w')")
    for n in ('pytorch_model.bin', 'training_args.bin', 'optimizer.pt', 'rng_state.pth'):
        torch_file(folder / n, canary)
    return folder


def test_remote_code_of_a_known_model(lib, tmp_path):
    "A folder whose model is known without its own code is loaded without that code; nothing pickled is touched"
    folder = model_folder(lib, tmp_path / 'm', tmp_path / 'PWNED')
    model = lib.load_model(FinetuneJob(model=str(folder), max_seq_length=64))
    assert (
        type(model.model.get_base_model()).__module__.startswith('transformers.') and not (tmp_path / 'PWNED').exists()
    )


def test_remote_code_of_an_unknown_model(lib, tmp_path):
    "A folder that needs its own code is refused, with the reason"
    job = FinetuneJob(
        model=str(model_folder(lib, tmp_path / 'm', tmp_path / 'PWNED', model_type='evil')), max_seq_length=64
    )
    for load in (lib.load_model, lib.load_tokenizer):
        with pytest.raises(
            SpecError, match='custom code|trust_remote_code|model type `evil`|cannot be loaded|needs its own'
        ):
            load(job)
    assert not (tmp_path / 'PWNED').exists()


# ---- Runaway templates


def _loops(n, body=''):
    return ''.join(f'{{% for v{i} in range(99999) %}}' for i in range(n)) + body + '{% endfor %}' * n


RUNAWAY = {
    'nested loops': _loops(4),
    'nested loops that write': _loops(3, 'x' * 1000),
    'loop with a condition': "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    'huge range': '{% for i in range(10**9) %}{% endfor %}',
    'recursion': '{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}',
    'branching recursion': '{% macro f(n) %}{% if n < 60 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}{% endmacro %}{{ f(0) }}',
    'recursive loop': '{% for x in [1,2] recursive %}{% if loop.depth < 60 %}{{ loop([1,2]) }}{% endif %}{% endfor %}',
    'multiplied text': "{{ 'a' * 10**10 }}",
    'doubled text': "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    'doubled by tilde': "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    'doubled list': "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    'list of itself': "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    'dict of itself': "{% set ns = namespace(s=1) %}{% for i in range(40) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s | tojson }}",
    'arguments of themselves': "{% set ns = namespace(s=1) %}{% macro f() %}{% set ns.s = varargs %}{% endmacro %}{% for i in range(40) %}{{ f(ns.s, ns.s) }}{% endfor %}{{ ns.s }}",
    'power': '{{ 10**(10**9) }}',
    'power of powers': "{% set ns = namespace(s=9) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
    'padding': "{{ ''.ljust(10**10) }}",
    'wide format': "{{ '%9999999999d' % 1 }}",
    'wide str.format': "{{ '{:>9999999999}'.format(1) }}",
    'lipsum': '{{ lipsum(10**7) }}',
    'center': "{{ 'a' | center(10**10) }}",
    'indent': "{{ ('x\n' * 9999) | indent('y' * 99999) }}",
    'wide JSON': '{{ [1, [2]] | tojson(indent=10**9) }}',
    'replace': "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    'replace filter': "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    'join': "{{ (['a' * 99999] * 99999) | join }}",
    'str.join': "{{ ''.join(['a' * 99999] * 99999) }}",
    'slices': '{{ [1] | slice(10**9) | list }}',
}
ESCAPES = {
    'class': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    'attr filter': "{{ ''|attr('__class__')|attr('__mro__') }}",
    'globals': '{{ namespace.__init__.__globals__ }}',
    'format': "{{ '{0.__class__.__mro__}'.format('') }}",
    'import': "{{ raise_exception.__globals__['__builtins__'] }}",
    'append': '{{ messages.append(1) }}',
}


def in_child(f, seconds=30, memory=3 * 2**30):
    "What `f` raises in a child process with a limit of time and memory, and the seconds and bytes that it took"
    ctx = get_context('fork')
    there, here = ctx.Pipe()

    def work():
        limit = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        start = time.time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            res = ('nothing raised', repr(f())[:200])
        except BaseException as e:
            res = (type(e).__name__, str(e))
        here.send((*res, time.time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024))
        os._exit(0)

    p = ctx.Process(target=work, daemon=True)
    p.start()
    try:
        return there.recv() if there.poll(seconds) else ('never ended', '', seconds, 0)
    finally:
        p.kill()
        p.join()


@pytest.fixture(scope='module')
def tok(lib):
    return lib.load_tokenizer(FinetuneJob(max_seq_length=512))


def with_template(tok, text):
    new = copy.copy(tok)
    new.chat_template = text
    return new


ASK = [dict(role='user', content='Hi')]


@pytest.mark.parametrize('name', RUNAWAY)
def test_runaway_template(tok, name):
    "Stopped within seconds and a bound of memory, with the reason"
    from unsloth_nb.tokens.templates import render

    kind, why, secs, size = in_child(lambda: render(with_template(tok, RUNAWAY[name]), ASK))
    assert kind in ('TemplateLimit', 'FormatError'), (kind, why)
    assert 'chat template' in why and secs < 20 and size < 2**30, (why, secs, size)


@pytest.mark.parametrize('name', ESCAPES)
def test_template_escape(tok, name):
    "Python's insides are out of reach"
    from unsloth_nb.tokens.templates import FormatError, TemplateLimit, render

    try:
        text = render(with_template(tok, ESCAPES[name]), ASK)
    except (FormatError, TemplateLimit):
        return
    assert text == '', text  # An attribute that the sandbox hides is undefined


def test_runaway_everywhere(tok, lib):
    "By the tokenizer's own method, in a thread, and once for a whole dataset"
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.tokens.templates import TemplateLimit

    bad = with_template(tok, RUNAWAY['nested loops'])
    got = []

    def work():
        try:
            bad.apply_chat_template(ASK, tokenize=False)
        except Exception as e:
            got.append(type(e).__name__)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert got == ['SecurityError']
    late = with_template(
        tok, tok.chat_template + "{% if messages[-1].content == 'Now' %}" + RUNAWAY['nested loops'] + '{% endif %}'
    )
    rows = [
        lib.Conversation([dict(role='user', content='Hi'), dict(role='assistant', content='Now')], row=i)
        for i in range(50)
    ]
    start = time.time()
    with pytest.raises(TemplateLimit, match='row 0: the chat template .* was stopped'):
        lib.make_examples(rows, Formatter(late), 512)
    assert time.time() - start < 20


def test_honest_templates(tok, lib):
    "Every template of Unsloth writes the same text with the budget as without, and needs less than a hundredth of it for 200 turns"
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from unsloth.chat_templates import CHAT_TEMPLATES
    from unsloth_nb.core import template_sandbox as sandbox
    import transformers.utils.chat_template_utils as c

    ours = c.ImmutableSandboxedEnvironment
    assert ours is sandbox.bounded_environment()
    args = dict(
        messages=[dict(role=r, content=f'Text {i}. ' * 20) for i in range(100) for r in ('user', 'assistant')],
        bos_token='<s>',
        eos_token='</s>',
        add_generation_prompt=True,
    )
    n = 0
    for name, (text, *_) in CHAT_TEMPLATES.items():
        made = []
        for env in (ImmutableSandboxedEnvironment, ours):
            c.ImmutableSandboxedEnvironment = env
            try:
                made.append(c._compile_jinja_template.__wrapped__(text).render(**args))
            except Exception as e:
                made.append(str(e))
            finally:
                c.ImmutableSandboxedEnvironment = ours
        assert made[0] == made[1], name
        assert (
            sandbox.STEPS - sandbox._left.steps < sandbox.STEPS / 100
            and sandbox.MADE - sandbox._left.made < sandbox.MADE / 100
        ), name
        n += 'Text 99' in made[0]
    assert n > 20


# ---- Shown as text

CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
SHOWN = [
    '<script>PWN()</script>',
    '<img src=x onerror=PWN>',
    '</td></tr></table></div><h1 id=PWN>',
    '[PWN](javascript:PWN)',
    '![PWN](javascript:PWN)',
    '<a href=javascript:PWN>PWN</a>',
    'x | PWN | y',
    '`<i>PWN</i>` ``<i>PWN',
    '*PWN* **PWN** ~~PWN~~ _PWN_',
    'https://PWN.example/ www.PWN.example a@PWN.example <https://PWN.example>',
    '$\\href{javascript:PWN}{x}$ \\(PWN\\)',
    '# PWN',
    '[PWN]: javascript:PWN',
    'PWN\n\n<script>PWN</script>\n\n# PWN\n\n```\n',
    '&lt;script&gt;PWN',
    '\\<b>PWN</b> \\`<b>PWN</b>`',
    '\x1b[2J\x1b[31mPWN',
    '\x1b]8;;http://PWN\x07PWN\x1b]8;;\x07',
    '\x1b]0;PWN\x07',
    '\x9b2JPWN',
    '\u202ePWN\u2066',
    'PWN\rPWN\x08\x08',
    'PWN\u2028PWN\x85PWN',
    '"PWN" onmouseover=PWN \'',
]
HOSTILE = '\n'.join(SHOWN)


class Page(HTMLParser):
    "Elements and attributes that no object of ours makes, and the text of the rest"

    plain = set('table thead tbody tr th td p ul ol li strong b code pre div span br sup hr'.split())

    def __init__(self, html):
        super().__init__()
        self.bad = []
        self.text = ''
        self.cells = 0
        self.widths = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        ok = tag in self.plain or tag == 'img' and str(dict(attrs).get('src')).startswith('data:image/png;base64,')
        if not ok or any(
            k not in ('style', 'title', 'alt', 'src', 'class', 'align', 'start') or 'PWN' in str(v) and k != 'src'
            for k, v in attrs
        ):
            self.bad.append((tag, attrs))

    def handle_data(self, d):
        self.text += d

    def handle_comment(self, d):
        self.bad.append(('comment', d))

    handle_decl = handle_comment


def rendered(markdown):
    "Markdown as nbconvert renders it, and by the rules of CommonMark with tables"
    from markdown_it import MarkdownIt
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    return dict(
        nbconvert=markdown2html_mistune(markdown),
        commonmark=MarkdownIt('commonmark', dict(html=True)).enable(['table', 'strikethrough']).render(markdown),
    )


def faults(o):
    "What of the data is raw in anything that an object shows"
    pages = {k: v for n in ('_repr_markdown_',) if hasattr(o, n) for k, v in rendered(o._repr_markdown_()).items()}
    if hasattr(o, '_repr_html_'):
        pages['html'] = o._repr_html_()
    for k, h in pages.items():
        page = Page(h)
        if page.bad:
            yield k, page.bad[:3]
        if CONTROL.search(h):
            yield k, CONTROL.findall(h)[:3]
    for f in (o.__repr__, o.__str__):
        if CONTROL.search(f()):
            yield f.__name__, CONTROL.findall(f())[:3]


def rows(payload):
    return [
        dict(
            messages=[
                dict(role='system', content=f'{payload} {i // 4}'),
                dict(role='user', content=f'{payload} {i}'),
                dict(role='assistant', content=payload),
            ],
            tools=[
                dict(
                    type='function',
                    function=dict(name=payload, description=payload, parameters=dict(type='object', properties={})),
                )
            ],
            **{payload: 1},
        )
        for i in range(8)
    ]


def name_of(payload):
    return re.sub('[/\x00\ud800-\udfff]', '', payload)[:80] or 'x'


def hostile_data(tmp_path, payload, **kw):
    from unsloth_nb.data.load import load_data

    f = tmp_path / f'{name_of(payload)}.jsonl'
    f.write_text('\n'.join(map(json.dumps, rows(payload))))
    return load_data(FinetuneJob(dataset=str(f), test_size=2, control_characters='keep', **kw))


def fabricated_run(tmp_path, payload):
    "A run directory as a run with such data would leave it"
    p = tmp_path / 'runs' / f'{name_of(payload)}-x'
    p.mkdir(parents=True)
    write_json(
        p / 'job.json', dict(job='finetune', parameters=FinetuneJob().to_dict() | dict(dataset=payload, model=payload))
    )
    write_json(
        p / 'result.json',
        dict(
            status='failed',
            reason=payload,
            metrics=dict(base={payload: 0.1, 'exact_match': 0.5}, tuned={payload: 0.2}),
            artifacts={payload: {'f': dict(bytes=1, sha256='')}},
            seconds={},
        ),
    )
    run = Run(p)
    with run.stage(payload):
        run.note(payload)
    return run


def objects(tmp_path, payload, lib, tok):
    "Every object of the way, with the payload wherever data can put it"
    from unsloth_nb.lint.advice import Finding, Findings
    from unsloth_nb.evaluation.evaluation import Comparison
    from unsloth_nb.tokens.formatting import Example
    from unsloth_nb.evaluation.chatting import Turn
    from unsloth_nb.evaluation.generation import Answer
    from unsloth_nb.jobs.benchmark_results import Benchmark
    from unsloth_nb.core.spec import BenchmarkJob

    data = hostile_data(tmp_path, payload)
    yield from (
        data,
        data.train[0],
        data.ledger,
        lib.Conversation(text=payload),
        lib.Conversation(data.train[0].messages, rejected=data.train[0].messages[-1:], tools=data.train[0].tools),
    )
    ids = tok(payload)['input_ids']
    yield Example(ids, [i % 2 == 0 for i in range(len(ids))], 0, tok)
    bare = [lib.Conversation(c.messages, row=c.row) for c in data.train]
    examples = lib.make_examples(bare, lib.Formatter(tok, special_tokens='keep'), 4096)
    examples.warnings.append(payload)
    yield from (examples, examples[0], lib.profile_examples(examples, bare))
    yield FinetuneJob(dataset=payload, revision=payload, dataset_columns={payload: payload}, target_modules=[payload])
    yield Findings([Finding(payload, 'error', payload, 1, 2, payload, payload, payload)])
    yield Comparison(
        dict(base={payload: 0.5}, tuned={payload: 1.0}),
        [dict(row=0, prompt=payload, expected=payload, base=payload, tuned=payload)],
    )
    yield Turn(payload, dict(base=Answer(payload, 1, True), tuned=Answer(payload, 1, True)))
    yield from (run := fabricated_run(tmp_path, payload), list_runs(run.path.parent))
    ms = [dict(name=payload, round=1, status='failed', reason=payload)]
    yield Benchmark(
        payload,
        dict(name=payload),
        {},
        BenchmarkJob().to_dict() | dict(model='m', dataset=payload),
        dict(examples=8, tokens=800),
        ms,
    )


@pytest.mark.parametrize('payload', [*SHOWN, HOSTILE], ids=[*ids(SHOWN), 'all'])
def test_shown_as_text(tmp_path, lib, tok, payload):
    "No element, attribute or control character of the data is left in what objects show, and the text itself is there"
    bad = {}
    told = 0
    for o in objects(tmp_path, payload, lib, tok):
        if f := list(faults(o)):
            bad.setdefault(type(o).__name__, f)
        told += 'PWN' in shown(o).replace('·', ' ')
    assert not bad and told >= 12


@pytest.mark.parametrize('payload', [*SHOWN, HOSTILE], ids=[*ids(SHOWN), 'all'])
def test_tables_keep_their_shape(payload):
    "Bars and line ends do not make cells, and what is read is what was given"
    for f in (markdown_text, markdown_code):
        for h in rendered(f'| a | b |\n|---|---|\n| {f(payload)} | 1 |\n\nx {f(payload)} y\n\n{f(payload)}').values():
            page = Page(h)
            assert not page.bad and h.count('<td') == 2
            assert page.text.count(' '.join(plain_text(payload).split())) == 3
    assert Page(f'<p title="{html_text(payload)}">x</p>').bad == [] or 'PWN' in payload
    assert json.loads(json_text({payload: payload})) == {payload: payload} and not CONTROL.search(json_text([payload]))


@pytest.mark.parametrize(
    'args',
    [
        ['data', '{file}', '-p', 'control_characters=keep', '--show', '2'],
        ['data', '{file}', '-p', 'control_characters=keep', '--json'],
        ['data', '{file}'],
        ['check', '{notebook}'],
        ['check', '{file}'],
        ['runs', 'list', '--runs-dir', '{runs}'],
        ['runs', 'show', '--runs-dir', '{runs}'],
        ['runs', 'show', '{payload}', '--runs-dir', '{runs}'],
        ['run', 'finetune', '-p', 'dataset={payload}'],
        ['run', 'finetune', '-p', 'max_steps={payload}'],
        ['run', 'finetune', '-f', '{payload}'],
        ['run', 'finetune', '-f', '{file}'],
    ],
    ids=lambda a: ' '.join(a[:2]) + (' json' if '--json' in a else ''),
)
def test_printed(tmp_path, monkeypatch, lib, args):
    "Nothing that a command prints steers the terminal"
    f = tmp_path / f'{name_of(HOSTILE)}.jsonl'
    f.write_text('\n'.join(json.dumps({k: v for k, v in r.items() if k != 'tools'}) for r in rows(HOSTILE)))
    nb = tmp_path / f'{name_of(HOSTILE)}.ipynb'
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell(f'!pip install x\n# {HOSTILE}'.replace('\n', ' ')),
                nbformat.v4.new_code_cell(
                    f'from trl import SFTTrainer\nt = SFTTrainer(model="a", tokenizer={HOSTILE!r})'
                ),
            ]
        ),
        nb,
    )
    places = dict(
        file=str(f), notebook=str(nb), runs=str(fabricated_run(tmp_path, HOSTILE).path.parent), payload=HOSTILE
    )
    monkeypatch.setattr(
        sys, 'argv', ['unsloth-nb', *(a.format(**places) if a.startswith('{') or '={' in a else a for a in args)]
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit):
        cli.main()
        sys.exit(0)
    assert 'PWN' in out.getvalue() and not CONTROL.search(out.getvalue()), CONTROL.findall(out.getvalue())[:5]


def test_progress_is_printed_as_text(tmp_path):
    "Notes and stages of a run, as the runner prints them; line separators in a text do not hide the lines behind it"
    run = fabricated_run(tmp_path, HOSTILE)
    write_json(run.path / 'job.json', dict(job='finetune', parameters=FinetuneJob().to_dict()))
    run.note('the last one')
    out = io.StringIO()
    jobs.Watcher(run, out=out).look(final=True)
    assert 'PWN' in out.getvalue() and 'the last one' in out.getvalue() and not CONTROL.search(out.getvalue())
    assert [l.get('note', l.get('state')) for l in read_lines(run.path / 'progress.jsonl')] == [
        'started',
        HOSTILE,
        'done',
        'the last one',
    ]


def test_report(tmp_path, lib, tok):
    "The executed notebook as a page: outputs, errors and prints of hostile data hold no element and no script of it"
    from IPython.core.interactiveshell import InteractiveShell

    v4 = nbformat.v4
    fmt = InteractiveShell.instance().display_formatter
    outs = [v4.new_output('display_data', data=fmt.format(o)[0]) for o in objects(tmp_path, HOSTILE, lib, tok)]
    outs += [
        v4.new_output('stream', name='stdout', text=HOSTILE),
        v4.new_output(
            'error', ename='SpecError', evalue=str(SpecError(HOSTILE)), traceback=[f'SpecError: {SpecError(HOSTILE)}']
        ),
    ]
    run = fabricated_run(tmp_path / 'r', HOSTILE)
    nb = v4.new_notebook(
        cells=[v4.new_code_cell(f'dataset = {HOSTILE!r}', outputs=outs)],
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'), title=HOSTILE),
    )
    nbformat.write(nb, run.path / 'notebook.ipynb')

    class Report(HTMLParser):
        bad = []
        script = None
        text = ''

        def handle_starttag(self, tag, attrs):
            self.script = tag if tag in ('script', 'style') else None
            if any('PWN' in str(v) and not str(v).startswith('data:image/png;base64,') for k, v in attrs):
                self.bad.append((tag, attrs))

        def handle_endtag(self, tag):
            self.script = None

        def handle_data(self, d):
            if self.script and 'PWN' in d:
                self.bad.append((self.script, d[:80]))
            if not self.script:
                self.text += d

    page = Report()
    page.feed(supervising.write_report(run).read_text())
    assert not page.bad and page.text.count('PWN') > 100


def test_errors_are_text():
    "A refusal shows neither control characters nor a secret, however it is printed"
    e = SpecError(f'{HOSTILE} {TOKEN}')
    assert not CONTROL.search(str(e) + repr(e)) and TOKEN not in str(e) + repr(e) and 'hf_…' in str(e)
    assert mask_secrets(f'x {WANDB} y', named=False) == 'x … y'
