"Scores, statistics, choices, the harness and runs side by side: against hand-computed values, brute force, and hostile input."

import itertools
import json
import math
import random
from pathlib import Path
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from unsloth_nb.evaluation.leaderboard import compare_runs, write_comparison
from unsloth_nb.runs.run import RunError, start_run
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.scoring import (
    ScorerError,
    default_scorers,
    json_fields,
    last_number,
    named_scorers,
    numeric,
    regex,
    score_rows,
    valid_json,
)
from unsloth_nb.evaluation.significance import caution, difference, estimate
from unsloth_nb.core.spec import EvaluateJob, FinetuneJob

HOSTILE = '<img src=x onerror=alert(1)>|`x`\x1b[2J'
bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4),
    max_leaves=12,
)

# Statistics


@settings(deadline=None, max_examples=40)
@given(bits)
def test_mcnemar(pairs):
    "The p-value is the binomial sum over the rows that changed; exchanging the sides turns the signs and nothing else"
    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))
    d = difference(a, b)
    back = difference(b, a)
    m = d.above + d.below
    k = min(d.above, d.below)
    assert d.p == pytest.approx(min(1, 2 * sum(math.comb(m, i) for i in range(k + 1)) / 2**m))
    assert d.test == "McNemar's exact test" and back.p == d.p and back.difference == -d.difference
    assert (back.low, back.high) == pytest.approx((-d.high, -d.low)) and d.low - 1e-12 <= d.difference <= d.high + 1e-12


@pytest.mark.parametrize('seed', range(4))
def test_permutations(seed):
    "Few rows: exactly the share of all turns of signs that are as extreme, weights included"
    rng = random.Random(seed)
    a, b, w = ([rng.random() for _ in range(7)] for _ in range(3))
    d = [v * (y - x) for v, x, y in zip(w, a, b)]
    sums = [abs(sum(s * x for s, x in zip(turn, d))) for turn in itertools.product((1, -1), repeat=7)]
    got = difference(a, b, w)
    assert got.p == pytest.approx(sum(s >= abs(sum(d)) - 1e-12 for s in sums) / 2**7)
    assert got.difference == pytest.approx(sum(d) / sum(w)) and got.low < got.difference < got.high


def test_no_false_alarms():
    "Where nothing differs, at most about one test in twenty says that something does"
    rng = random.Random(1)

    def noise(n):
        return [rng.gauss(0, 1) for _ in range(n)]

    p = [difference(noise(15), noise(15), samples=499, seed=i).p for i in range(200)]
    assert 0.01 <= sum(v < 0.05 for v in p) / 200 <= 0.10


def test_wilson():
    "The interval by its formula, also at the ends"
    for k, n in ((0, 10), (10, 10), (7, 20)):
        z = 1.959963985
        p = k / n
        mid = (p + z * z / 2 / n) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
        e = estimate([1] * k + [0] * (n - k))
        assert (e.low, e.high) == pytest.approx((mid - half, mid + half), abs=1e-8) and e.n == n


def test_weights():
    "A row of double weight counts twice, one of none not at all; the interval holds the mean"
    e = estimate([2.0, 5.0, 9.0, 3.0], [2, 1, 0, 1])
    assert (e.mean, e.n) == (3.0, 3) and e.low <= e.mean <= e.high
    assert estimate([]).n == 0 and estimate([0.5]).low is None and difference([], []).p == 1.0


def test_caution():
    "What is said of few rows depends on what they can show"
    assert (
        'too few' in caution(5) and 'too few' not in caution(6) and 'too few' in caution(6, 0.99) and caution(64) == ''
    )


# Scorers


@given(st.dictionaries(st.text(max_size=5), values, max_size=5), st.text(max_size=30))
def test_json_fields(want, answer):
    "Anything is all of itself; any answer gets a share"
    text = json.dumps(want)
    assert json_fields(text, text) == 1 and valid_json('', text) and 0 <= json_fields(text, answer) <= 1


@given(st.integers(-(10**12), 10**12), st.floats(-1e9, 1e9))
def test_numbers(i, x):
    "A number is found however it is written"
    assert last_number(f'so it is {i:,}.') == i == last_number(f'(= {i})') and numeric(
        repr(x), f'first 7, then {x!r} m'
    )


@given(st.text(max_size=60))
def test_any_text(text):
    "No text breaks a scorer"
    assert last_number(text) is None or not math.isnan(last_number(text))
    assert score_rows(named_scorers(['exact_match', 'valid_json', 'regex:a+']), [text], [text])['exact_match'] == [1.0]


