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
