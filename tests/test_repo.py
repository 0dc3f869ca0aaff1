"What is generated is fresh, what is linked exists, and the package imports in no time."

import json
import re
import subprocess
import sys
from pathlib import Path

from readers_line import findings

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1.0  # [s] for `import unsloth_nb`; the aim is 0.3, the rest is for busy machines
HEAVY = 'torch transformers unsloth trl peft datasets pandas matplotlib'.split()


def same(a, b, pattern):
    "Both folders hold the same files, byte for byte"

    def names(d):
        return {str(p.relative_to(d)) for p in d.rglob(pattern) if not any(o[0] in '.' for o in p.relative_to(d).parts)}

    assert names(a) == names(b)
    diff = [n for n in sorted(names(a)) if (a / n).read_bytes() != (b / n).read_bytes()]
    assert not diff, f'not as generated: {diff}'


def test_export(tree, tool):
    "The modules are what the notebooks export"
    for p in (tree / 'unsloth_nb').rglob('*.py'):
        if p.name != '__init__.py':
            p.unlink()
    tool('nbdev-export', cwd=tree)
    same(ROOT / 'unsloth_nb', tree / 'unsloth_nb', '*.py')


def test_clean(tree, tool):
    "`nbdev-clean` finds nothing to strip"
    tool('nbdev-clean', cwd=tree)
    same(ROOT / 'nbs', tree / 'nbs', '*.ipynb')


def test_no_widget_state():
    "No notebook keeps the state of widgets, which only weighs: pages show what panels leave behind"
    assert not [p.name for p in (ROOT / 'nbs').rglob('*.ipynb') if 'widgets' in json.loads(p.read_text())['metadata']]


def test_parameters_tag(tree, tool):
    "Cleaning keeps the tag by which papermill finds the parameters"
    nb = json.loads((tree / 'nbs' / 'index.ipynb').read_text())
    nb['cells'][1]['metadata'] = dict(tags=['parameters'], collapsed=True)
    f = tree / 'nbs' / 'index.ipynb'
    f.write_text(json.dumps(nb))
    tool('nbdev-clean', '--fname', f, cwd=tree)
    assert json.loads(f.read_text())['cells'][1]['metadata'] == dict(tags=['parameters'])


