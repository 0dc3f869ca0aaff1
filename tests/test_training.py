"Training repeats bit for bit; what breaks on the way to the disk is not kept."

import hashlib
import json
import shutil
import threading
import pytest
from unsloth_nb.planning.schedules import rate_share


def weights(model):
    "SHA-256 of all trained weights"
    h = hashlib.sha256()
    for n, p in sorted(model.model.named_parameters()):
        if p.requires_grad:
            h.update(n.encode() + p.detach().float().numpy().tobytes())
    return h.hexdigest()


@pytest.mark.slow
def test_bit_for_bit(trained, tiny):
    "The same seed twice: every loss, every gradient norm and all trained weights are the same bits; another seed differs"
    runs = [trained(model=str(tiny), seed=s, max_steps=2) for s in (7, 7, 8)]
    trace = [[(m['loss'], m['grad_norm']) for m in r.metrics] for _, r, _ in runs]
    assert trace[0] == trace[1] != trace[2]
    sums = [weights(m) for m, _, _ in runs]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    'asked',
    [
        dict(optim='adafactor', lr_scheduler_type='warmup_stable_decay', min_lr_ratio=0.1),
        dict(optim='lion_8bit', loraplus_lr_ratio=16.0),
        dict(optim='ademamix', label_smoothing_factor=0.1, lr_scheduler_type='cosine_with_restarts', num_cycles=2),
        dict(loss_type='dft', neftune_noise_alpha=5.0, warmup_steps=0.5),
    ],
    ids=lambda a: '-'.join(map(str, a.values())),
)
def test_optimizers_schedules_and_losses(lib, trained, tiny, asked):
    "Other optimizers, schedules and losses: the rate of each step is the one announced, and a run cut off half way ends in the same bits"
    model, run, data = trained(model=str(tiny), save_steps=2, **asked)
    job = run.job
    share = rate_share(job, 4)
    assert [m['learning_rate'] for m in run.metrics] == pytest.approx([job.learning_rate * share(k) for k in range(4)])
    shutil.rmtree(run.path / 'checkpoints' / 'step-000004')
    again = lib.load_model(job, lib.make_plan(job, data))
    lib.train(again, lib.make_examples(data.train, again.formatter, job.max_seq_length), job, run)
    assert weights(again) == weights(model)


@pytest.mark.slow
def test_accumulation(trained, tiny):
    "4 rows at once, or 2 x 2: the same optimizer step, every token weighing the same"
    a, b = (
        trained(model=str(tiny), dtype='float32', **kw)[1]
        for kw in (dict(), dict(per_device_train_batch_size=4, gradient_accumulation_steps=1))
    )
    assert [m['loss'] for m in a.metrics] == pytest.approx([m['loss'] for m in b.metrics], rel=1e-3)


def test_max_seq_length_holds(lib, tmp_path):
    "No batch is longer than max_seq_length, and what was cut is counted"
    job = lib.FinetuneJob(max_rows=24, test_size=2, max_seq_length=80, over_length='truncate')
    data = lib.load_data(job)
    exs = lib.make_examples(data.train, lib.Formatter(lib.load_tokenizer(job)), job.max_seq_length, job.over_length)
    assert max(exs.lengths) == 80 and exs.rows.noted['examples_truncated'] > 0 and exs.tokens.left_out['cut'] > 0
    assert exs.tokens.kept_total == sum(exs.lengths)


def test_stream_error(lib, monkeypatch):
    "An exception in the generating thread reaches the reader at once"
    model = lib.load_model(lib.FinetuneJob(max_seq_length=128))

    def broken(**kw):
        raise MemoryError('no room')

    monkeypatch.setattr(model.model, 'generate', broken)
    with pytest.raises(MemoryError, match='no room'):
        list(lib.stream(model, 'Hello'))


def test_stream_stops(lib):
    "Who stops reading stops the generation: no thread is left"
    model = lib.load_model(lib.FinetuneJob(max_seq_length=128))
    before = threading.active_count()
    pieces = lib.stream(model, 'Tell me a long story.')
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_nan_stops(lib, tmp_path):
    "A weight that is not a number: the first step stops the run, and no adapter is written"
    from unsloth_nb.training.trainer import TrainingError

    job = lib.FinetuneJob(max_rows=8, test_size=2, max_steps=3, max_seq_length=256)
    data = lib.load_data(job)
    model = lib.load_model(job)
    next(p for p in model.model.parameters() if p.requires_grad).data.fill_(float('nan'))
    run = lib.start_run(job, tmp_path)
    with pytest.raises(TrainingError, match='step 1: the loss is nan'):
        lib.finetune(model, data, job, run=run)
    assert run.metrics[0]['loss'] == 'nan' and not (run.path / 'adapter').exists()


def test_continue_from_adapter(lib, trained):
    "A saved adapter's folder is a model to go on from: the same weights, trained further"
    from unsloth_nb.training.trainer import save_adapter

    model, run, data = trained(max_steps=2)
    job = model.job.replace(model=str(save_adapter(model, run.path / 'adapter')))
    again = lib.load_model(job)
    assert weights(again) == weights(model)
    more = lib.start_run(job, run.path.parent)
    lib.train(again, lib.make_examples(data.train, again.formatter, 256), job, more)
    assert weights(again) != weights(model) and more.metrics[0]['loss'] < run.metrics[0]['loss']


@pytest.mark.slow
def test_group_by_length(lib, tiny, tmp_path):
    "Length grouping reaches the trainer: the same rows are computed with less padding"
    job = lib.FinetuneJob(
        model=str(tiny),
        max_rows=24,
        test_size=2,
        max_steps=None,
        num_train_epochs=1,
        max_seq_length=512,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
    )
    rows = [dict(prompt=f'Repeat {i}.', completion='word ' * (1 + 30 * (i % 2))) for i in range(26)]
    data = lib.load_data(job, rows)
    computed = {}
    for grouped in (False, True):
        j = job.replace(group_by_length=grouped)
        model = lib.load_model(j, lib.make_plan(j, data))
        computed[grouped] = 0

        def count(mod, args, kw):
            computed[grouped] += kw['input_ids'].numel()

        model.model.register_forward_pre_hook(count, with_kwargs=True)
        run = lib.start_run(j, tmp_path)
        lib.train(model, lib.make_examples(data.train, model.formatter, j.max_seq_length), j, run)
        assert not any(
            c['parameter'] == 'train_sampling_strategy'
            for c in json.loads((run.path / 'plan.json').read_text())['changes']
        )
    tokens = sum(lib.make_examples(data.train, model.formatter, 512).lengths)
    assert tokens <= computed[True] < computed[False]
