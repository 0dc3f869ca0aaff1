"An export that is not the model is refused, whatever is wrong with it; what is right is written whole."

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope='module')
def tuned(lib, tmp_path_factory):
    "A model after a few steps: (model, run, held-out rows)"
    job = lib.FinetuneJob(
        max_rows=24, test_size=2, max_steps=6, warmup_steps=1, learning_rate=2e-3, max_seq_length=256, max_new_tokens=56
    )
    data = lib.load_data(job)
    model = lib.load_model(job, lib.make_plan(job, data))
    run = lib.start_run(job, tmp_path_factory.mktemp('runs'))
    lib.train(model, lib.make_examples(data.train, model.formatter, 256), job, run)
    return model, run, data.test


def edit_json(name, **kw):
    def f(folder, model):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | kw))

    return f


def edit_weights(name, change):
    "Replace tensors of a file: `change` gets name and tensor, and gives a tensor or None"

    def f(folder, model):
        had = load_file(folder / name)
        new = {k: t for k, v in had.items() if (t := change(k, v, model)) is not None}
        save_file(new, folder / name, metadata=dict(format='pt'))

    return f


def edit_template(change):
    def f(folder, model):
        p = folder / 'chat_template.jinja'
        text = change(p.read_text())
        p.unlink() if text is None else p.write_text(text)

    return f


BASE = {}


def base(model):
    if not BASE:
        BASE.update(load_file(Path(model.source.path) / 'model.safetensors'))
    return BASE


def on_nf4(k, v, model):
    "What was learned, added to weights that were rounded to NF4"
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = base(model).get(k)
    if w is None or 'proj' not in k:
        return v
    return (dequantize_4bit(*quantize_4bit(w.float(), quant_type='nf4')).reshape(w.shape) + v.float() - w.float()).to(
        v.dtype
    )


def without_layer(k, v, model):
    return base(model)[k] if '.layers.15.' in k and 'proj' in k else v


def twice(k, v, model):
    return (base(model)[k].float() + 2 * (v.float() - base(model)[k].float())).to(v.dtype) if k in base(model) else v


@pytest.fixture(scope='module')
def asked_once(tuned):
    "What the model in memory is asked and says, once for adapters and once for merged models"
    from unsloth_nb.export import artifacts as export

    model, _, rows = tuned
    made = {}

    def get(make, adapter):
        if adapter not in made:
            tok = model.exported_tokenizer(adapter)
            request = export_request(model, rows, tok)
            made[adapter] = dict(make_request=request, expect=export_expect(model, request, tok))
        return deepcopy(made[adapter][make])

    export_request, export_expect = export.make_request, export.expect
    return get


FAULTS = dict(  # Export kind, what is done to the folder, checks that must fail
    swapped_eos=(
        'merged_16bit',
        edit_json('generation_config.json', eos_token_id=0),
        ['end tokens', 'answers that run past their end'],
    ),
    missing_template=(
        'adapter',
        edit_template(lambda t: None),
        ['chat template', 'prompts as trained', 'greedy answers'],
    ),
    dropped_layer=(
        'adapter',
        edit_weights('adapter_model.safetensors', lambda k, v, m: None if '.layers.15.' in k else v),
        ['tensors not as trained'],
    ),
    wrong_alpha=(
        'adapter',
        edit_json('adapter_config.json', lora_alpha=64),
        ['tensors not as trained', 'KL divergence', 'change of perplexity'],
    ),
    nf4_base=(
        'merged_16bit',
        edit_weights('model.safetensors', on_nf4),
        [
            'distance from the exact sum',
            'learned change, error',
            'KL divergence',
        ],  # Few tokens: its perplexity may be chance
    ),
    doubled_bos=(
        'merged_16bit',
        edit_template(lambda t: '{{ bos_token }}' + t),
        ['chat template', 'prompts as trained'],
    ),
)


