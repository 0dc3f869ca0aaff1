"""Batched generation by this package against transformers' own `generate`: the same model, prompts and greedy answers.

    python benchmarks/generation.py [--model smollm2-135m] [--prompts 16] [--max-new-tokens 32] [--batch-size 16] [--rounds 2] [--out FILE]

Ways, each in a process of its own, in turn, the order reversed in every other round:

    ours          this package: batches by length, Unsloth's inference path where there is a GPU, no adapter
    ours_adapter  the same with a LoRA adapter on every linear layer, as after training
    plain_batch   transformers, Unsloth not imported: batches in the order of the prompts, padded on the left
    plain_single  transformers, one prompt at a time

Prompts are of mixed lengths. The clock runs from text to text, after a warm-up of two short answers; loading is not in it. The
figures are medians over the rounds; tokens per second of processor time are given too, which other work on the machine disturbs less. Answers may differ in 16 bits, where a batch of another shape is rounded at other places: how
many are equal to those of `plain_single` is counted. Peak memory is of the GPU, weights included; on a CPU, of the whole process."""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ('ours', 'ours_adapter', 'plain_batch', 'plain_single')


def prompts(n):
    "Questions of one to eight notes, so that lengths differ"
    from unsloth_nb.data.load import load_data
    from unsloth_nb.core.spec import FinetuneJob

    rows = load_data(FinetuneJob(max_rows=600, test_size=10)).train
    rng = random.Random(0)
    notes = [c.messages[-2]['content'] for c in rows]
    return [
        'Write a short story about these notes.\n' + '\n'.join(rng.sample(notes, rng.randint(1, 8))) for _ in range(n)
    ]


def job_of(a):
    from unsloth_nb.core.spec import FinetuneJob

    return FinetuneJob(model=a.model, max_seq_length=4096, gradient_checkpointing=False, load_in_4bit=False)


def ours(a, texts, adapter):
    "This package's `generate`; returns a function of texts and length to (answers, tokens)"
    from unsloth_nb import Sampling, generate, load_model, make_plan
    from unsloth_nb.core.engine import start_engine
    from unsloth_nb.training.loading import LoadedModel, _from_pretrained, _ready, locate

    start_engine()
    job = job_of(a)
    plan = make_plan(job)
    if adapter:
        model = load_model(job, plan)
    else:
        net, tok = _from_pretrained(locate(job), plan)
        model = LoadedModel(net, _ready(tok, job), locate(job), plan, job)

    def run(texts, n):
        got = generate(model, texts, Sampling(max_new_tokens=n), batch_size=a.batch_size)
        return [g.text for g in got], got.tokens

    return run, str(model.model.dtype)


def plain(a, texts, size):
    "transformers' `generate` on the same prompts"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    spec = json.loads(Path(a.spec).read_text())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tok = AutoTokenizer.from_pretrained(spec['folder'], padding_side='left')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    tok.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(spec['folder'], dtype=getattr(torch, spec['dtype'])).to(device).eval()

    def run(texts, n):
        config = GenerationConfig(
            do_sample=False, max_new_tokens=n, eos_token_id=spec['stops'], pad_token_id=tok.pad_token_id
        )
        answers = []
        tokens = 0
        for at in range(0, len(texts), size):
            x = tok(
                [
                    tok.apply_chat_template([dict(role='user', content=t)], tokenize=False, add_generation_prompt=True)
                    if tok.chat_template
                    else spec['prompts'][t]
                    for t in texts[at : at + size]
                ],
                padding=True,
                return_tensors='pt',
                add_special_tokens=False,
            ).to(device)
            with torch.inference_mode():
                y = model.generate(**x, generation_config=config)[:, x['input_ids'].shape[1] :].tolist()
            for ids in y:
                end = next((i for i, t in enumerate(ids) if t in spec['stops']), None)
                tokens += len(ids) if end is None else end + 1
                answers.append(tok.decode(ids[:end], skip_special_tokens=True))
        return answers, tokens

    return run, str(model.dtype)


