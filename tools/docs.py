"""Build the site from the notebooks into `_docs`, without Quarto, and check every link in it.

    python tools/docs.py                 stage, render with smalldocs, finish, check
    python tools/docs.py --preview       the same, served on this machine and built again after each change
    python tools/docs.py --stage         stop before rendering, for `quarto render _proc`, which builds the published site
    python tools/docs.py --finish DIR    finish and check a site that was rendered into DIR; `--base /path/` is where it will be

The notebooks are staged into `_proc` by nbdev's own processors, with one difference: nothing is executed. Pages show
the outputs that the notebooks hold, and the reference of each function comes from the module that is imported.
Finishing is the same for both renderers: a Markdown copy of each page and `llms.txt` for agents, no fonts from
elsewhere, names for what screen readers announce, a 404 page that works at any depth, and a page at each old address
in `tools/moved_pages.yaml` that sends its reader on."""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from html import escape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
PROC = ROOT / '_proc'
DOCS = ROOT / '_docs'
STATIC = ('site.css', 'site.html', '404.qmd')  # What pages share; pictures are found by their kind
sys.path.insert(0, str(ROOT))  # This checkout's modules, not an installed copy

import yaml
from nbdev import processors as P
from nbdev.process import NBProcessor
from nbdev.showdoc import show_doc
from fastcore.nbio import read_nb, write_nb

from readme import markdown, site
from reference import Reference


def notebooks():
    "The notebooks that become pages"
    return [p for p in sorted(NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(NBS).parts)]


def listed(o):
    "Every page that the sidebar names"
    if isinstance(o, str):
        return [o]
    return sum(map(listed, o), []) if isinstance(o, list) else listed(o.get('contents', []))


def check_sidebar():
    "The sidebar and the folder must name the same notebooks"
    named = set(listed(yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['sidebar']))
    found = {str(p.relative_to(NBS)) for p in notebooks()}
    bad = [f'_quarto.yml lists {n}, which does not exist' for n in sorted(named - found)]
    return bad + [f'_quarto.yml does not list {n}' for n in sorted(found - named)]


def shown(cell):
    "The name that a `show_doc(name)` cell is about, or None"
    if cell.cell_type != 'code' or not cell.source.startswith('show_doc('):
        return
    call = ast.parse(cell.source).body[0].value
    return ast.unparse(call.args[0])


def reference(path):
    "The names that the page of notebook `path` documents"
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=[P.add_show_docs]).process()
    return [n for n in map(shown, nb.cells) if n]


class Links:
    "Names in backticks become links to their reference: on the same page, else on the first page that has it"

    def __init__(self, pages):
        self.pages = pages

    def find(self, name, page):
        for p in [page, *self.pages]:
            if name in self.pages.get(p, ()):
                return os.path.relpath(p.with_suffix('.html'), page.parent) + '#' + name.lower()

    def link(self, text, page):
        def f(m):
            return f'[{m[0]}]({to})' if (to := self.find(m[1], page)) else m[0]

        out = []
        fenced = False
        for l in text.splitlines():
            if l.lstrip().startswith('```'):
                fenced = not fenced
            skip = fenced or l.startswith(('    ', '#'))
            out.append(l if skip else re.sub(r'(?<![\[`\\])`([A-Za-z_][\w.]*)(?:\(\))?`(?![\]`])', f, l))
        return '\n'.join(out)


def fill_show_docs(nb, mod):
    "Fill in the output of each `show_doc` cell from module `mod`, in the order of the source"
    cells = nb.cells
    i = 0
    while i < len(cells):  # nbdev inserts the references of one cell last first
        j = i
        while j < len(cells) and getattr(cells[j], 'has_sd', False):
            j += 1
        cells[i:j] = cells[i:j][::-1]
        i = j + 1
    for c in cells:
        code = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|'))
        if c.cell_type != 'code' or not code.startswith('show_doc('):
            continue
        md = eval(code, {**vars(mod), 'show_doc': partial(show_doc, renderer=Reference)})._repr_markdown_()
        c.outputs = [dict(output_type='display_data', metadata={}, data={'text/markdown': md})]


WIDGET = 'application/vnd.jupyter.widget-view+json'


