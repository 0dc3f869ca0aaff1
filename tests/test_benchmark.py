"The benchmark end to end on a tiny model: engines that agree, failures that become rows, one timed at a time."

import json
import signal
import subprocess
import sys
import time
import psutil
import pytest

SHAPE = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=49152,
    tie_word_embeddings=True,
)


@pytest.fixture(scope='module')
def tiny(lib, tmp_path_factory):
    "Two layers of a llama with the embedded tokenizer"
    from unsloth_nb.jobs.benchmarking import random_model

    return random_model(SHAPE, tmp_path_factory.mktemp('tiny') / 'model')


@pytest.fixture(scope='module')
def result(lib, tiny, tmp_path_factory):
    "(Benchmark, its run): transformers and this package, two children at once, one that cannot train and one that is too slow"
    from unsloth_nb.jobs.benchmarking import CONFIGURATIONS, Configuration, benchmark

    names = ['transformers_lora', 'classic_16bit', 'trl_liger_packed']
    bad = Configuration('transformers', 'no such layer', dict(target_modules=['nope']))
    run = lib.start_run(
        lib.BenchmarkJob(model=str(tiny), max_rows=48, steps=2, max_seq_length=256, preload=2),
        tmp_path_factory.mktemp('runs'),
    )
    return benchmark(run.job, run, {n: CONFIGURATIONS[n] for n in names} | dict(bad=bad)), run


def by_name(result):
    return {r['name']: r for r in result.rows}


@pytest.mark.slow
def test_engines_agree(result):
    "The same rows in every step, and the same loss and gradient norm within bfloat16"
    rows = by_name(result[0])
    a = rows['transformers_lora']
    b = rows['classic_16bit']
    assert a['status'] == b['status'] == 'ok', (a.get('reason'), b.get('reason'))
    assert a['tokens'] == b['tokens'] and len(a['tokens']) == 3
    assert a['losses'] == pytest.approx(b['losses'], abs=0.02) and a['grad_norms'] == pytest.approx(
        b['grad_norms'], rel=0.05
    )
    assert a['losses'][0] != a['losses'][1]
    assert set(result[0].differences()) == {'transformers_lora', 'classic_16bit'}


@pytest.mark.slow
def test_tokens(result):
    "Real tokens are counted: those of the eight rows a step"
    import pyarrow.parquet as pq

    lengths = [
        len(r) for r in pq.read_table(result[1].path / 'measurements' / 'examples.parquet')['input_ids'].to_pylist()
    ]
    assert sum(lengths) == result[0].examples['tokens']
    tokens = by_name(result[0])['classic_16bit']['tokens']
    assert (
        all(8 * min(lengths) <= n <= 8 * max(lengths) for n in tokens)
        and len(set(lengths)) > 1
        and len(set(tokens)) > 1
    )


@pytest.mark.slow
def test_one_is_timed_at_a_time(result):
    "Two children were there at once, and their training did not overlap"
    from unsloth_nb.runs.run import read_lines

    home = result[1].path / 'measurements'
    spans = []
    lives = []
    for n in ('transformers_lora', 'classic_16bit'):
        lines = {
            (l['stage'], l['state']): l['time'] for l in read_lines(home / f'1-{n}' / 'progress.jsonl') if 'stage' in l
        }
        spans.append((lines['training', 'started'], lines['training', 'done']))
        lives.append((lines['loading', 'started'], lines['training', 'done']))
    (_, a), (b, _) = sorted(spans)
    assert a <= b
    (_, a), (b, _) = sorted(lives)
    assert a > b


@pytest.mark.slow
def test_failures_are_rows(result):
    "A failing configuration and one that needs another machine keep their lines, with reasons that are shown"
    rows = by_name(result[0])
    text = repr(result[0])
    assert rows['bad']['status'] == 'failed' and 'nope' in rows['bad']['reason'] and rows['bad']['reason'] in text
    if result[0].device['kind'] == 'cpu':
        assert rows['trl_liger_packed']['status'] == 'skipped' and 'CUDA' in rows['trl_liger_packed']['reason']
        assert 'trl_liger_packed' in text and 'trl_liger_packed' in result[0]._repr_markdown_()


