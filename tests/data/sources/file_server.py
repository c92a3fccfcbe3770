"""A server for the tests of remote shards."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Files of a folder, over HTTP with ranges; and what can go wrong with them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.ranges, self.etags, self.password = True, True, ""
        self.failing, self.latency = (lambda number: False), 0.0
        self.refusing = lambda path: False
        self.naming = lambda path: path.partition("?")[0]
        self.hanging = threading.Event()
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Quiet: clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # else the header goes alone, and the body waits 40 ms for its acknowledgement

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        time.sleep(server.latency)
        path = server.folder / unquote(server.naming(self.path).lstrip("/"))
        if failed := server.failing(len(server.asked)):
            return self.answer(500 if failed is True else failed, b"")
        if server.refusing(self.path):
            return self.answer(403, b"")
        if server.password and self.headers.get("Authorization") != server.password:
            return self.answer(401, b"")
        if not path.is_file():
            return self.answer(404, b"")
        if server.hanging.is_set() and path.suffix == ".tar":
            time.sleep(30)
        size, wanted = path.stat().st_size, self.headers.get("Range")
        tag = f'"{path.stat().st_mtime_ns}"' if server.etags is True else server.etags
        headers = {"ETag": tag} if tag else {}
        if wanted is None or not server.ranges:
            return self.answer(200, path.read_bytes(), headers)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        with path.open("rb") as file:
            file.seek(first)
            piece = file.read(last + 1 - first)
        headers["Content-Range"] = f"bytes {first}-{first + len(piece) - 1}/{size}"
        return self.answer(206, piece, headers)

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
