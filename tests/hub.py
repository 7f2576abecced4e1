"""A loopback server for the downloads and uploads of huggingface_hub, which can simulate faults."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple


@dataclass
class Fault:
    """A fault in the answers to the requests for one file.

    Args:
        status: HTTP status of the answer. If it is not 200, the file is not sent.
        code: The Hub's code of the error, sent as `X-Error-Code`.
        body: Returns the bytes to send instead of the file. Only the length header is adapted to them.
        stop: Number of bytes after which the server stops sending.
        delay: Seconds that the server waits: after `stop` bytes, or before the answer if `stop` is None.
        reset: Reset the connection instead of closing it.
        method: Requests that the fault affects: 'HEAD', 'GET' or '' for both.
        times: Number of requests that the fault affects; later requests are answered correctly.
        file: Name of the file.
    """

    status: int = 200
    code: str = ''
    body: Callable[[bytes], bytes] = bytes
    stop: Optional[int] = None
    delay: float = 0
    reset: bool = False
    method: str = 'GET'
    times: int = 1_000_000
    file: str = 'model.safetensors'
    seen: List[Tuple[str, str]] = field(default_factory=list)  # method and Range of each request for the file

    def hits(self, method: str, path: str, requested: str) -> bool:
        if not path.endswith(f'/{self.file}'):
            return False
        self.seen.append((method, requested))
        return self.method in (method, '') and sum(self.method in (m, '') for m, _ in self.seen) <= self.times


HEALTHY = Fault()


@lru_cache
def etag(path: Path, mtime: int) -> str:
    """Returns the Hub's ETag of a file: its sha256 if it is large and so in LFS, else its git hash."""
    data = path.read_bytes()
    if path.suffix in ('.safetensors', '.bin', '.pth'):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def commit(repository: Path) -> str:
    """Returns 40 hex digits that change whenever the files change."""
    files = [(str(path), path.stat().st_mtime_ns) for path in sorted(repository.rglob('*'))]
    return hashlib.sha1(repr(files).encode()).hexdigest()


@contextmanager
def hub(folder: Path, fault: Optional[Fault] = None) -> Iterator[str]:
    """Serves folder/ORG/NAME/FILE as the file of a Hub repository; yields the address for HF_ENDPOINT.

    Uploads are written to the same folder, those to a branch to folder/ORG/NAME@BRANCH. A file `.private` marks a
    private repository. The token 'hf_write' has all rights, 'hf_read' has none.
    """
    large: Dict[str, bytes] = {}  # uploads to LFS by sha256

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.download()

        def do_GET(self) -> None:
            match = re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)', self.path)
            if match:
                private = (folder / match[1] / '.private').exists()
                self.reply({'id': match[1], 'private': private, 'sha': '0' * 40, 'siblings': []})
            elif self.path.startswith('/api/'):
                self.reply({})
            else:
                self.download()

        def do_PUT(self) -> None:
            content = self.content()
            oid = self.path.rpartition('/')[2]
            assert hashlib.sha256(content).hexdigest() == oid
            large[oid] = content
            self.reply({})

        def do_POST(self) -> None:
            lines = [json.loads(line) for line in self.content().splitlines()]
            if self.headers['Authorization'] != 'Bearer hf_write':
                read = self.headers['Authorization'] == 'Bearer hf_read'
                self.reply({'error': 'You have no right to do that.' if read else 'Who are you?'}, 403 if read else 401)
            elif self.path == '/api/repos/create':
                repository = folder / lines[0]['organization'] / lines[0]['name']
                url = {'url': f'{address}/{lines[0]["organization"]}/{lines[0]["name"]}'}
                if repository.exists():
                    self.reply(url | {'error': 'It exists.'}, 409)
                    return
                repository.mkdir(parents=True)
                if lines[0].get('visibility') == 'private':
                    (repository / '.private').touch()
                self.reply(url)
            elif self.path == '/api/validate-yaml':
                self.reply({})
            elif self.path.endswith('/objects/batch'):
                actions = [{'upload': {'href': f'{address}/lfs/{o["oid"]}'}} for o in lines[0]['objects']]
                self.reply({'objects': [o | {'actions': a} for o, a in zip(lines[0]['objects'], actions, strict=True)]})
            else:
                name, action, revision = re.fullmatch(r'/api/models/(.+/.+)/(\w+)/(\w+)', self.path).groups()
                repository = folder / (name if revision == 'main' else f'{name}@{revision}')
                if action == 'branch':
                    repository.mkdir(exist_ok=True)
                    self.reply({})
                elif action == 'preupload':
                    modes = {
                        f['path']: 'lfs' if f['path'].endswith('.safetensors') else 'regular' for f in lines[0]['files']
                    }
                    files = [{'path': p, 'uploadMode': mode, 'shouldIgnore': False} for p, mode in modes.items()]
                    self.reply({'files': files})
                else:
                    for line in lines:
                        if line['key'] == 'file':
                            content = base64.b64decode(line['value']['content'])
                            (repository / line['value']['path']).write_bytes(content)
                        elif line['key'] == 'lfsFile':
                            (repository / line['value']['path']).write_bytes(large[line['value']['oid']])
                    self.reply({'commitUrl': f'{address}/{name}/commit/{"0" * 40}', 'commitOid': '0' * 40})

        def content(self) -> bytes:
            return self.rfile.read(int(self.headers['Content-Length']))

        def reply(self, answer: dict, status: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def download(self) -> None:
            match = re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w./-]+)', self.path.split('?')[0])
            branch = match and folder / f'{match[1]}@{match[2]}'
            repository = branch if branch and branch.exists() else folder / match[1] if match else folder
            path = repository / match[3] if match else folder
            if not path.is_file():
                known = match and repository.is_dir()
                self.refuse(404, 'EntryNotFound' if known else 'RepoNotFound')
                return
            asked = self.headers.get('Range', '')
            now = fault if fault and fault.hits(self.command, str(path), asked) else HEALTHY
            if now.status != 200:
                self.refuse(now.status, now.code)
                return
            if now.stop is None:
                time.sleep(now.delay)
            data = path.read_bytes()
            if self.command == 'GET':
                data = now.body(data)
            start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header('ETag', f'"{etag(path, path.stat().st_mtime_ns)}"')
            self.send_header('X-Repo-Commit', commit(repository))
            self.send_header('Content-Length', str(len(data) - start))
            if asked:
                self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(data[start : now.stop])
            if now.stop is not None:
                time.sleep(now.delay)
            if now.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                self.connection.close()

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header('X-Error-Code', code)
            self.send_header('Content-Length', '0')
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # s between checks for the end
    thread.start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
