"""A small server that speaks OpenAI's chat completions, and ways for it to fail."""

import base64
import io
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from data_prep.problem import Prompt

Fault = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.server.seen.append(self.headers)
        if self.path != "/v1/models" or self.server.models is None:
            return self.reply(404, {"detail": "Not Found"})
        self.reply(200, {"object": "list", "data": [
            {"id": name, "object": "model", "created": time.time_ns(), "owned_by": "tests", "root": f"/models/{name}"}
            for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(self.headers)
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.faults.popleft() if server.faults else None
        try:
            if fault is not None:
                return fault(self)
            server.closing.wait(server.hold_s)
            said = server.answer(body)
        finally:
            with server.lock:
                server.now -= 1
        self.reply(200, said if isinstance(said, dict) else completion(said))

    def reply(self, status: int, body: dict | str, **headers: str) -> None:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            status, body = 401, {"error": {"message": f"Incorrect API key: {self.headers.get('Authorization')}"}}
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers in threads; `answer` maps a request's body to the text of its answer, or to a whole response.

    Attributes:
        faults: of the next requests, one each; None: that one is answered.
        bodies, seen: bodies of the requests that asked for an answer, and headers of all.
        most: requests that were being answered at the same time.
    """
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict], str | dict], *, key: str | None = None, hold_s: float = 0.0,
                 models: tuple[str, ...] | None = ("served",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.key, self.hold_s, self.models = answer, key, hold_s, models
        self.faults: deque[Fault | None] = deque()
        self.bodies, self.seen, self.now, self.most = [], [], 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_) -> None:
        pass                    # a client that went away


@contextmanager
def serving(answer: Callable[[dict], str | dict] = lambda body: "A", **options) -> Iterator[Server]:
    server = Server(answer, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str | None, tokens: int = 1, finish: str = "stop") -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"completion_tokens": tokens}}


def prompt_of(body: dict) -> Prompt:
    """The prompt of a request; its pictures from their data URLs."""
    messages, pictures = [], []
    for message in body["messages"]:
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
                pictures[-1].load()
                part = {"type": "image"}
            parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    return Prompt(messages, tuple(pictures), answer="", choices=None, options=None, target="")


def status(code: int, body: dict | str = "", **headers: str) -> Fault:
    return lambda handler: handler.reply(code, body, **headers)


def text(body: str) -> Fault:
    return lambda handler: handler.reply(200, body)


def hang(handler: Handler) -> None:
    handler.server.closing.wait(20)
    handler.close_connection = True


def cut(handler: Handler) -> None:
    """Half of what was announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
