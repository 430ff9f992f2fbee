import numpy as np
import pytest
from helpers.past_runs import ROWS, shifted
from mlflow.exceptions import MlflowException

from qlora_exp.results import report
from qlora_exp.results.compare import compare
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import find_run
from qlora_exp.tracking.journal import Journal
from qlora_exp.tracking.limits import fit
from qlora_exp.utils.errors import ConfigError, TrackingError


def test_seeds_of_one_config_are_one_row(past_runs):
    for r, by in ((4, 0.0), (8, -0.2)):
        for seed in (1, 2, 3):
            past_runs(shifted(by + 0.001 * seed), seed=seed, method__r=r)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [(row.name, len(row.records)) for row in found.rows] == [("method.r=4", 3), ("method.r=8", 3)]
    verdict = found.verdicts["method.r=8"]
    assert verdict.text.startswith("better -0.2000")
    assert (verdict.difference.seeds, verdict.difference.items) == ((3, 3), 8)
    assert found.ties == {"method.r=4": "b", "method.r=8": "a"}


def test_different_seeds_are_a_warning(past_runs):
    past_runs(ROWS, seed=1, method__r=4)
    past_runs(shifted(-0.2), seed=2, method__r=8)
    past_runs(shifted(-0.3), seed=2, method__r=16)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert "seeds: 1 (r=4), 2 (2 rows)" in found.warnings


def test_difference_within_chance_is_a_tie_with_the_seeds_needed(past_runs):
    for r, by in ((4, [0.0, 0.3, -0.2]), (8, [-0.1, 0.1, -0.15])):
        for seed, one in enumerate(by):
            past_runs(shifted(one, 0.0), seed=seed, method__r=r)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts["method.r=8"].text.startswith("tie ")
    assert "more seeds would settle it" in found.verdicts["method.r=8"].text
    assert found.ties == {"method.r=4": "a", "method.r=8": "a"}


def noisy(rng, by: float, items: int = 30) -> list[float]:
    """Losses of a run: what its seed does to all rows, and to each."""
    return list(np.resize(ROWS, items) + by + rng.normal(0, 0.035) + rng.normal(0, 0.035, items))


def test_rows_with_other_seeds_are_compared_by_all_of_them(past_runs):
    """Five seeds each, none in common: independent samples over seeds, but the same held-out rows."""
    rng = np.random.default_rng(0)
    for seed in range(1, 6):
        past_runs(noisy(rng, 0.0), seed=seed, method__r=4)
        past_runs(noisy(rng, -0.5), seed=5 + seed, method__r=8)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    verdict, (base, other) = found.verdicts["method.r=8"], (row.mean("after/loss") for row in found.rows)
    assert verdict.text.startswith("better -0.")
    assert verdict.difference.value == pytest.approx(other.value - base.value)
    assert (verdict.difference.seeds, verdict.difference.items) == ((5, 5), 30)
    assert found.ties == {"method.r=4": "b", "method.r=8": "a"}


def test_seed_that_failed_in_one_row_leaves_the_others_paired(past_runs):
    rng = np.random.default_rng(0)
    for seed in range(1, 6):
        alike = rng.normal(0, 3)  # what the seed does to both rows
        past_runs(noisy(rng, alike), seed=seed, method__r=4)
        if seed < 5:
            past_runs(noisy(rng, alike - 0.5), seed=seed, method__r=8)
    past_runs(outcome="oom", seed=5, method__r=8)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    difference, (base, other) = found.verdicts["method.r=8"].difference, (row.mean("after/loss") for row in found.rows)
    assert difference.seeds == (4, 5)
    assert difference.value == pytest.approx(other.value - base.value)
    assert difference.error < 0.7 * (base.high - base.value) / 2.776  # the printed interval: t of 4 degrees of freedom


