"vLLM, in an environment of its own: it serves what was exported, answers as the model does, and sees what is wrong in an export."

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest

from unsloth_nb.core.schema import SpecError
from unsloth_nb.export.serving import NF4, ServeError, find_backend, find_served, find_vllm, serve, serve_command

OPTIONS = ('--max-model-len', '512', '--dtype', 'bfloat16', '--enforce-eager')
NEW = 56  # tokens


@pytest.fixture(scope='module', autouse=True)
def small():
    "As little memory as will do [GiB]"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('VLLM_CPU_KVCACHE_SPACE', '1')
        yield


@pytest.fixture(scope='module')
def tuned(lib, tmp_path_factory):
    "A model after enough steps that its answers end, and are no matter of a last bit: (model, run, held-out rows)"
    job = lib.FinetuneJob(
        max_rows=200,
        test_size=3,
        max_steps=20,
        warmup_steps=2,
        learning_rate=2e-3,
        max_seq_length=256,
        max_new_tokens=NEW,
    )
    data = lib.load_data(job)
    model = lib.load_model(job, lib.make_plan(job, data))
    run = lib.start_run(job, tmp_path_factory.mktemp('runs'))
    lib.train(model, lib.make_examples(data.train, model.formatter, 256), job, run)
    return model, run, data.test


@pytest.fixture(scope='module')
def exports(tuned):
    "Both forms that vLLM loads, each with the certificate of two witnesses"
    from unsloth_nb.export.artifacts import save_artifact

    model, run, rows = tuned
    return {to: save_artifact(model, run, to, rows, vllm=True) for to in ('merged_16bit', 'adapter')}


@pytest.fixture(scope='module')
def prompts(tuned):
    return [c.messages[:-1] for c in tuned[2]]


@pytest.fixture(scope='module')
def said(tuned, prompts, lib):
    return lib.generate(tuned[0], prompts, lib.Sampling(max_new_tokens=NEW))


# --- two witnesses


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize('to', ['merged_16bit', 'adapter'])
def test_certificate_of_two_witnesses(exports, to):
    cert = exports[to]
    print(cert)
    assert (
        cert['passed'] and cert['software'][-1].startswith('vLLM ') and cert['software'][0].startswith('transformers ')
    )
    names = {by: {c['name'] for c in cert['checks'] if by in c['by']} for by in ('transformers', 'vLLM')}
    assert (
        names['transformers'] - names['vLLM'] == {'vocabulary', 'padding token'}
        and not names['vLLM'] - names['transformers']
    )
    assert cert.value('KL divergence', 'vLLM') > 0 and cert.value('KL divergence', 'vLLM') != cert.value(
        'KL divergence', 'transformers'
    )
    assert cert.value('end tokens', 'vLLM') == [2] and f"({cert['software'][-1]})" in repr(cert)


def edit(file, **kw):
    def f(folder):
        (folder / file).write_text(
            json.dumps({k: v for k, v in (json.loads((folder / file).read_text()) | kw).items() if v is not None})
        )

    return f


def swap_eos(folder):
    "As if training had ended with another token, everywhere"
    edit('generation_config.json', eos_token_id=0)(folder)
    edit('config.json', eos_token_id=0)(folder)
    edit('tokenizer_config.json', eos_token='<|endoftext|>', eos_token_id=0)(folder)


FAULTS = dict(  # What is done to the merged folder, checks that must fail
    swapped_eos=(swap_eos, ['end tokens', "tokenizer's end token", 'answers that run past their end']),
    other_eos_as_well=(edit('generation_config.json', eos_token_id=[0, 2]), ['end tokens']),
    doubled_bos=(
        lambda d: (d / 'chat_template.jinja').write_text('{{ bos_token }}' + (d / 'chat_template.jinja').read_text()),
        ['chat template', 'prompts as trained'],
    ),
)


@pytest.fixture(scope='module')
def asked(tuned):
    from unsloth_nb.export.certificate import expect, make_request

    request = make_request(tuned[0], tuned[2])
    return request, expect(tuned[0], request)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_fault(tuned, exports, asked, tmp_path, fault):
    "What is wrong in a folder shows in what vLLM makes of it"
    from unsloth_nb.export.certificate import ExportError, certify
    from unsloth_nb.export.witness import ask_witness

    spoil, expected = FAULTS[fault]
    folder = shutil.copytree(tuned[1].path / 'merged_16bit', tmp_path / 'merged_16bit')
    spoil(folder)
    cert = certify(
        tuned[0], *asked, ask_witness('vllm', dict(folder=folder, dtype='bfloat16'), asked[0]), 'merged_16bit'
    )
    with pytest.raises(ExportError) as e:
        cert.check()
    print(e.value)
    assert {*expected} <= {c['name'] for c in cert.failed}