@pytest.mark.parametrize(
    'names,message',
    [
        (['exakt'], "no scorer 'exakt'"),
        (['exact_match:1'], 'no option'),
        (['numeric:-1'], 'no option'),
        (['numeric:nan'], 'no option'),
        (['numeric:1:2:3'], 'no option'),
        (['regex:('], 'not a regular expression'),
        (['choice:2'], "no scorer 'choice'"),
    ],
)
def test_bad_names(names, message):
    "Refused by name, and by the job before anything starts"
    with pytest.raises(ScorerError, match=message):
        named_scorers(names)
    with pytest.raises(SpecError, match=message.replace("'", '.')):
        EvaluateJob(scorers=names)


@pytest.mark.parametrize('value', [None, 'high', '1', math.nan, math.inf, [1]])
def test_no_number(value):
    "A scorer that gives no number is named, with the row"
    with pytest.raises(ScorerError, match='scorer odd, row 12: gave'):
        score_rows(dict(odd=lambda e, a: value), ['x'], ['y'], rows=[12])


def test_scorer_errors():
    "What a scorer raises is told with its name and row; an endless pattern ends"
    with pytest.raises(ScorerError, match='scorer json_fields, row 3: the expected answer is not JSON'):
        score_rows(named_scorers(['json_fields']), ['Paris'], ['{}'], rows=[3])
    with pytest.raises(ScorerError, match='nested repetitions'):
        regex('(x+x+)+y', 'x' * 5000)
    assert list(default_scorers(['1,000', '-2.5'])) == ['exact_match', 'numeric']


def test_job():
    "Parameters of the evaluate job say what is wrong"
    with pytest.raises(SpecError, match='tasks is empty'):
        EvaluateJob(task_dir='x')
    with pytest.raises(SpecError, match='confidence: got 1.0; expected a number'):
        EvaluateJob(confidence=1.0)
    assert EvaluateJob(scorers=['numeric', 'numeric']).scorers == ['numeric']


# With the model


@pytest.fixture(scope='module')
def asked(lib):
    "The embedded model with an adapter that changes its answers, and rows to ask"
    import torch

    job = FinetuneJob(max_rows=24, test_size=4, max_seq_length=256, gradient_checkpointing=False)
    data = lib.load_data(job)
    model = lib.load_model(job)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.model.named_parameters():
            if 'lora_B' in n:
                p.normal_(std=0.02)
    return model, data.test


def _alone(model, ids, start, tuned):
    "Log-probabilities of the tokens from `start` on, computed for one row without a batch"
    import torch
    from unsloth_nb.evaluation.generation import answering

    with answering(model, tuned) as net:
        logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return torch.log_softmax(logits[:-1], -1).gather(-1, torch.tensor(ids[1:])[:, None])[start - 1 :, 0]


@pytest.mark.parametrize('tuned', [True, False])
def test_row_losses(asked, lib, monkeypatch, tuned):
    "The loss of each row is that of the row alone, in whatever batch it is; base and tuned differ"
    from unsloth_nb.evaluation import evaluation

    model, rows = asked
    exs = lib.make_examples(rows, model.formatter, 256)
    got = evaluation.row_losses(model, exs, tuned)
    for e, (total, n) in zip(exs, got):
        lp = _alone(model, e.input_ids, 1, tuned)
        assert n == e.trained and total == pytest.approx(-float(lp[[m for m in e.mask[1:]]].sum()), rel=0.02)
    monkeypatch.setattr(evaluation, 'LOGITS', 1)
    assert [t for t, _ in evaluation.row_losses(model, exs, tuned)] == pytest.approx([t for t, _ in got], rel=0.02)
    assert [t for t, _ in got] != pytest.approx([t for t, _ in evaluation.row_losses(model, exs, not tuned)], rel=0.005)


def test_choose(asked, lib):
    "Log-probabilities of options are those of each alone, for options of different length"
    model, _ = asked
    options = ['Paris', 'Kuala Lumpur', 'a city that I do not know']
    (chosen,) = lib.choose(model, ['What is the capital of France?'], options)
    prompt = model.formatter.prompt_ids([dict(role='user', content='What is the capital of France?')])
    for o, got in zip(options, chosen.logprobs):
        assert got == pytest.approx(
            float(_alone(model, prompt + model.tok(o, add_special_tokens=False)['input_ids'], len(prompt), True).sum()),
            abs=0.3,
        )


