"""The model presets: types, names, ids, and shapes that add up to the parameter counts."""

import pytest
import yaml
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob, Preset, jobs_dir, presets

ALL = list(presets().values())


def each(ps):
    return pytest.mark.parametrize('p', ps, ids=[p.name for p in ps])


STR = 'name family about hub license hub_license chat_template'.split()
BOOL = 'gated remote_code embedded padding_free'.split()
# A family, its architecture and the Hub's name of its licence; a new family is its file and a row here
FAMILIES = {
    'gemma': ('gemma3_text', 'gemma'),
    'llama2': ('llama', 'llama2'),
    'llama3': ('llama', 'llama3.1'),
    'mistral': ('mistral', 'apache-2.0'),
    'openelm': ('', 'other'),
    'phi': ('phi3', 'mit'),
    'qwen2': ('qwen2', 'apache-2.0'),
    'qwen3': ('qwen3', 'apache-2.0'),
    'smollm2': ('llama', 'apache-2.0'),
    'tinyllama': ('llama', 'apache-2.0'),
}


def vision(v, hidden):
    "Parameters of an image encoder and the projection into the language model"
    h = v['hidden_size']
    i = v['intermediate_size']
    layer = 4 * h * (h + 1) + 2 * h * i + i + h + 4 * h
    return (
        v['num_hidden_layers'] * layer
        + h * (3 * v['patch_size'] ** 2 + 1 + (v['image_size'] // v['patch_size']) ** 2 + 2)
        + h * hidden
        + h
    )


def count(s):
    "Parameters that a shape amounts to, biases and query/key norms left out"
    h = s['hidden_size']
    hd = s['head_dim']
    n = s.get('num_local_experts', 1)
    attn = 2 * h * hd * (s['num_attention_heads'] + s['num_key_value_heads'])
    mlp = n * 3 * h * s.get('moe_intermediate_size', s['intermediate_size']) + (n * h if n > 1 else 0)
    embed = s['vocab_size'] * h * (1 if s['tie_word_embeddings'] else 2)
    return (
        embed
        + s['num_hidden_layers'] * (attn + mlp + 2 * h)
        + h
        + (vision(s['vision_config'], h) if 'vision_config' in s else 0)
    )


@each(ALL)
def test_types(p):
    assert isinstance(p, Preset) and all(isinstance(getattr(p, k), str) and getattr(p, k) for k in STR)
    assert all(isinstance(getattr(p, k), bool) for k in BOOL)
    assert isinstance(p.parameters, float), (
        f'{p.parameters!r}: YAML reads a float only with a signed exponent (1.345e+8)'
    )
    assert type(p.context_length) is int and p.context_length >= 2048
    flat = {k: v for k, v in p.shape.items() if k != 'vision_config'} | p.shape.get('vision_config', {})
    assert all(isinstance(v, bool) if k == 'tie_word_embeddings' else type(v) is int and v > 0 for k, v in flat.items())


def test_families():
    "The head of a family's file says what is known of all its models; experts are never put end to end"
    heads = [yaml.safe_load(f.read_text()) for f in sorted((jobs_dir() / 'presets').glob('*.yaml'))]
    assert {h['family']: (h.get('model_type', ''), h.get('hub_license', 'other')) for h in heads} == FAMILIES
    assert not [p.name for p in ALL if p.padding_free and p.shape.get('num_local_experts', 1) > 1]


@each(ALL)
def test_names(p):
    assert p.name == p.name.lower() and '/' not in p.name
    assert p.hub.count('/') == 1 and all(p.hub.split('/'))
    for mirror in filter(None, (p.hub_ungated, p.hub_4bit)):
        assert mirror.startswith('unsloth/')
    assert p.hub_4bit is None or p.hub_4bit.endswith('-bnb-4bit')


def test_unique():
    names = [n for f in (jobs_dir() / 'presets').glob('*.yaml') for n in yaml.safe_load(f.read_text())['models']]
    assert len(set(names)) == len(names) == len(ALL)
    for k in ('hub', 'hub_ungated', 'hub_4bit'):
        ids = [getattr(p, k) for p in ALL if getattr(p, k)]
        assert len(set(ids)) == len(ids), k


@each(ALL)
def test_parameters(p):
    if p.family == 'openelm':
        pytest.skip('OpenELM: heads and MLP differ from layer to layer')
    assert count(p.shape) == pytest.approx(float(p.parameters), rel=0.02)


@each([p for p in ALL if p.remote_code])
def test_remote_code(p):
    with pytest.raises(SpecError, match=p.hub):
        FinetuneJob(model=p.name)
    with pytest.raises(SpecError, match=p.hub):
        FinetuneJob(model=p.name, allow_remote_code='somebody/else')
    assert FinetuneJob(model=p.name, allow_remote_code=p.hub).model == p.name


def test_openelm():
    "The check above covers every OpenELM model"
    assert (
        {p.name for p in ALL if p.remote_code}
        == {p.name for p in ALL if p.family == 'openelm'}
        >= {'openelm-270m-instruct'}
    )
