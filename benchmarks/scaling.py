"""Training on several devices beside one: tokens a second, memory of each rank against the plan, loss by step.

    python benchmarks/scaling.py MODEL CONFIGURATION… [--dataset FILE] [--steps 12] [--out FILE]

A configuration is DEVICES:BITS:LAYOUT[:PARALLEL], as in 1:16:packed 2:16:packed:ddp 2:4:rows:ddp 2:16:packed:fsdp. `packed` fills
--rows rows of --max-seq-length tokens on each device, so that two devices do twice the work of a step; `rows` has one optimizer
step of --batch-size rows, which the devices share, so that the loss by step can be compared. Configurations of the same devices
run one after the other in the same processes, started by torchrun as a job's are. Tokens a second are the median over the steps
of the tokens of each over its seconds, the first two steps left out (a pass that the end of the data has left half empty weighs
no more than any other); efficiency is them over those of one device with the same bits and layout, divided by the devices."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def jobs(a, specs):
    "Each configuration with its job"
    from unsloth_nb import FinetuneJob

    for spec in specs:
        devices, bits, layout, parallel = (spec.split(':') + ['auto'])[:4]
        split = (
            dict(packing=True, per_device_train_batch_size=a.rows, gradient_accumulation_steps=1)
            if layout == 'packed'
            else dict(packing=False, batch_size=a.batch_size)
            | (dict(per_device_train_batch_size=a.rows) if a.rows_fixed else {})
        )
        yield (
            spec,
            FinetuneJob(
                model=a.model,
                dataset=a.dataset,
                devices=int(devices),
                parallel=parallel if int(devices) > 1 else 'auto',
                load_in_4bit=bits == '4',
                max_steps=a.steps,
                test_size=2,
                max_rows=a.max_rows,
                max_seq_length=a.max_seq_length,
                save_steps=None,
                learning_rate=a.learning_rate,
                optim='adamw_torch_fused',
                over_length='truncate',
                special_tokens='escape',
                gradient_checkpointing={'auto': 'auto', 'false': False, 'unsloth': 'unsloth', 'true': True}[
                    a.checkpointing
                ],
                **split,
            ),
        )


def group(a, folder):
    "What one process of a group does: every configuration, on one model as long as its bits stay the same"
    import torch
    from unsloth_nb import load_data, make_examples, make_plan
    from unsloth_nb.core.engine import start_engine
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.training.loading import load_model, load_tokenizer, put_weights, trained_weights
    from unsloth_nb.planning.plan import Plan
    from unsloth_nb.training.ranks import first, rank, ranks
    from unsloth_nb.runs.run import Run, read_json, record_job, write_json
    from unsloth_nb.training.trainer import train_rank

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    start_engine()
    model = None
    examples = None
    bits = None
    for i, (spec, job) in enumerate(jobs(a, a.configurations)):
        if examples is None:
            data = load_data(job)
            examples = make_examples(
                data.train, Formatter.for_job(job, load_tokenizer(job)), job.max_seq_length, job.over_length
            )
        plan_file = Path(folder) / f'plan-{i}.json'
        began = time.time()
        if first():
            plan = make_plan(job, examples, None if model is None else model.plan.device)
            write_json(plan_file, plan.to_dict())
        while not plan_file.exists():
            time.sleep(0.1)
        plan = Plan.from_dict(read_json(plan_file))
        if model is None or bits != spec.split(':')[1] or plan.parallel == 'fsdp':
            if model is not None:
                model.release({})
                model = None
            model = load_model(job, plan)
            bits = spec.split(':')[1]
            start = {n: p.detach().cpu().clone() for n, p in trained_weights(model.model).items()}
        else:
            put_weights(model.model, start)
        model.plan = plan
        model.job = job
        home = Path(folder) / f'{i}-{rank()}'
        home.mkdir()
        record_job(home, job)
        run = Run(Path(folder) / f'{i}-0') if not first() else Run(home)
        loaded = time.time()
        try:
            res = train_rank(model, examples, job, run, None if first() else Run(home), loaded)
        except Exception as e:
            if ranks() > 1:
                raise
            res = dict(error=f'{type(e).__name__}: {e}'[:500])
        if first():
            (Path(folder) / f'row-{i}.json').write_text(json.dumps(row(spec, plan, res, run.metrics, loaded - began)))


def row(spec, plan, res, metrics, load_seconds):
    "What came of a configuration"
    if 'error' in res:
        return dict(configuration=spec, **res)
    tokens = [m['tokens'] - n for m, n in zip(metrics, [0, *(m['tokens'] for m in metrics)])]
    secs = [m['seconds'] for m in metrics]
    return res | dict(
        configuration=spec,
        load_seconds=load_seconds,
        step_seconds=secs,
        step_tokens=tokens,
        median_step=statistics.median(secs[2:]),
        median_tokens_per_second=statistics.median(t / s for t, s in list(zip(tokens, secs))[2:]),
        predicted_bytes=plan.peak,
        predicted_tokens_per_second=plan.tokens_per_second,
        plan={
            k: getattr(plan, k)
            for k in (
                'parallel',
                'per_device_train_batch_size',
                'gradient_accumulation_steps',
                'gradient_checkpointing',
                'optim',
                'packing',
                'padding_free',
                'largest_pass',
                'memory',
            )
        },
        losses=[m['loss'] for m in metrics],
        grad_norms=[m['grad_norm'] for m in metrics],
    )


def efficiency(rows):
    "Beside each row of several devices: how much of them it uses, and how far its losses are from those of one"

    def key(r):
        return r['configuration'].split(':')[1:3]

    for r in rows:
        n = int(r['configuration'].split(':')[0])
        base = next((b for b in rows if b['configuration'].startswith('1:') and key(b) == key(r)), None)
        if n == 1 or base is None or 'error' in r or 'error' in base:
            continue
        r['speedup'] = r['median_tokens_per_second'] / base['median_tokens_per_second']
        r['efficiency'] = r['speedup'] / n
        if key(r)[1] == 'rows':
            r['largest_loss_difference'] = max(abs(x - y) for x, y in zip(r['losses'], base['losses']))


def show(rows):
    print(
        f"{'configuration':22} {'tokens/s':>9} {'efficiency':>10} {'peak GiB':>9} {'plan GiB':>9} {'loss differs by':>15}"
    )
    for r in rows:
        if 'error' in r:
            print(f"{r['configuration']:22} {r['error'][-200:]}")
            continue

        def f(k, s):
            return format(r[k], s) if r.get(k) is not None else ''

        print(
            f"{r['configuration']:22} {f('median_tokens_per_second', '9,.0f'):>9} {f('efficiency', '.1%'):>10} {r['peak_bytes'] / 2**30:9.2f} {r['predicted_bytes'] / 2**30:9.2f} {f('largest_loss_difference', '.1e'):>15}",
            flush=True,
        )


def start(a, specs, folder):
    "A group in processes of its own; what they said when they failed"
    from unsloth_nb.training.launching import rank_environment
    from unsloth_nb import make_plan

    (_, job), n = next(jobs(a, specs[:1])), int(specs[0].split(':')[0])
    env = rank_environment(make_plan(job))
    command = [
        sys.executable,
        *(() if n == 1 else ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n))),
        __file__,
        *(x for x in sys.argv[1:] if x not in a.configurations),
        *specs,
        '--group',
        folder,
    ]
    with open(f'{folder}/log.txt', 'w') as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=os.environ if n == 1 else env, timeout=a.limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return '' if code == 0 else f'code {code}: ' + Path(f'{folder}/log.txt').read_text()[-3000:]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('model')
    p.add_argument('configurations', nargs='+')
    p.add_argument('--dataset', default='events')
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--rows', type=int, default=4, help='rows of a packed pass')
    p.add_argument(
        '--rows-fixed',
        action='store_true',
        help='have so many rows in each pass of the `rows` layout too, whatever the number of devices',
    )
    p.add_argument('--batch-size', type=int, default=8)
    p.add_argument('--max-rows', type=int, default=None)
    p.add_argument('--max-seq-length', type=int, default=2048)
    p.add_argument('--learning-rate', type=float, default=2e-4)
    p.add_argument('--checkpointing', default='false', choices=['auto', 'false', 'unsloth', 'true'])
    p.add_argument('--limit', type=float, default=600, help='[s] for the configurations of a number of devices')
    p.add_argument('--out', type=Path)
    p.add_argument('--group', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.group:
        return group(a, a.group)
    from unsloth_nb.core.engine import device_info, versions

    rows = []
    groups = {}
    for c in a.configurations:
        groups.setdefault((c.split(':')[0], c.endswith(':fsdp')), []).append(c)
    for specs in groups.values():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
            why = start(a, specs, tmp)
            for i, c in enumerate(specs):
                rows.append(
                    json.loads(f.read_text())
                    if (f := Path(tmp) / f'row-{i}.json').exists()
                    else dict(configuration=c, error=why)
                )
        efficiency(rows)
        show(rows[-len(specs) :])
        if a.out:
            a.out.write_text(
                json.dumps(
                    dict(
                        date=time.strftime('%Y-%m-%d'),
                        model=Path(a.model).name,
                        device=device_info().to_dict(),
                        versions=versions(),
                        arguments={k: str(v) for k, v in vars(a).items()},
                        rows=rows,
                    ),
                    indent=1,
                )
            )
    print()
    show(rows)


if __name__ == '__main__':
    main()
