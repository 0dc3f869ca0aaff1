"""Notebooks in a real JupyterLab, in a real Chromium.

A test file says `from browser import browser,lab,notebook # noqa: F401` and `pytestmark = pytest.mark.browser`; then

    def test_it(notebook):
        nb = notebook('import ipywidgets as w', 'w.Button(description="Go")')
        nb.run()                                    # every cell, one after the other; nb.run(1) runs one
        nb.output(1).get_by_role('button', name='Go').click()
        nb.shot('after_go')
        assert not nb.errors and not nb.violations('.jp-OutputArea')

One server and one browser serve a file. They end with it, because Playwright holds the event loop of its thread while it lives."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
SETTINGS = {
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True),
    'notebook-extension/tracker': dict(
        windowingMode='none', showEditorForReadOnlyMarkdown=False
    ),  # Cells out of sight stay in the page
    'docmanager-extension/plugin': dict(autosave=False),
}


def find_browser():
    "Chromium's program, where it and Playwright are installed"
    return importlib.util.find_spec('playwright') and next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
    )


@pytest.fixture(scope='module')
def browser():
    "Chromium without a window; skips where it or Playwright is absent"
    if not (exe := find_browser()):
        pytest.skip('needs Chromium and Playwright')
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield b
        b.close()


class Lab:
    "A JupyterLab server on loopback, in a folder of its own, with settings of its own"

    token = 't0k'

    def __init__(self, home, kernel='python3', **env):
        self.home = home
        self.folder = home / 'work'
        self.kernel = kernel
        self.folder.mkdir()
        for k, v in SETTINGS.items():
            self.set(k, **v)
        dirs = {f'JUPYTER_{k}_DIR': str(home / k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
        env = (
            os.environ
            | dirs
            | dict(
                IPYTHONDIR=str(home / 'ipython'),
                PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
                UNSLOTH_NB_RUNS_DIR=str(self.folder / 'runs'),
            )
            | env
        )
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        opts = dict(
            ServerApp=dict(
                ip='127.0.0.1', port=port, open_browser=False, root_dir=self.folder, terminals_enabled=False
            ),
            IdentityProvider=dict(token=self.token),
            LabApp=dict(
                user_settings_dir=home / 'settings',
                workspaces_dir=home / 'workspaces',
                news_url='',
                check_for_updates_class='jupyterlab.NeverCheckForUpdate',
                extension_manager='readonly',
            ),
        )
        with open(home / 'lab.log', 'w') as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    '-m',
                    'jupyterlab',
                    '--allow-root',
                    *(f'--{c}.{k}={v}' for c, d in opts.items() for k, v in d.items()),
                ],
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
            )
        self.url = self._wait()

    def _wait(self):
        "The address that the server has written down, as soon as it has"
        for _ in range(300):
            if self.process.poll() is not None:
                break
            for f in (self.home / 'runtime').glob('jpserver-*.json'):
                try:
                    return json.loads(f.read_text())['url']
                except ValueError:
                    pass
            time.sleep(0.1)
        self.stop()
        pytest.fail(f"JupyterLab did not start\n{(self.home / 'lab.log').read_text()}", pytrace=False)

    def set(self, plugin, **values):
        "Settings of a part of JupyterLab, for pages that are opened from now on"
        f = self.home / 'settings' / '@jupyterlab' / f'{plugin}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(values))

    def write(self, name, cells):
        "A notebook of these cells in the server's folder; a string is a code cell"
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) if isinstance(c, str) else c for c in cells],
            metadata=dict(kernelspec=dict(name=self.kernel, display_name=self.kernel, language='python')),
        )
        nbformat.write(nb, self.folder / name)

    def call(self, path, method='GET'):
        "Ask the server's API"
        with urlopen(
            Request(f'{self.url}api/{path}', method=method, headers=dict(Authorization=f'token {self.token}')),
            timeout=30,
        ) as r:
            return json.loads(r.read() or 'null')

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):
    "The server of this file's tests; `lab.folder` is where its kernels run"
    l = Lab(tmp_path_factory.mktemp('lab'))
    yield l
    l.stop()


class Notebook:
    "A notebook open in JupyterLab; `page` is Playwright's page"

    def __init__(self, context, lab, name, shots, app):
        self.lab = lab
        self.name = name
        self.shots = shots
        self.errors = []
        self.failed = []
        self.outside = []
        self.dialogs = []
        self.page = context.new_page()
        self.page.on('console', lambda m: m.type == 'error' and self.errors.append(m.text))
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on(
            'requestfailed', lambda r: r.failure != 'net::ERR_ABORTED' and self.failed.append(f'{r.url}: {r.failure}')
        )
        self.page.on(
            'response',
            lambda r: (
                r.status >= 400 and '/api/workspaces/' not in r.url and self.failed.append(f'{r.url}: {r.status}')
            ),
        )
        self.page.on(
            'request',
            lambda r: r.url.startswith('http') and not r.url.startswith(lab.url) and self.outside.append(r.url),
        )
        self.page.on(
            'dialog', lambda d: (self.dialogs.append(d.message), d.dismiss())
        )  # An alert() that a payload has called
        self.page.goto(f'{lab.url}{app}/{name}?reset&token={lab.token}')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=60000)
        self._connected()
        self.wait()

    @property
    def cells(self):
        return self.page.locator('.jp-Notebook .jp-Cell')

    def _connected(self):
        "The page says idle before it has a kernel, and what is run then is lost: ask the server"
        for _ in range(300):
            k = [s['kernel'] for s in self.lab.call('sessions') if s['path'] == self.name]
            if k and k[0]['connections'] and k[0]['execution_state'] == 'idle':
                return self.page.wait_for_timeout(300)
            self.page.wait_for_timeout(100)
        pytest.fail(f'{self.name} got no kernel within 30 s')

    def wait(self, seconds=60):
        "Until the kernel is idle"
        self.page.wait_for_function(
            "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'",
            timeout=1000 * seconds,
        )

    def run(self, *which, seconds=60):
        "Run cells by Shift+Enter, as a person does, each when the one before is done; none named: all"
        last = self.cells.count() - 1
        for i in which or range(last + 1):
            cell = self.cells.nth(i)
            prompt = cell.locator('.jp-InputArea-prompt').first
            before = prompt.inner_text()
            prompt.click()
            self.page.keyboard.press(
                'Control+Enter' if i == last else 'Shift+Enter'
            )  # The latter would add a cell at the end
            if 'jp-CodeCell' not in cell.get_attribute('class'):
                continue
            done = f"p = document.querySelectorAll('.jp-Notebook .jp-Cell')[{i}].querySelector('.jp-InputArea-prompt').innerText"
            try:
                self.page.wait_for_function(
                    f'old => {{ const {done}; return /\\d/.test(p) && p !== old }}', arg=before, timeout=1000 * seconds
                )
            except Exception as e:
                pytest.fail(
                    f"cell {i} was not done: {e}\n{cell.inner_text()[-2000:]}\nconsole: {self.errors}; picture: {self.shot(f'stuck_{self.name[:-6]}')}",
                    pytrace=False,
                )
        self.wait(seconds)

    def output(self, i):
        "What cell `i` shows"
        return self.cells.nth(i).locator('.jp-OutputArea').first

    def shot(self, name, of=None):
        "A picture of the page, or of a locator, as `name`.png in the folder of screenshots"
        self.shots.mkdir(parents=True, exist_ok=True)
        (of or self.page).screenshot(path=self.shots / f'{name}.png', animations='disabled')
        return self.shots / f'{name}.png'

    def saved(self):
        "Save, and read the file back when the server has answered, since it writes the file in place"
        with self.page.expect_request(lambda r: r.method == 'PUT' and '/api/contents/' in r.url) as asked:
            self.page.locator('[data-jp-item-name=save] jp-button').first.click()
        assert asked.value.response().ok
        return nbformat.read(self.lab.folder / self.name, as_version=4)

    def focused(self):
        "The element that has the keyboard: its tag and its name for a screen reader"
        return self.page.evaluate(
            "(e => [e.tagName.toLowerCase(), e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.title || ''])(document.activeElement)"
        )

    def violations(self, selector, impact=('serious', 'critical')):
        "What axe-core finds in a part of the page, as `rule: number of places, the first one`"
        from axe_playwright_python.sync_playwright import Axe

        res = Axe().run(self.page, context=selector).response['violations']
        return [
            f"{v['id']} ({v['impact']}): {len(v['nodes'])} places, {v['nodes'][0]['html'][:200]}"
            for v in res
            if v['impact'] in impact
        ]


@pytest.fixture
def notebook(browser, lab, request, tmp_path):
    "A function that opens a notebook of these cells; `theme='dark'` for the dark theme; `app='notebooks'` for Jupyter Notebook in place of JupyterLab with one document; what is open is closed after the test"
    shots = Path(os.environ.get('UNSLOTH_NB_SCREENSHOTS') or tmp_path / 'screenshots')
    opened = []

    def f(*cells, theme='light', viewport=(1300, 900), app='doc/tree'):
        lab.set('apputils-extension/themes', theme=f'JupyterLab {theme.title()}')
        name = f"{re.sub(r'[^a-z0-9]+', '_', request.node.name.lower())}_{len(opened)}.ipynb"
        lab.write(name, cells)
        opened.append(
            browser.new_context(
                viewport=dict(width=viewport[0], height=viewport[1]), permissions=['clipboard-read', 'clipboard-write']
            )
        )
        return Notebook(opened[-1], lab, name, shots, app)

    yield f
    for c in opened:
        c.close()
    for x in lab.call('sessions'):
        lab.call(f"sessions/{x['id']}", 'DELETE')  # Kernels hold memory after their pages are closed
