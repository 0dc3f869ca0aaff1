"Data that is right is read in full, whatever it is kept in; data that is not is refused with the row, the place and the mend."

import functools
import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
import pytest
from unsloth_nb.data.events import make_events
from unsloth_nb.data.load import DataError, held_out, load_data
from unsloth_nb.core.schema import SpecError, read_value
from unsloth_nb.core.spec import FinetuneJob

SHARED = Path(__file__).resolve().parents[2] / 'shared' / 'data'


def m(role, content, **kw):
    return dict(role=role, content=content, **kw)


def pairs(*rows, **kw):
    return [dict(prompt=f'{r}?', completion=f'{r}!', **kw) for r in rows]


def chat(i, *turns):
    return dict(messages=[m('user', f'q{i}'), m('assistant', f'a{i}'), *turns])


def call(args, name='f', **kw):
    return m('assistant', '', tool_calls=[dict(type='function', function=dict(name=name, arguments=args), **kw)])


OK = pairs(*range(4))
CHATS = [chat(i) for i in range(4)]
WEATHER = dict(
    type='function',
    function=dict(
        name='weather',
        description='Says the weather',
        parameters=dict(type='object', properties=dict(place=dict(type='string'))),
    ),
)

# Rows -------------------------------------------------------------------------------------------------------------------------------
FLAT = dict(
    alpaca=[dict(instruction=f'Add {i}', input=f'{i}' if i % 2 else '', output=f'é "{i}",\n\tß') for i in range(7)],
    prompt_completion=[dict(prompt=f'question {i}, 你好', completion=f"it's {i}\nand more") for i in range(7)],
    text=[dict(text=f'text {i}, 日本語; "quoted"') for i in range(7)],
    preference=[dict(prompt=f'question {i}', chosen=f'good {i}', rejected=f'bad {i}') for i in range(7)],
    unpaired_preference=[dict(prompt=f'question {i}', completion=f'answer {i}', label=i % 3 > 0) for i in range(7)],
)
NESTED = dict(
    messages=[
        dict(
            messages=[
                m('system', 'short'),
                m('user', f'q {i} 🙂'),
                m('assistant', 'a'),
                m('user', 'why?'),
                m('assistant', f'b {i}'),
            ][i % 2 :]
        )
        for i in range(7)
    ],
    sharegpt=[
        dict(
            conversations=[{'from': 'human', 'value': f'q {i}'}, {'from': 'gpt', 'value': f'a {i}'}],
            system='short',
            tools=json.dumps([WEATHER['function']]),
        )
        for i in range(7)
    ],
    preference=[
        dict(
            messages=[m('user', f'q {i}')], chosen=[m('assistant', f'good {i}')], rejected=[m('assistant', f'bad {i}')]
        )
        for i in range(7)
    ],
    unpaired_preference=[chat(i) | dict(label=bool(i % 2)) for i in range(7)],
    prompt_completion=[dict(prompt=[m('user', f'q {i}')], completion=[m('assistant', f'a {i}')]) for i in range(7)],
)


# Files and objects that hold rows -----------------------------------------------------------------------------------------------------
def lines(rows):
    return '\n'.join(map(json.dumps, rows)).encode()


