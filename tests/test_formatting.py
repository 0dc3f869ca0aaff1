"Tokenizers and templates with the faults that are met in the wild: each is refused, noted, or worked around by construction."

import copy
import pytest

U = (lambda role: lambda text, **kw: dict(role=role, content=text, **kw))('user')


def A(text, **kw):
    return dict(role='assistant', content=text, **kw)


def S(text):
    return dict(role='system', content=text)


@pytest.fixture(scope='module')
def tok(lib):
    return lib.load_tokenizer(lib.FinetuneJob())


@pytest.fixture
def with_template(lib, tok):
    "A formatter with a template of one's own"

    def f(template, **kw):
        t = copy.deepcopy(tok)
        t.chat_template = template
        return lib.Formatter(t, **kw)

    return f


def conv(lib, *messages, **kw):
    return lib.Conversation(list(messages), row=3, **kw)


def trained(fmt, c):
    return [[t for t, on in ps if on] for ps in fmt.renderings(c)]


TURNS = "{% for m in messages %}{{ '<|im_start|>'+m.role+'\n'+m.content }}END{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_no_end_token(lib, tok):
    t = copy.deepcopy(tok)
    t.eos_token = None
    with pytest.raises(lib.FormatError, match='no end-of-sequence token, so the model could never learn to stop'):
        lib.Formatter(t)


def test_padding_is_the_end_token(lib, tok):
    "Noted, and the end of an answer stays trained"
    t = copy.deepcopy(tok)
    t.pad_token = t.eos_token
    exs = lib.make_examples([conv(lib, U('Hi'), A('Hello'))], lib.Formatter(t), 64)
    assert any('padding token is the end token' in w for w in exs.warnings)
    assert [i for i in exs[0].labels if i != -100][-1] == t.eos_token_id


def test_answers_without_an_end(lib, with_template):
    with pytest.raises(
        lib.FormatError, match='ends an answer without a special token, so the model would never learn to stop'
    ):
        with_template(
            '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
            '{% if add_generation_prompt %}assistant: {% endif %}'
        )


def test_end_on_the_last_reply_only(lib, with_template):
    "A template that ends only the last reply: each reply is an example of its own, and ends"
    fmt = with_template(TURNS.replace('END', "{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}\n"))
    c = conv(lib, U('a'), A('one'), U('b'), A('two'))
    assert trained(fmt, c) == [['one<|im_end|>'], ['two<|im_end|>']]
    exs = lib.make_examples([c], fmt, 64)
    assert len(exs) == 2 and exs.rows.noted['rows_in_several_examples'] == 1 and exs.rows.came == 1


def test_system_left_out(lib, with_template):
    fmt = with_template(
        TURNS.replace('END', '<|im_end|>\n').replace(
            '{% for m in messages %}', "{% for m in messages if m.role != 'system' %}"
        )
    )
    with pytest.raises(
        lib.FormatError, match='row 3: the chat template leaves out the system message; put it into the first question'
    ):
        fmt.example(conv(lib, S('Be brief.'), U('Hi'), A('Hello')))
    assert fmt.example(conv(lib, U('Hi'), A('Hello'))).trained == 2


def test_prompt_is_not_how_training_begins(lib, with_template):
    fmt = with_template(
        TURNS.replace('END', '<|im_end|>\n').replace(
            '<|im_start|>assistant\n{% endif %}', '<|im_start|>assistant\nWell: {% endif %}'
        )
    )
    with pytest.raises(
        lib.FormatError, match='row 3, turn 2: the prompt for generation is not how the training text begins'
    ):
        fmt.example(conv(lib, U('Hi'), A('Hello')))


def test_start_token_twice(lib, tok):
    t = copy.deepcopy(tok)
    t.bos_token = '<|endoftext|>'
    t.chat_template = '{{ bos_token }}{{ bos_token }}' + TURNS.replace('END', '<|im_end|>\n')
    with pytest.raises(lib.FormatError, match="row 3: begins with the start token '<|endoftext|>' twice"):
        lib.Formatter(t).example(conv(lib, U('Hi'), A('Hello')))


def test_nothing_trained(lib, tok):
    with pytest.raises(lib.FormatError, match='row 3: nothing in it is trained'):
        lib.make_examples([conv(lib, U('Hi'), A('Hello', weight=0))], lib.Formatter(tok), 64)


def test_weights(lib, tok):
    "A reply of weight 0 is context"
    c = conv(lib, U('a'), A('one', weight=0), U('b'), A('two', weight=1))
    assert trained(lib.Formatter(tok), c) == [['two<|im_end|>']]
    assert trained(lib.Formatter(tok, loss_on=['user', 'assistant']), c) == [
        ['a<|im_end|>', 'b<|im_end|>', 'two<|im_end|>']
    ]


def test_unknown_token(lib, tok):
    "Characters that the tokenizer has no token for are counted"
    t = copy.deepcopy(tok)
    t.unk_token = tok.convert_ids_to_tokens(tok(' the')['input_ids'][0])
    if t.unk_token_id in (t.bos_token_id, t.eos_token_id):
        pytest.fail('the stand-in is no ordinary token')
    exs = lib.make_examples(
        [conv(lib, U('Hi'), A('Hello')), conv(lib, U('Hi'), A('Feed the sloth'))],
        lib.Formatter(t, special_tokens='keep'),
        64,
    )
    assert exs.rows.noted.get('rows_with_unknown_tokens') == 1 and any('unknown token' in w for w in exs.warnings)


def test_template_by_name_in_a_job(lib):
    "A job's template reaches the tokenizer that is saved with the adapter, and leaves the given one alone"
    plain, named = (lib.load_tokenizer(lib.FinetuneJob(template=t)) for t in ('auto', 'zephyr'))
    assert (
        '<|user|>' in named.chat_template
        and '<|user|>' not in plain.chat_template
        and named.eos_token == plain.eos_token
    )


def test_end_token_inside_a_text(lib, tok):
    "A plain text may bring its own end token at its end, but not in the middle"
    fmt = lib.Formatter(tok, text=True)
    assert (
        fmt.example(lib.Conversation(text='One.<|im_end|>')).input_ids
        == fmt.example(lib.Conversation(text='One.')).input_ids
    )
    with pytest.raises(lib.FormatError, match="row 3: the text holds '<|im_end|>'".replace('|', r'\|')):
        fmt.example(lib.Conversation(text='One.<|im_end|>Two.', row=3))
