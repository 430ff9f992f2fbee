"""No secret gets into a file, into MLflow or onto the screen, and no path of this machine into what is shared."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from helpers.tracking import start_run
from support import QUICK, exit_code

from qlora_exp.results import records

pytestmark = pytest.mark.slow

IN_ENVIRONMENT = {
    "DB_PASS": "p4ssw0rd!x",
    "SMTP_PWD": "pwdpwd1",
    "ROOT_PASSWD": "tux-penguin",
    "GITHUB_PAT": "zz9-plural",
    "SLACK_WEBHOOK_URL": "https://chat.example.org/hooks/AbC123",
    "PGPASSWORD": "short7!",
    "AWS_ACCESS_KEY_ID": "AKIDNOSHAPE99",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI=",
    "OTHER_CRED": "credo-12",
    "MY_SECRET": 'it\'s "né\\w" & s3cret',
    "STRIPE_KEY": "87654321",
}
IN_FILE = {"WANDB_API_KEY": "aaabbbccc1", "MLFLOW_TRACKING_PASSWORD": "wonderland99"}
BY_FORM = {
    "hub": "hf_abcdefghijklmnopqrstuvwxyz",
    "openai": "sk-proj-abcdefgh12345678XYZ",
    "github": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "gitlab": "glpat-abcdefghij1234567890",
    "slack": "xoxb-123456789-abcdefghij",
    "jwt": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc-_def",
    "login": f"Basic {base64.b64encode(b'alice:w0nderland').decode()}",
    "uri": "postgresql://me:uri%2Fpass@host/db",
    "query": "https://host/x?access_token=query-pass",
    "password": "tag-by-its-name",
}
HIDDEN = [
    *IN_ENVIRONMENT.values(), *IN_FILE.values(), *BY_FORM.values(), "AbC123", "wJalr", "s3cret", "YWxpY2U6",
    "uri%2Fpass", "uri/pass", "query-pass",
]  # fmt: skip


def leaks(folder: Path, words: list[str]) -> list[str]:
    """List the words in each file below a folder, also as JSON and YAML spell them, or in its name."""
    found = []
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for word in words:
            if any(each.encode() in content for each in (word, json.dumps(word)[1:-1])) or word in str(
                file.relative_to(folder)
            ):
                found.append(f"{word} in {file}")
    return found


@pytest.fixture
def config_folder(tmp_path, tmp_path_factory, monkeypatch, write_jsonl) -> str:
    """Write an experiment that puts all secrets in places that are recorded; its own files are in another folder."""
    for name, value in IN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in IN_FILE:  # so that what `.env` sets is taken away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("own")
    names = [*IN_ENVIRONMENT, *IN_FILE]
    rows = [{"prompt": f"question {n} {' '.join(HIDDEN[:4])}", "completion": f"answer {n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "defaults": [{"override /dataset": "own"}],
        "dataset": {"path": str(folder / "rows.jsonl"), "name": "rows-${oc.env:GITHUB_PAT}", "eval_size": 4},
        "tracking": {
            "run_name": f"run ${{oc.env:MY_SECRET}} {BY_FORM['hub']}",
            "tags": {"all": " ".join(f"${{oc.env:{name}}}" for name in names), **BY_FORM},
        },
    }
    (folder / "experiment").mkdir()
    text = "# @package _global_\n" + yaml.safe_dump(values, sort_keys=False)
    (folder / "experiment" / "planted.yaml").write_text(text)
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in IN_FILE.items()))
    return str(folder)


def test_no_secret_is_written_shown_or_shared(config_folder, tmp_path, monkeypatch, capfd):
    own = ["--config-dir", config_folder, "experiment=planted", "method=lora", *QUICK]
    own += ["evaluation=loss_only", "dataset.max_eval_rows=null"]
    assert exit_code("train", *own, f"+tracking.tags.more={BY_FORM['openai']}", "hydra.run.dir=out") == 0
    assert exit_code("train", "-m", *own, "seed=1,2", "sweep.name=both") == 0
    assert exit_code("compare", "--out", "report") == 0
    record = records.find(None, experiment="qlora_exp", where="tags.more LIKE '%'")[0]
    assert record.tags["mlflow.source.name"].startswith("qlora-exp train --config-dir ")
    assert record.tags["mlflow.source.name"].endswith("'+tracking.tags.more=***' hydra.run.dir=out")
    assert record.name == "run *** ***"
    assert record.tags["password"] == "***"
    assert exit_code("bundle", record.run_id, "--out", "shared") == 0
    assert exit_code("reproduce", record.run_id, "--check-only", f"dataset.path={config_folder}/rows.jsonl") == 0
    monkeypatch.setattr("huggingface_hub.ModelCard.validate", lambda _: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda _, folder_path, **__: shutil.copytree(folder_path, "pushed")
    )
    assert exit_code("register", record.run_id, "--name", "mine", "--card", "card.md", "--push", "me/mine") == 0
    (tmp_path / ".env").unlink()
    assert leaks(tmp_path, HIDDEN) == []
    screen = capfd.readouterr()
    assert [word for word in HIDDEN if word in screen.out + screen.err] == []
    assert exit_code("train", *own, "--cfg", "job", "--resolve") == 0
    screen = capfd.readouterr()
    assert [word for word in HIDDEN if word in screen.out] == [BY_FORM["password"]]  # a value that the user wrote there
    for shared in ("pushed", "shared", "out/model"):
        assert leaks(tmp_path / shared, [str(tmp_path), config_folder, "tracking", "mlruns"]) == []
    assert "rows.jsonl" in Path("card.md").read_text()
    assert config_folder not in Path("card.md").read_text()


RUN = {"info": {"run_id": "a" * 32, "experiment_id": "1", "status": "FAILED", "artifact_uri": "mlflow-artifacts:/1/a"}}
ANSWERS = {
    "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "x", "lifecycle_stage": "active"}},
    "runs/create": {"run": RUN},
    "runs/get": {"run": RUN},
    "runs/update": {"run_info": RUN["info"]},
}


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, str | None, bytes]]]]:
    """Serve a few answers of MLflow, and give the address and what was received: path, login, content."""
    received: list[tuple[str, str | None, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            received.append((self.path, self.headers.get("Authorization"), content))
            answer = next((answer for part, answer in ANSWERS.items() if part in self.path), {})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_PUT = do_PATCH = do_POST  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}", received
        made.shutdown()


def test_server_gets_the_login_but_no_other_secret(server, tmp_path, monkeypatch):
    address, received = server
    for name, value in {**IN_ENVIRONMENT, **IN_FILE, "MLFLOW_TRACKING_TOKEN": "bearer-token-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    planted = [*IN_ENVIRONMENT.values(), "aaabbbccc1", *BY_FORM.values(), "bearer-token-1"]
    planted.remove(BY_FORM["password"])
    text = " ".join(planted)
    hidden = [word for word in [*HIDDEN, "bearer-token-1"] if word not in ("wonderland99", BY_FORM["password"])]
    with (
        pytest.raises(ValueError, match="cannot"),
        start_run(address, tmp_path / "run", f"+tracking.tags.password={BY_FORM['password']}") as tracked,
    ):
        tracked.params({"text": text, "nested": [{text: text}]})
        tracked.json({"text": text, "list": [text]}, "some.json")
        tracked.text(text, "some.txt")
        tracked.dataset(text, "1", text, "training", 1)
        tracked.describe(text)
        raise ValueError(f"cannot {text}")
    assert {login for _, login, _ in received} == {"Bearer bearer-token-1"}
    assert any(b"some.json" in content or "some.json" in path for path, _, content in received)
    for word in [*hidden, BY_FORM["password"]]:
        spellings = [spelling.encode() for spelling in (word, json.dumps(word)[1:-1], quote(word, ""))]
        for path, _, content in received:
            assert not any(spelling in content or spelling in path.encode() for spelling in spellings), (word, path)
    assert leaks(tmp_path, hidden) == []
