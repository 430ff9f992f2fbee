"""Turn how a command ended into an exit status and a message without secrets."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_exp.utils.display import NEWLINES, shown
from qlora_exp.utils.errors import DivergedError, TimeLimitError, UserError, is_out_of_memory, type_and_first_line


def exit_code(command: Callable[[], None], less_memory: str = "") -> int:
    """Call `command`: 0 if it succeeds, 1 if it fails, 130 if it is interrupted.

    An error that the user can fix is shown as one message. Any other error is a bug of this program and is shown with
    its traceback.

    Args:
        command: the command.
        less_memory: with what it takes less memory, said if that ran out; empty: the error says it, or nothing does.
    """
    try:
        command()
        print(end="", flush=True)  # flush here, where a closed pipe is handled
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has exited; without this, Python would print an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, TimeLimitError) as error:
        print(shown(_message(error, less_memory), keep=NEWLINES), file=sys.stderr)
        return 1
    return 0


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise any error about a full disk as the one that names this folder: safetensors and torch have their own."""
    try:
        yield
    except Exception as error:
        writes = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos ")
        own = isinstance(error, OSError) and (error.errno != errno.ENOSPC or error.filename is not None)
        if own or not any(words in str(error) for words in writes):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _message(error: BaseException, less_memory: str) -> str:
    # Only a process that has imported torch can raise torch's error; importing torch here would take seconds.
    of_device = isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ()))
    advice = less_memory and f"; {less_memory}"
    if isinstance(error, UserError | TimeLimitError):
        return f"error: {error}"
    if isinstance(error, DivergedError) or of_device:
        return f"error: {type(error).__name__}: {error}{advice if of_device else ''}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"error: no space left on the disk of {error.filename or Path.cwd()}"
    if is_out_of_memory(error):
        return f"error: out of memory: {type_and_first_line(error)}{advice}"
    return "".join(traceback.format_exception(error))
