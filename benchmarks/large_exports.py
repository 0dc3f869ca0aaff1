"""Exports of a large model: how long each takes, what it weighs, and what its certificate says.

    python benchmarks/large_exports.py --model FOLDER [--kinds adapter merged_16bit merged_4bit] [--nf4] [--steps 4] [--out FILE]

A few training steps make the adapter; what is measured does not depend on how well it has learned."""

import argparse
import tempfile
import time
from pathlib import Path
import unsloth_nb as u
from unsloth_nb.planning.devices import peak_memory, reset_peak
from unsloth_nb.core.engine import device_info, versions
from unsloth_nb.runs.run import fingerprint, write_json


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--kinds', nargs='*', default=['adapter', 'merged_16bit', 'merged_4bit'])
    p.add_argument('--nf4', action='store_true')
    p.add_argument('--steps', type=int, default=4)
    p.add_argument('--runs-dir', type=Path)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    job = u.FinetuneJob(
        model=a.model,
        max_steps=a.steps,
        max_rows=8 * a.steps,
        test_size=4,
        warmup_steps=1,
        learning_rate=2e-3,
        max_seq_length=512,
        max_new_tokens=32,
        load_in_4bit=a.nf4,
        save_steps=None,
    )
    data = u.load_data(job)
    model = u.load_model(job, u.make_plan(job, data))
    with tempfile.TemporaryDirectory(dir=a.runs_dir) as tmp:
        run = u.start_run(job, tmp)
        u.train(model, u.make_examples(data.train, model.formatter, job.max_seq_length), job, run)
        res = dict(
            date=time.strftime('%Y-%m-%d'),
            device=device_info().name,
            versions=versions(),
            parameters=model.parameters[1],
            nf4=a.nf4,
            exports={},
        )
        for to in a.kinds:
            reset_peak(model.plan.device.kind)
            start = time.time()
            try:
                cert = u.save_artifact(model, run, to, data.test)
            except (u.ExportError, RuntimeError) as e:
                res['exports'][to] = dict(refused=str(e), seconds=time.time() - start)
            else:
                res['exports'][to] = dict(
                    seconds=time.time() - start,
                    bytes=sum(f['bytes'] for f in fingerprint(run.path / to).values()),
                    peak_bytes=peak_memory(model.plan.device.kind),
                    certificate=cert,
                )
            print(to, res['exports'][to], flush=True)
            if a.out:
                write_json(a.out, res)


if __name__ == '__main__':
    main()
