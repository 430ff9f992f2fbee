"""Wrap DeepSpeed's private parts. Checked on deepspeed 0.19.8. Needs the extra `deepspeed`."""

import logging
import os
from typing import Any


def library(device: str) -> Any:
    """Import DeepSpeed for a type of device; by itself it takes a GPU if the machine has one.

    It is kept from compiling: for CPUs it would build collective operations of its own, where torch's do.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
