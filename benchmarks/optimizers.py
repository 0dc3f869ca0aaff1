"""Each optimizer, and each loss: does it train through Unsloth here, and does a run that is cut off half way end in the same bits?

    python benchmarks/optimizers.py [--cases optim=lion_8bit …] [--out FILE]

The model has random weights in the shape of a small Llama, so that nothing is downloaded; its losses say that the weights move, and nothing of how well an
optimizer learns."""

import argparse
import shutil
import tempfile
import time
from datetime import date

from unsloth_nb.core.engine import start_engine, versions
from unsloth_nb.core.spec import OPTIMIZERS, FinetuneJob
from unsloth_nb.runs.run import write_json

SHAPE = dict(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
CASES = [
    *(f'optim={o}' for o in OPTIMIZERS if o != 'auto'),
    'label_smoothing_factor=0.1',
    'loss_type=dft',
    'neftune_noise_alpha=5',
    'loraplus_lr_ratio=16',
    'lr_scheduler_type=warmup_stable_decay',
]


def trained(model, examples, job, run):
    "The hash of the weights after training"
    from unsloth_nb.training.resuming import weights_sha256
    from unsloth_nb.training.trainer import train

    train(model, examples, job, run)
    return weights_sha256(model.model)


def measure(folder, case):
    "One case: trained at one go, and cut off after two of four steps"
    import unsloth_nb as lib
    from unsloth_nb.training.loading import load_model

    name, _, value = case.partition('=')
    job = FinetuneJob(
        model=str(folder),
        max_rows=64,
        test_size=4,
        max_steps=4,
        warmup_steps=0,
        learning_rate=1e-3,
        max_seq_length=512,
        batch_size=8,
        load_in_4bit=False,
        save_steps=2,
        **{name: value},
    )
    data = lib.load_data(job)
    plan = lib.make_plan(job, data)
    model = load_model(job, plan)
    run = lib.start_run(job, tempfile.mkdtemp())
    examples = lib.make_examples(data.train, model.formatter, job.max_seq_length)
    whole = trained(model, examples, job, run)
    losses = [m['loss'] for m in run.metrics]
    shutil.rmtree(run.path / 'checkpoints' / 'step-000004')
    again = trained(load_model(job, plan), examples, job, run)
    return dict(optimizer=plan.optim, losses=losses, same_bits=again == whole)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cases', nargs='*', default=CASES)
    p.add_argument('--out')
    args = p.parse_args()
    start_engine()
    from unsloth_nb.core.engine import device_info
    from unsloth_nb.jobs.benchmarking import random_model

    folder = f'{tempfile.mkdtemp()}/model'
    random_model(SHAPE, folder)
    res = dict(date=f'{date.today()}', device=device_info().name, versions=versions(), cases={})
    for case in args.cases:
        start = time.perf_counter()
        try:
            res['cases'][case] = measure(folder, case)
        except Exception as e:
            res['cases'][case] = dict(failed=f'{type(e).__name__}: {e}')
        print(case, res['cases'][case], f'{time.perf_counter() - start:.0f} s', flush=True)
        if args.out:
            write_json(args.out, res)


if __name__ == '__main__':
    main()
