"""The verdicts that are kept refuse what fails, before anything is loaded; what nobody tried is not refused."""

import itertools
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from helpers.scripts import script

from qlora_exp.config import crosschecks
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.compatibility import ASPECTS, BASES, DIFFERS, ENGINE_BASES, ENGINES, WORKS
from qlora_exp.studies.probe import kinds, name_of
from qlora_exp.utils.errors import ConfigError

ROOT = Path(__file__).parents[4]
KEPT = json.loads(compatibility.FILE.read_text("utf-8"))


def test_every_method_and_variant_was_tried_on_every_base():
    kept, lacking = KEPT["verdicts"], set()
    for kind in kinds():
        bases = kept.get(kind, {})
        for base in BASES:
            verdicts = bases.get(base, {})
            tried = {*ASPECTS, *(ENGINES if base in ENGINE_BASES else ())}
            if verdicts.keys() != (tried if verdicts.get("trains") == WORKS else {"trains"}):
                lacking.add(kind)
    commands = [f"'{name_of(words)}'" for kind, words in kinds().items() if kind in lacking]
    assert not commands, f"not tried on every base: run nox -s compatibility -- {' '.join(commands)}"
    gone = sorted(kept.keys() - kinds().keys())
    assert not gone, f"no file in conf/ any more: {', '.join(gone)}; any run of nox -s compatibility drops them"
    assert {base for bases in kept.values() for base in bases} == BASES.keys()


def test_compatibility_page_matches_the_verdicts():
    text = script("compatibility").table(KEPT["verdicts"], KEPT["libraries"], KEPT["families"])
    if (ROOT / "docs" / "reference" / "compatibility.md").read_text("utf-8") != text:
        why = "docs/reference/compatibility.md is not what compatibility.json says"
        pytest.fail(f"{why}: run nox -s compatibility -- NAME, with the method that you changed", pytrace=False)


