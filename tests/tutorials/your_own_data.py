"What must hold after the cells of the page your_own_data, each under the id of its cell."

# ruff: noqa: F403, F405, F821
import io
from contextlib import redirect_stdout
from fastcore.test import *
from typer.testing import CliRunner
from unsloth_nb.cli import app

# %% dd88f440
assert 'dataset_columns=prompt:question,completion:answer' in why

# %% 0fa4d355
with expect_fail(DataError, "has no column 'anwser'; did you mean 'answer'?"):
    load_data(job.replace(dataset_columns=dict(prompt='question', completion='anwser')))

# %% 9077832e
assert all(s in why for s in ("row 36: column 'completion' is empty", 'U+0000', 'line 41 is not JSON'))

# %% f2bcfaf2
test_eq(
    (data.ledger.left_out['malformed'], data.ledger.left_out['empty'], data.ledger.noted['control_characters_removed']),
    (1, 1, 1),
)

# %% 8e46ea28
test_eq(ledger.came, len(rows) + 1)
test_eq(ledger.came, len(data.train) + len(data.test) + sum(ledger.left_out.values()))

# %% d40f338f
with expect_fail(DataError, 'max_dropped: 2 of 41 rows (5%) would be dropped, more than 1%'):
    load_data(job.replace(max_dropped=0.01))

# %% 2b0f2733
assert any('equal to an earlier one' in w for w in data.warnings)
test_eq(data.unused, ['ticket'])

# %% 3d889549
test_eq(data.ledger.left_out['duplicates'], 1)

# %% a7ce2e55
test_eq(apart.ledger.left_out['overlap'], 6)

# %% 911c8a04
test_eq({d.fingerprint for d in same.values()}, {data.fingerprint})

# %% 42a31c3a
test_eq(chat.format, 'sharegpt')
test_eq([m['role'] for m in chat.train[0].messages], ['user', 'assistant', 'tool', 'assistant'])

# %% 9f1f7042
test_eq(better.train[0].messages[-1]['content'], 'Yes, within five days.')

# %% 40790432
test_eq(texts.tokens.left_out, dict(cut=0, dropped=0))
assert max(texts.lengths) <= 64 and len(texts) > texts.rows.came

# %% 1fd6a092
test_eq(profile.over, 1)
assert 'more than max_seq_length=2048' in str(problem)

# %% 6513b337
assert profile.percentiles[100] > 50 * profile.percentiles[95]

# %% e79bed63
test_eq((problem, examples.rows.left_out['too_long']), (None, 1))
test_eq(examples.tokens.came, sum(examples.tokens.kept.values()) + sum(examples.tokens.left_out.values()))

# %% 227d446f
assert max(examples.lengths) <= 128
args = (
    'data support.jsonl -p dataset_columns=prompt:question,completion:answer -p malformed=drop -p empty=drop '
    '-p control_characters=remove -p duplicates=drop -p over_length=drop --max-seq-length 128'
)
shown = CliRunner().invoke(app, args.split())
printed = io.StringIO()
with redirect_stdout(printed):
    print_data(everything, examples, profile, show=0)
test_eq(shown.exit_code, 0)
test_eq(shown.output, printed.getvalue())

# %% 3453009b
test_eq((len(took) - sum(took), sum(took)), (24, 8))

# %% af5b548a
test_eq(FinetuneJob(**chosen).to_dict(), job.to_dict())

# %% f1c3ce43
test_eq(again.to_dict(), job.to_dict())

# %% bfdcb6c9
for d in (data, load_data(job.replace(duplicates='keep'))):
    trained = [c.messages for c in d.train]
    test_eq([c.row for c in d.test if c.messages in trained], [])