@pytest.mark.vllm
@pytest.mark.slow
def test_folder_that_vllm_does_not_load(tuned, exports, asked, tmp_path):
    from unsloth_nb.export.witness import WitnessError, ask_witness

    folder = shutil.copytree(tuned[1].path / 'merged_16bit', tmp_path / 'merged_16bit')
    edit('config.json', architectures=['NoneSuchForCausalLM'], model_type='none_such')(folder)
    with pytest.raises(WitnessError, match='none_such'):
        ask_witness('vllm', dict(folder=folder, dtype='bfloat16'), asked[0])


@pytest.mark.vllm
@pytest.mark.slow
def test_older_names_are_read(lib, tmp_path):
    "vLLM 0.16 runs on transformers 4: without RoPE's older name it takes 10,000 for the base, not 100,000, and says nothing"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from unsloth_nb.export.certificate import token_differences
    from unsloth_nb.training.loading import embedded_model, write_older_names
    from unsloth_nb.export.witness import log_probabilities, vllm_answers

    folder = shutil.copytree(embedded_model(), tmp_path / 'm')
    write_older_names(folder)
    ids = AutoTokenizer.from_pretrained(folder)((Path(__file__).parent.parent / 'LICENSE').read_text()[:1200])[
        'input_ids'
    ]
    request = dict(
        examples=[dict(input_ids=ids, at=list(range(1, len(ids))))],
        prompts=[dict(messages=None, ids=ids[:8])],
        max_new_tokens=2,
        probes=[],
    )
    want = log_probabilities(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), request['examples']
    )
    request['examples'][0]['ids'] = want['ids'][0]

    def far():
        return token_differences(request, want, vllm_answers(dict(folder=folder, dtype='bfloat16'), request))

    as_written = far()
    edit('config.json', rope_theta=None)(folder)
    without = far()
    print(as_written, without)
    assert as_written['kl_divergence'] < 0.01 and as_written['agreement'] > 0.97
    assert without['kl_divergence'] > 10 * as_written['kl_divergence'] and without['perplexity_change'] > 0.05


# --- its server and the real client


@pytest.fixture(scope='module', params=['merged_16bit', 'adapter'])
def service(request, tuned, exports):
    with serve(tuned[1], request.param, backend='vllm', options=OPTIONS) as s:
        yield s


@pytest.fixture
def client(service):
    from openai import OpenAI

    return OpenAI(base_url=service.url, api_key='none', max_retries=0)


def chat(client, service, messages, **kw):
    return client.chat.completions.create(
        model=service.model, messages=messages, temperature=0, **dict(dict(max_tokens=NEW), **kw)
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_same_answers_as_in_memory(service, client, prompts, said):
    got = [chat(client, service, p).choices[0] for p in prompts]
    assert [c.message.content for c in got] == [a.text for a in said]
    assert [c.finish_reason for c in got] == ['stop' if a.stopped else 'length' for a in said]


@pytest.mark.vllm
@pytest.mark.slow
def test_streams_and_stops(service, client, prompts, said):
    chunks = list(chat(client, service, prompts[0], stream=True))
    text = ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices)
    assert len(chunks) > 5 and text == said[0].text
    cut = chat(client, service, prompts[0], stop=[said[0].text[8:11]]).choices[0]
    assert cut.message.content == said[0].text[: said[0].text.index(said[0].text[8:11])] and cut.finish_reason == 'stop'
    assert chat(client, service, prompts[0], max_tokens=3).choices[0].finish_reason == 'length'


@pytest.mark.vllm
@pytest.mark.slow
def test_offers_its_models_and_no_other(service, client, tuned):
    from openai import NotFoundError

    base = [f'{service.model}-base'] if service.model.endswith('/adapter') else []
    assert {m.id for m in client.models.list()} == {
        service.model,
        *base,
    } and service.model == f"{tuned[1].name}/{service.path.name}"
    with pytest.raises(NotFoundError, match='other/model'):
        client.chat.completions.create(model='other/model', messages=[dict(role='user', content='Hi')])


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_generate(tuned, exports, prompts, said, lib):
    folder = tuned[1].path / 'merged_16bit'
    sampling = lib.Sampling(max_new_tokens=NEW)
    got = lib.vllm_generate(folder, prompts, sampling, options=OPTIONS)
    print(got)
    assert [(a.text, a.tokens, a.finish) for a in got] == [
        (a.text, a.tokens, a.finish) for a in said
    ] and got.tokens_per_second > 0


# --- ends


def gone(pids, within=20):
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(Path(f'/proc/{p}').exists() for p in pids):
            return True
        time.sleep(0.2)
    return False


def offspring(pid):
    import psutil

    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


