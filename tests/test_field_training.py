"Cases from the field: what a training job checks before it starts, and what it keeps when something breaks."

import json
import numpy as np
import pytest
from safetensors.numpy import save_file
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import LINEARS, FinetuneJob, PretrainJob, make_job, suited_to
from unsloth_nb.data.conversations import Conversation
from unsloth_nb.jobs.runner import preflight
from unsloth_nb.planning.plan import make_plan
from unsloth_nb.training.loading import check_model, check_tokens, tokens_beyond

# A preset that is named, and an adapter that is gone on with


def test_named_preset():
    "Its learning rate and steps count for a job that states none, however the job is made; stated values win"
    for job in (FinetuneJob(model='smollm2-135m'), make_job('finetune', model='smollm2-135m')):
        assert (job.learning_rate, job.max_steps) == (0.002, 100)
        assert job.replace(max_rows=9).learning_rate == 0.002 and FinetuneJob(**job.to_dict()) == job
    assert FinetuneJob(model='smollm2-135m', learning_rate=3e-4, max_steps=7).learning_rate == 3e-4
    assert FinetuneJob(model='smollm2-135m', num_train_epochs=2, max_steps=None).max_steps is None
    assert PretrainJob(model='smollm2-135m').learning_rate == 0.002
    assert FinetuneJob(model='llama-3.1-8b').changed() == dict(model='llama-3.1-8b')
    assert FinetuneJob().learning_rate == 2e-4 and suited_to(None, FinetuneJob, {}) == {}
    assert FinetuneJob(model='mixtral-8x7b-instruct').target_modules == LINEARS[:4]
    for values in (dict(), dict(target_modules=LINEARS), dict(target_modules=['q_proj'], max_steps=9)):
        job = FinetuneJob(model='mixtral-8x7b-instruct', **values)
        assert FinetuneJob(**job.changed()) == job


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, what in files.items():
        (folder / f'{name}.json').write_text(json.dumps(what))
    return folder


def an_adapter(folder, **config):
    said = dict(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=['v_proj', 'q_proj'])
    write(folder, adapter_config=said | dict(base_model_name_or_path='smollm2-135m') | config)
    save_file(dict(a=np.zeros((1, 1), np.float32)), folder / 'adapter_model.safetensors')
    return folder


def test_values_of_an_adapter(tmp_path):
    "What a job leaves open comes from the adapter; what it states otherwise is refused before a kernel starts"
    folder = an_adapter(tmp_path / 'a')
    job = FinetuneJob(model=str(folder), learning_rate=1e-3)
    assert (job.r, job.lora_alpha, job.lora_dropout, job.target_modules) == (8, 32, 0.1, ['q_proj', 'v_proj'])
    check_model(job)
    with pytest.raises(SpecError, match='r: the adapter .* has 8, the job says 16; set r=8'):
        preflight(FinetuneJob(model=str(folder), r=16))
    whole = an_adapter(tmp_path / 'b', modules_to_save=['lm_head', 'norm'])
    assert FinetuneJob(model=str(whole)).target_modules == ['lm_head', 'q_proj', 'v_proj']
    for layers in (['q_proj', 'v_proj'], ['v_proj', 'lm_head', 'q_proj']):
        check_model(FinetuneJob(model=str(whole), target_modules=layers))
    ours = write(an_adapter(tmp_path / 'c'), base=dict(model='smollm2-135m', revision=None, template='alpaca'))
    assert FinetuneJob(model=str(ours)).template == 'alpaca'


@pytest.mark.parametrize('base', ['/content/drive/MyDrive/base', './gone', 'no name', None, 7])
def test_base_that_is_nowhere(tmp_path, base):
    "The adapter and the place of the name are said"
    folder = an_adapter(tmp_path / 'a', base_model_name_or_path=base)
    with pytest.raises(SpecError, match='base_model_name_or_path') as e:
        preflight(FinetuneJob(model=str(folder)))
    assert str(folder) in str(e.value)


# Sizes, before anything is loaded


