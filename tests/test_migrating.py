"Files of other tools as jobs: written here after how real ones look; read, never run, and no setting lost."

import json
import re
from pathlib import Path
import pytest
import yaml
from unsloth_nb import lint
from unsloth_nb.cli import app
from unsloth_nb.lint.drafting import MigrationError, full_name
from unsloth_nb.lint.migration import import_job
from unsloth_nb.lint.other_tools import AXOLOTL, LLAMA_FACTORY, read_axolotl, read_llama_factory
from unsloth_nb.lint.scanning import read_table
from unsloth_nb.core.schema import read_params
from unsloth_nb.core.spec import EXPORTS, TEMPLATES, FinetuneJob

SECRETS = ('hf_' + 'aB3dE5gH7jK9mN1pQ3sT5', 'sk-' + 'aB3dE5gH7jK9mN1pQ3sT5v')
HOSTILE = '<script>alert(1)</script>|`x`\x1b[31m\u202e'

LOAD = '''from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Qwen3-8B-bnb-4bit", max_seq_length=1024, load_in_4bit=True)
'''
LORA = 'model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "v_proj", "embed_tokens"], lora_alpha=8, bias="none", random_state=1)\n'
TRAIN = '''from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset,
    args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_ratio=0.1, max_steps=50, learning_rate=1e-4, report_to="wandb"))
'''
ROWS = 'from datasets import load_dataset\ndataset = load_dataset("json", data_files="rows.jsonl", split="train")\n'


def notebook(path, *cells):
    nb = dict(
        nbformat=4,
        nbformat_minor=5,
        metadata={},
        cells=[
            dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None, source=c)
            for i, c in enumerate(cells)
        ],
    )
    path.write_text(json.dumps(nb))
    return path


def yaml_file(path, **d):
    path.write_text(yaml.safe_dump(d, sort_keys=False))
    return path


def names(lines):
    return [l.name for l in lines]


def why(lines, name):
    return next(l.why for l in lines if l.name == name)


AXO = dict(
    base_model='NousResearch/Llama-3.2-1B',
    adapter='lora',
    datasets=[dict(path='owner/rows', type='alpaca')],
    sequence_len=2048,
    lora_r=16,
    lora_alpha=32,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    num_epochs=1,
    optimizer='adamw_8bit',
    learning_rate=2e-4,
)
LF = dict(
    model_name_or_path='Qwen/Qwen3-4B-Instruct-2507',
    stage='sft',
    do_train=True,
    finetuning_type='lora',
    lora_rank=8,
    lora_target='all',
    dataset='mine',
    template='qwen3_nothink',
    cutoff_len=512,
    learning_rate='1.0e-4',
    num_train_epochs=1.0,
)

# Notebooks


def test_a_notebook_becomes_the_job_that_it_describes(tmp_path):
    got = import_job(notebook(tmp_path / 'n.ipynb', LOAD, LORA, ROWS, TRAIN))
    j = got.job
    assert (j.model, j.load_in_4bit, j.max_seq_length, j.r, j.target_modules) == (
        'unsloth/Qwen3-8B',
        True,
        1024,
        8,
        ['q_proj', 'v_proj'],
    )
    assert (j.dataset, j.loss_on, j.max_steps, j.warmup_steps, j.learning_rate, j.seed) == (
        'rows.jsonl',
        'everything',
        50,
        0.1,
        1e-4,
        1,
    )
    assert (j.per_device_train_batch_size, j.gradient_accumulation_steps, '8 rows an optimizer step' in got.head()) == (
        2,
        4,
        True,
    )
    assert {'target_modules', 'report_to'} <= set(names(got.left)) and 'embed_tokens' in next(
        l.value for l in got.left if l.name == 'target_modules'
    )
    assert next(l.where for l in got.mapped if l.name == 'learning_rate') == 'cell 4, line 3'
    assert j.over_length == 'truncate' and 'over_length' in names(got.defaults)


