"The arithmetic of the guides which_machine, at_scale and many_jobs, held against simulations and against the planner."

import json
import re
import shlex
import numpy as np
import pytest
from conftest import ROOT

GUIDES = ('which_machine', 'at_scale', 'many_jobs')


def cells(name, kind):
    return [
        ''.join(c['source'])
        for c in json.loads((ROOT / 'nbs' / 'guides' / f'{name}.ipynb').read_text())['cells']
        if c['cell_type'] == kind
    ]


def page(name):
    "What the cells of a guide define; nothing is shown"
    space = dict(display=lambda *a: None)
    for c in cells(name, 'code'):
        exec(re.sub(r'^#\|.*$|^.*set_matplotlib_formats.*$', '', c, flags=re.M), space)
    return space


@pytest.fixture(scope='module')
def which():
    return page('which_machine')


@pytest.fixture(scope='module')
def scale():
    return page('at_scale')


@pytest.fixture(scope='module')
def many():
    return page('many_jobs')


def lost_time(rng, interval, save, mtbf, restart, work=2_000_000):
    "Share of the time that is not work: failures at random, work since the last checkpoint is done again"
    done = 0.0
    clock = 0.0
    fails = rng.exponential(mtbf)
    while done < work:
        if clock + interval + save <= fails:
            clock += interval + save
            done += interval
        else:
            clock = fails + restart
            fails = clock + rng.exponential(mtbf)
    return 1 - done / clock


@pytest.mark.parametrize('save, mtbf, restart', [(5, 7200, 60), (20, 40_000, 600)])
def test_lost_time_is_what_a_simulation_loses(scale, save, mtbf, restart):
    rng = np.random.default_rng(0)
    best = scale['checkpoint_interval'](save, mtbf)
    for interval in (best / 4, best, 4 * best):
        simulated = np.mean([lost_time(rng, interval, save, mtbf, restart) for _ in range(20)])
        assert scale['lost'](interval, save, mtbf, restart) == pytest.approx(simulated, rel=0.15)


def test_no_interval_loses_less(scale):
    "By the formula for lost time; and far from the best one a simulation loses clearly more"
    from scipy.optimize import minimize_scalar

    for save, mtbf in ((5, 7200), (20, 40_000), (2.5, 2.8e6)):
        least = minimize_scalar(scale['lost'], args=(save, mtbf, 60), bounds=(1, mtbf), method='bounded').x
        assert scale['checkpoint_interval'](save, mtbf) == pytest.approx(least, rel=0.01)
    rng = np.random.default_rng(1)
    best = scale['checkpoint_interval'](5, 7200)
    loss = [np.mean([lost_time(rng, f * best, 5, 7200, 60) for _ in range(40)]) for f in (1, 1 / 4, 4)]
    assert loss[0] < 0.8 * min(loss[1:])


