"""On a CUDA GPU: the job end to end, packing, NF4, and both exports. The last results are in `benchmarks/results/`.

Set OUT to a folder to have the figures written there as gpu_tests.json, and TOKENIZER to a folder with a tokenizer for
the tests on two GPUs to run where the embedded model cannot be installed."""

import json
import os
import time
from pathlib import Path
import pytest

pytestmark = pytest.mark.gpu
FIGURES = {}


@pytest.fixture(autouse=True)
def figures():
    "Write what was measured after each test, with date, card and versions: a run that is cut short keeps its figures"
    yield
    if not os.environ.get('OUT'):
        return
    from unsloth_nb.core.engine import device_info, versions

    (Path(os.environ['OUT']) / 'gpu_tests.json').write_text(
        json.dumps(
            dict(date=time.strftime('%Y-%m-%d'), card=device_info().name, versions=versions(), tests=FIGURES), indent=1
        )
        + '\n'
    )


def test_job(tmp_path):
    "The main job by papermill, adapter and merged model saved with their certificates; nothing asked for was changed"
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.runs.run import read_json

    start = time.time()
    run = run_job('finetune', 'smollm2-135m', runs_dir=tmp_path, save='merged_16bit')
    assert run.status == 'finished', run.result
    m = run.result['metrics']
    plan = read_json(run.path / 'plan.json')
    FIGURES['job'] = dict(
        seconds=round(time.time() - start, 1),
        stages=run.seconds(),
        base=m['base'],
        tuned=m['tuned'],
        certificates=m['certificates'],
        changes=plan['changes'],
        measured=plan['measured'],
    )
    assert m['base']['exact_match'] <= 0.05 and m['tuned']['exact_match'] >= 0.9 and m['tuned']['valid_json'] >= 0.98
    assert plan['device']['kind'] == 'cuda' and plan['optim'] == 'adamw_torch_fused'
    from unsloth_nb import evaluate, held_out, load_run

    again, _ = evaluate(load_run(run), held_out(run.job, n=32))
    FIGURES['job']['adapter_loaded_again'] = again
    assert again['exact_match'] >= 0.9


def test_packing(trained):
    "Packed or padded, the same rows in one step have the same loss: masks survive packing, and examples do not see each other"
    kw = dict(
        max_rows=16,
        max_steps=1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=False,
    )
    (_, padded, _), (_, packed, _) = (trained(packing=p, max_seq_length=512, **kw) for p in (False, True))
    a, b = (r.metrics[0]['loss'] for r in (padded, packed))
    rows = [json.loads((r.path / 'plan.json').read_text())['measured']['rows'] for r in (padded, packed)]
    FIGURES['packing'] = dict(
        padded_loss=a, packed_loss=b, rows=rows, changes=json.loads((packed.path / 'plan.json').read_text())['changes']
    )
    assert rows[0] == 16 and rows[1] < 8 and a == pytest.approx(b, rel=0.01)


def steps(run):
    return [(m['loss'], m['grad_norm']) for m in run.metrics]


def same_steps(a, b, rel):
    "Loss and gradient norm of every step agree; the loss ten times closer"
    assert len(a) == len(b) > 1
    for (x, g), (y, h) in zip(a, b):
        assert x == pytest.approx(y, rel=rel / 10) and g == pytest.approx(h, rel=rel)


# Compiled blocks round otherwise, and padding-free training does without them: so does what it is compared with
BLOCKS_AS_THEY_ARE = 'UNSLOTH_BLOCK_COMPILE', '0'


@pytest.mark.parametrize('checkpointing', [False, 'unsloth'], ids=['kept', 'recomputed'])
def test_padding_free(trained, checkpointing, monkeypatch):
    "Rows end to end train as padded ones do: each step's loss within 0.3% and gradient norm within 3%, on the embedded model"
    kw = dict(
        max_rows=64,
        max_steps=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
        max_seq_length=512,
        learning_rate=2e-4,
    )
    monkeypatch.setenv(*BLOCKS_AS_THEY_ARE)
    runs = {p: trained(padding_free=p, **kw)[1] for p in (False, True)}
    FIGURES[f'padding_free_{checkpointing}'] = {str(p): steps(r) for p, r in runs.items()}
    assert [json.loads((r.path / 'plan.json').read_text())['padding_free'] for r in runs.values()] == [False, True]
    same_steps(*map(steps, runs.values()), rel=0.03)