def test_the_defaults_are_those_of_the_class_that_is_called(tmp_path):
    def bare(cls):
        return import_job(
            notebook(
                tmp_path / f'{cls}.ipynb',
                LOAD,
                LORA,
                ROWS,
                f'from trl import SFTTrainer\ntrainer = SFTTrainer(model=model, train_dataset=dataset, args={cls}())',
            )
        ).job

    assert (
        bare('SFTConfig').per_device_train_batch_size,
        bare('SFTConfig').gradient_accumulation_steps,
        bare('SFTConfig').weight_decay,
    ) == (4, 2, 0.001)
    for cls in ('TrainingArguments', 'Seq2SeqTrainingArguments'):
        assert (
            bare(cls).per_device_train_batch_size,
            bare(cls).gradient_accumulation_steps,
            bare(cls).weight_decay,
        ) == (8, 1, 0.0)
    assert bare('SFTConfig').num_train_epochs == 3.0 and bare('SFTConfig').max_steps is None


def test_the_defaults_are_still_those_of_the_installed_libraries():
    "The tables name a release; when the installed one says otherwise, they have to be looked at again"
    from unsloth_nb.lint.migration import TRANSFORMERS_DEFAULTS
    import importlib.util

    source = (
        Path(importlib.util.find_spec('transformers').submodule_search_locations[0]) / 'training_args.py'
    ).read_text()
    for k, v in dict(TRANSFORMERS_DEFAULTS, optim='adamw_torch_fused').items():
        if k in ('optim', 'seed', 'learning_rate', 'per_device_train_batch_size'):
            continue
        assert re.search(rf'\n    {k}: \w+ = field\(\n        default={v:g}\b', source), k
    unsloth = (Path(importlib.util.find_spec('unsloth').submodule_search_locations[0]) / 'models' / 'rl.py').read_text()
    from unsloth_nb.lint.migration import UNSLOTH_DEFAULTS

    for k, v in UNSLOTH_DEFAULTS.items():
        if k != 'warmup_ratio':
            assert re.search(rf'"{k}": (\d[\d.e-]*|"\w+"),', unsloth) and v in (
                float(m) if m[0].isdigit() else m.strip('"')
                for m in re.findall(rf'"{k}": (\d[\d.e-]*|"\w+"),', unsloth)
            ), k
    assert re.search(r'replacements\["warmup_steps"\] = 0\.1', unsloth)


def test_response_masks_templates_and_cut_splits(tmp_path):
    rows = '''from unsloth.chat_templates import get_chat_template, train_on_responses_only
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1", mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"})
from datasets import load_dataset
dataset = load_dataset("owner/chats", split="train[:300]")
def draw(rows): return dict(text=[tokenizer.apply_chat_template(c, tokenize=False) for c in rows["conversations"]])
dataset = dataset.map(draw, batched=True)
dataset = dataset.filter(lambda r: len(r["text"]) < 1000)
'''
    got = import_job(
        notebook(
            tmp_path / 'n.ipynb',
            LOAD,
            LORA,
            rows,
            TRAIN,
            'trainer = train_on_responses_only(trainer, instruction_part="a", response_part="b")',
        )
    )
    assert (got.job.template, got.job.dataset_format, got.job.dataset, got.job.max_rows, got.job.loss_on) == (
        'llama-3.1',
        'sharegpt',
        'owner/chats',
        300,
        'responses',
    )
    assert 'map' in names(got.unneeded) and 'filter' in names(got.left)  # The first draws the template


def test_alpaca_prompts_are_seen_in_the_text(tmp_path):
    prompt = 'prompt = """Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n{}"""\n'
    assert import_job(notebook(tmp_path / 'n.ipynb', LOAD, LORA, prompt + ROWS, TRAIN)).job.template == 'alpaca'


def test_what_only_running_would_tell_is_left(tmp_path):
    load = LOAD.replace('max_seq_length=1024', 'max_seq_length=int(os.environ["LENGTH"])')
    train = TRAIN.replace('learning_rate=1e-4', 'learning_rate=pick(), **more')
    got = import_job(notebook(tmp_path / 'n.ipynb', load, LORA, ROWS, train))
    assert (
        'only running' in why(got.left, 'learning_rate')
        and 'only running' in why(got.left, 'max_seq_length')
        and 'SFTConfig' in names(got.left)
    )
    assert (
        got.job.learning_rate == FinetuneJob().learning_rate
    )  # Ours, and not the other tool's: the file does speak of it


