"""The site: built once, read as files, then opened in a real Chromium at the width of a desktop and of a phone.

Pictures of every page go to the folder that UNSLOTH_NB_SCREENSHOTS names, if it names one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
import nbformat
import pytest
from browser import browser  # noqa: F401
from conftest import ROOT, checkout

sys.path.insert(0, str(ROOT / 'tools'))
import docs

sys.path.pop(0)

WIDTHS = dict(desktop=(1280, 900), phone=(390, 844))
KINDS = [
    'index.html',
    'planning/plan.html',
    'jobs/finetune.html',
    'tutorials/what_the_loss_sees.html',
    '404.html',
]  # One of each kind of page


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder that `make docs` writes, from a copy of this checkout"
    tree = checkout(tmp_path_factory.mktemp('site') / 'tree')
    r = subprocess.run([sys.executable, 'tools/docs.py'], cwd=tree, capture_output=True, text=True, timeout=300)
    print(r.stdout)
    if r.returncode or ' 0 broken' not in r.stdout:
        pytest.fail(f'tools/docs.py ended with {r.returncode}\n{r.stdout}{r.stderr}', pytrace=False)
    return tree / '_docs'


@pytest.fixture(scope='module')
def pages(site):
    return sorted({str(p.relative_to(site)) for p in site.rglob('*.html')} - docs.moved_pages().keys())


def test_pages_of_all_notebooks(pages):
    "Every notebook has its page"
    assert set(pages) == {'404.html', *(str(p.relative_to(docs.NBS).with_suffix('.html')) for p in docs.notebooks())}


def test_reference(site):
    "A function has an anchor, its signature, its first words, and its docments as a table"
    page = (site / 'planning/plan.html').read_text()
    assert (
        'id="make_plan"' in page and 'The fastest configuration that fits, among those that the job leaves open' in page
    )
    assert re.search(
        r'<td><code>device</code></td>\s*<td><code>Device \| str \| None</code></td>\s*<td><code>None</code></td>\s*<td>This machine by default',
        page,
    )
    spec = (site / 'core/spec.html').read_text()
    assert re.search(r'<td><code>\*\*overrides</code></td>\s*<td></td>\s*<td></td>\s*<td>Parameters by name', spec)
    assert 'Takes the parameters of <code>GenerateParams</code> too' in spec  # And not those of Job, which has none
    assert 'three questions come back' in (site / 'runs/run.html').read_text()


def test_no_live_parts(site, pages):
    "No page waits for a kernel, a script or a font from elsewhere"
    for p in pages:
        text = (site / p).read_text()
        assert not [
            w
            for w in ('Loading widget', 'vnd.jupyter', 'HBox(children', 'katex', 'require.js')
            if w in re.sub(r'<code.*?</code>', '', text, flags=re.S)
        ], p
        assert not re.search(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:https?:)?//', text), p
    assert not [f.name for f in site.rglob('*.css') if re.search(r'@import[^;]*https?:', f.read_text())]


def test_widgets():
    "A saved widget is shown as its HTML; one that has none is an error, not a repr on a page"

    def nb(**data):
        return nbformat.from_dict(
            dict(
                metadata=dict(widgets={}),
                cells=[
                    dict(
                        cell_type='code',
                        source='w',
                        outputs=[dict(data={docs.WIDGET: {'model_id': '1'}, 'text/plain': 'HBox()', **data})],
                    )
                ],
            )
        )

    n = nb(**{'text/html': '<b>step 3</b>'})
    docs.still(n)
    assert (
        n.cells[0].outputs[0].data == {'text/plain': 'HBox()', 'text/html': '<b>step 3</b>'}
        and 'widgets' not in n.metadata
    )
    with pytest.raises(ValueError, match='without text/html'):
        docs.still(nb())


def test_link_check(tmp_path):
    "The link check sees what is broken"
    (tmp_path / 'a.html').write_text(
        '<h2 id="x">X</h2><a href="#x"></a><a href="b.html#y"></a><a href="c.html"></a><a href="/base/b.html"></a><a href="mailto:a@b"></a>'
    )
    (tmp_path / 'b.html').write_text('<a href="a.html#x"></a>')
    pages, n, bad = docs.check_links(tmp_path, '/base/')
    assert (pages, n) == (2, 5) and len(bad) == 2 and 'no such anchor' in bad[0] and 'no such file' in bad[1]


def test_moved_pages(site, pages):
    "An old address leads to the page's new one, with and without a script"
    moved = docs.moved_pages()
    assert len(moved) >= 77 and not set(moved) & set(pages) and set(moved.values()) <= set(pages)
    for old, new in moved.items():
        text = (site / old).read_text()
        to = os.path.relpath(new, Path(old).parent)
        assert f'content="0; url={to}"' in text and f'<a href="{to}">' in text, old
        assert '<link rel="canonical" href="' in text, old


def test_moved_page_checked(tmp_path):
    "The link check follows redirects"
    (tmp_path / 'old.html').write_text(docs.redirect('old.html', 'a/new.html'))
    assert len(docs.check_links(tmp_path)[2]) >= 2 and 'a/new.html: no such file' in docs.check_links(tmp_path)[2][0]
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'new.html').write_text('<p>Here</p>')
    assert not docs.check_links(tmp_path)[2]


def test_for_agents(site, pages):
    "llms.txt lists every page once with what it promises, each has a Markdown copy with its code, and no link in a copy is broken"
    listed = re.findall(r'^- \[[^\]]+\]\(([^)]+)\)', (site / 'llms.txt').read_text(), re.M)
    assert sorted(listed) == [p[:-5] + '.md' for p in pages if p != '404.html']
    bad = []
    for m in listed:
        text = (site / m).read_text()
        assert text.startswith('# ') and f'href="{Path(m).name}"' in (site / m).with_suffix('.html').read_text(), m
        prose = re.sub(r'^```.*?^```$|`[^`\n]*`', '', text, flags=re.M | re.S)
        links = [urlsplit(u) for u in re.findall(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)', prose)]
        bad += [
            f'{m}: {u.path}'
            for u in links
            if not u.scheme and u.path and not (site / m).parent.joinpath(unquote(u.path)).exists()
        ]
    assert not bad
    plan = (site / 'planning/plan.md').read_text()
    assert '### make_plan' in plan and '| `job` |' in plan and '```python\n' in plan


def test_finished_for_a_folder():
    "The 404 page of a site that is published below a folder begins its links there"
    page = '<link href="site_libs/a.css"><a href="./index.html">x</a><a href="#top">y</a><a href="/spec.html">s</a><a href="https://a.org">z</a>'
    assert (
        docs.finish_page(page, Path('404.html'), '/nb/')
        == '<link href="/nb/site_libs/a.css"><a href="/nb/index.html">x</a><a href="#top">y</a><a href="/nb/spec.html">s</a><a href="https://a.org">z</a>'
    )


# In a browser


class Reader:
    "A tab on the served site; `wrong` collects what a reader would call broken"

    def __init__(self, browser, base, width, dark=False):
        self.base = base
        self.wrong = []
        self.width = width
        self.context = browser.new_context(
            viewport=dict(zip(('width', 'height'), WIDTHS[width])),
            color_scheme='dark' if dark else 'light',
            reduced_motion='reduce',
        )
        self.tab = self.context.new_page()
        self.tab.on('console', lambda m: m.type == 'error' and self._note(m.text))
        self.tab.on('pageerror', lambda e: self._note(str(e)))
        self.tab.on(
            'requestfailed', lambda r: r.failure != 'net::ERR_ABORTED' and self._note(f'{r.url}: {r.failure}')
        )  # Aborted: the tab went on
        self.tab.on('response', lambda r: r.status >= 400 and self._note(f'{r.url}: {r.status}'))
        self.tab.on('request', lambda r: r.url.startswith(('data:', base)) or self._note(f'asks elsewhere: {r.url}'))

    def _note(self, what):
        self.wrong.append(f'{self.width} {urlsplit(self.tab.url).path}: {what}')

    def open(self, page):
        self.tab.goto(self.base + page, wait_until='load')
        return self.tab

    def axe(self, page, include='html', exclude=()):
        "Note what axe-core finds, if it is serious or critical"
        if not self.tab.evaluate('() => !!window.axe'):
            self.tab.evaluate(AXE())
        found = self.tab.evaluate(
            "([include, exclude]) => axe.run({include:[include], exclude}, {resultTypes:['violations'], preload:false}).then(r => r.violations)",
            [include, list(exclude)],
        )
        for v in found:
            if v['impact'] in ('serious', 'critical'):
                self._note(
                    f"{v['id']} ({v['impact']}), {len(v['nodes'])} places, {v['nodes'][0]['html'][:160]} {v['nodes'][0]['failureSummary'][:200]}"
                )


def AXE():
    axe = pytest.importorskip('axe_playwright_python.sync_playwright')
    return Path(axe.__file__).with_name('axe.min.js').read_text()


@pytest.fixture(scope='module')
def reader(site, browser):
    "A function that opens a tab on the site"
    server = docs.served(site)
    open_ = []

    def f(width='desktop', **kw):
        open_.append(Reader(browser, f'http://127.0.0.1:{server.server_port}/', width, **kw))
        return open_[-1]

    yield f
    for r in open_:
        r.context.close()
    server.shutdown()


WIDER = "() => document.documentElement.scrollWidth - innerWidth"
BLANK = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 90))"
STUCK = '''() => [...document.querySelectorAll('main pre, main table')].filter(e => e.getBoundingClientRect().right > innerWidth && !e.closest('[tabindex="0"]')).map(e => e.textContent.slice(0, 60))'''


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize('width', WIDTHS)
def test_every_page(width, reader, pages):
    "No error, no request that fails or leaves, no page wider than its window, no picture missing, and what is wider scrolls by keyboard"
    r = reader(width)
    shots = os.environ.get('UNSLOTH_NB_SCREENSHOTS')
    for p in pages:
        tab = r.open(p)
        if (over := tab.evaluate(WIDER)) > 0:
            r._note(f'{over} px wider than the window')
        for s in tab.evaluate(BLANK):
            r._note(f'picture not loaded: {s}')
        for s in tab.evaluate(STUCK):
            r._note(f'cut off: {s}')
        if shots:
            tab.screenshot(path=Path(shots) / 'site' / f"{width}_{p[:-5].replace('/', '_')}.png", full_page=True)
    assert not r.wrong, '\n'.join(r.wrong)


@pytest.mark.long
@pytest.mark.browser
def test_accessible(reader, site, pages):
    "axe-core finds nothing serious in what pages say that have styles or pictures of their own; all others are drawn as those of the next test"
    r = reader('phone')
    own = [
        p
        for p in pages
        if re.search(r'<(?:div|td|th|span|p|table)[^>]* style=|<svg|<img|class="callout', (site / p).read_text())
    ]
    assert len(own) > 10
    for p in own:
        r.open(p)
        r.axe(p, 'main', ['pre.sourceCode'])
    assert not r.wrong, '\n'.join(r.wrong)


@pytest.mark.browser
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_accessible_whole(reader, dark):
    "Nor in whole pages of each kind, light and dark, with what is around the text"
    r = reader('desktop', dark=dark)
    for p in KINDS:
        tab = r.open(p)
        assert tab.evaluate("() => document.documentElement.classList.contains('quarto-dark')") == dark
        r.axe(p)
    assert not r.wrong, '\n'.join(r.wrong)


@pytest.mark.browser
@pytest.mark.parametrize('width', WIDTHS)
def test_search(width, reader):
    "A function is found by its name, from a page in a folder, and the hit leads to its reference"
    r = reader(width)
    tab = r.open('jobs/finetune.html')
    if width == 'phone':
        tab.locator('.quarto-btn-toggle').first.click()
    tab.locator('.smalldocs-search input:visible').fill('make_plan')
    hit = tab.locator('.search-result', has_text='make_plan').first
    hit.wait_for()
    hit.click()
    tab.wait_for_url('**/planning/plan.html#*')
    assert tab.locator('#make_plan').count() and not r.wrong, r.wrong


@pytest.mark.browser
def test_dark_mode(reader):
    "The switch turns the page dark, and the next page remembers"
    r = reader()
    tab = r.open('index.html')

    def light():
        return sum(
            map(int, re.findall(r'\d+', tab.evaluate('() => getComputedStyle(document.body).backgroundColor'))[:3])
        )

    assert light() > 600
    tab.locator('.quarto-color-scheme-toggle:visible').first.click()
    tab.wait_for_function("() => document.documentElement.classList.contains('quarto-dark')")
    assert light() < 200
    r.open('tutorials/your_own_data.html')
    assert light() < 200 and not r.wrong, r.wrong


@pytest.mark.browser
def test_keyboard(reader):
    "Sections of the sidebar open by keyboard"
    r = reader()
    tab = r.open('index.html')
    head = tab.locator('a.sidebar-item-text[role=button]', has_text='Planning')
    assert head.get_attribute('aria-expanded') == 'false'
    head.focus()
    tab.keyboard.press('Enter')
    tab.get_by_role('link', name='devices', exact=True).first.wait_for()
    assert head.get_attribute('aria-expanded') == 'true' and not r.wrong, r.wrong


@pytest.mark.browser
def test_old_address(reader):
    "A reader who follows an old link to a function arrives at its reference"
    r = reader()
    tab = r.open('planning.html#make_plan')
    tab.wait_for_url('**/planning/plan.html#make_plan')
    assert tab.locator('#make_plan').count() and not r.wrong, r.wrong


@pytest.mark.browser
def test_not_found(reader):
    "A wrong address, however deep, shows a page with its style and with links that work"
    r = reader()
    tab = r.open('old/place/spec.html')
    assert tab.get_by_role('heading', level=1).inner_text() == 'There is no such page'
    assert tab.evaluate('() => document.styleSheets.length') >= 3
    tab.get_by_role('link', name='Every parameter of a job').click()
    tab.wait_for_url('**/core/spec.html')
    assert tab.url == r.base + 'core/spec.html' and all('/old/place/spec.html' in w or ' 404' in w for w in r.wrong), (
        r.wrong
    )