def test_row_of_one_seed_is_judged_by_how_the_other_varies(past_runs):
    rng = np.random.default_rng(0)
    for seed in range(1, 6):
        past_runs(noisy(rng, rng.normal(0, 0.3)), seed=seed, method__r=4)
    past_runs(noisy(rng, -0.3), seed=1, method__r=8)
    past_runs(noisy(rng, -9.0), seed=9, method__r=16)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts["method.r=8"].text.startswith("tie ")
    assert found.verdicts["method.r=16"].text.startswith("better ")
    for verdict in found.verdicts.values():
        assert "one of the two has one seed only; it is taken to vary over seeds as the other does" in verdict.text


def test_two_seeds_over_ten_rows_are_said_to_be_too_few(past_runs, capsys):
    rng = np.random.default_rng(3)
    for r in range(1, 12):
        for seed in (1, 2):
            past_runs(noisy(rng, 0.0, 20), seed=seed, method__r=r)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert {verdict.text[:4] for verdict in found.verdicts.values()} == {"tie "}
    assert set(found.ties.values()) == {"a"}
    report.show(found)
    assert (
        "2 seeds are too few for 10 verdicts where results vary with the seed: a difference is significant only beyond "
        "90 times the standard deviation over seeds; with 4 seeds, beyond 3.7 times.\n"
    ) in capsys.readouterr().out


def test_runs_that_are_all_equal_tie(past_runs):
    """Deterministic runs, whose seed changes nothing."""
    for r in (4, 8, 16):
        for seed in (1, 2):
            past_runs(shifted(0.0 if r < 16 else -0.1), seed=seed, method__r=r)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts["method.r=8"].text == "tie +0.0000"
    assert found.verdicts["method.r=16"].text.startswith("better -0.1000")


def test_few_runs_with_the_same_score_are_no_proof(past_runs):
    for r, score in ((4, 0.1), (8, 0.2)):
        for seed in (1, 2):
            past_runs(seed=seed, method__r=r, metrics={"after/exact_match": score})
    found = compare(find(past_runs.uri, experiment=past_runs.experiment), "exact_match")
    assert found.verdicts["method.r=8"].text == "tie +0.1000; too few runs to exclude chance"


def test_verdict_of_one_seed_says_so(past_runs):
    past_runs(shifted(0.0), method__r=4)
    past_runs(shifted(-0.5), method__r=8)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts["method.r=8"].text.startswith("better")
    assert "one seed" in found.verdicts["method.r=8"].text


def test_different_held_out_rows_are_not_paired(past_runs):
    for seed in (1, 2):
        past_runs(shifted(0.0 + seed / 100), seed=seed)
        past_runs(shifted(-0.5 - seed / 50), seed=seed, method__r=8, data__evaluation_fingerprint="others")
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts["method.r=8"].difference.items == 0
    assert "held-out rows: rows, others" in found.warnings


def test_other_differences_are_warnings(past_runs):
    tags = {"version.torch": "1", "sweep.method.r": "4"}
    measured = {"train/num_tokens": 100.0, "memory/baseline/rss_mib": 500.0}
    computed = {"resolved__gradient_checkpointing": True, "resolved__padding": "batch", "resolved__attention": "sdpa"}
    others = {"resolved__recomputed_layers": 8, "resolved__padding": "free", "resolved__attention": "eager"}
    past_runs(shifted(0.0), metrics=measured, tags=tags, resolved__adapter_dtype="float32", **computed)
    past_runs(
        shifted(0.1),
        method__r=8,
        training__learning_rate=1e-3,
        resolved__adapter_dtype="bfloat16",
        **computed | others,
        metrics={"train/num_tokens": 200.0, "memory/baseline/rss_mib": 600.0},
        tags={"version.torch": "2", "sweep.method.r": "8"},
    )
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [row.name for row in found.rows] == ["method.r=4", "method.r=8"]
    for expected in (
        "tokens seen: 100 (r=4), 200 (r=8)",
        "MiB before loading: 500 (r=4), 600 (r=8)",
        "torch version: 1, 2",
        "adapter dtype: float32, bfloat16",
        "gradient checkpointing: True, first 8 layers",
        "padding: batch, free",
        "attention: sdpa, eager",
    ):
        assert expected in found.warnings
    assert found.settings == ["training.learning_rate: none, 0.001"]


