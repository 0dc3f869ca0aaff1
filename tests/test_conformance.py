"Every template of Unsloth, on the tokenizer of its family where there is one, trains exactly what it should; and a formatter that does not is found out."

import copy
import re
from dataclasses import replace
from functools import lru_cache
import pytest
import real_tokenizers as real
import template_oracle as oracle
from unsloth_nb.core import spec
from unsloth_nb.tokens import templates
from unsloth_nb.tokens.conformance import (
    ConformanceTable,
    cases,
    check_conformance,
    check_formatter,
    family_tokens,
    faults,
    template_names,
)
from unsloth_nb.data.conversations import Conversation
from unsloth_nb.tokens.formatting import Formatter
from unsloth_nb.tokens.templates import FormatError

CANONICAL = [t.names[0] for t in spec.chat_templates()]
NAMES = [n for n in spec.TEMPLATES if n not in ('auto', 'chat', 'alpaca', 'raw')]


@lru_cache(maxsize=1)  # A tokenizer may take 100 MB
def formatter(name):
    "A formatter on the template's own tokenizer"
    return Formatter(real.family_tokenizer(name)[0], name, special_tokens='escape')


@pytest.fixture(scope='module', params=CANONICAL)
def name(request):
    "A template; the tests of one stand together, so that its tokenizer is made once"
    return request.param


# What data hold besides the nine conversations
def _call(*cities, content='', **kw):
    return dict(
        role='assistant',
        content=content,
        tool_calls=[dict(type='function', function=dict(name='get_weather', arguments=dict(city=c))) for c in cities],
        **kw,
    )


def _turns(*texts):
    return [dict(role=r, content=t) for r, t in zip(('user', 'assistant') * 3, texts)]


_result = dict(role='tool', content='rain', name='get_weather')
_ask = _turns('Weather?')
_say = dict(role='assistant', content='It rains.')
_tools = cases()['tool_call'].tools
MORE = dict(
    blanks=Conversation(_turns('Hi  \n', '\n\n Four. \n', '\n more ', ' Six.\n\n')),
    empty_answer=Conversation(_turns('Hi', '')),
    brackets=Conversation(_turns('Hi', '<b>Four</b>', 'And?', '"Six"')),
    chain=Conversation(
        [*_ask, _call('Paris'), _result, _call('Rome'), _result, _say, *_ask, _call('Oslo'), _result, _say],
        tools=_tools,
    ),
    last_call=Conversation([*_ask, _call('Paris')], tools=_tools),
    several_calls=Conversation([*_ask, _call('Paris', 'Rome'), _result, _result, _say], tools=_tools),
    beside_call=Conversation([*_ask, _call('Paris', content='Let me look.'), _result, _say], tools=_tools),
    thoughtful_call=Conversation(
        [
            *_ask,
            _call('Paris', reasoning_content='Look it up.'),
            _result,
            dict(_say, reasoning_content='Rain, then.'),
            *_turns('So?', 'Stay.'),
        ],
        tools=_tools,
    ),
)
CALLS = {'chain', 'last_call', 'several_calls', 'beside_call', 'thoughtful_call'}

# What each template refuses. A template that begins to drop something in silence is caught, and so is a check that refuses too much.
REFUSED = dict.fromkeys(CANONICAL, {'tool_call', 'reasoning', *CALLS}) | {
    'llama-3.1': {'reasoning', 'several_calls', 'beside_call', 'thoughtful_call'},
    'gemma-4': {'reasoning', 'beside_call', 'thoughtful_call'},
    'qwen-2.5': {'reasoning', 'thoughtful_call'},
    'gpt-oss': {'several_calls', 'beside_call', 'thoughtful_call'},
    'qwen-3': set(),
    'qwen3-instruct': set(),
    'qwen3-thinking': set(),
    'gemma-4-thinking': {*cases(), *MORE},
}  # The prompt is not how the training text begins


