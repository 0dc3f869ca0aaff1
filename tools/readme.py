"""Write README.md from nbs/index.ipynb, as nbdev's `nbdev-readme` does with Quarto; `--check` fails when it is out of date.

Links between pages lead to the published site where pyproject.toml names one (`Documentation`), and else to the
notebooks in `nbs/`, so that they work wherever the repository is read."""

import re
import sys
import tomllib
from html import unescape
from pathlib import Path
from urllib.parse import urljoin

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / 'nbs' / 'index.ipynb'
README = ROOT / 'README.md'


def site():
    "Where the pages are published, or an empty string"
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'].get('urls', {}).get('Documentation', '')


def link(m):
    text = m[1]
    url = m[2]
    page, _, anchor = url.partition('#')
    if ':' in url or not page.endswith(('.html', '.ipynb')):
        return m[0]
    stem = page.rsplit('.', 1)[0]
    to = (
        urljoin(site().rstrip('/') + '/', f'{stem}.html') + ('#' + anchor if anchor else '')
        if site()
        else f'nbs/{stem}.ipynb'
    )
    return f'[{text}]({to})'


def alert(m):
    "A Quarto callout as the alert that GitHub shows"
    body = (f'**{m[2]}**\n\n' if m[2] else '') + m[3].strip()
    return '\n'.join(f'> {l}'.rstrip() for l in [f'[!{m[1].upper()}]', *body.splitlines()])


def prose(s, link=link):
    "Markdown for GitHub: links and callouts, but nothing inside code blocks"
    parts = re.split(r'(^```.*?^```$)', s, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        p = re.sub(
            r'^::: \{\.callout-(note|tip|important|warning|caution)[^}]*\}\n+(?:## (.*)\n+)?(.*?)\n:::$',
            alert,
            parts[i],
            flags=re.M | re.S,
        )
        parts[i] = re.sub(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', link, p)
    return ''.join(parts)


def words(html):
    "The text of HTML: a line a row, cells apart"
    s = re.sub(r'<(style|script)\b.*?</\1>', '', html, flags=re.S)
    s = re.sub(r'</t[dh]>', '  ', re.sub(r'</(?:tr|div|p|li|h\d|pre)>|<br */?>', '\n', s))
    lines = [l.rstrip() for l in unescape(re.sub(r'<[^>]+>', '', s)).splitlines()]
    return '\n'.join(l for l in lines if l.strip())


def output(o, link, picture):
    "One saved output of a cell: what a reader of plain text can use"
    if o['output_type'] == 'stream':
        return '' if o.get('name') == 'stderr' else f"```text\n{''.join(o['text']).rstrip()}\n```"
    d = {k: ''.join(v) for k, v in o.get('data', {}).items() if isinstance(v, (str, list))}
    if 'text/markdown' in d:
        return prose(d['text/markdown'].strip(), link)
    if 'image/svg+xml' in d or 'image/png' in d:
        return picture(d)
    plain = d.get('text/plain', '')
    if 'text/html' in d and (re.match(r'<.* object', plain) or len(plain.splitlines()) == 1 and len(plain) > 200):
        plain = words(d['text/html'])  # A repr for machines
    return f'```text\n{plain.rstrip()}\n```' if plain.strip() else ''


def markdown(cells, link=link, picture=None):
    "The cells of a notebook and their outputs as blocks of Markdown; `picture` writes a picture's data, by default its description"
    res = []
    for c in cells:
        d = c.directives
        if c.cell_type == 'raw' or 'hide' in d or d.get('include') == 'false':
            continue
        if c.cell_type == 'markdown':
            res.append(prose(c.source.strip(), link))
            continue
        code = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|')).strip()
        if code and d.get('echo') != 'false':
            res.append(f'```python\n{code}\n```')
        alt = re.search(r'^#\|\s*fig-alt:\s*"?(.*?)"?\s*$', c.source, re.M)

        def draw(data):
            return picture(data, alt[1] if alt else '') if picture else f"*{alt[1] if alt else 'Picture'}*"

        if d.get('output') != 'false':
            res += filter(None, (output(o, link, draw) for o in c.get('outputs', [])))
    return res


PICTURES = INDEX.parent / 'pictures'


def readme():
    "Text of README.md, and its pictures by name"
    files = {}

    def keep(data, alt):
        name = f"readme_{len(files) + 1}.svg"
        files[name] = data['image/svg+xml']
        return f'![{alt}]({(PICTURES / name).relative_to(ROOT)})'

    blocks = markdown(read_nb(INDEX).cells, picture=keep)
    return '\n\n'.join(
        [f'<!-- Written from {INDEX.relative_to(ROOT)} by `make readme`; edit that notebook -->', *blocks]
    ) + '\n', files


if __name__ == '__main__':
    text, files = readme()
    wanted = {README: text, **{PICTURES / n: s for n, s in files.items()}}
    if '--check' in sys.argv:
        if [f for f, s in wanted.items() if not f.exists() or f.read_text() != s]:
            sys.exit('README.md is out of date: run `make readme`')
    else:
        PICTURES.mkdir(exist_ok=True)
        for f, s in wanted.items():
            f.write_text(s)