def still(nb):
    "Outputs that need no kernel and no script: a widget is what it shows as HTML, and every picture says what is on it"
    nb.metadata.pop('widgets', None)
    heading = 'the page'
    for c in nb.cells:
        if c.cell_type == 'markdown':
            heading = ([heading] + re.findall(r'^#+ (.+)', c.source, re.M))[-1]
        kinds = [o.get('data', {}) for o in c.get('outputs', [])]
        for d in kinds:
            if d.pop(WIDGET, None) is None:
                continue
            if not {'text/html', 'text/markdown', 'image/png', 'image/svg+xml'} & set(d):
                raise ValueError(
                    f'a widget below "{heading}" was saved without text/html: its page would show its repr'
                )
        pictures = any('image/png' in d or 'image/svg+xml' in d for d in kinds)
        if pictures and not re.search(r'^#\|\s*fig-alt:', c.source, re.M):
            c.source = f'#| fig-alt: "Picture: {heading.strip("#` ")}"\n{c.source}'


def repository():
    "`owner/name` on GitHub, as the workflow or the clone says; None for a clone from elsewhere"
    if os.environ.get('GITHUB_REPOSITORY'):
        return os.environ['GITHUB_REPOSITORY']
    r = subprocess.run(['git', 'remote', 'get-url', 'origin'], cwd=ROOT, capture_output=True, text=True)
    m = re.search(r'github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$', r.stdout.strip())
    return m and m[1]


def badge(page, repo):
    "A link that opens a tutorial's notebook in Colab; nothing for other pages, and where the repository's address is not known"
    if page.parent.name == 'tutorials' and repo:
        return f'<a class="colab" href="https://colab.research.google.com/github/{repo}/blob/main/nbs/{page.as_posix()}">Open in Colab</a>'


def stage_nb(path, links, repo):
    nb = read_nb(path)
    page = path.relative_to(NBS)
    name = P._default_exp(nb)

    class show_docs(P.Processor):
        def begin(self):
            fill_show_docs(self.nb, import_module(f'unsloth_nb.{name}')) if name else None

    def add_links(cell):
        if cell.cell_type == 'markdown':
            cell.source = links.link(cell.source, page)

    swap = {'exec_show_docs': show_docs, 'add_links': add_links}
    NBProcessor(
        nb=nb, procs=[swap.get(p.__name__, p) for p in P.FilterDefaults().procs()], rm_directives='quarto'
    ).process()
    for c in nb.cells[:1]:
        c.source = re.sub(r'^output-file: .*\n', '', c.source, flags=re.M)  # The file's own name, already
    if b := badge(page, repo):
        nb.cells[1].source = f'{b}\n\n{nb.cells[1].source}'  # Below title and promise
    still(nb)
    (PROC / page).parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, PROC / page)


def stage():
    "Notebooks and everything they show, ready to be rendered, in `_proc`"
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    shutil.copy(ROOT / '_quarto.yml', PROC / '_quarto.yml')
    for p in NBS.rglob('*'):
        if p.suffix in ('.png', '.svg', '.jpg') or p.name in STATIC:
            (PROC / p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, PROC / p.relative_to(NBS))
    links = Links({p.relative_to(NBS): reference(p) for p in notebooks()})
    repo = repository()
    for p in notebooks():
        try:
            stage_nb(p, links, repo)
        except Exception as e:
            raise SystemExit(f'{p.relative_to(ROOT)} could not be staged: {type(e).__name__}: {e}') from e


def about(nb, page):
    "Title of a staged page, its description, and what it promises: the description, or the question in bold with which a job opens"
    first = nb.cells[0].source
    head = yaml.safe_load(first.strip().strip('-')) if first.startswith('---') else {}
    bold = next(
        (m[1] for c in nb.cells if c.cell_type == 'markdown' and (m := re.match(r'\*\*(.+?)\*\*', c.source))), ''
    )
    return head.get('title', page.stem), head.get('description', ''), head.get('description') or bold


def to_copy(m):
    "A link to a page, led to its copy"
    s = urlsplit(m[2])
    if s.scheme or s.netloc or not s.path.endswith(('.html', '.ipynb')):
        return m[0]
    return f"[{m[1]}]({s.path.rsplit('.', 1)[0]}.md{'#' + s.fragment if s.fragment else ''})"


def copies(dest):
    "A Markdown copy beside each page, and `llms.txt`, which lists them by section of the sidebar"
    entries = {}
    base = site().rstrip('/') + '/' if site() else ''
    for p in PROC.rglob('*.ipynb'):
        page = p.relative_to(PROC)
        nb = read_nb(p)
        title, description, promise = about(nb, page)
        cells = [c for c in nb.cells[1:] if 'THIS FILE WAS AUTOGENERATED' not in c.source]
        blocks = [f'# {title}', *([f'> {description}'] if description else []), *markdown(cells, to_copy)]
        (dest / page.with_suffix('.md')).write_text('\n\n'.join(blocks) + '\n')
        entries[str(page)] = f"- [{title}]({base}{page.with_suffix('.md')})" + (f': {promise}' if promise else '')

    def lines(contents, trail=()):
        own = [entries[o] for o in contents if isinstance(o, str)]
        yield from ['', f"## {': '.join(trail)}", '', *own] if own and trail else own
        for o in contents:
            if not isinstance(o, str):
                yield from lines(o['contents'], (*trail, o['section']))

    web = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']
    (dest / 'llms.txt').write_text(
        '\n'.join([f"# {web['title']}", '', f"> {web['description']}", '', *lines(web['sidebar']['contents'])]) + '\n'
    )


