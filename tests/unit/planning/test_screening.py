"""Jobs that would not fit are told apart by planning them."""

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning.fit import needed_for
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.planner import planner
from qlora_exp.planning.screening import most_together, unfit
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow

TINY = [
    "model=tiny_llama",
    "+model.architecture={_name_or_path: random:llama, model_type: llama, num_hidden_layers: 2}",
    "training.max_length=64",
    "method=lora",
]


def test_oversized_config_is_explained_and_unplannable_config_is_kept():
    large = "++model.architecture.hidden_size=8192"
    configs = [compose([*TINY, *words]) for words in ([], [large], ["quantization=quanto_int4"], [large, "seed=1"])]
    small, too_large, unknown, again = unfit(configs, 3.0)
    assert (small, unknown) == ("", "")
    assert too_large.startswith("does not fit: ")
    assert again.endswith("and there are 3 GiB (GPU)")
    assert too_large.startswith(f"{again}; it would fit with quantization=nf4_double")


def test_run_that_its_tuning_makes_fit_is_not_unfit():
    words = [*TINY, "training.max_length=512", "training.per_device_train_batch_size=32"]
    words.append("training.per_device_eval_batch_size=1")
    gpu = Gpu("GPU", 0.0)
    peaks = [planner(compose([*words, f"training.per_device_train_batch_size={rows}"]), gpu.device).predict().peak
             for rows in (32, 4)]  # fmt: skip
    gib = needed_for(sum(peaks) / 2, gpu)
    (fixed, again, tuned) = unfit(
        [compose(words), compose([*words, "seed=7"]), compose([*words, "training.tune=auto"])], gib
    )
    assert fixed.startswith(f"{again}; ")
    assert again.startswith("does not fit: ")
    assert tuned == ""


def test_damaged_calibration_is_reported_before_planning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "calibration.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        unfit([compose(TINY)], 4.0)


@pytest.mark.thorough
def test_evaluation_batches_of_jobs_in_one_pass_are_planned_too():
    words = [*TINY, "training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=64"]
    config, gpu = compose([*words, "training.max_length=256"]), Gpu("GPU", 0.0)
    one, two = (planner(config, gpu.device).predict(jobs=jobs) for jobs in (1, 2))
    assert two.phases["evaluation"].tensors > 1.5 * one.phases["evaluation"].tensors > two.phases["steady"].tensors
    gib = needed_for((one.peak + two.peak) / 2, gpu)
    assert most_together([config, config], gib, rows_together=True, most=2) == 1
    assert most_together([config, config], gib, rows_together=False, most=2) == 2


def test_a_plan_of_several_jobs_in_one_pass_has_the_batches_of_all():
    config = compose([*TINY, "training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=64"])
    made = planner(config, Gpu("GPU", 0.0).device)
    one, two = (made.predict(jobs=jobs).phases for jobs in (1, 2))
    assert two["steady"].tensors > one["steady"].tensors
    activations = one["evaluation"].kinds["activations"], two["evaluation"].kinds["activations"]
    assert activations[1] == pytest.approx(2 * activations[0], rel=0.02)


@pytest.mark.parametrize("kind", ["training.packing=true", "training.padding=free"])
def test_packed_rows_of_jobs_in_one_pass_have_a_sequence_for_each_job(kind: str):
    config = compose([*TINY, "model.attn_implementation=eager", "training.per_device_train_batch_size=4", kind])
    made = planner(config, Gpu("GPU", 0.0).device)
    peaks = [made.predict(jobs=jobs).phases["steady"].tensors for jobs in (1, 2, 3)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.1)  # not the square of all rows