@pytest.mark.parametrize(
    'code, said',
    [
        ('from trl import DPOTrainer\nt = DPOTrainer(model)', 'DPO is preference'),
        ('from trl import ORPOTrainer\nt = ORPOTrainer(model)', 'ORPO'),
        ('from trl import KTOTrainer\nt = KTOTrainer(model)', 'KTO'),
        ('from trl import GRPOTrainer\nt = GRPOTrainer(model)', 'GRPO learns from rewards'),
        (
            'from unsloth import FastVisionModel\nm, t = FastVisionModel.from_pretrained("unsloth/x")\n' + TRAIN,
            'FastVisionModel',
        ),
        ('import snac\n' + TRAIN, 'snac'),
        ('m = FastModel.from_pretrained("unsloth/bert", num_labels=3)\n' + TRAIN, 'another head'),
        ('print(1)', 'no trainer'),
        (TRAIN, 'no model is loaded'),
    ],
)
def test_other_work_is_refused_by_name(tmp_path, code, said):
    with pytest.raises(MigrationError, match=said):
        import_job(notebook(tmp_path / 'n.ipynb', code))


def test_exports_come_after_the_run(tmp_path):
    saves = 'model.save_pretrained_merged("m", tokenizer, save_method="merged_16bit")\nmodel.push_to_hub_gguf("owner/m", tokenizer, quantization_method=["q8_0", "q5_k_m"], token="YOUR")\nif False: model.save_pretrained_merged("m", tokenizer, save_method="merged_4bit")\n'
    got = import_job(notebook(tmp_path / 'n.ipynb', LOAD, LORA, ROWS, TRAIN, saves))
    assert [e.to for e in got.exports] == ['merged_16bit', 'gguf_q8_0']
    assert 'no such form' in why(got.left, 'push_to_hub_gguf') and 'quantizes after merging' in next(
        l.why for l in got.unneeded if 'merged_4bit' in l.value
    )


