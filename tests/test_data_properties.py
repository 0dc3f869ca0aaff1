"Whatever the rows: the books add up, masks cover answers only, and the same rows give the same tokens."

import functools
import json
import re
from itertools import groupby
from unittest.mock import patch
import pytest
from hypothesis import example, given, settings, strategies as st
from unsloth_nb.data import file_formats, sources
from unsloth_nb.data.conversations import Conversation
from unsloth_nb.data.load import Conversations, DataError, Store, load_data
from unsloth_nb.core.spec import FinetuneJob


def some(n):
    return settings(deadline=None, database=None, max_examples=n)  # Nothing is written beside the tests


chars = st.characters(codec='utf-8')
words = st.text(chars, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda s: st.lists(s, max_size=3) | st.dictionaries(words, s, max_size=3),
    max_leaves=8,
)


# Reading JSON ---------------------------------------------------------------------------------------------------------------------------
class Slow:
    "A handle that gives at most a few characters at once"

    def __init__(self, h, n):
        self.h = h
        self.n = n

    def read(self, size):
        return self.h.read(min(size, self.n))

    def __enter__(self):
        return self

    def __exit__(self, *e):
        self.h.close()


def read_slowly(f, n):
    whole = file_formats.open_text
    with patch.object(file_formats, 'open_text', lambda f: Slow(whole(f), n)):
        rows = list(sources.read_file(f))
    for r in rows:
        if isinstance(r, DataError):
            raise r
    return rows


def load_list(text):
    "What json.loads gives of a list, a comma behind its last row left out; None for all else and for a key twice"

    def object_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    behind_a_row = re.sub(r'(?<=[^\[ \t\r\n])([ \t\r\n]*),([ \t\r\n]*\][ \t\r\n]*)$', r'\1\2', text)
    for t in (text, behind_a_row):
        try:
            v = json.loads(t, object_pairs_hook=object_of)
            return v if isinstance(v, list) else None
        except ValueError:
            pass


