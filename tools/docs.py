"""Build the site from the notebooks into `_docs`, without Quarto, and check every link in it.

The notebooks are staged into `_proc` by nbdev's own processors, with one difference: nothing is executed. Pages show
the outputs that the notebooks hold, and the reference of each function comes from the module that is imported.
smalldocs renders `_proc`. `--stage` stops before that, for `quarto render _proc`, which builds the published site."""

import ast, os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, DOCS = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs'
sys.path.insert(0, str(ROOT)) # This checkout's modules, not an installed copy

import yaml
from nbdev import processors as P
from nbdev.process import NBProcessor
from nbdev.showdoc import show_doc
from fastcore.nbio import read_nb, write_nb

def notebooks():
    "The notebooks that become pages"
    return [p for p in sorted(NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(NBS).parts)]

def listed(o):
    "Every page that the sidebar names"
    if isinstance(o, str): return [o]
    return sum(map(listed, o), []) if isinstance(o, list) else listed(o.get('contents', []))

def check_sidebar():
    "The sidebar and the folder must name the same notebooks"
    named = set(listed(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']))
    found = {str(p.relative_to(NBS)) for p in notebooks()}
    bad = [f'_quarto.yml lists {n}, which does not exist' for n in sorted(named-found)]
    return bad + [f'_quarto.yml does not list {n}' for n in sorted(found-named)]

def shown(cell):
    "The name that a `show_doc(name)` cell is about, or None"
    if cell.cell_type != 'code' or not cell.source.startswith('show_doc('): return
    call = ast.parse(cell.source).body[0].value
    return ast.unparse(call.args[0])

def reference(path):
    "The names that the page of notebook `path` documents"
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=[P.add_show_docs]).process()
    return [n for n in map(shown, nb.cells) if n]

class Links:
    "Names in backticks become links to their reference: on the same page, else on the first page that has it"
    def __init__(self, pages): self.pages = pages
    def find(self, name, page):
        for p in [page, *self.pages]:
            if name in self.pages.get(p, ()): return os.path.relpath(p.with_suffix('.html'), page.parent)+'#'+name.lower()
    def link(self, text, page):
        def f(m): return f'[{m[0]}]({to})' if (to := self.find(m[1], page)) else m[0]
        out, fenced = [], False
        for l in text.splitlines():
            if l.lstrip().startswith('```'): fenced = not fenced
            skip = fenced or l.startswith(('    ', '#'))
            out.append(l if skip else re.sub(r'(?<![\[`\\])`([A-Za-z_][\w.]*)(?:\(\))?`(?![\]`])', f, l))
        return '\n'.join(out)

def fill_show_docs(nb, mod):
    "Fill in the output of each `show_doc` cell from module `mod`, in the order of the source"
    cells, i = nb.cells, 0
    while i < len(cells): # nbdev inserts the references of one cell last first
        j = i
        while j < len(cells) and getattr(cells[j], 'has_sd', False): j += 1
        cells[i:j] = cells[i:j][::-1]
        i = j+1
    for c in cells:
        code = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|'))
        if c.cell_type != 'code' or not code.startswith('show_doc('): continue
        md = eval(code, {**vars(mod), 'show_doc':show_doc})._repr_markdown_()
        c.outputs = [dict(output_type='display_data', metadata={}, data={'text/markdown':md})]

def stage_nb(path, links):
    nb, page = read_nb(path), path.relative_to(NBS)
    name = P._default_exp(nb)
    class show_docs(P.Processor):
        def begin(self): fill_show_docs(self.nb, import_module(f'unsloth_nb.{name}')) if name else None
    def add_links(cell):
        if cell.cell_type == 'markdown': cell.source = links.link(cell.source, page)
    swap = {'exec_show_docs':show_docs, 'add_links':add_links}
    NBProcessor(nb=nb, procs=[swap.get(p.__name__, p) for p in P.FilterDefaults().procs()], rm_directives='quarto').process()
    for c in nb.cells[:1]: c.source = re.sub(r'^output-file: .*\n', '', c.source, flags=re.M) # The file's own name, already
    (PROC/page).parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, PROC/page)

def stage():
    "Notebooks and everything they show, ready to be rendered, in `_proc`"
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    shutil.copy(ROOT/'_quarto.yml', PROC/'_quarto.yml')
    for p in NBS.rglob('*'):
        if p.suffix in ('.png', '.svg', '.jpg', '.css'):
            (PROC/p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, PROC/p.relative_to(NBS))
    links = Links({p.relative_to(NBS):reference(p) for p in notebooks()})
    for p in notebooks():
        try: stage_nb(p, links)
        except Exception as e: raise SystemExit(f'{p.relative_to(ROOT)} could not be staged: {type(e).__name__}: {e}') from e

class Page(HTMLParser):
    "Ids and links of one page"
    def __init__(self, html):
        super().__init__()
        self.ids, self.refs = set(), []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.ids |= {d[k] for k in ('id', 'name', 'data-anchor-id') if d.get(k)}
        u = d.get('href') if tag in ('a', 'link') else d.get('src') if tag in ('img', 'script', 'source') else None
        if u: self.refs.append(u)

def check_links(site):
    "Number of pages and of local links, and what is broken"
    site = Path(site).resolve()
    pages, bad, n = {f:Page(f.read_text()) for f in sorted(site.rglob('*.html'))}, [], 0
    for f,p in pages.items():
        for u in p.refs:
            s = urlsplit(u)
            if s.scheme or s.netloc: continue
            n += 1
            path = unquote(s.path)
            t = ((site/path.lstrip('/') if path.startswith('/') else f.parent/path) if path else f).resolve()
            if t.is_dir(): t = t/'index.html'
            if not t.exists() or site not in t.parents: bad.append(f'{f.relative_to(site)}: {u}: no such file')
            elif s.fragment and t in pages and unquote(s.fragment) not in pages[t].ids: bad.append(f'{f.relative_to(site)}: {u}: no such anchor')
    return len(pages), n, bad

def main(args):
    start = time.time()
    if (bad := check_sidebar()): sys.exit('\n'.join(bad))
    stage()
    if '--stage' in args: return print(f'staged {len(notebooks())} notebooks in {PROC.name}')
    exe = shutil.which('smalldocs', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
    if exe is None: sys.exit('smalldocs is not installed: run `make setup`')
    if subprocess.run([exe, 'render', '--quiet', '--strict', str(PROC)]).returncode: sys.exit('docs: smalldocs found something; the lines above say what')
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC/DOCS.name, DOCS)
    pages, n, bad = check_links(DOCS)
    print(*bad, sep='\n', end='\n' if bad else '')
    print(f'{pages} pages, {n} local links, {len(bad)} broken; {time.time()-start:.1f} s; open {DOCS.name}/index.html')
    sys.exit(bool(bad))

if __name__ == '__main__': main(sys.argv[1:])
