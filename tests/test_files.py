"Files as people have them: read right and said so, or refused with what is there and what to do about it."

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import types
import zipfile
import pytest
from unsloth_nb.core.schema import SpecError, read_params
from unsloth_nb.core.spec import FinetuneJob, PretrainJob, resolve_model
from unsloth_nb.data.files import file_kind
from unsloth_nb.data.load import load_data
from unsloth_nb.data.sources import READERS, find_source, rows_of
from unsloth_nb.lint.review import check_file
from unsloth_nb.lint.scanning import ScanError

ROWS = [dict(prompt=f'q{i}, then?', completion=f'a {i}') for i in range(5)]
LINES = ''.join(json.dumps(r) + '\n' for r in ROWS)


def load(path, **kw):
    return load_data(FinetuneJob(dataset=str(path), test_size=1, **kw), split=False)


def read(path, **kw):
    "Prompt and completion of each row, and what was said about how they were read"
    data = load(path, **kw)
    rows = [dict(prompt=c.messages[0]['content'], completion=c.messages[1]['content']) for c in data.train]
    return rows, data.warnings


def put(tmp_path, name, content):
    f = tmp_path / name
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_bytes(content.encode() if isinstance(content, str) else content)
    return f


def refused(f):
    with pytest.raises(SpecError) as e:
        f()
    return str(e.value)


# Texts --------------------------------------------------------------------------------------------------------------


BOOK = 'Chapter one.\n\nIt was a dark night.\nThe wind blew.\n\n\n  Then it stopped.\n'
LONG = 'A paragraph that nobody broke to a width. ' * 6
DOCS = '# Use\n\nRun it:\n\n```\na = 1\n\nb = 2\n```\n\nThat is all.\n'


@pytest.mark.parametrize(
    'name, text, text_rows, want, said',
    [
        (
            'book.txt',
            BOOK,
            'auto',
            ['Chapter one.', 'It was a dark night.\nThe wind blew.', '  Then it stopped.'],
            'a paragraph is a row, 3 out of 4 lines',
        ),
        ('book.txt', BOOK, 'file', [BOOK.strip('\n')], 'a file is a row, 1 out of '),
        ('book.txt', BOOK, 'line', [l for l in BOOK.split('\n') if l], 'a line is a row, 4 out of 4 lines'),
        ('windows.txt', BOOK.replace('\n', '\r\n'), 'file', [BOOK.strip('\n')], 'a file is a row'),
        ('poem.txt', 'one\ntwo\n', 'auto', ['one\ntwo'], 'a paragraph is a row, 1 out of 2 lines'),
        ('unbroken.txt', f'{LONG}\n{LONG}2\n', 'auto', [LONG, f'{LONG}2'], 'a line is a row, 2 out of 2 lines'),
        ('unbroken.txt', f'{LONG}\n\n{LONG}2\n', 'auto', [LONG, f'{LONG}2'], 'a paragraph is a row'),
        (
            'docs.md',
            DOCS,
            'auto',
            ['# Use\n\nRun it:', '```\na = 1\n\nb = 2\n```', 'That is all.'],
            'a paragraph is a row',
        ),
        ('docs.md', DOCS, 'file', [DOCS.strip()], 'a file is a row'),
    ],
)
def test_texts(tmp_path, name, text, text_rows, want, said):
    "What is a row of a text is the job's to say, and is said with the numbers"
    data = load(put(tmp_path, name, text), text_rows=text_rows)
    assert [c.text for c in data.train] == want
    assert f'text_rows: {said}' in data.reason


def test_folder_of_books(tmp_path):
    "A folder of texts, Markdown among them, with a file about them that is none"
    put(tmp_path, 'books/a.txt', BOOK)
    put(tmp_path, 'books/b.md', '# Two\n\nIt rained.\n')
    put(tmp_path, 'books/README.md', 'Books that are free.\n')
    put(tmp_path, 'books/LICENSE.txt', 'Free.\n')
    assert len(load(tmp_path / 'books').train) == 4
    whole = load_data(PretrainJob(dataset=str(tmp_path / 'books'), text_rows='file', test_size=1))
    assert whole.ledger.came == 2 and len(whole.train) == len(whole.test) == 1


def test_folders_of_texts(tmp_path):
    "Texts are read from the folders inside as well; other rows there are named as left out"
    put(tmp_path, 'docs/a.md', 'One.\n')
    put(tmp_path, 'docs/in/deep/b.txt', 'Two.\n')
    put(tmp_path, 'docs/.git/c.txt', 'no\n')
    assert [c.text for c in load(tmp_path / 'docs').train] == ['One.', 'Two.']
    put(tmp_path, 'rows/a.jsonl', LINES)
    put(tmp_path, 'rows/older/a.jsonl', LINES)
    assert load(tmp_path / 'rows').reason.endswith('left out of the folder: older/')


