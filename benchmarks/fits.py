"""Does a plan that says it fits ever run out of memory? Small cards, played by a large one that may use no more than they have.

    python benchmarks/fits.py MODEL_FOLDER [--cases 'RTX 4060:512' 'RTX 3090:2048:load_in_4bit=false' …] [--parallel 4] [--steps 3]

Each case is a process of its own: it allows itself the memory of the card (less the driver's share), makes the plan for it, loads the
model and trains on rows that are all as long as max_seq_length. The result has the predicted and the measured peak. Needs a CUDA GPU
larger than the cards; weights of a random model will do, since memory does not depend on them."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CASES = ['RTX 4060:512', 'RTX 3060:2048', 'T4:2048', 'RTX 3090:2048', 'RTX 4090:8192', 'A100 40GB:4096']


def one(folder, case, steps):
    "Train under the card's memory; what was predicted, what was measured"
    import torch
    from unsloth_nb import FinetuneJob, Examples, find_device, load_model, make_plan, start_engine, start_run, train
    from unsloth_nb.tokens.formatting import Example
    from unsloth_nb.core.schema import read_value

    start_engine()
    card, length, *more = case.split(':')
    dev = find_device(card)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(dev.memory_free / total)
    params = {k: read_value(FinetuneJob, k, v) for k, v in (m.split('=') for m in more)}
    job = FinetuneJob(
        **dict(model=folder, max_seq_length=int(length), max_steps=steps, learning_rate=1e-5, special_tokens='keep')
        | params
    )
    r = random.Random(0)
    rows = [[r.randrange(100, 40000) for _ in range(int(length))] for _ in range(32)]
    plan = make_plan(job, rows, dev)
    res = dict(
        case=case,
        predicted_bytes=plan.peak,
        fits=plan.fits,
        card_bytes=dev.memory_free,
        way={
            k: getattr(plan, k)
            for k in (
                'dtype',
                'load_in_4bit',
                'per_device_train_batch_size',
                'gradient_accumulation_steps',
                'gradient_checkpointing',
                'optim',
                'packing',
                'padding_free',
            )
        },
        tokens_in_pass=plan.largest_pass,
    )
    try:
        model = load_model(job, plan)
        res['load_peak_bytes'] = torch.cuda.max_memory_allocated()
        examples = Examples(model.formatter, [Example(ids, [True] * len(ids)) for ids in rows])
        with tempfile.TemporaryDirectory() as tmp:
            m = train(model, examples, job, start_run(job, tmp))
        res |= dict(
            status='trained',
            measured_bytes=m['peak_bytes'],
            reserved_bytes=torch.cuda.max_memory_reserved(),
            error=round(plan.peak / m['peak_bytes'] - 1, 4),
            tokens_per_second=m['steady_tokens_per_second'],
        )
    except torch.OutOfMemoryError as e:
        res |= dict(status='out of memory', reason=str(e).splitlines()[0])
    except Exception as e:
        res |= dict(status='failed', reason=f'{type(e).__name__}: {e}'[:500], trace=traceback.format_exc()[-1500:])
    return res


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('model')
    p.add_argument('--cases', nargs='+', default=CASES)
    p.add_argument('--parallel', type=int, default=1)
    p.add_argument('--steps', type=int, default=3)
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print('RESULT ' + json.dumps(one(a.model, a.one, a.steps), default=str))
        return

    def child(case):
        out = subprocess.run(
            [sys.executable, __file__, a.model, '--steps', str(a.steps), '--one', case], capture_output=True, text=True
        )
        line = next((l[7:] for l in out.stdout.splitlines() if l.startswith('RESULT ')), None)
        res = json.loads(line) if line else dict(case=case, status='died', reason=out.stderr[-800:])
        print(json.dumps({k: v for k, v in res.items() if k != 'trace'}), flush=True)
        return res

    with ThreadPoolExecutor(a.parallel) as pool:
        rows = list(pool.map(child, a.cases))
    from unsloth_nb.core.engine import device_info, versions

    res = dict(
        date=time.strftime('%Y-%m-%d'),
        device=device_info().name,
        versions=versions(),
        model=Path(a.model).name,
        rows=rows,
    )
    if os.environ.get('OUT'):
        (Path(os.environ['OUT']) / f'fits_{Path(a.model).name}.json').write_text(json.dumps(res, indent=1) + '\n')
    sys.exit(any(r.get('fits') and r['status'] != 'trained' for r in rows))


if __name__ == '__main__':
    main()
