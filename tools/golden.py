"""Golden traces: a few seeded steps on the embedded model, against those on record in `tests/golden/`, one file a kind of device.

`tools/golden.py` compares and says what parted, where and by how much; exit code 1 if anything did. `--json` prints the
traces of this environment. `--write` records them anew, and refuses what lies outside the bands unless `--accept` is given.

The bands are relative to the recorded value. Processors differ in the order of their sums. Measured with every library held
to AVX2 instead of AVX-512: in float32 5.5e-6 in the loss and 1.9e-6 in the gradient norm over the six steps; in bfloat16,
which rounds each sum to three digits, 1.0% and 1.4%. The bands are three times that in bfloat16 and more in float32, where
other processors were not tried. QLoRA's adapter is kept in bfloat16 by the trainer, and its gradient norm has three digits.
On the processor and with the versions of the record there is no band: the bits must be the same. One thread or two made
no difference to them there; with AMX it does. On a GPU, 16-bit sums may come in another order in each run, and the bands are those of a replay."""

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / 'tests' / 'golden'
COMMON = dict(
    max_rows=24,
    test_size=4,
    max_steps=6,
    warmup_steps=1,
    learning_rate=5e-4,
    max_seq_length=256,
    optim='adamw_torch_fused',
    gradient_checkpointing=False,
    packing=False,
    padding_free=False,
)


def configurations(kind):
    "Parameters by name; on a GPU all in bfloat16, which is what trains there"
    exact = 'float32' if kind == 'cpu' else 'bfloat16'
    return dict(
        lora=COMMON
        | dict(dtype='bfloat16', load_in_4bit=False, per_device_train_batch_size=4, gradient_accumulation_steps=1),
        qlora=COMMON
        | dict(dtype=exact, load_in_4bit=True, per_device_train_batch_size=2, gradient_accumulation_steps=1),
        dropout=COMMON
        | dict(
            dtype=exact,
            load_in_4bit=False,
            lora_dropout=0.1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
        ),
    )


def bands(name, kind):
    "How far a curve may be from its record"
    if kind != 'cpu':
        return dict(loss=0.02, grad_norm=0.2)
    return dict(
        lora=dict(loss=0.03, grad_norm=0.05),
        qlora=dict(loss=1e-4, grad_norm=0.01),
        dropout=dict(loss=1e-4, grad_norm=1e-3),
    )[name]


