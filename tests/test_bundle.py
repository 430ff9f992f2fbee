import json
import subprocess
import sys
import zipfile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp import bundle
from qlora_exp.bundle import BundledRecord
from qlora_exp.errors import ConfigError
from qlora_exp.records import find
from qlora_exp.reproduce import BIT_IDENTICAL, judge, one_record, recorded_config, start


@pytest.fixture(scope="module")
def record(store, tmp_path_factory):
    """A run in the store, with another seed beside it."""
    from conftest import QUICK

    from qlora_exp.config import compose
    from qlora_exp.run import run

    words = [*QUICK, f"tracking.uri={store}", "tracking.experiment_name=bundles", "method=lora"]
    folder = tmp_path_factory.mktemp("bundled")
    run(compose([*words, "seed=2"]), folder / "two")
    result = run(compose([*words, "seed=1"]), folder / "one")
    return one_record(store, result.run_id)


@pytest.fixture(params=["shared", "shared.zip"])
def made(request, record, tmp_path):
    target = tmp_path / request.param
    bundle.write(record, target)
    return target


def test_a_bundle_says_what_the_store_says(made, record):
    found = bundle.read(made)
    for part in ("run_id", "name", "params", "metrics", "outcome", "config", "losses", "answers"):
        assert getattr(found, part) == getattr(record, part), part
    assert found.losses
    assert found.curve("train/loss") == record.curve("train/loss")
    assert sorted(found.seed_losses()) == sorted(record.seed_losses())
    assert len(found.seed_losses()) == 2
    assert "torch==" in found.text("environment.txt")
    assert {key for key in record.tags if key.startswith(("identity.", "version."))} <= found.tags.keys()


def test_a_bundle_says_nothing_of_its_authors_machine(made, record, tmp_path, store):
    found = bundle.read(made)
    assert not [key for key in found.tags if key.startswith(("process.", "mlflow.", "hardware.host"))]
    assert yaml.safe_load(found.text("qlora_exp.yaml")).keys().isdisjoint({"tracking", "sweep", "search"})
    everything = json.dumps(found.told.model_dump(mode="json")) + found.text("qlora_exp.yaml")
    assert record.tags["process.folder"] not in everything
    assert store not in everything


def test_a_run_is_reproduced_from_its_bundle_without_its_store(made, tmp_path):
    found = one_record(None, str(made))
    uri = f"sqlite:///{tmp_path / 'mine.db'}"
    config = recorded_config(found, {}, uri)
    again = one_record(uri, start(found, config, tmp_path / "again"))
    verdict = judge(found, again, config)
    assert verdict.grade == BIT_IDENTICAL
    assert again.tags["reproduces"] == found.run_id


def test_a_drift_is_judged_by_the_seeds_in_the_bundle(made, tmp_path):
    found = bundle.read(made)
    uri = f"sqlite:///{tmp_path / 'mine.db'}"
    config = recorded_config(found, {"training.learning_rate": 0.05}, uri)
    verdict = judge(found, one_record(uri, start(found, config, tmp_path / "again")), config)
    assert "over 2 seeds it varies by" in verdict.why
    assert "training.learning_rate 0.0002 then, 0.05 now" in verdict.why


def test_nothing_is_overwritten(made, record):
    with pytest.raises(ConfigError, match="is there already"):
        bundle.write(record, made)


def test_the_command_makes_what_reproduce_takes(record, store, tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, "-m", "qlora_exp", *words], capture_output=True, text=True, check=False)

    made = command("bundle", record.run_id, "--uri", store, "--out", "it.zip")
    assert (made.returncode, (tmp_path / "it.zip").is_file()) == (0, True)
    checked = command("reproduce", "it.zip", "--check-only")
    assert (checked.returncode, checked.stdout.count("nothing that was recorded differs")) == (0, 1)
    assert not (tmp_path / "mlruns").exists()
    missing = command("reproduce", "other.zip", "--check-only")
    assert (missing.returncode, missing.stderr) == (1, "error: other.zip: no bundle is there\n")


def damaged(made, tmp_path, name: str, content: str):
    """The bundle with one of its files changed, as a folder."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in ("run.json", "qlora_exp.yaml"):
        (folder / file).write_text(bundle.read(made).text(file))
    (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("made", ["shared"], indirect=True)
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 1}', "\x00", "[" * 100_000])
def test_what_is_no_bundle_is_refused_with_a_message(content: str, made, tmp_path):
    with pytest.raises(ConfigError, match="no bundle of qlora-exp"):
        bundle.read(damaged(made, tmp_path, "run.json", content))


@pytest.mark.parametrize("made", ["shared"], indirect=True)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "no plain YAML"),
        ("just text", "has no qlora_exp.yaml"),
        ("model: {trust_remote_code: true}", "model.trust_remote_code=true"),
        ("_target_: os.system", "_target_"),
        ("dataset: {path: /etc/passwd}", "dataset.path=PATH"),
        ("dataset: {path: ../../secrets.jsonl}", "outside of this folder"),
    ],
)
def test_a_malicious_config_is_refused(changed: str, message: str, made, tmp_path):
    config = yaml.safe_load((made / "qlora_exp.yaml").read_text())
    try:
        new = yaml.safe_load(changed)
        for section, values in new.items():
            config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
        changed = yaml.safe_dump(config)
    except (yaml.YAMLError, AttributeError):
        pass  # as it is
    with pytest.raises(ConfigError, match=message):
        recorded_config(bundle.read(damaged(made, tmp_path, "qlora_exp.yaml", changed)), {}, None)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("made", ["shared"], indirect=True)
def test_links_out_of_a_bundle_are_not_followed(made, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("token")
    (made / "samples.json").unlink(missing_ok=True)
    (made / "samples.json").symlink_to(secret)
    with pytest.raises(ConfigError, match="a link to outside"):
        bundle.read(made).text("samples.json")


@pytest.mark.parametrize("made", ["shared.zip"], indirect=True)
def test_a_zip_can_neither_write_files_nor_fill_the_memory(made, tmp_path, monkeypatch):
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr("../outside.txt", "x")
    found = bundle.read(made)
    assert found.text("../outside.txt") == ""
    assert not (tmp_path.parent / "outside.txt").exists()
    monkeypatch.setattr(bundle, "_LIMIT", 100)
    with pytest.raises(ConfigError, match="larger than"):
        found.text("environment.txt")


@given(st.binary(max_size=300))
def test_any_file_is_a_bundle_or_refused(tmp_path_factory, content: bytes):
    file = tmp_path_factory.mktemp("any") / "file.zip"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        bundle.read(file)


@given(st.dictionaries(st.text(max_size=5), st.floats(), max_size=5))
def test_every_number_survives(tmp_path_factory, metrics: dict[str, float]):
    told = bundle._Run(run_id="a", name="b", params={}, tags={}, metrics=metrics, curves={}, seed_losses=[])
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.json").write_text(told.model_dump_json(), encoding="utf-8")
    found = bundle.read(folder)
    assert isinstance(found, BundledRecord)
    assert repr(found.metrics) == repr(metrics)


def test_a_run_is_found_by_its_name(store, record):
    assert [one.name for one in find(store, [record.name], experiment="bundles")] == [record.name]
