"""A server on loopback that answers what huggingface_hub asks when it downloads a file, and the faults it can have."""

import hashlib
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
from typing import Callable, Iterator, List, Optional, Tuple


@dataclass
class Fault:
    """What goes wrong with the requests for one file.

    Args:
        status: HTTP status of the answer, which then holds no file.
        code: The Hub's own word for that error, as `X-Error-Code`.
        body: Makes of the file what is sent in its place, under the headers of the file but with its own length.
        stop: Bytes after which nothing more is sent.
        delay: Seconds of silence: there, before the connection ends; without `stop`, before the answer.
        reset: End the connection by a reset, as a broken line does, rather than in order.
        method: The requests that it hits, 'HEAD', 'GET' or '' for both.
        times: The first requests that it hits; those that follow are answered as they should be.
        file: The name of the file.
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
    """Returns what the Hub tells of a file: its sha256 if it is large and so in LFS, else git's name of it."""
    data = path.read_bytes()
    if path.suffix in ('.safetensors', '.bin'):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def commit(repository: Path) -> str:
    """Returns 40 hex digits that change with every change of the files."""
    files = [(str(path), path.stat().st_mtime_ns) for path in sorted(repository.rglob('*'))]
    return hashlib.sha1(repr(files).encode()).hexdigest()


@contextmanager
def hub(folder: Path, fault: Optional[Fault] = None) -> Iterator[str]:
    """Serves folder/ORG/NAME/FILE as the file of a Hub repository; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.download()

        def do_GET(self) -> None:
            self.download()

        def download(self) -> None:
            match = re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/([\w./-]+)', self.path.split('?')[0])
            path = folder / match[1] / match[2] if match else folder
            if not path.is_file():
                known = match and (folder / match[1]).is_dir()
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
            self.send_header('X-Repo-Commit', commit(folder / match[1]))
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
