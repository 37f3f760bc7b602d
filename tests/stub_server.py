"""A server that speaks as OpenAI's do, and fails as they do."""
import base64
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
from PIL import Image


def subject(body):
    """What a request is about: a row's texts, or the grey level of its image."""
    if "messages" not in body:
        return re.sub(" (=>|ASSISTANT:)$", "", re.split(r'\n|"The image"\. ', body["prompt"])[-1])
    return f"grey {np.asarray(image_of(body)).mean() / 10 - 1:.0f}"


def image_of(body):
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["JPEG"])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        stub, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = SimpleNamespace(path=self.path, body=body, key=self.headers["Authorization"], subject=subject(body), time=time.monotonic())
        with stub.lock:
            number = len(stub.requests)
            stub.requests.append(request)
        reply = stub.behave(request.subject, number)
        if isinstance(reply, bytes):  # all that is sent before the connection is closed
            return self.wfile.write(reply)
        if not isinstance(reply, tuple):
            choice = {"finish_reason": "stop", "text": f"\n {request.subject}\nmore => of it"} | (reply or {})
            if "messages" in body:
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            reply = 200, {"choices": [choice]}
        status, answer, headers = (*reply, {})[:3]
        answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


class Stub(ThreadingHTTPServer):
    """A server whose answers say what was asked. behave(subject, number of the request) returns None for such an answer, a choice
    with another "text" or "finish_reason", a response (status, body, headers), or bytes."""
    request_queue_size = 256

    def __init__(self, behave=lambda text, number: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
