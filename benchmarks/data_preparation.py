"""Data preparation, ours against TRL's own, side by side in one run: the same rows, cores, tokenizer and environment.

    python benchmarks/data_preparation.py --source alpaca.json [--rows 52000] [--rounds 2] [--max-seq-length 512] [--out FILE]

Ours: `load_data` and `make_examples` (read the file, conversations, all checks, tokens and mask, truncate).
TRL: `datasets` reads the same file, a `map` makes prompt and completion of the Alpaca columns, and `SFTTrainer._prepare_dataset` adds the end
token, tokenizes, builds labels, truncates; without Unsloth. Ours must beat it without that `map`, which is not part of TRL: both ratios are given.

Every measurement is a process of its own, in alternating order, with an empty cache of `datasets`. A first preparation of 64 rows loads what is
imported late, so that time and memory begin after imports. All ids and labels of both sides are compared at the end.
Peak memory is the process's own, reset after the imports: it counts mapped files, TRL's Arrow cache among them; anonymous memory at the end does not."""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import numpy as np

FORMS = ('alpaca', 'chat')  # The Alpaca prompt as text; messages with the model's chat template
VARIANTS = dict(ours=None, trl=None, trl_2_processes=2)  # dataset_num_proc
GROWTH = (1_000, 10_000, 100_000)
KNOWN = dict(
    same='ids and labels are equal',
    end_of_turn='ids are equal; TRL also trains what the chat template writes behind the end token (a line break), ours ends with the end token',
    border='one token would hold the end of the prompt and the beginning of the answer; ours tokenizes the two apart, as at inference, TRL trains the merged token',
    other='not explained: a fault',
)
ALPACA = 'Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n'


def write_rows(source, n, file):
    "`n` distinct Alpaca rows: those of the source over and over, each with its number in the instruction"
    rows = [
        {k: r.get(k) or '' for k in ('instruction', 'input', 'output')}
        for r in json.loads(Path(source).read_text(encoding='utf-8'))
    ]
    with open(file, 'w', encoding='utf-8') as f:
        for i in range(n):
            f.write(
                json.dumps(
                    (r := rows[i % len(rows)]) | dict(instruction=f"Task {i}. {r['instruction']}"), ensure_ascii=False
                )
                + '\n'
            )


def ours(tok, form, limit, num_proc):
    "Our preparation as a function of the file; gives rows, ids, labels and the seconds of each stage"
    from unsloth_nb import FinetuneJob, Formatter, load_data, make_examples

    def prepare(file):
        t0 = time.perf_counter()
        data = load_data(
            FinetuneJob(dataset=file, template=form, max_seq_length=limit, over_length='truncate', test_size=1)
        )
        t1 = time.perf_counter()
        examples = make_examples(data.train, Formatter(tok, form), limit, 'truncate')
        return dict(load_data=t1 - t0, make_examples=time.perf_counter() - t1), lambda: (
            (e.row, e.input_ids, e.labels) for e in examples
        )

    return prepare


def to_pair(row, form):
    "Prompt and completion of an Alpaca row"
    ins = row['instruction']
    inp = row['input']
    out = row['output']
    context = (
        (', paired with an input that provides further context', ins, f'### Input:\n{inp}\n\n')
        if inp.strip()
        else ('', ins, '')
    )
    if form == 'alpaca':
        return dict(prompt=ALPACA.format(*context), completion=out)
    return dict(
        prompt=[dict(role='user', content=f'{ins}\n\n{inp}' if inp.strip() else ins)],
        completion=[dict(role='assistant', content=out)],
    )


def trl(tok, form, limit, num_proc):
    "TRL's own code on a bare `SFTTrainer`, which carries what its `__init__` would set for these rows"
    from datasets import Dataset, load_dataset
    from datasets.utils import disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    assert 'unsloth' not in sys.modules
    disable_progress_bars()
    trainer = SFTTrainer.__new__(SFTTrainer)
    stages = {}
    trainer._tokenizer = tok
    trainer.chat_template = None
    trainer.completion_only_loss = True
    args = SFTConfig(
        output_dir=os.environ['HF_DATASETS_CACHE'],
        max_length=limit,
        dataset_num_proc=num_proc,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )

    def clocked(call):
        "Keep the seconds of a call under its description"

        def timed(*args, **kw):
            t = time.perf_counter()
            res = call(*args, **kw)
            stages[kw.get('desc', 'load')] = time.perf_counter() - t
            return res

        return timed

    Dataset.map = clocked(Dataset.map)
    Dataset.filter = clocked(Dataset.filter)
    load = clocked(load_dataset)

    def prepare(file):
        ds = load('json', data_files=file, split='train')
        ds = ds.map(
            to_pair,
            fn_kwargs=dict(form=form),
            remove_columns=['instruction', 'input', 'output'],
            num_proc=num_proc,
            desc='convert',
        )
        ds = trainer._prepare_dataset(ds, tok, args, args.packing, None, 'train')

        def number(p):
            return int(re.search(r'Task (\d+)\.', p if isinstance(p, str) else p[0]['content'])[1])

        return dict(stages), lambda: ((number(r['prompt']), r['input_ids'], r['labels']) for r in ds)

    return prepare