def test_too_few_paragraphs(tmp_path):
    "A list of lines without a blank one is a single paragraph: the error says what to do"
    f = put(tmp_path, 'lines.txt', 'one\ntwo\nthree\n')
    said = refused(lambda: load_data(PretrainJob(dataset=str(f), test_size=1)))
    assert said.endswith("where each line is a text of its own, say text_rows='line'")
    assert load_data(PretrainJob(dataset=str(f), test_size=1, text_rows='line')).ledger.came == 3


@pytest.mark.parametrize(
    'name, text, rename',
    [
        ('rows.jsonl.txt', LINES, 'rows.jsonl'),
        ('rows.txt', LINES, 'rows.jsonl'),
        ('rows.md', LINES, 'rows.jsonl'),
        ('rows.txt', json.dumps(ROWS), 'rows.json'),
        ('rows.json.txt', json.dumps(ROWS, indent=1), 'rows.json'),
        ('rows.csv.txt', 'prompt,completion\na,b\n', 'rows.csv'),
        ('rows.txt', 'prompt,completion\na,b\nc,d\n', 'rows.csv'),
        ('rows.jsonl.txt.gz', gzip.compress(LINES.encode()), 'rows.jsonl.gz'),
        ('rows.txt', "{'prompt': 'a', 'completion': 'b'}\n", 'rows.jsonl'),
        ('rows.txt', 'Prompt\tCompletion\na\tb\nc\td\n', 'rows.tsv'),
    ],
)
def test_rows_in_a_text_file(tmp_path, name, text, rename):
    "Rows that hide behind the suffix of text are not trained as text, unless a job says so"
    f = put(tmp_path, name, text)
    said = refused(lambda: load(f))
    assert f'rename it to {rename}, or say' in said
    assert len(load(f, text_rows='file').train) == 1


# What is not quite right --------------------------------------------------------------------------------------------


def pretty(sep=''):
    return sep.join(json.dumps(r, indent=2) + '\n' for r in ROWS)


def table(header, sep, row):
    return header + ''.join(row(r) for r in ROWS)


def quoted(r, sep=',', end='\r\n'):
    return f'"{r["prompt"]}"{sep}{r["completion"]}{end}'


@pytest.mark.parametrize(
    'name, text, said',
    [
        ('commas.jsonl', LINES.replace('}\n', '},\n'), 'a comma behind a row, left out (5 times)'),
        ('list.json', json.dumps(ROWS)[:-1] + ',]', 'a comma behind the last row, left out'),
        ('list.json', json.dumps(ROWS, indent=1)[:-1] + ' ,\n ] \n', 'a comma behind the last row, left out'),
        ('pretty.jsonl', pretty(), 'a row that is not on a line of its own (5 times)'),
        ('pretty.json', pretty(), 'a row that is not on a line of its own (5 times)'),
        ('pretty.json', pretty(','), 'a comma behind a row, left out (4 times)'),
        ('no_brackets.json', LINES.replace('}\n', '},\n'), 'a comma behind a row, left out (5 times)'),
        ('list.jsonl', json.dumps(ROWS), 'a JSON list in a file for JSON lines'),
        ('list.jsonl', '[\n' + LINES.replace('}\n', '},\n') + ']\n', 'a comma behind the last row'),
        ('old_mac.jsonl', LINES.replace('\n', '\r'), 'a row that is not on a line of its own (5 times)'),
        ('a.csv', table('prompt;completion\r\n', ';', lambda r: quoted(r, ';')), 'separated by a semicolon'),
        ('a.csv', table('prompt\tcompletion\n', '\t', lambda r: quoted(r, '\t', '\n')), 'separated by a tab'),
        ('a.csv', table('prompt|completion\n', '|', lambda r: quoted(r, '|', '\n')), 'separated by a bar'),
        ('a.tsv', table('prompt,completion\n', ',', quoted), 'separated by a comma'),
        ('a.csv', table('sep=;\r\nprompt;completion\r\n', ';', lambda r: quoted(r, ';')), '(sep=), followed'),
        ('a.csv', table(' prompt ,"completion "\n', ',', quoted), 'blanks around the name of a column, left out (2'),
        ('a.csv', table('prompt, completion\n', ',', lambda r: quoted(r, ', ')), 'blanks behind the separators'),
        ('a.csv', table('prompt,completion,,\n', ',', lambda r: quoted(r, end=',,\n')), 'without a name, left out (2'),
        ('a.csv', table('prompt,completion,\n', ',', quoted), 'a column without a name, left out'),
        ('a.csv', table('prompt,completion\n', ',', lambda r: quoted(r, end=',,\n')), 'left out (5 times)'),
        ('a.csv', table('prompt,completion\n', ',', quoted) + ',\n,\n', 'a row with nothing in it, left out (2 times)'),
        ('a.csv', table('prompt\u200b,\xa0completion\n', ',', quoted), 'blanks around the name of a column'),
        ('a.csv', table(',prompt,completion\n', ',', lambda r: '7,' + quoted(r)), 'a column without a name, left out'),
    ],
)
def test_read_and_said(tmp_path, name, text, said):
    "What can have one meaning only is read, and what was not as it should be is counted"
    rows, warnings = read(put(tmp_path, name, text))
    assert rows == ROWS
    assert any(said in w for w in warnings)


