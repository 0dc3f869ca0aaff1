"Pushing to and loading from a Hub on loopback: commits, interruptions, refusals, and tokens that must turn up nowhere."

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
import pytest
from huggingface_hub import ModelCard
from hub_server import Hub
from conftest import ROOT
from unsloth_nb.export.model_cards import model_card
from unsloth_nb.runs.checkpoints import CheckpointError, write_whole
from unsloth_nb.export.hub import HubError, pull, push
from unsloth_nb.runs.run import fingerprint, read_lines, start_run
from unsloth_nb.core.schema import SpecError
from unsloth_nb.core.spec import ExportJob, FinetuneJob

TOKEN, READER, OTHER, UNKNOWN = ('hf_' + x * 3 for x in ('aB3dE5gH7j', 'K9mN1pQ3rS', 'tU5vW7xY9z', 'Zz8Yx6Wv4U'))
USERS = {
    TOKEN: dict(name='me', role='write', orgs=['us']),
    READER: dict(name='me', role='read'),
    OTHER: dict(name='you', role='write'),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub, an environment that knows its address and a token, and a cache of its own"
    from huggingface_hub import constants

    server = Hub(USERS)
    for k in (
        'HF_HUB_OFFLINE',
        'TRANSFORMERS_OFFLINE',
        'HF_DATASETS_OFFLINE',
        'HF_HUB_DISABLE_TELEMETRY',
        'DO_NOT_TRACK',
    ):
        monkeypatch.delenv(k, raising=False)
    for k, v in dict(HF_ENDPOINT=server.url, HF_TOKEN=TOKEN).items():
        monkeypatch.setenv(k, v)
    for k, v in dict(
        HF_HUB_OFFLINE=False,
        HF_HUB_DISABLE_XET=True,
        HF_HUB_DISABLE_TELEMETRY=False,
        HF_HUB_CACHE=str(tmp_path / 'cache'),
        HF_TOKEN_PATH=str(tmp_path / 'no_token'),
    ).items():
        monkeypatch.setattr(constants, k, v)
    yield server
    server.faults.clear()
    server.shutdown()
    assert not server.unknown, server.unknown
    assert not any('agent/' in a or ('torch/' in a and 'telemetry/off' not in a) for a in server.agents), server.agents


SIZES = dict(small=200_000, middle=600_000, big=2_000_000)


def weights(name, seed):
    return (bytes([seed]) + name.encode()) * (SIZES[name] // (len(name) + 1))


def make(tmp_path, seed=1, names=SIZES, **files):
    "A run with an adapter made by hand"

    def write(d):
        for n in names:
            (d / f'{n}.safetensors').write_bytes(weights(n, seed))
        for n, t in (
            {
                'adapter_config.json': dict(r=16, base_model_name_or_path='HuggingFaceTB/SmolLM2-135M-Instruct'),
                'base.json': dict(model='smollm2-135m', revision=None),
            }
            | files
        ).items():
            (d / n).write_text(t if isinstance(t, str) else json.dumps(t))

    run = start_run(FinetuneJob(), tmp_path / 'runs')
    write_whole(run.path / 'adapter', write)
    return run


def held(server, repo_id, commit):
    return {p: f[2] for p, f in server.repos[repo_id].commits[commit].items()}


def test_a_real_adapter_goes_up_with_its_card(hub, finished_run):
    before = fingerprint(finished_run.path)
    pushed = push(finished_run, 'me/events')
    have = held(hub, 'me/events', pushed.commit)
    assert (
        pushed.changed
        and pushed.private
        and hub.repos['me/events'].private
        and set(have) - {'.gitattributes'} == set(pushed.files)
    )
    card = ModelCard(have['README.md'].decode())
    assert (card.data.base_model, card.data.base_model_relation, card.data.library_name, card.data.license) == (
        'HuggingFaceTB/SmolLM2-135M-Instruct',
        'adapter',
        'peft',
        'apache-2.0',
    )
    assert 'from_pretrained("me/events")' in card.text and '| exact match |' in card.text
    assert json.loads(have['adapter_config.json'])['base_model_name_or_path'] == card.data.base_model
    for n, d in have.items():
        if n not in ('tokenizer.json', 'adapter_model.safetensors'):
            assert not any(p in d.decode() for p in (str(Path.home()) + '/', str(finished_run.path), str(ROOT))), n
    assert push(finished_run, 'me/events').__dict__ == pushed.__dict__ | dict(changed=False)
    assert len(hub.repos['me/events'].commits) == 2  # The Hub's own first one, and ours
    (line,) = read_lines(finished_run.path / 'pushed.jsonl')
    assert (line['commit'], line['repo_id'], line['to']) == (pushed.commit, 'me/events', 'adapter')
    after = fingerprint(finished_run.path)
    assert {k: v for k, v in after.items() if k != 'pushed.jsonl'} == before  # Nothing in a finished run is changed


def test_versions(hub, tmp_path):
    one, two = (push(make(tmp_path, seed, names), 'us/model') for seed, names in ((1, SIZES), (2, ['small'])))
    assert (
        one.commit != two.commit
        and 'big.safetensors' in held(hub, 'us/model', one.commit)
        and 'big.safetensors' not in held(hub, 'us/model', two.commit)
    )
    old = pull('us/model', one.commit)
    new = pull('us/model')
    assert (old.name, new.name) == (one.commit, two.commit)
    assert ((old / 'small.safetensors').read_bytes(), (new / 'small.safetensors').read_bytes()) == (
        weights('small', 1),
        weights('small', 2),
    )
    three = push(make(tmp_path, 3, ['small']), 'us/model', revision='try-3')
    assert hub.repos['us/model'].branches == {'main': two.commit, 'try-3': three.commit}
    with pytest.raises(HubError, match="no branch 'try-4'"):
        push(make(tmp_path, 4, ['small']), 'us/model', revision='try-4', create=False)


def test_a_killed_upload_goes_on(hub, tmp_path):
    run = make(tmp_path)
    hub.faults['stall'] = 1
    child = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f'from unsloth_nb.export.hub import push; push({str(run.path / "adapter")!r}, "me/model")',
        ],
        cwd=ROOT,
        env=os.environ | dict(HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path / 'hf')),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.time() + 60
    while time.time() < end and not (hub.stalled.is_set() and len(hub.repos['me/model'].objects) == 2):
        time.sleep(0.05)
    child.kill()
    assert TOKEN not in child.communicate()[0].decode()
    assert (
        hub.stored == sum(len(weights(n, 1)) for n in ('small', 'middle')) and len(hub.repos['me/model'].commits) == 1
    )  # Nothing half there
    hub.faults.clear()
    before = hub.received
    assert push(run, 'me/model').changed
    assert hub.received - before == len(weights('big', 1))  # Only what was missing