@pytest.fixture(scope='module')
def honest(tuned, tmp_path_factory):
    "Each kind written once, to be copied"
    from unsloth_nb.export import artifacts as export

    write = dict(adapter=export.write_adapter, merged_16bit=export._write_merged)
    made = {}

    def get(to):
        if to not in made:
            made[to] = tmp_path_factory.mktemp(to)
            write[to](tuned[0], made[to])
        return made[to]

    return get


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_fault(tuned, honest, asked_once, monkeypatch, fault):
    "Caught by what its software says or by the files, named, and nothing is kept"
    from unsloth_nb.export import artifacts as export
    from unsloth_nb.export.certificate import ExportError
    from unsloth_nb.export.witness import transformers_answers

    model, run, rows = tuned
    to, spoil, expected = FAULTS[fault]

    def write(model, folder):
        shutil.copytree(honest(to), folder, dirs_exist_ok=True)
        spoil(folder, model)

    monkeypatch.setattr(export, 'write_adapter' if to == 'adapter' else '_write_merged', write)
    for f in ('make_request', 'expect'):
        monkeypatch.setattr(export, f, lambda *args, f=f: asked_once(f, to == 'adapter'))
    monkeypatch.setattr(
        export, 'ask_witness', lambda kind, spec, request: transformers_answers(spec, request)
    )  # In this process, which has imported everything
    with pytest.raises(ExportError) as e:
        export.save_artifact(model, run, to, rows)
    print(e.value)
    for name in expected:
        assert f'{name} ' in str(e.value)
    assert 'nothing was kept' in str(e.value) and not (run.path / to).exists() and not list(run.path.glob('.saving-*'))


@pytest.mark.parametrize(
    'change,error',
    [(without_layer, 1.0), (twice, 1.0), (on_nf4, None), (lambda k, v, m: v, 0.0)],
    ids=['without_layer', 'twice', 'on_nf4', 'honest'],
)
def test_merged_weights(tuned, honest, tmp_path, change, error):
    "What was learned is looked for in the weights themselves: a lost layer and a doubled scale are errors of 1, other base weights are far from the exact sum"
    from unsloth_nb.export.certificate import merge_error

    shutil.copytree(honest('merged_16bit'), tmp_path / 'm')
    edit_weights('model.safetensors', change)(tmp_path / 'm', tuned[0])
    share, noise = merge_error(tuned[0], tmp_path / 'm')
    print(share, noise)
    assert error is None or share == pytest.approx(error, abs=0.2)
    assert (noise > 10) == (change is on_nf4)


def test_closed_by_default(tuned):
    "A measurement that is missing is a check that fails"
    from unsloth_nb.export.certificate import LIMITS, fact_checks, number_checks

    lim = LIMITS['merged_16bit']
    good = dict(
        agreement=1.0, kl_divergence=0.0, max_difference=0.0, perplexity_change=0.0, greedy_agreement=1.0, runs_on=0
    )
    assert all(c['ok'] for c in number_checks(good, lim))
    for k in good:
        assert [c['ok'] for c in number_checks(good | {k: None}, lim)].count(False) == 1
        assert [c['ok'] for c in number_checks(good | {k: float('nan')}, lim)].count(False) == 1
    want = dict(
        eos=[2],
        tokenizer_eos=2,
        bos=1,
        adds_bos=False,
        pad=0,
        template_sha256='a' * 64,
        vocabulary=10,
        probes=[[1], [2]],
        rendered=[[5]],
    )
    request = dict(prompts=[dict(messages=[], ids=[5])])
    assert all(c['ok'] for c in fact_checks(request, want, want))
    for k, v in dict(
        eos=[],
        tokenizer_eos=None,
        bos=None,
        adds_bos=None,
        pad=None,
        template_sha256=None,
        vocabulary=9,
        probes=[[1], [3]],
        rendered=[None],
    ).items():
        assert [c['ok'] for c in fact_checks(request, want, want | {k: v})].count(False) == 1, k