def waits(rng, gpus, arrivals, service, n=200_000):
    "Seconds that each of `n` jobs waits for one of the GPUs, first come first served"
    import heapq

    free = [0.0] * gpus
    t = 0.0
    out = np.empty(n)
    for i, (gap, s) in enumerate(zip(rng.exponential(1 / arrivals, n), rng.exponential(service, n))):
        t += gap
        start = max(t, heapq.heappop(free))
        out[i] = start - t
        heapq.heappush(free, start + s)
    return out[n // 10 :]


@pytest.mark.parametrize('gpus, busy', [(3, 0.6), (12, 0.85)])
def test_erlang_c_is_what_a_simulation_waits(many, gpus, busy):
    service = 700.0
    load = gpus * busy
    w = waits(np.random.default_rng(0), gpus, load / service, service)
    assert (w > 0).mean() == pytest.approx(many['erlang_c'](gpus, load), rel=0.05)
    assert w.mean() == pytest.approx(many['queue_wait'](gpus, load, service), rel=0.1)
    assert np.quantile(w, 0.95) == pytest.approx(many['late'](gpus, load, service), rel=0.1)


def test_a_pool_is_the_smallest_that_keeps_the_wait(many):
    for load in (2.5, 8.2, 17.2):
        m = many['pool'](load, 700, 60)
        assert many['queue_wait'](m, load, 700) <= 60 and (m - 1 <= load or many['queue_wait'](m - 1, load, 700) > 60)


@pytest.mark.parametrize('bits, checkpointing', [(16, False), (16, 'unsloth'), (4, 'unsloth')])
def test_memory_of_one_rank_is_the_planner_s(scale, bits, checkpointing):
    from unsloth_nb import FinetuneJob, make_plan

    job = FinetuneJob(
        model='llama-3.3-70b-instruct',
        load_in_4bit=bits == 4,
        gradient_checkpointing=checkpointing,
        optim='adamw_torch_fused',
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    assert {k: v for k, v in scale['per_rank'](2048, bits, 1, checkpointing).items() if k != 'gathered'} == make_plan(
        job, device='B200'
    ).memory


def test_sharded_weights_add_up(scale):
    "All ranks of a node together hold the model once, and each of them what it gathers"
    one = scale['per_rank'](2048)
    each = scale['per_rank'](2048, ranks=8)
    for k in ('weights', 'adapter', 'optimizer'):
        assert 8 * each[k] == pytest.approx(one[k], rel=1e-6)
    layers = (each['gathered'] - 2 * scale['c']['embedding']) / 2 * scale['s']['num_hidden_layers']
    assert layers == pytest.approx(2 * scale['c']['linear']) and each['activations'] == one['activations']


def ring(ranks):
    "Pieces that each rank sends while a ring sums one vector of `ranks` pieces; checked to be the sum"
    rng = np.random.default_rng(0)
    have = rng.integers(0, 100, (ranks, ranks))
    want = have.sum(0)
    sent = np.zeros(ranks)
    for phase in (0, 1):  # Reduce, then gather
        for t in range(ranks - 1):
            moves = [(r, (r - t + phase) % ranks) for r in range(ranks)]
            parcels = [(r, p, have[r, p]) for r, p in moves]
            for r, p, v in parcels:
                have[(r + 1) % ranks, p] = v if phase else have[(r + 1) % ranks, p] + v
                sent[r] += 1
    assert (have == want).all()
    return sent


@pytest.mark.parametrize('ranks', [2, 4, 7])
def test_all_reduce_sends_what_a_ring_sends(which, scale, ranks):
    sent = ring(ranks) / ranks  # In sizes of the whole
    assert (sent == sent[0]).all()
    for p in (which, scale):
        assert p['all_reduce'](1000, ranks, 10) == pytest.approx(100 * sent[0])


def test_rings_over_nodes_use_every_port(scale):
    "One ring leaves each node at one GPU; with a ring for each GPU, every port carries an eighth of what a rank sends"
    nodes = scale['NODES']
    gpus = scale['GPUS']
    ranks = nodes * gpus
    port = np.zeros((nodes, gpus))
    nvlink = np.zeros((nodes, gpus))
    for k in range(gpus):
        order = [(n, (k + 1 + i) % gpus) for n in range(nodes) for i in range(gpus)]  # The last of a node is its GPU k
        have = np.eye(ranks, dtype=bool)
        for t in range(ranks - 1):
            for i, (n, g) in enumerate(order):
                assert have[i, (i - t) % ranks]
                have[(i + 1) % ranks, (i - t) % ranks] = True
                (port if order[(i + 1) % ranks][0] != n else nvlink)[n, g] += 1
        assert have.all()
    sizes = 1 / ranks / gpus  # A piece of a ring, of the whole
    assert (port == port[0, 0]).all() and (nvlink == nvlink[0, 0]).all()
    sharded = 'sharded over all 64, 16 bit'
    assert scale['sent'][sharded] == pytest.approx(sizes * port[0, 0] * (2 * scale['weights'] + scale['gradient']))
    assert scale['sent']['data parallel, NF4'] == pytest.approx(2 * sizes * port[0, 0] * scale['gradient'])
    slowest = max(sizes * port[0, 0] / scale['NETWORK'], sizes * nvlink[0, 0] / scale['NVLINK'])
    assert scale['gather'](ranks, scale['across']()) == pytest.approx(2 * slowest * scale['weights'])


def test_gathering_is_hidden_from_the_least_tokens_on(which):
    "A pass of so many tokens takes as long to compute as its weights to gather; half as many do not"
    shape, h100, link = which['shape']('70B'), which['find_device']('H100'), which['LINKS']['NVLink']
    c, way = shape.counts, which['Way'](16, 'unsloth')
    n = which['least_tokens']('H100', link)

    def work(n):
        return which['predict_speed'](shape, way, h100, computed=n, real=n, length=206).step

    moved = 2 * 2 * (c['linear'] + c['embedding']) / link
    assert work(n) == pytest.approx(moved, rel=0.05) and work(n / 2) < 0.8 * moved


def test_ranks_wait_for_the_longest(which):
    "Exact for two ranks and two lengths: the longer of them in three of four draws"
    space = dict(np=np, tokens=np.array([1000, 3000]))
    source = next(c for c in cells('which_machine', 'code') if 'def waiting' in c)
    exec('def waiting' + re.split(r'\n(?=\S)', source.split('def waiting')[1])[0], space)
    assert space['waiting'](1) == pytest.approx(1, abs=0.02) and space['waiting'](2) == pytest.approx(
        2000 / 2500, abs=0.02
    )


def test_rented_cost_is_price_times_hours(which):
    from unsloth_nb.planning.prices import PRICES

    dollars, hours = which['ten_million']('8B', 'H100')
    assert dollars / hours == pytest.approx(PRICES['H100'].hour) and hours * 3600 * which['alone'](
        '8B', 'H100'
    ).tokens_per_second == pytest.approx(1e7)


COMMANDS = sorted({c for g in GUIDES for t in cells(g, 'markdown') for c in re.findall(r'`(unsloth-nb [^`]*)`', t)})


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_exist(command):
    "Each command of the pages is one of ours, with options that it has"
    from typer.main import get_command
    from unsloth_nb.cli import app

    words = shlex.split(command)[1:]
    cmd = get_command(app)
    while hasattr(cmd, 'commands') and words:
        assert words[0] in cmd.commands, f'there is no command {words[0]!r}'
        cmd = cmd.commands[words.pop(0)]
    assert not {w for w in words if w.startswith('-')} - {o for p in cmd.params for o in p.opts}