NAMES = {
    'quarto-sidebar': 'Pages',
    'quarto-secondary-nav': 'Where this page is',
    'page-navigation': 'Page before and after',
    'TOC': 'On this page',
}


def finish_page(text, page, base):
    "One rendered page, made to work for everyone: labels, tables that scroll inside themselves, a link to its Markdown"
    for k, name in NAMES.items():
        text = re.sub(
            rf'<nav\b(?![^>]*aria-label)(?=[^>]*(?:id|class)="[^"]*\b{k}\b)', f'<nav aria-label="{name}"', text
        )
    text = re.sub(
        r'(<a class="sidebar-item-text [^>]*?) role="navigation"', r'\1 role="button" tabindex="0"', text
    )  # A toggle is no landmark
    text = re.sub(r'(<a\b[^>]*?) role="navigation"', r'\1 role="button"', text)
    text = re.sub(
        r'(?<!<div class="sd-table">)(?<!<div class="sd-table">\n)(<table\b.*?</table>)',
        r'<div class="wide">\1</div>',
        text,
        flags=re.S,
    )
    if page.name == '404.html':  # Shown for addresses of any depth, so its links begin at the root

        def rooted(m):
            return (
                m[0]
                if m[2].startswith(base) or re.match(r'#|[a-z]+:|//', m[2])
                else f"{m[1]}{base}{m[2].removeprefix('./').lstrip('/')}"
            )

        return re.sub(r'((?:href|src)=")([^"]+)', rooted, text).replace(
            'name="smalldocs:offset" content="./"', f'name="smalldocs:offset" content="{base}"'
        )
    return text.replace(
        '</head>', f'<link rel="alternate" type="text/markdown" href="{escape(page.stem)}.md">\n</head>', 1
    )


def moved_pages():
    "Old addresses of pages, and the new ones"
    return yaml.safe_load((ROOT / 'tools' / 'moved_pages.yaml').read_text())


