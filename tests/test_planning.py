"""The planner: what it promises for any job and device, where its numbers come from, and the command."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
import pytest
from hypothesis import given, settings, strategies as st
from unsloth_nb.planning.architecture import linear_shapes, model_shape, parameter_counts, read_config, weight_shapes
from unsloth_nb.planning.devices import CARDS, find_device
from unsloth_nb.planning.cost import Shape, Way, memory_estimate
from unsloth_nb.export.certificate import LIMITS, limits
from unsloth_nb.planning.plan import decisions, make_plan, past_runs, run_plan, smaller_way, step_rows
from unsloth_nb.runs.run import start_run
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob, ModelRef, presets, resolve_model
from unsloth_nb.planning.ways import example_lengths, usable

DEVICES = [*CARDS, 'CPU 16GB', 'Apple 64GB']
MODELS = ['smollm2-135m', 'llama-3.2-3b', 'llama-3.1-8b', 'qwen3-30b-a3b', 'gemma-3-4b-it', 'llama-3.1-70b-instruct']
plain = dict(max_examples=60, deadline=None)
jobs = st.builds(
    lambda **kw: FinetuneJob(**kw),
    model=st.sampled_from(MODELS),
    max_seq_length=st.sampled_from([256, 2048, 8192]),
    load_in_4bit=st.sampled_from(['auto', True, False]),
    gradient_checkpointing=st.sampled_from(['auto', True, False, 'unsloth']),
    batch_size=st.sampled_from(['auto', 'fastest', 1, 12]),
    optim=st.sampled_from(['auto', 'adamw_8bit', 'sgd']),
    packing=st.sampled_from(['auto', True, False]),
    padding_free=st.sampled_from(['auto', True, False]),
    r=st.sampled_from([8, 64]),
)
lengths = st.lists(st.integers(1, 256), min_size=1, max_size=40).map(lambda n: [[0] * k for k in n])


@settings(**plain)
@given(jobs, st.sampled_from(DEVICES), lengths)
def test_promises(job, device, rows):
    "For any job: what fits is within what is free, what was asked for is kept or noted, the step stays, the record is JSON"
    dev = find_device(device)
    p = make_plan(job, rows, dev)
    assert p.fits == (p.peak <= usable(dev)) and p.peak == sum(p.memory.values()) and min(p.memory.values()) >= 0
    changed = {c['parameter']: c['effective'] for c in p.changes}
    for k in ('load_in_4bit', 'gradient_checkpointing', 'optim', 'packing', 'padding_free'):
        asked = getattr(job, k)
        if asked != 'auto':
            assert getattr(p, k) == changed.get(k, asked), k
    if job.batch_size != 'fastest':
        assert p.per_device_train_batch_size * p.gradient_accumulation_steps == (
            job.batch_size if isinstance(job.batch_size, int) else 8
        )
    assert bool(p.mend) == (not p.fits)
    assert json.loads(json.dumps(p.to_dict()))['fits'] == p.fits
    assert all(r['fits'] == (r['peak_bytes'] <= usable(dev)) for r in p.runners_up) and not (
        p.fits is False and any(r['fits'] for r in p.runners_up)
    )
    str(p)
    p._repr_markdown_()


@settings(**plain)
@given(jobs, st.sampled_from(DEVICES), lengths)
def test_no_runner_up_is_better(job, device, rows):
    "A runner-up that fits is never more than two percent faster"
    p = make_plan(job, rows, device)
    if p.fits:
        assert all(r['tokens_per_second'] <= p.tokens_per_second / 0.98 + 1 for r in p.runners_up if r['fits'])


@settings(**plain)
@given(
    st.sampled_from(MODELS),
    st.integers(1, 8192),
    st.sampled_from([4, 16]),
    st.sampled_from([False, True, 'unsloth']),
    st.sampled_from(['padded', 'padding_free', 'packed']),
)
def test_memory_grows(model, tokens, bits, checkpointing, layout):
    "More tokens and more precision never take less memory; checkpointing saves what is kept for the backward pass, and costs three buffers where gradients are the peak"
    shape = Shape.of(model_shape(resolve_model(model)), 16, FinetuneJob().target_modules)

    def m(tokens=tokens, **change):
        way = dict(bits=bits, checkpointing=checkpointing, optim='adamw_8bit', layout=layout) | change
        return sum(memory_estimate(shape, Way(**way), tokens).values())

    assert m(tokens=tokens + 512) >= m()
    assert m(bits=16) >= m(bits=4) and m(optim='adamw_torch_fused') > m()
    buffers = 3 * 2 * tokens * shape.config['hidden_size']  # [bytes]
    gradients = 4 * shape.counts['adapter']  # Of many experts they are more than all activations of a short pass
    if tokens >= 1024:
        assert m(checkpointing=False) + buffers >= m(checkpointing='unsloth')
    if tokens >= 1024 and gradients < 2**30:
        assert m(checkpointing=False) > m(checkpointing='unsloth')


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak of a process is read as Linux gives it')
def test_peak_is_the_process_s_own():
    "A rank started by a notebook that holds a model does not report the notebook's peak"
    held = b'x' * 2**29
    out = subprocess.run(
        [sys.executable, '-c', "from unsloth_nb.planning.devices import peak_memory; print(peak_memory('cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 2**24 < int(out) < len(held)


def test_larger_cards_are_never_worse():
    "A card with more memory of the same rate is planned at least as fast"
    job = FinetuneJob(model='llama-3.1-8b')
    a100 = find_device('A100 40GB')
    speeds = [
        make_plan(job, None, replace(a100, memory_free=g * 2**30)).tokens_per_second for g in (16, 24, 40, 80, 160)
    ]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


@pytest.mark.parametrize(
    'change',
    [
        dict(max_seq_length=512, load_in_4bit=False),
        dict(gradient_checkpointing=False, max_seq_length=8192),
        dict(per_device_train_batch_size=64),
        dict(optim='adamw_torch', r=256),
    ],
    ids=str,
)
def test_mend_mends(change):
    "What the plan says would fit does fit"
    job = FinetuneJob(model='llama-3.1-8b', **change)
    p = make_plan(job, None, 'RTX 4060')
    assert p.fits is False and p.mend.startswith('it would fit with'), p.mend
    from unsloth_nb.core.schema import read_value

    mended = dict(m.split('=') for m in p.mend.removeprefix('it would fit with ').split(', '))
    assert make_plan(
        job.replace(**{k: read_value(FinetuneJob, k, v) for k, v in mended.items()}), None, 'RTX 4060'
    ).fits


def test_claims():
    "QLoRA of 8B below 8 GB with the smallest settings and below 12 GB with rows of 2,048; of 70B below 48 GB"

    def peak(model, n):
        return (
            make_plan(
                FinetuneJob(
                    model=model,
                    load_in_4bit=True,
                    max_seq_length=n,
                    per_device_train_batch_size=1,
                    gradient_checkpointing='unsloth',
                    optim='adamw_8bit',
                ),
                None,
                'B200',
            ).peak
            / 1e9
            + 0.71
        )

    assert (
        peak('llama-3.1-8b', 512) < 8 and peak('llama-3.1-8b', 2048) < 12 and peak('llama-3.1-70b-instruct', 2048) < 48
    )


@pytest.mark.parametrize('p', [p for p in presets().values() if p.family != 'openelm'], ids=lambda p: p.name)
def test_every_preset(p):
    "Every preset has a shape whose count is its published size, and a plan on a large card"
    s = model_shape(resolve_model(p.name, p.hub))
    c = parameter_counts(s, 16, FinetuneJob().target_modules)
    assert (c['linear'] + c['embedding']) / p.parameters == pytest.approx(1, rel=0.03) and c['active'] <= c[
        'linear'
    ] + c['embedding'] * 1.01
    assert make_plan(FinetuneJob(model=p.name), None, 'B200').fits is not None


def test_configs():
    "Names of other families: experts, shared experts, compressed attention, a nested text part; what is incomplete is unknown"
    base = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    for k in ('num_experts', 'num_local_experts', 'n_routed_experts'):
        assert read_config(base | {k: 8, 'num_experts_per_tok': 2})['num_local_experts'] == 8
    moe = read_config(
        base | dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
    )
    assert (
        moe['shared_intermediate_size'] == 16
        and linear_shapes(moe)['gate_proj'] == (64, 16, 8)
        and linear_shapes(moe)['shared_up_proj'] == (64, 16, 1)
    )
    mla = read_config(
        base | dict(kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    )
    assert linear_shapes(mla)['kv_a_proj_with_mqa'] == (64, 40, 1) and linear_shapes(mla)['q_b_proj'] == (48, 96, 1)
    assert read_config(dict(text_config=base, vision_config={}))['hidden_size'] == 64
    assert (
        read_config(dict(base, hidden_size=None)) is None
        and read_config({}) is None
        and read_config(dict(base, num_attention_heads=[4, 4])) is None
    )
    assert (
        read_config(dict(base, num_experts=8)) is None and read_config(dict(base, kv_lora_rank=32)) is None
    )  # Experts a token, and widths of compressed attention, are not guessed


def header(path, tensors):
    h = json.dumps({k: dict(dtype=d, shape=s, data_offsets=[0, 0]) for k, (d, s) in tensors.items()}).encode()
    path.write_bytes(struct.pack('<Q', len(h)) + h)


def test_headers(tmp_path):
    "Parameters are counted from the headers of weight files, uneven layers and all; packed files are left to the configuration"
    header(
        tmp_path / 'a.safetensors',
        {
            'model.embed_tokens.weight': ('BF16', [100, 64]),
            'model.layers.0.self_attn.q_proj.weight': ('BF16', [64, 64]),
            'model.layers.1.self_attn.q_proj.weight': ('BF16', [32, 64]),
            'model.norm.weight': ('BF16', [64]),
        },
    )
    w = weight_shapes(tmp_path)
    assert w[('q_proj', (64, 64))] == 1 and w[('q_proj', (32, 64))] == 1
    (tmp_path / 'config.json').write_text(
        json.dumps(
            dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
        )
    )
    c = parameter_counts(model_shape(ModelRef('local', str(tmp_path))), 4, ['q_proj'])
    assert (c['embedding'], c['linear'], c['adapter']) == (6400, 64 * 64 + 32 * 64, 4 * (128 + 96))
    header(tmp_path / 'b.safetensors', {'model.layers.0.mlp.up_proj.weight': ('U8', [10, 1])})
    assert weight_shapes(tmp_path) is None


def test_unknown_model(tmp_path):
    "A model of unknown shape: NF4, recomputation, no numbers, and it says so"
    (tmp_path / 'adapter_config.json').write_text('{}')
    p = make_plan(FinetuneJob(model=str(tmp_path)), None, 'RTX 4090')
    assert (
        p.fits is None
        and p.load_in_4bit
        and p.gradient_checkpointing
        and not p.memory
        and 'not estimated' in str(p)
        and p._repr_html_()
    )


def test_hub_config(tmp_path, monkeypatch):
    "`config.json` in the Hub's cache is enough; without it and without the Hub the shape is unknown, at once"
    import time
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    start = time.time()
    assert model_shape(resolve_model('some/model')) is None and time.time() - start < 5
    snap = tmp_path / 'models--some--model' / 'snapshots' / '0123'
    snap.mkdir(parents=True)
    (snap / 'config.json').write_text(
        json.dumps(
            dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
        )
    )
    (tmp_path / 'models--some--model' / 'refs').mkdir()
    (tmp_path / 'models--some--model' / 'refs' / 'main').write_text('0123')
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda *a, **kw: found(*a, cache_dir=tmp_path, **kw))
    assert model_shape(resolve_model('some/model'))['hidden_size'] == 64


def run_dir(root, name, **plan):
    d = root / name
    d.mkdir(parents=True)
    (d / 'job.json').write_text(json.dumps(dict(job='finetune', parameters=dict(model='smollm2-135m'))))
    (d / 'plan.json').write_text(plan.get('text') or json.dumps(plan))
    return d


def test_calibration(tmp_path):
    "The median of past runs corrects the next plan, corrections do not pile up, broken and foreign runs are passed over"
    dev = find_device('CPU 32GB')
    job = FinetuneJob()
    first = make_plan(job, None, dev)
    known = dict(peak_bytes=first.peak, tokens_per_second=first.tokens_per_second, device=dev.to_dict())
    for i, (m, v) in enumerate([(1.1, 0.5), (1.2, 0.6), (1.3, 0.4)]):
        run_dir(
            tmp_path,
            f'r{i}',
            **known,
            measured=dict(peak_bytes=m * first.peak, steady_tokens_per_second=v * first.tokens_per_second),
        )
    run_dir(
        tmp_path,
        'other',
        **(known | dict(device=dev.to_dict() | dict(name='another'))),
        measured=dict(peak_bytes=9 * first.peak, steady_tokens_per_second=1),
    )
    run_dir(tmp_path, 'broken', text='{"measured": ')
    run_dir(tmp_path, 'unmeasured', **known)
    f = past_runs('smollm2-135m', dev, tmp_path)
    assert (f['memory'], f['speed'], f['runs']) == (pytest.approx(1.2), pytest.approx(0.5), 3)
    run_dir(
        tmp_path,
        'again',
        **known | dict(peak_bytes=1.2 * first.peak, tokens_per_second=0.5 * first.tokens_per_second, calibration=f),
        measured=dict(peak_bytes=1.2 * first.peak, steady_tokens_per_second=0.5 * first.tokens_per_second),
    )
    assert past_runs('smollm2-135m', dev, tmp_path)['memory'] == pytest.approx(1.2)
    run_dir(
        tmp_path / 'low',
        'r',
        **known,
        measured=dict(peak_bytes=0.5 * first.peak, steady_tokens_per_second=first.tokens_per_second),
    )
    assert past_runs('smollm2-135m', dev, tmp_path / 'low')['memory'] == 1  # The longest rows may meet next time


GPUS = {n: replace(find_device('H100'), count=n) for n in (1, 2, 4)}


@pytest.mark.parametrize('before, now, has', [(2, 4, 4), (1, 2, 4), (4, 1, 4), (4, 'auto', 2), (2, 2, 2)])
def test_other_devices_share_the_same_rows(before, now, has):
    "A run that goes on with more or fewer GPUs keeps the rows of its optimizer step, whoever has chosen them"
    for more in ({}, dict(batch_size=8), dict(batch_size='fastest')):
        job = FinetuneJob(model='llama-3.1-8b-instruct', devices=before, **more)
        then = make_plan(job, device=GPUS[4]).to_dict()
        p = make_plan(job.replace(devices=now), device=GPUS[has], like=then)
        assert step_rows(p.to_dict()) == step_rows(then) and p.devices == (now if now != 'auto' else has)


def test_rows_that_cannot_be_shared():
    job = FinetuneJob(model='llama-3.1-8b-instruct', devices=2)
    with pytest.raises(SpecError, match='3 does not divide an optimizer step of 8 rows'):
        make_plan(job.replace(devices=3), device=GPUS[4], like=make_plan(job, device=GPUS[4]).to_dict())


def test_sharding_stays():
    "A plan that shards goes on to do so when there is room for the whole model; out of memory, it is named as the mend"
    job = FinetuneJob(model='qwen3-32b', load_in_4bit=False, devices=2)
    whole = make_plan(job, device=GPUS[2])
    assert whole.parallel == 'ddp' and '-p parallel=fsdp' in smaller_way(job, None, whole)
    less = make_plan(job, device=replace(GPUS[2], memory_free=50 * 2**30))
    assert less.parallel == 'fsdp' == make_plan(job, device=GPUS[2], like=less.to_dict()).parallel


def test_lengths():
    "Lengths of tokens, of conversations not tokenized yet, and of nothing"

    class Column:
        def column(self, name):
            return [30, 3000]

    class Data:
        train = Column()

    assert example_lengths(Data(), 512).tolist() == [74, 512] and example_lengths(None, 64).tolist() == [64]


def test_command(capsys, tmp_path, monkeypatch):
    "`unsloth-nb plan` for a named card, as text and as JSON; unknown devices are refused"
    from unsloth_nb.cli import app
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)

    def go(*a):
        return CliRunner().invoke(app, ['plan', *a])

    out = go('-p', 'model=llama-3.1-8b', '--device', 'rtx4090').output
    assert all(w in out for w in ('free on RTX 4090', 'runner-up: NF4', 'tokens/s', 'it fits'))
    d = json.loads(go('-p', 'model=llama-3.1-8b', '--device', 'H100', '--json').output)
    assert (
        d['fits']
        and set(d['memory']) == {'weights', 'adapter', 'optimizer', 'gradients', 'activations', 'logits', 'workspace'}
        and d['tokens_per_second'] > 0
        and d['seconds'] > 0
    )
    bad = go('--device', 'H1000')
    assert isinstance(bad.exception, SpecError) and "did you mean 'H100'" in str(bad.exception)


def test_marks_and_their_readers_agree():
    "Runs are below planning, so what they compare is listed there, and is what the fields of a plan say"
    from unsloth_nb.runs import comparing

    assert comparing._PLAN == list(decisions('compared'))
    assert decisions('run') == (
        *('devices', 'nodes', 'parallel', 'dtype', 'load_in_4bit', 'load_in_8bit'),
        *('per_device_train_batch_size', 'gradient_accumulation_steps', 'gradient_checkpointing', 'optim'),
        *('packing', 'padding_free', 'attention'),
    )
    asked = FinetuneJob(model='llama-3.1-8b')
    assert all(getattr(asked.replace(**{k: 'auto'}), k) == 'auto' for k in decisions('left_open'))


# Model, card and whether planning again without the rows would hold the weights otherwise
TRAINED = [
    ('llama-3.1-8b', 'RTX 4090', True),
    ('llama-3.1-8b', 'RTX 3090', True),
    ('qwen3-8b', 'RTX 4090', True),
    ('llama-3.1-8b', 'L4', True),
    ('qwen3-4b', 'T4', True),
    ('qwen3-4b', 'RTX 3060', True),
    ('qwen3-14b', 'A100 40GB', True),
    ('qwen2.5-14b-instruct', 'A100 40GB', True),
    ('llama-3.1-8b', 'H200', False),
    ('llama-3.1-70b-instruct', 'H200', False),
    ('qwen3-32b', 'A100 40GB', False),
]


@pytest.mark.parametrize('model,card,again_differs', TRAINED, ids=str)
def test_a_run_keeps_its_precision(model, card, again_differs, tmp_path):
    "What a run has trained is loaded in the precision of its plan, on its own card and elsewhere; an export's limits follow"
    run = start_run(FinetuneJob(model=model), tmp_path)
    trained = make_plan(run.job, [[0] * 206] * 40, card)
    run.save('plan', trained.to_dict())
    assert (make_plan(run.job, None, card).load_in_4bit != trained.load_in_4bit) == again_differs
    for device in (card, 'T4', 'B200', 'CPU 64GB'):
        plan = run_plan(run, device)
        assert (plan.load_in_4bit, plan.load_in_8bit) == (trained.load_in_4bit, trained.load_in_8bit), device
        kind = 'from quantized' if trained.load_in_4bit else 'merged_16bit'
        assert limits('merged_16bit', plan.load_in_4bit or plan.load_in_8bit) == LIMITS[kind]
    assert run_plan(run, card).dtype == trained.dtype


def test_a_run_says_what_it_cannot_keep(tmp_path):
    "Arithmetic that a device lacks is replaced on record; weights in 8 bits are refused without a GPU, and so is a run without a plan"
    run = start_run(FinetuneJob(model='qwen3-4b', load_in_8bit=True), tmp_path)
    with pytest.raises(SpecError, match='no plan.json'):
        run_plan(run, 'T4')
    run.save('plan', make_plan(run.job, [[0] * 206] * 40, 'A100 40GB').to_dict())
    there = run_plan(run, 'T4')
    assert there.load_in_8bit and there.dtype == 'float16'
    assert [(c['requested'], c['effective']) for c in there.changes if c['parameter'] == 'dtype'] == [
        ('bfloat16', 'float16')
    ]
    with pytest.raises(SpecError, match='8 bits, which need a GPU'):
        run_plan(run, 'CPU 64GB')


def test_an_objective_that_reads_pairs(monkeypatch):
    "Where the model reads two sequences for each row, a pass holds twice the tokens, and takes the memory of them"
    job = FinetuneJob(model='llama-3.1-8b', load_in_4bit=True, per_device_train_batch_size=4)
    one = make_plan(job, [[0] * 200] * 40, 'RTX 4090')
    monkeypatch.setattr(type(job.objective), 'sequences', 2)
    two = make_plan(job.replace(gradient_checkpointing=one.gradient_checkpointing), [[0] * 200] * 40, 'RTX 4090')
    assert two.largest_pass == 2 * one.largest_pass and two.peak > one.peak
