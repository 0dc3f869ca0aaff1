"Data that is right is recognized; data that is not is refused with the place and the mend."
import json
from pathlib import Path
import pytest
from unsloth_nb.data import DataError,load_data
from unsloth_nb.spec import FinetuneJob

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'
OK = [dict(prompt=f'{i}?', completion=f'{i}!') for i in range(4)]
def turns(*roles, key='role', text='content'): return [{key:r, text:f'{r} {i}'} for i,r in enumerate(roles)]

def load(tmp_path, rows, name='rows.jsonl', **kw):
    "Rows through a file"
    f = tmp_path/name
    if isinstance(rows, (str, bytes)): f.write_bytes(rows.encode() if isinstance(rows, str) else rows)
    elif name.endswith('.json'): f.write_text(json.dumps(rows))
    else: f.write_text('\n'.join(map(json.dumps, rows)))
    return load_data(FinetuneJob(dataset=str(f), **dict(test_size=1) | kw))

@pytest.mark.parametrize('rows,format', [
    ([dict(instruction='Add', input=str(i), output='x') for i in range(4)], 'alpaca'),
    ([dict(messages=turns('system', 'user', 'assistant'))]*4, 'messages'),
    ([dict(conversations=turns('human', 'gpt', key='from', text='value'))]*4, 'sharegpt'),
    ([dict(conversations=turns('user', 'assistant'))]*4, 'sharegpt'),
    (OK, 'prompt_completion'),
    ([dict(prompt=turns('user'), completion=turns('assistant'))]*4, 'prompt_completion'),
    ([dict(text=f'text {i}') for i in range(4)], 'text'),
])
@pytest.mark.parametrize('name', ['rows.json', 'rows.jsonl'])
def test_formats(tmp_path, rows, format, name):
    "Each format is recognized, and its rows are kept in full"
    d = load(tmp_path, rows, name)
    assert (d.format, len(d.train), len(d.test)) == (format, 3, 1)
    assert all(c.text or c.messages[-1]['role'] == 'assistant' for c in d.train)

def test_tables_and_folders(tmp_path):
    "CSV, Parquet and a folder of files give the rows of a JSON file"
    import pyarrow as pa,pyarrow.parquet as pq
    load(tmp_path, OK)
    want = load_data(FinetuneJob(dataset=str(tmp_path/'rows.jsonl'), test_size=1)).fingerprint
    (tmp_path/'a.csv').write_text('prompt,completion\n'+'\n'.join(f'{r["prompt"]},{r["completion"]}' for r in OK))
    pq.write_table(pa.Table.from_pylist(OK), tmp_path/'a.parquet')
    (tmp_path/'many').mkdir()
    for i,half in enumerate((OK[:2], OK[2:])): (tmp_path/'many'/f'{i}.json').write_text(json.dumps(half))
    for s in ('a.csv', 'a.parquet', 'many'): assert load_data(FinetuneJob(dataset=str(tmp_path/s), test_size=1)).fingerprint == want

@pytest.mark.parametrize('rows,message', [
    ([dict(question='a', answer='b')]*3, 'columns answer, question, which fit no known format'),
    ([dict(text='a', messages=[])]*3, 'fit messages and text; say which'),
    ([dict(messages=turns('user', 'assistant'), label=True)]*3, "also label, which supervised fine-tuning would ignore"),
    ([*OK, dict(prompt='x')], "row 4: column 'completion' is missing or null"),
    ([*OK, dict(prompt='x', completion=None)], "row 4: column 'completion' is missing or null"),
    ([*OK, dict(prompt='x', completion=5)], "row 4: column 'completion' holds a int, expected text"),
    ([*OK, dict(prompt='x', completion='  ')], "row 4: column 'completion' is empty"),
    ([dict(messages=turns('user', 'assistent'))]*3, "row 0: column 'messages', turn 2: unknown role 'assistent'; did you mean 'assistant'?"),
    ([dict(messages=turns('user', 'user', 'assistant'))]*3, 'row 0, turn 2: got a user turn, expected assistant'),
    ([dict(messages=turns('user', 'assistant', 'user'))]*3, 'ends without an answer'),
    ([dict(messages=[])]*3, "column 'messages' must be a list of turns"),
    ([dict(messages='hello')]*3, "must be a list of turns, got str"),
    ([dict(messages=[dict(role='user')])]*3, "turn 1: expected a dict with 'role' and 'content'"),
    ([dict(messages=[dict(role='user', content='a'), dict(role='assistant', content=' ')])]*3, 'the answer is empty'),
    ([1, 2, 3], 'row 0: expected columns, got a int'),
    ([], 'holds no rows'),
    ('{"prompt": "a", "completion"\n', 'line 1 is not JSON'),
    (b'{"prompt": "\xff\xfe", "completion": "b"}\n', 'is not UTF-8 text (byte 12)'),
])
def test_malformed(tmp_path, rows, message):
    "The error names file, row and column, and what would mend it"
    with pytest.raises(DataError) as e: load(tmp_path, rows)
    assert message in str(e.value) and 'rows.jsonl' in str(e.value)

@pytest.mark.parametrize('name,text,message', [
    ('rows.json', '{"a": 1}', 'must hold a JSON list of rows, got a dict'),
    ('rows.json', '[{]', 'cannot be read as json'),
    ('rows.csv', 'prompt,completion\na,b,c\n', 'row 0: has more or fewer cells than the header'),
    ('rows.parquet', 'nonsense', 'cannot be read as parquet'),
    ('rows.xlsx', 'x', 'is a .xlsx file; expected one of'),
])
def test_broken_files(tmp_path, name, text, message):
    with pytest.raises(DataError) as e: load(tmp_path, text, name)
    assert message in str(e.value)

def test_split(tmp_path):
    "The split repeats with its seed, takes each row once, and refuses to hold out everything"
    a,b,c = (load(tmp_path, [dict(prompt=str(i), completion=str(i)) for i in range(50)], test_size=10, seed=s) for s in (1, 1, 2))
    rows = lambda cs: {x.row for x in cs}
    assert rows(a.test) == rows(b.test) != rows(c.test)
    assert rows(a.train) | rows(a.test) == set(range(50)) and not rows(a.train) & rows(a.test)
    with pytest.raises(DataError, match='at most 3'): load(tmp_path, OK, test_size=4)

@pytest.mark.parametrize('name,rows', [('alpaca_en_demo.json', 999), ('identity.json', 91)])
def test_shared(name, rows):
    "Real Alpaca files"
    if not (SHARED/name).exists(): pytest.skip(f'{name} is not here')
    d = load_data(FinetuneJob(dataset=str(SHARED/name), test_size=20))
    assert d.format == 'alpaca' and d.counts['rows'] == rows == len(d.train)+len(d.test)

@pytest.mark.parametrize('name', ['dpo_en_demo.json', 'kto_en_demo.json', 'glaive_toolcall_en_demo.json'])
def test_shared_refused(name):
    "Preference and tool data are not trained on as if they were plain conversations"
    if not (SHARED/name).exists(): pytest.skip(f'{name} is not here')
    with pytest.raises(DataError, match='would ignore'): load_data(FinetuneJob(dataset=str(SHARED/name)))
