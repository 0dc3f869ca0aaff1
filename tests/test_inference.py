"Asking the model: order, stop strings, streams, seeds, limits, calls of tools, and what the notebook keeps."

import io
import json
import threading
from contextlib import redirect_stdout
from dataclasses import asdict
import pytest
from hypothesis import given, settings, strategies as st

from unsloth_nb.core.schema import SpecError


@pytest.fixture(scope='module')
def inf(lib):
    from unsloth_nb.evaluation import generation as inference

    return inference


@pytest.fixture(scope='module')
def model(lib):
    return lib.load_model(lib.FinetuneJob(max_seq_length=512, gradient_checkpointing=False, dtype='float32'))


FRANCE = 'What is the capital of France?'


def rest(pieces):
    "All pieces, and what the generator returns"
    out = []
    while True:
        try:
            out.append(next(pieces))
        except StopIteration as e:
            return out, e.value


def test_order_and_padding(inf, model):
    "Answers come in the order of the questions whatever the batch size, and equal those asked alone"
    qs = ['Name a colour.', 'Repeat: ' + 'one two three ' * 20, FRANCE, '1+1?']
    s = inf.Sampling(max_new_tokens=8)
    alone = [inf.generate(model, q, s) for q in qs]
    assert len({a.text for a in alone}) == 4
    for size in (2, 3):
        assert inf.generate(model, qs, s, batch_size=size) == alone
    got = inf.generate(model, qs, s)
    assert isinstance(got, list) and json.loads(json.dumps([asdict(a) for a in got])) == [asdict(a) for a in alone]
    assert [inf.Answer(**asdict(a)) for a in got] == alone
    assert got.tokens == sum(a.tokens for a in alone) and got.seconds > 0 and got.peak_bytes > 2**28
    assert model.tok.padding_side == 'right'


@pytest.mark.parametrize(
    'stop,text',
    [
        (' Fr', 'The capital of'),
        ('al of F', 'The capit'),
        ('Paris', 'The capital of France is '),
        (('zzz', '.'), 'The capital of France is Paris'),
        ('The', ''),
        (('is', 'capital of'), 'The '),
    ],
)
def test_stop_string(inf, model, stop, text):
    "Cut before the first stop string, inside tokens and across them; the stream never shows a part of it"
    s = inf.Sampling(max_new_tokens=10, stop=stop)
    a = inf.generate(model, FRANCE, s)
    assert (a.text, a.finish, a.stopped) == (text, 'stop_string', True)
    ids = model.tok.encode('The capital of France is Paris.')
    assert a.tokens == next(n for n in range(len(ids) + 1) if any(t in model.tok.decode(ids[:n]) for t in s.stop))
    parts, streamed = rest(inf.stream(model, FRANCE, s))
    assert ''.join(parts) == text and streamed == a
    assert inf.generate(model, [FRANCE, '1+1?'], s)[0] == a


def test_stop_string_ends_the_work(inf, model):
    "A row whose stop string has come costs no more steps"
    steps = []
    head = model.model.get_output_embeddings().register_forward_hook(lambda *a: steps.append(1))
    try:
        inf.generate(model, FRANCE, inf.Sampling(max_new_tokens=24, stop='capital'))
    finally:
        head.remove()
    assert len(steps) <= 4


def test_unfulfilled_stop_string(inf, model):
    "A tail that looked like a stop string is given out in the end"
    parts, a = rest(inf.stream(model, FRANCE, inf.Sampling(max_new_tokens=24, stop='Paris.\n\nAnd')))
    assert ''.join(parts) == a.text == 'The capital of France is Paris.' and a.finish == 'stop'


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from('ab \nüß漢字👩🏽‍🚀.é'), max_size=24),
    stop=st.lists(st.text(st.sampled_from('ab ü漢👩'), min_size=1, max_size=3), max_size=2),
)
def test_pieces_are_the_text(lib, model, text, stop):
    "For any text: the pieces of a stream are what `cut_answer` cuts, and no character or stop string is shown in part"
    from unsloth_nb.evaluation.generation import cut_answer, _find_stop, _stop_begun, _Text

    ids = model.tok.encode(text)
    want = cut_answer(model.tok, ids, {model.tok.eos_token_id}, tuple(stop))
    t = _Text(model.tok)
    sent = ''
    cut = None
    for i in ids:
        new = t.add(i)
        cut = _find_stop(new, stop, len(sent))
        sent = new[: len(new) - _stop_begun(new, stop) if cut is None else cut]
        assert want.text.startswith(sent)
        if cut is not None:
            break
    assert (sent if cut is not None else want.text) == want.text
    if not stop:
        assert want.text == text


