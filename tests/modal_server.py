"""Modal's side of the wire, on loopback: what the real client asks is recorded and answered, jobs run in processes of their own on a folder that stands for the Volume.

The folder has two states, as a Volume has: `live`, which the running job sees, and `committed`, which everybody else sees. A container that is killed takes with it what it has not committed."""

import asyncio
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_pb2 as pb
from modal_proto.api_grpc import ModalClientBase

TOKEN_ID = 'ak-loopback'
TOKEN_SECRET = 'as-loopback-secret'
RUN = """
import json,os,pickle,sys
from unsloth_nb.cloud import remote
name,params,out = pickle.load(open(sys.argv[1], 'rb'))
root = os.environ[remote.KEPT]
params = {k:v.replace('/vol/', root+'/') if isinstance(v, str) and v.startswith('/vol/') else v for k,v in params.items()} # The mount
try: res = ('ok', getattr(remote, name)(**params))
except Exception as e: res = ('error', e)
pickle.dump(res, open(out, 'wb'))
"""


class Volume:
    "A folder with a live and a committed state; who reads what is committed holds the lock"

    def __init__(self, home):
        self.home = home
        self.live = home / 'live'
        self.committed = home / 'committed'
        self.blocks = home / 'blocks'
        self.commits = 0
        self.lock = threading.Lock()
        for d in (self.live, self.committed, self.blocks):
            d.mkdir()

    @staticmethod
    def _copy(a, b):
        shutil.rmtree(b)
        for _ in range(20):  # What is deleted meanwhile is looked for again
            try:
                shutil.copytree(a, b, dirs_exist_ok=True)
                return
            except shutil.Error:
                shutil.rmtree(b, ignore_errors=True)
        raise RuntimeError('no commit')

    def commit(self):
        with self.lock:
            self._copy(self.live, self.committed)
            self.commits += 1

    def lose(self):
        with self.lock:
            self._copy(self.committed, self.live)

    def put(self, path, data):
        with self.lock:
            for state in (self.live, self.committed):
                f = state / path.lstrip('/')
                f.parent.mkdir(parents=True, exist_ok=True)
                f.write_bytes(data)

    def cut(self, path, size):
        "A committed file as it is now, in blocks that no commit takes away: its bytes, and where the blocks are"
        with self.lock:
            f = self.committed / path.lstrip('/')
            if not f.is_file():
                raise GRPCError(Status.NOT_FOUND, f'no {path}')
            to = Path(tempfile.mkdtemp(dir=self.blocks))
            n = f.stat().st_size
            with f.open('rb') as h:
                for i in range(-(-n // size)):
                    (to / str(i)).write_bytes(h.read(size))
            return n, [f'{to.name}/{i}' for i in range(-(-n // size))]


class Call(threading.Thread):
    "One function call: a process, started again as its retries allow"

    def __init__(self, server, name, kwargs, retries):
        super().__init__(daemon=True)
        self.server = server
        self.name_ = name
        self.kwargs = kwargs
        self.retries = retries
        self.attempts = 0
        self.process = None
        self.result = None
        self.log = ''
        self.being_lost = threading.Lock()

    def run(self):
        while self.result is None:
            with self.being_lost:  # Another machine starts when the Volume is again as the lost one had committed it
                self.attempts += 1
            got = self._once()
            if got and got[0] == 'ok' or self.attempts > self.retries:
                self.result = got or ('error', RuntimeError('the container was lost'))

    def _once(self):
        with tempfile.TemporaryDirectory() as tmp:
            job = Path(tmp) / 'job'
            out = Path(tmp) / 'out'
            job.write_bytes(pickle.dumps((self.name_, self.kwargs, str(out))))
            env = {
                **os.environ,
                'MODAL_SERVER_URL': self.server.url,
                'MODAL_TOKEN_ID': TOKEN_ID,
                'MODAL_TOKEN_SECRET': TOKEN_SECRET,
                'UNSLOTH_NB_VOLUME': str(self.server.volume.live),
            }
            env.pop(
                'UNSLOTH_NB_TESTS_FORK', None
            )  # A machine that is lost takes its kernels with it: no forks of others
            self.process = subprocess.Popen(
                [sys.executable, '-c', RUN, str(job)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for line in self.process.stdout:
                self.log += line
            self.process.wait()
            return pickle.loads(out.read_bytes()) if out.exists() else None

    def kill(self):
        "The machine is lost, and all that was not committed"
        import psutil

        with self.being_lost:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
            for p in family:
                p.send_signal(signal.SIGKILL)
            psutil.wait_procs(family[:-1], 10)
            self.server.volume.lose()


class Blocks(BaseHTTPRequestHandler):
    "Blocks of files of the committed Volume, over HTTP"

    def do_GET(self):
        data = (self.server.volume.blocks / unquote(self.path).lstrip('/')).read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class ModalServer:
    "Answers by the name of the call; `requests` keeps (name, request, metadata)"

    def __init__(self, home, secrets=()):
        self.volume = Volume(home)
        self.secrets = set(secrets)
        self.requests = []
        self.files = {}
        self.apps = {}
        self.functions = {}
        self.made = {}
        self.bound = {}
        self.calls = {}
        self.images = {}
        self.mounts = {}
        self.blocks = ThreadingHTTPServer(('127.0.0.1', 0), Blocks)
        self.blocks.volume = self.volume

    def asked(self, name):
        return [r for n, r, _ in self.requests if n == name]

    # Client, environment, app
    def ClientHello(self, r):
        return pb.ClientHelloResponse(image_builder_version='2025.06')

    def EnvironmentGetOrCreate(self, r):
        return pb.EnvironmentGetOrCreateResponse(
            environment_id='en-1',
            metadata=pb.EnvironmentMetadata(
                name='main', settings=pb.EnvironmentSettings(image_builder_version='2025.06')
            ),
        )

    def AuthTokenGet(self, r):
        return pb.AuthTokenGetResponse(token='')

    def AppGetByDeploymentName(self, r):
        return pb.AppGetByDeploymentNameResponse(app_id=self.apps.get(r.name, ''))

    def AppCreate(self, r):
        return pb.AppCreateResponse(app_id=f'ap-{len(self.apps) + 1}')

    def AppHeartbeat(self, r):
        return Empty()

    def AppClientDisconnect(self, r):
        return Empty()

    def AppPublish(self, r):
        self.apps[r.name] = r.app_id
        return pb.AppPublishResponse(url='http://127.0.0.1/app', deployed_at=time.time())

    # Image, mounts
    def ImageGetOrCreate(self, r):
        key = f'im-{sha256(r.image.SerializeToString(deterministic=True)).hexdigest()[:8]}'
        self.images[key] = r.image
        return pb.ImageGetOrCreateResponse(
            image_id=key,
            result=pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=pb.ImageMetadata(image_builder_version='2025.06'),
        )

    def MountBatchedCheckExistence(self, r):
        return pb.MountBatchedCheckExistenceResponse(
            missing_sha256_hex_hashes=[h for h in r.sha256_hex_hashes if h not in self.files]
        )

    def MountPutFile(self, r):
        if r.WhichOneof('data_oneof') == 'data':
            self.files[r.sha256_hex] = r.data
        return pb.MountPutFileResponse(exists=r.sha256_hex in self.files)

    def MountGetOrCreate(self, r):
        key = f'mo-{len(self.mounts) + 1}'
        self.mounts[key] = r
        return pb.MountGetOrCreateResponse(
            mount_id=key, handle_metadata=pb.MountHandleMetadata(content_checksum_sha256_hex=key)
        )

    # Functions and calls
    def _metadata(self, key):
        name, web = self.functions[key]
        both = [pb.DATA_FORMAT_PICKLE, pb.DATA_FORMAT_CBOR]
        return pb.FunctionHandleMetadata(
            function_name=name,
            function_type=pb.Function.FUNCTION_TYPE_FUNCTION,
            definition_id=f'de-{key}',
            app_id='ap-1',
            web_url=web,
            supported_input_formats=both,
            supported_output_formats=both,
        )

    def FunctionPrecreate(self, r):
        key = f'fu-{len(self.functions) + 1}'
        self.functions[key] = (r.function_name, 'http://127.0.0.1/web' if r.webhook_config.type else '')
        return pb.FunctionPrecreateResponse(function_id=key, handle_metadata=self._metadata(key))

    def FunctionCreate(self, r):
        self.made[r.existing_function_id] = data = pb.FunctionData(
            function_name=r.function.function_name,
            ranked_functions=[pb.FunctionData.RankedFunction(rank=0, function=r.function)],
        )
        return pb.FunctionCreateResponse(
            function_id=r.existing_function_id,
            function=r.function,
            function_data=data,
            handle_metadata=self._metadata(r.existing_function_id),
        )

    def FunctionGet(self, r):
        if r.app_name not in self.apps:
            raise GRPCError(Status.NOT_FOUND, f'no app {r.app_name}')
        published = next(p for p in reversed(self.asked('AppPublish')) if p.name == r.app_name)
        key = published.function_ids[r.object_tag]
        return pb.FunctionGetResponse(function_id=key, handle_metadata=self._metadata(key), function=self.made[key])

    def FunctionBindParams(self, r):
        key = f'fu-9{len(self.bound)}'
        self.bound[key], self.functions[key] = r.function_options, self.functions[r.function_id]
        return pb.FunctionBindParamsResponse(bound_function_id=key, handle_metadata=self._metadata(key))

    def FunctionMap(self, r):
        from modal._serialization import deserialize_data_format

        item = r.pipelined_inputs[0].input
        key = f'fc-{len(self.calls) + 1}'
        args, kwargs = deserialize_data_format(item.args, item.data_format, None)
        assert not args
        self.calls[key] = call = Call(
            self, self.functions[r.function_id][0], kwargs, self.bound[r.function_id].retry_policy.retries
        )
        call.start()
        return pb.FunctionMapResponse(
            function_call_id=key, pipelined_inputs=[pb.FunctionPutInputsResponseItem(idx=0, input_id='in-1')]
        )

    def FunctionCallFromId(self, r):
        return pb.FunctionCallFromIdResponse(
            function_call_id=r.function_call_id,
            num_inputs=1,
            metadata=pb.FunctionCallHandleMetadata(app_id='ap-1', function_id='fu-1'),
        )

    def FunctionGetOutputs(self, r):
        call = self.calls[r.function_call_id]
        end = time.time() + r.timeout
        while call.result is None and time.time() < end:
            time.sleep(0.1)
        if call.result is None:
            return pb.FunctionGetOutputsResponse(num_unfinished_inputs=1)
        how, value = call.result
        done = pb.GenericResult.GENERIC_STATUS_SUCCESS if how == 'ok' else pb.GenericResult.GENERIC_STATUS_FAILURE
        result = pb.GenericResult(status=done, data=pickle.dumps(value), exception='' if how == 'ok' else repr(value))
        return pb.FunctionGetOutputsResponse(
            outputs=[
                pb.FunctionGetOutputsItem(idx=0, input_id='in-1', result=result, data_format=pb.DATA_FORMAT_PICKLE)
            ]
        )

    def FunctionCallCancel(self, r):
        call = self.calls[r.function_call_id]
        call.retries = 0
        call.kill()
        return Empty()

    def AppFetchLogs(self, r):
        log = self.calls[r.function_call_id].log
        return pb.AppFetchLogsResponse(
            batches=[
                pb.TaskLogsBatch(
                    entry_id='1-0',
                    items=[
                        pb.TaskLogs(data=l, timestamp=time.time(), file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
                        for l in log.splitlines(keepends=True)
                    ],
                )
            ]
        )

    # Volume, secrets
    def VolumeGetOrCreate(self, r):
        return pb.VolumeGetOrCreateResponse(
            volume_id='vo-1',
            version=pb.VOLUME_FS_VERSION_V1,
            metadata=pb.VolumeMetadata(version=pb.VOLUME_FS_VERSION_V1, name=r.deployment_name),
        )

    def VolumeCommit(self, r):
        self.volume.commit()
        return pb.VolumeCommitResponse(skip_reload=True)

    def VolumeReload(self, r):
        return Empty()

    def VolumePutFiles(self, r):
        for f in r.files:
            self.volume.put(f.filename, self.files[f.sha256_hex])
        return Empty()

    def VolumeListFiles(self, r):
        top = self.volume.committed / r.path.lstrip('/')

        def kind(p):
            return pb.FileEntry.DIRECTORY if p.is_dir() else pb.FileEntry.FILE

        with self.volume.lock:
            if not top.exists():
                raise GRPCError(Status.NOT_FOUND, f'no {r.path}')
            found = [top] if top.is_file() else [*(top.rglob('*') if r.recursive else top.iterdir())]
            return [
                pb.VolumeListFilesResponse(
                    entries=[
                        pb.FileEntry(
                            path=str(p.relative_to(self.volume.committed)), type=kind(p), size=p.stat().st_size
                        )
                        for p in found
                    ]
                )
            ]

    def VolumeGetFile2(self, r):
        n, paths = self.volume.cut(r.path, 8 * 2**20)
        return pb.VolumeGetFile2Response(
            get_urls=[f'http://127.0.0.1:{self.blocks.server_port}/{p}' for p in paths], size=n, start=0, len=n
        )

    def SecretGetOrCreate(self, r):
        if r.deployment_name and r.deployment_name not in self.secrets:
            raise GRPCError(Status.NOT_FOUND, f'no secret {r.deployment_name}')
        return pb.SecretGetOrCreateResponse(secret_id=f'st-{r.deployment_name or "inline"}')

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def start():
            self.server = Server([_servicer(self)])
            await self.server.start('127.0.0.1', 0)
            self.url = f'http://127.0.0.1:{self.server._server.sockets[0].getsockname()[1]}'
            ready.set()

        def run():
            self.loop.run_until_complete(start())
            self.loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        threading.Thread(target=self.blocks.serve_forever, daemon=True).start()
        ready.wait(10)
        return self

    def __exit__(self, *_):
        for c in self.calls.values():
            if c.is_alive():
                c.retries = 0
                c.kill()
        self.blocks.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)


def _servicer(server):
    "A servicer whose every call goes to the method of the same name"

    def handler(name):
        async def handle(self, stream):
            request = await stream.recv_message()
            server.requests.append((name, request, dict(stream.metadata)))
            if not hasattr(server, name):
                raise GRPCError(Status.UNIMPLEMENTED, name)
            answer = await asyncio.to_thread(getattr(server, name), request)
            for a in answer if isinstance(answer, list) else [answer]:
                await stream.send_message(a)

        return handle

    return type('Servicer', (ModalClientBase,), {n: handler(n) for n in ModalClientBase.__abstractmethods__})()
