"Every rule on something it must find and on a near miss it must not; anything at all as input; secrets never in the output."

import json
import re
import subprocess
import sys
import pytest
from hypothesis import given, settings, strategies as st

from unsloth_nb.lint.advice import RULES, check_job, find_secrets, mask_secrets, model_size
from unsloth_nb.core.engine import Device
from unsloth_nb.planning.plan import make_plan
from unsloth_nb.lint.review import OLD_CONFIG_ARGUMENTS, OLD_TRAINER_ARGUMENTS, check_file, check_source, unpinned
from unsloth_nb.lint.scanning import UNKNOWN, Cell, ScanError, notebook_cells, scan_cells
from unsloth_nb.core.schema import parameters_cell
from unsloth_nb.core.spec import JOBS, LINEARS, FinetuneJob, trains

GIB = 2**30
T4, L4, H100, CPU = (
    Device(kind, name, n * GIB, n * GIB, bf16, 4)
    for kind, name, n, bf16 in [
        ('cuda', 'T4', 15, False),
        ('cuda', 'L4', 22, True),
        ('cuda', 'H100', 78, True),
        ('cpu', 'CPU', 64, True),
    ]
)
HF = (
    'hf_' + 'qW3eR5tY7uI9oP1aS3dF5gH7jK9lZ1xC3v'
)  # Made up, and put together here so that no scanner stops at this file


def notebook(*cells, kind='code'):
    return dict(
        nbformat=4,
        nbformat_minor=5,
        metadata={},
        cells=[c if isinstance(c, dict) else dict(cell_type=kind, metadata={}, source=c, outputs=[]) for c in cells],
    )


def found(*cells, **kw):
    return check_source(scan_cells(notebook_cells(json.dumps(notebook(*cells))), 'my.ipynb'), **kw)


def places(findings, rule):
    return [(f.severity, f.cell, f.line) for f in findings if f.rule == rule]