def test_error_in_the_thread(inf, model, monkeypatch):
    "It surfaces at once, the thread is over, and the next question is answered"

    def broken(**kw):
        raise RuntimeError('no memory left')

    monkeypatch.setattr(model.model, 'generate', broken)
    with pytest.raises(RuntimeError, match='no memory left'):
        list(inf.stream(model, FRANCE))
    monkeypatch.undo()
    before = threading.active_count()
    pieces = inf.stream(model, FRANCE, inf.Sampling(max_new_tokens=200))
    next(pieces)
    pieces.close()
    assert threading.active_count() == before and model.tok.padding_side == 'right'
    assert 'Paris' in inf.generate(model, FRANCE, inf.Sampling(max_new_tokens=10)).text


def test_seeds(inf, model):
    "Same seed, same samples, whatever the batch; the global random state is neither read nor changed"
    import torch

    s = inf.Sampling(
        max_new_tokens=6, temperature=1.2, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=3
    )
    qs = ['Tell me a story.'] * 2 + ['Name an animal, and say why you like it.']
    state = torch.get_rng_state()
    got = inf.generate(model, qs, s)
    torch.manual_seed(99)
    assert inf.generate(model, qs, s, batch_size=1) == got
    assert rest(inf.stream(model, qs[0], s))[1] == got[0] == inf.generate(model, qs[0], s)
    assert got[0] != got[1] != inf.generate(model, qs, inf.replace(s, seed=4))[1]
    fresh = inf.generate(model, qs[:1], inf.replace(s, seed=None))
    assert inf.generate(model, qs[:1], fresh.sampling) == fresh
    torch.set_rng_state(state)


def test_samples_have_the_probabilities(inf):
    "The noise picks each token as often as its probability says, and only what the cuts leave"
    import torch

    p = torch.tensor([0.5, 0.25, 0.15, 0.1])

    def draw(**kw):
        sampler = inf._Sampler(inf.Sampling(temperature=1.0, seed=5, **kw), range(200), 'cpu')
        picks = torch.cat([sampler(None, p.log().repeat(200, 1)).argmax(-1) for _ in range(40)])
        return torch.bincount(picks, minlength=4) / len(picks)

    assert (draw() - p).abs().max() < 0.02
    for kw in (dict(top_k=2), dict(top_p=0.7), dict(min_p=0.4)):
        assert (draw(**kw) - torch.tensor([2 / 3, 1 / 3, 0, 0])).abs().max() < 0.02


def test_model_files_decide_nothing(inf, model):
    "A generation_config that came with the weights does not change an answer"
    config = model.model.generation_config
    s = inf.Sampling(max_new_tokens=10)
    want = inf.generate(model, FRANCE, s)
    kept = dict(
        do_sample=config.do_sample, temperature=config.temperature, repetition_penalty=config.repetition_penalty
    )
    config.do_sample = True
    config.temperature = 5.0
    config.repetition_penalty = 3.0
    try:
        assert inf.generate(model, FRANCE, s) == want
    finally:
        for k, v in kept.items():
            setattr(config, k, v)


@pytest.mark.parametrize(
    'prompts,kw,message',
    [
        ([], {}, 'the list is empty'),
        (None, {}, 'got NoneType'),
        (dict(role='user', content='x'), {}, 'got dict'),
        ([None], {}, 'prompt 0: expected a text'),
        (['x', []], {}, 'prompt 1: expected a text'),
        ([dict(role='user', content='x')], {}, 'put it into a list'),
        (['x'], dict(sampling=3), 'expected Sampling'),
        (['Hi', 'word ' * 8200], {}, 'prompt 1: 82.. tokens and max_new_tokens=256 are .* more than the 8192'),
        (['x'], dict(tools=['f']), 'tool 1 cannot be used'),
    ],
)
def test_refusals(inf, model, prompts, kw, message):
    "What cannot be asked is refused with its place before anything is computed"
    with pytest.raises(SpecError, match=message):
        inf.generate(model, prompts, **kw)


