"`unsloth-nb data` as a shell sees it, and a job on data with tools under a template by name."

import json
import os
import subprocess
import sys
from pathlib import Path
import pytest

ROWS = [dict(question=f'{i}+1?', answer=str(i + 1), id=i) for i in range(12)]


@pytest.fixture
def data(tmp_path):
    "Run the command on rows: (exit code, stdout, stderr)"

    def f(rows, *args, name='rows.jsonl'):
        (tmp_path / name).write_text(rows if isinstance(rows, str) else '\n'.join(map(json.dumps, rows)))
        r = subprocess.run(
            [Path(sys.executable).parent / 'unsloth-nb', 'data', name, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={k: v for k, v in os.environ.items() if k != 'HF_HUB_ENABLE_HF_TRANSFER'},
        )  # Set by Unsloth, where an earlier test has imported it
        return r.returncode, r.stdout, r.stderr

    return f


def test_report(data):
    "Format and reason, ledger, profile, warnings with row numbers, and the tokens of as many rows as asked for"
    rc, out, err = data(
        [*ROWS, ROWS[3], dict(question='?', answer='')],
        '-p',
        'dataset_columns=prompt:question,completion:answer',
        '-p',
        'empty=drop',
        '--show',
        '2',
    )
    assert rc == 0, err
    for part in (
        'read as prompt_completion: it has prompt and completion',
        'left out: empty',
        'columns that are not used: id',
        '1 row left out, empty: 13',
        '1 row equal to an earlier one, kept: 12',
        'suggested max_seq_length: 64',
        'template chat',
        'packed, 2,048 tokens a row',
    ):
        assert part in out, out
    assert out.count('[[1<|im_end|>]]') == 1 and out.count('[[2<|im_end|>]]') == 1 and '[[3<|im_end|>]]' not in out


def test_json(data):
    "The same as JSON, with numbers that add up"
    rc, out, err = data([dict(prompt=r['question'], completion=r['answer']) for r in ROWS], '--json', '--show', '1')
    d = json.loads(out)
    rows = d['data']['ledger']
    tokens = d['examples']['tokens']
    assert rc == 0 and rows['came'] == 12 == sum(rows['kept'].values()) + sum(rows['left_out'].values())
    assert tokens['came'] == sum(tokens['kept'].values()) + sum(tokens['left_out'].values()) == d['profile']['tokens']
    assert d['data']['format'] == 'prompt_completion' and d['error'] is None and len(d['shown']) == 1


@pytest.mark.slow
def test_too_long(data):
    "Rows that are too long: the report stands, so that a length can be chosen, and the exit code is 2"
    rc, out, err = data([dict(text='word ' * n) for n in (5, 500)], '--max-seq-length', '128')
    assert (
        rc == 2
        and 'suggested max_seq_length: 512' in out
        and 'row 1: 502 tokens, 374 more than max_seq_length=128' in err
        and len(err.splitlines()) == 1
    )
    rc, out, err = data([dict(text='word ' * n) for n in (5, 500)], '--max-seq-length', '128', '--json')
    assert rc == 2 and 'row 1: 502 tokens' in json.loads(out)['error']


@pytest.mark.parametrize(
    'args,message',
    [
        ([], 'say dataset_columns=prompt:question,completion:answer'),
        (['--format', 'alpaka'], "dataset_format: got 'alpaka'"),
        (['--template', 'qwen-5'], "template: got 'qwen-5', no known template; did you mean 'qwen-"),
        (['--max-seq-length', 'long'], "max_seq_length: got 'long'; expected a whole number"),
        (['-p', 'dataset_columns=prompt'], "dataset_columns: got 'prompt'; expected pairs"),
        (
            ['-p', 'dataset_columns=prompt:queston,completion:answer'],
            "has no column 'queston'; did you mean 'question'?",
        ),
    ],
)
def test_refused(data, args, message):
    "What cannot be used ends with 2 and one message"
    rc, out, err = data(ROWS, *args)
    assert rc == 2 and message in err and out == '' and 'Traceback' not in err


def test_preference(data):
    "Preference data is shown by its better answers, and the report says that a job would refuse it"
    rc, out, err = data(
        [dict(prompt='1?', chosen='good', rejected='bad')] * 2 + [dict(prompt='2?', chosen='fine', rejected='bad')],
        '--show',
        '1',
    )
    assert rc == 0 and 'read as preference' in out and 'a finetune job refuses it' in out and '[[good' in out, err


@pytest.mark.slow
def test_job_with_tools(tiny, tmp_path):
    "A job on calls and tool results with a template by name: trained, evaluated, saved with that template, and answering after loading"
    from unsloth_nb import load_run
    from unsloth_nb.data.load import held_out
    from unsloth_nb.evaluation.generation import Sampling, generate
    from unsloth_nb.jobs.runner import run_job
    from conftest import TINY

    tools = json.dumps(
        [
            dict(
                name='add',
                parameters=dict(type='object', properties=dict(a=dict(type='integer'), b=dict(type='integer'))),
            )
        ]
    )
    rows = [
        dict(
            tools=tools,
            conversations=[
                {'from': 'human', 'value': f'{i}+1?'},
                {'from': 'function_call', 'value': json.dumps(dict(name='add', arguments=dict(a=i, b=1)))},
                {'from': 'observation', 'value': str(i + 1)},
                {'from': 'gpt', 'value': f'{i + 1}.'},
            ],
        )
        for i in range(16)
    ]
    (tmp_path / 'tools.json').write_text(json.dumps(rows))
    run = run_job(
        'finetune',
        runs_dir=tmp_path / 'runs',
        show=False,
        **TINY
        | dict(
            model=str(tiny), dataset=str(tmp_path / 'tools.json'), template='qwen-3', max_seq_length=512, max_steps=2
        ),
    )
    assert run.status == 'finished', run.result
    seen = json.loads((run.path / 'data.json').read_text())
    assert (
        seen['format'] == 'sharegpt'
        and seen['examples']['template_reason'] == 'qwen-3, asked for'
        and seen['examples']['rows']['kept'] == {'kept': 12}
    )
    model = load_run(run)
    assert '<tool_call>' in model.tok.chat_template
    convs = held_out(run.job)
    assert '<tools>' in model.formatter.prompt(convs[0]) and all(
        a.tokens for a in generate(model, convs, Sampling(max_new_tokens=4))
    )


def test_preference_job_is_refused(tmp_path):
    "Before a kernel starts, with the mend"
    from unsloth_nb.jobs.runner import run_job
    from unsloth_nb.data.sources import DataError

    (tmp_path / 'pairs.json').write_text(
        json.dumps([dict(prompt=f'{i}?', chosen='good', rejected='bad') for i in range(8)])
    )
    with pytest.raises(DataError, match='train_on_preferred=true'):
        run_job('finetune', runs_dir=tmp_path / 'runs', show=False, dataset=str(tmp_path / 'pairs.json'), test_size=2)
    assert not (tmp_path / 'runs').exists()
