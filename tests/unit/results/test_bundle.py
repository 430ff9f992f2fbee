import json
import zipfile

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_exp.results import bundle
from qlora_exp.results.bundle import BundledRecord
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import recorded_config, start
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow


def test_bundle_contains_what_the_store_contains(bundle_path, recorded_run):
    found = bundle.read(bundle_path)
    for part in ("run_id", "name", "params", "metrics", "outcome", "config", "losses", "answers"):
        assert getattr(found, part) == getattr(recorded_run, part), part
    assert found.losses
    assert found.curve("train/loss") == recorded_run.curve("train/loss")
    assert sorted(found.seed_losses()) == sorted(recorded_run.seed_losses())
    assert len(found.seed_losses()) == 3
    assert "torch==" in found.text("environment.txt")
    assert {key for key in recorded_run.tags if key.startswith(("identity.", "version."))} <= found.tags.keys()


def test_bundle_contains_nothing_of_its_authors_machine(bundle_path, recorded_run, tmp_path, mlflow_uri):
    found = bundle.read(bundle_path)
    assert not [key for key in found.tags if key.startswith(("process.", "mlflow.", "hardware.host"))]
    assert yaml.safe_load(found.text("qlora_exp.yaml")).keys().isdisjoint({"tracking", "sweep", "search"})
    files = [found.text(name) for name in (*bundle._FILES, "run.json")]
    assert not [text for text in files if recorded_run.tags["process.folder"] in text or mlflow_uri in text]


def test_existing_bundle_is_not_overwritten(bundle_path, recorded_run):
    with pytest.raises(ConfigError, match="exists already"):
        bundle.write(recorded_run, bundle_path)


