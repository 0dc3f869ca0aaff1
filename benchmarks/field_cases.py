"""The table of cases from the field, run again: what people bring, and whether it is read right or refused well.

    python benchmarks/field_cases.py FOLDER [--rows A1,B3] [--fast] [--out FILE]

FOLDER holds the table (README.md, with the verdict of the first trial) and its inputs, which stay there. What is run for a
row, and what a user would expect to see, stands in field_cases.yaml next to this file; rows that train are functions
here. A verdict is right, unclear (refused, but not by what helps), wrong (taken, but not as expected), crash, not
offered, or elsewhere (a test or another benchmark shows it). --fast leaves out the rows that start a process."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unsloth_nb import cli
from unsloth_nb.core.engine import start_engine, versions
from unsloth_nb.core.schema import parse_yaml
from unsloth_nb.core.show import markdown_table
from unsloth_nb.runs.run import read_json, read_lines, write_json
from unsloth_nb.training.loading import embedded_model

TABLE = parse_yaml(Path(__file__).with_suffix('.yaml').read_text(), 'field_cases.yaml')
WORST = ('crash', 'wrong', 'unclear', 'not offered', 'right')
SMALL = '-p max_steps=2 -p max_rows=8 -p test_size=2 -p max_new_tokens=8 -p max_seq_length=512'
COMMAND = [sys.executable, '-c', 'from unsloth_nb.cli import main; main()']
PLAIN = [dict(prompt=f'How many are {i} and {i}?', completion=f'{2 * i}.') for i in range(16)]


# --- inputs


def link_model(folder, without=()):
    "The embedded model in a folder of its own, as links but for what is to be changed"
    folder.mkdir(parents=True)
    for f in Path(embedded_model()).iterdir():
        if f.is_file() and f.name not in without:
            (folder / f.name).symlink_to(f.resolve())
    return folder


class Inputs(dict):
    "Files and models by the names that the table uses, made when they are asked for"

    def __init__(self, cases, home):
        self.cases = cases
        self.home = home
        self.made = 0
        self.update(cases=cases)

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]

    def make(self, name):
        if re.fullmatch(r'd\d+_?', name):
            found = sorted(p for p in (self.cases / 'data').iterdir() if re.match(rf'{name}(?!\d)', p.name))
            return found[0] if found else f'{name}-is-not-there'
        if name in ('dead', 'utf16', 'plain16', 'pad_eos'):
            return getattr(self, name)()
        return self.model(name)

    def own(self, name):
        "A small input of the table"
        content = TABLE['files'][name]
        text = content if isinstance(content, str) else '\n'.join(map(json.dumps, content)) + '\n'
        (self.home / name).write_text(text)
        return self.home / name

    def dead(self):
        (self.home / 'dead.jsonl').symlink_to('nowhere.jsonl')
        return 'dead.jsonl'

    def utf16(self):
        (self.home / 'utf16.yaml').write_text('max_steps: 5\n', encoding='utf-16')
        return self.home / 'utf16.yaml'

    def plain16(self):
        (self.home / 'plain16.jsonl').write_text('\n'.join(map(json.dumps, PLAIN)))
        return self.home / 'plain16.jsonl'

    def pad_eos(self):
        "A tokenizer that pads with its end token"
        folder = link_model(self.home / 'models/pad_eos', ('tokenizer_config.json', 'special_tokens_map.json'))
        config = read_json(Path(embedded_model()) / 'tokenizer_config.json')
        write_json(folder / 'tokenizer_config.json', config | dict(pad_token=config['eos_token']))
        return folder

    def model(self, name):
        "The embedded model with another template, or with something missing"
        folder = self.home / 'models' / name
        if name == 'no_tokenizer':
            return link_model(folder, ('tokenizer.json', 'vocab.json', 'merges.txt', 'tokenizer_config.json'))
        template = TABLE['templates'].get(name)
        if template is None:
            template = next((self.cases / 'templates').glob(f'{name}_*.jinja')).read_text()
        link_model(folder, ('chat_template.jinja',))
        (folder / 'chat_template.jinja').write_text(template)
        return folder


def fill(text, inputs):
    "A command with its inputs in place"

    def value(m):
        name = m[1]
        if name == 'out':
            inputs.made += 1
            return shlex.quote(str(inputs.home / f'out{inputs.made}.yaml'))
        return shlex.quote(str(inputs.own(name[4:]) if name.startswith('own:') else inputs[name]))

    return shlex.split(re.sub(r'\{([\w:.]+)\}', value, text))


# --- a command and what is seen of it


def here(argv):
    "(exit code, output) of a command in this process"
    out = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors='replace', write_through=True)
    argv_before, code = sys.argv, 0
    sys.argv = ['unsloth-nb', *argv]
    try:
        with redirect_stdout(out), redirect_stderr(out):
            cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception as e:
        code = 1
        out.write(f'Traceback: {type(e).__name__}: {e}')
    finally:
        sys.argv = argv_before
    return code, out.buffer.getvalue().decode('utf-8', 'replace')


def process(*words, **env):
    "(exit code, output) of a command in a process of its own"
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    r = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=1800
    )
    return r.returncode, (r.stdout + r.stderr).decode('utf-8', 'replace')


def judge(code, text, want, never=None, absent=False):
    "The verdict on one ending"
    if 'Traceback' in text or re.search(r'failed: cell \d+: (?!\w*(Spec|Data|Format|Export)Error)', text):
        return 'crash'
    seen = any(code == w.get('code', 0) and re.search(w['sees'], text, re.S | re.I) for w in want)
    if seen and not (never and re.search(never, text, re.S)):
        return 'not offered' if absent else 'right'
    if re.search('has no such parameter|no known template', text):
        return 'not offered'
    return 'wrong' if code == 0 else 'unclear'


def suggested(text):
    "What a refusal says to add, as words of a command"
    mapping = re.search(r'dataset_columns=([\w:,. -]+?\w)(?=[\s;.\'")]|$)', text)
    if mapping:
        return ['-p', mapping[0]]
    policy = re.search(
        r"\b(same_role|answer_first|last_question|late_system|\w+)='?(merge|cut|context|keep|to_user)\b", text
    )
    return ['-p', f'{policy[1]}={policy[2]}'] if policy else None


def follow(argv, expected):
    "Do what a refusal suggests: (verdict, output); what is read at once needs no suggestion"
    code, text = here(argv)
    for _ in range(3):
        more = suggested(text) if code else None
        if more is None or more[1] in argv:
            break
        argv = [*argv, *more]
        code, text = here(argv)
    return judge(code, text, [dict(sees=expected)]), text


def without_names(text, argv):
    "An output without the places that the command named, whose words are no answer"
    for word in sorted(argv, key=len, reverse=True):
        if '/' in word:
            text = text.replace(word, 'INPUT').replace(Path(word).name, 'INPUT')
    return text


def run_step(step, inputs):
    "(verdict, the last lines seen) of one step of the table"
    argv = fill(step['run'], inputs)
    if 'follow' in step:
        verdict, text = follow(argv, step['follow'])
    else:
        code, text = here(argv)
        text = without_names(text, argv)
        verdict = judge(code, text, step['want'], step.get('never'), step.get('absent', False))
    return verdict, text


# --- rows that train, or need a process of their own


def train(inputs, *words, small=SMALL, **env):
    return process('run', 'finetune', *small.split(), *words, UNSLOTH_NB_RUNS_DIR=str(inputs.home / 'runs'), **env)


def newest(inputs):
    return max((inputs.home / 'runs').iterdir(), key=lambda p: p.stat().st_mtime)


FINISHED = [dict(sees='finished')]
REFUSED = dict(code=2, sees='')


def adapter(inputs, name, change=None):
    "An adapter of rank 8 on two layers, as another tool would have left it"
    if 'trained' not in inputs:
        code, text = train(inputs, '-p', 'r=8', '-p', 'lora_alpha=16', '-p', 'target_modules=q_proj,v_proj')
        if code:
            raise RuntimeError(text[-500:])
        inputs['trained'] = newest(inputs) / 'adapter'
    folder = inputs.home / name
    folder.mkdir()
    names = ['adapter_model.safetensors', *(f.name for f in inputs['trained'].glob('*token*')), 'chat_template.jinja']
    for n in names:
        if (inputs['trained'] / n).exists():
            shutil.copy(inputs['trained'] / n, folder / n)
    config = read_json(inputs['trained'] / 'adapter_config.json')
    config['base_model_name_or_path'] = str(embedded_model())
    write_json(folder / 'adapter_config.json', config | (change(folder) if change else {}))
    return folder


def patterned(folder):
    "One layer of half the rank"
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / 'adapter_model.safetensors')
    for k, v in weights.items():
        if 'layers.0.self_attn.q_proj' in k:
            weights[k] = v[:4].copy() if 'lora_A' in k else v[:, :4].copy()
    save_file(weights, folder / 'adapter_model.safetensors', dict(format='pt'))
    return dict(rank_pattern={'layers.0.self_attn.q_proj': 4}, alpha_pattern={'layers.0.self_attn.q_proj': 8})


def named_templates(inputs):
    folder = link_model(inputs.home / 'models/named', ('chat_template.jinja', 'tokenizer_config.json'))
    source = Path(embedded_model())
    config = read_json(source / 'tokenizer_config.json')
    file = source / 'chat_template.jinja'
    own = file.read_text() if file.exists() else config['chat_template']
    config['chat_template'] = [dict(name=n, template=own) for n in ('default', 'tool_use')]
    write_json(folder / 'tokenizer_config.json', config)
    return judge(*(found := train(inputs, '-p', f'model={folder}')), [*FINISHED, REFUSED]), found[1]


def start_and_signal(inputs, number, steps=12, **words):
    "A run that gets a signal once three steps are done; its directory"
    before = set((inputs.home / 'runs').glob('*'))
    more = [w for k, v in words.items() for w in ('-p', f'{k}={v}')]
    argv = [*COMMAND, 'run', 'finetune', *SMALL.split(), '-p', f'max_steps={steps}', *more]
    env = os.environ | dict(UNSLOTH_NB_RUNS_DIR=str(inputs.home / 'runs'))
    child = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    end = time.monotonic() + 600
    while child.poll() is None and time.monotonic() < end:
        made = set((inputs.home / 'runs').glob('*')) - before
        if made and len(read_lines(next(iter(made)) / 'metrics.jsonl')) >= 3:
            os.killpg(child.pid, number)
            break
        time.sleep(0.2)
    text = child.communicate(timeout=300)[0].decode('utf-8', 'replace')
    return newest(inputs), text


def clock(inputs):
    run, text = start_and_signal(inputs, signal.SIGINT, model=inputs['t7'])
    time.sleep(61 - time.time() % 60)  # The template names the minute
    code, more = process('run', '--resume', run.name, UNSLOTH_NB_RUNS_DIR=str(inputs.home / 'runs'))
    return judge(code, more, FINISHED), text + more


def tokens_added(inputs):
    folder = link_model(inputs.home / 'models/tok_bigger', ('tokenizer.json',))
    tokens = read_json(Path(embedded_model()) / 'tokenizer.json')
    last = max([t['id'] for t in tokens['added_tokens']] + list(tokens['model']['vocab'].values()))
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    tokens['added_tokens'].append(dict(id=last + 1, content='<|extra|>', special=True, **flags))
    write_json(folder / 'tokenizer.json', tokens)
    inputs['tok_bigger'] = folder
    code, text = train(inputs, '-p', f'model={folder}', '-p', f'dataset={inputs["plain16"]}')
    return judge(code, text, [*FINISHED, dict(code=2, sees='embedding|vocab')]), text  # No row spells the new token


def embeddings(inputs):
    code, text = train(inputs, '-p', 'target_modules=q_proj,v_proj,embed_tokens,lm_head')
    if code == 2:
        return judge(code, text, [dict(code=2, sees='embed_tokens|embedding')]), text
    run = newest(inputs).name
    code, more = process('export', run, '--to', 'merged_16bit', UNSLOTH_NB_RUNS_DIR=str(inputs.home / 'runs'))
    return judge(code, more, [dict(sees='merged')]), text + more


def embedding_memory(inputs):
    words = ['plan', '--device', 'H100', '-p', 'model=llama-3.1-8b-instruct', '--json']
    _, plain = here(words)
    code, text = here([*words, '-p', 'target_modules=q_proj,v_proj,embed_tokens,lm_head'])
    return ('wrong' if plain == text else judge(code, text, [dict(sees=''), REFUSED])), text


def rank_pattern(inputs):
    folder = adapter(inputs, 'ad_pattern', patterned)
    code, text = train(inputs, '-p', f'model={folder}')
    return judge(code, text, [*FINISHED, dict(code=2, sees='rank_pattern')]), text


def going_on(inputs):
    code, text = train(inputs, '-p', f'model={adapter(inputs, "ad_qv")}')
    return judge(code, text, FINISHED), text


def before_is_adapter(inputs):
    train(inputs, '-p', f'model={adapter(inputs, "ad_before")}', '-p', 'r=8', '-p', 'lora_alpha=16')
    result = read_json(newest(inputs) / 'result.json') or {}
    sides = [k for k, v in result.get('metrics', {}).items() if isinstance(v, dict) and 'loss' in v]
    return ('right' if len(sides) > 2 else 'unclear'), f'sides: {", ".join(sides)}'


def other_adapters(inputs):
    "Adapters with weight decomposition, and rank-stabilised ones, are trained further"
    ends = []
    for kind in ('use_dora', 'use_rslora'):
        folder = inputs.home / kind
        make = (
            'import sys; from peft import LoraConfig, get_peft_model; from transformers import AutoModelForCausalLM as M; '
            'c = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **{sys.argv[1]: True}); '
            'get_peft_model(M.from_pretrained(sys.argv[2]), c).save_pretrained(sys.argv[3])'
        )
        subprocess.run([sys.executable, '-c', make, kind, str(embedded_model()), str(folder)], check=True)
        words = ['-p', 'r=8', '-p', 'lora_alpha=8', '-p', 'target_modules=q_proj,v_proj']
        ends.append(train(inputs, '-p', f'model={folder}', *words))
    verdicts = [judge(*e, FINISHED) for e in ends]
    return min(verdicts, key=WORST.index), ends[0][1]


def lost_base(inputs):
    folder = adapter(inputs, 'ad_base', lambda _: dict(base_model_name_or_path='/content/drive/model'))
    code, text = process('plan', '-p', f'model={folder}')
    return judge(code, text, [dict(code=2, sees='base_model_name_or_path'), dict(code=2, sees='/content/drive')]), text


def one_row(inputs):
    words = ['-p', 'max_steps=null', '-p', 'num_train_epochs=2', '-p', 'max_rows=3', '-p', 'test_size=1']
    return judge(*(found := train(inputs, *words)), FINISHED), found[1]


def resume_said(inputs):
    "After a refusal that resuming cannot change, --resume is not advised"
    folder = adapter(inputs, 'ad_said', lambda _: dict(base_model_name_or_path='/content/drive/model'))
    code, text = train(inputs, '-p', f'model={folder}')
    return ('unclear' if '--resume' in text else judge(code, text, [REFUSED])), text


def prompt_as_index(inputs):
    "A frame whose index holds the prompts"
    import pandas as pd
    from unsloth_nb.core.spec import FinetuneJob
    from unsloth_nb.data.load import load_data
    from unsloth_nb.data.sources import DataError

    frame = pd.DataFrame(PLAIN).set_index('prompt')
    try:
        return 'right', str(load_data(FinetuneJob(test_size=2), rows=frame))
    except DataError as e:
        return judge(2, str(e), [dict(code=2, sees='index')]), str(e)


def end_tokens(inputs):
    "Sampling defaults and all end tokens of a model stand in what was merged"
    folder = link_model(inputs.home / 'models/gen', ('generation_config.json',))
    own = dict(eos_token_id=[2, 0], temperature=0.6, do_sample=True, top_p=0.9)
    write_json(folder / 'generation_config.json', own)
    code, text = train(inputs, '-p', f'model={folder}', '-p', 'save=merged_16bit')
    if code:
        return judge(code, text, FINISHED), text
    kept = read_json(newest(inputs) / 'merged_16bit' / 'generation_config.json')
    same = all(kept.get(k) == v for k, v in own.items() if k != 'eos_token_id')
    return ('right' if same and set(kept['eos_token_id']) == {0, 2} else 'unclear'), json.dumps(kept)


def without_converter(inputs):
    code, text = train(inputs, '-p', 'save=gguf_q8_0', '-p', 'max_steps=1')
    return judge(code, text, [*FINISHED, dict(code=2, sees='converter|llama.cpp')]), text


def hung_up(inputs):
    run, text = start_and_signal(inputs, signal.SIGHUP)
    result = read_json(run / 'result.json') or {}
    good = result.get('status') == 'interrupted' and list((run / 'checkpoints').glob('step-*'))
    return ('right' if good else 'wrong'), f'{result.get("status")}; {text[-200:]}'


def home_read_only(inputs):
    "A home that cannot be written"
    words = [*SMALL.split(), '-p', 'max_steps=1']
    away = dict(
        HOME='/proc', XDG_CACHE_HOME=None, UNSLOTH_NB_CACHE_DIR=None, UNSLOTH_NB_RUNS_DIR=str(inputs.home / 'runs')
    )
    code, text = process('run', 'finetune', *words, **away)
    return judge(code, text, [*FINISHED, dict(code=2, sees='cache_dir')]), text


def other_encoding(inputs):
    words = ['data', inputs['plain16'], '-p', 'test_size=2', '--show', '1']
    ends = [
        process(*words, PYTHONIOENCODING='cp1252'),
        process(*words, PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0'),
    ]
    verdicts = [judge(code, text, [dict(sees='row')]) for code, text in ends]
    return min(verdicts, key=WORST.index), ends[0][1]


def plain_locale(inputs):
    folder = inputs.home / 'ru ns é'
    folder.mkdir()
    found = process('data', inputs['plain16'], '-p', 'test_size=2', LC_ALL='C', UNSLOTH_NB_RUNS_DIR=str(folder))
    return judge(*found, [dict(sees='row')]), found[1]


PROCESSES = dict(
    A10=named_templates,
    A11=clock,
    B27=prompt_as_index,
    D1=tokens_added,
    D3=embeddings,
    D4=embedding_memory,
    D5=rank_pattern,
    D6=going_on,
    D7=before_is_adapter,
    D8=lost_base,
    D9=other_adapters,
    D10=one_row,
    D18=end_tokens,
    D19=resume_said,
    D20=without_converter,
    E1=hung_up,
    E2=home_read_only,
    E3=other_encoding,
    E4=plain_locale,
)


# --- the table


def given(cases):
    "Row to its verdict of the first trial, and what a user would expect"
    rows = {}
    for line in (cases / 'README.md').read_text().splitlines():
        if m := re.match(r'\| ([A-E]\d+b?) \|', line):
            cells = [c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]]
            rows[m[1]] = (re.sub(r'\*\*|\s+T$', '', cells[-2]).strip(), cells[-1])
    return rows


def look(row, inputs):
    "(verdict, what was seen) of a row, whatever happens"
    if row in TABLE['elsewhere']:
        return 'elsewhere', TABLE['elsewhere'][row]
    try:
        if row in PROCESSES:
            return PROCESSES[row](inputs)
        steps = [run_step(s, inputs) for s in TABLE['rows'][row]]
        return min(steps, key=lambda s: WORST.index(s[0]))
    except Exception as e:
        return 'crash', f'{type(e).__name__}: {e}'


def short(text, home):
    "The last lines of an output, without places"
    lines = [
        l.strip() for l in text.replace(str(home), '…').replace(tempfile.gettempdir(), '…').splitlines() if l.strip()
    ]
    return re.sub(r'(/[\w.+-]+){3,}', '…', ' | '.join(lines[-3:]))[-300:]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='with README.md, data, templates, params and lf')
    p.add_argument('--rows', help='only these, by comma; the others stay in FILE as they are')
    p.add_argument('--fast', action='store_true', help='without rows that start a process')
    p.add_argument('--out', type=Path, help='JSON; the table goes next to it as .md')
    a = p.parse_args()
    start_engine()  # Commands run in this process, and the first to import transformers must not be one of them
    cases = a.folder.resolve()
    table = given(cases)
    wanted = a.rows.split(',') if a.rows else [r for r in table if not (a.fast and r in PROCESSES)]
    out = a.out and a.out.absolute()
    found = read_json(out)['rows'] if a.rows and out and out.exists() else {}
    with tempfile.TemporaryDirectory() as tmp, chdir(tmp):
        os.environ['UNSLOTH_NB_RUNS_DIR'] = str(Path(tmp) / 'runs')
        (Path(tmp) / 'runs').mkdir()
        inputs = Inputs(cases, Path(tmp))
        for row in wanted:
            start = time.perf_counter()
            verdict, text = look(row, inputs)
            before, expected = table[row]
            seconds = round(time.perf_counter() - start, 1)
            found[row] = dict(before=before, now=verdict, expected=expected, seen=short(text, tmp), seconds=seconds)
            print(f'{row:4} {verdict:12} (before: {before})', flush=True)
    found = {row: found[row] for row in table if row in found}
    counts = {v: sum(r['now'] == v for r in found.values()) for v in (*WORST, 'elsewhere')}
    print(counts)
    if out:
        write_json(out, dict(date=time.strftime('%Y-%m-%d'), versions=versions(), counts=counts, rows=found))
        lines = [('row', 'before', 'now', 'seen'), *((k, r['before'], r['now'], r['seen']) for k, r in found.items())]
        out.with_suffix('.md').write_text(markdown_table(lines) + '\n')


if __name__ == '__main__':
    main()