SMALL = dict(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    'family,more',
    [('llama', {}), ('mistral', dict(sliding_window=48)), ('qwen2', {}), ('qwen3', {})],
    ids=lambda v: v if isinstance(v, str) else '',
)
def test_padding_free_families(lib, trained, tmp_path, family, more, monkeypatch):
    "The same for small random models of each family that is planned padding-free, one with a sliding window shorter than the rows"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tok = lib.load_tokenizer(lib.FinetuneJob())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **more)).to(torch.bfloat16).save_pretrained(
        tmp_path / family
    )
    tok.save_pretrained(tmp_path / family)
    kw = dict(
        model=str(tmp_path / family),
        max_rows=32,
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_seq_length=512,
        learning_rate=2e-4,
    )
    monkeypatch.setenv(*BLOCKS_AS_THEY_ARE)
    runs = {p: trained(padding_free=p, **kw)[1] for p in (False, True)}
    FIGURES[f'padding_free_{family}'] = {str(p): steps(r) for p, r in runs.items()}
    assert all(json.loads((runs[p].path / 'plan.json').read_text())['padding_free'] == p for p in runs)
    same_steps(*map(steps, runs.values()), rel=0.03)


def test_packed_apart(lib, tmp_path):
    "Conversations packed in one row do not see each other: the same row beside other neighbours has the same loss"
    short = [
        dict(
            messages=[
                dict(role=r, content=f'{w} {i}')
                for r, w in (
                    ('user', 'Say'),
                    ('assistant', 'I say'),
                    ('user', 'And again'),
                    ('assistant', 'Again I say'),
                )
            ]
        )
        for i in range(8)
    ]
    losses = {}
    for packing in (False, True):
        job = lib.FinetuneJob(
            test_size=1,
            max_steps=1,
            max_seq_length=1024,
            packing=packing,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=1e-6,
            warmup_steps=0,
            gradient_checkpointing=False,
        )
        data = lib.load_data(
            job,
            short
            + [dict(messages=[dict(role='user', content='Repeat'), dict(role='assistant', content='word ' * 200)])],
        )
        model = lib.load_model(job, lib.make_plan(job, data))
        run = lib.start_run(job, tmp_path)
        lib.train(model, lib.make_examples(data.train, model.formatter, 1024), job, run)
        losses[packing] = run.metrics[0]['loss']
    FIGURES['packed_apart'] = losses
    assert losses[True] == pytest.approx(losses[False], rel=0.01)


@pytest.mark.parametrize('four_bit', [False, True], ids=['16bit', 'nf4'])
def test_exports(lib, trained, four_bit):
    "Adapter and merged model of a 16-bit and an NF4 base, reloaded and compared"
    model, run, data = trained(load_in_4bit=four_bit, max_rows=96, max_steps=24)
    certs = {to: lib.save_artifact(model, run, to, data.test) for to in ('adapter', 'merged_16bit', 'merged_4bit')}
    FIGURES[f"exports_{'nf4' if four_bit else '16bit'}"] = certs
    assert (run.path / 'merged_16bit' / 'model.safetensors').exists()


def test_answers(lib, trained):
    "A batch answers as single prompts do, a stream as a batch, and sampling repeats with its seed"
    model, _, data = trained(max_steps=1)
    prompts = [c.messages for c in data.test]
    greedy = lib.Sampling(max_new_tokens=24)
    batch = lib.generate(model, prompts, greedy)
    assert ''.join(lib.stream(model, prompts[0], greedy)) == lib.generate(model, [prompts[0]], greedy)[0].text
    warm = lib.Sampling(max_new_tokens=24, temperature=1.0, seed=3)
    assert [a.text for a in lib.generate(model, prompts, warm)] == [a.text for a in lib.generate(model, prompts, warm)]
    same = sum(a.text == lib.generate(model, [p], greedy)[0].text for a, p in zip(batch, prompts))
    FIGURES['answers'] = dict(batch_as_single=same, of=len(prompts))
    assert same >= len(prompts) - 1  # 16-bit sums may order two near-equal tokens differently


@pytest.mark.parametrize('four_bit', [False, True], ids=['16bit', 'nf4'])
def test_resume(lib, tmp_path, four_bit):
    "Stopped after three of six steps and gone on with, from a freshly loaded model: the same losses and gradient norms, and the same weights"
    from unsloth_nb.training.resuming import weights_sha256

    job = lib.FinetuneJob(
        max_rows=64,
        test_size=4,
        max_steps=6,
        max_seq_length=512,
        learning_rate=2e-4,
        load_in_4bit=four_bit,
        save_steps=2,
    )
    data = lib.load_data(job)
    plan = lib.make_plan(job, data, runs_dir=tmp_path / 'none')

    class StopAt:
        def __init__(self, run, step):
            self.run = run
            self.step = step

        def show(self, progress, final=False):
            if not final and progress.metrics[-1]['step'] == self.step:
                self.run.stop('a test')

    def go(run, stop=None):
        model = lib.load_model(job, plan)
        m = lib.train(model, lib.make_examples(data.train, model.formatter, 512), job, run, StopAt(run, stop))
        return weights_sha256(model.model), m

    whole, again, run = (lib.start_run(job, tmp_path) for _ in range(3))
    want, m = go(whole)
    twice, _ = go(again)
    with pytest.raises(lib.Interrupted):
        go(run, 2)
    stopped = len(run.metrics)
    got, n = go(run)
    name = 'nf4' if four_bit else '16bit'
    FIGURES[f'resume_{name}'] = dict(
        stopped_after=stopped,
        whole=steps(whole),
        undisturbed_twice=steps(again),
        resumed=steps(run),
        same_bits_undisturbed=want == twice,
        same_bits_resumed=want == got,
        train_loss=[m['train_loss'], n['train_loss']],
    )
    same_steps(steps(run), steps(whole), rel=0.02)
    if want == twice:
        assert got == want  # Kernels that repeat their bits: going on must as well


