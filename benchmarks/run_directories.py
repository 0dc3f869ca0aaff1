"""What a run leaves on disk, and how long it takes to find one among many.

    python benchmarks/run_directories.py [--steps 30] [--test-size 32] [--counts 100 1000 10000] [--out FILE]

One finetune job with the embedded model is run, a checkpoint every ten steps, and its files are counted by kind. Then folders of
so many runs are made, each with that run's small files (as hard links, no weights), and listed: `find` is the newest run,
`table` is everything that `unsloth-nb runs list` prints. Seconds are the better of two, with the files in the system's cache."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from unsloth_nb.runs.run import list_runs
from unsloth_nb.core.engine import device_info, versions
from unsloth_nb.jobs.runner import run_job
from unsloth_nb.runs.run import open_run

KINDS = {'checkpoints': 'checkpoints', 'adapter': 'adapter', 'notebook.ipynb': 'notebook', 'report.html': 'report'}


def sizes(folder):
    "Bytes and files of a run directory by kind; `records` is what is left"
    res = {}
    for f in sorted(p for p in folder.rglob('*') if p.is_file()):
        n = res.setdefault(KINDS.get(f.relative_to(folder).parts[0], 'records'), dict(bytes=0, files=0))
        n['bytes'] += f.stat().st_size
        n['files'] += 1
    return res


def many(run, folder, n):
    "A folder of `n` runs with the records of one"
    small = [f for f in run.path.iterdir() if f.is_file() and f.suffix in ('.json', '.jsonl')]
    for i in range(n):
        d = folder / f'{run.name[:-4]}{i:06x}'
        d.mkdir(parents=True)
        for f in small:
            os.link(f, d / f.name)


def best(f):
    "The better of two, in seconds"
    times = []
    for _ in range(2):
        t = time.perf_counter()
        f()
        times.append(time.perf_counter() - t)
    return round(min(times), 4)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--steps', type=int, default=30)
    p.add_argument('--test-size', type=int, default=32)
    p.add_argument('--counts', type=int, nargs='+', default=[100, 1000, 10000])
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        run = run_job(
            'finetune',
            'smollm2-135m',
            runs_dir=tmp / 'one',
            show=False,
            max_steps=a.steps,
            test_size=a.test_size,
            save_steps=10,
        )
        assert run.status == 'finished', run.result
        listed = []
        for n in a.counts:
            folder = tmp / str(n)
            many(run, folder, n)
            listed.append(
                dict(
                    runs=n,
                    find_seconds=best(lambda: open_run('latest', folder)),
                    table_seconds=best(lambda: repr(list_runs(folder))),
                )
            )
        res = dict(
            date=time.strftime('%Y-%m-%d'),
            device=device_info().name,
            steps=a.steps,
            test_size=a.test_size,
            sizes=sizes(run.path),
            stages=run.seconds(),
            listed=listed,
            versions=versions(),
        )
    print(json.dumps(res, indent=1))
    if a.out:
        a.out.write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