def test_the_client_mends_what_it_can(hub, tmp_path):
    hub.faults.update({'drop': 1, '500 lfs_batch': 1})
    assert push(make(tmp_path), 'me/model').changed and hub.stored == sum(len(weights(n, 1)) for n in SIZES)
    assert hub.received > hub.stored


def test_an_upload_in_parts(hub, tmp_path):
    hub.part_size = 500_000
    pushed = push(make(tmp_path), 'me/model')
    assert held(hub, 'me/model', pushed.commit)['big.safetensors'] == weights('big', 1)
    assert sum(p.endswith('/complete') for _, p in hub.log) == 2


def test_a_commit_that_fails_or_is_not_heard_of(hub, tmp_path):
    run = make(tmp_path)
    hub.faults['500 commit'] = 1
    with pytest.raises(HubError, match='fails at the moment; try again: what has arrived is not sent a second time'):
        push(run, 'me/model')
    assert len(hub.repos['me/model'].commits) == 1
    hub.faults['lost answer'], sent = 1, hub.received
    with pytest.raises(HubError, match='the connection to the Hub broke'):
        push(run, 'me/model')
    again = push(run, 'me/model')
    assert not again.changed and len(hub.repos['me/model'].commits) == 2 and hub.received == sent
    assert [l['commit'] for l in read_lines(run.path / 'pushed.jsonl')] == [again.commit]


