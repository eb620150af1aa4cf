"""Every error colrow raises on purpose, as one tree.

    ColrowError
    ├── UsageError          wrong use or unreadable input                      (exit code 2)
    │   ├── SourceError     a SOURCE, configuration or checkpoint cannot be read
    │   ├── HardwareError   an unknown or malformed hardware profile
    │   ├── PlanFileError   a plan is truncated, edited, of another version or another model
    │   └── TraceError      torch cannot trace the model
    └── Infeasible          no plan satisfies the constraints, or a check failed (exit code 1)
        ├── LayoutError     no exact layout exists at this size
        ├── MemoryCapError  no plan fits the memory cap
        ├── ValidationError the rewritten model is not the planned one
        └── RankError       a rank failed, died or disagrees with the others

A message reads ``<where>: <what is wrong>; got X, need Y. <what to do>``.
"""

from __future__ import annotations


class ColrowError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line returns."""

    exit_code = 3

    def __init__(self, where: str, wrong: str, *, got: object = None, need: object = None, remedy: str = "") -> None:
        """Compose the message from its parts.

        Args:
            where: The file, parameter, module path or option at fault.
            wrong: What is wrong, in a few words.
            got: The offending value, quoted if given.
            need: What would have been right, quoted if given.
            remedy: One sentence on what to do about it.
        """
        self.where, self.wrong, self.got, self.need, self.remedy = where, wrong, got, need, remedy
        facts = ", ".join(f"{word} {value}" for word, value in (("got", got), ("need", need)) if value is not None)
        text = f"{where}: {wrong}" + (f"; {facts}" if facts else "") + "."
        super().__init__(f"{text} {remedy}".rstrip())


class UsageError(ColrowError):
    """Wrong use or unreadable input."""

    exit_code = 2


class SourceError(UsageError):
    """A SOURCE, configuration or checkpoint cannot be read."""


class HardwareError(UsageError):
    """An unknown or malformed hardware profile."""


class PlanFileError(UsageError):
    """A plan that is truncated, edited, of another version or of another model."""


class TraceError(UsageError):
    """A model that torch cannot trace."""


class Infeasible(ColrowError):
    """No plan satisfies the constraints, or a check failed."""

    exit_code = 1


class LayoutError(Infeasible):
    """No exact layout of a weight exists at this size."""


class MemoryCapError(Infeasible):
    """No plan fits the memory cap."""


class ValidationError(Infeasible):
    """The rewritten model is not the planned one."""


class RankError(Infeasible):
    """A rank failed, died or disagrees with the others."""