@pytest.mark.slow
def test_file(result):
    "benchmark.json holds all that the tables and pictures need"
    from unsloth_nb.jobs.benchmarking import Benchmark

    f = result[1].path / 'benchmark.json'
    d = json.loads(f.read_text())
    assert set(d) == {'date', 'device', 'versions', 'job', 'examples', 'measurements'}
    assert {'name', 'kind', 'memory_total'} <= set(d['device']) and {
        'torch',
        'transformers',
        'unsloth',
        'peft',
        'trl',
    } <= set(d['versions'])
    ok = next(m for m in d['measurements'] if m['name'] == 'classic_16bit')
    number = {
        'tokens_per_second',
        'step_seconds',
        'tokens_per_step',
        'first_step_seconds',
        'load_seconds',
        'peak_bytes',
        'load_peak_bytes',
        'predicted_peak_bytes',
    }
    assert all(isinstance(ok[k], (int, float)) and ok[k] > 0 for k in number)
    assert {
        'per_device_train_batch_size',
        'gradient_accumulation_steps',
        'optim',
        'packing',
        'padding_free',
        'load_in_4bit',
    } <= set(ok['effective'])
    again = Benchmark.read(f)
    assert repr(again) == repr(result[0]) and 'base64,iVBORw0KGgo' in again.picture().data


@pytest.mark.slow
def test_plain_engine_is_plain(result):
    "transformers was measured without Unsloth: the child says what it had imported"
    from unsloth_nb.runs.run import read_json

    got = {
        n: read_json(result[1].path / 'measurements' / f'1-{n}' / 'measured.json')['unsloth']
        for n in ('transformers_lora', 'classic_16bit')
    }
    assert got == dict(transformers_lora=False, classic_16bit=True)


def test_timeout(lib, tiny, tmp_path):
    "A child that takes too long is killed, and says so"
    from unsloth_nb.jobs.benchmarking import CONFIGURATIONS, benchmark

    run = lib.start_run(lib.BenchmarkJob(model=str(tiny), max_rows=16, time_limit=1), tmp_path)
    start = time.time()
    (row,) = benchmark(run.job, run, dict(one=CONFIGURATIONS['transformers_lora'])).rows
    assert row['status'] == 'timeout' and '1 s' in row['reason'] and time.time() - start < 15
    assert not [p for p in psutil.process_iter(['cmdline']) if str(run.path) in ' '.join(p.info['cmdline'] or [])]


def test_waiting_is_not_counted(tmp_path):
    "A child that waits for its turn uses up none of its time"
    from unsloth_nb.jobs.benchmarking import _waited
    from unsloth_nb.runs.run import Run, append_line

    f = tmp_path / 'progress.jsonl'
    now = time.time()
    assert _waited(Run(tmp_path)) == 0
    append_line(f, dict(time=now - 50, stage='waiting', state='started'))
    assert _waited(Run(tmp_path)) == pytest.approx(50, abs=2)
    append_line(f, dict(time=now - 20, stage='waiting', state='done'))
    assert _waited(Run(tmp_path)) == pytest.approx(30)


def test_lock(tmp_path):
    "A lock is one process's alone, and goes with the process"
    from unsloth_nb.jobs.benchmarking import exclusive

    code = f"from unsloth_nb.jobs.benchmarking import exclusive; import time\nwith exclusive({str(tmp_path / 'lock')!r}): print('held', flush=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    import fcntl

    with (tmp_path / 'lock').open('a') as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    p.send_signal(signal.SIGKILL)
    p.wait()
    start = time.time()
    with exclusive(tmp_path / 'lock'):
        assert time.time() - start < 5


@pytest.mark.parametrize(
    'code,late,status,word',
    [(-9, False, 'failed', 'memory'), (-9, True, 'timeout', '7 s'), (3, False, 'failed', 'exit code 3: the end')],
)
def test_outcome(tmp_path, code, late, status, word):
    "A child that leaves no result has one all the same, with what had been predicted"
    from unsloth_nb.jobs.benchmarking import outcome

    (tmp_path / 'log.txt').write_text('the beginning\nthe end\n')
    (tmp_path / 'measured.json').write_text(json.dumps(dict(status='running', predicted_peak_bytes=5)))
    res = outcome(tmp_path, code, late, 7)
    assert res['status'] == status and word in res['reason'] and res['predicted_peak_bytes'] == 5


def test_out_of_memory():
    "Memory that ran out is told from other failures"
    import torch
    from unsloth_nb.jobs.benchmarking import failure_row

    for e in (
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
        MemoryError(),
        RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'),
    ):
        assert failure_row(e)['status'] == 'out_of_memory'
    assert failure_row(RuntimeError('mat1 and mat2 shapes')) == dict(
        status='failed', reason='RuntimeError: mat1 and mat2 shapes'
    )