def a_model(folder, rows, tokens, template='', **named):
    "A folder with embeddings for so many tokens, and a tokenizer with these"
    added = [dict(content=t, id=i, special=False) for t, i in tokens.items() if t.startswith('<')]
    vocab = {t: i for t, i in tokens.items() if not t.startswith('<')}
    write(
        folder,
        config=dict(model_type='llama', vocab_size=rows),
        tokenizer=dict(model=dict(type='BPE', vocab=vocab), added_tokens=added),
        tokenizer_config=dict(chat_template=template, **named),
    )
    save_file({'model.embed_tokens.weight': np.zeros((rows, 2), np.float32)}, folder / 'model.safetensors')
    return FinetuneJob(model=str(folder))


def said(content):
    return [Conversation([dict(role='user', content='Hi'), dict(role='assistant', content=content)], row=3)]


def test_tokens_beyond(tmp_path):
    "A token without an embedding is refused where something needs it, with who does; one that nothing needs is not"
    job = a_model(tmp_path / 'a', 3, {'a': 0, 'b': 1, '<e>': 2, '<image>': 3}, eos_token='<e>')
    assert tokens_beyond(job.model) == {'<image>': 3}
    check_tokens(job, said('nothing of it'))
    with pytest.raises(SpecError, match=r"token '<image>' with id 3.* 3 tokens; row 3 has it.*resize"):
        check_tokens(job, said('see <image>'))
    pad = a_model(tmp_path / 'b', 3, {'a': 0, 'b': 1, '<e>': 2, '<pad>': 3}, pad_token=dict(content='<pad>'))
    with pytest.raises(SpecError, match='padding'):
        preflight(pad)
    writes = a_model(tmp_path / 'c', 2, {'a': 0, '<e>': 1, '<turn>': 2}, template="{{ '<turn>' }}")
    with pytest.raises(SpecError, match='template writes it'):
        check_tokens(writes)
    word = a_model(tmp_path / 'd', 2, {'a': 0, 'b': 1, 'lunch': 2})
    check_tokens(word, said('dinner'))
    with pytest.raises(SpecError, match='lunch'):
        check_tokens(word, said('lunch'))


def test_memory_of_embeddings():
    "Embeddings that are trained whole are in the plan: weights, gradients and the optimizer of a billion parameters"
    sure = dict(model='llama-3.1-8b', load_in_4bit=True, per_device_train_batch_size=1, gradient_checkpointing=True)
    few, many = (
        make_plan(FinetuneJob(target_modules=layers, **sure), None, 'H100')
        for layers in (LINEARS, [*LINEARS, 'embed_tokens', 'lm_head'])
    )
    assert many.disk['adapter'] - few.disk['adapter'] == 4 * 2 * 128256 * 4096
    assert many.peak - few.peak > 8 * 2 * 128256 * 4096


@pytest.mark.parametrize(
    'config,limit,words',
    [
        (dict(max_position_embeddings=4096), 4096, ''),
        (dict(max_position_embeddings=4096, rope_scaling=dict(type='linear', factor=2.0)), 8192, 'linear, 2 times'),
        (
            dict(
                max_position_embeddings=40960,
                rope_parameters=dict(rope_type='yarn', factor=4, original_max_position_embeddings=32768),
            ),
            131072,
            'yarn, 4 times 32,768',
        ),
        (dict(text_config=dict(max_position_embeddings=1024)), 1024, ''),
        (dict(max_position_embeddings=2048, rope_parameters=dict(rope_type='default', rope_theta=1e4)), 2048, ''),
        (dict(), None, ''),
    ],
)
def test_positions(tmp_path, config, limit, words):
    "How far a model reads, its scaling counted; a job that goes beyond is told, in its check and in its plan"
    from unsloth_nb.core.spec import resolve_model
    from unsloth_nb.lint.advice import check_job
    from unsloth_nb.planning.architecture import position_limit

    folder = write(tmp_path / 'm', config=config)
    got, scaling = position_limit(resolve_model(str(folder)))
    assert got == limit and words in scaling

    def found(n):
        return [f.message for f in check_job(FinetuneJob(model=str(folder), max_seq_length=n)) if 'positions' in f.rule]

    if limit:
        assert not found(limit) and f'{limit:,}' in found(limit + 1)[0] and words in found(limit + 1)[0]
        plan = make_plan(FinetuneJob(model=str(folder), max_seq_length=2 * limit), None, 'T4')
        assert f'{limit:,}' in plan.reasons['max_seq_length']


