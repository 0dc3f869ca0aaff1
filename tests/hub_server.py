"A Hub on loopback: the wire protocol that huggingface_hub speaks, with users, rights, private repositories and faults on request."

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def git_sha1(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # Commit to {path: (lfs?, SHA-256 or git SHA-1, bytes)}
    branches: dict = field(default_factory=dict)  # Branch to commit
    titles: dict = field(default_factory=dict)  # Commit to its title
    objects: dict = field(default_factory=dict)  # LFS objects by SHA-256

    def commit(self, branch, files, title):
        sha = hashlib.sha1(
            f'{branch}{title}{len(self.commits)}{sorted((p, f[1]) for p, f in files.items())}'.encode()
        ).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def find(self, rev):
        return rev if rev in self.commits else self.branches.get(rev)


class Refused(Exception):
    "An answer with an error code, as the Hub gives it"

    def __init__(self, status, code='', message=''):
        self.status = status
        self.code = code
        self.message = message


class Hub(ThreadingHTTPServer):
    "`Hub(tokens)`, with tokens as {token: dict(name, role='write'|'read', orgs=())}"

    daemon_threads = True

    def __init__(self, tokens, part_size=None):  # part_size [bytes]: larger LFS objects go up in parts
        super().__init__(('127.0.0.1', 0), Handler)
        self.tokens = tokens
        self.part_size = part_size
        self.repos = {}
        self.parts = {}
        self.log = []
        self.unknown = []
        self.agents = set()
        self.downloads = 0
        self.stored = 0
        self.received = 0  # LFS bytes: in whole objects, and all that came in
        self.faults = {}
        self.stalled = threading.Event()
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, *a):
        pass  # A client that was killed

    def add(self, repo_id, files=None, private=False):
        "A repository that somebody else made"
        repo = self.repos[repo_id] = Repo(private)
        files = {'.gitattributes': b'*.safetensors filter=lfs\n'} | (files or {})
        repo.commit('main', {p: (False, git_sha1(d), d) for p, d in files.items()}, 'initial commit')
        return repo

    def fault(self, name):
        "Is this fault due now? `faults[name]` counts how many times it still happens"
        with self.lock:
            if self.faults.get(name, 0) <= 0:
                return False
            self.faults[name] -= 1
            return True


ROUTES = []  # (method, pattern, function)


def route(method, pattern):
    def f(g):
        ROUTES.append((method, re.compile(pattern), g))
        return g

    return f


