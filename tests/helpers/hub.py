"""A stand-in for the Hugging Face hub on this machine: it checks model cards, and keeps what is uploaded."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id


@dataclass
class Hub:
    """What the stand-in was sent."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Contents of the files of the last commit."""
    requests: list[str] = field(default_factory=list)
    """Bodies of all requests."""


def _errors(card: str) -> list[str]:
    """Check a card's metadata as the hub does, as far as its documentation says how."""
    block = REGEX_YAML_BLOCK.search(card)
    data = yaml.safe_load(block[2]) if block else {}
    errors = [f'"{key}" is not allowed to be empty' for key, value in data.items() if value in ("", None, [])]
    ids = [*filter(None, [data.get("base_model")]), *data.get("datasets", [])]
    for name in ids:
        try:
            validate_repo_id(name)
        except ValueError:
            errors.append(f'"{name}" is not valid. Use an id from https://hf.co')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" must be a string')
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or not {"name", "type"} <= result["dataset"].keys():
                errors.append('"model-index[0].results[0]" lacks a field')
    return errors


@contextmanager
def hub_on_loopback(patched: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start the stand-in, and let the hub's client use it inside the `with` block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            hub.requests.append(body)
            status, answer = 200, {}
            if self.path == "/api/validate-yaml":
                if errors := _errors(json.loads(body)["content"]):
                    status, answer = 400, {"errors": [{"message": error} for error in errors]}
            elif self.path == "/api/repos/create":
                answer = {"url": f"{constants.ENDPOINT}/me/mine"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {
                    "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                }
            elif "/commit/" in self.path:
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                hub.files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
                answer = {"commitUrl": f"{constants.ENDPOINT}/me/mine/commit/{'0' * 40}", "commitOid": "0" * 40}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patched.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    patched.setattr(constants, "HF_HUB_OFFLINE", False)
    patched.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