# What a run's own numbers say against it


def a_run(folder, losses, base, tuned, **more):
    from unsloth_nb.runs.run import start_run

    run = start_run(FinetuneJob(max_steps=len(losses)), folder)
    for i, loss in enumerate(losses):
        run.log(step=i + 1, loss=loss, epoch=(i + 1) / 4)
    return run.finish(base=dict(loss=base), tuned=dict(loss=tuned), **more)


@pytest.mark.parametrize(
    'losses,base,tuned,words',
    [
        ([2.0, 1.5, 1.2, 1.1], 2.0, 1.2, None),
        ([2.0, 3.5, 6.2, 7.1], 2.0, 6.9, 'made the model worse'),
        ([2.0, 2.0, 2.0, 2.0], 2.0, 1.99, 'hardly learned'),
        ([2.0] + [0.05] * 19, 2.0, 1.5, 'by heart'),
    ],
)
def test_made_worse(tmp_path, losses, base, tuned, words, capsys):
    "It stands in the run, as `runs show` and the report have it, and in the summary on the console"
    from unsloth_nb.cli import print_result

    run = a_run(tmp_path, losses, base, tuned)
    print_result(run)
    for text in (run._repr_markdown_(), capsys.readouterr().out):
        assert ('worth a look' in text) == bool(words) and (words or '') in text


def test_worse_answers(tmp_path):
    "A score that fell by more than chance explains is named"
    run = a_run(tmp_path, [2.0, 1.0], 2.0, 1.0)
    side = dict(low=0.0, high=1.0, n=40)
    fell = dict(difference=-0.5, p=0.001)
    run.save(
        'statistics',
        dict(scores=dict(exact_match=dict(base=side | dict(mean=0.9), tuned=side | dict(mean=0.4), difference=fell))),
    )
    assert any('exact match: 0.9 before, 0.4 after' in t for t in run.troubles())


@pytest.mark.parametrize(
    'end,reason,says',
    [
        ('interrupt', 'stopped by SIGHUP', 'go on with     unsloth-nb run --resume'),
        ('fail', 'the kernel died: it was killed', 'go on with     unsloth-nb run --resume'),
        ('fail', 'cell 12: SpecError: r: the adapter has 8', 'with a new run'),
        ('fail', 'cell 19: IndexError: index out of range in self', 'with a new run'),
        ('fail', 'cell 9: SpecError: 2 GB free, and up to 9 are needed', 'go on with     unsloth-nb run --resume'),
        ('fail', 'cell 9: CheckpointError: data; allow it: --allow data', 'go on with     unsloth-nb run --resume'),
    ],
)
def test_resume_is_named_where_it_helps(tmp_path, capsys, end, reason, says):
    "A refusal that comes again is not resumed"
    from unsloth_nb.cli import print_result
    from unsloth_nb.runs.run import start_run

    run = start_run(FinetuneJob(), tmp_path)
    getattr(run, end)(reason)
    print_result(run)
    out = capsys.readouterr().out
    assert says in out and ('--resume' in says) == ('--resume ' + run.name in out)
    (run.path / 'adapter').mkdir()
    (run.path / 'adapter' / 'unproved.json').write_text('{}')
    print_result(run)
    assert '--resume ' + run.name in capsys.readouterr().out


# The machine