@pytest.mark.parametrize(
    ("chosen", "hint"),
    [
        (["lora", "dora"], "no such method: 'dora'; did you mean 'lora dora'?"),
        (["lora drora"], "did you mean 'lora dora'"),
        (["IA3"], "did you mean 'ia3'?"),
        (["LORA+dora"], "did you mean 'lora dora'?"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest_and_the_form(chosen: list[str], hint: str):
    compatible = script("compatibility")
    problem = compatible.unknown(chosen, [*map(name_of, kinds().values())])
    assert hint in problem
    assert problem.endswith("in quotes: nox -s compatibility -- 'lora dora'")
    assert compatible.unknown(["ia3", "lora dora"], ["ia3", "lora dora"]) == ""


def test_missing_packages_are_told_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch, capsys):
    compatible = script("compatibility")

    def found(name: str) -> str:
        if name in ("torchao", "optimum-quanto"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(compatible, "version", found)
    monkeypatch.setattr("sys.argv", ["compatibility.py", "ia3", "--check"])
    with pytest.raises(SystemExit) as ended:
        compatible.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("not installed: torchao, optimum-quanto: `nox -s compatibility` installs them")
    assert len((printed.out + printed.err).splitlines()) == 1


def test_no_method_is_refused_on_a_whole_family_for_the_sizes_of_its_tiny_model():
    """Each of these was looked at; an error that only sizes cause must be refused by what the model has instead."""
    whole = {
        (family, kind)
        for family, verdicts in KEPT["families"].items()
        for kind, verdict in verdicts.items()
        if not verdict.startswith(compatibility.REFUSED)
    }
    assert whole == {
        ("falcon", "LORA+lora_ga"),
        ("mamba", "LORA+loftq"),  # no base of Mamba is stored in 4 bits
        *itertools.product(["falcon_h1", "mamba2"], ["CARTRIDGE", "PREFIX_TUNING"]),  # states take no prefix
        *itertools.product(["deepseek_v3"], ["GRALORA", "OFT"]),  # kv_b_proj's input has four dimensions
    }


def test_verdicts_are_of_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert KEPT["libraries"] == {name: pinned[name] for name in KEPT["libraries"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=hra", "quantization=int8"], r"method=hra cannot train a base stored as int8 \(gradients are not"),
        (["method=full", "quantization=nf4"], "method=full cannot train a base stored as nf4"),
        (["method=prefix_tuning", "training.packing=true"], r"does not work with packing .*use training.packing=false"),
        (["method=prefix_tuning", "training.gradient_checkpointing=true"], "does not work with gradient_checkpointing"),
        (["method=adalora", "training.resume_from_checkpoint=."], "does not work with resume"),
    ],
)
def test_failing_combination_is_rejected_with_its_reason(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose(words)


@pytest.mark.slow
def test_engine_is_rejected_where_it_fails_and_nowhere_else():
    stored = {base: compose(["method=lora", f"quantization={BASES[base]}"]).quantization for base in ENGINE_BASES}
    for kind, words in kinds().items():
        needed = ["method.token_indices=[41]"] if kind == "TRAINABLE_TOKENS" else []
        if not (able := [base for base in ENGINE_BASES if KEPT["verdicts"][kind][base]["trains"] == WORKS]):
            continue
        config = compose([*words, *needed, f"quantization={BASES[able[0]]}", "method.quantized_base=null"])
        for base in able:
            verdicts = KEPT["verdicts"][kind][base]
            for engine in ENGINES:
                shared = config.distributed.model_copy(update={"engine": engine})
                changed = {"distributed": shared, "quantization": stored[base]}
                problems = [*crosschecks.problems(config.model_copy(update=changed))]
                works = verdicts[engine] == WORKS or verdicts[engine].startswith(DIFFERS)
                assert len(problems) == (not works), (kind, base, engine, problems)
                assert all(f"distributed={engine} cannot" in line and "choose another" in line for line in problems)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("ddp", "distributed=ddp cannot train method=lora (it hangs): choose another method, or distributed=none"),
        ("fsdp", "distributed=fsdp cannot train method=lora (it aborts): choose another method, or distributed=none"),
    ],
)
def test_engine_is_rejected_with_the_reason_of_the_table(engine: str, message: str, monkeypatch):
    verdicts = {"LORA": {"plain": {"ddp": "it hangs", "fsdp": "it aborts"}, "4bit": {"ddp": f"{DIFFERS}it samples"}}}
    monkeypatch.setattr(compatibility, "_verdicts", lambda: verdicts)
    with pytest.raises(ConfigError) as error:
        compose(["method=lora", f"distributed={engine}"])
    assert str(error.value) == message
    assert compose(["method=lora", "quantization=nf4", f"distributed={engine}"])


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        compose(["method=hra", "quantization=int8", "lora_variant=dora", "optimizer=loraplus"])
    assert len(str(error.value).splitlines()) == 3


def test_untested_combination_is_accepted(monkeypatch):
    monkeypatch.setattr(compatibility, "_verdicts", dict)
    assert compose(["method=hra", "quantization=int8"])
    assert compatibility.kind_of("LORA", "dora") == "LORA"


def test_verdicts_are_ignored_while_probing():
    with compatibility.ignored():
        assert compose(["method=hra", "quantization=int8"])
    with pytest.raises(ConfigError):
        compose(["method=hra", "quantization=int8"])


@pytest.mark.parametrize(("variant", "kind"), [("lora", "LORA"), ("dora", "LORA+dora"), ("my_own", "LORA")])
def test_lora_variant_has_its_own_verdicts(variant: str, kind: str):
    assert compatibility.kind_of("LORA", variant) == kind


@pytest.mark.parametrize("words", [["lora_variant=pissa", "quantization=nf4"], ["lora_variant=loftq"]])
def test_same_reason_is_reported_once(words: list[str]):
    with pytest.raises(ConfigError) as error:
        compose(["method=lora", *words])
    assert len(str(error.value).splitlines()) == 1