@pytest.mark.parametrize(("rows", "says"), [(4, "the same batch"), (8, "not the same batch")])
def test_runs_of_more_processes_are_said_to_have_the_same_batch_or_not(rows, says, past_runs):
    past_runs(ROWS, method__r=4, training__per_device_train_batch_size=8, resolved__num_processes=1)
    past_runs(ROWS, method__r=8, training__per_device_train_batch_size=rows, resolved__num_processes=2)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert f"processes: 1 x 8 rows, 2 x {rows} rows ({says})" in found.warnings
    assert any(line.startswith("effective batch: ") for line in found.warnings) is (rows == 8)


def test_repeated_seed_counts_once(past_runs):
    past_runs(shifted(0.0), seed=1)
    newest = past_runs(shifted(0.2), seed=1)
    past_runs(outcome="error", seed=1)
    past_runs(outcome="error", seed=2)
    (row,) = compare(find(past_runs.uri, experiment=past_runs.experiment)).rows
    assert [one.run_id for one in row.records] == [newest]
    assert [one.params["seed"] for one in row.failed] == ["2"]


def test_rows_without_the_metric_are_not_compared(past_runs):
    for r in (4, 8, 16):
        scores = {"after/rougeL": 0.1 * r} if r > 4 else {}
        past_runs(shifted(0.0), method__r=r, metrics=scores)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment), "rougeL")
    assert found.baseline.name == "method.r=8"
    assert list(found.verdicts) == ["method.r=16"]


def test_store_error_is_not_taken_for_a_missing_file(past_runs, monkeypatch):
    """Or a server's failure would change what the statistics say."""
    past_runs(shifted(0.0))
    past_runs(shifted(-0.3), method__r=8)
    records = find(past_runs.uri, experiment=past_runs.experiment)

    def fails(**_):
        raise MlflowException("503")

    monkeypatch.setattr("qlora_exp.results.records.download_artifacts", fails)
    monkeypatch.setattr("qlora_exp.results.records.artifacts.folder", lambda *_: None)  # as of a server
    with pytest.raises(TrackingError, match="lists evaluation/after_losses.jsonl but does not return it"):
        compare(records)
    assert records[0].text("evaluation/answers.json") == ""


def test_failed_runs_are_listed_but_not_compared(past_runs):
    past_runs(shifted(0.0))
    past_runs(method__r=8, outcome="oom", tags={"failure": "too large"})
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [len(row.failed) for row in found.rows] == [0, 1]
    assert found.verdicts == {}
    past_runs(method__r=16, outcome="nan", tags={"sweep": "bad"})
    with pytest.raises(ConfigError, match=r"none of these 1 runs succeeded \(outcomes: nan\)"):
        compare(find(past_runs.uri, ["bad"]))


def test_baseline_is_chosen_by_part_of_its_name(past_runs):
    for name in ("lora", "dora"):
        for r in (4, 8):
            past_runs(shifted(r / 100), method__name=name, method__r=r)
    records = find(past_runs.uri, experiment=past_runs.experiment)
    assert compare(records, baseline="method.r=8 method=dora").baseline.name == "method=dora method.r=8"
    assert compare(records, baseline="method=dora r=8").baseline.short == "method=dora r=8"
    with pytest.raises(ConfigError, match="several rows match"):
        compare(records, baseline="method.r=8")
    with pytest.raises(ConfigError, match="no row matches"):
        compare(records, baseline="method.r=80")


def test_unmeasured_metric_is_rejected(past_runs):
    past_runs(shifted(0.0))
    with pytest.raises(ConfigError, match="available: loss"):
        compare(find(past_runs.uri, experiment=past_runs.experiment), metric="rougeL")