def weights(model):
    "SHA-256 of all trained weights"
    h = hashlib.sha256()
    for n, p in sorted(model.named_parameters()):
        if p.requires_grad:
            h.update(n.encode() + p.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()


def trace(params, bands, folder, kind):
    "Train the steps; loss and gradient norm of each, and the hash of the adapter where the device repeats its bits"
    from unsloth_nb import FinetuneJob, load_data, load_model, make_examples, make_plan, start_run, train
    from unsloth_nb.training.trainer import Live

    job = FinetuneJob(**params)
    data = load_data(job)
    model = load_model(job, make_plan(job, data, runs_dir=folder))
    run = start_run(job, folder)
    live = Live()
    live.out = sys.stderr
    train(model, make_examples(data.train, model.formatter, job.max_seq_length), job, run, live)
    return dict(
        parameters=params,
        bands=bands,
        **{k: [m[k] for m in run.metrics] for k in ('loss', 'grad_norm')},
        adapter=weights(model.model) if kind == 'cpu' else None,
    )


def processor():
    "What decides the order of sums: the processor's model, and the vector unit that torch takes"
    import torch

    try:
        lines = [l.split(':', 1) for l in open('/proc/cpuinfo').read().split('\n\n')[0].splitlines()]
    except OSError:
        lines = []
    info = {k.strip(): v.strip() for k, v in lines}
    return ' '.join(
        [
            *(info[k] for k in ('vendor_id', 'cpu family', 'model', 'stepping') if k in info),
            torch.backends.cpu.get_cpu_capability(),
        ]
    )


def record():
    "The traces of this environment, with everything that may explain a difference; bfloat16 is left out where it is emulated, at a minute a step"
    sys.path.insert(0, str(ROOT))
    from importlib.metadata import distributions
    from unsloth_nb.core.engine import start_engine, versions

    dev = start_engine()
    if dev.kind != 'cpu':
        os.environ['UNSLOTH_BLOCK_COMPILE'] = '0'  # Compiled blocks draw dropout and round otherwise; read at each call
    todo = {n: p for n, p in configurations(dev.kind).items() if dev.bf16 or p['dtype'] != 'bfloat16'}
    with tempfile.TemporaryDirectory() as folder:
        traces = {n: trace(p, bands(n, dev.kind), folder, dev.kind) for n, p in todo.items()}
    return dict(
        date=time.strftime('%Y-%m-%d'),
        device=dict(kind=dev.kind, name=dev.name, processor=processor()),
        versions=versions(),
        left_out=sorted(configurations(dev.kind).keys() - todo.keys()),
        packages={d.metadata['Name'].lower(): d.version for d in distributions()},
        traces=traces,
    )


def path(kind):
    return HOME / f'{kind}.json'


def read(kind):
    return json.loads(path(kind).read_text()) if path(kind).exists() else None


def changed(want, got, what='versions'):
    "Versions that differ, in words"
    return [
        f'{n} {want[what].get(n, "absent")} -> {got[what].get(n, "absent")}'
        for n in sorted(want[what].keys() | got[what].keys())
        if want[what].get(n) != got[what].get(n)
    ]


def apart(x, y):
    "Relative to the first; infinite where only one is a number"
    if x == y or (x != x and y != y):
        return 0.0
    return abs(x - y) / abs(x) if x and math.isfinite(x) and math.isfinite(y) else math.inf


def first_outside(want, got, bands):
    "The first step at which a curve leaves its band, in words"
    for i, _ in enumerate(want['loss']):
        for k in ('loss', 'grad_norm'):
            x = want[k][i]
            y = got[k][i] if i < len(got[k]) else math.nan
            if apart(x, y) > bands[k]:
                return f'{k} parts at step {i + 1}: {x:.6g} on record, {y:.6g} now, {100 * apart(x, y):.3g}% apart, {100 * bands[k]:.3g}% allowed'


def exact(want, got):
    "Do both come from the same processor and versions, so that every bit must be the same?"
    return want['device'] == got['device'] and got['device']['kind'] == 'cpu' and not changed(want, got)


def parted(want, got):
    "What parted from the record, a line each; nothing when all is as recorded"
    res = []
    for n, w in want['traces'].items():
        if n in got['left_out']:
            continue
        g = got['traces'].get(n)
        if g is None:
            res.append(f'{n}: is on record, and there is no such configuration now')
        elif g['parameters'] != w['parameters']:
            res.append(
                f'{n}: its parameters are not those on record: '
                + ', '.join(
                    k
                    for k in {**w['parameters'], **g['parameters']}
                    if w['parameters'].get(k) != g['parameters'].get(k)
                )
            )
        elif why := first_outside(w, g, w['bands']):
            res.append(f'{n}: {why}')
        elif exact(want, got) and (
            why := first_outside(w, g, dict(loss=0, grad_norm=0))
            or (w['adapter'] != g['adapter'] and 'other adapter weights')
        ):
            res.append(
                f'{n}: within its bands, but not the same bits on the same processor with the same versions: {why}'
            )
    return res + [f'{n}: is not on record' for n in got['traces'] if n not in want['traces']]


def whose(want, got):
    "Ours or theirs, as far as the versions tell"
    diff = changed(want, got)
    return 'their release: ' + ', '.join(diff) if diff else 'our change: all versions are those on record'


def report(want, got):
    "What parted and whose it is, as text; empty when nothing did"
    bad = parted(want, got)
    here = (
        ''
        if want['device'] == got['device']
        else f"\nrecorded on {want['device']['name']} ({want['device']['processor']}), this is {got['device']['name']} ({got['device']['processor']})"
    )
    return (
        '\n'.join(
            [
                f"not as recorded on {want['date']}",
                *(f'  {b}' for b in bad),
                f'most likely {whose(want, got)}{here}',
                'If it is meant: tools/golden.py --write, with --accept outside the bands.',
            ]
        )
        if bad
        else ''
    )


def write(got, accept):
    "Record traces; refuses what lies outside the bands, and a record that lacks a configuration"
    kind = got['device']['kind']
    if got['left_out']:
        sys.exit(f"not recorded: this device emulates bfloat16, so there is no trace of {', '.join(got['left_out'])}")
    want = read(kind)
    bad = [b for b in parted(want, got) if 'within its bands' not in b and 'not on record' not in b] if want else []
    if bad and not accept:
        sys.exit(report(want, got) + '\nnot recorded')
    tmp = path(kind).with_suffix('.new')
    tmp.write_text(json.dumps({k: v for k, v in got.items() if k not in ('packages', 'left_out')}, indent=1) + '\n')
    os.replace(tmp, path(kind))
    print(f'{path(kind).name}: recorded', *bad, sep='\n  accepted: ')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, why in (
        ('json', 'print the traces of this environment'),
        ('write', 'record them'),
        ('accept', 'record them outside the bands as well'),
    ):
        p.add_argument(f'--{flag}', action='store_true', help=why)
    a = p.parse_args(argv)
    got = record()
    if a.json:
        return print(json.dumps(got))
    if a.write:
        return write(got, a.accept)
    if (want := read(got['device']['kind'])) is None:
        sys.exit(f"there is no record for {got['device']['kind']}: tools/golden.py --write makes one")
    if why := report(want, got):
        sys.exit(why)
    print(
        f"as recorded on {want['date']}: {', '.join(got['traces'])}"
        + (', to the last bit' if exact(want, got) else ', within the bands')
    )


if __name__ == '__main__':
    main()
