"""One hyperparameter changed at a time, on the real embedded model: what held-out rows say of it.

    python benchmarks/sweep.py --out FILE [--sweeps lr rank …] [--seeds 2] [--steps 60] [--rows 128] [--workers 1]
    python benchmarks/sweep.py --out FILE --dataset alpaca.json --loss-only --sweeps lr rank

Each trial trains a fresh adapter and scores it on rows that it never saw: exact match with Wilson's interval, and loss per token of the
answers. A seed rules the LoRA weights and the order of the training rows; the held-out rows are the same for all. FILE is written after each trial, and
trials that it holds already are not run again, so that a sweep may be stopped and gone on with. With several workers a GPU is shared:
seconds are then no measure of speed."""

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path


# What is changed, one sweep a name; everything else is as in `base`
def sweeps(steps):
    "Name of the sweep to its settings"
    ranks = (4, 8, 16, 32, 64)
    return dict(
        lr=[dict(learning_rate=v) for v in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2)],
        rank=[dict(r=r, lora_alpha=16) for r in ranks],  # The update is scaled by 16/r
        rank_scaled=[dict(r=r, lora_alpha=r) for r in ranks],  # By 1
        rank_stabilised=[
            dict(r=r, lora_alpha=round(4 * r**0.5)) for r in ranks
        ],  # By 4/sqrt(r), as rank-stabilised LoRA does (arXiv:2312.03732)
        steps=[dict(max_steps=n) for n in (15, 30, 60, 120, 240)],
        batch=[
            dict(batch_size=n, max_steps=max(1, round(8 * steps / n))) for n in (2, 4, 8, 16, 32)
        ],  # The same number of rows
        targets=[
            dict(target_modules=t)
            for t in (
                ['q_proj', 'v_proj'],
                ['q_proj', 'k_proj', 'v_proj', 'o_proj'],
                ['gate_proj', 'up_proj', 'down_proj'],
            )
        ]
        + [{}],
        schedule=[dict(lr_scheduler_type=s) for s in ('linear', 'cosine', 'constant_with_warmup')],
        warmup=[dict(warmup_steps=n) for n in (0, 5, 20)],
    )


def changed(settings, base):
    "Settings without what is so anyway: a trial that several sweeps share is run once"
    return [{k: v for k, v in s.items() if base[k] != v} for s in settings]


def name_of(settings, seed):
    return json.dumps(dict(settings, seed=seed), sort_keys=True)


def trial(settings, common, loss_only):
    "Train and score once, in this process"
    from unsloth_nb import (
        FinetuneJob,
        TrainingError,
        evaluate,
        load_data,
        load_model,
        make_examples,
        make_plan,
        start_engine,
        start_run,
        train,
    )
    from unsloth_nb.evaluation.evaluation import response_loss
    from unsloth_nb.evaluation.significance import estimate

    start_engine()
    job = FinetuneJob(**{**common, **settings})
    data = load_data(job.replace(seed=0))  # The same rows held out whatever the seed
    plan = make_plan(job, data)
    model = load_model(job, plan)
    fmt = model.formatter_for(data.train)
    with tempfile.TemporaryDirectory() as tmp:
        examples = make_examples(data.train, fmt, job.max_seq_length, job.over_length, job.max_dropped)
        run = start_run(job, tmp)
        try:
            with redirect_stdout(io.StringIO()):
                out = train(model, examples, job, run)
        except TrainingError as e:
            return dict(failed=str(e), losses=[m['loss'] for m in run.metrics])
        losses = [m['loss'] for m in run.metrics]
    res = dict(
        training={k: out[k] for k in ('train_loss', 'steps', 'tokens', 'seconds', 'peak_bytes')},
        losses=losses,
        plan={
            k: getattr(plan, k)
            for k in ('dtype', 'load_in_4bit', 'per_device_train_batch_size', 'gradient_accumulation_steps', 'optim')
        },
    )
    if loss_only:
        return res | dict(heldout=response_loss(model, make_examples(data.test, fmt, job.max_seq_length, 'truncate')))
    got = evaluate(model, data.test, max_new_tokens=job.max_new_tokens, batch_size=128)
    return res | dict(
        heldout=got.metrics,
        exact_match=asdict(estimate(got.scores['exact_match'])),
        right=''.join(str(int(v)) for v in got.scores['exact_match']),
    )


def quiet_trial(a):
    "For the pool: (name, result)"
    name, settings, common, loss_only = a
    start = time.time()
    return name, dict(settings=settings, **trial(settings, common, loss_only), wall=time.time() - start)


def told(r):
    "A trial in one line"
    if 'failed' in r:
        return f"failed: {r['failed'].splitlines()[0]}"
    exact = f"{r['exact_match']['mean']:.3f} exact, " if 'exact_match' in r else ''
    return f"{exact}loss {r['heldout']['loss']:.4f}, {r['training']['steps']} steps, {r['wall']:.0f} s"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--sweeps', nargs='+', choices=[*sweeps(60)], default=['lr', 'rank', 'steps', 'batch'])
    p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--steps', type=int, default=60)
    p.add_argument('--rows', type=int, default=128)
    p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--model', default='smollm2-135m')
    p.add_argument('--dataset', default='events')
    p.add_argument('--loss-only', action='store_true', help='no answers are generated')
    p.add_argument('--workers', type=int, default=1, help='trials at once')
    p.add_argument('--limit', type=int, help='run at most this many trials now')
    a = p.parse_args()
    from unsloth_nb import FinetuneJob
    from unsloth_nb.core.engine import device_info, versions
    from unsloth_nb.runs.run import read_json, write_json

    common = dict(
        model=a.model,
        dataset=a.dataset,
        test_size=a.rows,
        learning_rate=a.lr,
        max_steps=a.steps,
        batch_size=8,
        max_seq_length=512,
        save_steps=None,
        overlap='drop',
        over_length='truncate',
    )
    shown = common | dict(model=Path(a.model).name, dataset=Path(a.dataset).name)
    res = read_json(a.out) or dict(
        date=time.strftime('%Y-%m-%d'),
        device=device_info().name,
        versions=versions(),
        base=shown,
        loss_only=a.loss_only,
        sweeps={},
        trials={},
    )
    if res['base'] != shown or res['loss_only'] != a.loss_only or res['device'] != device_info().name:
        raise SystemExit(f"{a.out} is of another sweep: {res['base']} on {res['device']}; name another file")
    base = FinetuneJob(**common).to_dict()
    for n in a.sweeps:
        res['sweeps'][n] = [
            dict(shown=s, trials=[name_of(c, seed) for seed in range(a.seeds)])
            for s, c in zip(sweeps(a.steps)[n], changed(sweeps(a.steps)[n], base))
        ]
    todo = {
        name_of(s, seed): dict(s, seed=seed)
        for seed in range(a.seeds)
        for n in a.sweeps
        for s in changed(sweeps(a.steps)[n], base)
    }
    todo = [(n, s, common, a.loss_only) for n, s in todo.items() if n not in res['trials']][: a.limit]
    print(f"{len(todo)} trials, {len(res['trials'])} done before", flush=True)
    with ProcessPoolExecutor(a.workers, mp_context=multiprocessing.get_context('spawn')) as pool:
        for f in as_completed([pool.submit(quiet_trial, t) for t in todo]):
            name, r = f.result()
            res['trials'][name] = dict(r, workers=a.workers)
            write_json(a.out, res)
            print(f"{name}: {told(r)}", flush=True)


if __name__ == '__main__':
    main()