def test_runs_are_found_by_sweep_id_key_and_filter(past_runs):
    experiment = past_runs.mlflow.get_experiment_by_name(past_runs.experiment).experiment_id
    tags = {"sweep": "night", "sweep.keys": "method.r"}
    parent = past_runs.mlflow.create_run(experiment, 10**15, tags).info.run_id
    tags = {"sweep": "night", "mlflow.parentRunId": parent}
    inside = [past_runs(shifted(0.0), method__r=r, tags=tags) for r in (4, 8)]
    alone = past_runs(shifted(0.0), method__r=16)

    def ids(*chosen, **more):
        return {one.run_id for one in find(past_runs.uri, chosen, **more)}

    assert ids() == ids("night") == ids(parent) == set(inside)  # the newest sweep
    assert ids(alone) == {alone}
    assert ids(past_runs.mlflow.get_run(alone).data.tags["run_key"]) == {alone}
    assert ids(where="params.`method.r` = '8'", experiment=past_runs.experiment) == {inside[1]}
    assert ids("night", where="params.`method.r` = '8'") == {inside[1]}
    assert ids(experiment=past_runs.experiment) == {*inside, alone}


def test_newest_run_of_a_run_key_is_used(past_runs):
    past_runs(outcome="oom", tags={"run_key": "f" * 16})
    newer = past_runs(shifted(0.0), tags={"run_key": "f" * 16})
    assert [one.run_id for one in find(past_runs.uri, experiment=past_runs.experiment)] == [newer]


@pytest.mark.parametrize("chosen", ["nothing", "0" * 32, "a' or 'b'='b", "../x"])
def test_missing_run_or_experiment_is_reported(chosen: str, past_runs):
    past_runs(shifted(0.0))
    with pytest.raises(TrackingError):
        find(past_runs.uri, [chosen])
    with pytest.raises(TrackingError, match="no experiment 'x'; existing experiments: "):
        find(past_runs.uri, experiment="x")


def test_long_values_that_differ_at_their_end_are_two_rows(past_runs):
    for end in "AB":
        for seed in (1, 2):
            past_runs(ROWS, seed=seed, dataset__system_message=fit(9660 * "x" + end, 6000))
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [len(row.records) for row in found.rows] == [2, 2]


def test_values_that_older_versions_cut_are_told_apart_by_the_digest_of_the_config(past_runs):
    for digest in "AB":
        past_runs(ROWS, dataset__system_message=6000 * "x", tags={"identity.config": digest})
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert [row.name for row in found.rows] == ["identity.config=A", "identity.config=B"]


def test_missing_and_infinite_measurements_are_said(past_runs, capsys):
    for seed in (1, 2):
        past_runs(shifted(seed / 100), seed=seed)
        past_runs(shifted(seed / 90), seed=seed, method__r=8)
        past_runs(shifted(seed / 80), seed=seed, method__r=16)
    past_runs(seed=3, method__r=8)
    past_runs(seed=3, method__r=16, metrics={"after/loss": float("nan")})
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert found.verdicts == {}
    assert [row.unmeasured("after/loss") for row in found.rows] == [
        "", "not measured in 1 of 3 runs", "not a number in 1 of 3 runs",
    ]  # fmt: skip
    report.show(found)
    shown = capsys.readouterr().out
    assert "  method.r=8: not measured in 1 of 3 runs\n" in shown
    assert "  method.r=16: not a number in 1 of 3 runs\n" in shown


def test_runs_are_found_by_names_with_quotes_and_by_their_folder(past_runs, tmp_path):
    run = past_runs(ROWS)
    past_runs.mlflow.set_tag(run, "mlflow.runName", "dataset.name='a,b'")
    (found,) = find(past_runs.uri, ["dataset.name='a,b'"])
    assert found.run_id == run
    with pytest.raises(TrackingError, match="both kinds of quotes"):
        find(past_runs.uri, ["'\""])
    folder = tmp_path / "output"
    folder.mkdir()
    journal = Journal(folder)
    journal.append({"op": "start"})
    journal.use(past_runs.uri)
    with pytest.raises(TrackingError, match=r"has no run of this folder: give its --uri, or qlora-exp sync"):
        find(past_runs.uri, [str(folder)])
    journal.save_state(run_id=run)
    journal.close()
    assert [record.run_id for record in find(past_runs.uri, [str(folder)])] == [run]
    assert find_run(past_runs.uri, str(folder)).run_id == run