def test_well_formed_files_say_nothing(tmp_path):
    for name, text in {
        'a.jsonl': LINES,
        'a.json': json.dumps(ROWS),
        'b.json': LINES,
        'a.csv': table('prompt,completion\n', ',', quoted),
        'a.tsv': table('prompt\tcompletion\n', '\t', lambda r: quoted(r, '\t')),
    }.items():
        assert read(put(tmp_path, name, text)) == (ROWS, [])


def test_quotes_with_a_backslash(tmp_path):
    "As programs write them that know no CSV; other backslashes stay"
    f = put(tmp_path, 'a.csv', 'prompt,completion\n"say \\"yes\\", now","C:\\new \\\\ \\"x\\""\n"b",c\n')
    rows, warnings = read(f)
    assert rows == [dict(prompt='say "yes", now', completion='C:\\new \\ "x"'), dict(prompt='b', completion='c')]
    assert warnings == ['a.csv: quotes inside of quotes written with a backslash'.replace('a.csv', str(f))]
    rows, warnings = read(put(tmp_path, 'b.csv', 'prompt,completion\n"C:\\",c\n"say ""yes""",c\n'))
    assert rows == [dict(prompt='C:\\', completion='c'), dict(prompt='say "yes"', completion='c')] and not warnings


@pytest.mark.parametrize(
    'name, text, said',
    [
        ('a.jsonl', '{"prompt": "a", "completion": "b",}\n', 'line 1 is not JSON: a comma stands before the closing'),
        ('a.jsonl', "{'prompt': 'a'}\n", 'a text stands in single quotes (column 2)'),
        ('a.jsonl', '{"prompt": "a"} {"prompt": "b"}\n', 'a second object begins behind the first (column 17)'),
        ('a.jsonl', LINES + '\0' * 50, 'row 5: line 6 is not JSON: it is a run of zero bytes'),
        ('a.jsonl', LINES + '\ufeff' + LINES, 'row 5: line 6 is not JSON: a byte order mark'),
        ('a.jsonl', '# rows\n' + LINES, 'line 1 is not JSON: it is a comment'),
        ('a.jsonl', '["a"]\n["b"]\n', 'row 0: expected columns, got a list'),
        (
            'a.jsonl',
            '[{"role": "user"}]\n[{"role": "user"}]\n',
            'got a list of turns; give it a name, as in {"messages"',
        ),
        (
            'a.json',
            '{"error": "Repository not found"}',
            "holds an error that a site sent in place of the file: 'Repository",
        ),
        ('a.jsonl', 'Entry not found', "line 1 is not JSON: Expecting value (column 1), not 'Entry not found'"),
        ('a.json', '[{"prompt": "a"}, {"prompt": "b"', 'the file ends here, as one does that was cut off'),
        ('a.jsonl', pretty() + '{"prompt": x}\n', 'row 5, line 21'),
        ('a.json', '[\n{"prompt": "a"},\n{"prompt": b}]', 'row 1, line 3'),
        ('a.csv', 'prompt,completion,\na,b,and more\n', "row 0 has 'and more' in column 3, which has no name"),
        ('a.csv', 'prompt,completion\n"a,b\n', 'unexpected end of data, row 0'),
        ('a.csv', 'prompt, prompt\na,b\n', "has two columns 'prompt'"),
    ],
)
def test_refused_with_the_line(tmp_path, name, text, said):
    f = put(tmp_path, name, text)
    assert said in refused(lambda: load(f))


