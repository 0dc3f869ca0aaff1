"""What a formatter cannot check: nested conditional expressions, uncounted arguments, long texts, long cells.

`python tests/readers_line.py [WING]` lists what is to be done, by hand."""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_CHARACTERS = 120  # Of a line
MOST_ARGUMENTS = 5  # Positional ones of a call; more are named
MOST_LINES = 40  # Of an exported cell, blank lines and comments not counted


def pages(wing=''):
    "The notebooks that export a module, of one wing or of all"
    return sorted(p for p in (ROOT / 'nbs' / wing).rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def exported(page):
    "(place, source) of each exported cell"
    for i, cell in enumerate(json.loads(page.read_text())['cells']):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and source.startswith('#| export'):
            yield f'{page.relative_to(ROOT / "nbs")} [{i}]', source


def nested_conditionals(tree):
    "Conditional expressions that hold another one"
    for n in ast.walk(tree):
        if isinstance(n, ast.IfExp) and sum(isinstance(x, ast.IfExp) for x in ast.walk(n)) > 1:
            yield n.lineno, 'a conditional expression inside another one'


def long_calls(tree):
    "Calls with more positional arguments than a reader can count"
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and len(n.args) > MOST_ARGUMENTS:
            yield n.lineno, f'{len(n.args)} positional arguments'


def length(source):
    "Lines of a cell that say something"
    return sum(bool(line.strip()) and not line.strip().startswith('#') for line in source.splitlines())


def long_lines(source):
    "Lines that the formatter had to leave long, since they hold text"
    for n, line in enumerate(source.splitlines(), 1):
        if len(line) > MOST_CHARACTERS:
            yield n, f'{len(line)} characters'


def findings(wing=''):
    "What stands in the way of a reader, as lines of text"
    found = []
    for page in pages(wing):
        for place, source in exported(page):
            tree = ast.parse(source)
            found += [
                f'{place} line {n}: {what}'
                for n, what in (*nested_conditionals(tree), *long_calls(tree), *long_lines(source))
            ]
            if length(source) > MOST_LINES:
                found.append(f'{place}: {length(source)} lines, {MOST_LINES} at most')
    return found


if __name__ == '__main__':
    print('\n'.join(findings(*sys.argv[1:])) or 'nothing found')
