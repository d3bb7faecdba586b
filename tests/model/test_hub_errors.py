"""What the hub refuses is explained in one line with the remedy: a server here answers as the hub does, and the libraries raise."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT

from intern.model.hub_errors import explain

# By repository: status, X-Error-Code, and the content of config.json.
ANSWERS = {
    "owner/gated": (403, "GatedRepo", None),
    "owner/gated-logged-out": (401, "GatedRepo", None),
    "owner/nowhere": (401, "RepoNotFound", None),
    "owner/no-revision": (404, "RevisionNotFound", None),
    "owner/no-file": (404, "EntryNotFound", None),
    "owner/coded": (200, None, {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}),
    "owner/broken": (200, None, []),
}
CODE = """
import json, sys, time
from omegaconf import OmegaConf
from intern.errors import UserError
from intern.model.base import Base
time.sleep = lambda seconds: None  # between its attempts the library waits for 23 s
found = {}
for name in sys.argv[1:]:
    try:
        Base(OmegaConf.create({"pretrained_model_name_or_path": name, "revision": "main"}))
    except UserError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    def answer(self):
        name = "/".join(self.path.split("/")[1:3])
        status, code, content = ANSWERS.get(name, (404, "RepoNotFound", None))
        body = json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("ETag", '"0"'), ("X-Repo-Commit", "0" * 40)):
            if value is not None:
                self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *arguments):
        pass


def asked(endpoint, cache, *names):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
    line = [sys.executable, "-c", CODE, *names]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return asked(f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("hub"), *ANSWERS)
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/gated", "gated: accept its licence on its page, then `hf auth login`"),
        ("owner/gated-logged-out", "gated: accept its licence"),
        ("owner/nowhere", "not on the hub, or private: check the name"),
        ("owner/no-revision", "a file is missing there (revision main): check the name and model.revision"),
        ("owner/no-file", "has no config.json that names a model_type"),
        ("owner/coded", "needs code of its own, which is never run here"),
    ],
)
def test_what_the_hub_refuses_is_explained(name, reason, said):
    assert said[name].startswith(f"model.pretrained_model_name_or_path={name}: {reason}"), said[name]


def test_each_refusal_is_one_line(said):
    assert said.keys() == ANSWERS.keys() and not any("\n" in line for line in said.values())


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path):
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    closed.server_close()  # nothing listens at its port
    line = asked(f"http://127.0.0.1:{closed.server_port}", tmp_path, "owner/model")["owner/model"]
    assert "not in the local cache, and the hub cannot be reached: check the network, or give a folder" in line


def test_an_unknown_error_is_shown_in_one_line():
    assert explain(OSError("first\n  second"), None) == "first second"


def test_a_ring_of_causes_ends():
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert explain(first, None) == "first"
