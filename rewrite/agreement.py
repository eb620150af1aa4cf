"""Ranks succeed together or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from colrow.cost_models.errors import ColrowError, RankError

from .collectives import all_reduce
from .groups import TpGroup

T = TypeVar("T")


def together(attempt: Callable[[], T], group: TpGroup, where: str, elsewhere: type[ColrowError] = RankError) -> T:
    """Do something that may fail on one rank alone (a local disk), so that all ranks fail then.

    Raises:
        Exception: Of this rank; or ``elsewhere``, saying that another rank failed.
    """
    result, error = None, None
    try:
        result = attempt()
    except Exception as caught:
        error = caught
    device = "cuda" if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl" else "cpu"
    failed = all_reduce(torch.tensor([0 if error is None else 1], device=device), group, "max").item()
    if error is not None:
        raise error
    if failed:
        raise elsewhere(where, "another rank failed here", remedy="See that rank's message.")
    return result  # type: ignore[return-value]
