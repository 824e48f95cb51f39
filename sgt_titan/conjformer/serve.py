"""A small HTTP server for a rotated checkpoint: rotated embeddings in, the last rotated output out.

    POST   /sessions/<id>   safetensors {"x": (T, D)}  ->  {"h": (D,)}; continues the session's key-value cache, which
                            must hold as many positions as the header Start says (none: 0). The header Secret names the
                            client's secret (a hash), so that a server of another refuses
    DELETE /sessions/<id>   forgets it

It runs transformers' model as it is and knows nothing of tokens or secrets. One request at a time; for load, use a
serving engine. Bodies are never logged. Legend: T tokens, D width.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel

from sgt_titan.conjformer.generate import Local
from sgt_titan.conjformer.mark import mark_of

MAX_BODY, MAX_SESSIONS = 1 << 28, 64  # bytes; the session unused for longest is forgotten


def make_server(model: PreTrainedModel, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server, not yet started; ``port`` 0: a free one, in ``server_address``."""
    sessions: OrderedDict[str, Local] = OrderedDict()
    lock = threading.Lock()
    mine = mark_of(vars(model.config)).get("secret")
    width, limit = model.config.hidden_size, getattr(model.config, "max_position_embeddings", None)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            name, size = self._session(), self.headers.get("Content-Length", "")
            if not size.isdigit() or int(size) > MAX_BODY:
                self.close_connection = True
                return self._answer(413, b"the body is too large")
            body = self.rfile.read(int(size))
            if name is None:
                return self._answer(404, b"no such path; POST /sessions/<id>")
            try:
                x_TD = load(body)["x"]
            except (SafetensorError, KeyError):
                return self._answer(400, b"the body must be safetensors with one tensor x")
            if x_TD.dim() != 2 or x_TD.shape[1] != width or not len(x_TD) or not x_TD.is_floating_point():
                return self._answer(400, f"x must be floats of shape (T, {width})".encode())
            if mine is not None and self.headers.get("Secret", mine) != mine:
                return self._answer(409, b"this server was made with another secret than the client's")
            with lock:
                session = sessions.get(name) or Local(model)
                have, start = session.cache.get_seq_length(), self.headers.get("Start", "0")
                if start != str(have):  # forgotten: to go on from nothing would be a wrong answer
                    words = f"the server has {have} positions of this session, not {start}; start again"
                    return self._answer(409, words.encode())
                if limit and have + len(x_TD) > limit:
                    return self._answer(400, f"the session is longer than {limit} positions".encode())
                sessions[name] = session
                sessions.move_to_end(name)
                while len(sessions) > MAX_SESSIONS:
                    sessions.popitem(last=False)
                h_D = session.step(x_TD)
            return self._answer(200, save({"h": h_D.to("cpu", x_TD.dtype).contiguous()}))

        def do_DELETE(self) -> None:
            with lock:
                sessions.pop(self._session() or "", None)
            self._answer(200, b"")

        def _session(self) -> str | None:
            match = re.fullmatch(r"/sessions/([0-9a-f]{32})", self.path)
            return match[1] if match else None

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    return ThreadingHTTPServer((host, port), Handler)