# Names that stand twice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, text, said',
    [
        ('a.jsonl', LINES + '{"prompt": "a", "prompt": "b", "completion": "c"}', "line 6 has the key 'prompt' twice"),
        ('a.jsonl', '{"messages": [{"role": "user", "role": "system"}]}', "line 1 has the key 'role' twice"),
        ('a.json', '[\n{"prompt": "a",\n"completion": "b", "prompt": "c"}\n]', "on line 2 has the key 'prompt' twice"),
        ('a.jsonl', pretty() + '{\n"a": 1,\n"a": 2}', "on line 21 has the key 'a' twice"),
        ('a.zip', '{"a": 1, "a": 2}', "line 1 has the key 'a' twice"),
    ],
)
def test_key_twice(tmp_path, name, text, said):
    f = put(tmp_path, name, text)
    if name == 'a.zip':
        with zipfile.ZipFile(f, 'w') as z:
            z.writestr('a.jsonl', text)
    assert said in refused(lambda: load(f))


def test_key_twice_is_a_bad_row(tmp_path):
    "Dropped where the job drops such rows; the rows behind it are read"
    for name, text in {
        'a.jsonl': '{"prompt": "a", "prompt": "b"}\n' + LINES,
        'a.json': '[{"prompt": "a", "prompt": "b"},' + json.dumps(ROWS)[1:],
    }.items():
        data = load(put(tmp_path, name, text), malformed='drop', max_dropped=0.5)
        assert (len(data.train), data.ledger.left_out['malformed']) == (5, 1)


@pytest.mark.parametrize(
    'dump', ['max_steps: 5\nseed: 1\nmax_steps: 50\n', '{"max_steps": 5, "seed": 1,\n "max_steps": 50}']
)
def test_parameter_twice(tmp_path, dump):
    "In a params file and in a mix; `check` says it too"
    f = put(tmp_path, 'p.yaml', dump)
    line = 3 if dump.startswith('max') else 2
    assert f'line {line} gives max_steps again, after line 1; keep one of the two' in refused(lambda: read_params(f))
    with pytest.raises(ScanError, match='gives max_steps again'):
        check_file(f)
    mix = put(tmp_path, 'mix.yaml', '- dataset: events\n  weight: 1\n  weight: 2\n')
    assert 'line 3 gives weight again, after line 2' in refused(lambda: load(mix))


def test_merged_names_are_not_twice(tmp_path):
    f = put(tmp_path, 'p.yaml', 'base: &b {r: 8}\nown: {<<: *b, r: 16}\n')
    assert read_params(f)['own'] == dict(r=16)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le'])
def test_encodings_of_a_params_file(tmp_path, encoding):
    "UTF-16 with its mark, as consoles of Windows write it, is read; without one it is refused"
    f = put(tmp_path, 'p.yaml', 'max_steps: 5\n'.encode(encoding))
    if encoding == 'utf-16-le':
        assert str(f) in refused(lambda: read_params(f)) and 'PosixPath' not in refused(lambda: read_params(f))
    else:
        assert read_params(f) == dict(max_steps=5)
        check_file(f)
    assert 'is not UTF-8 text (byte 6); save it as UTF-8' in refused(
        lambda: read_params(put(tmp_path, 'q.yaml', 'model: é\n'.encode('cp1252') + b'x' * 9))
    ).replace('byte 7', 'byte 6')


# Packed files and archives ------------------------------------------------------------------------------------------


def zipped(tmp_path, name, **members):
    f = tmp_path / name
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, content in members.items():
            z.writestr(n, content)
    return f


def tarred(tmp_path, name, **members):
    f = tmp_path / name
    mode = {'.tar': 'w', '.tgz': 'w:gz', '.gz': 'w:gz', '.bz2': 'w:bz2', '.xz': 'w:xz'}[f.suffix]
    with tarfile.open(f, mode) as t:
        for n, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(n)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return f


def parquet_bytes():
    import pyarrow as pa
    import pyarrow.parquet as pq

    h = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), h)
    return h.getvalue()


def feather(f):
    import pyarrow as pa
    import pyarrow.feather

    pa.feather.write_feather(pa.Table.from_pylist(ROWS), f)