def test_a_file_is_never_run(tmp_path):
    mark = tmp_path / 'ran'
    code = f'open({str(mark)!r}, "w").write("x")\n!touch {mark}\n'
    import_job(notebook(tmp_path / 'n.ipynb', code, LOAD, LORA, ROWS, TRAIN))
    (tmp_path / 's.py').write_text(f'import os\nos.system("touch {mark}")\n' + LOAD + LORA + ROWS + TRAIN)
    import_job(tmp_path / 's.py')
    (tmp_path / 'a.yaml').write_text(f'base_model: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(MigrationError, match='not YAML'):
        import_job(tmp_path / 'a.yaml')
    assert not mark.exists()


@pytest.mark.parametrize(
    'name',
    [
        'unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit',
        'unsloth/Qwen3-14B-unsloth-bnb-4bit',
        'unsloth/llama-3-70b-bnb-4bit',
        'somebody/thing-bnb-4bit',
    ],
)
def test_quantized_names_stand_for_a_model_in_16_bits(name):
    full, quantized, _ = full_name(name)
    assert quantized and not full.lower().endswith('4bit') and full.count('/') == 1


def test_a_quantized_copy_that_is_asked_for_in_16_bits(tmp_path):
    assert (
        import_job(
            notebook(tmp_path / 'n.ipynb', LOAD.replace('load_in_4bit=True', 'load_in_4bit=False'), LORA, ROWS, TRAIN)
        ).job.load_in_4bit
        is False
    )


# Axolotl


def test_axolotl(tmp_path):
    got = import_job(
        yaml_file(
            tmp_path / 'a.yaml',
            **AXO,
            val_set_size=32,
            warmup_steps=0.2,
            max_steps=40,
            peft_use_rslora=True,
            optimizer2=None,
        )
    )
    j = got.job
    assert (
        j.model,
        j.r,
        j.lora_alpha,
        j.max_steps,
        j.warmup_steps,
        j.test_size,
        j.template,
        j.loss_on,
        j.over_length,
    ) == ('NousResearch/Llama-3.2-1B', 16, 128, 40, 0.2, 32, 'alpaca', 'responses', 'drop')
    assert (j.lr_scheduler_type, j.load_in_4bit, j.packing) == (
        'cosine',
        False,
        False,
    ) and 'lr_scheduler_type' in names(got.defaults)


def test_all_of_a_mapping_is_taken_over(tmp_path):
    "Keys and roles that `get_chat_template` names"

    def drafted(mapping):
        draw = 'from unsloth.chat_templates import get_chat_template\n'
        draw += f'tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1", mapping={mapping!r})\n'
        return import_job(notebook(tmp_path / 'n.ipynb', LOAD, LORA, draw + ROWS, TRAIN)).job

    job = drafted(dict(role='who', content='said', user='customer', assistant='agent'))
    assert job.dataset_turns == dict(role='who', content='said')
    assert job.dataset_roles == dict(customer='user', agent='assistant')
    job = drafted({'role': 'from', 'content': 'value', 'user': 'human', 'assistant': 'gpt'})
    assert (job.dataset_format, job.dataset_turns, job.dataset_roles) == ('sharegpt', {}, {})


def test_axolotl_columns_roles_and_text(tmp_path):
    chats = dict(
        path='owner/c',
        type='chat_template',
        field_messages='talk',
        message_property_mappings=dict(role='from', content='value'),
        roles=dict(user=['person'], assistant=['bot2']),
    )
    j = import_job(yaml_file(tmp_path / 'a.yaml', **AXO | dict(datasets=[chats], chat_template='qwen_25'))).job
    assert (j.dataset_format, j.dataset_columns, j.dataset_roles, j.template) == (
        'sharegpt',
        dict(conversations='talk'),
        dict(person='user', bot2='assistant'),
        'qwen-2.5',
    )

    def named(**kw):
        return import_job(
            yaml_file(tmp_path / 'a.yaml', **AXO | dict(datasets=[dict(path='owner/c', type='sharegpt', **kw)]))
        )

    assert named().job.dataset_format == 'sharegpt' and named().job.dataset_turns == {}
    assert named(message_field_role='who').job.dataset_turns == dict(role='who', content='value')
    got = named(message_property_mappings=dict(role='who', content='said', tool_calls='calls'))
    assert got.job.dataset_turns == dict(role='who', content='said')
    assert 'datasets.message_property_mappings.tool_calls' in names(got.left)
    j = import_job(
        yaml_file(tmp_path / 'b.yaml', **AXO | dict(datasets=[dict(path='book.txt', type='completion', field='body')]))
    ).job
    assert (j.dataset, j.dataset_format, j.dataset_columns, j.template, j.loss_on) == (
        'book.txt',
        'text',
        dict(text='body'),
        'raw',
        'everything',
    )


def test_axolotl_differences_are_left_with_a_reason(tmp_path):
    full = {k: v for k, v in AXO.items() if k != 'adapter'}
    got = import_job(
        yaml_file(
            tmp_path / 'a.yaml',
            **full
            | dict(
                optimizer='muon',
                lr_scheduler='rex',
                val_set_size=0.05,
                warmup_ratio=0.1,
                deepspeed='zero3.json',
                trust_remote_code=True,
                plugins=['a.liger.L', 'b.own.Plugin'],
                frobnicate=3,
            ),
        )
    )
    assert {
        'adapter',
        'optimizer',
        'lr_scheduler',
        'deepspeed',
        'trust_remote_code',
        'plugins',
        'frobnicate',
    } <= set(names(got.left))
    assert (got.job.test_size, got.job.warmup_steps) == (0.05, 0.1)
    assert got.job.optim == 'auto' and got.job.lr_scheduler_type == 'linear' and got.job.allow_remote_code is None
    assert not {'optim', 'lr_scheduler_type'} & set(names(got.defaults))


@pytest.mark.parametrize(
    'more, said',
    [
        (dict(rl='dpo'), 'preference'),
        (dict(rl='grpo'), 'preference'),
        (dict(reward_model=True), 'something else'),
        (dict(skip_prepare_dataset=True, processor_type='AutoProcessor'), 'images'),
        (dict(base_model='./nowhere/model'), 'no such folder'),
    ],
)
def test_axolotl_refusals(tmp_path, more, said):
    with pytest.raises(MigrationError, match=said):
        import_job(yaml_file(tmp_path / 'a.yaml', **AXO | more))


def test_a_name_that_stands_twice_is_said(tmp_path):
    f = yaml_file(tmp_path / 'a.yaml', **AXO)
    f.write_text(f.read_text() + 'lora_r: 64\n')
    got = import_job(f)
    assert got.job.r == 64 and 'twice' in why(got.left, 'lora_r')


# LLaMA-Factory


def test_llama_factory_finds_its_datasets_and_they_load(tmp_path):
    from unsloth_nb.data.load import load_data

    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'a.json').write_text(json.dumps([dict(question=f'q{i}', answer=f'a{i}') for i in range(12)]))
    (tmp_path / 'data' / 'c.json').write_text(
        json.dumps(
            [
                dict(messages=[dict(role='person', content=f'u{i}'), dict(role='assistant', content=f'v{i}')])
                for i in range(12)
            ]
        )
    )
    info = dict(
        mine=dict(file_name='a.json', columns=dict(prompt='question', response='answer')),
        talk=dict(
            file_name='c.json',
            formatting='sharegpt',
            columns=dict(messages='messages'),
            tags=dict(role_tag='role', content_tag='content', user_tag='person', assistant_tag='assistant'),
        ),
    )
    (tmp_path / 'data' / 'dataset_info.json').write_text(json.dumps(info))
    f = yaml_file(tmp_path / 's.yaml', **LF | dict(dataset='mine,talk', warmup_ratio=0.0, val_size=4))
    got = import_job(f, model='smollm2-135m')
    assert (got.job.r, got.job.lora_alpha, got.job.warmup_steps, got.job.template) == (
        8,
        16,
        0,
        'qwen3-instruct',
    ) and len(got.mix) == 2
    out = got.save(tmp_path / 'p.yaml')
    job = FinetuneJob(**read_params(out[0]))
    assert [p.name for p in out] == ['p.yaml', 's_mix.yaml'] and job.test_size == 4
    data = load_data(job)
    assert len(data.train) + len(data.test) == 24 and {c.messages[0]['role'] for c in data.train} == {'user'}


