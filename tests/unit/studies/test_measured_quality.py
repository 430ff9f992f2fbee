"""Past runs tell methods apart only where they trained on the same, and as long."""

from dataclasses import dataclass

from qlora_exp.config.hydra_compose import compose
from qlora_exp.results.record import Record
from qlora_exp.studies.measured_quality import of_runs

CONFIGS = {name: compose([f"method={name}", "model=tiny_llama"]) for name in ("lora", "qlora", "full", "ia3")}


@dataclass(frozen=True)
class Run(Record):
    def curve(self, metric: str) -> list[tuple[int, float]]:
        return []

    def text(self, path: str) -> str:
        return ""

    def seed_losses(self) -> list[float]:
        return []


def run(method: str, loss: float, seed: int, **changes: str) -> Run:
    config = CONFIGS[method]
    params = {
        "model.model_name_or_path": config.model.model_name_or_path,
        "dataset.path": config.dataset.path,
        "method.name": method,
        "method.r": "16",
        "quantization.load_in_4bit": str(method == "qlora"),
        "seed": str(seed),
        "data.evaluation_fingerprint": "e",
        "training.max_steps": "30",
    }
    name = f"{method}-{seed}"
    return Run(name, name, params | changes, {"outcome": "ok"}, {"after/loss": loss})


def test_best_settings_of_each_method_are_compared():
    runs = [run("lora", 3.0 + seed / 100, seed) for seed in (1, 2, 3)]
    runs += [run("lora", 3.5, 1, **{"method.r": "8"})]
    runs += [run("qlora", 4.0 + seed * seed / 100, seed) for seed in (1, 2, 3)]
    runs += [run("ia3", 1.0, 1, **{"data.evaluation_fingerprint": "other"})]
    found, notes = of_runs(runs, CONFIGS)
    assert found.keys() == {"lora", "qlora"}
    assert found["lora"].verdict == ""
    assert found["lora"].runs == ["lora-1", "lora-2", "lora-3"]
    assert found["qlora"].worse
    assert found["qlora"].verdict.startswith("worse +1.0")
    assert "the best of 2 settings of lora" in notes


def test_runs_of_another_model_or_failed_ones_say_nothing():
    other = run("lora", 1.0, 1, **{"model.model_name_or_path": "another"})
    assert of_runs([other], CONFIGS) == ({}, [])
