"""A gateway and workers that answer like the real ones without a model, for tests of the command line."""

import json
from pathlib import Path

GATEWAY = """
import http.server, json, os, sys, threading

USAGE = {
    "prompt_tokens": 40, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16},
    "tailrace": {"queue_ms": 1.0, "prefill_ms": 20.0, "transfer_ms": 2.0, "transfer_bytes": 4000000,
                 "transport": "stream", "decode_ms": 30.0},
}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        never = os.environ.get("TAILRACE_MAX_MODEL_LEN") == "77"
        if self.path == "/metrics":
            return self.answer(200, 'tailrace_workers{role="decode"} 2.0\\ntailrace_workers{role="prefill"} 2.0\\n')
        status = 503 if self.path == "/ready" and never else 200
        self.answer(status, {"data": [{"id": os.environ["TAILRACE_SERVED_MODEL_NAME"]}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization", "") == "Bearer wrong":
            return self.answer(401, {"error": {"message": "wrong API key"}})
        self.send_response(200)
        self.end_headers()
        said = body["messages"][-1]["content"].upper()
        deltas = [{"choices": [{"delta": {"content": piece}}]} for piece in said.partition(" ")]
        for chunk in [*deltas, {"choices": [], "usage": USAGE}]:
            self.wfile.write(f"data: {json.dumps(chunk)}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    def log_message(self, *args): ...

print("gateway speaks", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("TAILRACE_PORT", 8000))), Handler).serve_forever()
"""

WORKER = """
import os, sys, time
if os.environ.get("TAILRACE_DEVICE") == "cuda":
    sys.exit("no GPU here")
print("worker", os.environ["TAILRACE_WORKER_ID"], "speaks", flush=True)
time.sleep(60)
"""


def write_fake_services(directory: Path) -> Path:
    """Run a command with `directory` as its working directory, and it starts these instead of the real services."""
    for role, code in (("gateway", GATEWAY), ("prefill", WORKER), ("decode", WORKER)):
        room = directory / "services" / role
        room.mkdir(parents=True)
        for package in (room.parent, room):
            (package / "__init__.py").touch()
        (room / "main.py").write_text(code)
    return directory


def write_model_directory(directory: Path) -> Path:
    """Just enough to be taken for a model by those who do not load it."""
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text(json.dumps({}))
    (directory / "model.safetensors").write_bytes(b"")
    return directory