def test_evaluate_kept(asked, lib, tmp_path, monkeypatch):
    "Named scorers are kept with what each row got; other names, or a function, ask again"
    from unsloth_nb.evaluation import evaluation

    model, rows = asked
    run = lib.start_run(FinetuneJob(), tmp_path)
    both = lib.compare(
        model, rows, run, scorers=['exact_match', 'json_fields'], max_new_tokens=4, bootstrap_samples=199
    )
    st = json.loads((run.path / 'statistics.json').read_text())
    assert (
        set(st['scores']) == {'exact_match', 'json_fields', 'loss'} == set(st['values']['tuned'])
        and st['scores']['loss']['difference']['n'] == 4
    )
    samples = [json.loads(l) for l in (run.path / 'samples.jsonl').read_text().splitlines()]
    assert [s['scores']['tuned']['exact_match'] for s in samples] == st['values']['tuned'][
        'exact_match'
    ] and '4 rows: too few' in repr(both)

    def never(*a, **kw):
        raise AssertionError('asked again')

    monkeypatch.setattr(evaluation, 'generate', never)
    again = lib.compare(
        model, rows, run, scorers=['exact_match', 'json_fields'], max_new_tokens=4, bootstrap_samples=199
    )
    assert (again.metrics, again.statistics) == (both.metrics, both.statistics)
    for scorers in (['exact_match'], dict(mine=lambda e, a: 1)):
        with pytest.raises(AssertionError, match='asked again'):
            lib.evaluate(model, rows, scorers, run=run)


def test_early_errors(asked, lib, monkeypatch):
    "A scorer that cannot score these rows says so before the model is asked"
    from unsloth_nb.evaluation import evaluation

    model, rows = asked

    def never(*a, **kw):
        raise AssertionError('the model was asked')

    for f in ('generate', 'row_losses', 'choose'):
        monkeypatch.setattr(evaluation, f, never)
    words = [lib.Conversation([dict(role='user', content='Say it.'), dict(role='assistant', content='word')], row=7)]
    with pytest.raises(ScorerError, match='scorer numeric, row 7'):
        lib.evaluate(model, words, ['numeric'])
    text = [lib.Conversation(text='Plain text.')]
    with pytest.raises(SpecError, match='which has none'):
        lib.evaluate(model, text, ['exact_match'])


def test_hostile_comparison():
    "Names of scores come from jobs and task files: shown as text"
    from unsloth_nb.evaluation.evaluation import Comparison, Evaluation, contrast

    e = Evaluation({HOSTILE: 0.5}, [], {HOSTILE: [0.0, 1.0]})
    c = Comparison(dict(base=e.metrics, tuned=e.metrics), [], contrast(dict(base=e, tuned=e)))
    assert (
        '<img' not in c._repr_html_()
        and '\x1b' not in repr(c) + c._repr_html_()
        and any(HOSTILE in n for n in c.notes())
    )


# The harness

TASK = dict(
    task='pick',
    dataset_path='json',
    dataset_kwargs=dict(data_files='rows.jsonl'),
    test_split='train',
    output_type='multiple_choice',
    doc_to_text='{{q}}',
    doc_to_choice='options',
    doc_to_target='gold',
    metric_list=[dict(metric='acc')],
)


