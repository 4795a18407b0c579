"""A web server on this computer that answers range requests for the files of a folder, and fails if asked."""

import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class RangeServer:
    """Serves a folder in a context; `url` is its address.

    Args:
        errors, resets, delays: Shares of the requests that get the status 500, a connection that is closed within the
            answer, or their answer after `seconds`.
        ignores_ranges: Answer each request with the whole file.
    """

    def __init__(
        self,
        folder: Path,
        errors: float = 0.0,
        resets: float = 0.0,
        delays: float = 0.0,
        seconds: float = 0.3,
        ignores_ranges: bool = False,
    ) -> None:
        self.folder, self.counts = folder, Counter[str]()
        self.errors, self.resets, self.delays, self.seconds = errors, resets, delays, seconds
        self.ignores_ranges = ignores_ranges
        self._random = random.Random(0)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "RangeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fate(self) -> str:
        draw = self._random.random()
        for name in ("errors", "resets", "delays"):
            if (draw := draw - getattr(self, name)) < 0:
                return name
        return "served"


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    owner: RangeServer

    def handle_error(self, *args: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner = self.server.owner
        fate = owner.fate()
        owner.counts[fate] += 1
        path = owner.folder / unquote(self.path).lstrip("/")
        if fate == "errors":
            return self._answer(500, b"")
        if fate == "delays":
            time.sleep(owner.seconds)
        if not path.is_file():
            return self._answer(404, b"")
        size = path.stat().st_size
        if self.command == "HEAD":
            return self._answer(200, b"", size)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        if owner.ignores_ranges:
            begin, end = 0, size
        with path.open("rb") as stream:
            stream.seek(begin)
            content = stream.read(end - begin)
        owner.counts["bytes"] += len(content)
        self._answer(206 if found else 200, content, len(content), cut=fate == "resets")

    def _answer(self, status: int, content: bytes, size: int = 0, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut
