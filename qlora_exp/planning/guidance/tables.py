"""Print advice: what fits a card, what it takes and is worth, which option to choose, usual settings."""

import shlex
from collections.abc import Mapping, Sequence

from qlora_exp.planning.advisor import GPUS, Fit, Option
from qlora_exp.planning.fit import TOO_GOOD, expected, verdict
from qlora_exp.planning.gpus import Gpu
from qlora_exp.planning.guidance import knowledge
from qlora_exp.planning.guidance.choice import NONE, Measured, choose, rated, seconds
from qlora_exp.planning.tables import FITS, note, show_reasons, show_room
from qlora_exp.utils.tables import print_table
from qlora_exp.utils.units import GIB

_BASIS = (
    "most rows: largest batch of rows of training.max_length tokens; longest row: in a batch of one row; GPUs: how "
    "many train one row of training.max_length each with distributed=fsdp; rows assume that "
    "training.per_device_eval_batch_size is no larger than the training batch"
)
_LONGER = (
    "rows: the same with training=long_rows, which keeps inputs of layers in the machine's memory, and computes MLPs "
    "in tiles; model.architecture.max_position_embeddings=N tries rows beyond its positions"
)


def show_card(
    options: Sequence[Option],
    why: Mapping[str, str],
    gpu: Gpu,
    goal: str = "quality",
    price: float | None = None,
    measured: Mapping[str, Measured] = NONE,
    own_options: str = "",
) -> None:
    """Print memory, largest batch, time, cost and quality of each option on one GPU, and which option to choose.

    `own_options` is the folder of `--config-dir`, which the printed command needs too.
    """
    rows = []
    for option in options:
        planned, fit = option.planned, option.fits[gpu]
        rows.append(
            [
                option.name,
                f"{planned.trainable / 1e6:,.1f} M",
                f"{expected(planned, gpu) / GIB:.1f}",
                FITS[verdict(planned, gpu)],
                f"{fit.rows:,}" if fit.rows else "-",
                f"{fit.length:,}" if fit.length else "-",
                f"{fit.gpus}" if fit.gpus else f"over {GPUS[-1]}",
            ]
        )
    training = options[0].config.training
    batch = f"{training.per_device_train_batch_size} rows of {training.max_length} tokens"
    title = f"{options[0].config.model.model_name_or_path} in {gpu.memory_gib:g} GiB ({gpu.name}), batches of {batch}"
    print_table(title, ["method", "trained", "GiB", "fits", "most rows", "longest row", "GPUs"], rows)
    _show_worth(options, gpu, price, measured)
    show_reasons(why)
    chosen = choose(options, gpu, goal, measured)
    note("choose", f"{chosen.name} for {goal}: {chosen.why}")
    if chosen.command:
        more = f" --config-dir {shlex.quote(own_options)}" if own_options else ""
        print(f"command  {chosen.command}{more}")  # not wrapped: it is to be copied
    _show_settings(options, chosen.name, gpu)
    note("basis", _BASIS)
    _show_longer(options)
    show_room(gpu, max(option.planned.ranks for option in options))


def _show_worth(options: Sequence[Option], gpu: Gpu, price: float | None, measured: Mapping[str, Measured]) -> None:
    """Print what 1,000 examples take with each option, and what is known of its quality."""
    times = {option.name: time for option in options if (time := seconds(option, rated(gpu)))}
    fastest = min(times.values(), default=0.0)
    is_rated = rated(gpu) == gpu
    rows = []
    for option in options:
        time = times.get(option.name)
        cells = [option.name, "-" if time is None else f"{time / 60:.3g}" if is_rated else f"{time / fastest:.2f} x"]
        if price is not None:
            cells.append("-" if time is None else f"{price * option.planned.ranks * time / 3600:.3g}")
        if (seen := measured.get(option.name)) is not None:
            cells.append(f"loss {seen.loss:.4f}, {seen.verdict or 'the best'} (measured here)")
        else:
            cells.append(str(knowledge.quality(option.config)))
        rows.append(cells)
    unit = "minutes" if is_rated else "time"
    headings = ["method", unit, *(["cost"] if price is not None else []), "quality"]
    print_table("1,000 examples of training.max_length tokens", headings, rows)
    if times and not is_rated:
        note("time", f"as ratios, of an {rated(gpu).name}: this card's rates are not known; give --gpu NAME")
    elif times:
        note("time", f"at {gpu.rates}{'' if gpu.calibration else '; ' + TOO_GOOD}")
    for name, seen in measured.items():
        note("measured", f"{name}: {', '.join(seen.runs)}")


def _show_settings(options: Sequence[Option], chosen: str, gpu: Gpu) -> None:
    """Print usual settings of the chosen option."""
    option = next((option for option in options if option.name == chosen), None)
    if option is None:
        return
    label = "settings"
    for setting, advice in knowledge.settings(option.config, option.planned.total, gpu.memory_gib):
        note(label, f"{setting}: {advice}")
        label = ""
    note("", f"more: {knowledge.PAGE}")


def show_cards(options: Sequence[Option], why: Mapping[str, str], cards: Sequence[Gpu], goal: str = "quality") -> None:
    """Print the largest batch and the longest row of each option on GPUs of several sizes."""
    length = options[0].config.training.max_length
    rows = []
    for card in cards:
        reaches = [_rows_and_length(option.fits[card]) for option in options]
        rows.append([f"{card.memory_gib:g}", *reaches, choose(options, card, goal).name])
    title = (
        f"{options[0].config.model.model_name_or_path}: most rows of {length} tokens | longest row in a batch of one"
    )
    print_table(title, ["GiB", *(option.name for option in options), f"choose for {goal}"], rows)
    show_reasons(why)
    note("basis", _BASIS)
    note("more", "time, cost, quality and settings: --gpu NAME or --vram GIB")
    _show_longer(options)
    show_room(cards[0], max(option.planned.ranks for option in options))


def _show_longer(options: Sequence[Option]) -> None:
    """Say how rows can be longer, if the options do not do that already."""
    if not any(option.config.training.activation_offloading for option in options):
        note("longer", _LONGER)


def _rows_and_length(fit: Fit) -> str:
    if fit.rows or fit.length:
        return f"{fit.rows:,} | {fit.length:,}"
    return f"on {fit.gpus} GPUs" if fit.gpus else "-"
