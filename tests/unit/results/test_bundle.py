import json
import subprocess
import sys
import zipfile

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_exp.results import bundle
from qlora_exp.results.bundle import BundledRecord
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import BIT_IDENTICAL, judge, one_record, recorded_config, start
from qlora_exp.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def record(store, tmp_path_factory):
    """A run in the store, with two more seeds beside it."""
    from support import QUICK

    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    words = [*QUICK, f"tracking.uri={store}", "tracking.experiment_name=bundles", "method=lora"]
    folder = tmp_path_factory.mktemp("bundled")
    for seed in (2, 3):
        run(compose([*words, f"seed={seed}"]), folder / str(seed))
    result = run(compose([*words, "seed=1"]), folder / "1")
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
    assert len(found.seed_losses()) == 3
    assert "torch==" in found.text("environment.txt")
    assert {key for key in record.tags if key.startswith(("identity.", "version."))} <= found.tags.keys()


def test_a_bundle_says_nothing_of_its_authors_machine(made, record, tmp_path, store):
    found = bundle.read(made)
    assert not [key for key in found.tags if key.startswith(("process.", "mlflow.", "hardware.host"))]
    assert yaml.safe_load(found.text("qlora_exp.yaml")).keys().isdisjoint({"tracking", "sweep", "search"})
    files = [found.text(name) for name in (*bundle._FILES, "run.json")]
    assert not [text for text in files if record.tags["process.folder"] in text or store in text]


def test_a_bundle_says_neither_where_files_are_nor_what_is_in_them(run, store, jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    rows = [{"prompt": f"question {n}?", "completion": f"TRAINING {n} hf_averysecrettoken"} for n in range(20)]
    path = jsonl(rows)
    heldout = jsonl([{"prompt": f"other {n}?", "completion": f"answer {n}"} for n in range(4)], "heldout.jsonl")
    words = ["dataset=own", f"dataset.path={path}", f"dataset.eval_path={heldout}", "method=lora"]
    result = run(*words, "evaluation=loss_only", "+tracking.tags.team=ours")
    bundle.write(one_record(store, result.run_id), tmp_path / "it.zip")
    found = bundle.read(tmp_path / "it.zip")
    everything = "".join(found.text(name) for name in (*bundle._FILES, "run.json"))
    assert "rows.jsonl" in everything
    for hidden in (str(tmp_path), "TRAINING", "secrettoken", "ours"):
        assert hidden not in everything
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="no file rows.jsonl"):
        start(found, recorded_config(found, {}, store), tmp_path / "again")


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
    assert "over 3 seeds it varies by" in verdict.why
    assert "training.learning_rate 0.0002 then, 0.05 now" in verdict.why


def test_nothing_is_overwritten(made, record):
    with pytest.raises(ConfigError, match="is there already"):
        bundle.write(record, made)


@pytest.mark.parametrize("place", ["/proc/it.zip", "file/it.zip", "file/it", "nowhere/it", "it.tar.gz"])
def test_a_place_that_cannot_be_written_is_explained(place: str, record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        bundle.write(record, tmp_path / place)


def test_the_command_makes_what_reproduce_takes(record, store, tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, "-m", "qlora_exp", *words], capture_output=True, text=True, check=False)

    made = command("bundle", record.run_id, "--uri", store, "--out", "it.zip")
    assert (made.returncode, (tmp_path / "it.zip").is_file()) == (0, True)
    checked = command("reproduce", "it.zip", "--check-only")
    assert checked.returncode == 0
    assert "nothing that was recorded differs" in checked.stdout, checked.stdout
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
    ("key", "value", "message"),
    [
        ("run_id", "/tmp/elsewhere", "run_id String should match"),
        ("run_id", "../" * 8 + "f" * 8, "run_id String should match"),
        ("format", 2, "format Input should be 1"),
        ("metrics", {"after/loss": "high"}, "metrics.after/loss"),
    ],
)
def test_what_a_bundle_may_not_say_is_named(key: str, value, message: str, made, tmp_path):
    told = json.loads(bundle.read(made).text("run.json")) | {key: value}
    with pytest.raises(ConfigError, match=message):
        bundle.read(damaged(made, tmp_path, "run.json", json.dumps(told)))


@pytest.mark.parametrize("made", ["shared"], indirect=True)
def test_a_run_without_a_result_is_not_reproduced(made, tmp_path):
    told = json.loads(bundle.read(made).text("run.json")) | {"metrics": {}}
    found = bundle.read(damaged(made, tmp_path, "run.json", json.dumps(told)))
    config = recorded_config(found, {}, None)  # it can be checked
    with pytest.raises(ConfigError, match="no held-out loss"):
        start(found, config, tmp_path / "again")


@pytest.mark.parametrize("made", ["shared"], indirect=True)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "no plain YAML"),
        ("just text", "is no mapping"),
        ("seed: 2020-99-99", "no plain YAML"),
        ("seed: " + "9" * 5000, "no plain YAML"),
        ("[" * 5000, "no plain YAML"),
        ("a: &x [1]\nb: [*x, *x]", "no plain YAML: an alias"),
        ("tracking: 5", None),
        ("model: {attn_implementation: someone/kernel}", "a kernel of the hub"),
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
def test_a_malicious_config_is_refused(changed: str, message: str | None, made, tmp_path):
    config = yaml.safe_load((made / "qlora_exp.yaml").read_text())
    try:
        new = yaml.safe_load(changed) if "*" not in changed else None
        for section, values in new.items():
            config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
        if "peft_type" in changed:
            config["method"] = {"name": "x"} | new["method"]
        changed = yaml.safe_dump(config)
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        pass  # as it is
    found = bundle.read(damaged(made, tmp_path, "qlora_exp.yaml", changed))
    if message is None:
        assert recorded_config(found, {}, None).tracking.uri is None
        return
    with pytest.raises(ConfigError, match=message):
        recorded_config(found, {}, None)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("made", ["shared"], indirect=True)
def test_a_section_that_is_none_takes_no_changes(made, tmp_path):
    config = yaml.safe_load((made / "qlora_exp.yaml").read_text()) | {"dataset": "hi"}
    found = bundle.read(damaged(made, tmp_path, "qlora_exp.yaml", yaml.safe_dump(config)))
    with pytest.raises(ConfigError, match="dataset of run .* is no mapping"):
        recorded_config(found, {"dataset.path": "x"}, None)


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


@pytest.mark.parametrize("made", ["shared.zip"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_zip_is_read_or_refused(data, made):
    content = bytearray(made.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file = made.with_name("damaged.zip")
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = bundle.read(file)
        for name in bundle._FILES:
            found.text(name)
    except ConfigError:
        pass  # refused with a message; anything else fails here


@given(st.dictionaries(st.text(max_size=5), st.floats(), max_size=5))
def test_every_number_survives(tmp_path_factory, metrics: dict[str, float]):
    told = bundle._Run(
        format=1, run_id="a" * 32, name="b", params={}, tags={}, metrics=metrics, curves={}, seed_losses=[]
    )
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.json").write_text(told.model_dump_json(), encoding="utf-8")
    found = bundle.read(folder)
    assert isinstance(found, BundledRecord)
    assert repr(found.metrics) == repr(metrics)


def test_a_run_is_found_by_its_name(store, record):
    assert [one.name for one in find(store, [record.name], experiment="bundles")] == [record.name]