REPO = r'(?P<repo>[^/]+/[^/]+)'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *a):
        pass

    def _run(self):
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        self.query, self.left = parse_qs(urlsplit(self.path).query), int(self.headers.get('Content-Length') or 0)
        self.token = (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None
        with hub.lock:
            hub.log.append((self.command, path))
            hub.agents.add(self.headers.get('User-Agent', ''))
        try:
            for method, pattern, f in ROUTES:
                if method == ('GET' if self.command == 'HEAD' else self.command) and (m := pattern.fullmatch(path)):
                    if hub.fault(f'500 {f.__name__}'):
                        raise Refused(500, '', 'Internal Error - We are working hard to fix this as soon as possible!')
                    return f(self, hub, **m.groupdict())
            with hub.lock:
                hub.unknown.append((self.command, path))
            raise Refused(404, '', 'Not Found')
        except Refused as e:
            self.body()
            self.answer(
                dict(error=e.message),
                e.status,
                **{k: v for k, v in {'X-Error-Code': e.code, 'X-Error-Message': e.message}.items() if v},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _run

    def body(self):
        data = self.rfile.read(self.left)
        self.left = 0
        return data

    def json(self):
        return json.loads(self.body() or b'{}')

    def answer(self, obj=None, status=200, data=None, **headers):
        data = json.dumps(obj).encode() if data is None else data
        self.send_response(status)
        for k, v in {'Content-Length': len(data), **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def user(self):
        if self.token is None:
            return None
        if self.token not in self.server.tokens:
            raise Refused(401, '', 'Invalid credentials in Authorization header')
        return self.server.tokens[self.token]

    def may(self, repo_id, write=False):
        "The repository, if this token may read it, or write to it"
        repo = self.server.repos.get(repo_id)
        user = self.user()
        owner = repo_id.split('/')[0]
        member = user is not None and owner in (user['name'], *user.get('orgs', ()))
        if repo is None or (repo.private and not member):
            raise Refused(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if write and not (member and user['role'] == 'write'):
            raise Refused(403, '', f"Forbidden: you don't have write access to {repo_id}")
        return repo

    def at(self, repo_id, rev):
        repo = self.may(repo_id)
        sha = repo.find(rev)
        if sha is None:
            raise Refused(404, 'RevisionNotFound', f'Invalid rev id: {rev}')
        return repo, sha


@route('GET', '/api/whoami-v2')
def whoami(h, hub):
    if (u := h.user()) is None:
        raise Refused(401, '', 'Invalid username or password.')
    h.answer(
        dict(
            type='user',
            name=u['name'],
            orgs=[dict(name=o) for o in u.get('orgs', ())],
            auth=dict(type='access_token', accessToken=dict(displayName='test', role=u['role'])),
        )
    )


@route('POST', '/api/repos/create')
def create(h, hub):
    d = h.json()
    u = h.user()
    if u is None:
        raise Refused(401, '', 'Invalid username or password.')
    owner = d.get('organization') or u['name']
    if owner not in (u['name'], *u.get('orgs', ())) or u['role'] != 'write':
        raise Refused(403, '', f'You don\'t have the rights to create a model under the namespace "{owner}"')
    repo_id = f"{owner}/{d['name']}"
    if repo_id in hub.repos:
        raise Refused(409, '', 'You already created this model repo')
    hub.add(repo_id, private=d.get('visibility') == 'private')
    h.answer(dict(url=f'{hub.url}/{repo_id}', name=repo_id))


@route('POST', '/api/validate-yaml')
def validate_yaml(h, hub):
    h.json()
    h.answer(dict(errors=[], warnings=[]))


@route('GET', rf'/api/models/{REPO}(?:/revision/(?P<rev>[^/]+))?')
def info(h, hub, repo, rev):
    r, sha = h.at(repo, rev or 'main')
    h.answer(
        dict(
            id=repo,
            modelId=repo,
            sha=sha,
            private=r.private,
            tags=[],
            downloads=0,
            siblings=[dict(rfilename=p) for p in r.commits[sha]],
        )
    )


def entry(hub, path, f):
    lfs, oid, data = f
    if hub.faults.get('wrong oid') == path:
        oid = '0' * len(oid)
    return dict(type='file', path=path, size=len(data), oid=git_sha1(oid.encode()) if lfs else oid) | (
        dict(lfs=dict(oid=oid, size=len(data), pointerSize=134)) if lfs else {}
    )


@route('GET', rf'/api/models/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<under>.+))?')
def tree(h, hub, repo, rev, under):
    r, sha = h.at(repo, rev)
    found = [entry(hub, p, f) for p, f in r.commits[sha].items() if not under or p.startswith(f'{under}/')]
    if under and not found:
        raise Refused(404, 'EntryNotFound', f'{under} does not exist on "{rev}"')
    at = int(h.query.get('cursor', ['0'])[0])
    page = 4  # Small pages, so that a client must follow them
    more = (
        {'Link': f'<{hub.url}{urlsplit(h.path).path}?recursive=True&cursor={at + page}>; rel="next"'}
        if at + page < len(found)
        else {}
    )
    h.answer(found[at : at + page], **more)


@route('POST', rf'/api/models/{REPO}/branch/(?P<name>.+)')
def branch(h, hub, repo, name):
    r = h.may(repo, write=True)
    d = h.json()
    if name in r.branches:
        raise Refused(409, '', 'Reference already exists')
    r.branches[name] = r.find(d.get('startingPoint', 'main'))
    h.answer({})


@route('POST', rf'/api/models/{REPO}/preupload/(?P<rev>[^/]+)')
def preupload(h, hub, repo, rev):
    r = h.may(repo, write=True)
    files = h.json()['files']
    have = r.commits[h.at(repo, rev)[1]]

    def lfs(f):
        return f['path'].endswith(('.safetensors', '.gguf')) or f['size'] > 10 * 2**20

    h.answer(
        dict(
            files=[
                dict(
                    path=f['path'],
                    uploadMode='lfs' if lfs(f) else 'regular',
                    shouldIgnore=False,
                    oid=have[f['path']][1] if f['path'] in have else None,
                )
                for f in files
            ]
        )
    )


@route('POST', rf'/{REPO}\.git/info/lfs/objects/batch')
def lfs_batch(h, hub, repo):
    r = h.may(repo, write=True)

    def one(o):
        if o['oid'] in r.objects:
            return o
        to = f"{hub.url}/_lfs/{repo}/{o['oid']}"
        size = hub.part_size
        parts = (
            {f'{i + 1:05}': f'{to}/{i + 1}' for i in range(-(-o['size'] // size))} if size and o['size'] > size else {}
        )
        up = dict(href=f'{to}/complete', header=parts | dict(chunk_size=str(size))) if parts else dict(href=to)
        return o | dict(actions=dict(upload=up, verify=dict(href=f'{to}/verify')))

    h.answer(dict(transfer='basic', objects=[one(o) for o in h.json()['objects']]))


@route('PUT', rf'/_lfs/{REPO}/(?P<oid>\w+)(?:/(?P<part>\d+))?')
def lfs_put(h, hub, repo, oid, part):
    "The storage behind the Hub: it gets no token"
    if h.token:
        raise Refused(400, '', 'a token reached the storage')
    data = bytearray()
    drop = hub.fault('drop')
    while h.left:
        chunk = h.rfile.read(min(h.left, 2**16))
        data += chunk
        h.left -= len(chunk)
        with hub.lock:
            hub.received += len(chunk)
        if drop and len(data) > 2**18:
            return h.drop()
        if (
            len(data) > 2**18 and len(data) + h.left > 2**20 and hub.faults.get('stall')
        ):  # Small objects arrive, a large one stops in the middle
            hub.stalled.set()
            while hub.faults.get('stall'):
                time.sleep(0.02)
            return h.drop()
        if not chunk:
            return h.drop()
    if part:
        hub.parts[(oid, int(part))] = bytes(data)
    else:
        store(hub, repo, oid, bytes(data))
    h.answer({}, ETag=f'"{hashlib.md5(data).hexdigest()}"')


def store(hub, repo, oid, data):
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, '', 'the object is not what it says')
    with hub.lock:
        hub.repos[repo].objects[oid] = data
        hub.stored += len(data)


@route('POST', rf'/_lfs/{REPO}/(?P<oid>\w+)/complete')
def lfs_complete(h, hub, repo, oid):
    got = [hub.parts.pop((oid, p['partNumber'])) for p in h.json()['parts']]
    store(hub, repo, oid, b''.join(got))
    h.answer({})


@route('POST', rf'/_lfs/{REPO}/(?P<oid>\w+)/verify')
def lfs_verify(h, hub, repo, oid):
    if h.json()['size'] != len(h.may(repo, write=True).objects.get(oid, b'')):
        raise Refused(404, '', 'no such object')
    h.answer({})


@route('POST', rf'/api/models/{REPO}/commit/(?P<rev>[^/]+)')
def commit(h, hub, repo, rev):
    r = h.may(repo, write=True)
    lines = [json.loads(l) for l in h.body().splitlines()]
    if rev not in r.branches:
        raise Refused(404, 'RevisionNotFound', f'Invalid rev id: {rev}')
    head = lines[0]['value']
    files = dict(r.commits[r.branches[rev]])
    if head.get('parentCommit', r.branches[rev]) != r.branches[rev]:
        raise Refused(412, '', 'A commit has happened since. Please refresh and try again.')
    for l in lines[1:]:
        v = l['value']
        if l['key'] == 'deletedFile':
            del files[v['path']]
        elif l['key'] == 'lfsFile':
            if v['oid'] not in r.objects:
                raise Refused(400, '', f"LFS pointer pointed to a file that does not exist: {v['path']}")
            files[v['path']] = (True, v['oid'], r.objects[v['oid']])
        else:
            data = base64.b64decode(v['content'])
            files[v['path']] = (False, git_sha1(data), data)
    sha = r.commit(rev, files, head['summary'])
    if hub.fault('lost answer'):
        return h.drop()
    h.answer(dict(success=True, commitOid=sha, commitUrl=f'{hub.url}/{repo}/commit/{sha}', hookOutput=''))


@route('GET', rf'/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)')
def resolve(h, hub, repo, rev, path):
    r, sha = h.at(repo, rev)
    if path not in r.commits[sha]:
        raise Refused(404, 'EntryNotFound', 'Entry not found')
    lfs, oid, data = r.commits[sha][path]
    headers = {'ETag': f'"{oid}"', 'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'} | (
        {'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': len(data)} if lfs else {}
    )
    if h.command == 'GET':
        hub.downloads += 1
    if m := re.fullmatch(r'bytes=(\d+)-(\d*)', h.headers.get('Range') or ''):
        a = int(m[1])
        b = int(m[2] or len(data) - 1)
        return h.answer(data=data[a : b + 1], status=206, **headers, **{'Content-Range': f'bytes {a}-{b}/{len(data)}'})
    h.answer(data=data, **headers)