def table(rows):
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def hf(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def packed_zst(b, f):
    "Bytes as a file of zstd frames"
    import pyarrow as pa

    with pa.output_stream(str(f), compression='zstd') as h:
        h.write(b)


def separated(rows, f, sep):
    import csv

    with f.open('w', newline='') as h:
        w = csv.DictWriter(h, list(rows[0]), delimiter=sep)
        w.writeheader()
        w.writerows(rows)


def arrow(rows, f, new):
    import pyarrow as pa

    with pa.OSFile(str(f), 'wb') as h, getattr(pa.ipc, new)(h, table(rows).schema) as w:
        w.write_table(table(rows), max_chunksize=3)


def parquet(rows, f):
    import pyarrow.parquet as pq

    pq.write_table(table(rows), f, row_group_size=3)


def folder(rows, d, names):
    d.mkdir()
    for k, n in enumerate(names):
        (d / n).write_bytes(lines(rows[k * 3 :] if k == len(names) - 1 else rows[k * 3 : k * 3 + 3]))


def with_test(rows, d):
    "A folder whose test file must stay out"
    folder(rows, d, ['train-0.jsonl', 'train-1.jsonl'])
    (d / 'test.jsonl').write_bytes(lines(pairs('other')))
    (d / 'README.md').write_text('not rows')


def dataset_dict(rows, d):
    import datasets

    datasets.DatasetDict(train=hf(rows), test=hf(pairs('other'))).save_to_disk(str(d))


FILES = {
    'rows.json': lambda r, f: f.write_text(json.dumps(r)),
    'pretty.json': lambda r, f: f.write_text(json.dumps(r, indent=100, ensure_ascii=False), encoding='utf-8'),
    'lines.json': lambda r, f: f.write_bytes(lines(r)),
    'bom.json': lambda r, f: f.write_text(json.dumps(r, ensure_ascii=False), encoding='utf-8-sig'),
    'rows.json.gz': lambda r, f: f.write_bytes(gzip.compress(json.dumps(r).encode())),
    'rows.jsonl': lambda r, f: f.write_bytes(lines(r)),
    'windows.ndjson': lambda r, f: f.write_bytes(b'\xef\xbb\xbf' + lines(r).replace(b'\n', b'\r\n\r\n')),
    'rows.jsonl.gz': lambda r, f: f.write_bytes(gzip.compress(lines(r[:3]) + b'\n') + gzip.compress(lines(r[3:]))),
    'rows.jsonl.zst': lambda r, f: packed_zst(lines(r), f),
    'rows.json.zst': lambda r, f: packed_zst(json.dumps(r).encode(), f),
    'rows.parquet': parquet,
    'stream.arrow': lambda r, f: arrow(r, f, 'new_stream'),
    'file.arrow': lambda r, f: arrow(r, f, 'new_file'),
    'several': lambda r, f: folder(r, f, ['a.jsonl', 'b.jsonl']),
    'split': with_test,
    'saved': lambda r, f: hf(r).save_to_disk(str(f), num_shards=2),
    'saved_dict': dataset_dict,
}
FLAT_FILES = {'rows.csv': lambda r, f: separated(r, f, ','), 'rows.tsv': lambda r, f: separated(r, f, '\t')}
OBJECTS = dict(list=list, tuple=tuple, dataset=hf, table=table, frame=lambda r: __import__('pandas').DataFrame(r))


def whole(**kw):
    return FinetuneJob(test_size=1, **kw)


def read(dataset, **kw):
    return load_data(whole(dataset=str(dataset), **kw), split=False)


@pytest.mark.parametrize(
    'source,kind,format',
    [
        (s, k, f)
        for k, fs in dict(flat=FLAT, nested=NESTED).items()
        for f in fs
        for s in [*FILES, *(FLAT_FILES if k == 'flat' else []), *OBJECTS]
    ],
)
def test_source(tmp_path, source, kind, format):
    "The same rows are the same conversations, whatever holds them"
    rows = dict(flat=FLAT, nested=NESTED)[kind][format]
    want = load_data(whole(), rows, split=False)
    assert (want.format, len(want.train), want.ledger.came) == (format, 7, 7) and [c.row for c in want.train] == list(
        range(7)
    )
    if source in OBJECTS:
        got = load_data(whole(), OBJECTS[source](rows), split=False)
    else:
        (FILES | FLAT_FILES)[source](rows, tmp_path / source)
        got = read(tmp_path / source)
    assert (got.format, got.fingerprint, got.ledger) == (want.format, want.fingerprint, want.ledger)
    assert [c.to_dict() for c in got.train] == [c.to_dict() for c in want.train]


def test_text_file(tmp_path):
    "A paragraph of a text file is a row; blank lines are none"
    (tmp_path / 'rows.txt').write_text('\n\n'.join(r['text'] for r in FLAT['text']) + '\n')
    got = read(tmp_path / 'rows.txt')
    want = load_data(whole(), FLAT['text'], split=False)
    assert (got.format, got.fingerprint) == ('text', want.fingerprint)


def test_folder_says_what_it_leaves_out(tmp_path):
    with_test(OK, tmp_path / 'd')
    assert read(tmp_path / 'd').reason == 'it has prompt and completion; left out of the folder: test.jsonl'
    assert [c.messages[0]['content'] for c in read(tmp_path / 'd', dataset_split='test').train] == ['other?']


def test_zst_frames(tmp_path):
    "Every frame of a zst file is read"
    f = tmp_path / 'rows.jsonl.zst'
    for half in (OK[:2], OK[2:]):
        packed_zst(lines(half) + b'\n', tmp_path / 'part')
        f.write_bytes((f.read_bytes() if f.exists() else b'') + (tmp_path / 'part').read_bytes())
    assert len(read(f).train) == 4


def test_frame_from_parquet(tmp_path):
    "pandas reads lists as numpy arrays"
    import pandas as pd

    parquet(NESTED['messages'], tmp_path / 'rows.parquet')
    got = load_data(whole(), pd.read_parquet(tmp_path / 'rows.parquet'), split=False)
    want = load_data(whole(), NESTED['messages'], split=False)
    assert got.fingerprint == want.fingerprint


@pytest.mark.parametrize('source', ['rows.parquet', 'stream.arrow', 'saved'])
def test_calls_of_different_shape(tmp_path, source):
    "Arrow fills up structs with nulls; what the row did not say is not trained"

    def tool(**props):
        return [
            dict(
                type='function',
                function=dict(
                    name='f', parameters=dict(type='object', properties={k: dict(type=v) for k, v in props.items()})
                ),
            )
        ]

    rows = [
        dict(
            messages=[m('user', f'{k}?'), call({k: v}), m('tool', 'done'), m('assistant', 'yes')],
            tools=tool(**{k: 'string'}),
        )
        for k, v in dict(place='Rome', city='Oslo', town='Bath').items()
    ]
    FILES[source](rows, tmp_path / source)
    got = read(tmp_path / source)
    assert [c.messages[1]['tool_calls'][0]['function']['arguments'] for c in got.train] == [
        dict(place='Rome'),
        dict(city='Oslo'),
        dict(town='Bath'),
    ]
    assert got.fingerprint == load_data(whole(), rows, split=False).fingerprint


def test_order_of_keys():
    "Tools and arguments reach the template in the order in which they were written"
    tools = [
        dict(
            type='function',
            function=dict(
                name='f',
                description='d',
                parameters=dict(
                    type='object', properties=dict(z=dict(type='string'), a=dict(type='string')), required=['z']
                ),
            ),
        )
    ]
    conv = load_data(
        whole(), [dict(messages=[m('user', 'q'), call(dict(z='1', a='2'))], tools=tools)], split=False
    ).train[0]
    assert json.dumps(conv.tools) == json.dumps(tools)
    assert list(conv.messages[1]['tool_calls'][0]['function']['arguments']) == ['z', 'a']


# Formats in their variants --------------------------------------------------------------------------------------------------------------
def one(row, **kw):
    return load_data(whole(**kw), [row], split=False).train[0]


@pytest.mark.parametrize(
    'row,want',
    [
        (
            dict(instruction='Add', input='1 2', output='3', system='short', history=[['a', 'b']]),
            [m('system', 'short'), m('user', 'a'), m('assistant', 'b'), m('user', 'Add\n\n1 2'), m('assistant', '3')],
        ),
        (dict(conversations=[m('user', 'a'), m('assistant', 'b')]), [m('user', 'a'), m('assistant', 'b')]),
        (
            dict(
                conversations=[
                    {'from': 'system', 'value': 's'},
                    {'from': 'human', 'value': 'a'},
                    {'from': 'function_call', 'value': '{"name": "f", "arguments": {"x": 1}}'},
                    {'from': 'observation', 'value': 'r'},
                    {'from': 'gpt', 'value': 'b'},
                ]
            ),
            [m('system', 's'), m('user', 'a'), call(dict(x=1)), m('tool', 'r'), m('assistant', 'b')],
        ),
        (
            dict(
                messages=[
                    m('developer', 's'),
                    m('user', 'a'),
                    m(
                        'assistant',
                        None,
                        tool_calls=[dict(id='c1', type='function', function=dict(name='f', arguments='{"x": 1}'))],
                    ),
                    m('tool', 'r', tool_call_id='c1', name='f'),
                    m('assistant', 'b', reasoning_content='why'),
                ]
            ),
            [
                m('system', 's'),
                m('user', 'a'),
                call(dict(x=1), id='c1'),
                m('tool', 'r', tool_call_id='c1', name='f'),
                m('assistant', 'b', reasoning_content='why'),
            ],
        ),
        (
            dict(
                messages=[
                    m('user', [dict(type='text', text='a'), dict(type='text', text='b')]),
                    m('assistant', [dict(type='reasoning', value='why'), dict(type='text', value='c')]),
                ]
            ),
            [m('user', 'a\nb'), m('assistant', 'c', reasoning_content='why')],
        ),
        (
            dict(
                messages=[m('user', 'a'), m('assistant', 'b', weight=0), m('user', 'c'), m('assistant', 'd', weight=1)]
            ),
            [m('user', 'a'), m('assistant', 'b', weight=0), m('user', 'c'), m('assistant', 'd', weight=1)],
        ),
        (dict(prompt='a', completion='b', system='s'), [m('system', 's'), m('user', 'a'), m('assistant', 'b')]),
        (
            dict(messages=[m('user', 'a'), m('assistant', 'b')], system='s'),
            [m('system', 's'), m('user', 'a'), m('assistant', 'b')],
        ),
        (
            dict(messages=[m('system', 's'), m('user', 'a'), m('assistant', 'b')], system='s'),
            [m('system', 's'), m('user', 'a'), m('assistant', 'b')],
        ),
    ],
)
def test_standard_form(row, want):
    "Every style of a conversation becomes the same standard messages, and no column is left over"
    got = load_data(whole(), [row], split=False)
    assert got.train[0].messages == want and got.unused == []


@pytest.mark.parametrize(
    'row,start,good,bad',
    [
        (dict(prompt='a', chosen='b', rejected='c'), [m('user', 'a')], [m('assistant', 'b')], [m('assistant', 'c')]),
        (
            dict(chosen=[m('user', 'a'), m('assistant', 'b')], rejected=[m('user', 'a'), m('assistant', 'c')]),
            [m('user', 'a')],
            [m('assistant', 'b')],
            [m('assistant', 'c')],
        ),
        (
            dict(
                prompt=[m('user', 'a')],
                chosen=[m('user', 'a'), m('assistant', 'b')],
                rejected=[m('user', 'a'), m('assistant', 'c')],
            ),
            [m('user', 'a')],
            [m('assistant', 'b')],
            [m('assistant', 'c')],
        ),
        (
            dict(
                conversations=[{'from': 'human', 'value': 'a'}],
                chosen={'from': 'gpt', 'value': 'b'},
                rejected={'from': 'gpt', 'value': 'c'},
                system='s',
            ),
            [m('system', 's'), m('user', 'a')],
            [m('assistant', 'b')],
            [m('assistant', 'c')],
        ),
        (
            dict(instruction='a', input='x', chosen='b', rejected='c'),
            [m('user', 'a\n\nx')],
            [m('assistant', 'b')],
            [m('assistant', 'c')],
        ),
    ],
)
def test_preference_form(row, start, good, bad):
    "Both answers of a pair, with the question once; or the better one alone"
    assert (one(row).messages, one(row).rejected) == (start + good, bad)
    assert (one(row, train_on_preferred=True).messages, one(row, train_on_preferred=True).rejected) == (
        start + good,
        None,
    )


@pytest.mark.parametrize(
    'columns,rows,standard',
    [
        (
            dict(prompt='question', completion='answer'),
            [dict(question=r['prompt'], answer=r['completion']) for r in FLAT['prompt_completion']],
            FLAT['prompt_completion'],
        ),
        (
            dict(prompt='completion', completion='prompt'),
            [dict(completion=r['prompt'], prompt=r['completion']) for r in FLAT['prompt_completion']],
            FLAT['prompt_completion'],
        ),
        (dict(messages='dialog'), [dict(dialog=r['messages']) for r in NESTED['messages']], NESTED['messages']),
        (
            dict(instruction='task', output='result', input='data'),
            [dict(task=r['instruction'], data=r['input'], result=r['output']) for r in FLAT['alpaca']],
            FLAT['alpaca'],
        ),
        (dict(text='body'), [dict(body=r['text'], title='t') for r in FLAT['text']], FLAT['text']),
        (
            dict(label='good'),
            [
                dict(prompt=r['prompt'], completion=r['completion'], good=r['label'])
                for r in FLAT['unpaired_preference']
            ],
            FLAT['unpaired_preference'],
        ),
    ],
)
def test_columns(columns, rows, standard):
    "Columns by other names give the same conversations"
    got = load_data(whole(dataset_columns=columns), rows, split=False)
    want = load_data(whole(), standard, split=False)
    assert (got.format, got.fingerprint) == (want.format, want.fingerprint)
    assert got.unused == (['title'] if 'title' in rows[0] else [])


def test_roles():
    rows = [dict(messages=[m('customer', 'q'), m('agent', 'a')])]
    assert load_data(whole(dataset_roles=dict(customer='user', agent='assistant')), rows, split=False).train[
        0
    ].messages == [m('user', 'q'), m('assistant', 'a')]


@pytest.mark.parametrize(
    'cols', [('question', 'answer'), ('Query', 'Response'), ('dialogue',), ('instruction', 'response'), ('article',)]
)
def test_mend_of_columns(cols):
    "The mapping that an error proposes makes the data load"
    rows = [{c: chat(i)['messages'] if c == 'dialogue' else f'{c} {i}' for c in cols} for i in range(3)]
    with pytest.raises(DataError) as e:
        load_data(whole(), rows)
    said = re.search(r'say dataset_columns=(\S+)\. Known', str(e.value))[1]
    assert (
        len(load_data(whole(dataset_columns=read_value(FinetuneJob, 'dataset_columns', said)), rows, split=False).train)
        == 3
    )


# Mixes ------------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def mix(tmp_path):
    "A function that writes a mix beside files a, b and c with 100 rows each, and loads it"
    (tmp_path / 'parts').mkdir()
    for k in 'abc':
        (tmp_path / f'parts/{k}.jsonl').write_bytes(lines([dict(prompt=f'{k}{i}', completion=k) for i in range(100)]))

    def f(text, split=False, **kw):
        (tmp_path / 'parts/mix.yaml').write_text(text)
        return load_data(FinetuneJob(dataset=str(tmp_path / 'parts/mix.yaml'), **dict(test_size=4) | kw), split=split)

    return f


def shares(convs):
    return dict(Counter(c.messages[-1]['content'] for c in convs))


WEIGHTED = '- {dataset: a.jsonl, weight: 3}\n- {dataset: b.jsonl, weight: 1}\n'


@pytest.mark.parametrize(
    'text,kw,want',
    [
        ('- dataset: a.jsonl\n- dataset: b.jsonl\n- dataset: c.jsonl\n', {}, dict(a=100, b=100, c=100)),
        (WEIGHTED, {}, dict(a=100, b=33)),
        (
            '- {dataset: a.jsonl, weight: 0.5}\n- {dataset: b.jsonl, weight: 0.5}\n- {dataset: c.jsonl, weight: 1}\n',
            {},
            dict(a=50, b=50, c=100),
        ),
        (WEIGHTED, dict(max_rows=36), dict(a=30, b=10)),
    ],
)
def test_mix(mix, text, kw, want):
    "As many rows as the shares allow, none of them twice, the others counted"
    d = mix(text, split='max_rows' in kw, **kw)
    rows = [*d.train, *d.test]
    assert shares(rows) == want and len({c.messages[0]['content'] for c in rows}) == len(rows)
    assert (
        d.ledger.came == 100 * text.count('dataset')
        and d.ledger.kept_total == sum(want.values())
        and d.ledger.left_out['not_in_mix'] == d.ledger.came - len(rows)
    )


def test_mix_repeats(mix):
    "The same seed takes the same rows, another seed others"
    assert mix(WEIGHTED).fingerprint == mix(WEIGHTED).fingerprint != mix(WEIGHTED, seed=1).fingerprint


def test_mix_beside_test_dataset(mix, tmp_path):
    "The shares hold for what is trained, also where held-out rows come from elsewhere"
    d = mix(
        '- {dataset: a.jsonl, weight: 1}\n- {dataset: b.jsonl, weight: 1}\n',
        split=True,
        max_rows=20,
        test_size=50,
        test_dataset=str(tmp_path / 'parts/c.jsonl'),
    )
    assert shares(d.train) == dict(a=10, b=10) and shares(d.test) == dict(c=50)
    assert d.ledger.came == 300 and d.ledger.left_out['not_in_mix'] == 180 and d.ledger.left_out['not_used'] == 50


def test_mix_of_formats(mix, tmp_path):
    "Each source is read in its own way"
    separated([dict(q=f'd{i}', a='d') for i in range(10)], tmp_path / 'parts/d.csv', ',')
    (tmp_path / 'parts/e.json').write_text(
        json.dumps([dict(messages=[m('customer', f'e{i}'), m('assistant', 'e')]) for i in range(5)])
    )
    d = mix(
        '- {dataset: a.jsonl}\n- dataset: d.csv\n  dataset_columns: {prompt: q, completion: a}\n- dataset: e.json\n  dataset_roles: {customer: user}\n'
    )
    assert shares(d.train) == dict(a=100, d=10, e=5) and d.format == 'prompt_completion+messages'
    assert len(set(d.reason.split('; '))) == 3


def test_mix_without_copies(mix, tmp_path):
    "Copies are gone before the shares are taken"
    (tmp_path / 'parts/a.jsonl').write_bytes(lines([dict(prompt=f'a{i // 2}', completion='a') for i in range(100)]))
    d = mix('- {dataset: a.jsonl, weight: 1}\n- {dataset: b.jsonl, weight: 1}\n', duplicates='drop')
    assert shares(d.train) == dict(a=50, b=50) and books(d) == dict(train=100, held_out=0, duplicates=50, not_in_mix=50)


def test_built_in_rows_in_a_mix(mix):
    "Without weights all rows are taken, and under max_rows each source gives its share"
    d = mix('- dataset: a.jsonl\n- dataset: events\n', max_rows=300)
    assert (
        d.ledger.came == 400
        and len(d.train) == 300
        and shares(d.train)['a'] == 75
        and d.ledger.left_out['not_in_mix'] == 100
    )


@pytest.mark.parametrize(
    'text,message',
    [
        (
            '- dataset: a.jsonl\n  wieght: 2\n',
            "dataset: the mix mix.yaml, entry 1: unknown name 'wieght'; did you mean 'weight'?",
        ),
        (
            '- dataset: a.jsonl\n- {dataset: b.jsonl, seed: 2}\n',
            "dataset: the mix mix.yaml, entry 2: unknown name 'seed'; known: dataset, dataset_columns, dataset_format, dataset_revision, dataset_roles, dataset_split, dataset_turns, text_rows, weight",
        ),
        (
            '- {dataset: a.jsonl, weight: 1}\n- dataset: b.jsonl\n',
            'dataset: the mix mix.yaml gives a weight to some entries only; give one to all, or to none',
        ),
        (
            '- {dataset: a.jsonl, weight: 0}\n',
            'dataset: the mix mix.yaml, entry 1: weight is 0; expected a number above 0',
        ),
        (
            '- {dataset: a.jsonl, weight: true}\n',
            'dataset: the mix mix.yaml, entry 1: weight is True; expected a number above 0',
        ),
        (
            '- {dataset: a.jsonl, weight: much}\n',
            "dataset: the mix mix.yaml, entry 1: weight is 'much'; expected a number above 0",
        ),
        (
            'dataset: a.jsonl\n',
            "dataset: the mix mix.yaml must be a list of entries with a dataset, as in '- dataset: rows.jsonl'",
        ),
        ('[]', "dataset: the mix mix.yaml must be a list of entries with a dataset, as in '- dataset: rows.jsonl'"),
        ('- {dataset: a.jsonl', 'dataset: the mix mix.yaml is not YAML: …'),
        ('- dataset: A.jsonl\n', "dataset: 'A.jsonl' is not 'events', a file, a folder or a Hub id (owner/name)…"),
        (
            '- dataset: a.jsonl\n- dataset: mix.yaml\n',
            'dataset: mix.yaml is a mix, which can stand neither in another mix nor as test_dataset; name its sources',
        ),
        (
            '- dataset: a.jsonl\n- dataset: text.jsonl\n',
            'dataset: the mix holds prompt_completion and text, which cannot be trained together; take one kind of data',
        ),
    ],
)
def test_broken_mix(mix, tmp_path, text, message):
    (tmp_path / 'parts/text.jsonl').write_bytes(lines(FLAT['text']))
    assert_said(lambda: mix(text), message, tmp_path / 'parts')


# Data that cannot be used -------------------------------------------------------------------------------------------------------------------
def assert_said(f, message, base, error=DataError):
    "The error of `f`, paths below `base` written as relative ones; … stands for any text"
    with pytest.raises(error) as e:
        f()
    said = str(e.value).replace(f'{base}/', '') if base else str(e.value)
    assert re.fullmatch('(?s:.*)'.join(map(re.escape, message.split('…'))), said), said


def put(tmp_path, content, name):
    f = tmp_path / name
    if callable(content):
        content(f)
    elif isinstance(content, (str, bytes)):
        f.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        f.write_bytes(json.dumps(content).encode() if name.endswith('.json') else lines(content))
    return f


def case(id, content, message, name='rows.jsonl', **kw):
    return pytest.param(
        content,
        message
        if message.startswith(('dataset', 'test_size', 'max_dropped', 'overlap', 'duplicates'))
        else f'dataset: {name}, {message}',
        name,
        kw,
        id=id,
    )


def after(base, **row):
    return [*base, row]


def turns(*ts):
    return [*CHATS, dict(messages=list(ts))]


def shared_gpt(*ts):
    return [
        dict(conversations=[{'from': 'human', 'value': f'{i}'}, {'from': 'gpt', 'value': 'a'}]) for i in range(4)
    ] + [dict(conversations=[{'from': f, 'value': v} for f, v in ts])]


def mixed_folder(f):
    f.mkdir()
    (f / 'a.csv').write_text('text\na\n')
    (f / 'b.jsonl').write_text('{"text": "a"}\n')


def only(name):
    return lambda f: (f.mkdir(), (f / name).write_text('x'))


Q = m('user', 'q')
A = m('assistant', 'a')
ALPACA = [dict(instruction=f'{i}', output='o') for i in range(4)]
PREFER = [dict(prompt=f'{i}', chosen='good', rejected='bad') for i in range(4)]
LABELLED = [dict(prompt=f'{i}', completion='a', label=True) for i in range(4)]
KNOWN = 'messages: a list of turns with role and content; sharegpt: a list of turns with from and value; alpaca: an instruction, an optional input and the answer; prompt_completion: a prompt and its completion; gemini: a list of turns with role and parts; xlam: a question, functions, and the calls that answer it; segments: pieces of text, each with a label that says whether it is trained; text: plain text for continued pretraining; preference: two answers, of which the first is better; unpaired_preference: messages or prompt and completion, and whether the answer is good'
KINDS = '.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather, .xlsx, .txt, .md, .markdown'
EMPTY = "is empty; fill it or remove the row, or say empty='drop'"


@pytest.mark.parametrize(
    'content,message,name,kw',
    [
        # Columns
        case(
            'null',
            after(OK, prompt='x', completion=None),
            "row 4: column 'completion' is missing or null; fill it or remove the row",
        ),
        case(
            'missing', after(OK, prompt='x'), "row 4: column 'completion' is missing or null; fill it or remove the row"
        ),
        case(
            'object', after(OK, prompt=dict(a=1), completion='y'), "row 4: column 'prompt' holds a dict, expected text"
        ),
        case(
            'several',
            [*OK[:2], *[dict(prompt=dict(a=1), completion='y')] * 7],
            "row 2: column 'prompt' holds a dict, expected text; and 6 more: rows 3, 4, 5, 6, …",
        ),
        case(
            'kinds of fault',
            [*OK, dict(prompt=dict(a=1), completion='y'), dict(prompt=' ', completion='y')],
            f"row 4: column 'prompt' holds a dict, expected text\ndataset: rows.jsonl, row 5: column 'prompt' {EMPTY}",
        ),
        case('blank answer', after(OK, prompt='x', completion='  '), f"row 4: column 'completion' {EMPTY}"),
        case('blank question', after(OK, prompt='', completion='x'), f"row 4: column 'prompt' {EMPTY}"),
        case(
            'surrogate',
            after(OK, prompt='x', completion='a\ud83d'),
            'row 4, turn 2: character 1 is U+D83D, half a surrogate pair, which is no text; write the data again as UTF-8',
        ),
        case(
            'control character',
            after(OK, prompt='a\x07', completion='x'),
            "row 4, turn 1: character 1 is U+0007, a control character; remove it, or say control_characters='remove'",
        ),
        case(
            'control character in text',
            [dict(text='a\x00')],
            "row 0: character 1 is U+0000, a control character; remove it, or say control_characters='remove'",
        ),
        case(
            'other names',
            [dict(question='a', answer='b')] * 3,
            f'dataset: rows.jsonl has columns answer, question, which fit no known format; say dataset_columns=prompt:question,completion:answer. Known are {KNOWN}',
        ),
        case(
            'no names',
            [dict(left='a', right='b')] * 3,
            f'dataset: rows.jsonl has columns left, right, which fit no known format; say which is which with dataset_columns=standard:yours, or rename the columns. Known are {KNOWN}',
        ),
        case(
            'two formats',
            [dict(text='a', messages=[])] * 3,
            "dataset: rows.jsonl has columns messages, text, which fit messages and text; say which: dataset_format='messages'",
        ),
        case(
            'label ignored',
            [dict(instruction='a', output='b', label=True)] * 3,
            "dataset: rows.jsonl has instruction and output, but also label, which supervised fine-tuning would ignore; if that is what you mean, say dataset_format='alpaca'",
        ),
        case(
            'half a pair',
            [dict(prompt='a', completion='b', chosen='c')] * 3,
            "dataset: rows.jsonl has prompt and completion, but also chosen, which supervised fine-tuning would ignore; if that is what you mean, say dataset_format='prompt_completion'",
        ),
        case(
            'no such column',
            OK,
            "dataset_columns: rows.jsonl has no column 'promt'; did you mean 'prompt'?",
            dataset_columns=dict(prompt='promt'),
        ),
        case(
            'column exists',
            pairs(1, 2, q='x'),
            "dataset_columns: rows.jsonl has a column 'prompt' already, besides 'q'; remove or rename one of them",
            dataset_columns=dict(prompt='q'),
        ),
        case(
            'no such role',
            OK,
            "dataset_roles: 'human' is no role; expected yours:standard, where the standard ones are system, user, assistant, tool",
            dataset_roles=dict(customer='human'),
        ),
        # Turns
        case(
            'unknown role',
            turns(Q, m('assistent', 'a')),
            "row 4: column 'messages', turn 2: unknown role 'assistent'; did you mean 'assistant'?…",
        ),
        case(
            'role no text',
            turns(Q, m(['assistant'], 'a')),
            "row 4: column 'messages', turn 2: unknown role ['assistant']; did you mean 'assistant'?…",
        ),
        case(
            'two answers',
            turns(Q, A, A),
            "row 4, turn 3: got an assistant turn, expected user; turns must alternate, starting with user, or say same_role='merge' to make one turn of them",
        ),
        case(
            'two questions',
            turns(Q, Q, A),
            "row 4, turn 2: got a user turn, expected assistant; turns must alternate, starting with user, or say same_role='merge' to make one turn of them",
        ),
        case(
            'answer first',
            turns(A, Q, A),
            "row 4, turn 1: got an assistant turn, expected user; turns must alternate, starting with user, or say answer_first='context' to keep it untrained, or 'cut' to leave it out",
        ),
        case(
            'no answer',
            turns(Q, A, Q),
            "row 4: ends without an answer; the last turn must be the assistant's, or say last_question='cut' to end the row with its last answer",
        ),
        case('question alone', turns(Q), "row 4: ends without an answer; the last turn must be the assistant's"),
        case(
            'system alone',
            turns(m('system', 's')),
            "row 4: ends without an answer; the last turn must be the assistant's",
        ),
        case(
            'system later',
            turns(Q, A, m('system', 's'), Q, A),
            "row 4, turn 3: got a system turn, expected user; turns must alternate, starting with user, or say late_system='to_user' to put it in front of the next question, or 'keep' to leave it there",
        ),
        case(
            'system twice',
            turns(m('system', 's'), m('system', 't'), Q, A),
            "row 4, turn 2: got a system turn, expected user; turns must alternate, starting with user, or say same_role='merge' to make one turn of them",
        ),
        case(
            'system beside turns',
            after(CHATS, messages=[m('system', 's'), Q, A], system='t'),
            "row 4: the column 'system' and the turns have different system messages; leave one of them out",
        ),
        case('no turns', turns(), "row 4: column 'messages' must be a list of turns, got list with none"),
        case(
            'turns as text', after(CHATS, messages='hello'), "row 4: column 'messages' must be a list of turns, got str"
        ),
        case('turns null', after(CHATS, messages=None), "row 4: column 'messages' must be a list of turns, got null"),
        case(
            'turn no dict',
            turns(Q, 'hello'),
            "row 4: column 'messages', turn 2: expected a dict with 'role' and 'content', got str",
        ),
        case(
            'turn without content',
            turns(dict(role='user')),
            "row 4: column 'messages', turn 1: expected a dict with 'role' and 'content', got ['role']",
        ),
        case(
            'wrong style',
            shared_gpt(('human', 'q'))[:4] + [dict(conversations=[{'who': 'human', 'text': 'q'}])],
            "row 4: column 'conversations', turn 1: expected a dict with 'role' and 'content', got ['text', 'who']; say dataset_turns=role:who",
        ),
        case(
            'content null',
            turns(Q, m('assistant', None)),
            "row 4: column 'messages', turn 2: 'content' holds a NoneType, expected text",
        ),
        case(
            'content object',
            turns(m('user', dict(a=1)), A),
            "row 4: column 'messages', turn 1: 'content' holds a dict, expected text",
        ),
        case('empty answer', turns(Q, m('assistant', '\n')), f'row 4, turn 2: the answer {EMPTY}'),
        case('empty question', turns(m('user', ''), A), f'row 4, turn 1: the question {EMPTY}'),
        case(
            'image',
            turns(m('user', [dict(type='image', image='x.png')]), A),
            "row 4: column 'messages', turn 1, part 1: expected a part of type text, reasoning or tool_call, got 'image'; only text can be trained here",
        ),
        case(
            'weight',
            turns(Q, dict(A, weight=2)),
            "row 4: column 'messages', turn 2: weight is 2; expected 0 (not trained) or 1",
        ),
        case(
            'reasoning no text',
            turns(Q, dict(A, reasoning_content=[1])),
            "row 4: column 'messages', turn 2: the reasoning holds a list, expected text",
        ),
        # Tools
        case(
            'result without call',
            turns(Q, m('tool', 'r'), A),
            'row 4, turn 2: got a tool turn, expected assistant; turns must alternate, starting with user',
        ),
        case(
            'call without result',
            turns(Q, call({}), A),
            'row 4, turn 3: got an assistant turn, expected tool; a tool call must be followed by what the tool answered',
        ),
        case(
            'call no JSON',
            shared_gpt(('human', 'q'), ('function_call', '{"name": "f", ')),
            "row 4: column 'conversations', turn 2 is not JSON: …line 1 column 15 (char 14)",
        ),
        case(
            'call without name',
            turns(Q, m('assistant', '', tool_calls=[dict(arguments={})])),
            "row 4: column 'messages', turn 2, tool_calls, call 1: a tool call needs a name and arguments, got {\"arguments\": {}}",
        ),
        case(
            'call is text',
            shared_gpt(('human', 'q'), ('function_call', '"f"')),
            "row 4: column 'conversations', turn 2, call 1 is not JSON: Expecting value…",
        ),
        case(
            'arguments a list',
            turns(Q, call([1])),
            "row 4: column 'messages', turn 2, tool_calls, call 1, arguments of f: expected an object, got a list",
        ),
        case(
            'arguments no JSON',
            turns(Q, call('{"x": ')),
            "row 4: column 'messages', turn 2, tool_calls, call 1, arguments of f is not JSON: …",
        ),
        case('tools no JSON', [*CHATS, chat(4) | dict(tools='[{')], "row 4: column 'tools' is not JSON: …"),
        case(
            'tools a dict',
            [*CHATS, chat(4) | dict(tools=WEATHER)],
            "row 4: column 'tools' must be a list of functions, or a JSON string of one, got dict",
        ),
        case(
            'tool without name',
            [*CHATS, chat(4) | dict(tools=[WEATHER, dict(description='d')])],
            "row 4: column 'tools', function 2: has no name",
        ),
        case(
            'surrogate in tools',
            [*CHATS, chat(4) | dict(tools=[dict(name='f', description='\udc00')])],
            'row 4, tools: character 0 is U+DC00, half a surrogate pair, which is no text; write the data again as UTF-8',
        ),
        case(
            'control character in tools',
            [*CHATS, chat(4) | dict(tools=[dict(name='f', description='\x07')])],
            "row 4, tools: character 0 is U+0007, a control character; remove it, or say control_characters='remove'",
        ),
        case(
            'surrogate in arguments',
            turns(Q, call({'\ud83d': 1})),
            'row 4, turn 2: character 0 is U+D83D, half a surrogate pair, which is no text; write the data again as UTF-8',
        ),
        # Preferences, Alpaca
        case(
            'equal answers',
            after(PREFER, prompt='x', chosen='a', rejected='a'),
            'row 4: chosen and rejected are the same; one of them must be another answer',
        ),
        case(
            'no question',
            [dict(chosen=[Q, A], rejected=[Q, m('assistant', 'b')]), dict(chosen='a', rejected='b')],
            "row 1: chosen and rejected do not begin with the same question; give it in a column 'prompt'",
        ),
        case(
            'worse answer empty',
            after(PREFER, prompt='x', chosen='a', rejected=''),
            f"row 4: column 'rejected' {EMPTY}",
        ),
        case(
            'label',
            after(LABELLED, prompt='x', completion='a', label='maybe'),
            "row 4: column 'label' holds 'maybe', expected true (good) or false (bad)",
        ),
        case(
            'label null',
            after(LABELLED, prompt='x', completion='a', label=None),
            "row 4: column 'label' holds None, expected true (good) or false (bad)",
        ),
        case(
            'label alone',
            after(LABELLED, label=True),
            'row 4: has neither messages, conversations nor a prompt; fill one of these columns or remove the row',
        ),
        case(
            'history',
            after(ALPACA, instruction='x', output='y', history=[['a', 'b'], ['c']]),
            "row 4: column 'history' must be a list of pairs, question and answer",
        ),
        case(
            'history number',
            after(ALPACA, instruction='x', output='y', history=5),
            "row 4: column 'history' must be a list of pairs, question and answer",
        ),
        case(
            'system object',
            after(ALPACA, instruction='x', output='y', system=dict(a=1)),
            "row 4: column 'system', part 1: expected a part of type text, reasoning or tool_call, got 'a'; only text can be trained here",
        ),
        # Files
        case('bad line', lines(OK) + b'\n{"prompt": "a"', 'row 4: line 5 is not JSON: Expecting…(column 15)'),
        case('bad first line', b'{"prompt"\n', 'row 0: line 1 is not JSON: …'),
        case('bad lines only', b'{\n[\n{\n', 'row 0: line 1 is not JSON: …; and 2 more: rows 1, 2'),
        case(
            'bad encoding',
            lines(OK) + b'\n{"prompt": "\xff", "completion": "b"}',
            'row 4: line 5 is not UTF-8 text (byte 12); save the file as UTF-8',
        ),
        case('number too long', lines(OK) + b'\n{"prompt": ' + b'1' * 5000 + b'}', 'row 4: line 5 is not JSON: …'),
        case('nested too deep', lines(OK) + b'\n{"prompt": ' + b'[' * 10**5, 'row 4: …'),
        case('rows no dicts', [1, 2, 3], 'row 0: expected columns, got a int; and 2 more: rows 1, 2'),
        case('one row no dict', [*OK, ['a', 'b']], 'row 4: expected columns, got a list'),
        case(
            'truncated gz',
            gzip.compress(lines(pairs(*range(999))))[:-900],
            'dataset: rows.jsonl.gz cannot be read as jsonl: Compressed file ended before the end-of-stream marker was reached',
            'rows.jsonl.gz',
        ),
        case(
            'no gz',
            lines(OK),
            'dataset: rows.jsonl.gz is no gzip data, whatever its suffix says; rename it to rows.jsonl',
            'rows.jsonl.gz',
        ),
        case(
            'truncated zst',
            lambda f: (packed_zst(b'one\ntwo\n' * 50000, f), f.write_bytes(f.read_bytes()[:-3])),
            'dataset: rows.txt.zst cannot be read as txt: Truncated…',
            'rows.txt.zst',
        ),
        case(
            'no zst', lines(OK), 'dataset: rows.jsonl.zst is no zstd data, …; rename it to rows.jsonl', 'rows.jsonl.zst'
        ),
        case(
            'a dict',
            '{"a": 1}',
            'dataset: rows.json must hold a JSON list of rows, got a dict; put the rows into a list at the top',
            'rows.json',
        ),
        case(
            'a value',
            '5',
            'dataset: rows.json must hold a JSON list of rows, got a single value; put the rows into a list at the top',
            'rows.json',
        ),
        case(
            'empty JSON',
            ' \n',
            'dataset: rows.json must hold a JSON list of rows, got a file that is empty; put the rows into a list at the top',
            'rows.json',
        ),
        case('truncated JSON', json.dumps(OK)[:-9], 'dataset: rows.json cannot be read as json: …', 'rows.json'),
        case(
            'JSON without end',
            json.dumps(OK)[:-1],
            "dataset: rows.json cannot be read as json: …Expecting ',' or ']'…",
            'rows.json',
        ),
        case(
            'JSON without comma',
            '[{"text": "a"} {"text": "b"}]',
            "dataset: rows.json cannot be read as json: …Expecting ',' or ']'…",
            'rows.json',
        ),
        case(
            'JSON row',
            lambda f: f.write_text(json.dumps(pairs(*range(60000))).replace('"prompt": "50000?"', 'prompt: "50000?"')),
            'dataset: rows.json cannot be read as json: …row 50000…Expecting property name…',
            'rows.json',
        ),
        case(
            'garbage behind',
            json.dumps(OK) + ' and more',
            'dataset: rows.json cannot be read as json: …Extra data…',
            'rows.json',
        ),
        case(
            'second list',
            json.dumps(OK) + json.dumps(pairs(5, 6)),
            'dataset: rows.json cannot be read as json: …Extra data…',
            'rows.json',
        ),
        case(
            'JSON encoding',
            b'[{"text": "\xff"}]',
            'dataset: rows.json is not UTF-8 text (byte 11); save it as UTF-8',
            'rows.json',
        ),
        case(
            'UTF-16',
            'text\na\n'.encode('utf-16'),
            "dataset: rows.csv is UTF-16, not UTF-8 text; save it as UTF-8 (in Excel: 'CSV UTF-8')",
            'rows.csv',
        ),
        case(
            'ragged CSV',
            'prompt,completion\na,b\na,b,c\n',
            'row 1: …has more or fewer cells than the header (3, not 2); quote a text that holds the separator',
            'rows.csv',
        ),
        case(
            'short CSV',
            'prompt,completion\na,b\na\n',
            'row 1: …has more or fewer cells than the header (1, not 2); …',
            'rows.csv',
        ),
        case(
            'open quote',
            'prompt,completion\na,"b\n',
            'dataset: rows.csv cannot be read as csv: unexpected end of data, row 0, line 2',
            'rows.csv',
        ),
        case(
            'column twice',
            'prompt,completion,completion\na,b,c\nd,e,f\n',
            "dataset: rows.csv has two columns 'completion'; rename one of them",
            'rows.csv',
        ),
        case('no Parquet', 'nonsense', 'dataset: rows.parquet cannot be read as parquet: …', 'rows.parquet'),
        case('no Arrow', 'nonsense', 'dataset: rows.arrow cannot be read as arrow: …', 'rows.arrow'),
        case(
            'broken Arrow',
            lambda f: (arrow(OK, f, 'new_stream'), f.write_bytes(f.read_bytes()[:-200])),
            'dataset: rows.arrow cannot be read as arrow: …',
            'rows.arrow',
        ),
        case('empty file', '', 'dataset: rows.jsonl holds no rows'),
        case('no rows', '[]', 'dataset: rows.json holds no rows', 'rows.json'),
        case('header alone', 'prompt,completion\n', 'dataset: rows.csv holds no rows', 'rows.csv'),
        case('blank text', '\n \n', 'dataset: rows.txt holds no rows', 'rows.txt'),
        case(
            'spreadsheet',
            'x',
            'dataset: rows.xls is a .xls file; write its rows to a .csv (as UTF-8), .jsonl or .parquet file',
            'rows.xls',
        ),
        case(
            'no suffix',
            'x',
            f'dataset: rows is a nameless file; expected one of {KINDS}, .zip, .tar, also with .gz, .bz2, .xz or .zst, or a mix (.yaml)',
            'rows',
        ),
        case(
            'mixed folder',
            mixed_folder,
            'dataset: folder rows holds files of several kinds (.csv, .jsonl); expected files of one kind',
            'rows',
        ),
        case(
            'empty folder',
            lambda f: f.mkdir(),
            f'dataset: folder rows holds no {KINDS} file; expected files of one kind',
            'rows',
        ),
        case(
            'folder of other files',
            only('README.md'),
            f'dataset: folder rows holds no {KINDS} file; expected files of one kind',
            'rows',
        ),
        case(
            'no such split',
            lambda f: dataset_dict(OK, f),
            "dataset: folder rows has no split 'validation'; set dataset_split to one of train, test",
            'rows',
            dataset_split='validation',
        ),
        case(
            'row of a file',
            lambda f: (
                folder(OK, f, ['a.jsonl', 'b.jsonl']),
                (f / 'b.jsonl').write_bytes(lines([OK[3], dict(prompt='x')])),
            ),
            "row 4: column 'completion' is missing or null; fill it or remove the row (b.jsonl, its row 1)",
            'rows',
        ),
        # Rows against each other
        case('too many held out', OK, 'test_size: 4 rows cannot be held out of 4; at most 3', test_size=4),
        case(
            'only duplicates',
            OK * 2,
            "test_size: 1 rows cannot be held out, for only 0 of 8 rows occur once; say duplicates='drop', or hold out fewer",
        ),
        case(
            'duplicates',
            [*OK, OK[1], OK[2]],
            "duplicates: 2 rows equal to an earlier one: 4, 5; say duplicates='drop' or 'keep'",
            duplicates='error',
        ),
        case(
            'too many dropped',
            [*OK[:2], dict(prompt='x'), dict(prompt='', completion='y')],
            f"max_dropped: 2 of 4 rows (50%) would be dropped, more than 10%; mend the data, or raise max_dropped\ndataset: rows.jsonl, row 2: column 'completion' is missing or null; fill it or remove the row\ndataset: rows.jsonl, row 3: column 'prompt' {EMPTY}",
            malformed='drop',
            empty='drop',
        ),
        case(
            'nothing left',
            [dict(prompt='x')] * 3,
            'dataset: no row of rows.jsonl is left to train on (malformed: 3)',
            dataset_format='prompt_completion',
            malformed='drop',
            max_dropped=1.0,
        ),
    ],
)
def test_malformed(tmp_path, content, message, name, kw):
    "The error says which row of what, where in it, and what would mend it"
    f = put(tmp_path, content, name)
    assert_said(lambda: load_data(FinetuneJob(**dict(dataset=str(f), test_size=1) | kw)), message, tmp_path)


def test_one_bad_row(tmp_path):
    "A file whose only row is bad says what is bad about it"
    assert_said(
        lambda: load_data(whole(dataset=str(put(tmp_path, '{', 'rows.jsonl')))),
        'dataset: rows.jsonl, row 0: line 1 is not JSON: …',
        tmp_path,
    )


def test_mistyped_path(tmp_path):
    put(tmp_path, OK, 'rows.jsonl')
    assert_said(
        lambda: read(tmp_path / 'rowz.jsonl'),
        "dataset: 'rowz.jsonl' is not 'events', a file, a folder or a Hub id (owner/name); did you mean 'rows.jsonl'?",
        tmp_path,
    )


def test_hub_without_network():
    assert_said(
        lambda: read('owner/name'),
        "dataset 'owner/name': the Hugging Face Hub cannot be reached (HF_HUB_OFFLINE is set); give a local folder or file instead, or use…",
        '',
        SpecError,
    )


@pytest.mark.parametrize(
    'rows,message',
    [
        (
            lambda: __import__('datasets').DatasetDict(train=hf(OK), test=hf(OK)),
            "dataset: got a DatasetDict with the splits train, test; give one of them, as in dataset['train']",
        ),
        (
            lambda: 'rows.jsonl',
            'dataset: rows are a str; expected a datasets.Dataset, a pandas DataFrame, an Arrow table or a list of dicts',
        ),
        (
            lambda: dict(prompt=['a'], completion=['b']),
            'dataset: rows are a dict; expected a datasets.Dataset, a pandas DataFrame, an Arrow table or a list of dicts',
        ),
        (lambda: [], 'dataset: a list in memory holds no rows'),
        (
            lambda: __import__('pandas').DataFrame(dict(prompt=['a', None], completion=['b', 'c'])),
            "dataset: a DataFrame in memory, row 1: column 'prompt' is missing or null; fill it or remove the row",
        ),
    ],
)
def test_wrong_objects(rows, message):
    assert_said(lambda: load_data(whole(), rows()), message, '')


# Policies -----------------------------------------------------------------------------------------------------------------------------------
def books(d):
    return (
        dict(d.ledger.kept)
        | {k: v for k, v in d.ledger.left_out.items() if v}
        | {k: v for k, v in d.ledger.noted.items() if v}
    )


FAULTY = [
    *pairs(*range(5)),
    dict(prompt='x', completion=' '),
    *pairs(5, 6),
    dict(prompt='bell\x07', completion='y'),
    dict(prompt=dict(z=1), completion='y'),
    dict(prompt='w', completion='\x1b[1m'),
]


@pytest.mark.parametrize('malformed', ['error', 'drop'])
@pytest.mark.parametrize('empty', ['error', 'drop', 'keep'])
@pytest.mark.parametrize('control', ['error', 'drop', 'remove', 'keep'])
def test_row_policies(malformed, empty, control):
    "Each fault is counted under its own name, and kept, mended, dropped or refused as the job says"

    def load():
        return load_data(
            whole(malformed=malformed, empty=empty, control_characters=control, max_dropped=1.0), FAULTY, split=False
        )

    refused = [
        w
        for p, w in (
            (empty, f"row 5: column 'completion' {EMPTY}"),
            (control, 'row 8, turn 1: character 4 is U+0007'),
            (malformed, "row 9: column 'prompt' holds a dict"),
        )
        if p == 'error'
    ]
    if refused:
        with pytest.raises(DataError) as e:
            load()
        at = [str(e.value).find(w) for w in refused]
        assert -1 not in at and at == sorted(at) and len(str(e.value).splitlines()) == len(refused), str(e.value)
        return
    d = load()
    assert (
        books(d)
        == {'train': 7 + (empty == 'keep') + 2 * (control in ('keep', 'remove')), 'held_out': 0, 'malformed': 1}
        | ({'empty': 1} if empty == 'drop' else {})
        | {
            'drop': {'control_characters': 2},
            'remove': {'control_characters_removed': 2},
            'keep': {'control_characters_kept': 2},
        }[control]
    )
    found = [c.messages[0]['content'] for c in d.train if c.row == 8]
    assert found == dict(drop=[], remove=['bell'], keep=['bell\x07'])[control]
    assert len(d.warnings) == 1 + (empty == 'drop') + (control == 'drop')


@pytest.mark.parametrize('row', [dict(prompt='x'), dict(prompt='x', completion=None)])
def test_null_is_not_empty(row):
    "An answer that is not there is no empty answer"
    assert_said(
        lambda: load_data(whole(empty='keep'), [*OK, row], split=False),
        "dataset: a list in memory, row 4: column 'completion' is missing or null; fill it or remove the row",
        '',
    )


@pytest.mark.parametrize('policy', ['error', 'drop', 'keep'])
def test_duplicates(policy):
    rows = [*OK, OK[1], *pairs(4, 5), OK[1], OK[0]]

    def load():
        return load_data(whole(duplicates=policy), rows, split=False)

    if policy == 'error':
        return assert_said(
            load, "duplicates: 3 rows equal to an earlier one: 4, 7, 8; say duplicates='drop' or 'keep'", ''
        )
    assert (
        books(load())
        == dict(drop=dict(train=6, held_out=0, duplicates=3), keep=dict(train=9, held_out=0, duplicates=3))[policy]
    )
    assert [c.row for c in load().train] == dict(drop=[0, 1, 2, 3, 5, 6], keep=list(range(9)))[policy]


@pytest.mark.parametrize('policy', ['error', 'drop', 'keep'])
def test_near_duplicates(policy):
    "A row that shares nearly all its words with an earlier one is found; rows of other words are not"

    def word(i, k):
        return f'w{(i * 7919 + k * 104729) % 99991}'

    rows = [dict(prompt=f'{i}', completion=' '.join(word(i, k) for k in range(200))) for i in range(20)]
    near = [dict(prompt=r['prompt'], completion=r['completion'] + ' indeed') for r in rows[3:6]]

    def load():
        return load_data(whole(duplicates=policy, near_duplicates=0.8), rows + near, split=False)

    if policy == 'error':
        return assert_said(
            load, "duplicates: 3 rows much like an earlier one: 20, 21, 22; say duplicates='drop' or 'keep'", ''
        )
    assert books(load()) == dict(train=20 if policy == 'drop' else 23, held_out=0, near_duplicates=3)
    assert [c.row for c in load().train][:20] == list(range(20))


@pytest.mark.parametrize('policy', ['error', 'drop', 'keep'])
def test_overlap(tmp_path, policy):
    "Rows that are trained and held out"
    test, rows = put(tmp_path, pairs(2, 3, 10, 11), 'test.jsonl'), put(tmp_path, pairs(*range(8)), 'rows.jsonl')

    def load():
        return load_data(FinetuneJob(dataset=str(rows), test_dataset=str(test), test_size=3, overlap=policy))

    if policy == 'error':
        return assert_said(
            load,
            "overlap: 2 rows to train on held out as well, so the comparison would flatter the model: 2, 3; say overlap='drop' to leave them out of training",
            '',
        )
    assert books(load()) == dict(
        train=6 if policy == 'drop' else 8, held_out=3, overlap=2, not_used=1, questions_held_out_as_well=2
    )
    assert load().ledger.came == 12 and [c.messages[0]['content'] for c in load().test] == ['2?', '3?', '10?']


def test_filter_and_limit():
    "Rows that a function leaves out, and rows beyond max_rows"
    d = load_data(
        FinetuneJob(test_size=2, max_rows=5), pairs(*range(20)), where=lambda c: int(c.messages[0]['content'][:-1]) % 2
    )
    assert books(d) == dict(train=5, held_out=2, filtered=10, not_used=3)


def test_preferred(tmp_path):
    "Preference data is refused until the job says which answers to train on"
    f = put(tmp_path, FLAT['unpaired_preference'], 'rows.jsonl')
    with pytest.raises(DataError) as e:
        read(f).check_supervised()
    assert (
        str(e.value)
        == f'dataset: {f} is preference data (it has prompt and completion, and a label), and supervised fine-tuning trains on one answer a row; say train_on_preferred=true to train on the good answers, or give dataset_format another value'
    )
    d = read(f, train_on_preferred=True)
    d.check_supervised()
    assert books(d) == dict(train=4, held_out=0, not_preferred=3) and all(c.label is None for c in d.train)


# The split ------------------------------------------------------------------------------------------------------------------------------------
def texts(convs):
    return [c.messages[0]['content'] for c in convs]


@pytest.mark.parametrize(
    'asked,train,test',
    [
        (dict(test_size=0.1), 90, 10),
        (dict(test_size=0.101), 89, 11),
        (dict(test_size=0.1, max_rows=45), 45, 10),
        (dict(test_size=0.2, test_dataset='rows.jsonl', overlap='drop'), 80, 20),
        (dict(test_size=0.05, dataset='events', max_rows=200), 200, 10),
    ],
)
def test_share_held_out(asked, train, test, tmp_path, monkeypatch):
    "A share of the rows that are there, whichever way they are held out; scored later, it is the same rows"
    monkeypatch.chdir(tmp_path)
    rows = (dict(prompt=f'Say {i}', completion=str(i)) for i in range(100))
    Path('rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    job = FinetuneJob(**dict(dataset='rows.jsonl') | asked)
    data = load_data(job)
    assert (len(data.train), len(data.test)) == (train, test)
    assert [c.messages for c in held_out(job)] == [c.messages for c in data.test]


def test_split():
    "The split repeats with its seed, takes each row once and keeps the order"
    a, b, c = (load_data(FinetuneJob(test_size=10, seed=s), pairs(*range(50))) for s in (1, 1, 2))
    assert texts(a.test) == texts(b.test) != texts(c.test) and a.fingerprint == b.fingerprint != c.fingerprint
    assert sorted(texts(a.train) + texts(a.test)) == sorted(r['prompt'] for r in pairs(*range(50)))
    assert [r.row for r in a.train] == sorted(r.row for r in a.train)


@pytest.mark.parametrize('seed', range(10))
def test_no_copy_of_a_held_out_row(seed):
    "A row that occurs twice is never held out, so nothing held out is trained"
    rows = pairs(*[i // 2 if i < 20 else i for i in range(40)])
    d = load_data(FinetuneJob(test_size=15, seed=seed), rows)
    assert not set(texts(d.train)) & set(texts(d.test)) and (len(d.train), len(d.test)) == (25, 15)
    assert books(d) == dict(train=25, held_out=15, duplicates=10)


# Shared files -----------------------------------------------------------------------------------------------------------------------------------
def shared(name, **kw):
    if not (SHARED / name).exists():
        pytest.skip(f'{name} is not here')
    return load_data(FinetuneJob(**dict(dataset=str(SHARED / name), test_size=4) | kw), split='test_size' in kw)


@pytest.mark.parametrize(
    'name,rows,format,kw',
    [
        ('alpaca_en_demo.json', 999, 'alpaca', {}),
        ('identity.json', 91, 'alpaca', {}),
        ('glaive_toolcall_en_demo.json', 300, 'sharegpt', {}),
        ('dpo_en_demo.json', 300, 'preference', dict(control_characters='remove')),  # One row has a form feed
        ('kto_en_demo.json', 300, 'unpaired_preference', {}),
        ('reason_tool_use_demo_50.jsonl', 50, 'messages', {}),
        ('wiki_demo.txt', 30, 'text', {}),
    ],
)
def test_shared(name, rows, format, kw):
    "Real files: what they are, and not a row lost"
    d = shared(name, test_size=20, **kw)
    assert (d.format, d.ledger.came, d.ledger.kept, d.unused) == (format, rows, dict(train=rows - 20, held_out=20), [])
    assert not any(d.ledger.left_out.values()) and d.supervised == (format not in ('preference', 'unpaired_preference'))


def test_shared_calls():
    "Every function_call became a tool call, every observation an answer of the tool"
    d = shared('glaive_toolcall_en_demo.json')
    raw = [
        t['from'] for r in json.loads((SHARED / 'glaive_toolcall_en_demo.json').read_text()) for t in r['conversations']
    ]
    msgs = [t for c in d.train for t in c.messages]
    assert sum(len(t.get('tool_calls', [])) for t in msgs) == raw.count('function_call') > 0
    assert sum(t['role'] == 'tool' for t in msgs) == raw.count('observation') > 0
    assert all(isinstance(c['function']['arguments'], dict) for t in msgs for c in t.get('tool_calls', []))
    assert sum(bool(c.tools) for c in d.train) > 100


def test_shared_reasoning():
    "Parts of type reasoning and tool_call are where templates look for them"
    d = shared('reason_tool_use_demo_50.jsonl')
    raw = [
        p['type']
        for l in (SHARED / 'reason_tool_use_demo_50.jsonl').read_text().splitlines()
        for t in json.loads(l)['messages']
        for p in t['content']
    ]
    msgs = [t for c in d.train for t in c.messages]
    assert sum(len(t.get('tool_calls', [])) for t in msgs) == raw.count('tool_call') > 0
    assert (
        0 < sum('reasoning_content' in t for t in msgs) <= raw.count('reasoning')
        and sum(bool(c.tools) for c in d.train) > 40
    )


@pytest.mark.parametrize('name,word', [('dpo_en_demo.json', 'chosen'), ('kto_en_demo.json', 'good')])
def test_shared_preferences(name, word):
    with pytest.raises(DataError, match=f'is preference data.*train_on_preferred=true to train on the {word} answers'):
        shared(name, control_characters='remove').check_supervised()
    d = shared(name, control_characters='remove', train_on_preferred=True)
    d.check_supervised()
    assert len(d.train) + d.ledger.left_out['not_preferred'] == 300 and all(
        c.rejected is None and c.label is None for c in d.train
    )


# Examples -----------------------------------------------------------------------------------------------------------------------------------------
@functools.cache
def tokenizer(template='auto'):
    from unsloth_nb.training.loading import load_tokenizer

    return load_tokenizer(FinetuneJob(template=template))


def formatter(convs=None, template='auto', **kw):
    "The formatter of a job, on the embedded tokenizer"
    from unsloth_nb.tokens.formatting import Formatter

    return Formatter.for_job(
        FinetuneJob(template=template, **kw), tokenizer(template), text=convs is not None and convs[0].text is not None
    )


def examples(convs, length=8192, over_length='error', max_dropped=1.0, **kw):
    from unsloth_nb.tokens.examples import make_examples

    return make_examples(convs, formatter(convs, **kw), length, over_length, max_dropped)


def every(ledger):
    return dict(ledger.kept) | {k: v for k, v in (ledger.left_out | ledger.noted).items() if v}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['alpaca_en_demo.json', 'identity.json'])
def test_shared_alpaca_examples(lib, name):
    convs = shared(name).train
    e = examples(convs, template='chat')
    assert len(e) == len(convs) == e.rows.kept_total and e.tokens.left_out == dict(cut=0, dropped=0)
    assert 0 < e.tokens.kept['trained'] < e.tokens.came == int(e.lengths.sum()) and all(e.trained() > 1)


def test_shared_calls_in_examples(lib):
    "One row is longer than 8192 tokens: refused by default, cut on request"
    convs = shared('glaive_toolcall_en_demo.json').train
    with pytest.raises(
        DataError,
        match=r"^row 243: 11\d\d\d tokens, 3\d\d\d more than max_seq_length=8192; raise max_seq_length, or say over_length='truncate', 'drop'",
    ):
        examples(convs, template='qwen-3')
    e = examples(convs, over_length='truncate', template='qwen-3')
    assert (
        e.rows.kept_total == 300 - e.rows.left_out['nothing_trained']
        and e.rows.left_out['too_long'] == 0
        and e.rows.left_out['nothing_trained'] <= 1
    )
    assert e.tokens.left_out['cut'] + e.tokens.left_out['dropped'] > 3000 and int(e.lengths.max()) <= 8192


def test_shared_reasoning_in_examples(lib):
    "A template that shows reasoning and calls takes every row; one that does not refuses them"
    convs = shared('reason_tool_use_demo_50.jsonl').train
    e = examples(convs, template='qwen-3')
    assert e.rows.kept_total == 50 and set(e._row) == set(range(50)) and not sum(e.tokens.left_out.values())
    with pytest.raises(
        DataError,
        match=r'^row 0: the chat template leaves out reasoning; use a template that knows it, or leave reasoning_content out of the data; and 49 more: rows 1, 2, 3, 4, …$',
    ):
        examples(convs)


def test_shared_text_in_examples(lib):
    "Long texts go on in the next example, and no token is lost"
    convs = shared('wiki_demo.txt').train
    e = examples(convs, 512, 'split')
    whole_ids = [
        i
        for c in convs
        for i in tokenizer()(c.text, add_special_tokens=False)['input_ids'] + [tokenizer().eos_token_id]
    ]
    assert e.flat()[0].tolist() == whole_ids and e.flat()[1].all()
    assert (e.tokens.came, e.tokens.kept, sum(e.tokens.left_out.values())) == (
        len(whole_ids),
        dict(trained=len(whole_ids), context=0),
        0,
    )
    assert e.rows.kept == dict(kept=30) and len(e) == sum(-(-n // 512) for n in examples(convs, 2**20).lengths)


@pytest.mark.parametrize('policy', ['error', 'drop', 'escape', 'keep'])
def test_special_tokens(lib, policy):
    "Text that spells a control token is refused, left out, read literally or kept, as the job says"
    rows = pairs(*range(10))
    rows[3]['prompt'] = 'what is <|im_end|>?'
    rows[7]['completion'] = 'it is <|im_start|>!'
    convs = load_data(whole(), rows, split=False).train

    def load():
        return examples(convs, special_tokens=policy)

    if policy == 'error':
        return assert_said(
            load,
            "row 3: the text holds '<|im_end|>', which the tokenizer reads as a control token; remove it, or say special_tokens='escape' to have it read as plain text; and 1 more: rows 7",
            '',
        )
    e = load()
    assert (
        every(e.rows) == dict(kept=8, special_tokens=2, examples=8) if policy == 'drop' else dict(kept=10, examples=10)
    )
    if policy == 'drop':
        return
    tok = tokenizer()
    ends = [sum(i in (tokenizer().eos_token_id, tokenizer().bos_token_id) for i in x.input_ids) for x in e]
    assert ends == [ends[0] + (policy == 'keep') * (k in (3, 7)) for k in range(10)]
    assert 'what is <|im_end|>?' in tok.decode(e[3].input_ids)


def test_several_special_tokens(lib):
    "Different control tokens in one row, in any order, are all read literally"
    texts = ['<|im_start|> <|im_end|> <|im_start|>', '<|im_end|><|im_start|><|endoftext|>󰀀']
    e = examples(
        load_data(whole(), [dict(prompt=t, completion=t) for t in texts], split=False).train, special_tokens='escape'
    )
    for x, t in zip(e, texts):
        assert (
            tokenizer().decode(x.input_ids).endswith(f'user\n{t}<|im_end|>\n<|im_start|>assistant\n{t}<|im_end|>\n')
            and sum(i < 17 for i in x.input_ids) == 6
        )


@pytest.mark.parametrize('policy', ['error', 'escape'])
def test_special_tokens_in_calls(lib, policy):
    "Arguments of a call and descriptions of tools are text as well"
    tools = [dict(type='function', function=dict(name='f', description='ends with <|im_end|>', parameters={}))]
    rows = [dict(messages=[Q, call(dict(x='<|im_end|>')), m('tool', 'r'), A]), dict(messages=[Q, A], tools=tools)]
    for row in rows:
        conv = one(row)
        if policy == 'error':
            with pytest.raises(
                DataError, match=r"^row 0: .*'<\|im_end\|>', which the tokenizer reads as a control token"
            ):
                formatter(template='qwen-3').example(conv)
            continue
        f = formatter(template='qwen-3', special_tokens=policy)

        def ends(c):
            return f.example(c).input_ids.count(f.tok.eos_token_id)

        assert ends(conv) == ends(one(json.loads(json.dumps(row).replace('<|im_end|>', 'x'))))


def test_over_length(lib):
    "Rows that are too long: refused, left out, cut or kept, down to the token"
    rows = pairs(*range(6))
    rows[2]['completion'] = 'word ' * 300
    rows[4]['completion'] = 'word ' * 100
    rows[5]['prompt'] = 'word ' * 300
    convs = load_data(whole(), rows, split=False).train
    full = examples(convs)
    limit = 100
    n = full.lengths.tolist()
    over = [k for k, x in enumerate(n) if x > limit]
    assert over == [2, 4, 5]
    assert_said(
        lambda: examples(convs, limit),
        f"row 2: {n[2]} tokens, {n[2] - limit} more than max_seq_length={limit}; raise max_seq_length, or say over_length='truncate', 'drop'; and 2 more: rows 4, 5",
        '',
    )
    assert_said(
        lambda: examples(convs, limit, 'split'),
        f"row 2: {n[2]} tokens, {n[2] - limit} more than max_seq_length={limit}; over_length='split' is for plain text, since an answer cannot go on in another example; use 'truncate' or 'drop'…",
        '',
    )
    drop, cut, keep = (examples(convs, limit, p) for p in ('drop', 'truncate', 'keep'))
    assert (
        every(drop.rows) == dict(kept=3, too_long=3, examples=3)
        and drop.tokens.left_out == dict(cut=0, dropped=n[2] + n[4] + n[5])
        and drop.tokens.came == sum(n)
    )
    assert (
        every(cut.rows) == dict(kept=5, nothing_trained=1, examples=5, examples_truncated=2)
        and cut.tokens.left_out == dict(cut=n[2] + n[4] - 2 * limit, dropped=n[5])
        and cut.tokens.came == sum(n)
    )
    assert every(keep.rows) == dict(kept=6, examples=6, examples_over_length=3) and keep.lengths.tolist() == n
    assert all(c.input_ids == f.input_ids[:limit] for c, f in zip(cut, full)) and cut.tokens.kept['trained'] == sum(
        map(sum, (x.mask for x in cut))
    )
    assert_said(
        lambda: examples(convs, limit, 'drop', 0.1),
        'max_dropped: 3 of 6 rows (50%) would be dropped, more than 10%; …',
        '',
    )
    assert_said(
        lambda: examples(convs, 8, 'drop'),
        'max_seq_length: none of 6 rows is left at 8 tokens; raise max_seq_length',
        '',
    )


def test_nothing_trained(lib):
    "A row whose answers all have weight 0 teaches nothing"
    convs = load_data(whole(), [*CHATS, dict(messages=[Q, dict(A, weight=0)])], split=False).train
    assert_said(
        lambda: examples(convs),
        "row 4: nothing in it is trained (loss_on='responses'); give it an answer with weight 1, or remove the row",
        '',
    )
    assert every(examples(convs, over_length='drop').rows) == dict(kept=4, nothing_trained=1, examples=4)


def test_older_function_calls():
    "OpenAI's older form of a call is a call, not a key that is left out"
    from unsloth_nb.data.conversations import to_conversation

    turns = [
        dict(role='user', content='2+3?'),
        dict(role='assistant', content='Let me add.', function_call=dict(name='add', arguments='{"a": 2}')),
        dict(role='function', name='add', content='5'),
        dict(role='assistant', content='5.'),
    ]
    conv = to_conversation(dict(messages=turns), 'messages')
    assert conv.messages[1]['tool_calls'][0]['function'] == dict(name='add', arguments=dict(a=2)) and [
        m['role'] for m in conv.messages
    ] == ['user', 'assistant', 'tool', 'assistant']


def test_columns_that_turn_up_later():
    "A column beyond the first thousand rows is listed as unused"
    rows = [dict(prompt=f'{i}?', completion=str(i)) for i in range(1100)] + [
        dict(prompt='x', completion='y', note='late')
    ]
    assert load_data(FinetuneJob(test_size=2), rows=rows).unused == ['note']


@pytest.mark.parametrize(
    'split, want',
    [
        ('train', 'c2c9a699231a57d70f2bd60d71e65dae102fd6f1064c53553bb0b32192887f9a'),
        ('test', '6bee982afdb0074cf8f64fa59a3c42603161d04d00901894c0ccbaad6f622535'),
    ],
)
def test_events_are_the_same_to_the_letter(split, want):
    "Golden traces and published numbers are of these rows"
    rows = json.dumps(make_events(2000, split=split), ensure_ascii=False)
    assert hashlib.sha256(rows.encode()).hexdigest() == want


@pytest.mark.parametrize('rows, want', [([dict(text=f'{i}') for i in range(4)], True), (CHATS, False)])
def test_is_text(rows, want):
    data = load_data(FinetuneJob(test_size=1), rows=rows)
    assert (data.is_text, data.test.is_text, data.train[0].is_text) == (want, want, want)
    assert not data.train[:0].is_text
