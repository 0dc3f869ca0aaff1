"""What each lever gives to speed and memory: one model, many ways to train it, one after the other in one process.

    python benchmarks/levers.py MODEL_FOLDER DATASET [--only NAME …] [--steps 16]

Needs a CUDA GPU. Every way starts from the same adapter and trains on the same rows in the same order. Speed is taken from the second half
of the steps. CUDA graphs, a lever that the package does not use, are here: the decoder's forward and backward pass are captured once for
each length of a flat batch, and replayed. MODEL_FOLDER may hold random weights (`random_model` of unsloth_nb.jobs.benchmarking)."""

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MethodType

from unsloth_nb.core.engine import device_info, quiet, start_engine, versions

start_engine()
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from unsloth_nb import FinetuneJob, Formatter, load_data, load_model, make_examples, make_plan
from unsloth_nb.tokens.batching import pack
from unsloth_nb.training.padding_free import FlatCollator, padding_free
from unsloth_nb.training.trainer import trainer_arguments


class StaticCollator(FlatCollator):
    "Flat batches of a few fixed lengths and one fixed number of examples, as graphs need them; the rest is padding"

    def __init__(self, count, longest, length=None):
        self.count = count
        self.longest = longest
        self.length = length

    def __call__(self, rows):
        b = super().__call__(rows)
        n = b['input_ids'].shape[1]
        step = max(64, 1 << max(0, n.bit_length() - 4))
        total = self.length or -(-n // step) * step
        pad = total - n
        tail = [min(self.longest, pad - i) for i in range(0, pad, self.longest)]
        starts = b['cu_seqlens'].tolist()
        for t in tail:
            starts.append(starts[-1] + t)
        assert len(starts) <= self.count + 1, 'more examples in a batch than there is room for'

        def fill(k, v):
            return torch.cat([b[k], torch.full((1, pad), v)], 1)

        return dict(
            input_ids=fill('input_ids', 0),
            labels=fill('labels', -100),
            attention_mask=fill('attention_mask', 0),
            position_ids=torch.cat([b['position_ids'], *(torch.arange(t)[None] for t in tail)], 1),
            cu_seqlens=torch.tensor(starts + [total] * (self.count + 1 - len(starts)), dtype=torch.int32),
        )


class Replay(torch.autograd.Function):
    "A captured forward pass; its backward adds to gradients that stay where they are"

    @staticmethod
    def forward(ctx, anchor, owner, g):
        g['forward'].replay()
        ctx.owner = owner
        ctx.g = g
        return g['hidden'].clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.g['grad'].copy_(grad)
        ctx.owner.attach()
        ctx.g['backward'].replay()
        return None, None, None


class Graphs:
    "Runs a decoder by CUDA graphs, one for each length of batch that comes a second time"

    def __init__(self, model):
        self.core = model.get_base_model().model
        self.forward = self.core.forward
        self.graphs = {}
        self.seen = set()
        self.pool = None
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.sums = [torch.zeros_like(p) for p in self.params]
        self.anchor = torch.zeros((), device='cuda', requires_grad=True)

    def __call__(self, core, input_ids=None, position_ids=None, cu_seqlens=None, attention_mask=None, **kw):
        given = (input_ids, position_ids, cu_seqlens)
        n = input_ids.shape[1]
        if n not in self.seen:
            self.seen.add(n)
            return self.run(given, kw)
        if n not in self.graphs:
            self.graphs[n] = self.capture(given, kw)
        g = self.graphs[n]
        for held, x in zip(g['inputs'], given):
            held.copy_(x)
        return BaseModelOutputWithPast(last_hidden_state=Replay.apply(self.anchor, self, g))

    def run(self, given, kw):
        ids, positions, cu = given
        return self.forward(
            input_ids=ids, position_ids=positions, cu_seqlens=cu, attention_mask=torch.ones(1, 1, device='cuda'), **kw
        )

    def capture(self, given, kw):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        g = dict(inputs=[x.clone() for x in given], forward=torch.cuda.CUDAGraph(), backward=torch.cuda.CUDAGraph())
        with torch.cuda.graph(g['forward'], pool=self.pool, capture_error_mode='thread_local'):
            hidden = self.run(g['inputs'], kw)[0]
        g['grad'] = torch.zeros_like(hidden)
        with torch.cuda.graph(g['backward'], pool=self.pool, capture_error_mode='thread_local'):
            torch._foreach_add_(self.sums, list(torch.autograd.grad(hidden, self.params, g['grad'])))
        return g | dict(hidden=hidden.detach())

    def attach(self):
        "After a step the optimizer has dropped the gradients: begin at what was accumulated since, or at zero"
        fresh = [(p, s) for p, s in zip(self.params, self.sums) if p.grad is not s]
        for p, s in fresh:
            s.copy_(p.grad) if p.grad is not None else s.zero_()
            p.grad = s


@contextmanager
def graphs(model, longest):
    "Train padding-free inside, by CUDA graphs"
    with padding_free(model, longest):
        core = model.get_base_model().model
        owner = Graphs(model)
        flat, core.forward = core.forward, MethodType(lambda core, *a, **kw: owner(core, *a, **kw), core)
        try:
            yield
        finally:
            core.forward = flat


class Clock(TrainerCallback):
    "Seconds, losses and gradient norms of each step"

    def __init__(self):
        self.seconds = []
        self.losses = []
        self.grad_norms = []
        self.last = None

    def on_step_begin(self, args, state, control, **kw):
        self.last = self.last or time.perf_counter()

    def on_step_end(self, args, state, control, **kw):
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def on_log(self, args, state, control, logs=None, **kw):
        if 'loss' in logs:
            self.losses.append(logs['loss'])
            self.grad_norms.append(logs['grad_norm'])


def clean():
    gc.collect()
    torch.cuda.empty_cache()


def loaded(folder, bits, checkpointing):
    "The model with its adapter as it began"
    job = FinetuneJob(model=folder, load_in_4bit=bits == 4, gradient_checkpointing=checkpointing)
    m = load_model(job, make_plan(job))
    m.start = [p.detach().clone() for p in m.model.parameters() if p.requires_grad]
    clean()
    return m


def measure(m, rows, plan, layout, compiled, steps, longest):
    "One way: speed, memory, losses"
    for p, x in zip((p for p in m.model.parameters() if p.requires_grad), m.start):
        p.data.copy_(x)
        p.grad = None
    m.model._unsloth_gradient_checkpointing = plan.gradient_checkpointing
    FastLanguageModel.for_training(m.model, use_gradient_checkpointing=plan.gradient_checkpointing)
    os.environ['UNSLOTH_BLOCK_COMPILE'] = '1' if compiled else '0'
    job = m.job.replace(max_steps=steps, learning_rate=1e-4, warmup_steps=0, lr_scheduler_type='constant')
    count = plan.per_device_train_batch_size * max(len(r.get('seq_lengths', [0])) for r in rows) + 8
    clock = Clock()
    tokens = []
    flat = StaticCollator(
        count, longest, plan.per_device_train_batch_size * plan.max_seq_length if plan.packing else None
    )
    collator = dict(
        padded=DataCollatorForSeq2Seq(m.tok, padding=True, label_pad_token_id=-100),
        unsloth=None,
        flat=flat,
        graphs=flat,
    )[layout]
    around = dict(flat=padding_free, graphs=graphs).get(layout)
    with tempfile.TemporaryDirectory() as tmp:
        args = trainer_arguments(job, replace(plan, padding_free=layout in ('flat', 'graphs')), tmp) | dict(
            include_num_input_tokens_seen='no'
        )
        with quiet():
            t = SFTTrainer(
                model=m.model,
                processing_class=m.tok,
                train_dataset=Dataset.from_list(rows),
                args=SFTConfig(**args),
                data_collator=collator,
            )
        t.remove_callback(PrinterCallback)
        t.add_callback(clock)
        inner, t.data_collator = (
            t.data_collator,
            lambda rs: (tokens.append(sum(len(r['input_ids']) for r in rs)), inner(rs))[1],
        )
        clean()
        torch.cuda.reset_peak_memory_stats()
        with quiet(), around(m.model, longest) if around else nullcontext():
            t.train()
    passes = plan.gradient_accumulation_steps
    half = steps // 2
    per = [sum(tokens[i * passes : (i + 1) * passes]) for i in range(steps)]
    return dict(
        tokens_per_second=sum(per[half:]) / sum(clock.seconds[half:]),
        step_seconds_median=sorted(clock.seconds[half:])[(steps - half) // 2],
        peak_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
        tokens=per,
        seconds=clock.seconds,
        losses=clock.losses,
        grad_norms=clock.grad_norms,
    )


FUSED = 'adamw_torch_fused'
EIGHT = 'adamw_8bit'
WAYS = {  # bits, checkpointing, rows, passes, packed, optimizer, layout, layers compiled by Unsloth
    'classic': (4, 'unsloth', 2, 4, False, EIGHT, 'padded', True),
    '16bit': (16, False, 8, 1, False, EIGHT, 'padded', True),
    '16bit fused': (16, False, 8, 1, False, FUSED, 'padded', True),
    '16bit fused, not compiled': (16, False, 8, 1, False, FUSED, 'padded', False),
    'padding-free': (16, False, 8, 1, False, FUSED, 'flat', False),
    'padding-free, compiled': (16, False, 8, 1, False, FUSED, 'flat', True),
    'graphs': (16, False, 8, 1, False, FUSED, 'graphs', False),
    'graphs, 8-bit optimizer': (16, False, 8, 1, False, EIGHT, 'graphs', False),
    'packed by Unsloth': (16, False, 4, 1, True, FUSED, 'unsloth', True),
    'packed': (16, False, 4, 1, True, FUSED, 'flat', False),
    'packed, graphs': (16, False, 4, 1, True, FUSED, 'graphs', False),
    'packed, 8 rows': (16, False, 8, 1, True, FUSED, 'flat', False),
    'packed, checkpointing': (16, 'unsloth', 4, 1, True, FUSED, 'flat', False),
    'nf4 padding-free': (4, False, 8, 1, False, FUSED, 'flat', False),
    'nf4 graphs': (4, False, 8, 1, False, FUSED, 'graphs', False),
    'nf4 packed': (4, False, 4, 1, True, FUSED, 'flat', False),
}


def packed(rows, lengths, limit):
    "Rows filled to a limit"

    def join(k, row):
        return [t for i in row for t in rows[i][k]]

    return [
        dict(input_ids=join('input_ids', row), labels=join('labels', row), seq_lengths=[lengths[i] for i in row])
        for row in pack(lengths, limit)
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('model')
    p.add_argument('dataset')
    p.add_argument('--only', nargs='+', choices=WAYS, default=list(WAYS))
    p.add_argument('--steps', type=int, default=16)
    a = p.parse_args()
    job = FinetuneJob(model=a.model, dataset=a.dataset, template='alpaca', over_length='truncate')
    data = load_data(job, split=False)
    out = []
    held = None
    key = None
    for name in a.only:
        bits, checkpointing, rows, passes, fill, optim, layout, compiled = WAYS[name]
        try:
            if key != (bits, checkpointing):
                held = None
                clean()
                held = loaded(a.model, bits, checkpointing)
                key = (bits, checkpointing)
                examples = make_examples(
                    data.train, Formatter.for_job(job, held.tok), job.max_seq_length, job.over_length
                )
                plain = examples.table().to_pylist()
                lengths = examples.lengths.tolist()
            plan = replace(
                held.plan,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=passes,
                gradient_checkpointing=checkpointing,
                optim=optim,
                packing=fill,
            )
            got = measure(
                held,
                packed(plain, lengths, plan.max_seq_length) if fill else plain,
                plan,
                layout,
                compiled,
                a.steps,
                max(lengths),
            )
        except Exception as e:
            got = dict(error=f'{type(e).__name__}: {e}', trace=traceback.format_exc()[-1500:])
        out.append(
            dict(
                name=name,
                bits=bits,
                checkpointing=checkpointing,
                rows=rows,
                passes=passes,
                packed=fill,
                optim=optim,
                layout=layout,
                compiled=compiled,
            )
            | got
        )
        print(
            {k: v for k, v in out[-1].items() if k not in ('tokens', 'seconds', 'losses', 'grad_norms', 'trace')},
            flush=True,
        )
    res = dict(date=time.strftime('%Y-%m-%d'), device=device_info().name, versions=versions(), model=a.model, rows=out)
    if os.environ.get('OUT'):
        open(os.path.join(os.environ['OUT'], 'levers.json'), 'w').write(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__':
    main()
