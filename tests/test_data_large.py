"A dataset larger than what is kept in memory is read and tokenized within fixed memory, in time that grows with its rows."

import json
import subprocess
import sys
import time
import pytest
from unsloth_nb.data.load import load_data
from unsloth_nb.core.spec import FinetuneJob

pytestmark = pytest.mark.slow
MiB = 2**20
LOAD_BOUND = 150 * MiB
EXAMPLES_BOUND = 250 * MiB  # [bytes] of memory that loading a file may take at most, and tokenizing 2,000 rows of it
FAULTS = {
    7: 'malformed',
    11: 'empty',
    13: 'control_characters',
    17: 'duplicates',
}  # Row number modulo 5000, what is wrong there


def paragraph(k):
    "7 kB of text, as the inside of a JSON string"
    words = [f'w{(k * 7919 + i * i) % 9973}' for i in range(1250)]
    return json.dumps(' '.join(words) + ' — ü "quoted"\n')[1:-1].encode()


def row(i, part):
    fault = FAULTS.get(i % 5000)
    n = i - 1 if fault == 'duplicates' else i
    if fault == 'malformed':
        return b'{"prompt": "question %d", "completion": \n' % i
    if fault == 'empty':
        return b'{"prompt": "question %d", "completion": " "}\n' % i
    return b'{"prompt": "question %d%b", "completion": "%d %b"}\n' % (
        n,
        b'\\u0007' if fault == 'control_characters' else b'',
        n,
        part[n % len(part)],
    )


def write(f, bytes):
    "The file; how many rows it has"
    part = [paragraph(k) for k in range(61)]
    n = 0
    size = 0
    with f.open('wb') as h:
        while size < bytes:
            size += h.write(row(n, part))
            n += 1
    return n


CHILD = '''
import json,sys,time
from pathlib import Path
from unsloth_nb.data.load import load_data
from unsloth_nb.core.spec import FinetuneJob
from unsloth_nb.training.loading import load_tokenizer
from unsloth_nb.tokens.formatting import Formatter
from unsloth_nb.tokens.examples import make_examples

def memory(name): return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(name))
def measured(f):
    "What a function returns, the memory it took at its highest above what was there, and its seconds"
    Path('/proc/self/clear_refs').write_text('5') # The highest so far is forgotten
    before,t = memory('VmRSS'),time.time()
    return f(),memory('VmHWM')-before,time.time()-t

job = FinetuneJob(dataset=sys.argv[1], test_size=100, malformed='drop', empty='drop', control_characters='drop', duplicates='drop', over_length='truncate', max_seq_length=512)
f = Formatter.for_job(job, load_tokenizer(job))
make_examples(load_data(job, [dict(prompt=f'{i}', completion='a') for i in range(300)]).train, f, 512, 'truncate')
data,took,seconds = measured(lambda: load_data(job))
examples,took2,seconds2 = measured(lambda: make_examples(data.train[:2000], f, job.max_seq_length, job.over_length, job.max_dropped))
print(json.dumps(dict(ledger=data.ledger.to_dict(), storage=data.storage(), loading=took, load_seconds=seconds, tokenizing=took2, tokenize_seconds=seconds2, rows=examples.rows.to_dict(), tokens=examples.tokens.to_dict(), last=data.train[-1].row)))
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the memory of a process as Linux tells it')
@pytest.mark.parametrize('megabytes', [150, pytest.param(500, marks=pytest.mark.long)])
def test_memory(tmp_path, megabytes):
    "JSON lines as large as that, with the books right and the memory bounded, which does not grow with them"
    n = write(tmp_path / 'rows.jsonl', size := megabytes * MiB)
    got = subprocess.run([sys.executable, '-c', CHILD, tmp_path / 'rows.jsonl'], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    r = json.loads(got.stdout.splitlines()[-1])
    print(
        {k: f'{r[k] / MiB:.0f} MiB' for k in ('loading', 'tokenizing')},
        {k: round(r[k], 1) for k in ('load_seconds', 'tokenize_seconds')},
        f'{n:,} rows',
    )
    gone = {name: sum(i % 5000 == k for i in range(n)) for k, name in FAULTS.items()}
    assert r['ledger']['came'] == n and {k: v for k, v in r['ledger']['left_out'].items() if v} == gone
    assert r['ledger']['kept'] == dict(train=n - sum(gone.values()) - 100, held_out=100)
    assert r['storage']['in_memory'] <= 64 * MiB < size * 0.95 < r['storage']['in_memory'] + r['storage']['on_disk']
    assert r['rows']['kept'] == dict(kept=2000) and r['rows']['noted']['examples_truncated'] == 2000
    assert sum(r['tokens']['kept'].values()) == 2000 * 512 and r['tokens']['left_out']['cut'] > 2000 * 512
    assert r['loading'] < LOAD_BOUND and r['tokenizing'] < EXAMPLES_BOUND


def test_time(lib, tmp_path):
    "Ten times the rows take ten times as long, give or take a factor of two"
    from unsloth_nb.tokens.examples import make_examples
    from unsloth_nb.tokens.formatting import Formatter

    job = FinetuneJob(dataset=str(tmp_path / 'rows.jsonl'), test_size=10)
    f = Formatter.for_job(job, lib.load_tokenizer(job))

    def once(n):
        (tmp_path / 'rows.jsonl').write_text(
            '\n'.join(
                json.dumps(dict(instruction=f'Say {i}', input='', output=f'It is {i}, ' + 'and more ' * (i % 17)))
                for i in range(n)
            )
        )
        t = time.perf_counter()
        d = load_data(job)
        t2 = time.perf_counter()
        assert len(make_examples(d.train, f, 512)) == n - 10
        return (t2 - t) / n, (time.perf_counter() - t2) / n

    once(500)
    few, many = ([min(x) for x in zip(*(once(n) for _ in range(k)))] for n, k in ((2000, 4), (20000, 2)))
    print([f'{x * 1e6:.0f} µs' for x in (*few, *many)])
    assert all(m < 2 * s for s, m in zip(few, many))
