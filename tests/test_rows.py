"Rows as people bring them: read whole, with everything that was changed counted, or refused with a fix that works."

import json
import re
import pytest
from unsloth_nb.core.schema import read_value
from unsloth_nb.core.spec import FinetuneJob
from unsloth_nb.data.formats import detect_format
from unsloth_nb.data.load import DataError, load_data
from unsloth_nb.data.turns import media_mark


def job(**kw):
    return FinetuneJob(**dict(test_size=1) | kw)


def read(*rows, **kw):
    return load_data(job(**kw), list(rows), split=False)


def turns(*said, **kw):
    return dict(messages=[dict(role=r, content=c) | more for r, c, *mores in said for more in [dict(*mores)]], **kw)


def noted(data):
    return {k: v for k, v in data.ledger.noted.items() if v}


def said(data, row=0):
    return [(m['role'], m['content']) for m in data.train[row].messages]


U = ('user', 'q')
A = ('assistant', 'a')
CHAT = [U, A]


# Suggestions that work ------------------------------------------------------------------------------------------------------------------
def speakers(i):
    return [dict(speaker='Client', text=f'Hello {i}'), dict(speaker='Clerk', text='Good day'),
            dict(speaker='Client', text='Bye'), dict(speaker='Clerk', text='Bye')]  # fmt: skip


LAYOUTS = {
    'question answer': lambda i: dict(question=f'q{i}', answer='a'),
    'capitals': lambda i: dict(Question=f'q{i}', Answer='a', id=i),
    'dolly': lambda i: dict(instruction=f'q{i}', context='c' if i else '', response='a', category='x'),
    'orca': lambda i: dict(id=i, system_prompt='s', question=f'q{i}', response='a'),
    'swift': lambda i: dict(query=f'q{i}', response='a', system='s', history=[['h', 'g']]),
    'swift without history': lambda i: dict(query=f'q{i}', response='a', history=[]),
    'summary of text': lambda i: dict(id=i, dialogue=f'A: hi\nB: {i}', summary='a'),
    'article': lambda i: dict(article=f'q{i}', highlights='a'),
    'speakers': lambda i: dict(dialogue=speakers(i), topic='t'),
    'pairs': lambda i: dict(conversation=[dict(input=f'q{i}', output='a'), dict(input='p', output='b')]),
    'human assistant pairs': lambda i: dict(dialog=[dict(human=f'q{i}', assistant='a')]),
    'strings': lambda i: dict(data=[f'q{i}', 'a', 'p', 'b']),
    'turns as text': lambda i: dict(chat=json.dumps(turns(('user', f'q{i}'), A)['messages'])),
    'turns under another name': lambda i: dict(turns=turns(('user', f'q{i}'), A)['messages'], system_message='s'),
    'medical': lambda i: dict(Question=f'q{i}', Complex_CoT='hm', Response='a'),
    'reasoning': lambda i: dict(problem=f'q{i}', reasoning='hm', solution='a'),
    'rationale': lambda i: dict(instruction=f'q{i}', rationale='hm', response='a'),
    'labels': lambda i: dict(text=f'q{i}', label=i % 2),
    'label text': lambda i: dict(sentence=f'q{i}', sentiment='good'),
    'text and summary': lambda i: dict(text=f'q{i}', summary='a'),
    'text and prompt': lambda i: dict(prompt=f'q{i}', text='a', model='m'),
    'passage and truth': lambda i: dict(question=f'q{i}', passage='c', answer=bool(i % 2)),
    'choices': lambda i: dict(question=f'q{i}', choices=['a', 'b'], answer=i % 2),
    'number': lambda i: dict(problem=f'q{i}', answer=i),
    'instruction question answer': lambda i: dict(instruction='i', question=f'q{i}', answer='a'),
    'object answer': lambda i: dict(query=f'q{i}', response=dict(n=i)),
    'body': lambda i: dict(article=f'text {i}', url='u'),
    'tools beside a chat': lambda i: dict(chat=turns(('user', f'q{i}'), A)['messages'], functions=[dict(name='f')]),
    'premise and hypothesis': lambda i: dict(premise=f'q{i}', hypothesis='h', label=i % 2),
    'source and target': lambda i: dict(src=f'q{i}', tgt='a'),
    'chosen alone': lambda i: dict(question=f'q{i}', chosen='a'),
    'older Gemini': lambda i: dict(text_input=f'q{i}', output='a'),
}
# Columns that have a meaning of their own, and so must not be lost in a suggestion
MEANT = {'context', 'hypothesis', 'passage', 'choices', 'system_prompt', 'system', 'history', 'Complex_CoT', 'reasoning', 'rationale',
         'system_message', 'summary', 'label', 'sentiment', 'question', 'functions', 'text'}  # fmt: skip