TAGS = dict(role_tag='who', content_tag='said', user_tag='customer', assistant_tag='agent')


def test_llama_factory_tags_are_honoured(tmp_path):
    "Keys and roles of turns are taken over, and the job reads the rows; what is not taken over is left, by name"
    from unsloth_nb.data.load import load_data

    rows = [
        dict(persona='Sell.', talk=[dict(who='customer', said=f'q{i}'), dict(who='agent', said='a')]) for i in range(8)
    ]
    columns = dict(messages='talk', system='persona')
    info = dict(mine=dict(file_name='a.json', formatting='sharegpt', columns=columns, tags=TAGS))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'a.json').write_text(json.dumps(rows))
    (tmp_path / 'data' / 'dataset_info.json').write_text(json.dumps(info))
    f = yaml_file(tmp_path / 's.yaml', **LF | dict(dataset='mine', val_size=2))
    got = import_job(f, model='smollm2-135m')
    assert got.job.dataset_turns == dict(role='who', content='said')
    assert got.job.dataset_roles == dict(customer='user', agent='assistant')
    conv = load_data(got.job, split=False).train[0]
    assert [m['role'] for m in conv.messages] == ['system', 'user', 'assistant']
    info['mine'] |= dict(tags=TAGS | dict(function_tag='do'), columns=columns | dict(mood='mood'), folder='x')
    (tmp_path / 'data' / 'dataset_info.json').write_text(json.dumps(info))
    left = names(import_job(f, model='smollm2-135m').left)
    assert {'dataset mine: tags.function_tag', 'dataset mine: columns.mood', 'dataset mine: folder'} <= set(left)


