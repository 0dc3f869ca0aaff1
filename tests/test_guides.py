"What the guides say in prose is checked here: turns against the templates, quoted errors against the source, jobs and commands against the schema."

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / 'nbs' / 'guides').glob('*.ipynb'))
FAMILIES = ('llama', 'mistral', 'qwen', 'gemma', 'phi')


def prose(name):
    return '\n\n'.join(
        ''.join(c['source'])
        for c in json.loads((ROOT / 'nbs' / 'guides' / f'{name}.ipynb').read_text())['cells']
        if c['cell_type'] == 'markdown'
    )


def turns(name):
    "(template, text) of each drawn turn"
    return re.findall(
        r"`([\w.-]+)`[^`]*?:\n\n```text\n(.*?)\n```",
        re.sub(r'`\[\[…\]\]`|`(?:assistant|model|gpt|gemma2)`', '', prose(name)),
        re.S,
    )


DRAWN = [(f, *t) for f in FAMILIES for t in turns(f)]


@pytest.fixture(scope='module')
def drawn(lib):
    "A conversation as a template draws it, trained parts in double brackets"
    from unsloth_nb.tokens.conformance import family_tokens
    from unsloth_nb.tokens.formatting import Formatter

    tok = lib.load_tokenizer(lib.FinetuneJob())
    conv = lib.Conversation([dict(role='user', content='Which day?'), dict(role='assistant', content='Monday.')])

    def f(name):
        fmt = Formatter(lib.use_template(family_tokens(tok, name), name), 'chat')
        (ex, *rest), *_ = fmt.examples([conv])
        assert not rest
        text = ''
        last = False
        for i, m in zip(ex.input_ids, ex.mask):
            text += ('[[' if m and not last else ']]' if last and not m else '') + fmt.tok.decode(
                [i], clean_up_tokenization_spaces=False
            )
            last = m
        return text + (']]' if last else '')

    return f


def test_every_family_draws_its_turns():
    assert {f for f, _, _ in DRAWN} == set(FAMILIES) and len(DRAWN) >= 10


@pytest.mark.slow
@pytest.mark.parametrize('family, name, text', DRAWN, ids=[f'{f}-{n}' for f, n, _ in DRAWN])
def test_a_turn_is_drawn_as_the_guide_says(drawn, family, name, text):
    assert drawn(name).strip() == text.strip()


@cache
def constants():
    "Every text in the package's source, as the parser sees it"
    trees = (ast.parse(f.read_text()) for f in (ROOT / 'unsloth_nb').rglob('*.py'))
    return '\n'.join(
        n.value for t in trees for n in ast.walk(t) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


QUOTED = re.findall(r'^> `(.*)`$', prose('troubleshooting'), re.M)


@pytest.mark.parametrize('quote', QUOTED)
def test_quoted_errors_stand_in_the_source(quote):
    parts = [p for p in quote.split('…') if p.strip()]
    assert len(QUOTED) > 20 and parts and not [p for p in parts if p not in constants()]


def test_a_quote_that_nobody_says_would_be_found():
    assert (
        'the model has no chat template of its own; use template=' in constants()
        and 'the model has no chat template of its own, sorry' not in constants()
    )


COMMANDS = [
    (f.stem, c) for f in GUIDES for c in re.findall(r'`(unsloth-nb run finetune [^`]*)`', prose(f.stem)) if '-p' in c
]


@pytest.mark.parametrize('guide, command', COMMANDS, ids=[g for g, _ in COMMANDS])
def test_commands_make_jobs(guide, command):
    from unsloth_nb.jobs.runner import read_pairs
    from unsloth_nb.core.spec import FinetuneJob, make_job

    words = shlex.split(command)
    pairs = [w for k, w in zip(words, words[1:]) if k == '-p']
    preset = next((w for k, w in zip(words, words[1:]) if k == '--preset'), None)
    assert make_job('finetune', preset, None, **read_pairs(FinetuneJob, pairs)).dataset == 'your_rows.jsonl'


def test_there_is_a_command_for_each_family():
    assert {g for g, _ in COMMANDS} >= set(FAMILIES)


def test_every_layer_that_a_preset_names_is_one_that_its_guide_names():
    from unsloth_nb.core.spec import presets

    text = prose('mistral') + prose('qwen')
    odd = {p.name: p.params['target_modules'] for p in presets().values() if 'target_modules' in p.params}
    assert (
        odd
        and all(p.get('num_local_experts') for p in (presets()[n].shape for n in odd))
        and all(repr(t) in text for t in odd.values())
    )
    assert not [p.name for p in presets().values() if p.shape.get('num_local_experts', 1) > 1 and p.name not in odd]


def test_a_mixture_gets_no_adapter_on_its_experts(lib, tmp_path):
    "Why those presets name their layers: transformers keeps the experts in one tensor"
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    tok = lib.load_tokenizer(lib.FinetuneJob())
    with torch.device('cpu'):
        MixtralForCausalLM(
            MixtralConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=2,
                vocab_size=len(tok),
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).to(torch.bfloat16).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    job = lib.FinetuneJob(model=str(tmp_path), max_seq_length=64, load_in_4bit=False)
    with pytest.raises(lib.SpecError, match='has no gate_proj, up_proj, down_proj'):
        lib.load_model(job)
    assert lib.load_model(job.replace(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'])).parameters[0] > 0
