"""The same machine with faster or slower links: how a plan depends on bandwidth."""

from __future__ import annotations

import json
from typing import Any

from .hardware import Hardware, parse_hardware


def with_link_speed(hardware: Hardware, factor: float) -> Hardware:
    """``hardware`` with links of ``factor`` times the bandwidth; latencies, memory and compute stay.

    Every second per byte of a measured curve is divided by ``factor``, and every bandwidth of a link multiplied by it.
    The result is no measurement, and says so in its name and source.

    Args:
        hardware: The profile.
        factor: Above 0; 1 returns the profile itself.

    Raises:
        HardwareError: The links become slower than any profile may say.
    """
    if factor == 1:
        return hardware
    content = _scaled(hardware.model_dump(mode="json", by_alias=True), factor)
    named = f"{hardware.name} x{factor:g}"
    content |= {"name": named, "source": f"links of {factor:g} times the bandwidth of: {hardware.source}"}
    return parse_hardware(json.dumps(content), where=named)


def _scaled(part: Any, factor: float, under: str = "") -> Any:
    match part:
        case dict():
            return {key: _scaled(value, factor, key) for key, value in part.items()}
        case list():
            return [_scaled(value, factor, under) for value in part]
        case float() | int() if under == "s_per_byte":
            return float(part / factor)
        case float() | int() if under in ("bytes_per_s_per_rank", "pair_bytes_per_s"):
            return float(part * factor)
        case _:
            return part
