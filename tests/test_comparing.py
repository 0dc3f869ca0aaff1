"Runs side by side: what is missing, broken, unfinished or hostile is shown as what it is; lists and the command line."

import json
import math
import os
import pytest
from typer.testing import CliRunner
from unsloth_nb.cli import app
from unsloth_nb.runs.comparing import compare_curves, diff_runs, replayed
from unsloth_nb.runs.run import RunError, RunList, list_runs, start_run, write_json
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import EvaluateJob, FinetuneJob

HOSTILE = [
    '<img src=x onerror=alert(1)>',
    '| pipes | in | a | table |',
    '[a](javascript:alert(1))',
    '`</code><script>`',
    '\x1b[2J\x1b]0;title\x07',
    'two\nlines',
    '$x^2$ **bold** __b__',
]


@pytest.fixture
def make(tmp_path):
    "A function that writes a run directory: losses, then what the job, the plan and the data are to hold"

    def f(losses=(2.0, 1.0, 0.5), job=None, weights=b'w', end=True, plan=None, data=None, **params):
        run = start_run(job or FinetuneJob(max_steps=3, **params), tmp_path)
        run.save(
            'plan',
            dict(dtype='float32', device=dict(kind='cpu', name='A', memory_free=len(os.listdir(tmp_path))))
            | (plan or {}),
        )
        run.save('data', dict(source='events', fingerprint='f1', ledger=dict(came=9)) | (data or {}))
        for i, l in enumerate(losses, 1):
            run.log(step=i, loss=l, grad_norm=1.0)
        if weights is not None:
            (run.path / 'adapter').mkdir()
            (run.path / 'adapter' / 'adapter_model.safetensors').write_bytes(weights)
            (run.path / 'adapter' / 'certificate.json').write_text(run.name)
        return run.finish(tuned=dict(loss=losses[-1])) if end else run

    return f


def cli(*args):
    return CliRunner().invoke(app, [*map(str, args)])


def edit(run, name, **changes):
    write_json(run.path / f'{name}.json', json.loads((run.path / f'{name}.json').read_text()) | changes)


def test_identical(make):
    "The same bits are identical, though free memory, time and a text file beside the weights differ"
    d = diff_runs(make(), make())
    assert d.verdict == 'identical: 3 steps bit for bit, same adapter' and d.identical
    assert d.parameters == d.plan == d.environment == d.data == []
    assert d.artefacts[0]['differ'] == ['certificate.json'] and 'same weights; differ: certificate.json' in repr(d)


def test_one_bit(make):
    "The smallest difference that a float has is found, at its step"
    d = diff_runs(make(), make([2.0, math.nextafter(1.0, 2), 0.5]))
    assert (
        d.verdict == 'same parameters, curves part at step 2'
        and 0 < d.curves['loss'].largest < 1e-15
        and d.curves['loss'].at == 2
    )


def test_same_curves_other_adapter(make):
    "The same curves do not make two adapters the same"
    assert (
        diff_runs(make(), make(weights=b'x')).verdict
        == 'same parameters, same curves over 3 common steps, the adapters differ'
    )


@pytest.mark.parametrize(
    'change,what,name',
    [
        (dict(plan=dict(dtype='bfloat16')), 'plan', 'dtype'),
        (
            dict(plan=dict(changes=[dict(parameter='optim', requested='adamw_8bit', effective='adamw_torch')])),
            'plan',
            'optim',
        ),
        (dict(plan=dict(device=dict(kind='cpu', name='B'))), 'environment', 'device.name'),
        (dict(data=dict(fingerprint='f2')), 'data', 'fingerprint'),
        (dict(data=dict(ledger=dict(came=8))), 'data', 'ledger.came'),
    ],
)
def test_inputs(make, change, what, name):
    "What differs stands in its own table, and in the verdict when the curves part"
    d = diff_runs(make(), make([2.0, 1.1, 0.5], **change))
    assert [r['name'] for r in getattr(d, what)] == [name]
    assert d.verdict == f'same parameters, curves part at step 2; other {what} ({name})'


