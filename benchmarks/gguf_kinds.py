"""Each kind of GGUF against the model that it was made from, through each binding of llama.cpp that is installed.

    python benchmarks/gguf_kinds.py result.json

Seconds to make and size of the file, and how far llama.cpp's answers are from those of transformers in float32, on
the embedded model and prompts of the `events` dataset: share of positions with the same likeliest token, differences
of log-probabilities of the five likeliest tokens, and whether greedy answers, tokens and rendered prompts are the same.
"""

import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

from unsloth_nb.export.gguf import (
    BINDINGS,
    CONVERTER,
    GGUF_KINDS,
    GgufError,
    check_gguf_kind,
    install_converter,
    llama_cpp_answers,
    write_gguf,
)
from unsloth_nb.training.loading import embedded_model

PROBES = [
    'a  12',
    '  \n 1',
    "I've 'told",
    'naïve 😀\n\n  x',
    '٣٤ 12½ ²',
    '漢字 12',
    '\t1 \r\n',
    '<|im_start|>user\nhi<|im_end|>',
]
NEW = 32
PROMPTS = 6  # tokens, prompts


def reference():
    "The request, and what transformers answers"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from unsloth_nb.data.events import make_events

    tok = AutoTokenizer.from_pretrained(embedded_model())
    net = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    prompts = []
    examples = []
    want = []
    for row in make_events(PROMPTS):
        messages = row['messages'][:-1]
        ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            full = net.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()
            lp = net(torch.tensor([full])).logits[0].log_softmax(-1)
        at = list(range(len(ids), len(full)))
        top = [lp[a - 1].topk(5) for a in at]
        prompts.append(dict(messages=messages, tools=None, ids=ids))
        examples.append(dict(input_ids=full, at=at, ids=[t.indices.tolist() for t in top]))
        want.append([t.values.tolist() for t in top])
    return (
        dict(examples=examples, prompts=prompts, max_new_tokens=NEW, probes=PROBES),
        want,
        [tok.encode(t, add_special_tokens=False) for t in PROBES],
    )


def compare(answer, request, want, probes):
    diffs = [abs(x - y) for a, b in zip(answer['logprobs'], want) for p, q in zip(a, b) for x, y in zip(p, q)]
    first = [c == ids[0] for a, e in zip(answer['choice'], request['examples']) for c, ids in zip(a, e['ids'])]
    greedy = [
        g['ids'] == [i for i in e['input_ids'][e['at'][0] :] if i not in answer['eos']]
        for g, e in zip(answer['greedy'], request['examples'])
    ]
    return dict(
        software=answer['software'],
        positions=len(first),
        same_choice=sum(first) / len(first),
        mean_difference=sum(diffs) / len(diffs),
        max_difference=max(diffs),  # [nats]
        same_greedy=sum(greedy),
        prompts=len(greedy),
        same_tokens=answer['probes'] == probes,
        same_prompts=answer['rendered'] == [p['ids'] for p in request['prompts']],
    )


def main(out):
    install_converter()
    request, want, probes = reference()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for kind in GGUF_KINDS:
            try:
                check_gguf_kind(kind)
            except GgufError as e:
                print(e)
                continue
            file = Path(tmp) / f'{kind}.gguf'
            start = time.perf_counter()
            info = write_gguf(embedded_model(), file, kind)
            seconds = time.perf_counter() - start
            for b in BINDINGS:
                if not importlib.util.find_spec(b):
                    continue
                start = time.perf_counter()
                answer = llama_cpp_answers(file, request, b)
                rows.append(
                    dict(
                        kind=kind,
                        bytes=info.bytes,
                        types=info.types,
                        write_seconds=round(seconds, 1),
                        answer_seconds=round(time.perf_counter() - start, 1),
                    )
                    | compare(answer, request, want, probes)
                )
                print(json.dumps(rows[-1]))
            file.unlink()
    versions = {
        n: importlib.metadata.version(n)
        for n in (
            'torch',
            'transformers',
            'gguf',
            *(v.package for k, v in BINDINGS.items() if importlib.util.find_spec(k)),
        )
    }
    Path(out).write_text(
        json.dumps(
            dict(
                model='smollm2-135m',
                machine=platform.machine(),
                python=platform.python_version(),
                converter='{name} {version}'.format(**CONVERTER),
                versions=versions,
                rows=rows,
            ),
            indent=1,
        )
        + '\n'
    )


if __name__ == '__main__':
    main(sys.argv[1])