def test_home_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    "Caches go to a temporary folder, and the setting is named; a place that is set is left alone"
    from unsloth_nb.core import settings

    (tmp_path / 'file').write_text('')
    monkeypatch.delenv('UNSLOTH_NB_CACHE_DIR', raising=False)
    monkeypatch.setattr(settings.tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(settings.platformdirs, 'user_cache_path', lambda name: tmp_path / 'file' / '.cache')
    place = settings.settings(tmp_path).cache_dir
    assert place.parent == tmp_path and place.is_dir() and place.stat().st_mode & 0o777 == 0o700
    assert 'UNSLOTH_NB_CACHE_DIR' in capsys.readouterr().err
    settings.settings(tmp_path)
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('UNSLOTH_NB_CACHE_DIR', str(tmp_path / 'mine'))
    assert settings.settings(tmp_path).cache_dir == tmp_path / 'mine'


def test_terminal_without_utf8(tmp_path):
    "What it cannot show is a question mark, never a traceback"
    import os
    import subprocess
    import sys

    code = "import sys; from unsloth_nb import cli; cli.app = lambda: print('a \\u23ce \\u2026 b'); cli.main()"
    env = os.environ | dict(PYTHONIOENCODING='cp1252', PYTHONUTF8='0')
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.startswith(b'a ?') and b'Traceback' not in r.stderr


def test_hangup_is_a_request():
    "SIGHUP asks for an end as SIGTERM does, more than once too; where it is ignored, as by nohup, it stays so"
    import os
    import signal
    from unsloth_nb.training.guards import stop_requests, stop_signals

    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.by == 'SIGHUP'
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, old)


# What is kept, with a tiny model

SMALL = dict(max_rows=8, test_size=1, max_steps=2, batch_size=2, max_seq_length=256, max_new_tokens=4, r=4)


@pytest.fixture(scope='module')
def small(lib, tiny, tmp_path_factory):
    "A function that loads a tiny model and, if asked to, trains it: (model, run, data)"

    def f(model=tiny, steps=2, **kw):
        job = lib.FinetuneJob(model=str(model), **(SMALL | dict(max_steps=max(steps, 1)) | kw))
        data = lib.load_data(job)
        model = lib.load_model(job, lib.make_plan(job, data))
        run = lib.start_run(job, tmp_path_factory.mktemp('runs'))
        if steps:
            lib.train(model, lib.make_examples(data.train, model.formatter, job.max_seq_length), job, run)
        return model, run, data

    return f


@pytest.fixture
def inside(monkeypatch):
    "Witnesses answer in this process, which has imported everything"
    from unsloth_nb.export import artifacts
    from unsloth_nb.export.witness import transformers_answers

    monkeypatch.setattr(artifacts, 'ask_witness', lambda kind, spec, request: transformers_answers(spec, request))


def test_adapter_is_kept(lib, small, inside, monkeypatch):
    "It is there before its certificate, unproved; a certificate that breaks leaves it; the proved one takes its place"
    from unsloth_nb.export import artifacts
    from unsloth_nb.export.certificate import ExportError
    from unsloth_nb.export.witness import WitnessError
    from unsloth_nb.jobs.runner import preflight
    from unsloth_nb.jobs.supervising import Supervisor, conclude
    from unsloth_nb.runs.checkpoints import check_whole
    from unsloth_nb.runs.run import is_unproved

    model, run, data = small()
    folder = model.keep_adapter(run)
    made = (folder / 'adapter_model.safetensors').stat().st_mtime_ns
    assert is_unproved(folder) and check_whole(folder) and (folder / 'base.json').exists()
    assert model.keep_adapter(run) == folder and (folder / 'adapter_model.safetensors').stat().st_mtime_ns == made

    def breaks(*a):
        raise WitnessError('no memory for a second process')

    with monkeypatch.context() as m:
        m.setattr(artifacts, 'ask_witness', breaks)
        with pytest.raises(WitnessError):
            lib.keep_artifact(model, run, 'adapter', data.test)
    with monkeypatch.context() as m:
        m.setattr(artifacts, 'weight_checks', lambda *a: [dict(name='x', value=1, limit='0', ok=False, unit='')])
        with pytest.raises(ExportError):
            lib.keep_artifact(model, run, 'adapter', data.test)
    assert is_unproved(folder) and check_whole(folder) and not list(run.path.glob('.saving-*'))
    conclude(run, RuntimeError('the evaluation broke'), Supervisor(run))
    assert run.status == 'failed' and f'kept in {folder}, unproved' in run.result['reason']
    assert 'adapter' in run.result['artifacts']
    preflight(lib.EvaluateJob(run=str(run.path)))
    run = run.reopen()
    assert lib.keep_artifact(model, run, 'adapter', data.test)['passed']
    assert not is_unproved(folder) and check_whole(folder) and not (run.path / 'attempts' / 'adapter-1').exists()
    assert model.keep_adapter(run) == folder and not is_unproved(folder)
    next(p for p in model.model.parameters() if p.requires_grad).data.add_(1)
    assert is_unproved(model.keep_adapter(run)) and not is_unproved(run.path / 'attempts' / 'adapter-1')