@pytest.mark.parametrize("place", ["/proc/it.zip", "file/it.zip", "file/it", "nowhere/it", "it.tar.gz"])
def test_unwritable_bundle_path_is_reported(place: str, recorded_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        bundle.write(recorded_run, tmp_path / place)


def damaged(bundle_path, tmp_path, name: str, content: str):
    """The bundle with one of its files changed, as a folder."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in ("run.json", "qlora_exp.yaml"):
        (folder / file).write_text(bundle.read(bundle_path).text(file))
    (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 1}', "\x00", "[" * 100_000])
def test_invalid_bundle_is_rejected_with_a_message(content: str, bundle_path, tmp_path):
    with pytest.raises(ConfigError, match="not a bundle of qlora-exp"):
        bundle.read(damaged(bundle_path, tmp_path, "run.json", content))


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_id", "/tmp/elsewhere", "run_id String should match"),
        ("run_id", "../" * 8 + "f" * 8, "run_id String should match"),
        ("format", 2, "format Input should be 1"),
        ("metrics", {"after/loss": "high"}, "metrics.after/loss"),
    ],
)
def test_invalid_bundle_field_is_named(key: str, value, message: str, bundle_path, tmp_path):
    told = json.loads(bundle.read(bundle_path).text("run.json")) | {key: value}
    with pytest.raises(ConfigError, match=message):
        bundle.read(damaged(bundle_path, tmp_path, "run.json", json.dumps(told)))


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
def test_run_without_a_result_is_not_reproduced(bundle_path, tmp_path):
    told = json.loads(bundle.read(bundle_path).text("run.json")) | {"metrics": {}}
    found = bundle.read(damaged(bundle_path, tmp_path, "run.json", json.dumps(told)))
    config = recorded_config(found, {}, None)  # it can be checked
    with pytest.raises(ConfigError, match="no held-out loss"):
        start(found, config, tmp_path / "again")


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "not plain YAML"),
        ("just text", "is not a mapping"),
        ("seed: 2020-99-99", "not plain YAML"),
        ("seed: " + "9" * 5000, "not plain YAML"),
        ("[" * 5000, "not plain YAML"),
        ("a: &x [1]\nb: [*x, *x]", "not plain YAML: aliases"),
        ("tracking: 5", None),
        ("model: {attn_implementation: someone/kernel}", "a kernel from the hub"),
        (
            "distributed: {engine: ddp, num_processes: 2, num_machines: 2, main_process_ip: x, main_process_port: 5}",
            "connects to x, which could run code here",
        ),
        ("distributed: {engine: ddp, num_processes: 4096}", "starts 4096 processes"),
        (
            "method: {peft_type: PROMPT_TUNING, tokenizer_name_or_path: /etc/secret}",
            "method.tokenizer_name_or_path=PATH",
        ),
        ("method: {rank_pattern: {/etc/secret: 4}}", "method.rank_pattern=PATH"),
        ("model: {trust_remote_code: true}", "model.trust_remote_code=true"),
        ("_target_: os.system", "_target_"),
        ("dataset: {path: /etc/passwd}", "dataset.path=PATH"),
        ("dataset: {path: ../../secrets.jsonl}", "outside of this folder"),
    ],
)
def test_malicious_config_is_rejected(changed: str, message: str | None, bundle_path, tmp_path):
    config = yaml.safe_load((bundle_path / "qlora_exp.yaml").read_text())
    try:
        new = yaml.safe_load(changed) if "*" not in changed else None
        for section, values in new.items():
            config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
        if "peft_type" in changed:
            config["method"] = {"name": "x"} | new["method"]
        changed = yaml.safe_dump(config)
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        pass  # as it is
    found = bundle.read(damaged(bundle_path, tmp_path, "qlora_exp.yaml", changed))
    if message is None:
        assert recorded_config(found, {}, None).tracking.uri is None
        return
    with pytest.raises(ConfigError, match=message):
        recorded_config(found, {}, None)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
def test_changes_to_a_section_that_is_no_mapping_are_rejected(bundle_path, tmp_path):
    config = yaml.safe_load((bundle_path / "qlora_exp.yaml").read_text()) | {"dataset": "hi"}
    found = bundle.read(damaged(bundle_path, tmp_path, "qlora_exp.yaml", yaml.safe_dump(config)))
    with pytest.raises(ConfigError, match="dataset of run .* must be a mapping"):
        recorded_config(found, {"dataset.path": "x"}, None)


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
def test_link_out_of_a_bundle_is_rejected(bundle_path, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("token")
    (bundle_path / "samples.json").unlink(missing_ok=True)
    (bundle_path / "samples.json").symlink_to(secret)
    with pytest.raises(ConfigError, match="a link to a file outside"):
        bundle.read(bundle_path).text("samples.json")


@pytest.mark.parametrize("bundle_path", ["shared.zip"], indirect=True)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_two_files_of_one_name_is_rejected(bundle_path):
    with zipfile.ZipFile(bundle_path, "a") as archive:
        archive.writestr("qlora_exp.yaml", "{}")
    with pytest.raises(ConfigError, match="this bundle cannot be read: it has two files of one name"):
        bundle.read(bundle_path)


@pytest.mark.parametrize("bundle_path", ["shared.zip"], indirect=True)
def test_zip_can_neither_write_files_nor_fill_the_memory(bundle_path, tmp_path, monkeypatch):
    with zipfile.ZipFile(bundle_path, "a") as archive:
        archive.writestr("../outside.txt", "x")
    found = bundle.read(bundle_path)
    assert found.text("../outside.txt") == ""
    assert not (tmp_path.parent / "outside.txt").exists()
    monkeypatch.setattr(bundle, "_LIMIT", 100)
    with pytest.raises(ConfigError, match="larger than"):
        found.text("environment.txt")


@pytest.mark.parametrize("bundle_path", ["shared.zip"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_zip_is_read_or_rejected(data, bundle_path):
    content = bytearray(bundle_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file = bundle_path.with_name("damaged.zip")
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = bundle.read(file)
        for name in bundle._FILES:
            found.text(name)
    except ConfigError:
        pass  # refused with a message; anything else fails here


@pytest.mark.parametrize("bundle_path", ["shared.zip"], indirect=True)
def test_list_of_files_is_read_once(bundle_path, monkeypatch):
    opened = []
    real = zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda self, *words: opened.append(words) or real(self, *words))
    found = bundle.read(bundle_path)
    assert found.losses
    assert found.text("environment.txt")
    assert len(opened) == 1


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
@pytest.mark.parametrize(
    ("name", "attribute", "content"),
    [
        ("evaluation/after_losses.jsonl", "losses", "[1]"),
        ("evaluation/after_losses.jsonl", "losses", '{"nll": 1}'),
        ("evaluation/after_unrelated_losses.jsonl", "unrelated_losses", "{"),
        ("evaluation/answers.json", "answers", "[" * 200_000),
        ("evaluation/answers.json", "answers", '{"after": {"a": 1}}'),
        ("evaluation/after_lm_eval.json", "lm_eval", "nope"),
    ],
)
def test_damaged_file_of_a_bundle_is_named(name: str, attribute: str, content: str, bundle_path):
    (bundle_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name} of run [0-9a-f]* is damaged"):
        getattr(bundle.read(bundle_path), attribute)


@given(st.dictionaries(st.text(max_size=5), st.floats(), max_size=5))
def test_metrics_survive_a_bundle_round_trip(tmp_path_factory, metrics: dict[str, float]):
    told = bundle._Run(
        format=1, run_id="a" * 32, name="b", params={}, tags={}, metrics=metrics, curves={}, seed_losses=[]
    )
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.json").write_text(told.model_dump_json(), encoding="utf-8")
    found = bundle.read(folder)
    assert isinstance(found, BundledRecord)
    assert repr(found.metrics) == repr(metrics)


def test_run_is_found_by_its_name(mlflow_uri, recorded_run):
    assert [one.name for one in find(mlflow_uri, [recorded_run.name], experiment="recorded")] == [recorded_run.name]