def test_llama_factory_names_that_are_not_found(tmp_path):
    got = import_job(
        yaml_file(tmp_path / 's.yaml', **LF | dict(trust_remote_code=True, quantization_bit=4, use_galore=True))
    )
    assert (
        got.job.dataset == 'mine' and 'dataset_info.json' in why(got.left, 'dataset') and got.job.load_in_4bit is True
    )
    assert {'trust_remote_code', 'use_galore'} <= set(names(got.left)) and got.job.learning_rate == 1e-4
    assert import_job(yaml_file(tmp_path / 't.yaml', **LF | dict(stage='pt'))).job.template == 'raw'


@pytest.mark.parametrize(
    'more, said',
    [
        (dict(stage='dpo'), 'preference'),
        (dict(stage='kto'), 'preference'),
        (dict(stage='rm'), 'something else'),
        (dict(export_dir='out'), 'merges'),
        (dict(model_name_or_path=None), 'no model'),
    ],
)
def test_llama_factory_refusals(tmp_path, more, said):
    with pytest.raises(MigrationError, match=said):
        import_job(yaml_file(tmp_path / 's.yaml', **LF | more))


@pytest.mark.parametrize(
    'text, said',
    [
        ('- 1\n', 'name: value'),
        ('a: [', 'not YAML'),
        ('x: 1\n', 'neither'),
        ('model: smollm2-135m\nlearning_rate: 1\n', 'params file of this package'),
        ('distributed_type: FSDP\n', 'several devices'),
        ('model: x\nmodel_class: llm\n', 'newer engine'),
        ('', 'name: value'),
    ],
)
def test_other_yaml_is_refused(tmp_path, text, said):
    (tmp_path / 'x.yaml').write_text(text)
    with pytest.raises(MigrationError, match=said):
        import_job(tmp_path / 'x.yaml')


# All of them


def test_what_shapes_training_is_taken_over(tmp_path):
    "Shares, the schedule and its floor, the optimizer and its numbers, noise, smoothing and another loss"
    asked = dict(
        val_set_size=0.05,
        warmup_ratio=0.1,
        optimizer='paged_adamw_8bit',
        lr_scheduler='cosine',
        cosine_min_lr_ratio=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        neftune_noise_alpha=5,
        loraplus_lr_ratio=16,
        embedding_lr=1e-5,
    )
    j = (got := import_job(yaml_file(tmp_path / 'a.yaml', **AXO | asked))).job
    assert not set(names(got.left)) & set(asked)
    assert (j.test_size, j.warmup_steps, j.optim, j.lr_scheduler_type) == (0.05, 0.1, 'paged_adamw_8bit', 'cosine')
    assert (j.min_lr_ratio, j.adam_beta2, j.adam_epsilon, j.neftune_noise_alpha) == (0.1, 0.95, 1e-6, 5)
    assert (j.loraplus_lr_ratio, j.learning_rate_embedding) == (16, 1e-5)
    own = dict(
        warmup_ratio=0.1,
        use_dft_loss=True,
        lr_scheduler_type='cosine_with_restarts',
        lr_scheduler_kwargs=dict(num_cycles=3),
    )
    got = import_job(yaml_file(tmp_path / 'l.yaml', **LF | own))
    assert (got.job.loss_type, got.job.num_cycles) == ('dft', 3) and got.job.warmup_steps == 0.1
    assert not set(names(got.left)) & set(own)


@pytest.mark.parametrize('table, base, read', [(AXOLOTL, AXO, read_axolotl), (LLAMA_FACTORY, LF, read_llama_factory)])
def test_no_value_of_any_setting_breaks_it_or_is_lost(tmp_path, table, base, read):
    "Each name with values that nobody meant: an answer or a refusal, and every setting in just one list"
    odd = [
        True,
        False,
        '',
        'x',
        'a,b',
        -1,
        0,
        0.5,
        1e9,
        float('nan'),
        [],
        ['a', 1],
        [{}],
        {},
        {'a': {'b': [1]}},
        10**30,
        '2e-4',
    ]
    crashes = []
    tried = 0
    lost = []
    for name in sorted(table):
        for v in odd:
            tried += 1
            try:
                got, defaults, epochs = read(tmp_path / 'x.yaml', base | {name: v}, {})
                got.finish(defaults, epochs, 'x')
            except MigrationError:
                continue
            except Exception as e:
                crashes.append(f'{name}={v!r}: {type(e).__name__}: {e}')
                continue
            told = names([*got.mapped, *got.unneeded, *got.left])
            if not any(t == name or t.startswith(f'{name}.') or t == 'use_rslora' for t in told) and name not in (
                'num_train_epochs',
                'num_epochs',
            ):
                lost.append((name, v))
    assert tried > 1500 and not crashes and not lost


