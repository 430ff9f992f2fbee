"""Print plans as tables: where memory goes, whether it fits, hours and cost."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import remarks
from qlora_exp.planning.advisor import Sized
from qlora_exp.planning.cost import HOW, Amount, Bill, bill, rows_of_step, total
from qlora_exp.planning.fit import (
    TOO_GOOD,
    WORST_ERROR,
    WORST_ERROR_OF_SEVERAL,
    communication_seconds,
    expected,
    is_too_much,
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

_LEFT_OUT = (
    "left out: generation, evaluation's time, data loading, sending between GPUs\n"
    "all rows are assumed to have training.max_length tokens; shorter ones take less time"
)


UNASKED = f"{HOW}, or --price PER_HOUR, with which rows on this machine are counted"
"""Why it is not known how much a run trains, if neither --rows nor --price asked for it."""


@dataclass(frozen=True)
class Planned:
    """A run and its prediction."""

    words: Sequence[str]
    config: Config | None
    prediction: Prediction | None
    gpu: Gpu
    """The device that the run was planned for."""
    amount: Amount | str = ""
    """How much the run trains, or why that is not known."""
    tuned: str | None = None
    """What `training.tune` chose."""
    why: str = ""
    """Reason why there is no prediction."""

    @property
    def seconds(self) -> float | None:
        """Planned time of a step; None if it is not known."""
        return None if self.prediction is None else step_seconds(self.prediction, self.gpu)

    def bill(self, price: float | None) -> Bill | None:
        """Return what the run takes at a price per hour of its GPU; None if its length or its time is not known."""
        if self.prediction is None or self.seconds is None or not isinstance(self.amount, Amount):
            return None
        return bill(self.seconds, self.amount, price, self.prediction.ranks)


def show_one(planned: Planned, price: float | None) -> None:
    """Print the plan of one run: memory by phase and kind, then totals, work, time, cost and error."""
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
    print(f"memory   {expected(prediction, gpu) / GIB:.2f} GiB{_whether_it_fits(planned, prediction)}")
    for remark in remarks(config, gpu.device):
        print(f"note     {remark}")
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
    _show_time(planned, price)
    if planned.tuned:
        print(f"tuned    {planned.tuned}")
    print(f"error    {_error(gpu, prediction.ranks)}")
    print(_LEFT_OUT)


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


def _show_time(planned: Planned, price: float | None) -> None:
    """Print the time of a step and, as far as it is known how much the run trains, hours and cost."""
    assert planned.config is not None
    if (seconds := planned.seconds) is None:
        if planned.gpu.type == "cuda":
            print("time     unknown: " + ("no rates for float32" if planned.gpu.tflops else "add --gpu NAME"))
        return
    note("time", f"{seconds:.3g} s per step, at {planned.gpu.rates}{_time_error(planned.gpu)}")
    amount = planned.amount
    if not isinstance(amount, Amount):
        note("hours", f"unknown: {amount}")
        return
    each = planned.bill(price)
    assert each is not None
    steps = f"{each.hours:.3g} h for {amount.steps:,} steps of {rows_of_step(planned.config)} rows"
    note("hours", f"{steps}; {amount.source}")
    if each.cost is not None and price is not None and planned.prediction is not None:
        ranks = f" for each of {planned.prediction.ranks} GPUs" if planned.prediction.ranks > 1 else ""
        print(f"cost     {each.cost:.3g} at {price:g} per hour{ranks}; {each.per_thousand:.3g} per 1,000 examples")


def show_many(planned: Sequence[Planned], prices: Mapping[str, float]) -> None:
    """Print one line for each run on each card, and what all runs take on each card."""
    configs = [run.config for run in planned if run.config]
    cards = list(dict.fromkeys(run.gpu for run in planned))
    names, names_of = _names([run.words for run in planned])
    bills = [run.bill(prices.get(run.gpu.name)) for run in planned]
    least = _cheapest(planned, bills)
    headings = [*names, "card", "GiB", "fits", "s a step", "hours", "cost", "per 1,000", "sends"]
    rows = []
    for place, (run, each) in enumerate(zip(planned, bills, strict=True)):
        cells = [*names_of[place], run.gpu.name if len(cards) > 1 else ""]
        if run.prediction is None:
            rows.append([*cells, "-", "no plan", "", "", "", "", ""])
            continue
        ranks = f" x {run.prediction.ranks}" if run.prediction.ranks > 1 else ""
        fits = FITS.get(judged(run), "")
        rows.append(
            [
                *cells,
                f"{expected(run.prediction, run.gpu) / GIB:.2f}{ranks}",
                fits + ("*" if place in least else ""),
                "" if run.seconds is None or any(bills) else f"{run.seconds:.3g}",
                "" if each is None else f"{each.hours:.3g}",
                *(("", "") if each is None or each.cost is None else (f"{each.cost:.3g}", f"{each.per_thousand:.3g}")),
                _sent(run.prediction, run.gpu),
            ]
        )
    kept = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    number = len({tuple(run.words) for run in planned})
    runs = "1 run" if number == 1 else f"{number} runs"
    common = set.intersection(*(set(run.words) for run in planned))
    shared = f", all with {' '.join(shortened(word) for word in planned[0].words if word in common)}" if common else ""
    print_table(
        f"{runs}{f' on {len(cards)} cards' if len(cards) > 1 else ''}{shared}",
        [headings[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        whole=len(names) + (len(cards) > 1) if sum(map(_width, zip(*names_of, strict=True))) <= WIDEST else 0,
    )
    for place, run in enumerate(planned):
        if run.why:
            print(f"{' '.join(names_of[place])}: {run.why}")
        elif run.tuned:
            name = " ".join([*names_of[place], *[run.gpu.name] * (len(cards) > 1)])
            print(f"{name}: tuned to {run.tuned.partition(': ')[0]}")
    if least:
        print("*        the cheapest of the cards that it fits")
    if any(judged(run) in ("does not fit", "may fit") for run in planned):
        note("instead", "planned alone, a run that does not fit is shown with settings that would")
    _show_totals(planned, bills, prices, cards)
    if configs:
        _show_basis(planned, cards)


FITS = {"fits": "yes", "may fit": "maybe", "does not fit": "no"}
"""Cells for the three verdicts."""
WIDEST = 40
"""Characters of names that a table of 80 has room for on one line."""


def _names(runs: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells that name runs: a column for each key that differs, or one for all their words."""
    pairs = [dict(word.partition("=")[::2] for word in words) for words in runs]
    keys = list(dict.fromkeys(key for words in pairs for key in words))
    differ = [key for key in keys if len({words.get(key) for words in pairs}) > 1]
    cells = [[shortened(words.get(key, "-"), WIDEST) for key in differ] for words in pairs]
    ends = [key.rpartition(".")[2] for key in differ]
    headings = [end if ends.count(end) == 1 else key for end, key in zip(ends, differ, strict=True)]
    return headings, cells