HALF = len(''.join(LINES.splitlines(True)[:2]))
PACKS = {
    'rows.jsonl.bz2': lambda f: f.write_bytes(bz2.compress(LINES.encode())),
    'rows.json.xz': lambda f: f.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    'rows.csv.gz': lambda f: f.write_bytes(gzip.compress(table('prompt,completion\n', ',', quoted).encode())),
    'rows.parquet.gz': lambda f: f.write_bytes(gzip.compress(parquet_bytes())),
    'rows.feather': feather,
    'rows.zip': lambda f: zipped(f.parent, f.name, **{'in/rows.jsonl': LINES, 'in/README.md': 'x', '.DS_Store': 'x'}),
    'two.zip': lambda f: zipped(f.parent, f.name, **{'a.jsonl': LINES[:HALF], 'b.jsonl': LINES[HALF:]}),
    'packed.zip': lambda f: zipped(f.parent, f.name, **{'rows.jsonl.gz': gzip.compress(LINES.encode())}),
    'table.zip': lambda f: zipped(f.parent, f.name, **{'rows.parquet': parquet_bytes()}),
    'split.zip': lambda f: zipped(f.parent, f.name, **{'data/train.jsonl': LINES, 'data/test.jsonl': '{}'}),
    'rows.tar': lambda f: tarred(f.parent, f.name, **{'./rows.jsonl': LINES}),
    'rows.tgz': lambda f: tarred(f.parent, f.name, **{'rows.jsonl': LINES, '._rows.jsonl': 'x'}),
    'rows.tar.bz2': lambda f: tarred(f.parent, f.name, **{'rows.parquet': parquet_bytes()}),
    'each.tar.xz': lambda f: tarred(f.parent, f.name, **{f'{i}.json': json.dumps(r) for i, r in enumerate(ROWS)}),
}


@pytest.mark.parametrize('name', PACKS)
def test_packed(tmp_path, name):
    "The same rows, whatever they are packed in; nothing is written beside them"
    PACKS[name](tmp_path / name)
    before = sorted(tmp_path.rglob('*'))
    rows, _ = read(tmp_path / name)
    assert rows == ROWS and sorted(tmp_path.rglob('*')) == before
    if name == 'split.zip':
        assert load(tmp_path / name).reason.endswith('left out of the folder: data/test.jsonl')


def test_place_in_an_archive(tmp_path):
    f = zipped(tmp_path, 'rows.zip', **{'a.jsonl': LINES, 'b.jsonl': LINES + '{'})
    assert 'row 10: line 6 is not JSON' in refused(lambda: load(f))
    assert '(b.jsonl, its row 5)' in refused(lambda: load(f))


@pytest.mark.parametrize(
    'name', ['../rows.jsonl', '/etc/rows.jsonl', 'a/../../rows.jsonl', 'C:\\rows.jsonl', '..\\rows.jsonl']
)
@pytest.mark.parametrize('make', [zipped, tarred])
def test_names_that_lead_out(tmp_path, name, make):
    f = make(tmp_path, 'rows.zip' if make is zipped else 'rows.tar', **{name: LINES})
    assert 'leads out of the archive' in refused(lambda: load(f))


def test_links_in_an_archive_are_not_followed(tmp_path):
    put(tmp_path, 'secret.jsonl', LINES)
    with tarfile.open(tmp_path / 'rows.tar', 'w') as t:
        info = tarfile.TarInfo('rows.jsonl')
        info.type = tarfile.SYMTYPE
        info.linkname = str(tmp_path / 'secret.jsonl')
        t.addfile(info)
    assert 'holds no .json' in refused(lambda: load(tmp_path / 'rows.tar'))


@pytest.mark.parametrize('name', ['rows.zip', 'rows.tar.gz', 'rows.jsonl.gz', 'rows.jsonl.xz', 'rows.jsonl.bz2'])
def test_made_to_fill_a_disk(tmp_path, monkeypatch, name):
    "What unpacks to far more than its size is refused before it is all unpacked"
    monkeypatch.setattr('unsloth_nb.data.files.LARGEST', 2**20)
    text = '{"prompt": "' + 'a' * 2**22 + '"}\n'
    if name.endswith('.zip'):
        zipped(tmp_path, name, **{'rows.jsonl': text})
    elif '.tar' in name:
        tarred(tmp_path, name, **{'rows.jsonl': text})
    else:
        pack = dict(gz=gzip.compress, xz=lzma.compress, bz2=bz2.compress)[name.rsplit('.')[-1]]
        (tmp_path / name).write_bytes(pack(text.encode()))
    assert 'times its size, as files do that are made to fill a disk' in refused(lambda: load(tmp_path / name))