@lru_cache
def verdict(name):
    "(what is wrong, what is refused) of a template with the nine conversations and the others"
    res = check_formatter(formatter(name), name)
    wrong = dict(res.wrong)
    refused = dict(res.refused)
    for n, c in MORE.items():
        try:
            bad = faults(formatter(name), c)
        except FormatError as e:
            refused[n] = str(e)
        else:
            wrong |= {n: bad} if bad else {}
    return wrong, refused


def test_names():
    "The names that a job may use are Unsloth's; the one that is also ours has another name"
    assert sorted(NAMES) == sorted(n for ns in template_names().values() for n in ns) and sorted(CANONICAL) == sorted(
        template_names()
    ) == sorted(oracle.ORACLE)
    assert len(NAMES) == len(set(NAMES)) and 'alpaca-turns' in NAMES and 'alpaca' not in NAMES


def test_trains_what_it_should(name):
    "Exactly the answers, to the token; what cannot be expressed is refused, and nothing else"
    wrong, refused = verdict(name)
    assert wrong == {}
    assert set(refused) == REFUSED[name]


def test_oracle(name):
    "The text and the trained parts are those that were written down by hand"
    fmt = formatter(name)
    o = oracle.ORACLE[name]
    assert fmt.prompt(oracle.TWO_TURNS[:1]) == oracle.expected(name, 'prompt')
    if 'multi_turn' in REFUSED[name]:
        return
    for part in ('two_turns', 'system'):
        drawn = fmt.renderings(Conversation(oracle.CONVERSATIONS[part]))
        assert ''.join(t for t, _ in drawn[-1]) == oracle.expected(name, part)
    trained = [[t for t, on in ps if on] for ps in fmt.renderings(Conversation(oracle.TWO_TURNS))]
    first, last = o[
        'answers'
    ]  # Where the last answer is drawn otherwise than the ones before it, each is drawn as the last one of its own example
    assert trained == ([[first, last]] if first.replace('4.', '6.') == last else [[last.replace('6.', '4.')], [last]])


FEW = NAMES[::4]  # The tests above take all that are not aliases, on tokenizers of their own


@pytest.mark.parametrize('any_name', [pytest.param(n, marks=[] if n in FEW else pytest.mark.long) for n in NAMES])
def test_every_name(any_name):
    "All names, the aliases included, on a tokenizer of bytes with the family's control tokens"
    canonical = next(c for c, ns in template_names().items() if any_name in ns)
    res = check_conformance(family_tokens(real.bytes_only(), any_name), any_name)
    assert res.wrong == {} and set(res.refused) == REFUSED[canonical] & set(cases())


@pytest.mark.parametrize(
    'tokenizer,template', [('mistral_v3', 'mistral'), ('mistral_tekken', 'mistral'), ('deepseek', 'vicuna')]
)
def test_other_tokenizers(tokenizer, template):
    "Real tokenizers of other families, with templates that take the tokenizer's own start and end tokens"
    res = check_conformance(real.REAL[tokenizer](), template)
    assert set(res.refused) == {'tool_call', 'reasoning'} and res.wrong == {}


def test_blank_line_before_answer():
    "A prompt that ends with two line breaks, on a tokenizer that cuts blanks as GPT-2 does: they are one token in the prompt and two in the example"
    assert check_conformance(family_tokens(real.embedded(), 'llama-3'), 'llama-3').wrong == {}


# A suite that cannot fail is worth nothing
def _doubled(e):
    return replace(e, input_ids=[e.tok.bos_token_id, *e.input_ids], mask=[False, *e.mask])


def _endless(e):
    "The end token is in the text, and not trained"
    return replace(e, mask=[m and (i + 1 < len(e) and e.mask[i + 1]) for i, m in enumerate(e.mask)])


def _cut_off(e):
    "The end token of the last answer, and what is behind it, is missing"
    n = len(e) - 1 - e.mask[::-1].index(True)
    return replace(e, input_ids=e.input_ids[:n], mask=e.mask[:n])


