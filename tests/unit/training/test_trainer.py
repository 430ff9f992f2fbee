from pathlib import Path

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.training.arguments import arguments
from qlora_exp.training.checkpoints import checkpoint_to_resume

CPU = Device("cpu", "CPU", bf16=False, paging=False)
GPU = Device("cuda", "GPU", bf16=True, paging=True, visible_gpus=2)


def test_all_trainer_arguments_are_set_explicitly():
    config = compose(["training.weight_decay=0.01", "optimizer.adam_beta2=0.95", "training.warmup_steps=0.03"])
    found = arguments(config, resolve(config, CPU), Path("out"))
    assert (found.bf16, found.fp16, found.gradient_checkpointing) == (False, False, False)
    assert (found.weight_decay, found.adam_beta2, found.warmup_steps) == (0.01, 0.95, 0.03)
    assert found.report_to in ([], ["none"])
    assert (found.seed, found.data_seed) == (42, 42)


def test_trainer_counts_one_of_the_visible_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = compose(["training.bf16=false"])
    found = arguments(config, resolve(config, GPU), Path("out"))
    assert (found.n_gpu, found.train_batch_size) == (1, found.per_device_train_batch_size)


def test_interrupted_run_of_a_method_that_cannot_resume_starts_over(tmp_path):
    folder = tmp_path / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    assert checkpoint_to_resume(compose(["method=adalora"]), tmp_path, resumed=True) is None