@pytest.mark.vllm
@pytest.mark.slow
def test_ends_with_its_owner(tuned, exports):
    "Killed without a chance to clean up, the owner leaves nothing of vLLM behind"
    code = f"import sys,time; from unsloth_nb.export.serving import serve; print(serve(sys.argv[1], backend='vllm', options={OPTIONS}).process.pid, flush=True); time.sleep(600)"
    owner = subprocess.Popen(
        [sys.executable, '-c', code, tuned[1].path / 'merged_16bit'], stdout=subprocess.PIPE, text=True
    )
    pid = int(owner.stdout.readline())
    all_of_it = [pid, *offspring(pid)]
    assert len(all_of_it) >= 3 and not gone(all_of_it, 0.5)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(all_of_it)


@pytest.mark.vllm
@pytest.mark.slow
def test_command(tuned, exports, prompts, said):
    "Ctrl-C ends the command, and all of vLLM with it"
    from openai import OpenAI

    words = [
        Path(sys.executable).parent / 'unsloth-nb',
        'serve',
        tuned[1].path,
        '--to',
        'merged_16bit',
        '--backend',
        'vllm',
        '--port',
        '0',
        '-o',
        'max-model-len=512',
        '-o',
        'dtype=bfloat16',
        '-o',
        'enforce-eager',
    ]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    command.stdout.readline()
    url, name = re.search('base_url=(.*), model=(.*);', command.stdout.readline()).groups()
    r = OpenAI(base_url=url, api_key='none').chat.completions.create(
        model=name, messages=prompts[0], temperature=0, max_tokens=NEW
    )
    all_of_it = offspring(command.pid)
    command.send_signal(signal.SIGINT)
    assert command.wait(30) == 130 and gone(all_of_it)
    command.stdout.close()
    assert r.choices[0].message.content == said[0].text


# --- without vLLM, or with one that fails


@pytest.fixture
def merged(tmp_path):
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm/config.json').write_text('{}')
    return tmp_path / 'm'


@pytest.fixture
def program(tmp_path, monkeypatch):
    "A program in vLLM's place"

    def f(text):
        file = tmp_path / 'vllm'
        file.write_text(f'#!{sys.executable}\n{text}')
        file.chmod(0o755)
        monkeypatch.setenv('UNSLOTH_NB_VLLM', str(file))
        return file

    return f


def test_missing_program_is_named(merged, monkeypatch):
    monkeypatch.setenv('UNSLOTH_NB_VLLM', 'no-such-program')
    assert find_vllm() is None
    with pytest.raises(
        ServeError, match='vllm needs its program; install with: pip install vllm, in an environment of its own'
    ):
        serve(merged, backend='vllm')


def test_program_is_found_where_settings_say(program, merged, tmp_path, monkeypatch):
    file = program('')
    assert find_vllm() == str(file) and find_backend('adapter', 'vllm') == 'vllm'
    assert find_served(merged, backend='vllm') == ('vllm', merged, 'local/m')
    monkeypatch.delenv('UNSLOTH_NB_VLLM')
    (tmp_path / 'settings.ini').write_text(f'[unsloth_nb]\nvllm = {file}\n')
    monkeypatch.chdir(tmp_path)
    assert find_vllm() == str(file)


def test_its_environment_sees_nothing_of_ours(program, merged, tmp_path, monkeypatch):
    "Neither our packages nor a token; and it is told to stay on this machine"
    program(
        f"import os,json,sys; json.dump(dict(env=dict(os.environ), argv=sys.argv[1:]), open({str(tmp_path / 'seen.json')!r}, 'w')); sys.exit('boom')"
    )
    with pytest.raises(ServeError, match='(?s)vllm ended with 1.*boom.*vllm ended with 1'):
        serve(merged, backend='vllm', options=('--max-model-len', '512'))
    seen = json.loads((tmp_path / 'seen.json').read_text())
    assert not {'PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'HF_TOKEN'} & seen['env'].keys()
    assert seen['env']['HF_HUB_OFFLINE'] == seen['env']['VLLM_NO_USAGE_STATS'] == '1'
    assert seen['argv'][:4] == ['serve', str(merged), '--served-model-name', 'local/m'] and seen['argv'][-2:] == [
        '--max-model-len',
        '512',
    ]
    assert seen['argv'][seen['argv'].index('--host') + 1] == '127.0.0.1'


def test_adapter_that_was_trained_on_nf4(program, tmp_path):
    program('')
    folder = tmp_path / 'a'
    folder.mkdir()
    (folder / 'adapter_config.json').write_text('{}')
    (folder / 'base.json').write_text(json.dumps(dict(model='smollm2-135m', revision=None, load_in_4bit=True)))
    with pytest.raises(SpecError, match=f'and this is {NF4}; take transformers'):
        find_served(folder, backend='vllm')
    assert find_served(folder, backend='transformers')[0] == 'transformers'


def test_options_are_for_vllm(gguf_file):
    with pytest.raises(SpecError, match='xllamacpp takes none'):
        serve_command(gguf_file, backend='xllamacpp', options=('--x',))