def test_first_cell():
    "The first cell is a title and a promise alone: nbdev makes front matter of it and drops the rest from the page"
    for p in (ROOT / 'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in p.parts:
            continue
        cells = json.loads(p.read_text())['cells']
        assert (
            re.fullmatch(r'# [^\n]+(\n\n> [^\n]+)?', ''.join(cells[0]['source']))
            and cells[1]['cell_type'] == 'markdown'
        ), p.name


def test_readme(tool):
    "README.md is what the index notebook says"
    tool(sys.executable, 'tools/readme.py', '--check')


def test_readme_models():
    "The index notebook was run after the last change of the presets"
    from unsloth_nb.core.spec import presets

    text = (ROOT / 'README.md').read_text()
    assert not [n for n in presets() if f'`{n}`' not in text]


def test_lock(tool):
    "The lock holds what pyproject.toml asks for, and nothing that it excludes"
    assert 'fits' in tool(sys.executable, 'tools/lock.py', '--check')
    cpu = tool(sys.executable, 'tools/lock.py', '--cpu')
    assert re.search('^torch==', cpu, re.M) and not re.search('^(nvidia|cuda|triton|xformers)', cpu, re.M)


def test_floors(tool):
    "Imports go down the wings of the house, and never in a circle"
    tool('lint-imports', '--no-cache')


# Absolute folders of one machine, outside words, addresses and encoded pictures; and hosts of package registries
PLACES = re.compile(r'(?<![\w.$~}*/+-])/(?:work|root|opt|home|Users)/')
HOSTS = re.compile(
    r'\b(?:[\w-]+\.)*(?:pypi|pythonhosted|conda|anaconda|npmjs|crates)\.(?:org|com|io)\b|\bdownload\.pytorch\.'
)


def test_no_machine():
    "No file names a place on the machine where it was made, or the host of a package registry"
    names = subprocess.run(
        ['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    bad = []
    for n in filter(None, names.split('\0')):
        if not (ROOT / n).is_file():
            continue
        try:
            lines = (ROOT / n).read_text().splitlines()
        except UnicodeDecodeError:
            continue
        bad += [
            f'{n}:{i}: {m[0]}'
            for i, l in enumerate(lines, 1)
            for m in [PLACES.search(l) or HOSTS.search(l) or (str(ROOT) in l and re.search(re.escape(str(ROOT)), l))]
            if m
        ]
    assert not bad, '\n'.join(bad)


def test_public_names():
    "No public name is also a module's: it would be the one at first and the other once that module is imported"
    import unsloth_nb

    modules = {
        part
        for p in (ROOT / 'unsloth_nb').rglob('*.py')
        for part in p.relative_to(ROOT / 'unsloth_nb').with_suffix('').parts
    }
    assert not modules & set(unsloth_nb._home)


def test_import_time(record_property):
    "`import unsloth_nb` is quick and loads nothing heavy"
    code = f'import sys,time; t = time.perf_counter(); import unsloth_nb; t = time.perf_counter()-t; print(t, [m for m in {HEAVY} if m in sys.modules])'
    times = []
    for _ in range(5):
        t, loaded = subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split(' ', 1)
        assert loaded.strip() == '[]', loaded
        times.append(float(t))
    record_property('import_seconds', min(times))
    print(f'import unsloth_nb: {min(times):.3f} s, best of 5')
    assert min(times) < BOUND


PATCHED = re.compile(r'^@patch[^\n]*\ndef (\w+)\(self:(\w+)|^@patch\(cls_method=True\)\ndef (\w+)\(cls:(\w+)', re.M)


def test_the_front_door_is_small():
    "`from unsloth_nb import *` gives the nouns and verbs of the README; every other name is there when it is asked for"
    import unsloth_nb

    assert 50 <= len(unsloth_nb.__all__) <= 65 and set(unsloth_nb.__all__) <= set(unsloth_nb._home)
    assert all(hasattr(unsloth_nb, n) for n in unsloth_nb._home)


def test_a_readers_line():
    "No conditional expression inside another one, no call that has to be counted out, no cell longer than a page"
    assert not findings()


def test_no_private_name_crosses_a_module():
    "What another module needs has a public name"
    imports = re.compile(r'from (?:\.|unsloth_nb)[\w.]* import (\([^)]*\)|[^\n#]*)')
    crossing = []
    for p in (ROOT / 'unsloth_nb').rglob('*.py'):
        if p.name != '_modidx.py':
            names = [n for m in imports.finditer(p.read_text()) for n in re.findall(r'\w+', m[1])]
            crossing += [f'{p.name}: {n}' for n in names if n.startswith('_')]
    assert not crossing


def test_format(tool):
    "Notebooks, tests and tools are as `ruff format` writes them, and hold to the few rules of pyproject.toml"
    folders = 'nbs', 'tests', 'tools', 'benchmarks'
    tool('ruff', 'format', '--check', *folders)
    tool('ruff', 'check', *folders)


def test_methods_are_there_with_their_class():
    "A method that joins its class later does so in the class's own wing, and whoever imports the wing has it"
    sources = {
        p: p.read_text() for p in (ROOT / 'unsloth_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')
    }
    homes = {name: p for p, text in sources.items() for name in re.findall(r'^class (\w+)', text, re.M)}
    elsewhere = []
    for p, text in sources.items():
        own = set(re.findall(r'^class (\w+)', text, re.M))
        for f, c, g, d in PATCHED.findall(text):
            if (c or d) in own:
                continue
            wing = p.parent / '__init__.py'
            loaded = re.search(r'^from \. import (.*?)(?:#|$)', wing.read_text(), re.M)
            if homes[c or d].parent != p.parent or not loaded or p.stem not in re.findall(r'\w+', loaded[1]):
                elsewhere.append(f'{p.stem}: {c or d}.{f or g}')
    assert not elsewhere
    code = 'import unsloth_nb; Run = unsloth_nb.Run; print(all(hasattr(Run, n) for n in ("stop", "keep", "interrupt", "reopen")))'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == 'True'
    )
