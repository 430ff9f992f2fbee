"""Two processes are compared with one: what they train, and what they save."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora_exp.config.tables.compatibility import WORKS
from qlora_exp.studies.engines import check_same, engine_verdicts
from qlora_exp.studies.probe import FailedError, kinds

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.thorough
@pytest.mark.usefixtures("_imported")
def test_method_with_unused_parameters_trains_as_one_process(tmp_path):
    assert engine_verdicts(kinds()["SHADOW"], "plain", tmp_path, ["ddp"]) == {"ddp": WORKS}


def test_difference_is_detected(shared_run, tmp_path):
    one = shared_run("method=lora", "evaluation=loss_only")
    check_same(one, one)
    other = dataclasses.replace(one, metrics=one.metrics | {"after/loss": one.metrics["after/loss"] * 1.0001})
    with pytest.raises(FailedError, match=r"do not train as one \(after/loss: "):
        check_same(other, one)

    shutil.copytree(one.output_dir, tmp_path / "other")
    file = tmp_path / "other" / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.any())
    save_file(weights | {name: weights[name] * 1.01}, file)
    with pytest.raises(FailedError, match=f"{name} differs"):
        check_same(dataclasses.replace(one, output_dir=tmp_path / "other"), one)
