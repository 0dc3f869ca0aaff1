"Templates as the world has them: what of a row ends up in the text, where its answer ends, and whose fault a refusal is."

import copy
import subprocess
import sys
from datetime import datetime
import pytest
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import FinetuneJob
from unsloth_nb.core.template_sandbox import freeze_template_clock

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = TURN.replace('BODY', 'm.content') + PROMPT
CALLS = "m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ ARGUMENTS }}</call>{% endfor %}{{ ''"
U = dict(role='user', content='Two and two?')
A = dict(role='assistant', content='Four.')
THOUGHT = dict(role='assistant', content='<think>\nTwo twos.\n</think>\n\nFour.')


@pytest.fixture(scope='module')
def tok(lib):
    return lib.load_tokenizer(lib.FinetuneJob())


@pytest.fixture
def spans(lib, tok):
    "A function that gives what is trained of messages under a template, example by example"

    def f(template, *messages, **kw):
        t = copy.deepcopy(tok)
        t.chat_template = template
        found = lib.Formatter(t, **kw).renderings(lib.Conversation([*messages], row=5))
        return [[text for text, on in pieces if on] for pieces in found]

    return f


def test_thinking_that_is_cut_out(spans, lib):
    "An answer's own text stands in its span, or the row is refused by its number"
    cut = TURN.replace('BODY', "m.content.split('</think>')[-1]") + PROMPT
    assert spans(cut, U, A) == [['Four.<|im_end|>']]
    with pytest.raises(lib.FormatError, match=r'row 5, turn 2: .* the thinking in its text \(<think>…</think>\)'):
        spans(cut, U, THOUGHT)
    short = TURN.replace('BODY', 'm.content[:4]') + PROMPT
    with pytest.raises(lib.FormatError, match='row 5, turn 2: .* its text, or a part of it'):
        spans(short, U, dict(A, content='Four, I think.'))


def test_thinking_goes_where_the_template_wants_it(spans):
    "In the text of an answer or apart from it: the same is trained"
    knows = (
        TURN.replace(
            'BODY', "'<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' if m.reasoning_content else '' }}{{ m.content"
        )
        + PROMPT
    )
    apart = dict(A, reasoning_content='Two twos.')
    assert spans(knows, U, THOUGHT) == spans(knows, U, apart) == [[THOUGHT['content'] + '<|im_end|>']]


STANDING = dict(
    chatml=TURN.replace('BODY', 'm.content') + "{{ '<|im_start|>assistant\\n' }}",
    llama3="{% for m in messages %}<reponame>{{ m.role }}<file_sep>\n\n{{ m.content }}<|im_end|>{% endfor %}{{ '<reponame>assistant<file_sep>\\n\\n' }}",
)


@pytest.mark.parametrize('template', STANDING.values(), ids=STANDING)
def test_prompt_that_always_stands(spans, template):
    "A template that writes the next prompt whether asked or not: no header is trained, and answers end where they end"
    assert spans(template, U, A, U, A) == [['Four.<|im_end|>', 'Four.<|im_end|>']]


def test_next_role_ends_the_answer(lib, tok):
    "As in GLM-4: the first token of the next turn is trained, stops the model and is noted"
    t = copy.deepcopy(tok)
    t.chat_template = (
        "{% for m in messages %}{{ '<file_sep>' if m.role == 'user' else '<reponame>' }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<reponame>\n{% endif %}"
    )
    fmt = lib.Formatter(t)
    found = fmt.renderings(lib.Conversation([U, A, U, A]))
    assert [[x for x, on in ps if on] for ps in found] == [['Four.<file_sep>', 'Four.<file_sep>']]
    assert t.convert_tokens_to_ids('<file_sep>') in fmt.stop_ids()
    assert any("'<file_sep>', the next turn's first" in n for n in fmt.notes())


def test_end_that_only_a_next_turn_brings(spans):
    "As in the first Qwen 1.5: the last answer of a text has its end too"
    late = PLAIN.replace(
        '<|im_end|>\n{% endfor %}', "{{ '<|im_end|>\\n' if add_generation_prompt or not loop.last }}{% endfor %}"
    )
    assert spans(late, U, A) == [['Four.<|im_end|>']] and spans(late, U, A, U, A) == [['Four.<|im_end|>'] * 2]


@pytest.mark.parametrize('line', ['\n', ''], ids=['line', 'no line'])
def test_prompt_that_begins_to_think(spans, line):
    "As in R1's distillations: the answer is thinking, its end and the text; in what came before there is no thinking"
    opens = TURN.replace('BODY', "m.content.split('</think>')[-1].strip()") + PROMPT.replace(
        '{% endif %}', f'<think>{line}{{% endif %}}'
    )
    told = f'Two twos.{line}</think>{line * 2}Four.<|im_end|>'
    apart = dict(A, reasoning_content='Two twos.')
    assert spans(opens, U, THOUGHT) == spans(opens, U, apart) == [[told]]
    assert spans(opens, U, A, U, apart) == [[f'{line}</think>{line * 2}Four.<|im_end|>'], [told]]