def test_layers_of_their_own(small, inside, tmp_path, lib):
    "An adapter whose layers have ranks and scales of their own is gone on with, rehearsed and certified"
    import shutil

    model, run, data = small(steps=0, target_modules=['q_proj', 'v_proj'])
    folder = tmp_path / 'a'
    shutil.copytree(model.keep_adapter(run), folder)
    for name in ('manifest.json', 'manifest.sha256', 'unproved.json'):
        (folder / name).unlink()
    config = json.loads((folder / 'adapter_config.json').read_text())
    config |= dict(alpha_pattern={'layers.0.self_attn.q_proj': 64}, use_rslora=True)
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    model, run, data = small(folder, steps=2)
    assert model.job.r == 4 and model.job.target_modules == ['q_proj', 'v_proj']
    model.rehearse_saving(data.test)
    assert lib.keep_artifact(model, run, 'adapter', data.test)['passed']
    layer = next(l for l in model.model.modules() if 'default' in getattr(l, 'lora_A', {}))
    layer.scaling['default'] *= 2
    with pytest.raises(RuntimeError, match='tensors not as trained'):
        model.rehearse_saving(data.test)
    layer.scaling['default'] /= 2
    before = model.score_before(data.test, max_new_tokens=2)
    assert [*before] == ['raw', 'base'] and before['raw'].metrics['loss'] != before['base'].metrics['loss']
    result = lib.compare(model, data.test, base=before, max_new_tokens=2)
    assert [*result.metrics] == ['raw', 'base', 'tuned'] and result.statistics['scores']['loss']['difference']['n'] == 1
    assert 'raw' in repr(result)


def test_whole_embeddings_and_named_templates(small, inside, tiny, tmp_path, lib):
    "Embeddings among the layers, templates with names, end tokens of the model's own: saved, certified, loaded again"
    import shutil

    folder = tmp_path / 'm'
    shutil.copytree(tiny, folder)
    template = (folder / 'chat_template.jinja').read_text()
    (folder / 'chat_template.jinja').unlink()
    tokenizer = json.loads((folder / 'tokenizer_config.json').read_text())
    named = [dict(name='default', template=template), dict(name='tool_use', template=template + ' ')]
    write(folder, tokenizer_config=tokenizer | dict(chat_template=named))
    write(folder, generation_config=dict(eos_token_id=[2, 5, 10**6]))
    layers = ['q_proj', 'v_proj', 'embed_tokens', 'lm_head']
    model, run, data = small(folder, target_modules=layers)
    assert isinstance(model.tok.chat_template, dict) and model.generation_config().eos_token_id == [2, 5]
    model.rehearse_saving(data.test)
    assert lib.keep_artifact(model, run, 'adapter', data.test)['passed']
    again = lib.load_run(run)
    assert again.parameters == model.parameters


def test_plan_of_an_adapter(tmp_path):
    "An adapter is planned as the model that it belongs to"
    folder = an_adapter(tmp_path / 'a', base_model_name_or_path='llama-3.1-8b')
    here = dict(target_modules=['q_proj', 'v_proj'], r=8, lora_alpha=32, lora_dropout=0.1)
    adapter, base = (make_plan(FinetuneJob(model=m, **here), None, 'T4') for m in (str(folder), 'llama-3.1-8b'))
    assert adapter.memory == base.memory and adapter.fits


def test_without_tokenizer(lib, tmp_path):
    "A folder without a tokenizer, as a bare `save_pretrained` leaves it: the missing file is named, and where it is to be had"
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='llama')))
    save_file(dict(x=np.zeros(1, 'float32')), tmp_path / 'model.safetensors')
    with pytest.raises(SpecError, match='holds no tokenizer.json; copy .* from where the model comes from'):
        lib.load_tokenizer(FinetuneJob(model=str(tmp_path)))