def _width(cells: Sequence[str]) -> int:
    return max(map(len, cells))


def _cheapest(planned: Sequence[Planned], bills: Sequence[Bill | None]) -> set[int]:
    """Return the places of the cards that cost least for each run of those that fit, if several have a cost."""
    runs: dict[str, dict[int, float]] = {}
    for place, (run, each) in enumerate(zip(planned, bills, strict=True)):
        if run.prediction and each and each.cost is not None and verdict(run.prediction, run.gpu) == "fits":
            runs.setdefault(" ".join(run.words), {})[place] = each.cost
    several = len({run.gpu for run in planned}) > 1
    return {min(costs, key=costs.__getitem__) for costs in runs.values()} if several else set()


def _show_totals(
    planned: Sequence[Planned], bills: Sequence[Bill | None], prices: Mapping[str, float], cards: Sequence[Gpu]
) -> None:
    """Print what all runs take on each card, and why that is not known of some."""
    for gpu in cards:
        found = [each for run, each in zip(planned, bills, strict=True) if run.gpu == gpu]
        known = [each for each in found if each is not None]
        if not known or len(found) < 2:
            continue
        hours, cost = total(known)
        price = "" if cost is None else f", cost {cost:.3g} at {prices[gpu.name]:g} per hour"
        missing = f"; {len(found) - len(known)} more are not counted" if len(known) < len(found) else ""
        print(f"total    {gpu.name}: {hours:.3g} h for {len(known)} runs, one after another{price}{missing}")
    for why in dict.fromkeys(run.amount for run in planned if run.seconds is not None and isinstance(run.amount, str)):
        note("hours", f"unknown: {why}")
    for source in dict.fromkeys(run.amount.source for run in planned if isinstance(run.amount, Amount)):
        note("rows", source)