@pytest.fixture
def task_dir(tmp_path):
    "A folder with two tasks, and a program that must not run"
    d = tmp_path / 'tasks'
    d.mkdir()
    rows = [
        dict(q=f'{a} plus {b} is', options=[str(a + b), 'a colour', str(a + b + 1)], gold=0)
        for a, b in ((1, 2), (2, 2), (3, 5), (4, 4))
    ]
    (d / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (d / 'utils.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(x): return x\n")
    (d / 'pick.yaml').write_text(yaml.safe_dump(TASK))
    (d / 'write.yaml').write_text(
        yaml.safe_dump(
            TASK
            | dict(
                task='write',
                output_type='generate_until',
                doc_to_choice=None,
                doc_to_target='{{options[gold]}}',
                generation_kwargs=dict(until=['\n'], max_gen_toks=4, do_sample=False),
                metric_list=[dict(metric='exact_match')],
            )
        )
    )
    return d


def test_harness(asked, lib, task_dir, tmp_path, monkeypatch):
    "Base and tuned are asked with the adapter off and on; what was found is kept in the run"
    import lm_eval
    from unsloth_nb.evaluation.harness import compare_tasks, harness

    model, _ = asked
    run = lib.start_run(FinetuneJob(), tmp_path / 'runs')
    how = dict(task_dir=task_dir, limit=3, statistics=dict(bootstrap_samples=199))
    both = compare_tasks(model, ['pick', 'write'], run, **how)
    saved = json.loads((run.path / 'tasks.json').read_text())
    assert (
        saved['metrics'] == both.metrics
        and saved['values']['base']['pick/acc']
        and len(saved['values']['tuned']['write/exact_match']) == 3
    )
    assert saved['scores']['pick/acc']['difference']['n'] == 3 and set(both.metrics['base']) == {
        'pick/acc',
        'write/exact_match',
    }
    with model.model.disable_adapter():
        off = harness(model, ['pick'], task_dir=task_dir, limit=3)
    assert off.metrics['pick/acc'] == both.metrics['base']['pick/acc']

    def never(*a, **kw):
        raise AssertionError('asked again')

    monkeypatch.setattr(lm_eval, 'simple_evaluate', never)
    assert compare_tasks(model, ['pick', 'write'], run, **how).metrics == both.metrics
    with pytest.raises(AssertionError, match='asked again'):
        compare_tasks(model, ['pick'], run, **how)
    assert not (tmp_path / 'ran').exists()


BAD = dict(
    function=('process_docs: !function utils.f', '!function utils.f is code'),
    list_function=('metric_list: [{metric: !function utils.f}]', 'is code'),
    cls=('class: utils.f', "'class' is not read"),
    prompt=('use_prompt: promptsource:x', "'use_prompt' is not read"),
    include=('include: ../x.yaml', "'include' is not read"),
    group=('group: g', "'group' is not read"),
    python=('description: !!python/name:os.system', 'is not YAML'),
    dataset=('custom_dataset: utils.f', 'is not read'),
    pickle=('dataset_path: pandas', 'dataset_path must be one of'),
    script=('dataset_path: ./utils.py', 'dataset_path must be one of'),
    remote=('dataset_kwargs: {data_files: "https://example.com/x.json"}', 'no file'),
    outside=('dataset_kwargs: {data_files: ../secret.jsonl}', 'no file'),
    absolute=('dataset_kwargs: {data_files: /etc/hostname}', 'no file'),
    more=('dataset_kwargs: {data_files: rows.jsonl, trust_remote_code: true}', 'dataset_path must be one of'),
    metric=('metric_list: [{metric: ./utils.py}]', 'no metric of lm-eval'),
    hub=('metric_list: [{metric: acc, hf_evaluate: true}]', 'no metric of lm-eval'),
    reach=('''doc_to_text: "{{ q.__class__.__mro__ }}"''', 'is unsafe'),
    text=('just text', 'must be a task|is not YAML'),
)


@pytest.mark.parametrize('line,message', BAD.values(), ids=BAD)
def test_task_is_data(lib, task_dir, tmp_path, line, message):
    "A task file that would run code, or read elsewhere, is refused; nothing of it runs"
    from unsloth_nb.evaluation.harness import check_tasks

    (tmp_path / 'secret.jsonl').write_text('{}')
    key = line.split(':')[0]
    (task_dir / 'pick.yaml').write_text(yaml.safe_dump({k: v for k, v in TASK.items() if k != key}) + line + '\n')
    with pytest.raises(SpecError, match=message):
        check_tasks(['pick'], task_dir)
    assert not (tmp_path / 'ran').exists()


def test_link_outside(task_dir, tmp_path):
    "A link in the folder does not lead out of it"
    from unsloth_nb.evaluation.harness import own_tasks

    (tmp_path / 'secret.jsonl').write_text('{}')
    (task_dir / 'rows.jsonl').unlink()
    (task_dir / 'rows.jsonl').symlink_to(tmp_path / 'secret.jsonl')
    with pytest.raises(SpecError, match='no file .rows.jsonl. in the folder'):
        own_tasks(task_dir)


def test_standard_tasks(lib, task_dir, monkeypatch):
    "Unknown names, a Hub out of reach, a package that is not there: clear, and before anything is asked"
    from unsloth_nb.evaluation import harness as h

    with pytest.raises(SpecError, match="no task 'arc_esy'; did you mean 'arc_easy'"):
        h.check_tasks(['arc_esy'])
    with pytest.raises(
        SpecError, match='tasks: arc_easy cannot be read.*offline|tasks: arc_easy cannot be read.*Offline'
    ):
        h.check_tasks(['arc_easy'])
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(SpecError, match='cannot be reached.*HF_HUB_OFFLINE=1'):
        h.check_tasks(['arc_easy'])
    h._manager.cache_clear()
    monkeypatch.setattr(h.importlib.util, 'find_spec', lambda n: None)
    with pytest.raises(SpecError, match=r'unsloth_nb\[eval\]'):
        h.check_tasks(['pick'], task_dir)


# Runs side by side


@pytest.fixture
def scored(tmp_path):
    "A function that writes a finished run with scores of rows"

    def f(values, rows='r1', weights=None, text=None, **params):
        run = start_run(FinetuneJob(**params), tmp_path)
        if values is not None:
            run.save('statistics', dict(rows_sha256=rows, values=dict(tuned=values), weights=weights or {}))
        if text is not None:
            (run.path / 'statistics.json').write_text(text)
        return run.finish(tuned={})

    return f


def test_compare_runs(scored, tmp_path):
    "By name, in order; other rows, other weights and missing scores are said; the first is compared with none"
    a = scored(dict(exact_match=[1, 0, 0, 0, 0, 0, 0]))
    b = scored(dict(exact_match=[1] * 7))
    c = scored(dict(exact_match=[1] * 7), rows='r2')
    d = scored(dict(other=[1] * 7))
    e = scored(None)
    board = compare_runs([a.name, b, c.path, d, e], tmp_path)
    rows = board.standings['exact_match']
    assert [r.difference and r.difference.p for r in rows] == [None, 2 / 2**6, None, None, None]
    assert (
        [bool(r.note) for r in rows] == [True, False, True, True, True]
        and 'other held-out rows' in rows[2].note
        and 'no exact_match' in rows[4].note
    )
    with pytest.raises(SpecError, match='holds no scores'):
        compare_runs([e, a])
    with pytest.raises(SpecError, match='name at least one'):
        compare_runs([])


@pytest.mark.parametrize(
    'text',
    [
        '{',
        '[]',
        '{"values": 3}',
        '{"values": {"tuned": {"exact_match": "x"}}}',
        '{"values": {"tuned": {"exact_match": ["a"]}}}',
        '{"values": {"tuned": {"loss": [1, 2]}}, "weights": {"loss": [1]}}',
    ],
)
def test_broken_statistics(scored, text):
    "A file that was edited badly is named"
    good = scored(dict(exact_match=[1, 0]))
    bad = scored(None, text=text)
    with pytest.raises(RunError, match=f'{bad.name}: statistics.json'):
        compare_runs([good, bad])


def test_page(scored, tmp_path):
    "Names from anywhere are text on the page, which may run and load nothing"
    runs = [scored({HOSTILE: [1, 0]}, dataset=HOSTILE), scored({HOSTILE: [1, 1]}, dataset='events')]
    page = write_comparison(runs, tmp_path / 'page.html', title=HOSTILE).read_text()
    assert '<img' not in page and '\x1b' not in page and "default-src 'none'" in page and page.count('&lt;img') >= 3
    board = compare_runs(runs)
    assert '<img' not in board._repr_markdown_() and '\x1b' not in repr(board)
    assert not [p for p in Path(tmp_path).iterdir() if p.name.startswith('.page')]


def test_one_held_out_row():
    "A single row has a difference, and nothing that chance could not explain: no interval, no crash"
    for first, second in (([0.5], [0.7]), ([0.0], [1.0]), ([0.3], [0.3])):
        d = difference(first, second, weights=[3])
        assert (d.n, d.p, d.low, d.high) == (1, 1.0, None, None)
    assert difference([0.0], [1.0]).p == 1.0 and estimate([0.4]).low is None
    assert 'too few' in caution(1)


@pytest.mark.slow
def test_recorded_cell_by_cell(asked, lib, tmp_path, monkeypatch):
    "What `finetune` made and `compare` scored has scores in its result, statistics, samples and a report, as a job's run"
    model, rows = asked
    monkeypatch.setenv('UNSLOTH_NB_RUNS_DIR', str(tmp_path))
    job = model.job.replace(max_steps=1, learning_rate=1e-5)
    run = lib.finetune(model, lib.load_data(job), job)
    page = (run.path / 'report.html').read_text()
    assert run.status == 'finished' and run.name in page and 'Before and after' not in page
    found = lib.compare(model, rows, run, max_new_tokens=4, bootstrap_samples=199)
    done = lib.open_run(run.name).result
    assert {k: done['metrics'][k] for k in ('base', 'tuned')} == json.loads(json.dumps(found.metrics))
    assert done['metrics']['training']['steps'] == 1 and done['artifacts']
    assert (run.path / 'samples.jsonl').exists() and (run.path / 'statistics.json').exists()
    page = (run.path / 'report.html').read_text()
    assert 'Before and after' in page and 'exact_match' in page and '<script' not in page
    assert lib.list_runs()[0].result['metrics']['tuned'] == done['metrics']['tuned']
    assert lib.compare_runs([run]) is not None
    (run.path / 'notebook.ipynb').write_text('{}')
    lib.evaluate(model, rows, run=run, max_new_tokens=2)
    assert lib.open_run(run.name).result == done