@pytest.mark.parametrize(
    'kw,message',
    [
        (dict(temprature=1), "did you mean 'temperature'"),
        (dict(temperature='hot'), "temperature: got 'hot'"),
        (dict(max_new_tokens=0), 'max_new_tokens: got 0'),
        (dict(max_new_tokens=1.5), 'max_new_tokens: got 1.5'),
        (dict(temperature=float('nan')), 'temperature: got nan'),
        (dict(top_k=5), 'greedy decoding does not read it'),
        (dict(stop=('',)), 'stop: got'),
        (dict(stop=(3,)), 'stop: got'),
        (dict(seed=-1), 'seed: got -1'),
    ],
)
def test_sampling_refusals(inf, kw, message):
    with pytest.raises(SpecError, match=message):
        inf.Sampling(**kw)


def test_room_for_long_prompts(inf, model):
    "Unsloth's own limit is lifted while a prompt is longer than it, and put back"
    inner = model.model.get_base_model().model
    inner.max_seq_length = 512
    seen = []
    hook = inner.register_forward_pre_hook(lambda mod, args, kw: seen.append(mod.max_seq_length), with_kwargs=True)
    try:
        inf.generate(model, 'word ' * 600, inf.Sampling(max_new_tokens=1))
    finally:
        hook.remove()
        kept = inner.max_seq_length
        del inner.max_seq_length
    assert min(seen) > 600 and kept == 512


def test_chat(inf, model):
    "History and system message on both sides; a failure leaves them as they were; streams tell the side"
    from unsloth_nb.evaluation.chatting import Chat

    talk = Chat(model, 'Answer in one word.', inf.Sampling(max_new_tokens=8))
    parts, turn = rest(talk.stream(FRANCE))
    assert {k for k, _ in parts} == {'base', 'tuned'} and ''.join(p for k, p in parts if k == 'tuned') == turn.answers[
        'tuned'
    ].text
    assert [m['role'] for m in talk.histories['base']] == ['system', 'user', 'assistant'] and talk.turns == [turn]
    assert (
        talk(FRANCE).answers['tuned']
        == inf.generate(model, [[*talk.histories['tuned'][:3], dict(role='user', content=FRANCE)]], talk.sampling)[0]
    )
    before = {k: list(v) for k, v in talk.histories.items()}
    with pytest.raises(SpecError, match=r'more than the 8192 that the model reads; begin anew with chat.reset\(\)'):
        talk('word ' * 8190)
    pieces = talk.stream('Tell me a story.')
    next(pieces)
    pieces.close()
    assert talk.histories == before and len(talk.turns) == 2
    with pytest.raises(SpecError, match='expected a question'):
        talk(' ')
    talk.reset()
    assert not talk.turns and [m['role'] for m in talk.histories['tuned']] == ['system']


def test_shown_in_a_terminal(inf):
    "Text as text, without control characters; returns what the generator returns"

    def pieces():
        yield 'a\x1b[2J'
        yield 'b'
        return 7

    with redirect_stdout(out := io.StringIO()):
        assert inf.show_pieces(pieces()) == 7
    assert out.getvalue() == 'a[U+001B][2Jb\n'


def test_shown_in_a_notebook(tmp_path):
    "A real kernel: one output, in its last state, escaped; an error after it is shown as well"
    import nbformat
    from nbclient import NotebookClient

    code = "from unsloth_nb.evaluation.generation import show_pieces\ndef pieces():\n    for p in ('<b>', 'bold', '</b>\\x1b[2J'): yield p\n    raise ValueError('broken off')\nshow_pieces(pieces())"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=120, kernel_name='python3', allow_errors=True).execute()
    shown, error = nb.cells[0].outputs
    assert shown.output_type == 'display_data' and shown.data['text/plain'] == '<b>bold</b>[U+001B][2J'
    assert '&lt;b&gt;bold&lt;/b&gt;[U+001B][2J</div>' in shown.data['text/html'] and (error.ename, error.evalue) == (
        'ValueError',
        'broken off',
    )


def test_answers_show_text(inf):
    "What the model wrote is shown as text"
    got = inf.Answers([inf.Answer('<script>x</script>\x1b[2J', 3, False)], 2.0, 2**30)
    assert '<script' not in got._repr_html_() and '\x1b' not in got._repr_html_() + repr(got)
    assert '3 tokens in 2.0 s (2 tokens/s), peak memory 1.00 GiB' in repr(got) and (
        got[0].finish,
        got[0].tool_calls,
    ) == ('length', [])


