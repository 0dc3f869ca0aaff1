"""NF4 against 16-bit weights: the same job twice, scored on the same held-out rows, with a paired test of the difference.

    python benchmarks/nf4_quality.py [--preset smollm2-135m] [--steps 100] [--rows 64]

Writes nf4_quality.json into the folder OUT, when that is set."""

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from unsloth_nb import compare_runs
from unsloth_nb.core.engine import device_info, versions
from unsloth_nb.jobs.runner import run_job


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m')
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('--rows', type=int, default=64)
    a = p.parse_args()
    got = {}
    runs = []
    with tempfile.TemporaryDirectory() as tmp:
        for name, nf4 in (('16bit', False), ('nf4', True)):
            run = run_job('finetune', a.preset, runs_dir=tmp, load_in_4bit=nf4, max_steps=a.steps, test_size=a.rows)
            if run.status != 'finished':
                raise SystemExit(f"{name}: {run.result['reason']}")
            m = run.result['metrics']
            got[name] = dict(base=m['base'], tuned=m['tuned'], final_loss=run.metrics[-1]['loss'])
            runs.append(run)
        print(board := compare_runs(runs))
        got['difference'] = {score: asdict(nf4.difference) for score, (_, nf4) in board.standings.items()}
    x = got['16bit']
    y = got['nf4']
    d = got['difference']

    def told(e):
        return f"{e['difference']:+.4f} (p = {e['p']:.2g})"

    finding = f"embedded model, {a.steps} steps, {a.rows} held-out rows: held-out loss before {x['base']['loss']:.3f} in 16 bits and {y['base']['loss']:.3f} in NF4, after {x['tuned']['loss']:.4f} and {y['tuned']['loss']:.4f}; exact answers {x['tuned']['exact_match']:.0%} and {y['tuned']['exact_match']:.0%}; NF4 minus 16 bits: exact match {told(d['exact_match'])}, loss {told(d['loss'])}"
    res = dict(
        date=time.strftime('%Y-%m-%d'),
        device=device_info().name,
        versions=versions(),
        finding=finding,
        preset=a.preset,
        **got,
    )
    print(finding)
    if os.environ.get('OUT'):
        (Path(os.environ['OUT']) / 'nf4_quality.json').write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