@pytest.mark.parametrize(
    'name, call',
    [
        ('learning_rate', 'train'),
        ('max_steps', 'train'),
        ('warmup_steps', 'train'),
        ('optim', 'train'),
        ('seed', 'train'),
        ('r', 'lora'),
        ('target_modules', 'lora'),
        ('bias', 'lora'),
        ('use_rslora', 'lora'),
        ('max_seq_length', 'load'),
        ('model_name', 'load'),
        ('dtype', 'load'),
    ],
)
def test_odd_arguments_in_notebooks(tmp_path, name, call):
    for v in ('None', 'f(1)', '"x"', '-1', '[[1]]', '{"a": 1}', '1e400', 'lambda: 1', 'True'):
        cells = dict(load=LOAD, lora=LORA, train=TRAIN)
        where = (
            cells[call].replace('SFTConfig(per', f'SFTConfig({name}={v}, per')
            if call == 'train'
            else cells[call].replace(f'{name}=', f'{name}={v}, was_', 1)
            if f'{name}=' in cells[call]
            else cells[call]
            .replace('bias=', f'{name}={v}, bias=')
            .replace('load_in_4bit=True', f'{name}={v}, load_in_4bit=True')
        )
        f = notebook(
            tmp_path / 'n.ipynb',
            *(where if k == call else c for k, c in cells.items() if k != 'train'),
            ROWS,
            where if call == 'train' else TRAIN,
        )
        try:
            import_job(f)
        except MigrationError as e:
            assert 'model' in str(e)


def test_secrets_are_nowhere_and_hostile_text_does_nothing(tmp_path):
    a, b = SECRETS
    nb = notebook(
        tmp_path / 'n.ipynb',
        LOAD.replace('load_in_4bit=True', f'load_in_4bit=True, token="{a}"'),
        LORA,
        ROWS,
        TRAIN.replace('report_to="wandb"', f'run_name="{b}", hub_token="{a}", optim={HOSTILE!r}, note="use {a}"'),
    )
    ax = yaml_file(
        tmp_path / 'a.yaml',
        **AXO | dict(hf_use_auth_token=a, wandb_api_key=b, wandb_name=f'run {a}', special=[b], optimizer=HOSTILE),
    )
    lf = yaml_file(tmp_path / 's.yaml', **LF | dict(hf_hub_token=a, run_name=b, optim=HOSTILE))
    for n, f in enumerate((nb, ax, lf)):
        got = import_job(f)
        (out,) = got.save(tmp_path / f'p{n}.yaml')
        for text in (str(got), got._repr_markdown_(), out.read_text(), json.dumps(got.params)):
            assert a not in text and b not in text and a[:12] not in text
            assert '\x1b' not in text and '\u202e' not in text
        assert '<script' not in got._repr_markdown_()
        assert {'token', 'hub_token', 'hf_use_auth_token', 'wandb_api_key', 'hf_hub_token'} & set(names(got.left))


def test_a_model_or_rows_that_hold_a_secret_are_refused_without_showing_it(tmp_path):
    with pytest.raises(MigrationError) as e:
        import_job(yaml_file(tmp_path / 'a.yaml', **AXO | dict(base_model=f'https://user:{SECRETS[0]}@host/x')))
    assert SECRETS[0] not in str(e.value)


def test_bombs_of_aliases_and_loops_are_read(tmp_path):
    lines = [
        'a0: &a0 [x, x, x, x, x, x, x, x, x]',
        *(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 9)),
        'loop: &l [*l]',
        *yaml.safe_dump(AXO).splitlines(),
    ]
    (tmp_path / 'a.yaml').write_text('\n'.join(lines))
    got = import_job(tmp_path / 'a.yaml')
    assert 'a8' in names(got.left) and len(str(got)) < 20_000