def one(a):
    "A way, in this process"
    texts = json.loads(Path(a.spec).read_text())['texts']
    run, dtype = (
        ours(a, texts, a.way == 'ours_adapter')
        if a.way.startswith('ours')
        else plain(a, texts, a.batch_size if a.way == 'plain_batch' else 1)
    )
    import torch
    from unsloth_nb.planning.devices import peak_memory

    run(texts[:2], 4)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    cpu = time.process_time()
    answers, tokens = run(texts, a.max_new_tokens)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    peak = peak_memory('cuda' if torch.cuda.is_available() else 'cpu')
    assert a.way.startswith('ours') or 'unsloth' not in sys.modules
    Path(a.result).write_text(
        json.dumps(
            dict(
                way=a.way,
                seconds=seconds,
                cpu_seconds=cpu,
                tokens=tokens,
                peak_bytes=peak,
                dtype=dtype,
                answers=answers,
            )
        )
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--model', default='smollm2-135m')
    p.add_argument('--prompts', type=int, default=16)
    p.add_argument('--max-new-tokens', type=int, default=32)
    p.add_argument('--batch-size', type=int, default=16)
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS)
    p.add_argument('--out')
    for hidden in ('--way', '--spec', '--result'):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.way:
        return one(a)
    from unsloth_nb import Formatter, load_tokenizer, make_plan
    from unsloth_nb.core.engine import device_info, versions
    from unsloth_nb.training.loading import locate

    job = job_of(a)
    fmt = Formatter(load_tokenizer(job, engine=False))
    texts = prompts(a.prompts)
    rounds = {w: [] for w in a.ways}
    drawn = {t: fmt.prompt([dict(role='user', content=t)]) for t in texts}
    lengths = [len(fmt.prompt_ids([dict(role='user', content=t)])) for t in texts]
    with tempfile.TemporaryDirectory() as tmp:
        spec = Path(tmp) / 'spec.json'
        result = Path(tmp) / 'result.json'
        spec.write_text(
            json.dumps(
                dict(
                    texts=texts,
                    folder=locate(job).path,
                    dtype=make_plan(job).dtype,
                    stops=fmt.stop_ids(),
                    prompts=drawn,
                )
            )
        )
        for r in range(a.rounds):
            for way in a.ways[:: 1 if r % 2 == 0 else -1]:
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        '--model',
                        a.model,
                        '--max-new-tokens',
                        str(a.max_new_tokens),
                        '--batch-size',
                        str(a.batch_size),
                        '--way',
                        way,
                        '--spec',
                        str(spec),
                        '--result',
                        str(result),
                    ],
                    check=True,
                )
                rounds[way].append(json.loads(result.read_text()))
                print(
                    f"round {r + 1} {way}: {rounds[way][-1]['tokens'] / rounds[way][-1]['seconds']:,.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    reference = rounds[a.ways[-1]][0]['answers']
    ways = {
        w: dict(
            tokens_per_second=round(statistics.median(r['tokens'] / r['seconds'] for r in rs), 1),
            rounds=[round(r['tokens'] / r['seconds'], 1) for r in rs],
            tokens_per_cpu_second=round(statistics.median(r['tokens'] / r['cpu_seconds'] for r in rs), 1),
            tokens=rs[0]['tokens'],
            peak_gib=round(max(r['peak_bytes'] for r in rs) / 2**30, 2),
            equal_answers=sum(x == y for x, y in zip(rs[0]['answers'], reference)),
            dtype=rs[0]['dtype'],
        )
        for w, rs in rounds.items()
    }
    res = dict(
        date=time.strftime('%Y-%m-%d'),
        device=device_info().name,
        model=Path(a.model).name,
        prompts=a.prompts,
        prompt_tokens=[min(lengths), max(lengths), sum(lengths)],
        max_new_tokens=a.max_new_tokens,
        batch_size=a.batch_size,
        ways=ways,
        versions=versions(),
    )
    print(json.dumps(res, indent=1))
    if a.out:
        Path(a.out).write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