def as_params(text):
    "What an error says to set, as parameters"
    params = {}
    for part in text.split(' and '):
        name, _, value = part.partition('=')
        params[name] = value.strip("'") if name == 'dataset_format' else read_value(FinetuneJob, name, value)
    return params


@pytest.mark.parametrize('layout', LAYOUTS)
def test_what_is_suggested_works(layout):
    "Following an error to the letter reads every row, and leaves no column with a meaning unused"
    rows = [LAYOUTS[layout](i) for i in range(4)]
    with pytest.raises(DataError) as e:
        read(*rows)
    proposed = re.search(r'say (dataset_columns=.*?)(?:\. Known|$)', str(e.value))
    assert proposed, str(e.value)
    data = read(*rows, **as_params(proposed[1]))
    assert len(data.train) == 4 and not MEANT & set(data.unused), (proposed[1], data.unused)


@pytest.mark.parametrize(
    'row',
    [
        dict(chat='USER: Hi\n\nASSISTANT: Hello', system='s'),
        dict(translation=dict(en='house', fr='maison')),
        dict(context='c', question='q', answers=dict(text=['a'], answer_start=[1])),
        dict(dialogue=[dict(mood='calm')], id=1),
    ],
)
def test_nothing_is_suggested_that_would_fail(row):
    with pytest.raises(DataError, match='say which is which'):
        read(row, row)


# Flags of turns -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('flag', ['weight', 'train', 'trainable', 'training', 'loss', 'loss_mask', 'loss_weight'])
@pytest.mark.parametrize('off', [False, 0, 0.0, 'false', '0'])
def test_a_turn_that_is_not_to_be_trained(flag, off):
    row = turns(U, (*A, {flag: off}), ('user', 'again'), ('assistant', 'b', {flag: True}), ('user', 'p'), A)
    data = read(row)
    assert [m.get('weight') for m in data.train[0].messages if m['role'] == 'assistant'] == [0, 1, None]
    assert noted(data) == dict(rows_with_untrained_answers=1) and data.unused_keys == {}


def test_untrained_turns_are_outside_the_mask(lib):
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.training.loading import load_tokenizer

    tok = load_tokenizer(job())
    rows = [
        turns(U, ('assistant', 'wrong', dict(train=False)), ('user', 'again'), ('assistant', 'right')),
        turns(('assistant', 'Welcome!'), U, ('assistant', 'right')),
    ]
    data = read(*rows, answer_first='context')
    for ex in Formatter(tok, 'chat').examples(data.train):
        (ex,) = ex
        trained = tok.decode([i for i, m in zip(ex.input_ids, ex.mask) if m])
        assert trained == 'right<|im_end|>', trained


@pytest.mark.parametrize('loss_on', ['everything', ['user', 'assistant']])
def test_flags_of_turns_hold_whatever_is_trained(lib, loss_on):
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.training.loading import load_tokenizer

    tok = load_tokenizer(job())
    rows = [
        turns(('user', 'first', dict(train=False)), A, ('user', 'second'), ('assistant', 'third', dict(weight=0)), U, A)
    ]
    (ex,) = Formatter(tok, 'chat', loss_on).examples(read(*rows).train)[0]
    trained = tok.decode([i for i, m in zip(ex.input_ids, ex.mask) if m])
    assert 'second<|im_end|>' in trained and 'a<|im_end|>' in trained and 'q<|im_end|>' in trained
    assert 'first' not in trained and 'third' not in trained