def _rss():
    "Memory of this process now: all of it, and what is not a mapped file [MiB]"
    return [
        int(re.search(rf'{k}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) // 1024 for k in ('VmRSS', 'RssAnon')
    ]


def child(side, form, model, file, warm, limit, num_proc, dump):
    "One measurement: prepare the file, print its figures; ids and labels go to `dump`"
    from transformers import AutoTokenizer
    from unsloth_nb.planning.devices import peak_memory, reset_peak

    prepare = dict(ours=ours, trl=trl)[side](AutoTokenizer.from_pretrained(model), form, limit, num_proc)
    prepare(warm)
    reset_peak('cpu')
    (rss, anon), t = _rss(), time.perf_counter()
    stages, result = prepare(file)
    res = dict(
        seconds=time.perf_counter() - t,
        stages=stages,
        rss_before_mib=rss,
        peak_rss_mib=peak_memory('cpu') // 2**20,
        anon_increase_mib=_rss()[1] - anon,
    )
    res |= dict(increase_mib=res['peak_rss_mib'] - rss) | (
        dict(largest_worker_mib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024) if num_proc else {}
    )
    rows, ids, labels = zip(*((r, np.asarray(i, np.int32), np.asarray(l, np.int32)) for r, i, l in result()))
    lengths = [*map(len, ids)]
    ids = np.concatenate(ids)
    labels = np.concatenate(labels)
    if dump:
        np.savez(dump, rows=rows, lengths=lengths, ids=ids, labels=labels)
    print(json.dumps(res | dict(rows=len(rows), tokens=len(ids), tokens_trained=int((labels != -100).sum()))))


def measure(tmp, **kw):  # `tmp`: folder for the cache; the rest goes to `child`
    "Run `child` in a fresh interpreter with an empty cache"
    with tempfile.TemporaryDirectory(dir=tmp, ignore_cleanup_errors=True) as cache:
        env = os.environ | dict(
            TOKENIZERS_PARALLELISM='true', HF_HUB_OFFLINE='1', HF_DATASETS_CACHE=cache, HF_DATASETS_OFFLINE='1'
        )
        p = subprocess.run(
            [sys.executable, __file__, '--child', json.dumps(kw)], env=env, capture_output=True, text=True
        )
    if p.returncode:
        sys.exit(f'{kw}\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.splitlines()[-1])


def _kind(a, b, form):
    "What sets our row apart from TRL's: a key of `KNOWN`"
    (ids, lab), (tids, tlab) = a, b
    first, last = np.flatnonzero(lab != -100)[[0, -1]]
    if np.array_equal(ids, tids):
        return (
            'same'
            if np.array_equal(lab, tlab)
            else 'end_of_turn'
            if form == 'chat' and np.array_equal(lab[: last + 1], tlab[: last + 1])
            else 'other'
        )

    def rest(x, at):
        return x[at : at + min(len(ids), len(tids)) - first - 4]

    meet = any(np.array_equal(rest(ids, first + 2), rest(tids, first + 2 + k)) for k in (-2, -1, 0, 1))
    return 'border' if meet and np.array_equal(ids[: first - 1], tids[: first - 1]) else 'other'


def compare(files, form):
    "Count the rows of both sides by how they differ; a row that only one side has is counted apart"

    def rows(f):
        d = np.load(f)
        ids = d['ids']
        labels = d['labels']
        return {
            r: (ids[e - n : e], labels[e - n : e])
            for r, n, e in zip(d['rows'].tolist(), d['lengths'], d['lengths'].cumsum())
        }

    (a, b), counts = map(rows, files), dict.fromkeys(KNOWN, 0)
    for r in a.keys() & b.keys():
        counts[_kind(a[r], b[r], form)] += 1
    return counts | dict(only_ours=len(a.keys() - b.keys()), only_trl=len(b.keys() - a.keys()))


def summary(runs):
    "Best and median seconds, the stages of the best run, the largest memory"
    best = min(runs, key=lambda r: r['seconds'])
    secs = [round(r['seconds'], 2) for r in runs]
    own = {k: best[k] for k in ('rows', 'tokens', 'tokens_trained')} | {
        k: max(r[k] for r in runs) for k in best if k.endswith('_mib')
    }
    return own | dict(
        best_s=min(secs),
        median_s=round(statistics.median(secs), 2),
        all_s=secs,
        ms_per_row=round(1000 * best['seconds'] / best['rows'], 4),
        stages_s={k: round(v, 2) for k, v in best['stages'].items()},
    )


def side_by_side(rounds, tmp, form, **kw):
    "All variants in turn, how much longer TRL takes than ours, and whether they gave the same"
    runs = {v: [] for v in VARIANTS}
    dumps = {v: f'{tmp}/{form}_{v}.npz' for v in VARIANTS}
    for i in range(rounds):
        for v in [*VARIANTS][:: 1 if i % 2 == 0 else -1]:
            runs[v].append(
                measure(
                    tmp=tmp, side=v.split('_')[0], form=form, num_proc=VARIANTS[v], dump=None if i else dumps[v], **kw
                )
            )
    res = {v: summary(r) for v, r in runs.items()}
    for v, r in [*res.items()][1:]:

        def ratio(s):
            return round(s / res['ours']['best_s'], 2)

        r |= dict(
            times_ours=ratio(r['best_s']),
            times_ours_without_convert=ratio(r['best_s'] - r['stages_s']['convert']),
            agreement=compare((dumps['ours'], dumps[v]), form),
        )
    return res


def table(res):
    "The figures for a terminal"
    cols = dict(
        best_s='best s',
        median_s='median s',
        rss_before_mib='MiB before',
        peak_rss_mib='peak MiB',
        increase_mib='increase',
        anon_increase_mib='anonymous',
        largest_worker_mib='worker',
        times_ours='x ours',
        times_ours_without_convert='no convert',
    )
    print(
        f"{res['cpu']}, {res['cores']} cores, load {res['load_average']} at the start; max_seq_length {res['max_seq_length']}\n{'':25}"
        + ''.join(f'{c:>11}' for c in cols.values())
    )
    for form, vs in res['forms'].items():
        for v, r in vs.items():
            print(f'{form:8}{v:17}' + ''.join(f"{r.get(k, '')!s:>11}" for k in cols))
            print(
                f"    {r['rows']} rows, {r['tokens']} tokens, {r['tokens_trained']} trained; {r['stages_s']} {r.get('agreement', '')}"
            )
    for n, r in res['growth'].items():
        print(f"ours, {n} rows: {r['best_s']} s, {r['ms_per_row']} ms a row, {r['increase_mib']} MiB more")
    print(*(f'  {k}: {v}' for k, v in KNOWN.items()), sep='\n')


def main():
    if sys.argv[1:2] == ['--child']:
        return child(**json.loads(sys.argv[2]))
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--source', required=True, help='a JSON list of Alpaca rows')
    p.add_argument('--rows', type=int, default=52_000)
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--max-seq-length', type=int, default=512)
    p.add_argument('--out', type=Path, help='JSON file; default: benchmarks/results/data_preparation_DATE_Ncores.json')
    a = p.parse_args()
    from unsloth_nb.core.engine import _cpu_name, versions

    model = subprocess.check_output(
        [sys.executable, '-c', 'from unsloth_nb.training.loading import embedded_model as f; print(f())'], text=True
    ).splitlines()[-1]
    cores = len(os.sched_getaffinity(0))
    date = time.strftime('%Y-%m-%d')
    res = dict(
        date=date,
        cpu=_cpu_name(),
        cores=cores,
        load_average=round(os.getloadavg()[0], 2),
        source=Path(a.source).name,
        rows=a.rows,
        rounds=a.rounds,
        max_seq_length=a.max_seq_length,
        known_differences=KNOWN,
        versions=versions(),
    )
    with tempfile.TemporaryDirectory() as tmp:

        def file(n):
            return f'{tmp}/rows_{n}.jsonl'

        for n in {64, a.rows, *GROWTH}:
            write_rows(a.source, n, file(n))
        kw = dict(tmp=tmp, model=model, warm=file(64), limit=a.max_seq_length)

        def grow(n):
            return summary(
                [
                    measure(side='ours', form='alpaca', num_proc=None, dump=None, file=file(n), **kw)
                    for _ in range(a.rounds)
                ]
            )

        res |= dict(
            forms={f: side_by_side(a.rounds, form=f, file=file(a.rows), **kw) for f in FORMS},
            growth={n: grow(n) for n in GROWTH},
        )
    table(res)
    (a.out or Path(__file__).parent / 'results' / f'data_preparation_{date}_{cores}cores.json').write_text(
        json.dumps(res, indent=1) + '\n'
    )

    def bad(d):
        return d['other'] or d['only_ours'] or d['only_trl'] > 1  # We hold one row out

    if any(bad(r['agreement']) for vs in res['forms'].values() for r in vs.values() if 'agreement' in r):
        sys.exit('rows differ that should not: see `other` and `only_…` above')


if __name__ == '__main__':
    main()