def test_child_ends_with_its_parent():
    "No child goes on when the benchmark was killed"
    code = "import subprocess,sys,time; p = subprocess.Popen([sys.executable, '-c', 'import os; from unsloth_nb.jobs.benchmarking import _follow; parent = os.getppid(); print(os.getpid(), flush=True); _follow(parent)'], start_new_session=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    pid = int(p.stdout.readline())
    p.kill()
    p.wait()
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == 'zombie':
            break
        time.sleep(0.1)
    else:
        pytest.fail('the child still runs')


def test_random_model(lib, tiny):
    "Shape, precision and format as asked for; the seed decides the weights"
    from safetensors.torch import load_file
    from unsloth_nb.jobs.benchmarking import random_model
    import torch

    config = json.loads((tiny / 'config.json').read_text())
    assert {k: config[k] for k in SHAPE} == SHAPE and config['model_type'] == 'llama' and config['eos_token_id'] == 2
    w = load_file(tiny / 'model.safetensors')
    assert w['model.layers.1.self_attn.k_proj.weight'].shape == (64, 128) and {t.dtype for t in w.values()} == {
        torch.bfloat16
    }
    small = SHAPE | dict(hidden_size=64, num_hidden_layers=1)
    a, b, c = (
        load_file(random_model(small, tiny.parent / n, seed) / 'model.safetensors')['model.layers.0.mlp.up_proj.weight']
        for n, seed in (('a', 1), ('b', 1), ('c', 2))
    )
    assert a.equal(b) and not a.equal(c)


@pytest.mark.parametrize(
    'name,kind,experts',
    [
        ('llama-3.1-8b', 'llama', None),
        ('qwen3-30b-a3b', 'qwen3_moe', 128),
        ('qwen3-8b', 'qwen3', None),
        ('gemma-3-4b-it', 'gemma3_text', None),
    ],
)
def test_shapes_of_presets(name, kind, experts):
    "A preset's shape is a configuration that transformers knows"
    from transformers import AutoConfig
    from unsloth_nb.jobs.benchmarking import _shape
    from unsloth_nb.core.spec import preset

    c = AutoConfig.for_model(**_shape(name))
    assert c.model_type == kind and getattr(c, 'num_experts', None) == experts
    assert all(getattr(c, k) == v for k, v in preset(name).shape.items() if k != 'vision_config')


def test_names():
    "The schema knows the names of the table; a wrong one gets the nearest"
    from unsloth_nb.jobs.benchmarking import CONFIGURATIONS
    from unsloth_nb.core.schema import SpecError
    from unsloth_nb.core.spec import BENCHMARKS, BenchmarkJob, FinetuneJob

    assert tuple(CONFIGURATIONS) == BENCHMARKS
    for c in CONFIGURATIONS.values():
        FinetuneJob(**c.settings)
    with pytest.raises(SpecError, match="did you mean 'transformers_qlora'"):
        BenchmarkJob(configurations=['transformer_qlora'])


def test_rounds():
    "The median round stands for all; a failed round is told and does not count"
    from unsloth_nb.jobs.benchmarking import Benchmark

    ms = [dict(name='a', round=i, status='ok', tokens_per_second=v) for i, v in enumerate((300.0, 100.0, 200.0), 1)] + [
        dict(name='a', round=4, status='timeout', reason='late')
    ]
    b = Benchmark(
        '',
        dict(name='x'),
        {},
        dict(repeats=4, model='m', dataset='d', steps=1, warmup=1),
        dict(examples=1, tokens=1),
        ms,
    )
    (row,) = b.rows
    assert (row['tokens_per_second'], row['slowest'], row['fastest']) == (200, 100, 300)
    assert 'a, round 4: timeout, late' in b.facts()


@pytest.mark.slow
def test_job(tiny, tmp_path):
    "The notebook by our runner, from the command line"
    r = subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from unsloth_nb.cli import main; sys.argv[0] = "unsloth-nb"; main()',
            'run',
            'benchmark',
            '--runs-dir',
            str(tmp_path),
            '-p',
            f'model={tiny}',
            '-p',
            'configurations=transformers_lora',
            '-p',
            'steps=2',
            '-p',
            'max_rows=32',
            '-p',
            'max_seq_length=256',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    (run,) = tmp_path.iterdir()
    metrics = json.loads((run / 'result.json').read_text())['metrics']
    assert {k: v['status'] for k, v in metrics.items()} == dict(transformers_lora='ok')
    assert (run / 'benchmark.json').exists() and 'tokens per second and peak memory' in (
        run / 'report.html'
    ).read_text()