def test_flags_that_contradict():
    with pytest.raises(DataError, match="turn 2: weight=1 and train=False contradict"):
        read(turns(U, (*A, dict(weight=1, train=False))))
    with pytest.raises(DataError, match=r"turn 2: loss is 0.53; expected 0 \(not trained\) or 1"):
        read(turns(U, (*A, dict(loss=0.53))))


@pytest.mark.parametrize('flag', [dict(mask=True), dict(masked=0), dict(ignore=True)])
def test_flags_that_could_mean_either(flag):
    with pytest.raises(DataError, match='turn 2: .* may say that the turn is trained or that it is not'):
        read(turns(U, (*A, flag)))
    assert read(turns(U, (*A, dict(mask='a text')))).unused_keys == dict(mask=1)


def test_keys_of_turns_that_are_not_used():
    "They are listed with the number of rows; what holds nothing is not"
    rows = [
        turns((*U, dict(mood='calm', id=None)), (*A, dict(refusal=None, score=0.5 if i else None))) for i in range(3)
    ]
    data = read(*rows)
    assert data.unused_keys == dict(mood=3, score=2) and 'mood (3 rows), score (2 rows)' in str(data)
    assert data.to_dict()['unused_keys'] == dict(mood=3, score=2)


# Pictures, sound, video -----------------------------------------------------------------------------------------------------------------
PLAIN = turns(U, A)


@pytest.mark.parametrize(
    'row,where',
    [
        (PLAIN | dict(images=['a.png']), "column 'images'"),
        (PLAIN | dict(image='0001'), "column 'image'"),
        (PLAIN | dict(Audio='x.wav'), "column 'Audio'"),
        (PLAIN | dict(videos=['https://example.org/v']), "column 'videos'"),
        (PLAIN | dict(image_1='a.png'), "column 'image_1'"),
        (PLAIN | dict(media=[dict(url='x')]), "column 'media'"),
        (turns(('user', 'Compare <image 1> with it'), A), "turn 1: the placeholder '<image 1>'"),
        (turns(('user', 'See <start_of_image>.'), A), "turn 1: the placeholder '<start_of_image>'"),
        (PLAIN | dict(anything=dict(bytes=None, path='a.png')), "column 'anything'"),
        (turns((*U, dict(image='a.png')), A), "turn 1: 'image'"),
        (turns(('user', '<image>\nWhat?'), A), "turn 1: the placeholder '<image>'"),
        (turns(('user', 'What?\n<image>'), A), "turn 1: the placeholder '<image>'"),
        (turns(('user', '<video><video>Compare.'), A), "turn 1: the placeholder '<video>'"),
        (turns(('user', 'Say <|audio_1|> again'), A), "turn 1: the placeholder '<|audio_1|>'"),
        (turns(('user', 'Picture 1: <img>a/b.jpg</img> What?'), A), "turn 1: the placeholder"),
        (dict(instruction='<audio>What is it?', output='a'), "turn 1: the placeholder '<audio>'"),
    ],
)
def test_media_are_refused(row, where):
    rows = [row] * 3
    with pytest.raises(DataError, match=r"only text can be trained here.*media='keep'") as e:
        read(*rows)
    assert where in str(e.value)
    data = read(*rows, media='keep')
    assert noted(data)['media_left_out'] == 3 and len(data.train) == 3
    good = [
        dict(instruction=f'{i}', output='a') if 'instruction' in row else turns(('user', f'{i}'), A) for i in range(60)
    ]
    assert read(row, *good, media='drop').ledger.left_out['media'] == 1


