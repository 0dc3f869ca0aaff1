"What must hold after the cells of the page what_the_loss_sees, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% bbf0c3bb
test_eq(learned(ex), 'Paris.<|im_end|>')

# %% 2e3e070a
test_eq(len(fmt.notes()), 1)
assert '[[Paris.<|im_end|>]]' in str(ex)

# %% 383b3879
test_eq((plain.trained, ex.trained), (len(plain), 3))

# %% 537d7f7a
test_eq([learned(e) for e in examples], [c.messages[-1]['content'] + tok.eos_token for c in data.train])

# %% 14d64cad
assert tok.eos_token_id in batch['input_ids'][0].tolist() and tok.eos_token_id not in batch['labels'][0].tolist()

# %% 9cc8ec94
test_eq(learned(Formatter(padded).example(paris)), 'Paris.<|im_end|>')
with expect_fail(FormatError, 'so the model would never learn to stop'):
    Formatter(endless).example(paris)

# %% fb0e7dc5
test_eq(ids[:2], [twice.bos_token_id] * 2)

# %% 6c67a3c0
test_eq(once.input_ids.count(twice.bos_token_id), 1)
with expect_fail(FormatError, "begins with the start token '<|endoftext|>' twice"):
    Formatter(twice).example(paris)

# %% 81b1f5df
assert ids[-1] != tok.eos_token_id

# %% d9920495
with expect_fail(FormatError, 'more than max_seq_length=96; raise max_seq_length'):
    make_examples([paris, count], fmt, 96)
test_eq(cut.tokens.came, len(fmt.example(paris)) + len(fmt.example(count)))
test_eq(cut.tokens.left_out['cut'], len(fmt.example(count)) - 96)

# %% ffb28576
test_eq(tok.decode(ids).count('<|im_start|>assistant'), 2)

# %% 41a270bb
with expect_fail(FormatError, "row 7: the text holds '<|im_end|>', which the tokenizer reads as a control token"):
    fmt.example(sly)
test_eq(escaped.input_ids.count(tok.eos_token_id), 3)
test_eq(learned(escaped), 'You are welcome.<|im_end|>')
test_eq(tok.decode(escaped.input_ids), tok.decode(ids))

# %% 7dd41308
test_eq(
    [learned(v) for v in views],
    [
        'Hello!<|im_end|>2<|im_end|>',
        '2<|im_end|>',
        'Hi<|im_end|>What is 1+1?<|im_end|>',
        tok.decode(views[0].input_ids),
    ],
)

# %% 21706c20
test_eq(last, '2<|im_end|>')
with expect_fail(FormatError, 'nothing in it is trained'):
    fmt.example(turns)

# %% d661a056
test_eq(learned(fmt.example(pirate)), 'Arr!<|im_end|>')
with expect_fail(FormatError, 'the chat template leaves out the system message'):
    Formatter(deaf).example(pirate)

# %% 65d86210
with expect_fail(FormatError, 'the chat template leaves out'):
    fmt.example(asked)

# %% f10f9e88
test_eq(len(got), 3)

# %% a4c67ff4
test_eq((many.rows.came, many.rows.kept_total, many.rows.noted['examples']), (1, 1, 3))

# %% cffa2e31
test_eq(learned(raw.example(note)), note.text + tok.eos_token)

# %% 9c43d69d
test_eq([i for p in parts for i in p.input_ids], raw.example(note).input_ids)
test_eq([p.input_ids.count(tok.eos_token_id) for p in parts], [0] * (len(parts) - 1) + [1])

# %% ef563b93
test_eq(tok.convert_ids_to_tokens(stop), ['<|im_end|>'])

# %% 9d6cb4e2
test_eq((alpaca.template, alpaca.reason), ('alpaca', 'the model has no chat template'))

# %% ef4d47a4
with expect_fail(FormatError, 'the Alpaca prompt has room for one instruction and one answer'):
    alpaca.example(more)
test_eq(learned(chatml.example(more)), 'Hello!<|im_end|>2<|im_end|>')

# %% 871702a4
assert new.chat_template and base.chat_template is None
with expect_fail(FormatError, 'does not have as a control token'):
    use_template(base, 'llama-3')

# %% 13acee5c
test_eq(report.tokens, examples.tokens.came)
assert report.random['efficiency'] < report.grouped['efficiency'] <= 1

# %% 93cb517a
for e, k in zip(got, (1, 3, 5)):
    prompt = qwen.prompt_ids(Conversation(asked.messages[: k + 1], tools=tools))
    test_eq(e.input_ids[: len(prompt)], prompt)
    test_eq(e.mask.index(True), len(prompt))

# %% 74819fb4
assert same
