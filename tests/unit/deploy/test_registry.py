"""A registered model is found by its alias, with a card that says what it is."""

import json
import shutil
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from helpers.hub import hub_on_loopback
from mlflow.exceptions import MlflowException
from support import exit_code

from qlora_exp.deploy import chat, load, registry
from qlora_exp.tracking import logged_models, run_key
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import ConfigError, ModelError, TrackingError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_id(mlflow_uri, tmp_path_factory, _imported):
    from support import QUICK

    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    words = [
        "method=lora",
        f"tracking.uri={mlflow_uri}",
        "tracking.experiment_name=registry",
        "training.learning_rate=1e-2",
    ]
    return run(compose([*QUICK, *words]), tmp_path_factory.mktemp("run")).run_id


def test_registered_alias_loads_the_model(run_id, mlflow_uri):
    made, card = registry.register(mlflow_uri, run_id, "mine", "champion")
    assert (made.name, made.version, made.uri) == ("mine", "1", "models:/mine@champion")
    found, _ = load.load("models:/mine@champion", mlflow_uri, "cpu")
    apart, _ = load.load(run_id, mlflow_uri, "cpu")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, apart(ids).logits)
    version = client(mlflow_uri).get_model_version("mine", "1")
    assert version.run_id == run_id
    assert version.tags["method"] == "lora"
    assert version.description == card[:5000]
    paths = [one.path for one in client(mlflow_uri).list_artifacts(run_id)]
    assert "README.md" in paths
    model_id = logged_models.models_of(client(mlflow_uri), run_id)[-1].model_id
    assert "README.md" in [one.path for one in client(mlflow_uri).list_logged_model_artifacts(model_id)]
    assert (load.find("models:/mine@champion", mlflow_uri, "cpu").folder / "README.md").read_text() == card


def test_registering_again_keeps_the_version_of_the_same_run(run_id, mlflow_uri, run_quick):
    first, _ = registry.register(mlflow_uri, run_id, "again", "champion")
    second, _ = registry.register(mlflow_uri, run_id, "again")
    assert first.version == second.version == "1"
    assert second.uri == "models:/again/1"
    other = run_quick("method=lora", "evaluation=loss_only").run_id
    third, _ = registry.register(mlflow_uri, other, "again", "champion")
    assert third.version == "2"
    assert client(mlflow_uri).get_model_version_by_alias("again", "champion").run_id == other


def test_registering_leaves_mlflows_global_store_unchanged(run_id, mlflow_uri):
    before = mlflow.get_tracking_uri()
    registry.register(mlflow_uri, run_id, "global")
    assert mlflow.get_tracking_uri() == before


@pytest.mark.parametrize(("name", "alias"), [("a/b:c", None), ("", None), ("fine", "not an alias!")])
def test_invalid_model_name_or_alias_is_rejected(name, alias, run_id, mlflow_uri):
    with pytest.raises(ConfigError, match="register"):
        registry.register(mlflow_uri, run_id, name, alias)


def test_run_without_a_model_is_rejected(run_quick, mlflow_uri):
    result = run_quick("method=lora", "evaluation=loss_only", "tracking.log_adapter=false")
    with pytest.raises(ModelError, match="logged no model"):
        registry.register(mlflow_uri, result.run_id, "none")
    with pytest.raises(TrackingError, match="no runs"):
        registry.register(mlflow_uri, "no such run", "none")


def test_user_who_may_only_read_the_run_registers_nothing(run_id, mlflow_uri, monkeypatch):
    def refuse(*_: object) -> None:
        raise MlflowException("API request to endpoint /x failed with error code 403 != 200")

    monkeypatch.setattr("mlflow.MlflowClient.set_tag", refuse)
    with pytest.raises(TrackingError, match="403.*; ask who manages"):
        registry.register(mlflow_uri, run_id, "never")
    assert "never" not in [model.name for model in client(mlflow_uri).search_registered_models()]


def test_push_without_a_network_is_rejected(run_id, mlflow_uri):
    made, card = registry.register(mlflow_uri, run_id, "pushed")
    with pytest.raises(ConfigError, match="--push org/name"):
        registry.push(mlflow_uri, made.uri, "org/name", card)


