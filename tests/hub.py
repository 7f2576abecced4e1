"""A server on loopback that answers what huggingface_hub asks when it downloads a file."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serves folder/ORG/NAME/FILE as the file of a Hub repository; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            match = re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/([\w./-]+)', self.path.split('?')[0])
            path = folder / match[1] / match[2] if match else folder
            if not path.is_file():
                self.send_response(404)
                known = match and (folder / match[1]).is_dir()
                self.send_header('X-Error-Code', 'EntryNotFound' if known else 'RepoNotFound')
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header('X-Repo-Commit', '0' * 40)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

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