@pytest.mark.parametrize(
    'row',
    [
        PLAIN | dict(images=[], image=None, video=''),
        PLAIN | dict(image='A cat that sits on a mat.'),
        PLAIN | dict(image=3),
        turns(('user', 'What does docker run <image> do?'), A),
        turns(('user', '<video src="a.mp4"></video> is HTML'), A),
        turns(('user', '<audio>\n</audio>\nIs this right?'), A),
        turns(U, ('assistant', '<image>\n')),
    ],
)
def test_what_is_no_picture(row):
    assert len(read(row).train) == 1


def test_media_mark_is_fast_on_long_text():
    assert media_mark('<' * 200_000) is None and media_mark('a < b\n' * 50_000) is None


# Turns in any style ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('role_key', ['role', 'from', 'speaker', 'author', 'sender'])
@pytest.mark.parametrize('text_key', ['content', 'value', 'text', 'message', 'utterance'])
@pytest.mark.parametrize('column', ['messages', 'conversations'])
def test_keys_of_turns(role_key, text_key, column):
    row = {column: [{role_key: 'Human', text_key: 'q'}, {role_key: 'ai', text_key: 'a'}]}
    assert said(read(row)) == CHAT


def test_own_keys_and_roles_of_turns():
    row = dict(messages=[dict(who='customer', said='q', role='x'), dict(who='agent', said='a', role='y')])
    data = read(
        row, dataset_turns=dict(role='who', content='said'), dataset_roles=dict(customer='user', agent='assistant')
    )
    assert said(data) == CHAT and data.unused_keys == dict(role=1)
    with pytest.raises(DataError, match="dataset_turns: 'roles' is no key"):
        read(row, dataset_turns=dict(roles='who'))


@pytest.mark.parametrize(
    'value,note',
    [
        (['q', 'a'], 'turns_by_position'),
        ([['q', 'a']], 'turns_by_position'),
        ([dict(input='q', output='a')], 'turns_by_position'),
        ([dict(human='q', assistant='a')], 'turns_by_position'),
        (json.dumps(PLAIN['messages']), 'turns_from_text'),
        ([json.dumps(t) for t in PLAIN['messages']], 'turns_from_text'),
        (repr(PLAIN['messages']), 'turns_from_text'),
    ],
)
@pytest.mark.parametrize('column', ['messages', 'conversations'])
def test_lists_in_other_shapes(value, note, column):
    data = read({column: value})
    assert said(data) == CHAT and noted(data) == {note: 1}


def test_an_object_of_lists():
    "How some tables keep a list of turns"
    assert said(read(dict(messages=dict(role=['user', 'assistant'], content=['q', 'a'])))) == CHAT


def test_columns_that_seem_to_belong_to_the_rows():
    "A format fits, and a column with a meaning is left: a warning says how to use it, and it works"
    rows = [dict(conversations=turns(('user', f'q{i}'), A)['messages'], system_prompt='s', id=i) for i in range(3)]
    data = read(*rows)
    (warning,) = data.warnings
    proposed = as_params(warning.split('; say ')[1])
    assert proposed == dict(dataset_columns=dict(system='system_prompt'))
    data = read(*rows, **proposed)
    assert data.warnings == [] and said(data)[0] == ('system', 's') and data.unused == ['id']
    asked = dict(dataset_columns=dict(instruction='task', output='result'))
    (warning,) = read(dict(task='q', result='a', context='c'), **asked).warnings
    assert warning.endswith('say dataset_columns=instruction:task,output:result,input:context')


def test_a_list_that_numpy_printed_is_refused():
    text = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    with pytest.raises(DataError, match='neither JSON nor Python; write the rows again as JSON Lines'):
        read(dict(messages=text))


def test_python_text_is_not_run(tmp_path):
    f = tmp_path / 'ran'
    with pytest.raises(DataError, match='neither JSON nor Python'):
        read(dict(messages=f"[open({str(f)!r}, 'w')]"))
    assert not f.exists()


def test_prompts_that_are_turns_as_text():
    row = dict(prompt=json.dumps([dict(role='user', content='q')]), completion='[{"a": 1}]')
    data = read(row)
    assert said(data) == [U, ('assistant', '[{"a": 1}]')] and noted(data) == dict(turns_from_text=1)


