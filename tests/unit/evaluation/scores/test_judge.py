"""The judge against a real socket that behaves well, and one that does not."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores.judge import judge


@pytest.fixture
def endpoint():
    """``endpoint(reply)`` -> base URL; ``reply(question, n)`` gives (status, text) of the n-th request."""
    servers = []

    def start(reply):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, self.headers.get("Authorization"), body))
                status, text = reply(body["messages"][0]["content"], len(seen))
                self.send_response(status)
                self.end_headers()
                content = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else "{}"
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write((content if text != "garbage" else "<html>").encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()


TEXTS = ["Carmen of Lisbon", "Boris"], ["Carmem of ???", "?"], [["Carmen", "Lisbon"], ["Boris"]]


def test_yes_and_no(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, seen = endpoint(lambda question, n: (200, "Yes." if "VALUE: Carmen" in question else "no"))
    found = judge(url, "some-model", *TEXTS)
    assert found["judge_micro"]["value"] == pytest.approx(1 / 3) and found["judge_macro"]["value"] == pytest.approx(
        0.25
    )
    assert len(seen) == 3
    assert {(path, key, body["model"]) for path, key, body in seen} == {
        ("/v1/chat/completions", "Bearer secret", "some-model")
    }


def test_it_tries_again(endpoint):
    url, seen = endpoint(lambda question, n: (500, "") if n == 1 else (200, "no"))
    assert judge(url, "m", ["Boris"], ["?"], [["Boris"]], pause=0.01)["judge_micro"]["value"] == 0.0
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("status", "text", "message", "requests"),
    [
        (404, "", "404", 1), (401, "", "401", 1), (503, "", "503", 4),
        (200, "perhaps Boris", "yes or no", 4), (200, "garbage", "OpenAI", 4),
    ],
)  # fmt: skip
def test_what_it_cannot_use_is_one_line_without_private_text(endpoint, status, text, message, requests):
    url, seen = endpoint(lambda question, n: (status, text))
    with pytest.raises(UserError, match=message) as error:
        judge(url, "m", ["Boris"], ["?"], [["Boris"]], pause=0.01)
    assert "Boris" not in str(error.value) and len(seen) == requests


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "does not speak HTTP"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", r"answers 302$"),
    ],
)
def test_what_is_no_answer(answer, message):
    """A connection cut in the middle, something that does not speak HTTP, and a host that sends the key elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):  # closing over unread bytes would reset the connection
                        pass
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match=message):
            judge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", ["Boris"], ["?"], [["Boris"]], pause=0.01)


def test_nobody_there():
    with pytest.raises(UserError, match="cannot be reached"):
        judge("http://127.0.0.1:9/v1", "m", ["Boris"], ["?"], [["Boris"]], pause=0.01)


def test_a_silent_endpoint_times_out(endpoint):
    url, _ = endpoint(lambda question, n: time.sleep(0.5) or (503, ""))
    with pytest.raises(UserError, match="cannot be reached"):
        judge(url, "m", ["Boris"], ["?"], [["Boris"]], timeout=0.1, pause=0.01)
