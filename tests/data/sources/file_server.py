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
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}"
        self.ranges, self.etags, self.password = True, True, ""
        self.failing = lambda number: False  # True or a status, by the request's number
        self.refusing = lambda path: False
        self.naming = lambda path: path.partition("?")[0]
        self.hanging = threading.Event()
        self.asked = []

    def handle_error(self, request, client_address):
        """Quiet: clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # else the header goes alone, and the body waits 40 ms for its acknowledgement

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        path = server.folder / unquote(server.naming(self.path).lstrip("/"))
        if failed := server.failing(len(server.asked)):
            return self.answer(500 if failed is True else failed)
        if server.refusing(self.path):
            return self.answer(403)
        if server.password and self.headers.get("Authorization") != server.password:
            return self.answer(401)
        if not path.is_file():
            return self.answer(404)
        while server.hanging.is_set() and path.suffix == ".tar":
            time.sleep(0.01)
        data = path.read_bytes()
        tag = f'"{path.stat().st_mtime_ns}"' if server.etags is True else server.etags
        headers = {"ETag": tag} if tag else {}
        if wanted is None or not server.ranges:
            return self.answer(200, data, headers)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        piece = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(piece) - 1}/{len(data)}"
        return self.answer(206, piece, headers)

    def answer(self, status, data=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