def test_locked_and_broken_archives(tmp_path):
    f = zipped(tmp_path, 'rows.zip', **{'rows.jsonl': LINES})
    b = bytearray(f.read_bytes())
    for at in (b.index(b'PK\x03\x04') + 6, b.index(b'PK\x01\x02') + 8):
        b[at] |= 1
    f.write_bytes(b)
    assert 'locked by a password' in refused(lambda: load(f))
    f.write_bytes(b[:60])
    assert refused(lambda: load(f)).startswith(f'dataset: {f} cannot be read as zip')
    b = bytearray(zipped(tmp_path, 'rows.zip', **{'rows.jsonl': LINES}).read_bytes())
    b[50] ^= 255
    f.write_bytes(b)
    assert refused(lambda: load(f)).startswith(f'dataset: {f}, rows.jsonl cannot be read as jsonl')
    f = tarred(tmp_path, 'rows.tar.gz', **{'rows.jsonl': LINES * 999})
    f.write_bytes(f.read_bytes()[:200])
    assert refused(lambda: load(f)).startswith(f'dataset: {f} cannot be read as tar')


def test_workbook(tmp_path, monkeypatch):
    "Read where openpyxl is, else refused with the command"
    f = zipped(tmp_path, 'rows.xlsx', **{'[Content_Types].xml': '<Types/>'})
    monkeypatch.setitem(sys.modules, 'openpyxl', None)
    assert 'pip install openpyxl' in refused(lambda: load(f))

    def sheet(title, rows):
        return types.SimpleNamespace(title=title, iter_rows=lambda values_only: iter(rows))

    cells = [('prompt ', 'completion', None), *((*r.values(), None) for r in ROWS), (None, None, None)]
    book = types.SimpleNamespace(worksheets=[sheet('Empty', []), sheet('Rows', cells)])
    fake = types.SimpleNamespace(load_workbook=lambda h, read_only, data_only: book)
    monkeypatch.setitem(sys.modules, 'openpyxl', fake)
    rows, warnings = read(f)
    assert rows == ROWS
    assert any("sheet 'Rows', read alone; left out: 'Empty'" in w for w in warnings)


# First bytes --------------------------------------------------------------------------------------------------------

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('a.jsonl', POINTER, "is a Git LFS pointer: the data itself has not been downloaded; run 'git lfs pull'"),
        ('a.parquet', POINTER, 'git lfs pull'),
        ('a.jsonl.gz', POINTER, 'git lfs pull'),
        ('a.txt', POINTER, 'git lfs pull'),
        ('a.csv', b'\n<!DOCTYPE html>\n<html>', 'is a web page'),
        ('a.parquet', b'<html lang="en">', 'is a web page'),
        ('a.json', b'<?xml version="1.0"?><Error/>', 'is XML'),
        ('a.jsonl', gzip.compress(LINES.encode()), 'is gzip data, not jsonl; rename it to a.jsonl.gz'),
        ('a.jsonl', lzma.compress(LINES.encode()), 'is xz data, not jsonl; rename it to a.jsonl.xz'),
        ('a.jsonl', bz2.compress(LINES.encode()), 'is bzip2 data, not jsonl; rename it to a.jsonl.bz2'),
        ('a.jsonl', b'PK\x03\x04' + b'\0' * 26 + b'rows.jsonl', 'is a ZIP archive, not jsonl; rename it to a.zip'),
        ('a.csv', b'PK\x03\x04' + b'\0' * 26 + b'[Content_Types].xml', 'is a document of an office program'),
        ('a.json', parquet_bytes, 'is a Parquet file, not json; rename it to a.parquet'),
        ('a', gzip.compress(LINES.encode()), 'is gzip data'),
        ('a.txt', b'%PDF-1.7\n', 'is a PDF; write its text to a .txt file'),
        ('a.jsonl.gz', LINES.encode(), 'is no gzip data, whatever its suffix says; rename it to a.jsonl'),
        ('a.jsonl.gz', gzip.compress(POINTER), 'git lfs pull'),
        ('a.jsonl', LINES.encode('utf-16'), 'is UTF-16, not UTF-8 text; save it as UTF-8'),
        ('a.csv', 'prompt;completion\n'.encode('utf-16-le'), 'is UTF-16'),
        ('a.jsonl', b'\0' * 99, 'is a run of zero bytes'),
        ('a.pdf', b'x', 'is a .pdf file; write its text to a .txt or .md file'),
        ('a.docx', b'x', 'write its text to a .txt or .md file'),
        ('rows.parquet.txt', parquet_bytes, 'is a Parquet file, not txt; rename it to rows.parquet'),
        ('rows.gz', gzip.compress(b'x'), 'does not say what is packed in it; rename it, as in rows.jsonl.gz'),
        ('a.ods', b'x', 'write its rows to a .csv'),
        ('a.tar.zst', b'\x28\xb5\x2f\xfd', 'is a tar archive in zstd; unpack it, and name the folder'),
    ],
)
def test_first_bytes(tmp_path, name, content, said):
    "The error names what is there, whatever the suffix says, and what to do"
    f = put(tmp_path, name, content() if callable(content) else content)
    message = refused(lambda: load(f))
    assert said in message and message.startswith('dataset: ')


