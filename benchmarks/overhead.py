"""What this package adds to a training step over the bare Unsloth loop: the same model, rows, batches and settings, in one process.

    python benchmarks/overhead.py [--rounds 4] [--steps 12] [--rows-per-step 2] [--model MODEL]

Rounds alternate between the two sides, each beginning with the other one first in turn. A step is timed from the end of the
one before to its own end, everything between included. The first step of a round is left out. The figure is the ratio of medians."""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from unsloth_nb.core.engine import device_info, quiet, start_engine, versions

start_engine()
from transformers import TrainerCallback
from unsloth_nb import FinetuneJob, load_data, load_model, make_examples, make_plan, start_run, train
from unsloth_nb.training.trainer import _trainer, trainer_arguments


class Clock(TrainerCallback):
    "The seconds of each step"

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kw):
        if not hasattr(self, 'last'):
            self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kw):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def bare(model, examples, job, out):
    "Unsloth and TRL with the same arguments, and nothing of ours between the steps"
    with quiet():
        args = trainer_arguments(job, model.plan, out) | dict(
            include_num_input_tokens_seen='no', logging_nan_inf_filter=True
        )
        t = _trainer(model, examples, args, model.plan, lambda trainer: None)
        t.add_callback(clock := Clock())
        t.train()
    return clock.seconds


def ours(model, examples, job, out):
    "The package's own loop: metrics on disk, guards, live view"
    run = start_run(job, out)
    train(model, examples, job, run)
    return [m['seconds'] for m in run.metrics]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--rows-per-step', type=int, default=2)
    p.add_argument('--model', default='smollm2-135m')
    a = p.parse_args()
    job = FinetuneJob(
        model=a.model,
        max_steps=a.steps,
        max_rows=a.steps * a.rows_per_step,
        test_size=1,
        max_seq_length=512,
        per_device_train_batch_size=a.rows_per_step,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        padding_free=False,
        load_in_4bit=False,
    )
    data = load_data(job)
    model = load_model(job, make_plan(job, data))
    examples = make_examples(data.train, model.formatter, job.max_seq_length)
    secs = dict(bare=[], ours=[])
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(a.rounds):
            for name, side in [('bare', bare), ('ours', ours)][:: 1 if i % 2 == 0 else -1]:
                secs[name] += side(model, examples, job, tmp)[1:]
    med = {k: statistics.median(v) for k, v in secs.items()}
    res = dict(
        date=time.strftime('%Y-%m-%d'),
        device=device_info().name,
        model=Path(a.model).name,
        rows_per_step=a.rows_per_step,
        bare_step_s=round(med['bare'], 4),
        our_step_s=round(med['ours'], 4),
        overhead=round(med['ours'] / med['bare'] - 1, 4),
        steps=len(secs['ours']),
        versions=versions(),
    )
    print(json.dumps(res, indent=1))
    if os.environ.get('OUT'):
        (Path(os.environ['OUT']) / f'overhead_{Path(a.model).name}.json').write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