def test_out_of_memory(lib, tmp_path):
    "More than the card has: the reason, the plan beside it, and a change that then fits"
    import re
    import torch
    from unsloth_nb.core.schema import read_value

    job = lib.FinetuneJob(
        max_rows=400,
        test_size=4,
        max_steps=2,
        max_seq_length=512,
        per_device_train_batch_size=256,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        padding_free=False,
        load_in_4bit=False,
    )
    data = lib.load_data(job)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 6 * 2**30) / total)

    def go(job):
        model = lib.load_model(job, lib.make_plan(job, data, runs_dir=tmp_path / 'none'))
        return lib.train(model, lib.make_examples(data.train, model.formatter, 512), job, lib.start_run(job, tmp_path))

    try:
        with pytest.raises(lib.TrainingError, match='memory ran out') as e:
            go(job)
        said = str(e.value)
        del e
        FIGURES['out_of_memory'] = dict(said=said)
        import gc

        gc.collect()
        torch.cuda.empty_cache()
        change = dict(re.findall(r'-p (\w+)=(\S+)', said)) or dict(
            re.findall(r'(\w+)=(\S+?)[,.]?(?= |$)', said.splitlines()[-1].partition('it would fit with')[2])
        )
        m = go(job.replace(**{k: read_value(lib.FinetuneJob, k, v.rstrip(',.')) for k, v in change.items()}))
        FIGURES['out_of_memory'] |= dict(change=change, then_peak_bytes=m['peak_bytes'])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert change and m['steps'] == 2


@pytest.fixture
def together(lib, tmp_path):
    "Trains a small random model on some devices; returns the run"
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **SMALL)).to(torch.bfloat16).save_pretrained(
        tmp_path / 'm'
    )
    ready = os.environ.get('TOKENIZER')
    (AutoTokenizer.from_pretrained(ready) if ready else lib.load_tokenizer(lib.FinetuneJob())).save_pretrained(
        tmp_path / 'm'
    )
    base = dict(
        model=str(tmp_path / 'm'),
        max_rows=64,
        max_steps=8,
        save_steps=2,
        batch_size=16,
        per_device_train_batch_size=4,
        max_seq_length=512,
        test_size=2,
        load_in_4bit=False,
        optim='adamw_torch_fused',
        gradient_checkpointing=False,
    )

    def go(run=None, **kw):
        job = lib.FinetuneJob(**base | kw)
        data = lib.load_data(job)
        model = lib.load_model(job, lib.make_plan(job, data))
        run = run or lib.start_run(job, tmp_path / 'runs')
        return lib.finetune(model, data, job, run=run)

    go.start = lambda **kw: lib.start_run(lib.FinetuneJob(**base | kw), tmp_path / 'runs')
    return go


@pytest.mark.parametrize(
    'parallel, four_bit',
    [('ddp', False), ('ddp', True), ('fsdp', False), ('fsdp', True), ('device_map', False)],
    ids=['ddp', 'ddp_nf4', 'fsdp', 'fsdp_nf4', 'device_map'],
)
def test_two_gpus(together, parallel, four_bit):
    "Two GPUs train as one does, whichever way they share the work: each step's loss within 0.3% and gradient norm within 3%"
    one = together(load_in_4bit=four_bit)
    two = together(load_in_4bit=four_bit, devices=2, parallel=parallel)
    FIGURES[f"two_gpus_{parallel}{'_nf4' if four_bit else ''}"] = dict(one=steps(one), two=steps(two))
    same_steps(steps(one), steps(two), rel=0.03)


def test_two_gpus_killed(together):
    "A rank of two is killed: it is named, and the run goes on to the curve of the one that nobody hurt"
    import signal
    import threading
    from unsloth_nb.training.launching import RankLost

    whole = together(devices=2)
    hurt = together.start(devices=2)

    def kill():
        while len(hurt.metrics) < 5:
            time.sleep(0.02)
        os.kill(json.loads((hurt.path / 'launch' / 'rank-1' / 'heartbeat.json').read_text())['pid'], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    start = time.time()
    with pytest.raises(RankLost, match='rank 1 of 2 was killed by SIGKILL'):
        together(hurt, devices=2)
    failed = time.time() - start
    together(hurt, devices=2)
    FIGURES['two_gpus_killed'] = dict(whole=steps(whole), resumed=steps(hurt), seconds_until_the_error=round(failed, 1))
    same_steps(steps(whole), steps(hurt), rel=0.03)