# Folders ------------------------------------------------------------------------------------------------------------


def clone(tmp_path, head='', **files):
    "A folder like a dataset's repository on the Hub"
    if head:
        put(tmp_path, 'clone/README.md', f'---\n{head}\n---\n# Rows\n')
    put(tmp_path, 'clone/.gitattributes', '*.parquet filter=lfs')
    for n, content in files.items():
        put(tmp_path, f'clone/{n}', content)
    return tmp_path / 'clone'


OTHER = '{"prompt": "other", "completion": "x"}\n'
ENTRY = 'configs:\n- config_name: default\n  data_files:\n'


@pytest.mark.parametrize(
    'head, files',
    [
        ('', {'data/train-00000-of-00002.jsonl': LINES[:HALF], 'data/train-00001-of-00002.jsonl': LINES[HALF:]}),
        ('', {'data/train-00000-of-00001.parquet': parquet_bytes, 'data/test-00000-of-00001.parquet': parquet_bytes}),
        ('', {'train/part-0.jsonl': LINES, 'test/part-0.jsonl': OTHER}),
        ('', {'data/train/part-0.jsonl': LINES, 'data/test/part-0.jsonl': OTHER}),
        ('', {'math_train.jsonl': LINES, 'math_test.jsonl': OTHER}),
        ('', {'rows.jsonl': LINES, 'rows.test.jsonl': OTHER}),
        ('', {'train.jsonl': LINES, 'test.jsonl': OTHER, 'sample_submission.jsonl': OTHER}),
        (ENTRY + '  - split: train\n    path: data/**', {'data/a/x.jsonl': LINES}),
        ('', {'rows.jsonl': LINES, 'dataset_info.json': '{}', 'LICENSE.md': 'x'}),
        ('license: mit', {'rows.jsonl': LINES}),
        (
            ENTRY + '  - split: train\n    path: data/en-*\n  - split: test\n    path: data/de-*',
            {'data/en-0.jsonl': LINES, 'data/de-0.jsonl': OTHER},
        ),
        (ENTRY.rstrip('\n') + ' "b/*.jsonl"', {'a/x.jsonl': OTHER, 'b/x.jsonl': LINES, 'x.jsonl': OTHER}),
        (
            'configs:\n- config_name: a\n  data_files: a.jsonl\n- data_files: b.jsonl\n  default: true',
            {'a.jsonl': OTHER, 'b.jsonl': LINES},
        ),
        (
            'configs:\n- config_name: default\n  data_dir: d\n  data_files:\n  - t.jsonl',
            {'d/t.jsonl': LINES, 't.jsonl': OTHER},
        ),
        ('configs:\n- config_name: default', {'data/train.jsonl': LINES}),
    ],
)
def test_clone_of_a_dataset(tmp_path, head, files):
    "The rows for training are those that its README or its names say"
    made = clone(tmp_path, head, **{n: c() if callable(c) else c for n, c in files.items()})
    assert read(made)[0] == ROWS


@pytest.mark.parametrize(
    'head, files, kw, said',
    [
        (
            'configs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*',
            {'en/a.jsonl': LINES, 'de/a.jsonl': OTHER},
            {},
            'holds several configurations (en, de); name the folder or the file of one, as in dataset=CLONE/en',
        ),
        (ENTRY.rstrip('\n') + ' ../*.jsonl', {'a.jsonl': LINES}, {}, 'names files outside of its folder'),
        (ENTRY.rstrip('\n') + ' data/train-*', {}, {}, 'none of them is there; download the dataset again'),
        (
            ENTRY + '  - split: train\n    path: a.jsonl',
            {'a.jsonl': LINES},
            dict(dataset_split='test'),
            "has no split 'test'; set dataset_split to one of train",
        ),
        (
            '',
            {'train.jsonl': LINES, 'test.jsonl': OTHER},
            dict(dataset_split='dev'),
            "no split 'dev'; set dataset_split",
        ),
        (
            '',
            {'main/a.jsonl': LINES, 'socratic/a.jsonl': OTHER},
            {},
            'name one of its folders that do: main, socratic',
        ),
        ('', {'data/train.parquet': POINTER}, {}, 'git lfs pull'),
    ],
)
def test_clone_that_cannot_be_read(tmp_path, head, files, kw, said):
    made = clone(tmp_path, head, **files)
    assert said in refused(lambda: load(made, **kw)).replace(str(made), 'CLONE')


