import sys

import pytest
from helpers import plugins as packages

from qlora_exp.config import plugins
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.validate import from_dict
from qlora_exp.tracking import run_key
from qlora_exp.utils.errors import ConfigError

TRAP = "raise SystemError('imported')"


def test_metric_that_no_package_has_is_refused_with_the_names_of_those_that_are_installed(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "trap_of_names", TRAP, "shared_words", "focal")
    with pytest.raises(ConfigError) as error:
        compose(["evaluation.metrics=[rouge,shared_wrods]"])
    assert str(error.value) == (
        "evaluation.metrics: no metric 'shared_wrods'; did you mean 'shared_words'; built in: rouge, exact_match; "
        "entry points qlora_exp.metrics of installed packages: shared_words"
    )
    with pytest.raises(
        ConfigError, match="loss_type: no loss 'chunked_nll'.*; built in: nll, dft; .* packages: focal$"
    ):
        compose(["training.loss_type=chunked_nll"])
    compose(["evaluation.metrics=[shared_words]", "training.loss_type=focal"])
    assert "trap_of_names" not in sys.modules  # all of that without an import


def test_record_of_another_machine_may_name_what_is_not_installed():
    values = compose([]).model_dump(mode="json")
    values["evaluation"]["metrics"], values["training"]["loss_type"] = ["theirs"], "theirs"
    config = from_dict(values)
    assert [*plugins.problems(config)]
    assert plugins.version(config) == "metric theirs: missing; loss theirs: missing"


@pytest.mark.parametrize("name", ["a/b", "../x", "a:b", "", "x" * 101])
def test_names_that_are_no_names_are_refused(name: str):
    with pytest.raises(ConfigError, match=r"evaluation\.metrics\.0"):
        compose([f"evaluation.metrics=['{name}']"])


def test_metric_of_two_packages_is_refused(monkeypatch, tmp_path):
    for package in ("first_of_two", "second_of_two"):
        packages.install(monkeypatch, tmp_path / package, package, TRAP, "twice")
    with pytest.raises(ConfigError, match=r"a metric 'twice', second_of_two 0\.1 and first_of_two 0\.1; keep one"):
        compose(["evaluation.metrics=[twice]"])


def test_built_in_names_are_never_those_of_a_package(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "trap_of_built_in", TRAP, "rouge exact_match", "nll")
    assert plugins.named(compose([])) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TRAP, "cannot be imported .*: SystemError: imported"),
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("import sys; sys.exit(3)", "cannot be imported .*: SystemExit: 3"),
        ("", "has no attribute 'one'"),
    ],
)
def test_package_that_cannot_be_imported_says_why(source: str, message: str, monkeypatch, tmp_path):
    package = f"broken_{abs(hash(source))}"
    packages.install(monkeypatch, tmp_path / "a", package, source, "one")
    with pytest.raises(ConfigError, match=message):
        plugins.find("metric", "one").load()


def test_run_key_changes_with_the_source_of_a_metric_and_not_for_runs_without_one(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "own_key", packages.METRICS, "shared_words")
    config = compose(["evaluation.metrics=[shared_words]", "model=tiny_llama"])
    before = run_key.digests(config)
    assert before["plugins"].startswith("metric shared_words: own_key 0.1 (")
    (tmp_path / "a" / "own_key.py").write_text(packages.METRICS + "# changed")
    plugins._source.cache_clear()
    assert run_key.digests(config)["plugins"] != before["plugins"]
    assert "plugins" not in run_key.digests(compose(["model=tiny_llama"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.metrics=[rouge]"], r"after/metric/one is not measured: add evaluation.metrics=\[rouge,one\]"),
        (["evaluation.generate_rows=0"], "after/metric/one needs answers"),
        (["search.metrics=[metric/one]"], "search.metrics: metric/one .*: use after/metric/one"),
        (["search.metrics=[before/metric/one]", "evaluation.before=false"], "needs evaluation.before=true"),
        (["search.metrics=[after/loss]", "tuning.metric=after/metric/two"], "tuning.metric: after/metric/two is not"),
    ],
)
def test_search_by_a_metric_that_no_job_measures_is_refused(words: list[str], message: str, monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "searched", TRAP, "one two")
    with pytest.raises(ConfigError, match=message):
        compose(["search.metrics=[after/metric/one]", "evaluation.metrics=[one]", *words])
