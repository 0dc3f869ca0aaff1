"GGUF files by llama.cpp's converter: llama.cpp answers from them as transformers does, and what is wrong in them shows."

import importlib.util
import shutil
import subprocess
import sys
import pytest

from unsloth_nb.export.gguf import (
    BINDINGS,
    GgufError,
    check_gguf_kind,
    converter_folder,
    find_converter,
    gguf_info,
    install_converter,
    llama_cpp_answers,
    write_gguf,
)
from unsloth_nb.training.loading import embedded_model
from unsloth_nb.runs.run import read_json, write_json
from unsloth_nb.core.schema import SpecError

TALKS = [
    [dict(role='user', content='What is the capital of France?')],
    [
        dict(role='system', content='Answer with one word.'),
        dict(role='user', content='A colour?'),
        dict(role='assistant', content='Red.'),
        dict(role='user', content='And  2 more, 1,000.50?'),
    ],
]
PROBES = [
    'Hello world',
    'a  12',
    '  \n 1',
    'x   3 4',
    "I've 'told",
    'naïve 😀\n\n  x',
    '٣٤ 12½ ²',
    '漢字 12',
    '\t1 \r\n',
    '<|im_start|>user\nhi<|im_end|>',
    ' ',
    'def f(x):\n    return x[0]  # 2',
]
NEW = 12  # tokens


@pytest.fixture(scope='module')
def reference(lib):
    "What transformers makes of the embedded model, and the request that asks the same of llama.cpp"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(embedded_model())
    net = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    prompts = [
        dict(messages=m, tools=None, ids=tok.apply_chat_template(m, add_generation_prompt=True, return_dict=False))
        for m in TALKS
    ]
    examples = []
    logprobs = []
    greedy = []
    for p in prompts:
        with torch.no_grad():
            ids = net.generate(torch.tensor([p['ids']]), max_new_tokens=NEW, do_sample=False)[0].tolist()
            lp = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = list(range(len(p['ids']), len(ids)))
        top = [lp[a - 1].topk(5).indices.tolist() for a in at]
        examples.append(dict(input_ids=ids, at=at, ids=top))
        logprobs.append([lp[a - 1][t].tolist() for a, t in zip(at, top)])
        greedy.append(dict(ids=[i for i in ids[at[0] :] if i != tok.eos_token_id], stopped=ids[-1] == tok.eos_token_id))
    probes = [tok.encode(t, add_special_tokens=False) for t in PROBES]
    return dict(
        tok=tok,
        request=dict(examples=examples, prompts=prompts, max_new_tokens=NEW, probes=PROBES),
        logprobs=logprobs,
        greedy=greedy,
        probes=probes,
    )


def mean_difference(answer, reference):
    pairs = [
        (x, y) for a, b in zip(answer['logprobs'], reference['logprobs']) for p, q in zip(a, b) for x, y in zip(p, q)
    ]
    return sum(abs(x - y) for x, y in pairs) / len(pairs)


def agrees(answer, reference, limit):
    "Tokens of both programs are the same, and log-probabilities [nats] differ by less than the limit on average"
    assert answer['rendered'] == [p['ids'] for p in reference['request']['prompts']]
    assert answer['probes'] == reference['probes']
    assert answer['adds_bos'] is False and answer['eos'] == [2] and answer['pad'] == 0
    assert mean_difference(answer, reference) < limit
    assert (
        [len(c) for c in answer['choice']]
        == [len(e['at']) for e in reference['request']['examples']]
        == [len(r) for r in answer['right']]
    )


def changed(source, file, *args):
    "A copy of a GGUF file with other metadata, by the tool of the gguf package"
    subprocess.run(
        [sys.executable, '-m', 'gguf.scripts.gguf_new_metadata', *args, '--force', source, file],
        check=True,
        capture_output=True,
    )
    return file


only_metadata = dict(examples=[], max_new_tokens=4)

# --- what llama.cpp answers


def installed(name):
    return pytest.param(
        name,
        marks=[pytest.mark.llama_cpp]
        if name == 'llama_cpp'
        else [pytest.mark.skipif(not importlib.util.find_spec(name), reason=f'needs {name}: the extra gguf')],
    )


bindings = pytest.mark.parametrize('binding', [installed(b) for b in BINDINGS])