def test_what_the_hub_holds_is_checked(hub, tmp_path):
    for n in ('big.safetensors', 'adapter_config.json'):
        hub.faults['wrong oid'] = n
        with pytest.raises(HubError, match=f'does not hold what was sent: {n}; do not use it'):
            push(make(tmp_path), f'me/{n.split(".")[0]}')
    assert not list(tmp_path.rglob('pushed.jsonl'))
    hub.faults.clear()
    pushed = push(make(tmp_path, 2), 'me/model')
    files = hub.repos['me/model'].commits[pushed.commit]
    files['big.safetensors'] = (True, files['big.safetensors'][1], weights('big', 9))
    with pytest.raises(CheckpointError, match='big.safetensors has changed'):
        pull('me/model', pushed.commit)


@pytest.fixture
def no():
    "Check a refusal by its text, and at the end that none shows a token"
    texts = []

    def f(call, match, error=HubError):
        with pytest.raises(error, match=match) as e:
            call()
        texts.append(f'{e.value} {e.value!r}')

    yield f
    assert texts and not any(t in text for text in texts for t in (*USERS, UNKNOWN))


def test_tokens_and_rights(hub, tmp_path, no, monkeypatch):
    run = make(tmp_path, names=['small'])
    no(
        lambda: push(run, 'me/model', token=READER),
        "the token of 'me' may only read; make one with write permission, then log in with `hf auth login`, or set HF_TOKEN",
    )
    no(lambda: push(run, 'me/model', token=UNKNOWN), 'the Hub does not know this token; it may have expired')
    no(
        lambda: push(run, 'nobody/model'),
        "this token may not write to nobody/model; take one with write permission for 'nobody', or another name",
    )
    no(lambda: push(run, f'{TOKEN}/model'), '^…/model: this token may not write')
    assert push(run, 'me/open', private=False).private is False
    no(
        lambda: push(make(tmp_path, 2, ['small']), 'me/open', private=False, token=OTHER),
        'this token may not write to me/open',
    )
    push(run, 'me/closed')
    no(lambda: pull('me/closed', token=OTHER), 'does not exist, or is private and this token may not read it')
    monkeypatch.delenv('HF_TOKEN')
    no(lambda: push(run, 'me/model'), 'there is no token; log in with `hf auth login`, or set HF_TOKEN')
    no(lambda: pull('me/closed'), 'does not exist, or is private and this token may not read it')
    assert pull('me/open').is_dir()


def test_names_and_revisions(hub, tmp_path, no):
    run = make(tmp_path, names=['small'])
    no(
        lambda: push(run, 'me/model', create=False),
        'there is no such repository that this token may read; make it, or say create=True',
    )
    hub.add('me/thesis', {'a.tex': b'a', 'b.tex': b'b'}, private=True)
    no(
        lambda: push(run, 'me/thesis'),
        r'the name is taken: it holds 2 files that no export of ours wrote \(a.tex, b.tex\); take another name',
    )
    no(lambda: pull('me/thesis'), 'no manifest.json at')
    assert 'a.tex' not in held(hub, 'me/thesis', push(run, 'me/thesis', overwrite=True).commit)
    hub.add('me/open')
    no(lambda: push(run, 'me/open'), r'the repository is public; say private=False \(--public\)')
    no(lambda: pull('me/open', 'yesterday'), 'has no such revision; give a branch, a tag or a commit')


def test_offline_and_a_full_disk(hub, tmp_path, no, monkeypatch):
    run = make(tmp_path, names=['small'])
    push(run, 'me/model')

    def full(*a, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / 'model.safetensors'))

    with monkeypatch.context() as m:
        m.setattr('huggingface_hub.snapshot_download', full)
        no(lambda: pull('me/model'), 'me/model: No space left on device: model.safetensors$')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    no(lambda: push(run, 'me/model'), 'the Hub cannot be reached at http://127.0.0.1:9; is this machine offline?')
    no(lambda: pull('me/model'), 'the Hub cannot be reached at http://127.0.0.1:9; is this machine offline?')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    no(lambda: push(run, 'me/model'), 'HF_HUB_OFFLINE is set, so the Hub is not asked; unset it')


