"""The same rows in every form; differences are paired, and are those that were put there."""

from dataclasses import replace

import numpy as np
import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy.formats import DEPLOYED
from qlora_exp.studies import deployment_gap
from qlora_exp.studies.deployment_gap import Measured, formats_of, gaps
from qlora_exp.utils.errors import ConfigError


def measured(form: str, losses, scores=(), **metrics) -> Measured:
    rows = [{"nll": 10 * loss, "tokens": 10} for loss in losses]
    samples = [{"rougeL": score} for score in scores]
    return Measured(form, "", 1, {"loss": float(np.mean(losses))} | metrics, rows, samples)


def test_gap_is_the_paired_difference_of_rows():
    base = np.random.default_rng(0).normal(3, 1, 40)
    noise = np.random.default_rng(1).normal(0, 0.01, 40)
    found = gaps([measured("trained", base), measured("nf4", base + 0.1 + noise), measured("merged", base + noise)])
    (nf4,), (merged,) = found["nf4"], found["merged"]
    assert nf4.value == pytest.approx(0.1, abs=0.01)
    assert nf4.low < 0.1 < nf4.high
    assert nf4.high - nf4.low < 0.02  # far less than the rows differ among themselves
    assert nf4.p < 1e-6
    assert merged.low < 0 < merged.high
    assert merged.p > 0.05


def test_scores_are_compared_where_both_have_them():
    first = measured("trained", [3, 4], [0.1, 0.3], rougeL=0.2)
    found = gaps([first, measured("int8", [3, 4], [0.2, 0.4], rougeL=0.3), measured("gguf_q8_0", [3, 4])])
    assert [(gap.metric, round(gap.value, 6)) for gap in found["int8"]] == [("loss", 0), ("rougeL", 0.1)]
    assert [gap.metric for gap in found["gguf_q8_0"]] == ["loss"]


def test_scores_of_packages_are_compared_too():
    one, other = (measured(form, [3, 4], **{"metric/length": length}) for form, length in (("trained", 5), ("nf4", 7)))
    one, other = (
        replace(each, samples=[{"metric/length": each.metrics["metric/length"] + n} for n in (-1, 1)])
        for each in (one, other)
    )
    assert [(gap.metric, gap.value) for gap in gaps([one, other])["nf4"]] == [("loss", 0), ("metric/length", 2)]
    (_, (headings, _)) = deployment_gap.tables([one, other])
    assert headings == ["format", "metric/length", "change"]


def test_only_differing_scores_are_shown():
    same = [measured(form, [3, 4], [0.1], rougeL=0.1) for form in ("trained", "nf4")]
    assert len(deployment_gap.tables(same)) == 1
    other = [same[0], measured("nf4", [3, 4], [0.2], rougeL=0.2)]
    (_, (_, rows)) = deployment_gap.tables(other)
    assert rows[0] == ["trained", "0.1000", "-"]
    assert rows[1][2].startswith("+0.100")


@pytest.mark.parametrize(
    ("words", "adapter", "forms"),
    [
        (["method=qlora"], True, [name for name in DEPLOYED if name not in ("gptq", "w4a16")]),
        (
            ["method=qlora", "lora_variant=loftq"],
            True,
            [name for name in DEPLOYED if name not in ("merged_files", "gptq", "w4a16")],
        ),
        (["method=lora"], True, [name for name in DEPLOYED if name not in ("merged_files", "gptq", "w4a16")]),
        (["method=full"], False, ["trained", "nf4", "int8", "gguf_q8_0", "gguf_q4_0"]),
    ],
    ids=str,
)
def test_measured_formats_are_those_that_make_sense(words, adapter, forms, monkeypatch):
    config = compose(words)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert formats_of(config, adapter, "llama") == forms
    assert formats_of(config, adapter, "opt") == [name for name in forms if not name.startswith("gguf")]
    with pytest.raises(ConfigError, match="--forms gguf_q8_0: --to gguf: models of type opt are not supported"):
        formats_of(config, adapter, "opt", ["nf4", "gguf_q8_0"])
    assert formats_of(config, adapter, "llama", ["int8"]) == ["trained", "int8"]
    with pytest.raises(ConfigError, match="choose from trained, merged"):
        formats_of(config, adapter, "llama", ["int9"])
    if "merged_files" not in forms:
        with pytest.raises(ConfigError, match="does not apply"):
            formats_of(config, adapter, "llama", ["merged_files"])


def test_results_are_kept_if_a_format_fails(tmp_path, monkeypatch):
    def work(function, source, uri, where, form, *_):
        if function is deployment_gap._make and form in ("nf4", "int8"):
            raise ConfigError("no such layer") if form == "nf4" else ZeroDivisionError
        return measured(source, [3, 4])

    monkeypatch.setattr(deployment_gap, "_in_own_process", work)
    config = compose(["method=lora"])
    found, failed = deployment_gap.study("a", None, config, ["trained", "nf4", "int8", "merged"], tmp_path, print)
    assert len(found) == 2
    assert failed.keys() == {"nf4", "int8"}
    assert deployment_gap.as_json(found, failed, "a")["failed"]["nf4"] == "no such layer"