@bindings
def test_llama_cpp_answers_as_transformers(gguf_file, reference, binding):
    answer = llama_cpp_answers(gguf_file, reference['request'], binding)
    agrees(answer, reference, 0.02)
    assert answer['greedy'] == reference['greedy']
    assert answer['choice'] == [[t[0] for t in e['ids']] for e in reference['request']['examples']]
    assert answer['template_sha256'] == gguf_info(gguf_file).template_sha256
    assert BINDINGS[binding].package in answer['software']


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize('kind,kept,size,limit', [('q8_0', 'Q8_0', 150e6, 0.3), ('q4_k_m', 'Q4_K', 110e6, 0.8)])
def test_fewer_bits(converter, reference, tmp_path, kind, kept, size, limit):
    info = write_gguf(embedded_model(), tmp_path / 'model.gguf', kind)
    assert info.types[kept] and info.bytes < size
    agrees(llama_cpp_answers(tmp_path / 'model.gguf', reference['request']), reference, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.gguf']


# --- what is wrong shows


def test_other_cutting_of_text_and_doubled_bos_show(gguf_file, reference, tmp_path):
    "The pre-tokenizer is the one that the converter's own test takes the embedded model's for"
    right = gguf_info(gguf_file)
    file = changed(
        gguf_file,
        tmp_path / 'model.gguf',
        '--pre-tokenizer',
        'smollm',
        '--chat-template',
        '{{ bos_token }}' + right.template,
    )
    answer = llama_cpp_answers(file, dict(only_metadata, prompts=reference['request']['prompts'][:1], probes=PROBES))
    assert [t for t, a, b in zip(PROBES, answer['probes'], reference['probes']) if a != b] == [
        'a  12',
        '  \n 1',
        'x   3 4',
        '٣٤ 12½ ²',
    ]
    assert answer['rendered'][0] == [1] + reference['request']['prompts'][0]['ids']
    assert answer['template_sha256'] not in (None, right.template_sha256)


def test_missing_template_and_swapped_end_token_show(gguf_file, tmp_path):
    info = gguf_info(
        changed(
            gguf_file,
            tmp_path / 'model.gguf',
            '--remove-metadata',
            'tokenizer.chat_template',
            '--special-token-by-id',
            'eos',
            '1',
        )
    )
    assert info.template is None and info.template_sha256 is None and '**none**' in info._repr_markdown_()
    assert info.eos == [1]


def test_bos_that_the_program_adds_shows(gguf_file, tmp_path):
    file = shutil.copy(gguf_file, tmp_path / 'model.gguf')
    subprocess.run(
        [sys.executable, '-m', 'gguf.scripts.gguf_set_metadata', '--force', file, 'tokenizer.ggml.add_bos_token', '1'],
        check=True,
        capture_output=True,
    )
    assert gguf_info(file).adds_bos
    assert llama_cpp_answers(file, dict(only_metadata, prompts=[], probes=[]))['adds_bos']


def test_damaged_files(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    for i, part in enumerate((b'', whole[:3], whole[:1000], whole[:-100_000], b'GGUX' + whole[4:1000])):
        (tmp_path / f'{i}.gguf').write_bytes(part)
        with pytest.raises(GgufError, match='cut or damaged'):
            gguf_info(tmp_path / f'{i}.gguf')
    with pytest.raises(GgufError, match='no file'):
        gguf_info(tmp_path / 'none.gguf')
    with pytest.raises(GgufError, match='cut or damaged'):
        llama_cpp_answers(tmp_path / '2.gguf', dict(only_metadata, prompts=[], probes=[]))


def test_file_that_llama_cpp_refuses(gguf_file, tmp_path):
    file = changed(gguf_file, tmp_path / 'model.gguf', '--remove-metadata', 'llama.block_count')
    with pytest.raises(GgufError, match='llama.cpp does not load model.gguf'):
        llama_cpp_answers(file, dict(only_metadata, prompts=[], probes=[]))


# --- what is refused before work begins


def test_refusals(converter, gguf_file, tmp_path):
    with pytest.raises(SpecError, match='q4_k_m'):
        check_gguf_kind('q4_km')
    with pytest.raises(FileExistsError):
        write_gguf(embedded_model(), gguf_file, 'q8_0')
    write_json(tmp_path / 'config.json', dict(quantization_config=dict(load_in_4bit=True)))
    with pytest.raises(GgufError, match='export merged_16bit first'):
        check_gguf_kind('q8_0', tmp_path)
    with pytest.raises(SpecError, match='xllamacpp'):
        llama_cpp_answers(gguf_file, dict(only_metadata, prompts=[], probes=[]), 'xlamacpp')


def test_missing_packages_are_named(converter, gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n in BINDINGS else find(n, *a))
    with pytest.raises(GgufError, match='pip install llama-cpp-python'):
        check_gguf_kind('q4_k_m')
    with pytest.raises(GgufError, match=r"pip install 'unsloth_nb\[gguf\]'"):
        llama_cpp_answers(gguf_file, dict(only_metadata, prompts=[], probes=[]))


@pytest.mark.slow
def test_architecture_that_the_converter_does_not_know(converter, tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns('*.safetensors'))
    write_json(folder / 'config.json', read_json(folder / 'config.json') | dict(architectures=['NoneSuchForCausalLM']))
    with pytest.raises(GgufError, match='NoneSuchForCausalLM is not supported'):
        write_gguf(folder, tmp_path / 'model.gguf', 'f16')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model']


# --- the converter comes only when asked for, and only as it is known


def test_converter_is_never_fetched_unasked(monkeypatch, tmp_path):
    monkeypatch.setenv('UNSLOTH_NB_CACHE_DIR', str(tmp_path / 'cache'))
    with pytest.raises(GgufError, match='unsloth-nb gguf install'):
        check_gguf_kind('f16')
    assert not (tmp_path / 'cache').exists()


def test_other_file_under_its_name_is_refused(converter, monkeypatch, tmp_path):
    monkeypatch.setenv('UNSLOTH_NB_CACHE_DIR', str(tmp_path))
    monkeypatch.setitem(sys.modules['unsloth_nb.export.gguf'].CONVERTER, 'sha256', '0' * 64)
    with pytest.raises(GgufError, match='(?s)could not be fetched.*(?i:hash)'):
        install_converter()
    assert not converter_folder().exists() and not list(tmp_path.iterdir())


def test_changed_converter_is_refused(converter, monkeypatch, tmp_path):
    monkeypatch.setenv('UNSLOTH_NB_CACHE_DIR', str(tmp_path))
    shutil.copytree(converter, converter_folder())
    find_converter()
    with open(converter_folder() / 'convert_hf_to_gguf.py', 'a') as f:
        f.write('\nprint()\n')
    with pytest.raises(GgufError, match='convert_hf_to_gguf.py has'):
        find_converter()


def test_environment_keeps_its_gguf(converter):
    import gguf

    assert str(converter) not in gguf.__file__ and str(converter) not in sys.path