def test_cards_of_what_has_no_finetune_run_beside_it(hub, tmp_path):
    def write(d):
        (d / 'small.safetensors').write_bytes(weights('small', 1))
        (d / 'certificate.json').write_text(
            json.dumps(
                dict(
                    to='merged_16bit',
                    passed=True,
                    software=['transformers 5'],
                    rows=4,
                    tokens=99,
                    checks=[dict(name='greedy agreement', value=1.0, limit=0.95, ok=True, unit='')],
                )
            )
        )

    def read(repo_id):
        return held(hub, repo_id, hub.repos[repo_id].branches['main'])['README.md'].decode()

    source = make(tmp_path, names=['small'])
    record = start_run(ExportJob(run=source.name, to='merged_16bit'), tmp_path / 'runs')
    push(write_whole(record.path / 'merged_16bit', write), 'me/exported')
    assert (
        '| greedy agreement | 1 | 0.95 | yes |' in read('me/exported')
        and ModelCard(read('me/exported')).data.base_model_relation == 'finetune'
    )
    alone = write_whole(tmp_path / 'alone', lambda d: (d / 'README.md').write_text('load("path/to/this/folder")'))
    push(alone, 'me/alone')
    assert read('me/alone') == 'load("me/alone")'
    with pytest.raises(SpecError, match='no README.md, and no run beside'):
        push(write_whole(tmp_path / 'bare', write), 'me/bare')
    with pytest.raises(SpecError, match='README.md name folders of this machine'):
        push(write_whole(tmp_path / 'told', lambda d: (d / 'README.md').write_text(f'{Path.home()}/models')), 'me/told')
    (tmp_path / 'loose').mkdir()
    with pytest.raises(CheckpointError, match='nothing vouches for its files'):
        push(tmp_path / 'loose', 'me/loose')


@pytest.mark.parametrize('template', ['chat', 'alpaca', 'raw'])
def test_cards_of_runs_that_know_little(tmp_path, template):
    "A base that is a folder with a licence of its own, no plan, no figures; code that is Python whatever the template"
    base = tmp_path / 'my base'
    base.mkdir()
    for n, t in {
        'config.json': '{}',
        'model.safetensors': '',
        'README.md': '---\nlicense: cc-by-nc-4.0\n---\n',
    }.items():
        (base / n).write_text(t)
    data = tmp_path / 'rows.jsonl'
    run = start_run(
        FinetuneJob(model=str(base), dataset=str(data), max_steps=None, num_train_epochs=2), tmp_path / 'runs'
    )
    run.save(
        'data',
        dict(
            source=str(data),
            revision=None,
            format='messages',
            fingerprint='f',
            system='Say "no"\n\n```',
            ledger=dict(unit='rows', came=3, kept=dict(train=2), left_out=dict(empty=1)),
            examples=dict(template=template),
        ),
    )
    for to in ('adapter', 'merged_16bit', 'merged_4bit', 'gguf_q8_0'):
        text = model_card(run, to)
        card = ModelCard(text)
        assert (card.data.license, card.data.base_model, card.data.datasets, card.data.eval_results) == (
            'cc-by-nc-4.0',
            None,
            None,
            None,
        )
        assert (
            str(tmp_path) not in text
            and '`rows.jsonl`' in text
            and 'my base' in text
            and '| left out: empty | 1 |' in text
            and '| 2 passes over the rows |' in text
        )
        code = re.findall('^(`{3,})python\n(.*?)\n\\1$', text, re.S | re.M)
        assert len(code) == (0 if to.startswith('gguf') else 1)
        for _, c in code:
            compile(c, to, 'exec')