CALL = dict(
    role='assistant',
    content='',
    tool_calls=[dict(id='abcdefgh1', type='function', function=dict(name='add', arguments=dict(a=2)))],
)
RESULT = dict(role='tool', content='4', name='add', tool_call_id='abcdefgh1')
STYLES = dict(
    ids="{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id|length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}{% endfor %}{% endfor %}"
    + TURN.replace('BODY', CALLS.replace('ARGUMENTS', 'c.function.arguments|tojson'))
    + PROMPT,
    text=TURN.replace('BODY', CALLS.replace('ARGUMENTS', "'' + c.function.arguments")) + PROMPT,
    no_content="{% for m in messages %}{% if m.tool_calls and m.content is not none %}"
    "{{ raise_exception('a call has no content') }}{% endif %}{% endfor %}"
    + TURN.replace('BODY', CALLS.replace('ARGUMENTS', "'' + c.function.arguments"))
    + PROMPT,
)


@pytest.mark.parametrize('template', STYLES.values(), ids=STYLES)
def test_calls_as_they_are_wanted(spans, template):
    "Nine characters in an id, arguments as text, no content: what a template wants is found, and the row is trained"
    assert spans(template, U, CALL, RESULT, A) == [['<call>add {"a": 2}</call><|im_end|>', 'Four.<|im_end|>']]


def test_refusal_of_an_invented_call_is_not_the_rows(lib, tok):
    "A template that refuses the call it is asked with trains rows without calls, and says what it refuses of others"
    t = copy.deepcopy(tok)
    t.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no calls today') }}{% endif %}{% endfor %}"
        + PLAIN
    )
    fmt = lib.Formatter(t)
    assert fmt.renderings(lib.Conversation([U, A])) and fmt.stop_ids() == [t.eos_token_id]
    with pytest.raises(lib.FormatError, match='row 5: the chat template refuses it: .*no calls today'):
        fmt.renderings(lib.Conversation([U, CALL, RESULT, A], row=5))


def test_template_of_ones_own(lib, tmp_path):
    "A .jinja file: the job keeps its text, so a run needs the file no more"
    f = tmp_path / 'mine.jinja'
    f.write_text(PLAIN.replace('<|im_start|>assistant', '<|im_start|>helper'))
    job = FinetuneJob(template=str(f))
    f.unlink()
    assert job.template.endswith('{% endif %}') and FinetuneJob(**job.to_dict()) == job
    fmt = lib.Formatter.for_job(job, lib.load_tokenizer(job))
    assert fmt.prompt([U]).endswith('<|im_start|>helper\n') and fmt.reason == 'one of your own, asked for'
    assert fmt.tok.chat_template == job.template
    (tmp_path / 'empty.jinja').write_text('Hello')
    for name, says in (
        (str(f), 'cannot be read'),
        (str(tmp_path / 'empty.jinja'), 'no Jinja template'),
        ('chatlm', "did you mean 'chatml'"),
    ):
        with pytest.raises(SpecError, match=says):
            FinetuneJob(template=name)


def test_arguments_of_a_template(lib, tok):
    "They go wherever the template goes; a name that it does not read is refused"
    t = copy.deepcopy(tok)
    t.chat_template = "{{ 'Think.' if enable_thinking else 'Quick.' }}{{ day }}" + PLAIN
    job = FinetuneJob(template_args=dict(enable_thinking='false', day='{{ "Monday" }}'))
    assert job.template_args['enable_thinking'] is False
    fmt = lib.Formatter.for_job(job, t)
    assert fmt.prompt([U]).startswith('Quick.{{ "Monday" }}<|im_start|>user')
    assert lib.Formatter.for_job(job, fmt.tok).tok.chat_template == fmt.tok.chat_template != t.chat_template
    with pytest.raises(lib.FormatError, match="does not read 'enable_thinkin'"):
        lib.Formatter(t, template_args=dict(enable_thinkin=True))
    with pytest.raises(lib.FormatError, match="only a chat template takes them, and these rows take 'alpaca'"):
        lib.Formatter(t, 'alpaca', template_args=dict(day='Monday'))
    with pytest.raises(SpecError, match="'messages' is no name"):
        FinetuneJob(template_args=dict(messages='x'))


def test_clock_of_a_run(lib, tok, tmp_path):
    "A template that writes the date writes the day on which the run began, also when it goes on after midnight"
    t = copy.deepcopy(tok)
    t.chat_template = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    fmt = lib.Formatter(t)
    try:
        freeze_template_clock(datetime(2024, 7, 26))
        assert fmt.prompt([U]).startswith('26 Jul 2024')
        run = lib.start_run(FinetuneJob(), tmp_path)
        assert fmt.prompt([U]).startswith(datetime.now().strftime('%d %b %Y'))
        env = run.path / 'env.json'
        began = datetime.now().strftime('%Y-%m-%d')
        env.write_text(env.read_text().replace(f'"started": "{began}', '"started": "2025-02-03'))
        lib.open_run(run.name, tmp_path).freeze_clock()
        assert fmt.prompt([U]).startswith('03 Feb 2025')
    finally:
        freeze_template_clock(None)


def test_thinking_or_not_in_the_same_template(spans):
    "Without reasoning nothing of it is invented where the template does not ask for it"
    assert spans(PLAIN, U, A) == [['Four.<|im_end|>']] and spans(PLAIN, U, THOUGHT) == [
        [THOUGHT['content'] + '<|im_end|>']
    ]


def test_a_witness_has_the_day_of_the_run(tmp_path):
    "Plain transformers, in a fresh process, writes the date of the run's own day: an export on another day is judged alike"
    code = """
from unsloth_nb.export.witness import as_of
as_of('2024-07-26T12:00:00')
from transformers.utils.chat_template_utils import render_jinja_template
print(render_jinja_template([[]], chat_template="{{ strftime_now('%d %B %Y') }}")[0][0])"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert said.stdout.strip() == '26 July 2024', said.stderr