def test_versions_and_commit(make):
    "Another version of a package, another commit, a package that only one has"
    a = make()
    b = make()
    env = json.loads((b.path / 'env.json').read_text())
    edit(b, 'env', versions=env['versions'] | dict(trl='0.0', newlib='1'), git=dict(commit='abc', changed=['x.py']))
    edit(a, 'env', git=dict(commit='def', changed=[]))
    rows = {r['name']: (r['a'], r['b']) for r in diff_runs(a, b).environment}
    assert (
        rows['git.commit'] == ('def', 'abc')
        and rows['git.changed'] == ([], ['x.py'])
        and rows['versions.newlib'] == (None, '1')
        and rows['versions.trl'][1] == '0.0'
    )


def test_parameters(make):
    "Parameters lead the verdict; of many, the first are named and the others counted"
    many = dict(r=8, lora_alpha=8, lora_dropout=0.1, learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, seed=1)
    v = diff_runs(make(), make([3.0, 2.0, 1.0], **many)).verdict
    assert v.startswith('differ in seed, r, lora_alpha, ') and v.endswith(' and 2 more; curves part at step 1')
    assert (
        diff_runs(make(), make(max_new_tokens=8)).verdict
        == 'identical: 3 steps bit for bit, same adapter; differ in max_new_tokens'
    )


def test_nan(make):
    "A loss that is not a number is written as text: the same as itself, infinitely far from a number, and drawn as a gap"
    a = make([2.0, float('nan'), float('inf')])
    b = make([2.0, 1.0, float('inf')])
    assert a.metrics[1]['loss'] == 'nan' and diff_runs(a, make([2.0, float('nan'), float('inf')])).identical
    d = diff_runs(a, b)
    assert d.curves['loss'].first == 2 and d.curves['loss'].largest == math.inf and d.curves['loss'].final == 0
    assert json.loads(json.dumps(d.to_dict(), allow_nan=False))['curves']['loss']['largest'] == 'inf'
    assert len(d.plot().lines) == 2 and 'inf%' in repr(d)


def test_lines():
    "Steps that repeat count once, the later line; lines without a step, a loss or a number are passed over"
    a = [
        dict(step=1, loss=2.0),
        dict(step=2, loss=9.0),
        dict(step=2, loss=1.0),
        dict(loss=1.0),
        dict(step=3),
        dict(step=4, loss='what'),
    ]
    c = compare_curves(a, [dict(step=1, loss=2.0), dict(step=2, loss=1.0), dict(step=5, loss=1.0)])
    assert (c.common, c.only_a, c.only_b, c.first, c.same) == (2, 0, 1, None, False)
    assert compare_curves([], []) == compare_curves([], [], 'loss') and not compare_curves([], []).same


@pytest.mark.parametrize('missing', ['data', 'plan', 'env', 'metrics.jsonl', 'result'])
def test_missing_files(make, missing):
    "A file that is missing leaves its part empty, and the rest is compared"
    a = make()
    b = make([2.0, 1.1, 0.5], learning_rate=1e-3)
    (b.path / (missing if '.' in missing else f'{missing}.json')).unlink()
    for d in (diff_runs(a, b), diff_runs(b, a)):
        assert d.verdict.startswith('differ in learning_rate; ') and not d.identical
        assert repr(d) and d._repr_markdown_() and d.plot()


@pytest.mark.parametrize('text', ['{"dtype": ', '[1, 2]'])
def test_broken_file(make, text):
    "A file that is no JSON object is named with its run"
    a = make()
    b = make()
    (b.path / 'plan.json').write_text(text)
    with pytest.raises(RunError, match=f'{b.name}: plan.json .* cannot be compared'):
        diff_runs(a, b)