# Values that are no text ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'value,text,note',
    [
        (5, '5', 'numbers_as_text'),
        (2.5, '2.5', 'numbers_as_text'),
        (True, 'true', 'numbers_as_text'),
        (dict(n=1, s='é'), '{"n": 1, "s": "é"}', 'objects_as_json'),
        (['a', 'b'], '["a", "b"]', 'objects_as_json'),
        ([dict(name='x')], '[{"name": "x"}]', 'objects_as_json'),
    ],
)
def test_answers_that_are_no_text(value, text, note):
    for row in (dict(prompt='q', completion=value), dict(instruction='q', output=value)):
        data = read(row)
        assert said(data) == [U, ('assistant', text)] and noted(data) == {note: 1}


def test_names_of_classes():
    "Of a Dataset in memory and of a Parquet file that it wrote"
    import datasets

    names = ['bad', 'good']
    features = datasets.Features(dict(text=datasets.Value('string'), label=datasets.ClassLabel(names=names)))
    ds = datasets.Dataset.from_dict(dict(text=['q', 'p'], label=[1, 0]), features=features)
    data = load_data(job(dataset_columns=dict(prompt='text', completion='label')), ds, split=False)
    assert [c.messages[-1]['content'] for c in data.train] == ['good', 'bad'] and noted(data) == dict(
        class_names_as_text=2
    )


def test_names_of_classes_in_parquet(tmp_path):
    import datasets

    features = datasets.Features(dict(text=datasets.Value('string'), label=datasets.ClassLabel(names=['bad', 'good'])))
    datasets.Dataset.from_dict(dict(text=['q'], label=[1]), features=features).to_parquet(tmp_path / 'a.parquet')
    asked = job(dataset=str(tmp_path / 'a.parquet'), dataset_columns=dict(prompt='text', completion='label'))
    assert load_data(asked, split=False).train[0].messages[-1]['content'] == 'good'
    datasets.Dataset.from_parquet(str(tmp_path / 'a.parquet'), cache_dir=str(tmp_path)).save_to_disk(tmp_path / 'saved')
    saved = asked.replace(dataset=str(tmp_path / 'saved'))
    assert load_data(saved, split=False).train[0].messages[-1]['content'] == 'good'


def test_an_index_with_a_name_is_a_column():
    import pandas as pd

    df = pd.DataFrame(dict(prompt=['q', 'p'], completion=['a', 'b']))
    assert said(load_data(job(), df.set_index('prompt'), split=False)) == CHAT
    assert load_data(job(), df, split=False).unused == []


def test_reasoning_in_a_column():
    data = read(dict(q='q', cot='hm', a='a'), dataset_columns=dict(prompt='q', reasoning='cot', completion='a'))
    assert data.train[0].messages[-1] == dict(role='assistant', content='a', reasoning_content='hm')
    data = read(dict(instruction='q', output='a', reasoning=''))
    assert 'reasoning_content' not in data.train[0].messages[-1]


@pytest.mark.parametrize(
    'columns', ['text role parent_id', 'text prompt', 'text response', 'text label', 'text sentiment', 'text speaker']
)
def test_text_that_is_not_plain(columns):
    "Where columns say what a text is, it is not trained as plain text unless the job says so"
    row = dict.fromkeys(columns.split(), 'x')
    with pytest.raises(DataError, match="would ignore; if that is what you mean, say dataset_format='text'"):
        read(row)
    assert read(row, dataset_format='text').format == 'text'
    assert detect_format(['text', 'id', 'url', 'title', 'meta', 'source', 'author', 'timestamp'])[0] == 'text'


