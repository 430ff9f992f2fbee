"""Print plans and advice as tables: where memory goes, whether it fits, the time of a step. Does not plan itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_exp.config.schema import Config
from qlora_exp.planning.advisor import GPUS, Fit, Option, Sized, advice, choose, remedies
from qlora_exp.planning.fit import (
    WORST_ERROR,
    WORST_ERROR_OF_SEVERAL,
    communication_seconds,
    expected,
    outside,
    room,
    step_seconds,
    verdict,
    worst_error,
)
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.replay import KINDS
from qlora_exp.utils.tables import print_table
from qlora_exp.utils.text import shortened
from qlora_exp.utils.units import GIB, MIB

_BASIS = (
    "most rows: largest batch of rows of training.max_length tokens; longest row: in a batch of one row;\n"
    "GPUs: how many train one row of training.max_length each with distributed=fsdp;\n"
    "rows assume that training.per_device_eval_batch_size is no larger than the training batch"
)
_LONGER = (
    "longer   rows: the same with training=long_rows, which keeps inputs of layers in the machine's memory, and\n"
    "         computes MLPs in tiles; model.architecture.max_position_embeddings=N tries rows beyond its positions"
)
_LEFT_OUT = "left out: generation, data loading; all rows are assumed to have training.max_length tokens"


@dataclass(frozen=True)
class Planned:
    """A run and its prediction."""

    words: Sequence[str]
    config: Config | None
    prediction: Prediction | None
    gpu: Gpu
    """The device that the run was planned for."""
    why: str = ""
    """Reason why there is no prediction."""
    tuned: str | None = None
    """What `training.tune` chose."""


def show_one(planned: Planned, price: float | None) -> None:
    """Print the plan of one run: memory by phase and kind, then totals, work, time and error."""
    config, prediction, gpu = planned.config, planned.prediction, planned.gpu
    assert config is not None
    assert prediction is not None
    phases = prediction.phases.values()
    rows = [[kind, *(f"{phase.kinds.get(kind, 0) / MIB:,.0f}" for phase in phases)] for kind in KINDS]
    rows = [row for row in rows if set(row[1:]) != {"0"}]
    if gpu.type != "cpu":
        rows.append(["allocator", *(f"{(phase.reserved - phase.tensors) / MIB:,.0f}" for phase in phases)])
    rows.append(["all", *(f"{phase.reserved / MIB:,.0f}" for phase in phases)])
    of_each = f", of each of {prediction.ranks} processes" if prediction.ranks > 1 else ""
    print_table(f"peak memory of each phase, MiB{of_each}", ["", *prediction.phases], rows)
    moved = ", before EVA moves ranks between layers" if config.lora_start == "eva" else ""
    print(f"trained  {prediction.trainable:,} of {prediction.total:,} parameters{moved}")
    print(f"memory   {expected(prediction, gpu) / GIB:.2f} GiB{_whether_it_fits(prediction, gpu)}")
    if prediction.unquantized:
        print(f"stored   {prediction.unquantized}")
    if prediction.paged:
        print(
            f"paged    {prediction.paged / GIB:.2f} GiB of optimizer states in addition, on the GPU while there is room"
        )
    if pinned := prediction.activations_offloaded:
        print(f"offload  {pinned / GIB:.2f} GiB of the machine's memory, pinned, for activations")
    _show_several(prediction, gpu)
    flops, traffic = (sum(getattr(work, name) for work in prediction.work) for name in ("flops", "nbytes"))
    print(f"work     {flops / 1e12:,.2f} TFLOP and {traffic / 1e9:,.0f} GB of traffic for a forward and backward pass")
    if (seconds := step_seconds(prediction, gpu)) is not None:
        print(f"time     {_time(config, seconds, price)}, at {gpu.rates}{_time_error(gpu)}")
    if planned.tuned:
        print(f"tuned    {planned.tuned}")
    print(f"error    {_error(gpu, prediction.ranks)}")
    print(_LEFT_OUT)
    if _verdict(prediction, gpu).startswith("does not fit"):  # which plans a few more runs
        print(f"instead  {advice(remedies(config, gpu))}")


def _show_several(prediction: Prediction, gpu: Gpu) -> None:
    """Print what several processes keep outside their GPUs, and what each sends."""
    if prediction.ranks == 1:
        return
    if prediction.offloaded:
        gib = prediction.offloaded / GIB
        print(f"offload  {gib:.2f} GiB of the machine's memory for each process, {prediction.ranks * gib:,.1f} for all")
    sent = prediction.traffic
    text = f"{sent.total / 1e9:,.2f} GB by each process for a step"
    if sent.gathered:
        text += f", {sent.gathered / 1e9:,.2f} of it weights"
    if (seconds := communication_seconds(prediction, gpu)) is not None:
        text += f"; {seconds:.3g} s at {gpu.link_gb_per_s:g} GB/s, as far as it does not overlap with computing"
    else:
        text += " (add --bandwidth GB/s to see the time)"
    print(f"sends    {text}")


def show_many(planned: Sequence[Planned], price: float | None) -> None:
    """Print one line for each run."""
    rows = []
    common = set.intersection(*(set(run.words) for run in planned))
    for run in planned:
        name = " ".join(shortened(word) for word in run.words if word not in common)
        if run.config is None or run.prediction is None:
            rows.append([name, "-", "-", run.why, "-"])
            continue
        gpu = run.gpu
        name += f" ({run.tuned.partition(':')[0]})" if run.tuned else ""
        seconds = step_seconds(run.prediction, gpu)
        rows.append(
            [
                name,
                f"{expected(run.prediction, gpu) / GIB:.2f}"
                + (f" x {ranks}" if (ranks := run.prediction.ranks) > 1 else ""),
                _verdict(run.prediction, gpu),
                "" if seconds is None else _time(run.config, seconds, price),
                _sent(run.prediction, gpu),
            ]
        )
    shared = f", all with {' '.join(shortened(word) for word in planned[0].words if word in common)}" if common else ""
    headings = ["run", "GiB", "", "time", "sends"]
    if not any(run.prediction and run.prediction.ranks > 1 for run in planned):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    print_table(f"{len(rows)} runs{shared}", headings, rows)
    most = max((run.prediction.ranks for run in planned if run.prediction), default=1)
    for gpu in dict.fromkeys(run.gpu for run in planned):
        print(f"{gpu.name}: times at {gpu.rates}; error {_error(gpu, most)}")
    print(_LEFT_OUT)


def show_card(options: Sequence[Option], why: Mapping[str, str], gpu: Gpu) -> None:
    """Print memory, largest batch and speed of each option on one GPU, and which option to choose."""
    timed = bool(gpu.tflops or (gpu.calibration and gpu.calibration.flops_per_second))
    rows = []
    for option in options:
        planned, fit = option.planned, option.fits[gpu]
        seconds = step_seconds(planned, gpu)
        tokens = option.config.training.per_device_train_batch_size * option.config.training.max_length
        tokens *= option.config.training.gradient_accumulation_steps
        rows.append(
            [
                option.name,
                f"{planned.trainable / 1e6:,.1f} M",
                f"{expected(planned, gpu) / GIB:.1f}",
                verdict(planned, gpu),
                f"{fit.rows:,}" if fit.rows else "-",
                f"{fit.length:,}" if fit.length else "-",
                f"{fit.gpus}" if fit.gpus else f"over {GPUS[-1]}",
                *(["" if seconds is None else f"{tokens / seconds:,.0f}"] if timed else []),
            ]
        )
    training = options[0].config.training
    batch = f"{training.per_device_train_batch_size} rows of {training.max_length} tokens"
    title = f"{options[0].config.model.model_name_or_path} in {gpu.memory_gib:g} GiB ({gpu.name}), batches of {batch}"
    headings = ["", "trained", "GiB", "", "most rows", "longest row", "GPUs", "tokens/s"]
    print_table(title, headings if timed else headings[:-1], rows)
    _show_reasons(why)
    chosen, reason = choose(options, gpu)
    if chosen:
        print(f"choose   {chosen}: {reason}")
    print(f"{_BASIS}; tokens/s at {gpu.rates}" if timed else _BASIS)
    _show_longer(options)
    _show_room(gpu, max(option.planned.ranks for option in options))


def show_cards(options: Sequence[Option], why: Mapping[str, str], cards: Sequence[Gpu]) -> None:
    """Print the largest batch and the longest row of each option on GPUs of several sizes."""
    length = options[0].config.training.max_length
    rows = []
    for card in cards:
        reaches = [_rows_and_length(option.fits[card]) for option in options]
        rows.append([f"{card.memory_gib:g}", *reaches, choose(options, card)[0]])
    title = (
        f"{options[0].config.model.model_name_or_path}: most rows of {length} tokens | longest row in a batch of one"
    )
    print_table(title, ["GiB", *(option.name for option in options), "choose"], rows)
    _show_reasons(why)
    print(_BASIS)
    _show_longer(options)
    _show_room(cards[0], max(option.planned.ranks for option in options))


def show_models(models: Sequence[Sized], why: Mapping[str, str], cards: Sequence[Gpu]) -> None:
    """Print the largest model for each GPU size and each method."""
    names, ranks = dict.fromkeys(name for model in models for name in model.needs), max(one.ranks for one in models)
    rows = []
    for card in cards:
        most, cells = room(card, ranks=ranks), []
        for name in names:
            fitting = [model for model in models if name in model.needs and model.needs[name] <= most]
            cells.append(_billions(fitting[-1]) if fitting else "-")
        rows.append([f"{card.memory_gib:g}", *cells])
    print_table("largest model for each GPU size", ["GiB", *names], rows)
    print("models  ", ", ".join(f"{_billions(model)} {model.name}" for model in models))
    _show_reasons(why)
    _show_room(cards[0], ranks)


def _show_longer(options: Sequence[Option]) -> None:
    """Say how rows can be longer, if the options do not do that already."""
    if not any(option.config.training.activation_offloading for option in options):
        print(_LONGER)


def _sent(prediction: Prediction, gpu: Gpu) -> str:
    if prediction.ranks == 1:
        return ""
    seconds = communication_seconds(prediction, gpu)
    return f"{prediction.traffic.total / 1e9:,.2f} GB" + ("" if seconds is None else f", {seconds:.3g} s")


def _billions(model: Sized) -> str:
    return f"{model.parameters / 1e9:.1f} B"


def _rows_and_length(fit: Fit) -> str:
    if fit.rows or fit.length:
        return f"{fit.rows:,} | {fit.length:,}"
    return f"on {fit.gpus} GPUs" if fit.gpus else "-"


def _show_reasons(why: Mapping[str, str]) -> None:
    for reason in dict.fromkeys(why.values()):
        print(f"{'; '.join(name for name, own in why.items() if own == reason)}: {reason}")


def _verdict(prediction: Prediction, gpu: Gpu) -> str:
    """Return whether a run fits, as text; empty if that cannot be judged.

    A CPU's plan covers tensors only, so it needs a calibration from past runs to account for the rest.
    """
    if not gpu.memory_gib or (gpu.type == "cpu" and gpu.calibration is None):
        return ""
    return f"{verdict(prediction, gpu)} in {gpu.memory_gib:g} GiB ({gpu.name})"


def _whether_it_fits(prediction: Prediction, gpu: Gpu) -> str:
    if not gpu.memory_gib:
        return " (add --gpu NAME or --vram GIB to see whether it fits)"
    if not (judged := _verdict(prediction, gpu)):
        return f" of tensors, in {gpu.memory_gib:g} GiB ({gpu.name})"
    taker = "the driver and NCCL" if prediction.ranks > 1 else "the driver"
    return f"; {judged} with {outside(prediction.ranks):g} GiB for {taker}"


def _error(gpu: Gpu, ranks: int) -> str:
    if (fit := gpu.calibration) is not None:
        return (
            f"median {fit.median_error:.1%}, worst {fit.worst_error:.1%} over {fit.runs} runs on {fit.device}, each "
            f"predicted from the others; fit to all: {fit.offset_mib:,.0f} MiB + {fit.slope:.3f} x the plan"
        )
    if gpu.type == "cpu":
        return "unknown: the plan covers tensors only (`qlora-exp calibrate` estimates the rest from past runs)"
    if ranks > 1:
        return f"{WORST_ERROR_OF_SEVERAL:.0%} at worst, over 7 published runs on two GPUs"
    return f"{WORST_ERROR:.1%} at worst, over 19 published GPU runs and 7 runs of this project"


def _time_error(gpu: Gpu) -> str:
    if gpu.calibration and gpu.calibration.time_error is not None:
        return f" (error up to {gpu.calibration.time_error:.0%})"
    return ""


def _show_room(gpu: Gpu, ranks: int) -> None:
    nccl = " and NCCL" if ranks > 1 else ""
    error = f"{worst_error(gpu, ranks):.1%}"
    print(f"fits     even if the prediction is {error} too low, with {outside(ranks):g} GiB for the driver{nccl}")


def _time(config: Config, seconds: float, price: float | None) -> str:
    steps = config.training.max_steps
    text = f"{seconds:.3g} s per step"
    if steps <= 0:
        return text
    text += f", {steps * seconds / 3600:.3g} h for {steps} steps"
    return text if price is None else f"{text}, cost {price * steps * seconds / 3600:.3g} at {price:g} per hour"