def test_another_commit_in_between(hub, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    run = make(tmp_path)
    real = HfApi.create_commit

    def late(api, repo_id, *a, **kw):
        hub.repos[repo_id].commit('main', {}, 'theirs')
        return real(api, repo_id, *a, **kw)

    monkeypatch.setattr(HfApi, 'create_commit', late)
    with pytest.raises(HubError, match='somebody else has committed to me/model in the meantime'):
        push(run, 'me/model')


def test_refused_before_anything_is_sent(hub, tmp_path):
    run = make(tmp_path, names=['small'])
    for repo_id in ('', 'model', 'a/b/c', 'me/mo del', '../x', 'me/x.git', 'me/' + 'x' * 97):
        with pytest.raises(SpecError, match='^repo: '):
            push(run, repo_id)
    with pytest.raises(SpecError, match='is a commit, and a commit is never changed'):
        push(run, 'me/model', revision='0' * 40)
    with pytest.raises(
        SpecError, match="holds no 'merged_16bit'; it holds adapter; export it first: unsloth-nb run export -p run="
    ):
        push(run, 'me/model', to='merged_16bit')
    for n in ('pytorch_model.bin', 'optimizer.pt', 'state.pkl', 'modeling.py', 'tool.sh'):
        with pytest.raises(SpecError, match=f'{n} not pushed: only .safetensors'):
            push(make(tmp_path, names=['small'], **{n: 'x'}), 'me/model')
    with pytest.raises(SpecError, match='generation_config.json hold what looks like a token'):
        push(make(tmp_path, names=['small'], **{'generation_config.json': dict(note=TOKEN)}), 'me/model')
    with pytest.raises(SpecError, match="names a model that only this machine has, 'mine'"):
        push(
            make(tmp_path, names=['small'], **{'base.json': dict(model='/data/models/mine', revision=None)}), 'me/model'
        )
    (run.path / 'adapter/small.safetensors').write_bytes(weights('small', 2))
    with pytest.raises(CheckpointError, match='small.safetensors has changed'):
        push(run, 'me/model')
    assert not hub.log  # Not even asked


def test_tokens_turn_up_nowhere(hub, tmp_path, capfd, caplog):
    caplog.set_level('DEBUG')
    run = make(tmp_path)
    shown = [str(x) + repr(x) for x in (push(run, 'me/model'), push(run, 'me/model', token=TOKEN), pull('me/model'))]
    files = [p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()] + [
        d for c in hub.repos['me/model'].commits.values() for _, _, d in c.values()
    ]
    out = capfd.readouterr()
    texts = [
        *shown,
        out.out,
        out.err,
        caplog.text,
        *hub.repos['me/model'].titles.values(),
        *(d.decode(errors='replace') for d in files),
    ]
    assert len(files) > 15 and not any(t in x for x in texts for t in USERS)


LOAD = '''
import json,sys
from unsloth_nb.core.engine import start_engine
start_engine()
from unsloth_nb import FinetuneJob,load_model
from unsloth_nb.export.hub import pull
model,adapter,commits = json.loads(sys.argv[1])
job = lambda **kw: FinetuneJob(max_seq_length=128, gradient_checkpointing=False, load_in_4bit=False, dtype='float32', **kw)
total = lambda m: float(sum(p.double().sum() for n,p in m.model.named_parameters() if 'embed_tokens' in n))
print(json.dumps(dict(totals=[total(load_model(job(model=model, revision=c))) for c in commits], adapter=sum(load_model(job(model=str(pull(*adapter)))).parameters[:1]))))
'''

MAKE = '''
import shutil,sys
from unsloth_nb.jobs.benchmarking import random_model
from unsloth_nb.export.model_cards import model_card
from unsloth_nb.runs.checkpoints import write_whole
from safetensors.torch import load_file
shape = dict(model_type='llama', hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=49152, tie_word_embeddings=True)
for seed in (1, 2):
    made = random_model(shape, f'{sys.argv[1]}/made{seed}', seed)
    (made/'README.md').write_text('A model of random numbers.')
    write_whole(f'{sys.argv[1]}/{seed}/merged_16bit', lambda d: shutil.copytree(made, d, dirs_exist_ok=True))
    print(float(load_file(made/'model.safetensors')['model.embed_tokens.weight'].double().sum()))
'''


@pytest.mark.slow
def test_private_models_load_at_a_pinned_commit(hub, tmp_path, finished_run):
    "By name and commit with plain job parameters, in a process of its own with an empty cache"
    env = os.environ | dict(HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET='1')

    def child(code, arg):
        r = subprocess.run(
            [sys.executable, '-c', code, arg], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        assert r.returncode == 0, r.stderr
        assert TOKEN not in r.stdout + r.stderr
        return r.stdout

    want = [float(l) for l in child(MAKE, str(tmp_path)).split()]
    commits = [push(tmp_path / str(s) / 'merged_16bit', 'us/tiny').commit for s in (1, 2)]
    adapter = push(finished_run, 'us/adapter').commit
    got = json.loads(child(LOAD, json.dumps(['us/tiny', ['us/adapter', adapter], commits])).splitlines()[-1])
    assert got['totals'] == pytest.approx(want) and want[0] != pytest.approx(want[1])
    assert got['adapter'] > 0
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())