def test_deleted_experiment_is_named(past_runs):
    past_runs(ROWS)
    experiment = past_runs.mlflow.get_experiment_by_name(past_runs.experiment)
    past_runs.mlflow.delete_experiment(experiment.experiment_id)
    with pytest.raises(TrackingError, match="was deleted in MLflow; .*restore_experiment"):
        find(past_runs.uri, experiment=past_runs.experiment)


def test_losses_of_one_source_are_compared_on_its_own_rows(past_runs):
    """The rows of a get better in each run, those of b worse: together they tie."""
    losses = shifted(0.0)
    names = ["a", "b"] * (len(losses) // 2)
    for r, shift in ((4, 0.0), (8, 0.5)):
        moved = [loss + (-shift if name == "a" else shift) for loss, name in zip(losses, names, strict=True)]
        means = {f"after/source_loss/{name}": float(np.mean([loss for loss, own in zip(moved, names, strict=True)
                 if own == name])) for name in "ab"}  # fmt: skip
        past_runs(moved, method__r=r, sources=names, metrics=means)
    records = find(past_runs.uri, experiment=past_runs.experiment)
    verdicts = {source: compare(records, f"source_loss/{source}").verdicts["method.r=8"] for source in "ab"}
    assert {source: round(each.difference.value, 6) for source, each in verdicts.items()} == {"a": -0.5, "b": 0.5}
    assert {each.difference.items for each in verdicts.values()} == {len(losses) // 2}
    headings, _ = report.table(compare(records))
    assert {"loss", "loss/a", "loss/b"} <= {*headings}
    with pytest.raises(ConfigError, match="available: loss, source_loss/a, source_loss/b"):
        compare(records, metric="source_loss/c")


def test_only_lora_is_labelled_with_a_variant_of_lora(past_runs):
    lora = {"method__peft_type": "LORA", "lora_variant__use_dora": "None"}
    past_runs([1.0, 2.0], **lora, lora_variant__name="lora")
    past_runs([1.0, 2.0], **lora, lora_variant__name="dora")
    past_runs([1.0, 2.0], method__name="ia3", method__peft_type="IA3", lora_variant__name="lora")
    past_runs([1.0, 2.0], method__name="full", lora_variant__name="lora")
    rows = compare(find(past_runs.uri, [], past_runs.experiment)).rows
    assert sorted(row.label["lora_variant"] for row in rows) == ["dora", "lora", "none", "none"]


def test_runs_that_nothing_makes_comparable_are_not_tested(past_runs):
    past_runs(shifted(0.0), method__r=4)
    past_runs(shifted(4.0), method__r=8, data__evaluation_fingerprint="other rows")
    (verdict,) = compare(find(past_runs.uri, experiment=past_runs.experiment)).verdicts.values()
    assert verdict.text == "not tested +4.0000; scored on other held-out rows than the baseline"
    past_runs(shifted(0.5), method__r=16)
    alone, among = (
        compare(find(past_runs.uri, experiment=past_runs.experiment, where=where)).verdicts["method.r=16"]
        for where in ("params.`method.r` != '8'", None)
    )
    assert alone.p == among.p  # what is not tested is no comparison to correct for
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert report._counts(found.rows[1:], found) == "1 not tested, 1 significantly different"
    (own,) = {*found.ties["method.r=8"]}
    assert own not in found.ties["method.r=4"] + found.ties["method.r=16"]


def test_rows_with_several_seeds_on_other_held_out_rows_are_not_tested_either(past_runs):
    for seed in (1, 2, 3):
        past_runs(shifted(seed / 50), seed=seed, method__r=4)
        past_runs(shifted(4.0 + seed / 50), seed=seed, method__r=8, data__evaluation_fingerprint="other rows")
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    (verdict,) = found.verdicts.values()
    assert verdict.text == "not tested +4.0000; scored on other held-out rows than the baseline"
    assert found.ties == {"method.r=4": "a", "method.r=8": "b"}
    assert found.too_few_seeds == ""  # more seeds would not help
    notes = report.markdown(found)
    assert "scored on different held-out rows share none, and are not tested" in notes
    assert "scored on other held-out rows than the baseline" in report.latex(found)