def test_torn_line(make):
    "A last line that was cut off by a crash is left out"
    a = make(end=False)
    b = make()
    with (a.path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 4, "lo')
    assert diff_runs(a, b).curves['loss'].common == 3


def test_unfinished(make):
    "A run that is not over is compared by its steps and by what its plan measured"
    d = diff_runs(make(), make([2.0, 1.0], weights=None, end=False, plan=dict(measured=dict(train_loss=1.5))))
    assert d.verdict == 'same parameters, same curves over 2 common steps, no two adapters to compare'
    assert (
        dict(name='measured.train_loss', a=None, b=1.5) in d.metrics
        and d.curves['loss'].only_a == 1
        and d.artefacts[0]['only'] == 'a'
    )


def test_other_kinds(make):
    "Runs of different jobs differ in the job first, and have no steps in common"
    d = diff_runs(make(), make([1.0], job=EvaluateJob(), weights=None))
    assert (
        d.verdict.startswith('differ in job, model, ') and dict(name='job', a='finetune', b='evaluate') in d.parameters
    )


@pytest.mark.parametrize('value', HOSTILE)
def test_hostile(make, value):
    "Values of users are text, in a table as in a terminal: no markup, no further column, no control character"
    a = make()
    b = make()
    job = json.loads((b.path / 'job.json').read_text())
    edit(b, 'job', parameters=job['parameters'] | {'dataset': value, f'x{value}': value})
    edit(b, 'result', metrics=dict(tuned={value: value}))
    edit(b, 'data', fingerprint=value)
    d = diff_runs(a, b)
    for obj in (d, replayed(a, b)):
        assert not [c for c in repr(obj) if c != '\n' and not c.isprintable()]
    for md in (d._repr_markdown_(), replayed(a, b)._repr_markdown_()):
        assert not [m for m in ('<img', '<script', '</code', '](', '$x', '**bold', '\x1b') if m in md]
        widths = {}
        for l in md.splitlines():
            if l.startswith('|'):
                widths.setdefault(l.count('|'), []).append(l)
        assert set(widths) <= {3, 4, 9}  # Two, three or eight columns
    out = cli('runs', 'diff', a.path, b.path, '--json').output
    assert json.loads(out)['data'][0]['b'] == value and '\x1b' not in out


def test_long_values(make):
    "Of two long values the part where they differ is shown, and none is lost in the data"
    a = make(data=dict(fingerprint='0' * 90 + '1'))
    b = make(data=dict(fingerprint='0' * 90 + '2'))
    d = diff_runs(a, b)
    row = next(l for l in repr(d).splitlines() if l.startswith('fingerprint'))
    assert row.split()[1] != row.split()[2] and '…' in row and d.to_dict()['data'][0]['b'] == '0' * 90 + '2'


def test_replay(make):
    "Bit-identical, within the band, parted; what is no replay is not judged by its curves"
    a = make()
    assert (r := replayed(a, make())).ok and r.verdict == 'bit-identical: 3 steps and the adapter' and r.band == 0
    bent = make([2.0, 1.01, 0.5], weights=b'x')
    assert not (r := replayed(a, bent)).ok and r.verdict == 'parted at step 2: loss differs by up to 0.99% (step 2)'
    assert (
        r := replayed(a, bent, band=0.02)
    ).ok and r.verdict == 'within the band: loss differs by up to 0.99%, 2% is allowed'
    assert not replayed(a, make(weights=b'x')).ok and replayed(a, make(weights=b'x'), band=0.01).ok
    for other, why in (
        (make(seed=1), 'not a replay: differ in seed'),
        (make(data=dict(fingerprint='f2')), 'not the same data: fingerprint'),
        (make([2.0, 1.0]), 'not complete: 2 of 3 steps'),
        (make([2.0, 1.0, 0.5, 0.4]), 'not the same length: 1 steps more'),
    ):
        r = replayed(a, other, band=1.0)
        assert not r.ok and r.verdict == why and r.to_dict()['ok'] is False and why in repr(r)
    elsewhere = make([2.0, 1.01, 0.5], plan=dict(device=dict(kind='cpu', name='B'), dtype='bfloat16'))
    assert replayed(a, elsewhere).verdict.endswith('; other plan (dtype); other environment (device.name)')


def test_replay_gpu(make):
    "On a GPU the band is 2%; a replay of a run that broke off may go further than it"
    gpu = dict(plan=dict(device=dict(kind='cuda', name='H')))
    assert replayed(make(**gpu), make([2.0, 1.015, 0.5], weights=b'x', **gpu)).ok
    assert not replayed(make(**gpu), make([2.0, 1.03, 0.5], weights=b'x', **gpu)).ok
    assert (
        replayed(make([2.0, 1.0], weights=None, end=False), make()).verdict
        == 'bit-identical: 2 steps, no two adapters to compare'
    )


def test_where_and_by(make, tmp_path):
    "Filters add up, sorting reads numbers as numbers and puts what is missing first; wrong words get the nearest right one"
    runs = [make([1.0] * n) for n in (9, 10, 2)] + [
        make([1.0], end=False),
        make([1.0], job=EvaluateJob(), weights=None),
    ]
    runs[2].path.joinpath('metrics.jsonl').unlink()
    all_runs = list_runs(tmp_path)
    assert [r.name for r in all_runs.by()] == [r.name for r in runs] and [
        r.name for r in all_runs.by(reverse=True)
    ] == [r.name for r in runs][::-1]
    steps = [r.name for r in all_runs.where(job='finetune', status='finished').by('steps')]
    assert steps == [runs[i].name for i in (2, 0, 1)]
    assert type(all_runs.by('steps')) is RunList and [r.name for r in all_runs.where(job='evaluate')] == [runs[4].name]
    assert [r.name for r in all_runs.where(name=runs[1].name)] == [runs[1].name] and all_runs.where(model='llama') == []
    for call, word in (
        (lambda: all_runs.by('stepps'), "did you mean 'steps'"),
        (lambda: all_runs.where(status='finishd'), "did you mean 'finished'"),
        (lambda: all_runs.where(job='finetun'), "did you mean 'finetune'"),
    ):
        with pytest.raises(SpecError, match=word):
            call()
    assert len(all_runs.plot().lines) == 4 and not RunList().plot().lines


@pytest.mark.parametrize('file', ['job.json', 'result.json'])
def test_damaged(make, file):
    "A run whose file cannot be read is listed as damaged, and the others are found, opened and shown as before"
    from unsloth_nb.widgets.run_browser import RunBrowser
    from unsloth_nb.runs.run import list_runs, open_run

    bad = make()
    good = make()
    (bad.path / file).write_text('{"x": ')
    home = good.path.parent
    assert {r.name: r.status for r in list_runs(home)} == {bad.name: 'damaged', good.name: good.status} and open_run(
        'latest', home, kind=good.kind
    ).name == good.name
    assert [r.name for r in list_runs(home).where(status='damaged')] == [bad.name]
    assert 'damaged' in RunBrowser(home).select(bad.name)._repr_html_()


def test_cli(make, tmp_path):
    "The command line: table, JSON, filters, sorting, and refusals in words"
    a = make()
    b = make([2.0, 1.1, 0.5], learning_rate=1e-3)
    out = cli('runs', 'diff', a.name, b.name[-4:], '--runs-dir', tmp_path)
    assert out.exit_code == 0 and 'differ in learning_rate; curves part at step 2' in out.output
    assert (
        json.loads(cli('runs', 'diff', a.path, 'latest', '--runs-dir', tmp_path, '--json').output)['curves']['loss'][
            'first'
        ]
        == 2
    )
    listed = json.loads(
        cli(
            'runs',
            'list',
            '--runs-dir',
            tmp_path,
            '--status',
            'finished',
            '--job',
            'finetune',
            '--model',
            'smollm2',
            '--sort',
            'run',
            '--json',
        ).output
    )
    assert [r['run'] for r in listed] == [a.name, b.name] and listed[0]['steps'] == '3'
    assert 'no such runs under' in cli('runs', 'list', '--runs-dir', tmp_path, '--model', 'llama').output
    assert 'no runs under' in cli('runs', 'list', '--runs-dir', tmp_path / 'none').output
    for args, word in (
        (['diff', a.name, 'nonesuch'], 'there is no run'),
        (['list', '--sort', 'stepps'], "did you mean 'steps'"),
        (['list', '--job', 'tune'], 'there is no job'),
    ):
        r = cli('runs', *args, '--runs-dir', tmp_path)
        assert isinstance(r.exception, SpecError) and word in str(r.exception)