WEATHER = dict(
    name='weather',
    parameters=dict(
        type='object',
        properties=dict(
            city=dict(type='string'), days=dict(type='integer'), at=dict(type='object'), tags=dict(type='array')
        ),
        required=['city'],
    ),
)
CALL = dict(name='weather', arguments=dict(city='Oslo', days=2))
ARGS = '{"city": "Oslo", "days": 2}'
WRITTEN = {
    'hermes': f'<tool_call>\n{{"name": "weather", "arguments": {ARGS}}}\n</tool_call>',
    'hermes, open': f'<tool_call>{{"name": "weather", "arguments": {ARGS}}}',
    'granite 3.1': f'<tool_call>[{{"name": "weather", "arguments": {ARGS}}}]',
    'qwen coder': '<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>',
    'llama json': f'{{"name": "weather", "parameters": {ARGS}}}',
    'llama json, typed': f'{{"type": "function", "name": "weather", "parameters": {ARGS}}}',
    'llama python tag': f'<|python_tag|>{{"name": "weather", "parameters": {ARGS}}}',
    'llama built-in': '<|python_tag|>weather.call(city="Oslo", days=2)',
    'llama function': f'<function=weather>{ARGS}</function>',
    'pythonic': "[weather(city='Oslo', days=2)]",
    'mistral': f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGS}, "id": "abcdefghi"}}]',
    'mistral v11': f'[TOOL_CALLS]weather[CALL_ID]abc123[ARGS]{ARGS}',
    'mistral v13': f'[TOOL_CALLS]weather[ARGS]{ARGS}',
    'granite': f'<|tool_call|>[{{"name": "weather", "arguments": {ARGS}}}]',
    'phi 4': f'<|tool_call|>[{{"name": "weather", "arguments": {ARGS}}}]<|/tool_call|>',
    'gemma 4': '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>',
    'functiongemma': '<start_function_call>call:weather{city:<escape>Oslo<escape>,days:2}<end_function_call>',
    'gpt-oss': f'<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGS}<|call|>',
    'gpt-oss, by its template': f'<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{ARGS}<|call|>',
    'deepseek': f'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{ARGS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    'deepseek 3.1': f'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    'arguments as text': '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 2}"}</tool_call>',
}


@pytest.fixture(scope='module')
def tools(lib):
    from unsloth_nb.tokens.tool_calls import as_tools

    return as_tools([WEATHER])


@pytest.mark.parametrize('text', WRITTEN.values(), ids=WRITTEN.keys())
def test_call_formats(tools, text):
    "Each family's way of writing; twice where it has a mark, with text before it; and cut at any place never lost in silence"
    from unsloth_nb.tokens.tool_calls import read_calls

    assert read_calls(text, tools) == ([CALL], '')
    if text[0] in '<[' and not text.startswith('[w') and 'python_tag' not in text:
        assert read_calls(f'Let me see. {text}\n{text}', tools) == ([CALL] * 2, 'Let me see.')
    for n in range(text.rindex('Oslo'), len(text)):
        calls, rest = read_calls(text[:n], tools)
        assert calls and (calls[0].get('error') or calls[0] == CALL), text[:n]