MUTANTS = dict(
    late=(lambda e: replace(e, mask=[False, *e.mask[:-1]]), 'trains'),
    early=(lambda e: replace(e, mask=[*e.mask[1:], False]), 'training does not begin where the prompt ends'),
    endless=(_endless, 'on which generation does not stop'),
    cut_off=(_cut_off, 'spell another text'),
    doubled=(_doubled, 'start token twice|<bos>.* as a control token'),
    everything=(lambda e: replace(e, mask=[True] * len(e)), 'trains text of the user'),
    nothing=(lambda e: replace(e, mask=[False] * len(e)), r'trains \[\]'),
    longer=(
        lambda e: replace(e, input_ids=[*e.input_ids, e.input_ids[-1]], mask=[*e.mask, False]),
        'spell another text',
    ),
)


def mutant(name, **methods):
    "The formatter of a template with other methods"
    fmt = copy.copy(formatter(name))
    fmt.__class__ = type('Mutant', (Formatter,), methods)
    return fmt


@pytest.mark.parametrize('kind', MUTANTS)
@pytest.mark.parametrize('template', ['gemma-3', 'gemma-4', 'starling'])
def test_mutants(template, kind):
    "A formatter that does one thing wrong is found out on every conversation"
    change, why = MUTANTS[kind]

    def examples(self, convs):
        return [r if isinstance(r, FormatError) else [change(e) for e in r] for r in Formatter.examples(self, convs)]

    res = check_formatter(mutant(template, examples=examples))
    assert set(res.wrong) == set(cases()) - REFUSED[template]
    assert all(re.search(why, w) for w in res.wrong.values())


def test_mutants_of_content(monkeypatch):
    "Control tokens that get through, texts that are left out in silence, and a prompt that differs are found out"
    sly = check_formatter(mutant('gemma-3', _literal=lambda self, conv: (conv, {}))).wrong
    assert (
        set(sly) == {'special_tokens'}
        and 'as a control token' in sly['special_tokens']
        and 'lets control tokens through' in sly['special_tokens']
    )
    blind = mutant('phi-3')
    blind.seen = dict.fromkeys(blind.seen, True)
    monkeypatch.setattr(templates, 'find_missing', lambda message, span: '')
    lost = check_formatter(blind)
    assert (
        lost.refused == {}
        and set(lost.wrong) == {'tool_call', 'reasoning'}
        and 'the text of the tools is not in it' in lost.wrong['tool_call']
    )
    other = check_formatter(mutant('phi-3', prompt_ids=lambda self, x: [*Formatter.prompt_ids(self, x), 0])).wrong
    assert set(other) == set(cases()) - REFUSED['phi-3'] and all('prompt' in w for w in other.values())
    forgetful = mutant('phi-3', stop_ids=lambda self: [0])
    assert set(check_formatter(forgetful).wrong) == set(cases()) - REFUSED['phi-3']


def test_table():
    "A row for each template, a note for each reason, and no cell that a text can break out of"
    good = check_formatter(formatter('phi-3'), 'phi-3')
    bad = check_formatter(mutant('phi-3', stop_ids=lambda self: [0]), 'a|b')
    lines = ConformanceTable([replace(good, aliases=('phi-35',)), bad])._repr_markdown_().splitlines()
    assert all(len(re.findall(r'(?<!\\)\|', l)) == len(cases()) + 2 for l in lines[:4])
    assert (
        lines[2].startswith('| phi-3 | ✓ |')
        and '–<sup>1</sup>' in lines[2]
        and lines[3].startswith('| a&#124;b | ✗<sup>')
    )
    *notes, blank, names = lines[5:]
    assert (blank, names) == ('', 'Other names: phi-3 is also phi-35.')
    assert [l.partition('.')[0] for l in notes] == [str(i + 1) for i in range(len(notes))] and not re.search(
        r'(?<!\\)<\|', '\n'.join(lines)
    )