@pytest.mark.slow
def test_nf4_on_a_cpu(lib, tmp_path):
    "An adapter that was trained on NF4 weights is merged into the original ones, on a CPU by PEFT, and the certificate says how near they are"
    job = lib.FinetuneJob(
        max_rows=24,
        test_size=2,
        max_steps=8,
        warmup_steps=1,
        learning_rate=2e-3,
        max_seq_length=256,
        max_new_tokens=8,
        load_in_4bit=True,
    )
    data = lib.load_data(job)
    model = lib.load_model(job, lib.make_plan(job, data))
    run = lib.start_run(job, tmp_path)
    lib.train(model, lib.make_examples(data.train, model.formatter, 256), job, run)
    cert = lib.save_artifact(model, run, 'merged_16bit', data.test)
    print(cert)
    assert cert['passed'] and cert.value('distance from the exact sum') < 1.1 and cert.value('KL divergence') > 0.001
    assert 'quantization_config' not in json.loads((run.path / 'merged_16bit/config.json').read_text())


def test_interrupted_export(tuned, monkeypatch):
    "An export that is interrupted leaves nothing; what a killed one has left is swept by the next"
    from unsloth_nb.export import artifacts as export

    model, run, rows = tuned
    (run.path / '.saving-killed').mkdir()

    def stop(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, 'ask_witness', stop)
    with pytest.raises(KeyboardInterrupt):
        export.save_artifact(model, run, 'adapter', rows)
    assert not (run.path / 'adapter').exists() and not list(run.path.glob('.saving-*'))


def test_no_room(tuned, monkeypatch, converter):
    "Too little disk is said before anything is written"
    from unsloth_nb.export import artifacts as export

    model, run, rows = tuned
    import shutil as sh

    monkeypatch.setattr('unsloth_nb.planning.plan.shutil.disk_usage', lambda p: sh._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ValueError, match='GB free'):
        export.save_artifact(model, run, 'gguf_q8_0', rows)


def test_vllm_that_fails(tuned, tmp_path, monkeypatch, converter):
    "Asked for as a second witness and not answering: the export is refused, and nothing is kept"
    from unsloth_nb.export import artifacts as export
    from unsloth_nb.core.schema import SpecError
    from unsloth_nb.export.witness import WitnessError, transformers_answers, ask_witness

    model, run, rows = tuned
    (tmp_path / 'vllm').write_text(f"#!{sys.executable}\nimport sys; sys.exit('no kernel image for this machine')")
    (tmp_path / 'vllm').chmod(0o755)
    monkeypatch.setenv('UNSLOTH_NB_VLLM', str(tmp_path / 'vllm'))
    monkeypatch.setattr(
        export,
        'ask_witness',
        lambda kind, spec, request: (
            ask_witness(kind, spec, request) if kind == 'vllm' else transformers_answers(spec, request)
        ),
    )
    with pytest.raises(SpecError, match='adapter and merged_16bit, not gguf_f16'):
        export.save_artifact(model, run, 'gguf_f16', rows, vllm=True)
    with pytest.raises(WitnessError, match='no kernel image'):
        export.save_artifact(model, run, 'adapter', rows[:1], vllm=True)
    assert not (run.path / 'adapter').exists() and not list(run.path.glob('.saving-*'))


def test_limits_know_their_sample():
    "A share of few tokens fails where chance does not explain it: one of 49 is no fault, five of 49 are"
    from unsloth_nb.export.certificate import LIMITS, fewest, number_checks

    def failed(right, n, prompts=4, answered=1.0, to='adapter', change=0.0, error=0.0):
        measured = dict(tokens=n, agreement=right / n, prompts=prompts, greedy_agreement=answered)
        rest = dict(kl_divergence=0.0, max_difference=0.0, perplexity_change=change, loss_error=error, runs_on=0)
        return [c['name'] for c in number_checks(measured | rest, LIMITS[to]) if not c['ok']]

    assert failed(48, 49) == [] and failed(3, 4) == [] and failed(1, 1) == []
    assert failed(44, 49) == ['likeliest token'] and failed(0, 1) == ['likeliest token']
    assert failed(4700, 5000) == ['likeliest token'] and failed(49, 49, 1, 0.0) == ['greedy answers']
    assert failed(8, 8, change=0.07, error=0.04) == failed(8, 8, change=0.05) == []
    assert failed(8, 8, change=0.07) == failed(5000, 5000, change=0.07, error=0.002) == ['change of perplexity']
    assert failed(8, 8, change=0.7, error=0.04) == ['change of perplexity']
    for n in range(1, 200):
        assert 1 <= fewest(0.98, n) <= n