def _show_basis(planned: Sequence[Planned], cards: Sequence[Gpu]) -> None:
    """Print what the cards and the figures of a table mean."""
    most = max((run.prediction.ranks for run in planned if run.prediction), default=1)
    about: dict[str, list[str]] = {}
    for gpu in cards:
        timed = f"times at {gpu.rates}; " if any(run.seconds for run in planned if run.gpu == gpu) else ""
        name = f"{gpu.name} ({gpu.memory_gib:g} GiB)" if gpu.memory_gib else gpu.name
        about.setdefault(f"{timed}error of GiB {_error(gpu, most)}", []).append(name)
    for text, names in about.items():
        note("cards", f"{', '.join(names)}: {text}")
    if any(run.seconds and not run.gpu.calibration for run in planned):
        note("times", TOO_GOOD)
    if not any(map(_judged, cards)):
        note("fits", "add --gpu NAME or --vram GIB to see whether they fit")
    print(_LEFT_OUT)


def note(label: str, text: str) -> None:
    """Print a line with a label, broken to the width of a terminal of 80 columns."""
    print(textwrap.fill(f"{label:8} {text}", 80, subsequent_indent=" " * 9, break_long_words=False))


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
    show_reasons(why)
    show_room(cards[0], ranks)


def _sent(prediction: Prediction, gpu: Gpu) -> str:
    if prediction.ranks == 1:
        return ""
    seconds = communication_seconds(prediction, gpu)
    return f"{prediction.traffic.total / 1e9:,.2f} GB" + ("" if seconds is None else f", {seconds:.3g} s")


def _billions(model: Sized) -> str:
    return f"{model.parameters / 1e9:.1f} B"


def show_reasons(why: Mapping[str, str]) -> None:
    """Print why options are missing."""
    for reason in dict.fromkeys(why.values()):
        print(f"{'; '.join(name for name, own in why.items() if own == reason)}: {reason}")


def judged(planned: Planned) -> str:
    """Return whether a run fits (`fit.verdict`); empty if that cannot be judged.

    A CPU's plan covers tensors only, so that without a calibration from past runs only too many of them are judged.
    """
    prediction, gpu = planned.prediction, planned.gpu
    if prediction is None or not gpu.memory_gib or not (_judged(gpu) or is_too_much(prediction.peak, gpu)):
        return ""
    return verdict(prediction, gpu)


def _judged(gpu: Gpu) -> bool:
    return bool(gpu.memory_gib) and not (gpu.type == "cpu" and gpu.calibration is None)


def _whether_it_fits(planned: Planned, prediction: Prediction) -> str:
    gpu = planned.gpu
    if not gpu.memory_gib:
        return " (add --gpu NAME or --vram GIB to see whether it fits)"
    if not (fits := judged(planned)):
        return f" of tensors, in {gpu.where}"
    taker = "libraries" if gpu.type == "cpu" else "the driver and NCCL" if prediction.ranks > 1 else "the driver"
    return f"; {fits} in {gpu.where} with {outside(prediction.ranks):g} GiB for {taker}"


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
    return "" if gpu.calibration else f"; {TOO_GOOD}"


def show_room(gpu: Gpu, ranks: int) -> None:
    """Print what is allowed for where something is said to fit."""
    nccl = " and NCCL" if ranks > 1 else ""
    error = f"{worst_error(gpu, ranks):.1%}"
    print(f"fits     even if the prediction is {error} too low, with {outside(ranks):g} GiB for the driver{nccl}")
