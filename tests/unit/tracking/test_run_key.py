import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.tracking import run_key


@pytest.fixture(autouse=True)
def _forget():
    """Files change within a test; within a process of the tool they do not."""
    run_key.model_version.cache_clear()
    run_key.data_version.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "method.r=4",
        "quantization=fp4",
        "training.max_steps=7",
        "model=tiny_llama",
        "training.resume_from_checkpoint=.",
        "training.sft_config.data_seed=7",
    ],
)
def test_setting_that_changes_results_changes_the_key(change: str):
    assert run_key.run_key(compose([change])) != run_key.run_key(compose())


@pytest.mark.parametrize(
    "change", ["tracking.experiment_name=other", "+tracking.tags.a=b", "sweep.n_jobs=2", "sweep.name=x"]
)
def test_tracking_and_sweep_settings_do_not_change_the_key(change: str):
    assert run_key.run_key(compose([change])) == run_key.run_key(compose())


def test_changed_rows_change_the_key(tmp_path, write_jsonl):
    words = ["dataset=own", f"dataset.path={tmp_path / 'rows.jsonl'}"]
    write_jsonl([{"prompt": "a", "completion": "b"}])
    first = run_key.digests(compose(words))
    run_key.data_version.cache_clear()
    write_jsonl([{"prompt": "a", "completion": "c"}])
    second = run_key.digests(compose(words))
    assert {part for part in first if first[part] != second[part]} == {"data"}


def test_changed_rows_of_a_source_change_the_key_and_the_order_of_sources_does_not(write_jsonl):
    def key(*names: str, changed: str = "") -> str:
        run_key.data_version.cache_clear()
        paths = [write_jsonl([{"prompt": name, "completion": changed}], f"{name}.jsonl") for name in names]
        sources = [f"dataset.sources.{name}.path={path}" for name, path in zip(names, paths, strict=True)]
        return run_key.run_key(compose(["dataset=own", *sources]))

    assert key("a", "b") == key("b", "a") != key("a", "b", changed="x")


def test_changed_row_of_a_large_file_changes_the_key(tmp_path):
    rows = tmp_path / "rows.jsonl"
    words = ["dataset=own", f"dataset.path={rows}"]
    rows.write_bytes(bytes(80 * 1024**2))
    first = run_key.digests(compose(words))
    run_key.data_version.cache_clear()
    with rows.open("rb+") as file:
        file.seek(3 * 1024**2)
        file.write(b"1")
    assert run_key.digests(compose(words))["data"] != first["data"]


@pytest.mark.parametrize("size", [1000, 70 * 1024**2])
def test_changed_weights_change_the_key(size: int, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    words = [f"model.model_name_or_path={folder}"]
    weights.write_bytes(bytes(size))
    first = run_key.digests(compose(words))
    run_key.model_version.cache_clear()
    with weights.open("rb+") as file:
        file.seek(size - 1)
        file.write(b"1")
    second = run_key.digests(compose(words))
    assert {part for part in first if first[part] != second[part]} == {"model"}


def test_hub_model_is_identified_by_its_commit(monkeypatch):
    monkeypatch.setattr("qlora_exp.environment.hub.commit", lambda repo, revision, kind: f"{kind} {repo} {revision}")
    found = run_key.digests(compose(["model=opt_125m", "dataset=dolly_15k", "unrelated=wikitext"]))
    assert found["model"] == "model facebook/opt-125m None"
    assert found["data"] == "dataset databricks/databricks-dolly-15k None+dataset Salesforce/wikitext None"


def test_keys_read_only_by_plans_do_not_change_the_key():
    assert run_key.run_key(compose()) == run_key.run_key(compose(["model.architecture.num_hidden_layers=3"]))


def test_other_library_version_changes_the_key(monkeypatch):
    before = run_key.run_key(compose())
    monkeypatch.setattr("qlora_exp.environment.provenance.libraries", lambda *_: {"torch": "0"})
    assert run_key.run_key(compose()) != before
