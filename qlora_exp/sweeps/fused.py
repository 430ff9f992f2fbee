"""Group jobs of a sweep that share a base model, to train them in one process (`sweep.fuse`)."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.config.tables.peft_methods import moves_base_weights
from qlora_exp.sweeps.jobs import Job, Place
from qlora_exp.utils.digests import json_digest

MOST = 8
"""Jobs of a group that is as large as fits, `sweep.fuse=auto`."""
_TRAINS_BASE = ("LN_TUNING", "BITFIT")
"""Methods whose trained parameters are the base's own."""
_TOGETHER = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "fan_in_fan_out",
})  # fmt: skip
"""Settings of LoRA with which rows of several jobs go through the base together."""


@dataclass(frozen=True)
class Group:
    """Jobs that train in one process."""

    jobs: Sequence[Job]
    place: Place
    by_turns: str | None = None
    """Why their rows do not go through the base in one pass, although `sweep.fused_rows` asks for it."""


def jobs_at_once(settings: SweepConfig) -> int:
    """Return how many jobs a sweep trains at the same time at most: so many trials a search proposes together."""
    match settings.fuse:
        case "off":
            return settings.n_jobs
        case "auto":
            return settings.n_jobs * MOST
        case int(size):
            return settings.n_jobs * size


def described(job: Job, grouped: Mapping[str, Group]) -> str:
    """Return with how many others a job is trained, and how; or why it is alone."""
    if (group := grouped.get(job.key)) is None:
        return f"alone: {why_alone(job.config) or 'no other job has its base'}"
    how = "rows in one pass" if group.place.rows_together else "by turns"
    if group.place.at_once < len(group.jobs):
        how = f"{group.place.at_once} at a time, {how}"
    why = f" because of {group.by_turns}" if group.by_turns else ""
    return f"group {group.place.group + 1}: {len(group.jobs)} jobs, {how}{why}"


def why_alone(config: Config) -> str | None:
    """Return why a job cannot share its base model with others; None if it can."""
    method, quantization, settings = config.method, config.quantization, config.peft_settings
    if config.distributed.engine != "none":
        return "it has processes of its own"
    if method.peft_type is None or method.peft_type in _TRAINS_BASE or settings.get("bias", "none") != "none":
        return f"method={method.name} trains weights of the base"
    if moves_base_weights(config.new_start) or config.lora_start == "loftq":
        return f"init_lora_weights={config.lora_start} changes weights of the base"
    if quantization.quantized and not quantization.bitsandbytes:
        return f"quantization={quantization.name} cannot be shared"
    if config.model.device_map:
        return "model.device_map spreads its base"
    if config.model.trust_remote_code:
        return "its model has code of its own"
    if config.training.torch_compile:
        return "training.torch_compile compiles its model"
    if config.training.tune is not None:
        return "training.tune chooses for a job that has the device alone"
    return None


def why_by_turns(config: Config) -> str | None:
    """Return why rows of a job, which shares its base, cannot go through it with those of others; None if they can."""
    training = config.training
    if config.method.peft_type != "LORA":
        return f"method={config.method.name}"
    if others := sorted(name for name, value in config.peft_settings.items() if value and name not in _TOGETHER):
        return f"{config.lora_variant.name}'s {others[0]}"
    for key in ("activation_offloading", "tiled_mlp", "recomputed_layers"):
        if getattr(training, key):
            return f"training.{key}"
    if training.neftune_noise_alpha:
        return "training.neftune_noise_alpha"
    if config.model.new_tokens:
        return "model.new_tokens"
    if config.quantization.load_in_8bit and config.quantization.llm_int8_threshold:
        return "quantization.llm_int8_threshold, which chooses columns by the rows of all"
    return None


def joins(config: Config, group: Group) -> bool:
    """Return whether a further job can be trained with those of a group."""
    if why_alone(config) is not None or (group.place.rows_together and why_by_turns(config) is not None):
        return False
    return json_digest(_kind(config)) == json_digest(_kind(group.jobs[0].config))


def groups(jobs: Sequence[Job], settings: SweepConfig) -> list[Group]:
    """Return the groups of a sweep's jobs; a job that has to be alone is a group of one.

    Args:
        jobs: the jobs to run, in order.
        settings: `sweep` of the config.
    """
    alike: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        alike[json_digest(_kind(job.config)) if why_alone(job.config) is None else job.key].append(job)
    made: list[Group] = []
    for found in alike.values():
        reasons = [why for job in found if (why := why_by_turns(job.config))] if settings.fused_rows else []
        together = settings.fused_rows and not reasons
        most = _most(found, settings, together)
        # A process for all, or as many as run at once, with jobs to go on with; alone, each has its own.
        processes = min(settings.n_jobs, math.ceil(len(found) / most)) if most > 1 else len(found)
        size = math.ceil(len(found) / processes)
        for begin in range(0, len(found), size):
            place = Place(len(made), together, min(most, size))
            made.append(Group(found[begin : begin + size], place, next(iter(reasons), None)))
    return made


def _most(jobs: Sequence[Job], settings: SweepConfig, together: bool) -> int:
    if settings.fuse == "off" or len(jobs) == 1:
        return 1
    if settings.fuse != "auto":
        return settings.fuse
    from qlora_exp.planning import screening

    return screening.most_together([job.config for job in jobs], settings.vram, together, MOST)


def _kind(config: Config) -> Any:
    """Return what jobs must have in common to share a base."""
    training = config.training
    return [
        config.model.model_dump(mode="json", exclude={"adapter", "chat_template"}),
        config.quantization.model_dump(mode="json"),
        [config.device, training.bf16, training.fp16, training.gradient_checkpointing],
        training.sft_config.get("gradient_checkpointing_kwargs"),
    ]