# Names that are no file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, said',
    [
        (
            'https://huggingface.co/datasets/owner/name',
            "is an address; copy owner/name out of it: dataset='owner/name'",
        ),
        ('huggingface.co/datasets/owner/name/tree/main', "dataset='owner/name'"),
        ('hf://datasets/owner/name@main/rows.jsonl', "dataset='owner/name'"),
        ('https://example.com/rows.jsonl', 'is an address; download it'),
        ('s3://bucket/rows.jsonl', 'is an address; download it'),
        ('file:///data/my%20rows.jsonl', "give the path itself: dataset='/data/my rows.jsonl'"),
        (
            'C:\\data\\rows.jsonl',
            "is a path of Windows, which this machine does not have; under WSL it is '/mnt/c/data/rows",
        ),
        ('C:/rows', "under WSL it is '/mnt/c/rows'"),
        ('\\\\server\\share\\rows.jsonl', 'is a path of Windows'),
        ('datasets/owner/name', "dataset='owner/name'"),
        ('owner/name/', "ends with a slash and is no folder here; a Hub id has none: dataset='owner/name'"),
        ('data\\rows.jsonl', "has backslashes between folders; write dataset='data/rows.jsonl'"),
        ('$HOME/rows.jsonl', 'begins with a variable that nothing has filled in'),
        ('/dev/stdin', 'is a stream or a device'),
        ('/dev/null', 'is a stream or a device, which cannot be read twice'),
        ('-', 'write the rows to a file first, as in: cat > rows.jsonl'),
    ],
)
def test_names_that_are_no_file(name, said):
    assert said in refused(lambda: find_source(name))


def test_link_without_its_target(tmp_path):
    os.symlink(tmp_path / 'gone.jsonl', tmp_path / 'dead.jsonl')
    said = refused(lambda: find_source(str(tmp_path / 'dead.jsonl')))
    assert f"is a link to '{tmp_path}/gone.jsonl', which does not exist" in said and 'did you mean' not in said


@pytest.mark.parametrize(
    'name, said',
    [
        ('https://huggingface.co/owner/name', "is an address; copy owner/name out of it: model='owner/name'"),
        ('hf://owner/name', "model='owner/name'"),
        ('file:///models/mine', "model='/models/mine'"),
        ('D:\\models\\mine', "under WSL it is '/mnt/d/models/mine'"),
        ('D:/mine', 'is a path of Windows'),
    ],
)
def test_addresses_of_models(name, said):
    assert said in refused(lambda: resolve_model(name))


# Rows in memory -----------------------------------------------------------------------------------------------------


def test_frame_with_an_index_that_has_a_name():
    import pandas as pd

    frame = pd.DataFrame(ROWS)
    assert list(rows_of(frame.set_index('prompt'))) == ROWS
    assert list(rows_of(frame.set_index(['prompt', 'completion']))) == ROWS


def test_columns_of_one_name(tmp_path):
    "In a frame and in a table, of whose columns the last alone would be read"
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pd.DataFrame([['a', 'b', 'c']], columns=['prompt', 'completion', 'prompt'])
    made = pa.table([['a'], ['b'], ['c']], names=list(frame.columns))
    pq.write_table(made, tmp_path / 'a.parquet')
    for rows in (frame, made):
        assert "has two columns 'prompt'; rename one of them" in refused(lambda rows=rows: list(rows_of(rows)))
    assert "has two columns 'prompt'" in refused(lambda: load(tmp_path / 'a.parquet'))


def test_frame_of_another_library():
    "What gives an Arrow table is read as one, as a polars frame does"
    import pyarrow as pa

    frame = types.SimpleNamespace(to_arrow=lambda: pa.Table.from_pylist(ROWS))
    assert list(rows_of(frame)) == ROWS


def test_kinds():
    assert [file_kind(n) for n in ('a.tgz', 'a.tar.xz', 'a.JSONL.BZ2')] == ['.tar', '.tar', '.jsonl']


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    "A function and an entry are enough"

    def read_words(f):
        with f.open('rb') as h:
            yield from (dict(prompt=w, completion=w) for w in h.read().decode().split())

    monkeypatch.setitem(READERS, '.words', read_words)
    assert len(load(put(tmp_path, 'a.words', 'one two')).train) == 2
    assert len(load(put(tmp_path, 'a.words.gz', gzip.compress(b'one two'))).train) == 2
    assert len(load(zipped(tmp_path, 'a.zip', **{'a.words': 'one two'})).train) == 2
