"A parameter that goes by another name elsewhere, or has no counterpart: the message says what to write instead."

import pytest
from unsloth_nb.core.schema import SpecError, other_names, unknown_parameter
from unsloth_nb.core.spec import EvaluateJob, FinetuneJob

SAID = dict(
    early_stopping_patience='training ends by max_steps or epochs',
    load_best_model_at_end='training ends by max_steps or epochs',
    eval_steps='asked before and after',
    evaluation_strategy='asked before and after',
    report_to='sent nowhere',
    log_with='sent nowhere',
    warmup_ratio="it is 'warmup_steps'",
    val_set_size="it is 'test_size'",
    betas='adam_beta1 and adam_beta2',
    neft_alpha="it is 'neftune_noise_alpha'",
    lora_r="it is 'r'",
    lora_rank="it is 'r'",
    alpha="it is 'lora_alpha'",
    per_device_batch_size="it is 'per_device_train_batch_size'",
    per_device_eval_batch_size="it is 'eval_batch_size'",
    micro_batch_size="it is 'per_device_train_batch_size'",
    lr="it is 'learning_rate'",
    num_epochs="it is 'num_train_epochs'",
    cutoff_len="it is 'max_seq_length'",
    base_model="it is 'model'",
    random_state="it is 'seed'",
    use_dora='DoRA is not there',
    use_rslora='set lora_alpha to',
    embedding_learning_rate="it is 'learning_rate_embedding'",
    full_finetuning='a LoRA adapter is what is trained',
    bf16='set dtype=bfloat16',
    hf_token='HF_TOKEN',
    deepspeed='devices, nodes and parallel say here',
    output_dir='--runs-dir',
)


@pytest.mark.parametrize('name', SAID)
def test_said(name):
    "Of names that other tools have, the sentence; never the nearest spelling, nor a list of all parameters"
    with pytest.raises(SpecError) as e:
        FinetuneJob(**{name: 1})
    text = str(e.value)
    assert text.startswith(f'{name}: FinetuneJob has no such parameter') and SAID[name] in text
    assert 'did you mean' not in text and 'known:' not in text


def test_all():
    "Whatever the importer knows is known here, and every name given as ours exists"
    same, reasons = other_names()
    assert set(same.values()) <= set(FinetuneJob.model_fields)
    for name in {**same, **reasons}:
        if name not in FinetuneJob.model_fields:
            assert 'did you mean' not in unknown_parameter(name, FinetuneJob)


def test_spelling():
    "As people write them; a slip of the finger is still one; what is about training is said to jobs that train"
    assert "it is 'lora_alpha'" in unknown_parameter('--lora-alpha'.strip('-'), FinetuneJob)
    assert "did you mean 'learning_rate'?" in unknown_parameter('learning_rat', FinetuneJob)
    assert 'training ends' not in unknown_parameter('early_stopping_patience', EvaluateJob)


@pytest.mark.parametrize('values', [dict(max_steps=0.1), dict(max_steps='0.1'), dict(max_rows=0.05)])
def test_share(values):
    "A share where things are counted"
    with pytest.raises(SpecError, match='counted in (steps|rows): not a share of them'):
        FinetuneJob(**values)


@pytest.mark.parametrize(
    'name,why',
    [('muon', 'whole matrices'), ('galore_adamw_8bit', 'whole matrices'), ('lion', "here it is 'lion_32bit'")],
)
def test_optimizer(name, why):
    "One that others have: why it is not here, or what it is called"
    with pytest.raises(SpecError, match=why):
        FinetuneJob(optim=name)


def test_smoothing_and_dft():
    "What has no effect together is refused"
    with pytest.raises(SpecError, match='loss_type is'):
        FinetuneJob(loss_type='dft', label_smoothing_factor=0.1)
