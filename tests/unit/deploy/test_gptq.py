"""What can be made is known before anything is loaded; GPTQ files themselves: `nox -s gptq`."""

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy import export, gptq, load
from qlora_exp.deploy.formats import GPTQ_FORMATS
from qlora_exp.models.base import load_tokenizer
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize("form", GPTQ_FORMATS)
def test_missing_gptq_package_is_named(form, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="nox -s gptq"):
        gptq.check(form)


def test_awq_without_a_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gptq.check("gptq")
    with pytest.raises(ConfigError, match="on a GPU only"):
        gptq.check("awq")


def test_calibration_uses_the_runs_training_rows():
    config = compose(["model=tiny_llama", "dataset.max_train_rows=200", "training.max_length=50"])
    found = gptq.rows(config, load_tokenizer(config.model))
    assert len(found) == gptq.ROWS
    assert {len(one["input_ids"]) for one in found} == {50}
    with pytest.raises(ConfigError, match="no training row has 10 tokens"):
        gptq.rows(compose(["model=tiny_llama", "training.max_length=9"]), load_tokenizer(config.model))


def test_record_cannot_choose_local_files_for_calibration(trained_adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "check", lambda _: None)
    (tmp_path / "elsewhere").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    saved = load.find(str(trained_adapters()), device="cpu")
    data = saved.config.dataset.model_copy(update={"path": str(rows)})
    saved = export.replace(saved, config=saved.config.model_copy(update={"dataset": data}))
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="outside of this folder"):
        export.export(saved, tmp_path / "made", "gptq")
    assert not (tmp_path / "made").exists()