def test_push_uploads_no_path_of_this_machine_and_what_it_uploads_loads(
    run_quick, tiny_model, write_jsonl, mlflow_uri, tmp_path, monkeypatch, capsys
):
    shutil.copytree(tiny_model("llama"), "bases/mine")
    Path("data").mkdir()
    write_jsonl([{"prompt": f"Say {number}.", "completion": "Done."} for number in range(20)], "data/own.jsonl")
    own = ["dataset=own", "dataset.path=data/own.jsonl", "model=hub", "model.model_name_or_path=bases/mine"]
    result = run_quick("method=lora", *own, "evaluation=loss_only", "training.learning_rate=1e-2")
    with hub_on_loopback(monkeypatch) as hub:
        assert exit_code("register", result.run_id, "--name", "own", "--uri", mlflow_uri, "--push", "me/mine") == 0
        sent = len(hub.requests)
        with pytest.raises(ConfigError, match="--push me/mine: .*bases/mine.* is not valid"):
            registry.push(mlflow_uri, "models:/own/1", "me/mine", "---\nbase_model: ../bases/mine\n---\n")
        assert len(hub.requests) == sent + 1  # no repository was made
    assert "hub      http://127.0.0.1:" in capsys.readouterr().out
    assert "private" in json.loads(hub.requests[1]).get("visibility", "")
    assert {"README.md", "MLmodel", "adapter_model.safetensors", "tokenizer.json", "qlora_exp.yaml"} <= hub.files.keys()
    places = ["bases/", "data/own", str(tmp_path), str(Path(mlflow_uri.removeprefix("sqlite:///")).parent)]
    leaks = [(name, place) for name, text in hub.files.items() for place in places if place.encode() in text]
    assert leaks == []
    assert "as `./mine` into the folder" in hub.files["README.md"].decode()
    for name, content in hub.files.items():
        Path("elsewhere/pushed").mkdir(parents=True, exist_ok=True)
        Path("elsewhere/pushed", name).write_bytes(content)
    expected, _ = load.load(result.run_id, mlflow_uri, "cpu")
    monkeypatch.chdir("elsewhere")
    run_key.model_version.cache_clear()
    with pytest.raises(ModelError, match="the base model of the adapter is not at .*/elsewhere/mine"):
        load.find("pushed", device="cpu")
    Path("mine").symlink_to("../bases/mine")
    run_key.model_version.cache_clear()
    loaded, _ = load.load("pushed", device="cpu")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_mlflow_loads_what_was_logged_and_registered(run_id, mlflow_uri):
    saved = load.find(run_id, mlflow_uri, "cpu")
    for file in ("MLmodel", "input_example.json", "serving_input_example.json"):
        (saved.folder / file).unlink()  # as older versions logged it
    made, _ = registry.register(mlflow_uri, run_id, "served")
    dialogue = {"messages": [{"role": "user", "content": "How long?"}]}
    asked = chat.Request(dialogue["messages"])
    expected = chat.load_chat_model({"default": run_id}, mlflow_uri, "cpu").answer(asked, chat.Sampling(8))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_uri)
    try:
        model = mlflow.pyfunc.load_model(made.uri)
        payload = mlflow.models.convert_input_example_to_serving_input(model.input_example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MLflow's own advice, which its page shows
            (served,) = mlflow.models.validate_serving_input(made.uri, payload)
    finally:
        mlflow.set_tracking_uri(before)
    assert model.predict(dialogue, params={"max_new_tokens": 8}) == [expected]
    assert model.predict(pd.DataFrame([dialogue]), params={"max_new_tokens": 8, "temperature": 0}) == [expected]
    assert model.predict("How long?", params={"max_new_tokens": 8}) == [expected]
    assert model.predict(model.input_example) == [served]
    assert "messages" in model.metadata.signature.inputs.input_names()
    assert model.metadata.run_id == run_id


def test_register_command_says_how_to_load_the_model(run_id, mlflow_uri, tmp_path, capsys):
    words = ("--name", "told", "--alias", "best", "--uri", mlflow_uri, "--card", "card.md")
    assert exit_code("register", run_id, *words[:-1], "none/card.md") == 1
    assert exit_code("register", run_id, *words) == 0
    assert "qlora_exp.load('models:/told@best')" in capsys.readouterr().out
    assert "random:llama" in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize("table", ["runs", "logged_models"])
def test_record_chooses_no_folder_to_write_into(table, run_id, mlflow_uri, tmp_path):
    file = sqlite_file(mlflow_uri)
    shutil.copytree(file.parent, tmp_path / "shared")
    uri = f"sqlite:///{tmp_path / 'shared' / file.name}"
    model_id = logged_models.models_of(client(uri), run_id)[-1].model_id  # its artifacts are those of the copy now
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "README.md").write_text("mine")
    column = {"runs": "artifact_uri", "logged_models": "artifact_location"}[table]
    with closing(sqlite3.connect(tmp_path / "shared" / file.name)) as store, store:
        store.execute(f"UPDATE {table} SET {column} = ?", (victim.as_uri(),))
    if table == "logged_models":
        model = tmp_path / "shared" / "artifacts" / "models" / model_id / "artifacts"
        shutil.copytree(model, victim, dirs_exist_ok=True)
        (victim / "README.md").write_text("mine")
    with pytest.raises(TrackingError, match="nothing is written there"):
        registry.register(uri, run_id, "theirs")
    assert (victim / "README.md").read_text() == "mine"
    assert not client(uri).search_model_versions("name = 'theirs'")
    with closing(sqlite3.connect(tmp_path / "shared" / file.name)) as store, store:
        store.execute(f"UPDATE {table} SET {column} = 'http://127.0.0.1:9/api/2.0/mlflow-artifacts/artifacts/1/x'")
    with pytest.raises((TrackingError, ModelError), match="neither read nor written"):
        registry.register(uri, run_id, "theirs")


def test_links_in_a_model_are_not_pushed(run_id, mlflow_uri, tmp_path, monkeypatch):
    folder = shutil.copytree(load.find(run_id, mlflow_uri, "cpu").folder, tmp_path / "model")
    (folder / "notes.txt").symlink_to(tmp_path / "private")
    (tmp_path / "private").write_text("key")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("created"))
    with pytest.raises(ConfigError, match=r"--push a/b: .*notes.txt"):
        registry.push(mlflow_uri, str(folder), "a/b", "card")