def profile(lengths, limit=2048):
    "A profile of examples of these lengths"
    from unsloth_nb.tokens.batching import batching_report
    from unsloth_nb.tokens.profiling import PERCENTILES, Profile, suggest_length

    s = sorted(lengths)
    return Profile(
        len(s),
        sum(s),
        {p: s[max(0, -(-p * len(s) // 100) - 1)] for p in PERCENTILES},
        {},
        1.0,
        {},
        limit,
        sum(n > limit for n in s),
        0,
        *suggest_length(s),
        batching_report(s, 2, max(limit, *s)),
    )


SHORT = profile([100] * 200)
MIXED = profile([20] * 190 + [1500] * 10)

# Cells of a sound notebook; cases below change a part
LOAD = 'from unsloth import FastLanguageModel\nmodel, tok = FastLanguageModel.from_pretrained("unsloth/Qwen3-14B", load_in_4bit=True)'
LORA = 'model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)'
DATA = 'rows = rows.map(lambda r: dict(text=tok.apply_chat_template(r["messages"], tokenize=False)))'
TRAIN = '''from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(model, processing_class=tok, train_dataset=rows, eval_dataset=held,
    args=SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
        eval_strategy="steps", packing=True, assistant_only_loss=True))
trainer.train()'''
PLAIN = '''from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B")
args = TrainingArguments("out", eval_strategy="epoch", %s)
Trainer(model, args, train_dataset=a, eval_dataset=b).train()'''


def test_sound():
    "Nothing to say of what is right"
    assert str(found('!pip install unsloth==2026.10.9 trl==1.15.0', LOAD, LORA, DATA, TRAIN)) == 'nothing to mend'
    assert str(check_job(FinetuneJob())) == 'nothing to mend' and check_job(FinetuneJob()).clean


def swap(text, a, b):
    assert a in text
    return text.replace(a, b)


# (rule, cells with the fault, (severity, cell, line) of each, cells without)
FILES = [
    (
        'full-precision',
        [swap(LOAD, 'load_in_4bit=True', 'dtype=torch.float32'), TRAIN],
        [('warning', 1, 2)],
        [swap(LOAD, 'load_in_4bit=True', 'dtype=torch.bfloat16'), TRAIN],
    ),
    (
        'full-precision',
        [swap(LOAD, 'load_in_4bit=True', '\n  full_finetuning=True'), TRAIN],
        [('warning', 1, 3)],
        [swap(LOAD, '14B", load_in_4bit=True', '4B", full_finetuning=True'), TRAIN],
    ),
    (
        'full-precision',
        [PLAIN % 'save_total_limit=1'],
        [('warning', 1, 2)],
        ['from peft import LoraConfig', PLAIN % 'save_total_limit=1'],
    ),
    (
        'float16',
        [LOAD, swap(TRAIN, 'packing=True', 'fp16=True')],
        [('info', 2, 5)],
        [LOAD, swap(TRAIN, 'packing=True', 'fp16=not is_bf16_supported()')],
    ),
    (
        'float16',
        [swap(LOAD, 'load_in_4bit=True', 'dtype=torch.float16'), TRAIN],
        [('info', 1, 2)],
        [swap(LOAD, 'load_in_4bit=True', 'dtype=None'), TRAIN],
    ),
    (
        'tiny-batch',
        [
            LOAD,
            'rows_at_once = 1',
            swap(
                TRAIN, 'size=2, gradient_accumulation_steps=4', 'size=rows_at_once, gradient_accumulation_steps=1'
            ).replace('packing=True', 'packing=False'),
        ],
        [('warning', 3, 4)],
        [LOAD, swap(TRAIN, 'size=2, gradient_accumulation_steps=4', 'size=2, gradient_accumulation_steps=1')],
    ),  # Packed rows hold many examples
    (
        'tiny-batch',
        [PLAIN % 'per_device_train_batch_size=2'],
        [('warning', 1, 3)],
        [PLAIN % 'per_device_train_batch_size=2, **more'],
    ),
    (
        'tiny-batch',
        [LOAD, 'TrainingArguments("o",\n per_device_train_batch_size=2)'],
        [('warning', 2, 2)],
        [LOAD, 'SFTConfig("o", per_device_train_batch_size=2)'],
    ),  # Unsloth's SFTConfig accumulates 2 passes by default
    (
        'lora-embeddings',
        [LOAD, swap(LORA, 'r=16', 'target_modules=["q_proj", "up_proj",\n "lm_head"], r=16')],
        [('warning', 2, 1)],
        [LOAD, 'tok.add_tokens(["<x>"])', swap(LORA, 'r=16', 'target_modules=["q_proj", "up_proj", "lm_head"]')],
    ),
    (
        'lora-embeddings',
        ['from peft import LoraConfig\nLoraConfig(r=8,\n modules_to_save=["embed_tokens"])'],
        [('warning', 1, 3)],
        ['from peft import LoraConfig\nLoraConfig(r=8, modules_to_save=["score"])'],
    ),
    (
        'lora-few-layers',
        [LOAD, swap(LORA, 'r=16', 'r=16,\ntarget_modules=["q_proj", "v_proj"]')],
        [('warning', 2, 2)],
        [LOAD, swap(LORA, 'r=16', 'r=16, target_modules="all-linear"')],
    ),
    (
        'lora-few-layers',
        [LOAD, swap(LORA, 'r=16', 'finetune_mlp_modules=False')],
        [('warning', 2, 1)],
        [LOAD, swap(LORA, 'r=16', 'finetune_mlp_modules=False, finetune_attention_modules=False')],
    ),
    ('rank-high', [LOAD, swap(LORA, 'r=16', 'r=256')], [('info', 2, 1)], [LOAD, swap(LORA, 'r=16', 'r=64')]),
    (
        'rank-high',
        ['rank = 256', 'rank = 256', LOAD, swap(LORA, 'r=16', 'r=rank')],
        [('info', 4, 1)],
        ['rank = 256', 'rank = 8', LOAD, swap(LORA, 'r=16', 'r=rank')],
    ),
    (
        'lora-alpha',
        [LOAD, swap(LORA, 'lora_alpha=16', '\nlora_alpha=0')],
        [('error', 2, 2)],
        [LOAD, swap(LORA, 'lora_alpha=16', 'lora_alpha=alpha')],
    ),
    (
        'lora-alpha',
        ['r = 8', LOAD, swap(LORA, 'r=16, lora_alpha=16', 'r=r, lora_alpha=r*8')],
        [('info', 3, 1)],
        ['r = 8', LOAD, swap(LORA, 'r=16, lora_alpha=16', 'r=r, lora_alpha=r*8, use_rslora=True')],
    ),
    (
        'lora-dropout',
        [LOAD, swap(LORA, 'r=16', 'lora_dropout=0.1')],
        [('info', 2, 1)],
        ['from peft import LoraConfig\nLoraConfig(r=8, lora_dropout=0.1)'],
    ),  # Without Unsloth there is no fast path to lose
    (
        'no-checkpointing',
        [
            LOAD.replace('"unsl', 'max_seq_length=8192, model_name="unsl'),
            swap(LORA, 'r=16', 'use_gradient_checkpointing=False'),
            TRAIN,
        ],
        [('info', 2, 1)],
        [
            LOAD.replace('"unsl', 'max_seq_length=2048, model_name="unsl'),
            swap(LORA, 'r=16', 'use_gradient_checkpointing=False'),
            TRAIN,
        ],
    ),
    (
        'padding',
        [LOAD, DATA, swap(TRAIN, 'packing=True', '\npadding_free=False')],
        [('info', 3, 6)],
        [LOAD.replace('Language', 'Vision'), DATA, swap(TRAIN, 'packing=True', '\npadding_free=False')],
    ),
    (
        'padding',
        ['from trl import SFTTrainer, SFTConfig', DATA, TRAIN.replace('packing=True', 'seed=1')],
        [('info', 3, 2)],
        [LOAD, DATA, swap(TRAIN, 'packing=True', 'seed=1')],
    ),  # Unsloth puts rows end to end unless told not to
    (
        'no-response-mask',
        [LOAD, DATA, 'args = SFTConfig()\nSFTTrainer(m, args=args)'],
        [('warning', 3, 2)],
        [LOAD, DATA, 'args = parser.parse()\nSFTTrainer(m, args=args)'],
    ),
    (
        'full-precision',
        [swap(LOAD, 'load_in_4bit=True', 'dtype=torch.float32'), TRAIN],
        [('warning', 1, 2)],
        [LOAD, TRAIN, swap(LOAD, 'load_in_4bit=True', 'dtype=torch.float32')],
    ),  # Loaded after training
    (
        'full-checkpoints',
        [PLAIN % 'save_strategy="epoch"'],
        [('warning', 1, 3)],
        [PLAIN % 'save_strategy="epoch", save_total_limit=2'],
    ),
    ('full-checkpoints', [PLAIN % 'save_steps=50'], [('warning', 1, 3)], [PLAIN % 'save_strategy="no", save_steps=50']),
    ('plain-adamw', [PLAIN % 'optim="adamw_torch"'], [('warning', 1, 3)], [PLAIN % 'optim="adamw_8bit"']),
    (
        'padding',
        [DATA, swap(TRAIN, 'packing=True', 'packing=False')],
        [('info', 2, 5)],
        [DATA, swap(TRAIN, 'packing=True', 'padding_free=True')],
    ),
    (
        'dead-name',
        ['model.save_pretrained_merged("out", tok,\n    save_method="merged_4bit")'],
        [('error', 1, 2)],
        ['model.save_pretrained_merged("out", tok, save_method="merged_4bit_forced")  # not merged_4bit'],
    ),
    (
        'dead-name',
        ['if False:\n  model.push_to_hub_merged("me/out", save_method="merged_4bit")'],
        [('warning', 1, 2)],
        ['print("merged_4bit is gone")'],
    ),
    (
        'no-response-mask',
        [LOAD, DATA, swap(TRAIN, ', assistant_only_loss=True', '')],
        [('warning', 3, 2)],
        [
            LOAD,
            DATA,
            swap(TRAIN, ', assistant_only_loss=True', ''),
            'from unsloth.chat_templates import train_on_responses_only\ntrainer = train_on_responses_only(trainer)',
        ],
    ),
    (
        'no-response-mask',
        [LOAD, 'prompt = "### Instruction:\\n{}\\n### Response:\\n{}"', swap(TRAIN, ', assistant_only_loss=True', '')],
        [('warning', 3, 2)],
        [LOAD, 'text = "Once upon a time"', swap(TRAIN, ', assistant_only_loss=True', '')],
    ),  # Plain text has no questions
    (
        'no-response-mask',
        [LOAD, DATA, swap(TRAIN, 'assistant_only_loss=True', 'completion_only_loss=False')],
        [('warning', 3, 2)],
        [
            LOAD,
            DATA.replace('text=', 'prompt="?", completion="!", text=').replace(
                'dict(', '{"prompt": p, "completion": c} or dict('
            ),
            swap(TRAIN, ', assistant_only_loss=True', ''),
        ],
    ),
    (
        'no-evaluation',
        [LOAD, swap(TRAIN, 'eval_dataset=held', '\n    eval_dataset=None')],
        [('warning', 2, 3)],
        [LOAD, swap(TRAIN, ', eval_dataset=held', ''), 'scores = evaluate(model, held)'],
    ),
    (
        'no-evaluation',
        [LOAD, swap(TRAIN, 'eval_strategy="steps", ', '')],
        [('warning', 2, 2)],
        [LOAD, swap(TRAIN, 'eval_strategy="steps", ', ''), 'trainer.evaluate()'],
    ),
    (
        'unpinned-install',
        ['%%capture\nif colab:\n    !pip install trl \\\n      peft'],
        [('warning', 1, 3)],
        ['%%capture\n!pip install trl==1.15.0 -r more.txt\n# !pip install peft'],
    ),
    (
        'unpinned-install',
        ['%%bash\ncd /tmp\nuv pip install -q unsloth'],
        [('warning', 1, 3)],
        ['%%bash\necho pip install unsloth==1'],
    ),
    (
        'unpinned-install',
        ['import subprocess, sys\nsubprocess.run([sys.executable, "-m", "pip", "install", "peft"])'],
        [('warning', 1, 2)],
        ['if False:\n    !pip install peft'],
    ),
    (
        'old-argument',
        ['from trl import SFTTrainer\nSFTTrainer(m, train_dataset=d,\n tokenizer=t)'],
        [('error', 1, 3)],
        ['from trl import SFTTrainer\nSFTTrainer(m, train_dataset=d,\n processing_class=t)'],
    ),
    (
        'old-argument',
        [LOAD, 'SFTTrainer(m, packing=True, dataset_text_field="text")'],
        [('warning', 2, 1)] * 2,
        ['SFTConfig(packing=True, dataset_text_field="text")'],
    ),
    (
        'old-argument',
        ['!pip install "transformers==4.56.2"', 'TrainingArguments("o", warmup_ratio=0.1)'],
        [('info', 2, 1)],
        ['TrainingArguments("o", warmup_steps=0.1)'],
    ),
    (
        'old-argument',
        ['kw = dict(evaluation_strategy="steps", group_by_length=True)\nSFTConfig(**kw)'],
        [('error', 1, 2)] * 2,
        ['SFTConfig(eval_strategy="steps")\nplan(evaluation_strategy="steps")'],
    ),
    (
        'import-order',
        ['import torch', 'from trl import SFTTrainer\nimport peft', LOAD],
        [('warning', 2, 1)],
        [LOAD, 'from trl import SFTTrainer'],
    ),
    (
        'import-order',
        ['import transformers as t', LOAD],
        [('warning', 1, 1)],
        ['def f():\n    import transformers', 'if False:\n    import trl', LOAD],
    ),
    (
        'dead-switch',
        ['x = 1\nif False: save()\nif 0: load()'],
        [('info', 1, 2)],
        ['save_it = False\nif save_it: save()'],
    ),
    (
        'secret',
        ['x = 1', f'# login("{HF}")'],
        [('error', 2, 1)],
        ['login(token="YOUR_HF_TOKEN")  # hf_... or os.environ["HF_TOKEN"]'],
    ),
    (
        'secret',
        ['import os\n\nos.environ["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"'],
        [('error', 1, 3)],
        ['sha = "0123456789abcdef0123456789abcdef01234567"'],
    ),
    (
        'secret',
        ['aws_secret_access_key = "wJa1rXUt2nFE3MIK7MDE4bPx5RfiC6"\nid = "AKIA' + 'Q3WERTYU5IOPASD7"'],
        [('error', 1, 1), ('error', 1, 2)],
        ['secret_key = read("k")\npad_token = "<|pad_12345|>"'],
    ),
    (
        'remote-code',
        ['AutoModel.from_pretrained("a/b",\n  trust_remote_code=True)'],
        [('warning', 1, 2)],
        ['AutoModel.from_pretrained("a/b", trust_remote_code=False)'],
    ),
    (
        'not-parsed',
        ['x = 1\ny = = 2'],
        [('info', 1, 2)],
        ['\n  if x:\n    !ls\n  y = 1', '!ls -l "$(pwd)"\n%matplotlib inline\nmodel?'],
    ),
    (
        'unknown-parameter',
        ['FinetuneJob(\n  lora_rank=8)'],
        [('error', 1, 2)],
        ['test_fail(lambda: FinetuneJob(lora_rank=8))\ntry: FinetuneJob(lora_rank=8)\nexcept SpecError: pass'],
    ),
    ('wrong-value', ['FinetuneJob(r="many")'], [('error', 1, 1)], ['FinetuneJob(r=how_many)']),
]


@pytest.mark.parametrize('rule,bad,where,good', FILES, ids=[f'{r}-{i}' for i, (r, *_) in enumerate(FILES)])
def test_rule(rule, bad, where, good):
    "Found with its severity, cell and line; the near miss is not"
    assert places(found(*bad), rule) == where
    assert places(found(*good), rule) == []


def job(**kw):
    return FinetuneJob(**kw)


WIDE = dict(
    model='llama-3.1-8b',
    r=512,
    load_in_4bit=True,
    gradient_checkpointing='unsloth',
    batch_size=4,
    per_device_train_batch_size=1,
    max_seq_length=512,
)


def tight():
    "A card between the peaks of both optimizers"
    need = sum(make_plan(job(**WIDE, optim=o), None, H100).peak for o in ('adamw_torch', 'adamw_8bit')) // 2
    return Device('cuda', 'tight', need + 2**30, int((need + 2**28) / 0.98), True, 4)


TIGHT = tight()
# (rule, severity, faulty (job, plan, profile, device), sound one)
STATED = [
    (
        'full-precision',
        'warning',
        dict(job=dict(model='llama-3.1-8b', dtype='float32', load_in_4bit=False), device=H100),
        dict(job=dict(model='llama-3.1-8b', dtype='float32', max_seq_length=512), device=T4),
    ),  # There the plan takes 4 bits
    (
        'full-precision',
        'warning',
        dict(job=dict(model='llama-3.1-8b', dtype='float32')),
        dict(job=dict(model='llama-3.1-8b', dtype='float32', load_in_8bit=True)),
    ),
    (
        'full-precision',
        'warning',
        dict(job=dict(model='llama-3.1-8b', dtype='float32')),
        dict(job=dict(model='llama-3.2-1b-instruct', dtype='float32')),
    ),
    ('float16', 'warning', dict(job=dict(dtype='float16'), device=L4), dict(job=dict(dtype='float16'), device=T4)),
    ('float16', 'info', dict(job=dict(dtype='float16')), dict(job=dict(dtype='bfloat16'))),
    (
        'tiny-batch',
        'warning',
        dict(job=dict(per_device_train_batch_size=2, gradient_accumulation_steps=1)),
        dict(job=dict(gradient_accumulation_steps=1)),
    ),  # Alone that is 8 rows in one pass
    ('tiny-batch', 'warning', dict(job=dict(batch_size=1)), dict(job=dict(per_device_train_batch_size=1))),
    ('tiny-batch', 'warning', dict(job=dict(batch_size=2), device=H100), dict(job=dict(batch_size=3), device=H100)),
    (
        'tiny-batch',
        'warning',
        dict(job=dict(batch_size=2, packing=True), device=CPU),
        dict(job=dict(batch_size=2, packing=True), device=H100),
    ),  # Packed rows hold many examples; a CPU cannot pack
    (
        'tiny-batch',
        'warning',
        dict(job=dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)),
        dict(job=dict(batch_size='fastest')),
    ),
    ('lora-embeddings', 'warning', dict(job=dict(target_modules=[*LINEARS, 'lm_head'])), dict(job={})),
    (
        'lora-few-layers',
        'warning',
        dict(job=dict(target_modules=['q_proj', 'v_proj'])),
        dict(job=dict(target_modules=LINEARS)),
    ),
    ('lora-few-layers', 'info', dict(job=dict(target_modules=LINEARS[:-1])), dict(job={})),
    ('rank-high', 'info', dict(job=dict(r=128)), dict(job=dict(r=64))),
    ('lora-alpha', 'info', dict(job=dict(r=8, lora_alpha=64)), dict(job=dict(r=16, lora_alpha=64))),
    ('lora-dropout', 'info', dict(job=dict(lora_dropout=0.1)), dict(job={})),
    ('length-unused', 'info', dict(job={}, profile=SHORT), dict(job=dict(max_seq_length=192), profile=SHORT)),
    (
        'rows-too-long',
        'warning',
        dict(job=dict(max_seq_length=1024), profile=profile([20] * 190 + [1500] * 10, 1024)),
        dict(job=dict(max_seq_length=1024, over_length='split'), profile=profile([20] * 190 + [1500] * 10, 1024)),
    ),
    ('padding', 'warning', dict(job=dict(padding_free=False), profile=MIXED), dict(job={}, profile=MIXED)),
    (
        'padding',
        'warning',
        dict(job=dict(padding_free=False), profile=MIXED, device=H100),
        dict(job=dict(padding_free=False), profile=MIXED, device=CPU),
    ),  # A CPU cannot pack
    (
        'padding',
        'warning',
        dict(job={}, profile=MIXED, device=T4),
        dict(job={}, profile=MIXED, device=H100),
    ),  # Rows end to end need an Ampere card
    (
        'padding',
        'warning',
        dict(job=dict(model='gemma-2-2b-it'), profile=MIXED, device=H100),
        dict(job=dict(packing=True, padding_free=False), profile=MIXED, device=H100),
    ),
    (
        'padding',
        'warning',
        dict(job=dict(packing=False), profile=MIXED, device=T4),
        dict(job=dict(batch_size='fastest', padding_free=False), profile=MIXED),
    ),  # `fastest` packs
    (
        'no-response-mask',
        'warning',
        dict(job=dict(loss_on='everything')),
        dict(job=dict(loss_on='everything', template='raw')),
    ),
    (
        'remote-code',
        'warning',
        dict(job=dict(allow_remote_code='a/b', model='a/b')),
        dict(job=dict(allow_remote_code='a/b', model='a/b', revision='0a1b2c3')),
    ),
    (
        'no-checkpointing',
        'info',
        dict(job=dict(gradient_checkpointing=False, max_seq_length=8192)),
        dict(job=dict(gradient_checkpointing=False)),
    ),
    (
        'no-checkpointing',
        'error',
        dict(job=dict(model='llama-3.1-8b', gradient_checkpointing=False, max_seq_length=8192), device=T4),
        dict(job=dict(model='smollm2-135m', gradient_checkpointing=False, max_seq_length=512), device=H100),
    ),
    (
        'does-not-fit',
        'error',
        dict(job=dict(model='llama-3.1-70b-instruct'), device=T4),
        dict(job=dict(model='llama-3.1-8b'), device=H100),
    ),
    (
        'does-not-fit',
        'error',
        dict(job=dict(model='llama-3.1-70b-instruct', gradient_checkpointing=False), device=T4),
        dict(
            job=dict(model='llama-3.1-8b', gradient_checkpointing=False, max_seq_length=8192, batch_size=8), device=T4
        ),
    ),  # The second would with checkpointing
    (
        'beyond-positions',
        'warning',
        dict(job=dict(model='tinyllama-1.1b-chat', max_seq_length=4096)),
        dict(job=dict(model='tinyllama-1.1b-chat', max_seq_length=2048)),
    ),
    ('learning-rate-far', 'warning', dict(job=dict(learning_rate=0.5)), dict(job=dict(learning_rate=2e-3))),
    ('learning-rate-far', 'warning', dict(job=dict(learning_rate=1e-9)), dict(job=dict(learning_rate=1e-5))),
    ('warmup-long', 'warning', dict(job=dict(max_steps=5)), dict(job=dict(max_steps=6))),
    ('plain-adamw', 'warning', dict(job=WIDE | dict(optim='adamw_torch'), device=TIGHT), dict(job=WIDE, device=TIGHT)),
    (
        'plain-adamw',
        'warning',
        dict(job=WIDE | dict(optim='adamw_torch_fused'), device=TIGHT),
        dict(job=dict(model='llama-3.1-70b-instruct', optim='adamw_torch'), device=T4),
    ),  # There 8 bits would not help
    (
        'plain-adamw',
        'warning',
        dict(job=WIDE | dict(optim='adamw_torch'), device=TIGHT),
        dict(job=WIDE | dict(optim='adamw_torch'), device=H100),
    ),
]


@pytest.mark.parametrize('rule,severity,bad,good', STATED, ids=[f'{r}-{i}' for i, (r, *_) in enumerate(STATED)])
def test_job_rule(rule, severity, bad, good):
    "The same for jobs, with plan and profile"

    def run(kw):
        return [(f.severity, f.cell, f.line) for f in check_job(**(kw | dict(job=job(**kw['job'])))) if f.rule == rule]

    assert run(bad) == [(severity, None, None)] and run(good) == []


def test_every_rule_has_both():
    "No rule without a case that must be found and one that must not"
    assert {r for r, *_ in [*FILES, *STATED]} == set(RULES)


def test_device_and_profile_of_a_file():
    "A notebook is judged by the device and the data that are named"
    half = [swap(LOAD, 'load_in_4bit=True', 'dtype=torch.float16'), TRAIN]
    assert (
        places(found(*half, device=L4), 'float16') == [('warning', 1, 2)]
        and places(found(*half, device=T4), 'float16') == []
    )
    off = [
        swap(LOAD, '"unsloth/Qwen3-14B"', '"llama-3.1-8b", max_seq_length=8192'),
        swap(LORA, 'r=16', 'use_gradient_checkpointing=False'),
        TRAIN,
    ]
    assert places(found(*off, device=T4), 'no-checkpointing') == [('error', 2, 1)]
    long = [LOAD, swap(TRAIN, 'packing=True', 'padding_free=False,\n max_length=1024')]
    assert places(found(*long, profile=MIXED), 'rows-too-long') == [('warning', 2, 6)] and places(
        found(*long, profile=MIXED), 'padding'
    ) == [('warning', 2, 5)]
    assert places(found(LOAD, swap(TRAIN, 'packing=True', 'max_length=4096'), profile=SHORT), 'length-unused') == [
        ('info', 2, 5)
    ]


def test_mends_name_auto():
    "What the plan does best by itself is left to it"

    def mends(*a, device=None, profile=None, **kw):
        return {f.rule: f.mend for f in check_job(job(**kw), None, profile, device)}

    assert (
        "'auto', about 8 rows" in mends(batch_size=2)['tiny-batch']
        and "padding_free='auto'" in mends(padding_free=False, profile=MIXED)['padding']
    )
    assert mends(device=T4, profile=MIXED)['padding'] == 'packing=True'  # Nothing else helps there
    assert (
        mends(**WIDE, optim='adamw_torch', device=TIGHT)['plain-adamw'] == "optim='auto'"
        and mends(gradient_checkpointing=False, max_seq_length=8192)['no-checkpointing']
        == "gradient_checkpointing='auto'"
    )


def test_does_not_fit_says_what_would():
    "The mend of a job that does not fit is the plan's, and with it the job fits"
    j = job(model='llama-3.1-8b', max_seq_length=32768, batch_size=8, per_device_train_batch_size=8)
    (f,) = [f for f in check_job(j, None, None, T4) if f.rule == 'does-not-fit']
    change = dict(p.split('=') for p in f.mend.removeprefix('it would fit with ').split(', '))
    assert change and make_plan(j.replace(**change), None, T4).fits


@pytest.mark.parametrize(
    'kw',
    [
        dict(batch_size=2),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=1),
        dict(padding_free=False),
        dict(gradient_checkpointing=False, max_seq_length=8192),
        dict(WIDE, optim='adamw_torch'),
    ],
)
def test_mended_job_is_clean(kw):
    "Names that the findings give, left to the plan, end the findings"
    before = check_job(job(**kw), None, MIXED, None if 'optim' not in kw else TIGHT)
    names = [f.parameter for f in before if f.rule in ('tiny-batch', 'padding', 'no-checkpointing', 'plain-adamw')]
    assert names and not [
        f
        for f in check_job(
            job(**(kw | dict.fromkeys(names, 'auto'))), None, MIXED, None if 'optim' not in kw else TIGHT
        )
        if f.parameter in names
    ]


def test_device_refuses():
    "What the device cannot do at all is a finding, not the end of the check"
    assert [(f.rule, f.parameter) for f in check_job(job(dtype='float16', lora_dropout=0.1), device=CPU)] == [
        ('wrong-value', 'dtype'),
        ('float16', 'dtype'),
        ('lora-dropout', 'lora_dropout'),
    ]


def test_plan_given():
    "A plan that is at hand is used, not made again"
    j = job(model='llama-3.1-8b', gradient_checkpointing=False, max_seq_length=8192)
    assert [f.rule for f in check_job(j, make_plan(j, None, T4)) if f.severity == 'error'] == ['no-checkpointing']


@pytest.mark.slow
def test_old_arguments_are_gone():
    "The installed TRL and transformers have none of the names that the rule calls old, and all that it names instead"
    code = '''import inspect,json
from transformers import TrainingArguments,Trainer
from trl import SFTConfig,SFTTrainer,DPOTrainer
print(json.dumps([sorted(inspect.signature(c.__init__).parameters) for c in (SFTTrainer, DPOTrainer, Trainer, SFTConfig, TrainingArguments)]))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    sft, dpo, plain, config, args = map(set, json.loads(r.stdout.splitlines()[-1]))
    assert (
        not set(OLD_TRAINER_ARGUMENTS) & (sft | dpo)
        and 'tokenizer' not in plain
        and not set(OLD_CONFIG_ARGUMENTS) & (config | args)
    )
    assert (
        'processing_class' in sft & plain
        and {
            'max_length',
            'packing',
            'dataset_text_field',
            'dataset_num_proc',
            'eval_strategy',
            'warmup_steps',
            'train_sampling_strategy',
            'use_cpu',
            'hub_token',
        }
        <= config
    )


# Secrets
KEYS = [
    HF,
    'sk-' + 'proj-aB3dE5gH7jK9mN1pQ3sT5',
    'AKIA' + 'Q3WERTYU5IOPASD7',
    'ghp_' + 'aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5',
    '0123456789abcdef0123456789abcdef01234567',
    'Tr0ub4dor8and3',
]


@pytest.mark.parametrize('key', KEYS, ids=lambda k: k[:4])
@pytest.mark.parametrize(
    'line',
    [
        'token = "{}"',
        "wandb.login(key='{}')",
        'os.environ["API_KEY"]="{}"',
        '!pip install git+https://{}@github.com/a/b',
        'FinetuneJob(password="{}", r="{}")',
        'x = = "{}"; api_key="{}"',
        '!export HF_TOKEN={}',
        'if False: login("{}")',
    ],
)
def test_secret_never_shown(key, line, tmp_path):
    "A secret is in no form of the report, whichever rule speaks"
    p = tmp_path / 'n.ipynb'
    p.write_text(
        json.dumps(
            notebook(line.replace('{}', key), dict(cell_type='markdown', metadata={}, source=line.replace('{}', key)))
        )
    )
    f = check_file(p)
    assert key not in str(f) + json.dumps(f.to_dict()) + f._repr_markdown_()
    if key.startswith(('hf_', 'sk-', 'AKIA', 'ghp_')):
        assert [x.cell for x in f if x.rule == 'secret'] == [1, 2] or line.count('{}') == 2


def test_secret_in_output_and_params(tmp_path):
    "Saved outputs and params files are looked at too"
    c = dict(
        cell_type='code',
        metadata={},
        source='show()',
        outputs=[dict(output_type='stream', name='stdout', text=['ok\n', f'token {HF}\n'])],
    )
    f = found('x = 1', c)
    assert places(f, 'secret') == [('error', 2, None)] and HF not in str(f)
    p = tmp_path / 'p.yaml'
    p.write_text(f'r: 8\ntoken: {HF}\nmodel: {HF}\n')
    f = check_file(p)
    assert [(x.rule, x.line) for x in f if x.rule == 'secret'] == [('secret', 2), ('secret', 3)] and HF not in str(
        f
    ) + json.dumps(f.to_dict())


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_mask(text):
    "Masking is idempotent and leaves nothing that is found again"
    assert mask_secrets(mask_secrets(text)) == mask_secrets(text) and not find_secrets(
        mask_secrets(f'{text}\ntoken="{HF}" {text}')
    )


@pytest.mark.parametrize(
    'command,names',
    [
        ('pip install trl', ['trl']),
        ('pip install -U "trl>=1,<2" peft~=0.18', ['trl', 'peft']),
        ('pip3 install a==1 b===2', []),
        ('python -m pip install x # later y', ['x']),
        ('uv pip install --system -qqq vllm "a==1"', ['vllm']),
        ('pip install -r r.txt -e . ./here https://github.com/a/z.whl', []),
        ('pip install git+https://github.com/a/b.git@main', ['git+…/b.git']),
        ('pip install git+https://github.com/a/b@v1.2 "c @ git+https://github.com/a/c@0123abc"', []),
        ('pip install --index-url mirror torch', ['torch']),
        ('pip uninstall -y trl', []),
        ('pip install "trl[x]"; pip install peft && echo pip install ok==1', ['trl[x]', 'peft']),
        ('pip install {lib} $LIB', []),
        ('pip install "unbalanced', ['unbalanced']),
        ('apt install x', []),
        ('pip install x > log.txt 2>&1', ['x']),
        ('pip install --upgrade pip uv', []),
    ],
)
def test_unpinned(command, names):
    assert unpinned(command) == names


@pytest.mark.parametrize(
    'name,size',
    [
        ('a/b-7b', 7e9),
        ('Qwen/Qwen3-0.6B', 0.6e9),
        ('x/gpt-oss-120b', 120e9),
        ('x/y-bnb-4bit', None),
        ('x/270M', 270e6),
        ('x/8x22B', 176e9),
        (UNKNOWN, None),
        (None, None),
        ('x/E2B', None),
    ],
)
def test_model_size(name, size):
    assert model_size(name) == pytest.approx(size, rel=0.05) if size else model_size(name) is None


# Params files
def test_params(tmp_path):
    "Names and values with their lines, then the job's own findings at the line of their parameter"
    p = tmp_path / 'p.yml'
    p.write_text('# mine\nmodel: smollm2-135m\nlearning_rat: 1.0e-4\nr: many\n\nlora_dropout: 0.1\n')
    assert [(f.rule, f.line, f.parameter) for f in check_file(p)] == [
        ('unknown-parameter', 3, 'learning_rat'),
        ('wrong-value', 4, 'r'),
        ('lora-dropout', 6, 'lora_dropout'),
    ]
    assert "did you mean 'learning_rate'" in check_file(p)[0].message and 'a whole number' in check_file(p)[1].mend
    p.write_text('r: 16\n')
    assert str(check_file(p)) == 'nothing to mend'
    p.write_text('')
    assert str(check_file(p)) == 'nothing to mend'


def test_parameters_cell():
    "A parameters cell of a job notebook is a job"
    c = dict(
        cell_type='code',
        metadata=dict(tags=['parameters']),
        outputs=[],
        source='model: str = "smollm2-135m"\ndataset: str = "events"\nmax_seq_length: int = 64\nlora_dropout: float = 0.5\nr: int = 0',
    )
    assert [(f.rule, f.cell, f.line) for f in found('x = 1', c)] == [('lora-dropout', 2, 4), ('wrong-value', 2, 5)]


@pytest.mark.parametrize('name', JOBS)
def test_parameters_cell_of_each_job(name):
    "The default parameters of every job are sound; another job's names are not taken for a finetune job's"
    c = dict(cell_type='code', metadata=dict(tags=['parameters']), outputs=[], source=parameters_cell(JOBS[name]))
    assert str(found(c)) == 'nothing to mend'
    misspelt = dict(c, source=c['source'] + '\nlora_rank = 8')
    assert [f.rule for f in found(misspelt)] == (['unknown-parameter'] if trains(name) else [])


@pytest.mark.parametrize(
    'name,content,why',
    [
        ('a.ipynb', b'{"cells": [', 'not JSON'),
        ('a.ipynb', b'\xff\xfe\x00', 'not JSON'),
        ('a.ipynb', b'', 'not JSON'),
        ('a.ipynb', b'{}', 'no cells'),
        ('a.ipynb', b'[' * 100_000, 'not JSON'),
        ('a.yaml', b'a: [', 'not YAML'),
        ('a.yaml', b'- 1', "must hold 'name: value' lines"),
        ('a.yaml', b'\x00', 'not YAML'),
        ('a.txt', b'x', 'expected a notebook'),
        ('no/such.py', None, 'cannot be read'),
    ],
)
def test_unreadable(tmp_path, name, content, why):
    "What cannot be read is refused with a reason"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ScanError, match=why):
        check_file(tmp_path / name)


# Scanning
def test_old_nbformat_and_other_languages():
    "nbformat 3 is read; code in other languages is not taken for Python"
    old = dict(
        nbformat=3,
        metadata={},
        worksheets=[
            dict(
                cells=[
                    dict(cell_type='heading', level=1, source='x'),
                    dict(cell_type='code', language='python', input='if False: pass', outputs=[]),
                ]
            )
        ],
    )
    assert places(check_source(scan_cells(notebook_cells(json.dumps(old)))), 'dead-switch') == [('info', 2, 1)]
    other = notebook('x <- function(y) { y }') | dict(metadata=dict(kernelspec=dict(language='R')))
    assert check_source(scan_cells(notebook_cells(json.dumps(other)))) == []


def test_broken_cell_is_still_searched():
    "One line that does not parse hides nothing of the others"
    f = found('def f(:\n  pass\nmodel.save(save_method="merged_4bit")\n!pip install trl\nimport trl', LOAD)
    assert [(x.rule, x.cell, x.line) for x in f] == [
        ('not-parsed', 1, 1),
        ('dead-name', 1, 3),
        ('unpinned-install', 1, 4),
        ('import-order', 1, 5),
    ]


def test_script(tmp_path):
    "A script has lines and no cells, Windows line ends and a byte order mark included"
    p = tmp_path / 's.py'
    p.write_bytes('\ufeffimport trl\r\nimport unsloth\r\nif 0:\r\n    pass\r\n'.encode())
    assert [(f.rule, f.cell, f.line) for f in check_file(p)] == [('import-order', None, 1), ('dead-switch', None, 3)]
    assert check_file(p)[0].where == f'{p}, line 1'


def test_nothing_runs(tmp_path):
    "Reading a file that would write another writes nothing"
    p = tmp_path / 's.ipynb'
    p.write_text(
        json.dumps(
            notebook(
                f'open({str(tmp_path / "ran")!r}, "w")\n!touch {tmp_path}/ran\nx = [open({str(tmp_path / "ran")!r}, "w")]'
            )
        )
    )
    check_file(p)
    assert sorted(x.name for x in tmp_path.iterdir()) == ['s.ipynb']


@pytest.mark.parametrize(
    'text',
    [
        '(' * 5000,
        '-' * 20000 + '1',
        'x' + '.a' * 20000,
        'a = ' * 3000 + '1',
        '\n'.join(['!x'] * 2000),
        '9' * 6000,
        '\ud800',
        '\0',
        'x = "' + 'a' * 100_000,
        'a = b = a',
        'a = [a, a]\nb = [a]*99999999',
        'x = 10**10**10',
        '+'.join(['1'] * 20000),
    ],
    ids=range(13),
)
def test_extreme(text):
    check_source(scan_cells([Cell(1, 'code', text), Cell(2, 'code', 'y = f(x)')]))


FRAGMENTS = [
    'x = 1\n',
    'if False:\n',
    '    !pip install y\n',
    '%%bash\n',
    '%%capture\n',
    'f(a=x, **{"b": 1})\n',
    '"""',
    '(',
    '[',
    '\\\n',
    '!ls "\n',
    'x?\n',
    'for i in x:\n',
    '    pass\n',
    'y = !z\n',
    '\0',
    '\ud800',
    '\f',
    '\r',
    'f"{x',
    'import os\n',
    'from . import y\n',
    'SFTTrainer(m, eval_dataset=',
    'SFTConfig(save_steps=x, max_length=',
    'from_pretrained("7b", dtype=',
    'target_modules=["lm_head"]',
    'FinetuneJob(r=',
    'token="',
    HF,
    'merged_4bit',
    'pip install ',
    '$',
    '*',
    ')\n',
]
code = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=25).map(''.join)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | code,
    lambda c: (
        st.lists(c, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    'cells',
                    'source',
                    'cell_type',
                    'code',
                    'outputs',
                    'text',
                    'data',
                    'metadata',
                    'tags',
                    'worksheets',
                    'input',
                    'kernelspec',
                    'language',
                    'traceback',
                ]
            ),
            c,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(st.lists(code, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_code(cells):
    "Any code gives findings that can be shown, at lines that exist"
    f = check_source(scan_cells([Cell(i, 'code', c) for i, c in enumerate(cells, 1)]), H100, MIXED)
    assert all(
        x.rule in RULES
        and 1 <= x.cell <= len(cells)
        and 1 <= (x.line or 1) <= len(re.split('\r\n?|\n', cells[x.cell - 1]))
        for x in f
    )
    assert HF not in str(f) + f._repr_markdown_() + json.dumps(f.to_dict())


@given(anything, anything)
@settings(max_examples=300, deadline=None)
def test_any_json(a, b):
    "Any JSON is a notebook or is refused"
    for v in (
        a,
        dict(cells=[a, dict(cell_type='code', source=a, metadata=b, outputs=b)], metadata=b),
        dict(worksheets=[a, dict(cells=b)]),
    ):
        try:
            check_source(scan_cells(notebook_cells(json.dumps(v))))
        except ScanError:
            pass


@given(st.binary(max_size=300), st.sampled_from(['.ipynb', '.py', '.yaml']))
@settings(max_examples=300, deadline=None)
def test_any_bytes(tmp_path_factory, content, suffix):
    "Any bytes are a file or are refused"
    p = tmp_path_factory.getbasetemp() / f'any{suffix}'
    p.write_bytes(content)
    try:
        str(check_file(p))
    except ScanError:
        pass


@given(
    st.dictionaries(
        st.sampled_from([*FinetuneJob.model_fields, 'no_such']) | st.text(max_size=5),
        st.none()
        | st.booleans()
        | st.integers(-9, 9)
        | st.text(max_size=5)
        | st.lists(st.integers() | st.text(max_size=3), max_size=2)
        | st.dates(),
        max_size=5,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_params(tmp_path_factory, values):
    "Any mapping gives findings whose lines hold their parameter"
    import yaml

    p = tmp_path_factory.getbasetemp() / 'any.yml'
    p.write_text(yaml.safe_dump(values, sort_keys=False))
    try:
        f = check_file(p)
    except ScanError:
        return
    assert all(x.rule in RULES and (x.line is None or x.line <= len(p.read_text().splitlines())) for x in f)


# Findings and the command
FIELDS = dict(
    rule=str,
    severity=str,
    source=str,
    cell=(int, type(None)),
    line=(int, type(None)),
    parameter=str,
    message=str,
    mend=str,
)


def test_findings_as_json():
    "The JSON has these fields and no others"
    d = json.loads(json.dumps(found('!pip install trl', LOAD, swap(LORA, 'r=16', 'lora_dropout=.1')).to_dict()))
    assert (
        set(d) == {'clean', 'counts', 'findings'}
        and d['clean'] is False
        and d['counts'] == dict(error=0, warning=1, info=1)
    )
    for f in d['findings']:
        assert list(f) == list(FIELDS) and all(isinstance(f[k], t) for k, t in FIELDS.items())


def test_findings_as_markdown():
    "A row each, with no cell broken by a bar or markup"
    text = found('FinetuneJob(**{"a|b<i>": 1})', '!pip install a')
    rows = text._repr_markdown_().splitlines()
    assert len(rows) == 2 + len(text) and all(r.replace(r'\|', '').count('|') == rows[0].count('|') for r in rows)


@pytest.fixture
def check(tmp_path):
    "The command as a shell sees it: (exit code, stdout, stderr)"

    def f(*args):
        r = subprocess.run(
            [sys.executable, '-c', 'from unsloth_nb.cli import main; main()', 'check', *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert 'Traceback' not in r.stderr
        return r.returncode, r.stdout, r.stderr

    return f


def test_command(check, tmp_path):
    "0 clean, 1 findings, 2 unreadable; the other files are reported all the same"
    for name, cells in dict(clean=['x = 1'], info=['if False: pass'], bad=['!pip install trl']).items():
        (tmp_path / f'{name}.ipynb').write_text(json.dumps(notebook(*cells)))
    (tmp_path / 'broken.ipynb').write_text('{')
    assert check('clean.ipynb') == (0, 'nothing to mend\n', '')
    rc, out, err = check('info.ipynb')
    assert rc == 0 and 'info.ipynb, cell 1, line 1: info dead-switch' in out and err == ''
    rc, out, err = check('clean.ipynb', 'bad.ipynb')
    assert rc == 1 and 'bad.ipynb, cell 1, line 1: warning unpinned-install' in out and err == ''
    rc, out, err = check('bad.ipynb', 'broken.ipynb')
    assert (
        rc == 2 and 'unpinned-install' in out and 'broken.ipynb is not a notebook' in err and len(err.splitlines()) == 1
    )
    rc, out, err = check('bad.ipynb', 'broken.ipynb', '--json')
    d = json.loads(out)
    assert (
        rc == 2
        and [(f['rule'], f['source'], f['cell'], f['line'], f['severity']) for f in d['findings']]
        == [('unpinned-install', 'bad.ipynb', 1, 1, 'warning')]
        and list(d['unreadable']) == ['broken.ipynb']
    )


@pytest.mark.slow
def test_command_job(check, tmp_path):
    "Without a file, the job that -p states"
    rc, out, err = check('-p', 'lora_dropout=0.1', '-p', 'batch_size=1', '-p', 'max_seq_length=192')
    assert (
        rc == 1
        and 'job: warning tiny-batch (batch_size)' in out
        and 'lora-dropout' in out
        and 'no-evaluation' not in out
    ), err
    rc, out, err = check('-p', 'lora_dropot=0.1')
    assert rc == 2 and "did you mean 'lora_dropout'" in err and out == ''
    rc, out, err = check('--preset', 'llama-3.1-70b-instruct', '--device', 'T4', '-p', 'dataset=no/such', '--json')
    assert rc == 1 and 'does-not-fit' in [f['rule'] for f in json.loads(out)['findings']], err
    rc, out, err = check('--device', 'T5')
    assert rc == 2 and 'T5' in err and out == ''
