"""Every form of export of one finished run, side by side: what its certificate says, and how many held-out rows the software that will use it answers exactly.

    python benchmarks/exports.py RUN [--kinds adapter merged_16bit …] [--rows 64] [--vllm] [--out FILE]

Each form is exported with its certificate, then loaded once more by a fresh process (transformers, PEFT or llama.cpp; with --vllm also by vLLM, where it loads the form), which answers all the rows, one by one, greedily."""

import argparse
import platform
import time
from pathlib import Path
import unsloth_nb as u
from unsloth_nb.core.engine import device_info, versions
from unsloth_nb.export.certificate import make_request
from unsloth_nb.export.artifacts import witness_spec, vllm_spec
from unsloth_nb.runs.run import fingerprint, start_run, write_json
from unsloth_nb.core.spec import EXPORTS, ExportJob
from unsloth_nb.export.witness import ask_witness


def exact(model, tok, rows, said):
    "Share of rows answered exactly"
    right = [
        model.formatter.answer(c).strip() == tok.decode(g['ids'], skip_special_tokens=True).strip()
        for c, g in zip(rows, said['greedy'])
    ]
    return sum(right) / len(right)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run')
    p.add_argument('--kinds', nargs='*', default=list(EXPORTS))
    p.add_argument('--rows', type=int, default=64)
    p.add_argument('--check-rows', type=int, default=8)
    p.add_argument('--out', type=Path)
    p.add_argument('--vllm', action='store_true')
    a = p.parse_args()
    source = u.open_run(a.run, kind='finetune')
    model = u.load_run(source)
    rows = u.held_out(source.job, n=a.rows)
    in_memory = [
        x.text.strip() == model.formatter.answer(c).strip()
        for x, c in zip(u.generate(model, list(rows), u.Sampling(max_new_tokens=source.job.max_new_tokens)), rows)
    ]
    res = dict(
        date=time.strftime('%Y-%m-%d'),
        run=source.name,
        model=source.job.model,
        rows=len(rows),
        check_rows=a.check_rows,
        device=device_info().name,
        machine=platform.machine(),
        versions=versions(),
        in_memory=sum(in_memory) / len(rows),
        exports={},
    )
    print(f"in memory: {res['in_memory']:.3f} exact of {len(rows)}", flush=True)
    for to in a.kinds:
        start = time.time()
        tok = model.exported_tokenizer(to == 'adapter')
        vllm = a.vllm and to in ('adapter', 'merged_16bit')
        record = start_run(ExportJob(run=source.name, to=to, check_rows=a.check_rows, vllm=vllm), source.path.parent)
        try:
            cert = u.save_artifact(model, record, to, rows[: a.check_rows], source, vllm)
        except (u.ExportError, RuntimeError) as e:
            record.fail(str(e))
            res['exports'][to] = dict(refused=str(e))
            print(f'{to}: refused: {e}', flush=True)
            continue
        seconds = time.time() - start
        place = record.path / to
        request = dict(make_request(model, rows, tok), examples=[], max_new_tokens=source.job.max_new_tokens)
        said = ask_witness(
            'gguf' if 'gguf' in to else 'transformers',
            witness_spec(model, place / 'model.gguf' if 'gguf' in to else place, to),
            request,
        )
        size = sum(f['bytes'] for f in fingerprint(place).values())
        record.finish(certificate=cert, run=source.name)
        res['exports'][to] = dict(exact=exact(model, tok, rows, said), seconds=seconds, bytes=size, certificate=cert)
        if vllm:
            res['exports'][to]['exact_by_vllm'] = exact(
                model, tok, rows, ask_witness('vllm', vllm_spec(model, place), request)
            )
        print(
            f"{to}: {res['exports'][to]['exact']:.3f} exact, {size / 1e6:.0f} MB, exported in {seconds:.0f} s{', by vLLM {:.3f} exact'.format(res['exports'][to]['exact_by_vllm']) if vllm else ''}\n{cert}",
            flush=True,
        )
    if a.out:
        write_json(a.out, res)


if __name__ == '__main__':
    main()