@pytest.mark.parametrize(
    'text,error',
    [
        ('<tool_call>{"name": "weather"}</tool_call>', "'city' is a required property"),
        ('<tool_call>{"name": "whether", "arguments": {}}</tool_call>', "did you mean 'weather'"),
        ('<tool_call>{"nam": "weather"}</tool_call>', 'needs a name'),
        ('<tool_call>{"name": "weather", "arguments": ["Oslo"]}</tool_call>', 'expected an object'),
        ('<tool_call>{"name": "weather", "arguments": {"city": 7}}</tool_call>', "city: 7 is not of type 'string'"),
        (f'<tool_call>{{"name": "weather", "arguments": {ARGS}}}}}</tool_call>', 'text behind the call'),
        ('<tool_call>weather(Oslo)</tool_call>', 'not JSON'),
        ('<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>', 'NaN is not JSON'),
        ('<|python_tag|>print(1)', 'arguments have names'),
        ('<|python_tag|>import os', 'neither JSON nor a call'),
        ("[weather(city=__import__('os').system('x'))]", 'malformed node'),
        ('[TOOL_CALLS] sorry', 'not JSON'),
        ('<function=weather><parameter=city>Oslo', 'not closed'),
        ('<|tool_call>call:weather{city:Oslo}<tool_call|>', 'not what Gemma writes'),
        ('<tool_call>' + '[' * 100_000, 'not JSON'),
    ],
)
def test_malformed_calls(tools, text, error):
    "A call that was begun is in the result, with what is wrong and the text; nothing of it is run"
    from unsloth_nb.tokens.tool_calls import read_calls

    (call, *more), rest = read_calls(text, tools)
    assert error in call['error'] and call['text'] and not more and rest == ''
    json.dumps(call)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    calls=st.lists(
        st.fixed_dictionaries(
            dict(
                name=st.from_regex(r'[a-zA-Z_]\w{0,10}', fullmatch=True),
                arguments=st.dictionaries(st.text(min_size=1, max_size=6), _json, max_size=3),
            )
        ),
        min_size=1,
        max_size=3,
    ),
    ascii=st.booleans(),
)
def test_json_calls_come_back(calls, ascii):
    "Whatever the arguments hold, closing tags of the format included"
    from unsloth_nb.tokens.tool_calls import read_calls

    def dump(v):
        return json.dumps(v, ensure_ascii=ascii)

    calls[0]['arguments']['tag'] = '</tool_call> [TOOL_CALLS] ; {'
    assert read_calls('\n'.join(f'<tool_call>\n{dump(c)}\n</tool_call>' for c in calls)) == (calls, '')
    assert read_calls('[TOOL_CALLS] ' + dump(calls)) == (calls, '')
    assert read_calls(
        '<|python_tag|>' + '; '.join(dump(dict(name=c['name'], parameters=c['arguments'])) for c in calls)
    ) == (calls, '')
    assert read_calls(''.join(f"[TOOL_CALLS]{c['name']}[ARGS]{dump(c['arguments'])}" for c in calls)) == (calls, '')


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                '<tool_call>',
                '</tool_call>',
                '<|python_tag|>',
                '[TOOL_CALLS]',
                '<function=f>',
                '</function>',
                '<parameter=a>',
                '</parameter>',
                '{',
                '}',
                '[',
                ']',
                '"name": "f"',
                ', ',
                '"arguments": {}',
                'call:f',
                '<|tool_call>',
                '<tool_call|>',
                ' to=functions.f',
                '<|message|>',
                'text',
                ' ',
                ';',
                'f(x=1)',
            ]
        ),
        max_size=12,
    ).map(''.join)
)
def test_any_text_is_read(text):
    "No text breaks the reader, and each mark of a beginning leads to a call or an error"
    from unsloth_nb.tokens.tool_calls import read_calls

    calls, rest = read_calls(text)
    assert all(set(c) in ({'name', 'arguments'}, {'name', 'arguments', 'error', 'text'}) for c in calls)
    if '[TOOL_CALLS]' in text or '<|python_tag|>' in text:
        assert calls


def test_template_calls_come_back(lib, tools, model):
    "What a chat template draws for a call is what the reader finds"
    from unsloth_nb.tokens.templates import Chat, use_template
    from unsloth_nb.tokens.tool_calls import parse_calls

    tok = use_template(model.tok, 'qwen-2.5')
    chat = lib.Conversation(
        [
            dict(role='user', content='Weather?'),
            dict(role='assistant', content='', tool_calls=[dict(type='function', function=CALL)]),
        ],
        tools=tools,
    )
    text, s, e = Chat(tok).answer(chat, 1)
    assert parse_calls(tok, text[s:e], tools) == ([CALL], '')


def test_tools_reach_the_template(inf, lib, model):
    "Tools are in the prompt, and a conversation's own stay its own"
    from unsloth_nb.tokens.templates import use_template

    caller = lib.LoadedModel(model.model, use_template(model.tok, 'qwen-2.5'), model.source, model.plan, model.job)
    ((ids, tools),) = inf.encode_prompts(caller.formatter, ['Weather?'], inf.Sampling(), 8192, 'Be kind.', [WEATHER])
    text = caller.tok.decode(ids)
    assert '"name": "weather"' in text and 'Be kind.' in text and tools[0]['function'] == WEATHER
    own = lib.Conversation([dict(role='user', content='Weather?')], tools=tools, row=5)
    assert inf.encode_prompts(caller.formatter, [own], inf.Sampling(), 8192)[0][1] == tools
    with pytest.raises(SpecError, match='row 5: the conversation has tools of its own'):
        inf.encode_prompts(caller.formatter, [own], inf.Sampling(), 8192, None, [WEATHER])
    with pytest.raises(lib.FormatError, match='leaves out the tools'):
        inf.generate(model, ['Weather?'], tools=[WEATHER])


def test_questions_from_a_pipe():
    "Blank lines are skipped; 'exit' ends, as the help says"
    import io
    from unsloth_nb.cli import talk

    asked = []
    out = io.StringIO()
    talk(lambda q: asked.append(q) or 'an answer', ['one\n', ' \n', 'two\n', 'exit\n', 'three\n'], out)
    assert asked == ['one', 'two']
