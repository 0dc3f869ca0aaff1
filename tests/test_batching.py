"Packing keeps every example and wastes no more rows than TRL; batches are those a trainer would draw."

import math
import time
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from unsloth_nb.tokens.batching import Packing, batches, batching_report, pack, padding_efficiency
from unsloth_nb.core.schema import SpecError

LENGTHS = np.random.default_rng(3407).lognormal(5.2, 0.8, 2000).astype(int).clip(1, 1024)
patient = settings(deadline=None, database=None)  # Others may use this machine; nothing is written beside the tests
fitting = st.integers(1, 64).flatmap(
    lambda limit: st.tuples(st.lists(st.integers(0, limit), max_size=80), st.just(limit))
)


def plain_best_fit(lengths, limit):
    "Best-fit decreasing by looking at every row; the room left in each"
    room = []
    for k in sorted(lengths, reverse=True):
        j = min((j for j, r in enumerate(room) if r >= k), key=lambda j: room[j], default=None)
        if j is None:
            room.append(limit - k)
        else:
            room[j] -= k
    return sorted(room)


@patient
@given(fitting)
def test_pack(case):
    "Every index once, no row above the limit, and the rows of a search that looks at all of them"
    lengths, limit = case
    rows = pack(lengths, limit)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    room = [limit - sum(lengths[i] for i in r) for r in rows]
    assert sorted(room) == plain_best_fit(lengths, limit) and min(room, default=0) >= 0
    assert len(rows) >= math.ceil(sum(lengths) / limit)


@patient
@given(fitting)
def test_pack_is_deterministic(case):
    "The same rows from a list and from an array, and examples of one length in the order of their index"
    lengths, limit = case
    rows = pack(lengths, limit)
    assert rows == pack(np.array(lengths, dtype=np.uint16), limit)
    for k in set(lengths):
        first = [min(i for i in r if lengths[i] == k) for r in rows if lengths[r[0]] == k]
        assert first == sorted(first)


def test_ties():
    "Of rows with the same room, the one that was opened first is filled first"
    assert pack([5, 5, 3, 3], 8) == [[0, 2], [1, 3]]


@patient
@given(st.lists(st.integers(0, 500), max_size=300), st.integers(1, 17), st.booleans(), st.integers(0, 9))
def test_batches(lengths, batch_size, grouped, seed):
    "A permutation in full batches, the last excepted; the same seed gives the same; the longest comes first when grouped"
    b = batches(lengths, batch_size, grouped, seed)
    assert sorted(i for row in b for i in row) == list(range(len(lengths)))
    assert all(len(row) == batch_size for row in b[:-1]) and all(b)
    assert b == batches(lengths, batch_size, grouped, seed)
    if grouped and lengths:
        assert lengths[b[0][0]] == max(lengths)
    assert 0 <= padding_efficiency(lengths, b) <= 1


@patient
@given(fitting, st.integers(1, 9))
def test_report(case, batch_size):
    "The report's tokens are those of batches padded by hand"
    lengths, limit = case
    r = batching_report(lengths, batch_size, limit)
    for way, grouped in ((r.random, False), (r.grouped, True)):
        padded = [np.zeros((len(b), max(lengths[i] for i in b))) for b in batches(lengths, batch_size, grouped)]
        assert (way['passes'], way['tokens'], way['largest']) == (
            len(padded),
            sum(p.size for p in padded),
            max((p.size for p in padded), default=0),
        )
    assert r.packed['tokens'] == len(pack(lengths, limit)) * limit
    assert all(w['tokens'] * w['efficiency'] == pytest.approx(r.tokens) for w in (r.random, r.grouped, r.packed))


@pytest.mark.parametrize(
    'f,message',
    [
        (
            lambda: pack([5, 9, 12], 8),
            'example 1: 9 tokens do not fit a row of 8; raise the limit to 12 or more, or truncate or drop what is longer',
        ),
        (lambda: pack([5], 0), r'limit: got 0; expected a whole number \(at least 1\)'),
        (lambda: pack([5], 8.0), 'limit: got 8.0; expected a whole number'),
        (lambda: pack([5.0], 8), 'lengths: expected one whole number per example'),
        (lambda: pack([[1, 2], [3]], 8), r'use \[len\(e\) for e in examples\]'),
        (lambda: pack([3, -1], 8), 'lengths: example 1 has -1 tokens'),
        (lambda: batches([5], True), 'batch_size: got True'),
        (lambda: batching_report([5], 0, 8), 'batch_size: got 0'),
        (lambda: Packing([[0], [0]], 8, [3]), 'bins: example 0 of 1 stands in 2 rows; expected each in exactly one'),
        (lambda: Packing([[0, 1]], 8, [3]), 'bins: example 1 of 1 stands in 1 rows'),
        (lambda: Packing([[0, 1]], 8, [4, 5]), 'bins: row 0 holds 9 tokens; expected at most 8'),
    ],
)
def test_refused(f, message):
    "What cannot be batched is refused with the place and the mend"
    with pytest.raises(SpecError, match=message):
        f()