# Formats of other tools -----------------------------------------------------------------------------------------------------------------
CALL = [dict(type='function', function=dict(name='weather', arguments=dict(town='Oslo')))]
WITH_CALL = ['user', 'assistant', 'tool', 'assistant']
SCHEMA = dict(type='object', properties=dict(town=dict(type='string')))
TOOLS = {
    'gemini': dict(
        systemInstruction=dict(role='system', parts=[dict(text='s')]),
        contents=[
            dict(role='user', parts=[dict(text='q')]),
            dict(role='model', parts=[dict(functionCall=dict(name='weather', args=dict(town='Oslo')))]),
            dict(role='function', parts=[dict(functionResponse=dict(name='weather', response=dict(sky='rain')))]),
            dict(role='model', parts=[dict(text='hm', thought=True), dict(text='Rain.')]),
        ],
        tools=[dict(functionDeclarations=[dict(name='weather', parameters=SCHEMA)])],
    ),
    'anthropic': dict(
        system=[dict(type='text', text='s', cache_control=dict(type='ephemeral'))],
        messages=[
            dict(role='user', content='q'),
            dict(role='assistant', content=[dict(type='tool_use', id='t', name='weather', input=dict(town='Oslo'))]),
            dict(role='user', content=[dict(type='tool_result', tool_use_id='t', content=[dict(type='text', text='x')])]),
            dict(role='assistant', content=[dict(type='text', text='Rain.')]),
        ],
        tools=[dict(name='weather', input_schema=SCHEMA)],
    ),
    'bedrock': dict(
        schemaVersion='bedrock-conversation-2024',
        system=[dict(text='s')],
        messages=[
            dict(role='user', content=[dict(text='q')]),
            dict(role='assistant', content=[dict(toolUse=dict(toolUseId='t', name='weather', input=dict(town='Oslo')))]),
            dict(role='user', content=[dict(toolResult=dict(toolUseId='t', content=[dict(text='x')]))]),
            dict(role='assistant', content=[dict(text='Rain.')]),
        ],
        toolConfig=dict(tools=[dict(toolSpec=dict(name='weather', inputSchema=dict(json=SCHEMA)))]),
    ),
}  # fmt: skip


@pytest.mark.parametrize('tool', TOOLS)
def test_formats_of_services(tool):
    data = read(TOOLS[tool])
    first, *rest = data.train[0].messages
    assert first == dict(role='system', content='s') and [m['role'] for m in rest] == WITH_CALL
    called = [dict(type=c['type'], function=c['function']) for c in rest[1]['tool_calls']]
    assert called == CALL and rest[-1]['content'] == 'Rain.' and rest[2]['content']
    assert data.train[0].tools[0]['function'] == dict(name='weather', parameters=SCHEMA)
    assert data.unused == [] and data.unused_keys == {}


@pytest.mark.parametrize(
    'content', [[dict(inlineData=dict(mimeType='image/png', data='x'))], [dict(image=dict(format='png'))]]
)
def test_pictures_of_services_are_refused(content):
    row = dict(contents=[dict(role='user', parts=content), dict(role='model', parts=[dict(text='a')])])
    with pytest.raises(DataError, match='only text can be trained here'):
        read(row)


@pytest.mark.parametrize('written', [lambda v: v, json.dumps])
def test_xlam(written):
    answers = [dict(name='weather', arguments=dict(town='Oslo'))]
    data = read(dict(id=1, query='q', tools=written([dict(name='weather')]), answers=written(answers)))
    assert data.format == 'xlam' and data.train[0].messages[1]['tool_calls'] == CALL and data.train[0].tools


def test_segments():
    row = dict(segments=[dict(label=False, text='1+1'), dict(label=False, text='='), dict(label=True, text='2')])
    data = read(row)
    assert said(data) == [('user', '1+1='), ('assistant', '2')] and noted(data) == dict(segments_as_turns=1)


def test_calls_as_text():
    "Hermes writes calls into the text of an answer; the tool's turn follows it"
    row = turns(U, ('assistant', '<tool_call>{"name": "f"}</tool_call>'), ('tool', '3'), A)
    data = read(row)
    assert [r for r, _ in said(data)] == WITH_CALL and noted(data) == dict(tool_results_after_text=1)