def redirect(old, new):
    "The page at an old address, which sends its reader to the same place on the new one"
    at = escape(os.path.relpath(new, Path(old).parent))
    canonical = f"{site().rstrip('/')}/{escape(new)}" if site() else at
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>This page has moved</title>
<link rel="canonical" href="{canonical}">
<script>location.replace("{at}"+location.hash)</script>
<meta http-equiv="refresh" content="0; url={at}">
</head>
<body><p>This page has moved: <a href="{at}">{at}</a></p></body>
</html>
'''


def write_redirects(dest):
    "A page at each old address"
    taken = {str(p.relative_to(NBS).with_suffix('.html')) for p in notebooks()}
    for old, new in moved_pages().items():
        if old in taken:
            raise SystemExit(f'tools/moved_pages.yaml: there is a page at {old}')
        (dest / old).parent.mkdir(parents=True, exist_ok=True)
        (dest / old).write_text(redirect(old, new))


def finish(dest, base='/'):
    "What both renderers leave to do, in the folder of a rendered site"
    dest = Path(dest)
    for f in dest.rglob('*.html'):
        f.write_text(finish_page(f.read_text(), f, base))
    for f in dest.rglob(
        '*.css'
    ):  # Fonts from elsewhere: a page must not wait for them, nor tell anyone that it is read
        css = f.read_text()
        if (own := re.sub(r'@import\s+(?:url\(\s*["\']?https?:[^)]*\)|(["\'])https?:.*?\1)[^;{}]*;', '', css)) != css:
            f.write_text(own)
    write_redirects(dest)
    return copies(dest)


class Page(HTMLParser):
    "Ids and links of one page"

    def __init__(self, html):
        super().__init__()
        self.ids = set()
        self.refs = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.ids |= {d[k] for k in ('id', 'name', 'data-anchor-id') if d.get(k)}
        u = d.get('href') if tag in ('a', 'link') else d.get('src') if tag in ('img', 'script', 'source') else None
        if tag == 'meta' and d.get('http-equiv') == 'refresh':
            u = d.get('content', '').partition('url=')[2]
        if u:
            self.refs.append(u)


def check_links(site, base='/'):
    "Number of pages and of local links, and what is broken"
    site = Path(site).resolve()
    pages = {f: Page(f.read_text()) for f in sorted(site.rglob('*.html'))}
    bad = []
    n = 0
    for f, p in pages.items():
        for u in p.refs:
            s = urlsplit(u)
            if s.scheme or s.netloc:
                continue
            n += 1
            path = unquote(s.path)
            t = (
                (site / path.removeprefix(base).lstrip('/') if path.startswith('/') else f.parent / path) if path else f
            ).resolve()
            if t.is_dir():
                t = t / 'index.html'
            if not t.exists() or site not in t.parents:
                bad.append(f'{f.relative_to(site)}: {u}: no such file')
            elif s.fragment and t in pages and unquote(s.fragment) not in pages[t].ids:
                bad.append(f'{f.relative_to(site)}: {u}: no such anchor')
    return len(pages), n, bad


def check(dest, base='/'):
    "Say how many pages and links there are, and end with 1 where one is broken"
    pages, n, bad = check_links(dest, base)
    print(*bad, sep='\n', end='\n' if bad else '')
    print(f'{pages} pages, {n} local links, {len(bad)} broken')
    return not bad


def build():
    "The site in `_docs`, by smalldocs"
    start = time.time()
    if bad := check_sidebar():
        sys.exit('\n'.join(bad))
    stage()
    exe = shutil.which(
        'smalldocs', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    )
    if exe is None:
        sys.exit('smalldocs is not installed: run `make setup`')
    if subprocess.run([exe, 'render', '--quiet', '--strict', str(PROC)]).returncode:
        sys.exit('docs: smalldocs found something; the lines above say what')
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / DOCS.name, DOCS)
    finish(DOCS)
    good = check(DOCS)
    print(f'{time.time() - start:.1f} s; open {DOCS.name}/index.html')
    return good


class Served(SimpleHTTPRequestHandler):
    "A folder as the published site serves it: the 404 page where there is nothing"

    def send_error(self, code, message=None, explain=None):
        page = Path(self.directory) / '404.html'
        if code != 404 or not page.exists():
            return super().send_error(code, message, explain)
        body = page.read_bytes()
        self.send_response(404)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def end_headers(self):
        self.send_header('Cache-Control', 'no-store')
        super().end_headers()

    def log_message(self, *args):
        pass


def served(dest, port=0):
    "A server of the folder, on this machine only, in a thread"
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(Served, directory=str(dest)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server


def changed():
    "When the newest of what the site is made from was written"
    files = [
        p
        for d in ('nbs', 'unsloth_nb', 'tools', 'benchmarks/results')
        for p in (ROOT / d).rglob('*')
        if p.is_file() and not any(o[0] == '.' or o == '__pycache__' for o in p.relative_to(ROOT).parts)
    ]
    return max(p.stat().st_mtime for p in [ROOT / '_quarto.yml', *files])


def preview(port):
    "Build, serve, and build again after each change, until the keyboard interrupts"
    seen = changed()
    build()
    server = served(DOCS, port)
    print(f'http://127.0.0.1:{server.server_port}/ (Ctrl-C stops)', flush=True)
    try:
        while True:
            time.sleep(1)
            if (now := changed()) == seen:
                continue
            seen = now
            subprocess.run([sys.executable, __file__])  # A process of its own sees changed modules
    except KeyboardInterrupt:
        server.shutdown()


def main():
    p = argparse.ArgumentParser(description='Build the site and check it.')
    p.add_argument('--stage', action='store_true', help='only stage the notebooks in _proc')
    p.add_argument('--finish', metavar='DIR', help='finish and check the site that was rendered into DIR')
    p.add_argument('--base', default='/', help='path of the published site, for the 404 page')
    p.add_argument(
        '--preview', action='store_true', help='serve the site on this machine, and build it again after each change'
    )
    p.add_argument('--port', type=int, default=4200, help='port of --preview')
    args = p.parse_args()
    base = f"/{args.base.strip('/')}/".replace('//', '/')
    if args.preview:
        return preview(args.port)
    if args.stage:
        if bad := check_sidebar():
            sys.exit('\n'.join(bad))
        stage()
        return print(f'staged {len(notebooks())} notebooks in {PROC.name}')
    if args.finish:
        finish(args.finish, base)
        sys.exit(not check(args.finish, base))
    sys.exit(not build())


if __name__ == '__main__':
    main()