def test_speed(record_property):
    "100,000 lengths take about a second of one core; the bound leaves room for a slow machine"
    many = np.random.default_rng(0).lognormal(5.2, 0.8, 100_000).astype(int).clip(1, 2048)
    t = time.process_time()
    rows = pack(many, 2048)
    t = time.process_time() - t
    record_property('pack_seconds', t)
    print(f'pack: 100,000 lengths into {len(rows)} rows in {t:.2f} s')
    assert t < 3


def trl_packed(lengths, limit, **kw):
    "TRL's own packing of examples that have these lengths and tell each token's example"
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    return pack_dataset(
        Dataset.from_dict(dict(input_ids=[[i] * n for i, n in enumerate(lengths.tolist())])),
        limit,
        'bfd',
        map_kwargs=kw,
    )


def test_no_more_rows_than_trl(lib):
    "As few rows as TRL packing the whole set at once, and fewer than by its default of 1,000 examples at a time; all tokens are kept"
    ours = pack(LENGTHS, 1024)
    whole = trl_packed(LENGTHS, 1024, batch_size=len(LENGTHS))
    default = trl_packed(LENGTHS, 1024)
    assert len(ours) == len(whole) <= len(default)
    assert sum(LENGTHS[i] for r in ours for i in r) == sum(map(sum, default['seq_lengths'])) == LENGTHS.sum()
    theirs = [list(dict.fromkeys(ids)) for ids in whole['input_ids']]
    assert Packing(theirs, 1024, LENGTHS).efficiency == Packing(ours, 1024, LENGTHS).efficiency


def test_trl_collator_takes_our_rows(lib):
    "Rows packed here, with a column seq_lengths, reach the model with position ids that start anew at each example"
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    n = [5, 3, 2, 6]
    rows = pack(n, 8)
    packed = [dict(input_ids=[10 * i + j for i in r for j in range(n[i])], seq_lengths=[n[i] for i in r]) for r in rows]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packed)
    assert batch['position_ids'].tolist()[0] == [k % 10 for k in batch['input_ids'].tolist()[0]]
    assert 'attention_mask' not in batch and batch['input_ids'].shape == (1, 16)


SIZES = pytest.mark.parametrize('n', [2000, 100, 9])  # 50 batches to a mega-batch, a quarter of the set, a single batch


@SIZES
def test_grouping_is_the_trainers(lib, monkeypatch, n):
    "From one permutation, the order is that of the length-grouped sampler of transformers, example by example"
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    monkeypatch.setattr(
        torch, 'randperm', lambda k, generator=None: torch.from_numpy(np.random.default_rng(5).permutation(k))
    )
    order = get_length_grouped_indices(LENGTHS[:n].tolist(), 8)
    assert batches(LENGTHS[:n], 8, True, 5) == [order[i : i + 8] for i in range(0, n, 8)]


@SIZES
def test_grouped_padding_is_the_trainers(lib, n):
    "With random generators of their own, the share of padding agrees to three percent on average"
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lens = LENGTHS[:n].tolist()

    def theirs(seed):
        order = get_length_grouped_indices(lens, 8, generator=torch.Generator().manual_seed(seed))
        return [order[i : i + 8] for i in range(0, n, 8)]

    a, b = (
        np.mean([padding_efficiency(lens, f(s)) for s in range(10)])
        for f in (lambda s: batches(lens, 8, True, s), theirs)
    )
    assert a == pytest.approx(b, rel=0.03)


def test_trainer_takes_the_lengths(lib):
    "SFTConfig knows the option, and the trainer groups whole optimizer steps by the column named in it"
    from types import SimpleNamespace
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig

    args = SFTConfig(
        output_dir='unused',
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy='group_by_length',
        length_column_name='tokens',
        report_to='none',
        use_cpu=True,
    )
    rows = Dataset.from_dict(dict(input_ids=[[0]] * len(LENGTHS), tokens=LENGTHS.tolist()))
    sampler = Trainer._get_train_sampler(SimpleNamespace(args=args, processing_class=None, train_dataset=rows))
    assert list(sampler.lengths) == LENGTHS.tolist() and sampler.batch_size == 8
