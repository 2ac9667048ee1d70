"""An HTTP server on loopback that serves a folder, with ranges, and makes faults on request."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """`url` of the folder; `served` bytes by path; `fault(path, times asked)` names a fault or none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault: Callable[[str, int], str | None] = lambda path, asked: None
        self.served: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.url = ""


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder until the end of the block."""
    state = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            fault = None
            if body:
                state.asked[self.path] += 1
                fault = state.fault(self.path, state.asked[self.path])
            if fault == "error":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
            piece = data[start:stop]
            if fault == "flip":
                piece = piece[:-1] + bytes([piece[-1] ^ 1])
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(piece)))
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            if body:
                if fault == "cut":
                    piece = piece[: len(piece) // 2]
                    self.close_connection = True
                self.wfile.write(piece)
                state.served[self.path] += len(piece)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