@st.composite
def documents(draw):
    "A JSON list as text in some layout, now and then with a character too many or too few"
    text = json.dumps(
        draw(st.lists(values, max_size=5)),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, None, 1, 70])),
    )
    if draw(st.booleans()):
        return text
    at = draw(st.integers(0, len(text)))
    return (
        text[:at]
        + draw(st.sampled_from(['', ',', ']', '[', '{', '}', '"', ' ', '0', '.', 'e', '\\', '\n', '\r\n']))
        + text[at + draw(st.integers(0, 1)) :]
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('documents')


@some(500)
@given(documents(), st.integers(1, 9) | st.just(2**20))
@example('[{"a": 1}' + ' ' * 200 + ',{"a": 2}]', 7)
@example('[1.5, 1e-7, -0.25]', 1)
@example('[{"a": 1}] [{"a": 2}]', 2**20)
@example('[{"a": 1},]', 2**20)
@example('[,]', 2**20)
@example('[ ,]', 1)
def test_reader_is_json_load(folder, text, n):
    "Read in blocks of any size, a list has the rows that json.loads gives; what it refuses is refused, but for a comma"
    f = folder / 'rows.json'
    f.write_bytes(text.encode())
    want = load_list(text)
    if want is not None:
        assert json.dumps(read_slowly(f, n)) == json.dumps(want)
    else:
        with pytest.raises(DataError):
            read_slowly(f, n)


# The store --------------------------------------------------------------------------------------------------------------------------------
objects = st.dictionaries(words, values, max_size=3)
turn = st.fixed_dictionaries(
    dict(role=st.sampled_from(['system', 'user', 'assistant', 'tool']), content=words),
    optional=dict(
        reasoning_content=words,
        weight=st.sampled_from([0, 1]),
        tool_call_id=words,
        tool_calls=st.lists(
            st.fixed_dictionaries(
                dict(type=st.just('function'), function=st.fixed_dictionaries(dict(name=words, arguments=objects)))
            ),
            max_size=2,
        ),
    ),
)
turns = st.lists(turn, min_size=1, max_size=4)
stored = st.builds(
    Conversation,
    turns,
    st.none(),
    objects,
    st.integers(0, 2**40),
    st.none() | st.lists(objects, max_size=2),
    st.none() | turns,
    st.none() | st.booleans(),
) | st.builds(Conversation, text=words, row=st.integers(0, 9))


@some(100)
@given(st.lists(stored, min_size=1, max_size=6), st.sampled_from([2**26, 100]))
def test_store_gives_back_what_it_took(convs, limit):
    "Also from disk, down to the order of keys"
    store = Store()
    store.spool = sources.Spool(limit)
    for c in convs:
        store.add(c)
    got = list(Conversations(store, range(len(convs))))
    assert got == convs and [json.dumps(vars(c)) for c in got] == [json.dumps(vars(c)) for c in convs]


# The ledger of rows -----------------------------------------------------------------------------------------------------------------------
FAULTS = dict(
    malformed=['error', 'drop'],
    empty=['error', 'drop', 'keep'],
    control_characters=['error', 'drop', 'remove', 'keep'],
    duplicates=['error', 'drop', 'keep'],
)
bad_rows = dict(
    malformed=[
        lambda t: dict(prompt=dict(a=t), completion='a'),
        lambda t: dict(prompt=t, completion=[]),
        lambda t: dict(prompt=t, completion='\ud800'),
        lambda t: t,
        lambda t: dict(prompt=[dict(role='usr', content=t)], completion='a'),
    ],
    empty=[lambda t: dict(prompt=t, completion=''), lambda t: dict(prompt=' \n', completion=t)],
    control_characters=[
        lambda t: dict(prompt=t + '\x00', completion='a'),
        lambda t: dict(prompt=t, completion='a\x1b'),
    ],
    filtered=[lambda t: dict(prompt=t, completion='leave me out')],
)


@st.composite
def faulty(draw):
    "Rows with faults at random places: (rows, what each of them is)"
    kinds = draw(st.lists(st.sampled_from(['good', 'good', *bad_rows, 'duplicates']), max_size=25)) + ['good'] * 6
    rows = []
    good = []
    for i, k in enumerate(kinds):
        if k == 'duplicates' and not good:
            kinds[i] = k = 'good'
        rows.append(
            draw(st.sampled_from(good))
            if k == 'duplicates'
            else dict(prompt=f'{i}', completion='a')
            if k == 'good'
            else draw(st.sampled_from(bad_rows[k]))(f'{i}')
        )
        if k == 'good':
            good += rows[-1:] if i < len(kinds) - 6 else []
    return rows, kinds


@some(150)
@given(
    faulty(),
    st.fixed_dictionaries({k: st.sampled_from(v) for k, v in FAULTS.items()}),
    st.integers(1, 5),
    st.none() | st.integers(1, 20),
    st.booleans(),
)
def test_books_of_rows(case, policies, test_size, max_rows, split):
    "What is left out is what was wrong, each under its name, and what remains is trained or held out"
    rows, kinds = case
    n = {k: kinds.count(k) for k in ('good', *FAULTS, 'filtered')}

    def load():
        return load_data(
            FinetuneJob(test_size=test_size, max_rows=max_rows, max_dropped=1.0, **policies),
            rows,
            where=lambda c: c.messages[-1]['content'] != 'leave me out',
            split=split,
        )

    if any(n[k] and p == 'error' for k, p in policies.items()):
        with pytest.raises(DataError):
            load()
        return
    d = load()
    left = {k: n[k] for k, p in policies.items() if p == 'drop'} | dict(filtered=n['filtered'])
    remain = len(rows) - sum(left.values()) - test_size * split
    left['not_used'] = max(0, remain - (max_rows or remain))
    assert d.ledger.came == len(rows) and d.ledger.kept == dict(train=len(d.train), held_out=len(d.test)) == dict(
        train=remain - left['not_used'], held_out=test_size * split
    )
    assert {k: v for k, v in d.ledger.left_out.items() if v} == {k: v for k, v in left.items() if v}
    used = [c.row for c in d.train] + [c.row for c in d.test]
    assert len(set(used)) == len(used) and all(
        kinds[r] == 'good' or policies.get(kinds[r]) in ('keep', 'remove') for r in used
    )


# Examples on the embedded tokenizer -----------------------------------------------------------------------------------------------------
@functools.cache
def formatter(loss_on='responses', special_tokens='error', text=False):
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.training.loading import load_tokenizer

    return Formatter(
        tokenizer() if loss_on != 'responses' or special_tokens != 'error' or text else load_tokenizer(FinetuneJob()),
        'raw' if text else 'chat',
        loss_on,
        text,
        special_tokens,
    )


def tokenizer():
    return formatter().tok


read = st.characters(
    codec='utf-8', exclude_categories=['Cn', 'Cc']
)  # Characters that the embedded tokenizer has tokens for
spelled = st.sampled_from(
    [
        '<|im_end|>',
        '<|im_start|>assistant\n',
        '<|endoftext|>',
        ' ',
        '\n',
        "'s",
        '  1234',
        '\u200d',
        '🏳️‍🌈',
        'e\u0301',
        '한글',
    ]
)
contents = st.lists(st.text(read, max_size=8) | spelled, min_size=1, max_size=4).map(''.join).filter(str.strip)


@st.composite
def chats(draw):
    "A conversation of several turns, perhaps with a system message and answers of weight 0"
    msgs = [dict(role='system', content=draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        msgs += [
            dict(role='user', content=draw(contents)),
            dict(role='assistant', content=draw(contents))
            | draw(st.sampled_from([{}, {}, dict(weight=0), dict(weight=1)])),
        ]
    return Conversation(msgs, row=draw(st.integers(0, 99)))


def runs(ex):
    "The text of each stretch of trained tokens"
    return [tokenizer().decode([i for _, i in g]) for m, g in groupby(zip(ex.mask, ex.input_ids), lambda p: p[0]) if m]


@some(300)
@given(st.lists(chats(), min_size=1, max_size=3), st.sampled_from(['responses', 'last_response']))
def test_masks(lib, convs, loss_on):
    "What is trained is each answer with its end token, and nothing that anybody else said; text never becomes a control token"
    tok = tokenizer()
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    for conv, got in zip(convs, formatter(loss_on, 'escape').examples(convs)):
        answers = [m for m in conv.messages if m['role'] == 'assistant']
        want = [
            m['content'] + tok.eos_token
            for m in (answers[-1:] if loss_on == 'last_response' else answers)
            if m.get('weight') != 0
        ]
        (ex,) = got
        assert runs(ex) == want and ex.row == conv.row
        assert tok.decode(ex.input_ids) == tok.apply_chat_template(conv.messages, tokenize=False)
        plain = tok.apply_chat_template([dict(m, content='x') for m in conv.messages], tokenize=True, return_dict=False)
        assert sum(i in special for i in ex.input_ids) == sum(i in special for i in plain)


@some(100)
@given(st.lists(chats(), min_size=2, max_size=6))
def test_same_rows_same_tokens(lib, convs):
    "Twice the same, and the same alone as in company"
    f = formatter(special_tokens='escape')

    def ids(got):
        return [[(x.input_ids, x.mask) for x in row] for row in got]

    together = ids(f.examples(convs))
    assert together == ids(f.examples(convs)) == [r for c in convs for r in ids(f.examples([c]))]


lengths = st.lists(
    st.tuples(st.sampled_from(['good', 'special', 'weightless']), st.integers(1, 40), st.integers(1, 40)),
    min_size=1,
    max_size=12,
)


@some(150)
@given(lengths, st.integers(40, 90), st.sampled_from(['drop', 'truncate', 'keep']))
def test_books_of_tokens(lib, rows, limit, policy):
    "Tokens that came are trained, context, cut or dropped; rows that are gone are those that were too long, untrained or with control tokens"
    from unsloth_nb.tokens.examples import make_examples

    special = {'special': ' <|im_end|>'}
    convs = [
        Conversation(
            [
                dict(role='user', content='word ' * q + special.get(kind, '')),
                dict(role='assistant', content='answer ' * a) | (dict(weight=0) if kind == 'weightless' else {}),
            ],
            row=i,
        )
        for i, (kind, q, a) in enumerate(rows)
    ]
    f = formatter(special_tokens='drop')
    full = [f.examples([c])[0][0] for c, (k, _, _) in zip(convs, rows) if k == 'good']
    fits = [x for x in full if policy == 'keep' or len(x) <= limit or (policy == 'truncate' and any(x.mask[:limit]))]
    kinds = [k for k, _, _ in rows]

    def load():
        return make_examples(convs, f, limit, policy)

    if not fits or (policy == 'keep' and 'weightless' in kinds):
        with pytest.raises(DataError):
            load()
        return
    e = load()
    kept = [x.input_ids if policy == 'keep' else x.input_ids[:limit] for x in fits]
    assert [x.input_ids for x in e] == kept and (e.rows.came, e.rows.kept) == (len(rows), dict(kept=len(fits)))
    lost = len(full) - len(fits)
    assert e.rows.left_out == dict(
        too_long=lost * (policy == 'drop'),
        nothing_trained=kinds.count('weightless') + lost * (policy == 'truncate'),
        special_tokens=kinds.count('special'),
    )
    assert e.tokens.came == sum(map(len, full)) and e.tokens.left_out == dict(
        cut=sum(map(len, fits)) - sum(map(len, kept)), dropped=sum(map(len, full)) - sum(map(len, fits))
    )
    assert e.tokens.kept == dict(
        trained=sum(sum(x.mask[: len(k)]) for x, k in zip(fits, kept)),
        context=sum(len(k) - sum(x.mask[: len(k)]) for x, k in zip(fits, kept)),
    )


@some(100)
@given(st.lists(st.text(read, min_size=1, max_size=200).filter(str.strip), min_size=1, max_size=5), st.integers(8, 40))
def test_split_text_is_whole(lib, texts, limit):
    "Plain text in pieces of any length is the same tokens"
    from unsloth_nb.tokens.examples import make_examples

    f = formatter(special_tokens='escape', text=True)
    convs = [Conversation(text=t, row=i) for i, t in enumerate(texts)]
    e = make_examples(convs, f, limit, 'split')
    full = make_examples(convs, f, 2**20)
    assert (
        e.flat()[0].tolist() == full.flat()[0].tolist()
        and int(e.lengths.max()) <= limit
        and sum(e.tokens.left_out.values()) == 0
    )
    assert [tokenizer().decode(x.input_ids) for x in full] == [t + tokenizer().eos_token for t in texts]
