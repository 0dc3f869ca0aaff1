"""Write README.md from nbs/index.ipynb, as nbdev's `nbdev-readme` does with Quarto; `--check` fails when it is out of date.

Links between pages lead to the published site where pyproject.toml names one (`Documentation`), and else to the
notebooks in `nbs/`, so that they work wherever the repository is read."""

import re, sys, tomllib
from pathlib import Path
from urllib.parse import urljoin

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'

def site():
    "Where the pages are published, or an empty string"
    return tomllib.loads((ROOT/'pyproject.toml').read_text())['project'].get('urls', {}).get('Documentation', '')

def link(m):
    text, url = m[1], m[2]
    page, _, anchor = url.partition('#')
    if ':' in url or not page.endswith(('.html', '.ipynb')): return m[0]
    stem = page.rsplit('.', 1)[0]
    to = urljoin(site().rstrip('/')+'/', f'{stem}.html')+('#'+anchor if anchor else '') if site() else f'nbs/{stem}.ipynb'
    return f'[{text}]({to})'

def alert(m):
    "A Quarto callout as the alert that GitHub shows"
    body = (f'**{m[2]}**\n\n' if m[2] else '')+m[3].strip()
    return '\n'.join(f'> {l}'.rstrip() for l in [f'[!{m[1].upper()}]', *body.splitlines()])

def prose(s):
    "Markdown for GitHub: links and callouts, but nothing inside code blocks"
    parts = re.split(r'(^```.*?^```$)', s, flags=re.M|re.S)
    for i in range(0, len(parts), 2):
        p = re.sub(r'^::: \{\.callout-(note|tip|important|warning|caution)[^}]*\}\n+(?:## (.*)\n+)?(.*?)\n:::$', alert, parts[i], flags=re.M|re.S)
        parts[i] = re.sub(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', link, p)
    return ''.join(parts)

def output(o):
    "One saved output of a cell"
    if o['output_type'] == 'stream': return '' if o.get('name') == 'stderr' else f"```text\n{''.join(o['text']).rstrip()}\n```"
    d = o.get('data', {})
    if 'text/markdown' in d: return prose(''.join(d['text/markdown']).strip())
    return f"```text\n{''.join(d['text/plain']).rstrip()}\n```" if 'text/plain' in d else ''

def readme():
    res = [f'<!-- Written from {INDEX.relative_to(ROOT)} by `make readme`; edit that notebook -->']
    for c in read_nb(INDEX).cells:
        d = c.directives
        if c.cell_type == 'raw' or 'hide' in d or d.get('include') == 'false': continue
        if c.cell_type == 'markdown': res.append(prose(c.source.strip()))
        else:
            code = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|')).strip()
            if code and d.get('echo') != 'false': res.append(f'```python\n{code}\n```')
            if d.get('output') != 'false': res += filter(None, map(output, c.get('outputs', [])))
    return '\n\n'.join(res)+'\n'

if __name__ == '__main__':
    text = readme()
    if '--check' not in sys.argv: README.write_text(text)
    elif not README.exists() or README.read_text() != text: sys.exit('README.md is out of date: run `make readme`')