def test_what_is_saved_is_the_job(tmp_path):
    for n, f in enumerate(
        (
            notebook(tmp_path / 'n.ipynb', LOAD, LORA, ROWS, TRAIN),
            yaml_file(tmp_path / 'a.yaml', **AXO),
            yaml_file(tmp_path / 's.yaml', **LF),
        )
    ):
        got = import_job(f)
        assert FinetuneJob(**read_params(got.save(tmp_path / f'p{n}.yaml')[0])) == got.job


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    f = yaml_file(tmp_path / 'a.yaml', **AXO)
    out = tmp_path / 'p.yaml'
    r = CliRunner().invoke(app, ['import', str(f), '-o', str(out), '-p', 'max_steps=7'])
    assert r.exit_code == 0 and 'Taken over' in r.output and read_params(out)['max_steps'] == 7
    r = CliRunner().invoke(app, ['import', str(f), '-o', str(out)])
    assert isinstance(r.exception, MigrationError) and 'there already' in str(r.exception)


# Tables next to the modules

RULE_PARTS = {'taken', 'rules', 'switches', 'without_effect', 'left', 'refused'}
TABLES = {
    'trainer': ((), RULE_PARTS),
    'axolotl': ((), RULE_PARTS | {'defaults', 'templates', 'columns', 'entry', 'fast_plugins'}),
    'llama_factory': ((), RULE_PARTS | {'defaults', 'templates', 'columns', 'media', 'stages'}),
    'unsloth': (('load', 'lora', 'config', 'trainer'), RULE_PARTS),
}


def rule_tables():
    for name, (parts, keys) in TABLES.items():
        table = read_table(name)
        for part in parts:
            yield f'{name}: {part}', table[part], keys
        if not parts:
            yield name, table, keys


@pytest.mark.parametrize('name, table, keys', list(rule_tables()), ids=[n for n, *_ in rule_tables()])
def test_tables_say_what_becomes_of_each_name_once(name, table, keys):
    assert not set(table) - keys
    groups = [g for part in ('without_effect', 'left', 'refused') for g in table.get(part, [])]
    assert all(set(g) == {'why', 'names'} and g['names'] for g in groups)
    assert all(isinstance(g['why'], str) and '\n' not in g['why'] for g in groups)
    assert all(set(s) == {'sets', 'otherwise'} for s in table.get('switches', {}).values())
    said = [n for part in ('taken', 'rules', 'switches') for n in table.get(part, {})]
    said += [n for g in groups for n in g['names']]
    assert all(isinstance(n, str) for n in said) and len(said) == len(set(said))
    fields = set(FinetuneJob.model_fields)
    assert not set(table.get('taken', {}).values()) - fields
    assert not {p for s in table.get('switches', {}).values() for p in s['sets']} - fields
    assert not set(table.get('defaults', {})) - fields - {'warmup_ratio'}


def test_tables_name_templates_and_forms_that_exist():
    for name in ('axolotl', 'llama_factory'):
        assert not set(read_table(name)['templates'].values()) - {*TEMPLATES, 'chat', 'raw', 'alpaca', 'auto'}
    assert not set(read_table('unsloth')['forms'].values()) - set(EXPORTS)
    assert re.compile('|'.join(read_table('unsloth')['media'])).search('FastVisionModel')


def test_every_table_has_a_key_only_once():
    "YAML takes the last one of two, in silence"

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(k, deep=True) for k, _ in node.value]
            assert len(keys) == len(set(keys)), (node.start_mark, keys)
            return super().construct_mapping(node, deep)

    Strict.add_constructor('tag:yaml.org,2002:map', lambda loader, node: loader.construct_mapping(node, deep=True))
    files = sorted(Path(lint.__file__).parent.glob('*.yaml'))
    assert {*TABLES, 'advice', 'review'} == {f.stem for f in files}
    for f in files:
        assert yaml.load(f.read_text(encoding='utf-8'), Strict) == read_table(f.stem)