# Turns out of order -----------------------------------------------------------------------------------------------------------------------
S = ('system', 's')
ORDER = [
    ('same_role', 'merge', [U, ('user', 'p'), A], [('user', 'q\n\np'), A], 'same_role_merged', 2),
    ('same_role', 'merge', [U, A, ('assistant', 'b')], [U, ('assistant', 'a\n\nb')], 'same_role_merged', 3),
    ('same_role', 'merge', [S, ('system', 't'), U, A], [('system', 's\n\nt'), U, A], 'same_role_merged', 2),
    ('answer_first', 'context', [('assistant', 'hi'), U, A], [('assistant', 'hi'), U, A], 'first_answer_untrained', 1),
    ('answer_first', 'cut', [S, ('assistant', 'hi'), U, A], [S, U, A], 'first_answer_cut', 2),
    ('last_question', 'cut', [U, A, ('user', 'thanks')], [U, A], 'last_question_cut', None),
    ('late_system', 'to_user', [U, A, S, U, A], [U, A, ('user', 's\n\nq'), A], 'late_system_to_user', 3),
    ('late_system', 'to_user', [U, S, A], [('user', 'q\n\ns'), A], 'late_system_to_user', 2),
    ('late_system', 'keep', [U, A, S, U, A], [U, A, S, U, A], 'late_system_kept', 3),
]  # Parameter, choice, turns, what becomes of them, what the books say, turn that the error names


@pytest.mark.parametrize('parameter,choice,before,after,note,turn', ORDER)
def test_turns_out_of_order(parameter, choice, before, after, note, turn):
    rows = [turns(('user', f'{i}'), A) for i in range(60)] + [turns(*before)]
    with pytest.raises(DataError) as e:
        read(*rows)
    place = f'row 60, turn {turn}:' if turn else 'row 60:'
    assert place in str(e.value) and f"{parameter}='" in str(e.value) and repr(choice) in str(e.value)
    assert e.value.reason == parameter
    data = read(*rows, **{parameter: choice})
    assert said(data, -1) == after and noted(data) == {note: 1}
    assert read(*rows, **{parameter: 'drop'}).ledger.left_out[parameter] == 1


def test_all_orders_at_once():
    row = turns(('assistant', 'hi'), U, ('user', 'p'), A, S, ('user', 'r'), A, ('user', 'bye'))
    policies = dict(same_role='merge', answer_first='context', last_question='cut', late_system='to_user')
    data = read(row, **policies)
    assert [r for r, _ in said(data)] == ['assistant', 'user', 'assistant', 'user', 'assistant'] and len(
        noted(data)
    ) == 4
    assert data.train[0].messages[0]['weight'] == 0


def test_turns_that_cannot_be_merged():
    with pytest.raises(DataError, match='only one of them is trained'):
        read(turns(U, (*A, dict(train=False)), A), same_role='merge')


def test_preferences_with_a_greeting():
    row = dict(
        prompt=turns(('assistant', 'hi'), U)['messages'], chosen=turns(A)['messages'], rejected=turns(('assistant', 'b'))['messages']
    )  # fmt: skip
    conv = read(row, answer_first='cut').train[0]
    assert [m['content'] for m in conv.messages] == ['q', 'a'] and conv.rejected[0]['content'] == 'b'


# Private characters ---------------------------------------------------------------------------------------------------------------------
def test_text_with_private_characters(lib):
    "Icons of a font stand where marks could; the roles are found all the same"
    from unsloth_nb.tokens.formatting import Formatter
    from unsloth_nb.training.loading import load_tokenizer

    tok = load_tokenizer(job())
    icons = ''.join(map(chr, (0xF0000, 0x100000, 0x100001, 0x100002, 0x10FFFD)))
    data = read(dict(prompt=f'icon {icons}', completion=f'{icons} glyph'))
    (ex,) = Formatter(tok, 'chat', ['user', 'assistant']).examples(data.train)[0]
    trained = tok.decode([i for i, m in zip(ex.input_ids, ex.mask) if m])
    assert trained == f'icon {icons}<|im_end|>{icons} glyph<|im_end|>'
