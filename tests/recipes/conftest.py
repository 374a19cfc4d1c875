"""An OpenAI-compatible endpoint that needs no model."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Fake(ThreadingHTTPServer):
    """An endpoint that answers with its prompt, after a moment; `asked` counts the prompts, `plan` says what to do before answering."""

    daemon_threads = True

    def handle_error(self, *_):
        """A client that leaves is no news."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.bodies, self.plan, self.seconds, self.most_turns = Counter(), [], {}, 0.0, 99
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def model(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1#echo"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"] if "messages" in body else body.get("prompt")
        self.server.asked[prompt] += 1
        self.server.bodies.append(body)
        status, headers = (self.server.plan.get(prompt) or [(200, {})]).pop(0) if self.server.plan.get(prompt) else (200, {})
        if len(body.get("messages", ())) > self.server.most_turns:
            status = 400
        elif body.get("stream") and status == 200:
            self._stream(prompt)
            return
        time.sleep(self.server.seconds)
        answer = {"message": {"role": "assistant", "content": f"<{prompt}>"}} if "messages" in body else {"text": f"<{prompt}>"}
        choice = {**answer, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        failed = {"error": {"message": f"no: {status}", "code": "context_length_exceeded" * (status == 400)}}
        answer = {"choices": [choice] * body.get("n", 1), "usage": usage} if status == 200 else failed
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, prompt):
        """Reasoning first where the prompt says "think", then the answer in words, the usage, and the end."""
        self.send_response(200)
        self.end_headers()
        pieces = [{"reasoning": "hmm"}] * ("think" in prompt) + [{"content": word + " "} for word in f"you said {prompt}".split()]
        for delta in pieces:
            self.wfile.write(b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n")
            self.wfile.flush()
            time.sleep(self.server.seconds)
        usage = {"prompt_tokens": 3, "completion_tokens": len(pieces)}
        self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.shutdown()
    server.server_close()
