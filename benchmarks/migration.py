"""How much of real training files becomes a job: folders of Unsloth notebooks, Axolotl and LLaMA-Factory files, read and never run.

    python benchmarks/migration.py NAME=FOLDER … [--out FILE] [--refused]

NAME is what the figures stand under. Every `.ipynb`, `.py`, `.yaml`, `.yml` below FOLDER is imported; a refusal counts as clear when it is a
MigrationError or ScanError, anything else as a crash. The files stay where they are: fetch them from the tools' own repositories."""

import argparse
import re
import time
from collections import Counter
from pathlib import Path
from unsloth_nb.core.engine import versions
from unsloth_nb.lint.migration import MigrationError, import_job
from unsloth_nb.runs.run import write_json
from unsloth_nb.lint.scanning import ScanError


def short(why):
    "A refusal without places and names"
    why = re.sub(r' \((?:cell|line)[^)]*\)', '', why)
    return (
        re.sub(r"^(rl|stage): '?(\w*).*", r'\1: \2', why)
        if re.match('(rl|stage):', why)
        else re.sub(r"'[^']*'", '…', why.partition(':')[0]).strip()
    )


def survey(folder):
    "Counts of one folder"
    n = Counter()
    lines = Counter()
    left = Counter()
    refused = []
    crashed = []
    start = time.perf_counter()
    for f in sorted(p for p in Path(folder).rglob('*') if p.suffix in ('.ipynb', '.py', '.yaml', '.yml')):
        n['files'] += 1
        try:
            got = import_job(f)
        except (MigrationError, ScanError) as e:
            n['refused'] += 1
            refused.append(str(e).partition(f'{f}')[2].lstrip(': ') or str(e))
            continue
        except Exception as e:
            n['crashed'] += 1
            crashed.append(f'{f.name}: {type(e).__name__}: {e}'[:300])
            continue
        n['imported'] += 1
        lines.update({k: len(getattr(got, k)) for k in ('mapped', 'defaults', 'unneeded', 'left')})
        left.update(l.name for l in got.left)
    return dict(
        n,
        lines=dict(lines),
        left=dict(left.most_common(25)),
        refused_for=dict(Counter(short(r) for r in refused).most_common(15)),
        crashes=crashed,
        seconds=round(time.perf_counter() - start, 1),
    ), refused


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', nargs='+', metavar='NAME=FOLDER')
    p.add_argument('--out', type=Path)
    p.add_argument('--refused', action='store_true', help='print every refusal')
    a = p.parse_args()
    res = dict(date=time.strftime('%Y-%m-%d'), versions=versions(), sources={})
    for name, folder in (f.split('=', 1) for f in a.folders):
        res['sources'][name], refused = survey(folder)
        r = res['sources'][name]
        print(
            f"{name}: {r['files']} files, {r.get('imported', 0)} imported, {r.get('refused', 0)} refused, {r.get('crashed', 0)} crashed, in {r['seconds']} s; settings {r['lines']}"
        )
        if a.refused:
            print('\n'.join(f'  {v:4} {k}' for k, v in Counter(refused).most_common()))
    if a.out:
        write_json(a.out, res)


if __name__ == '__main__':
    main()
