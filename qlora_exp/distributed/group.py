"""Join the processes of a run, and exchange values between them. A single process exchanges with itself.

Values are Python objects, sent through the CPU: losses, counts, answers. Gradients are the engine's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.distributed import watch
from qlora_exp.environment.ranks import ranks


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """Join the other processes of the run inside the `with` block, and watch them; does nothing for a single process.

    An exception inside is reported to the others, which then end too.
    """
    if config.distributed.engine == "none":
        yield
        return
    import torch
    from torch import distributed

    place = ranks()
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    timeout = timedelta(seconds=config.distributed.ddp_timeout)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        with watch.watching(place, config.distributed.ddp_timeout):
            yield
            distributed.barrier()  # nobody leaves, and looks dead, while others still work
    finally:
        distributed.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, in each of them."""
    if (size := ranks().size) == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Return the main process's value, in each process."""
    return gather(value if ranks().is_main else None)[0]


def take_from_main(tensors: Iterable[Any]) -> None:
    """Give tensors of the CPU the values that they have in the main process."""
    if ranks().size == 1:
        return
    from torch import distributed

    for tensor in tensors:
        distributed.broadcast(tensor.data, src=0)


def call_on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the main process only; return its result, or raise its exception, in each process."""
    result, error = None, None
    if ranks().is_main:
        try:
            result = function(*arguments)
        except Exception as raised:  # the others must raise it too, not wait for a result
            error = raised
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return result


def wait() -> None:
    """Wait until all processes are here."""
    gather(None)


def own_share(items: Sequence[Any]) -> list[Any]:
    """Return this process's share of a list that is the same in all processes: every n-th item.

    All shares are as long: processes that would get one item less get one of the first again, because all processes
    must run as many forward passes of a sharded model.
    """
    if not items:
        return []
    size = ranks().size
    return [items[number % len(items)] for number in range(ranks().rank, -(-len(items) // size) * size, size)]


def joined_shares(results: list[Any], count: int) -> list[Any]:
    """Return the results of all processes for their `own_share` of `count` items, in their order; in each process."""
    return [result for results_ in zip(*gather(results), strict=True) for result in results_][:count]
