"""Checkpoints: a directory of safetensors files, of which each rank reads its own slices; and dense ones written
back, bit for bit.

Names are those of the model's ``state_dict``. Tied names share one tensor, stored under any of them. What a
checkpoint must hold is checked from the files' headers, on every rank, before a parameter is touched.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.cost_models.errors import SourceError

from .agreement import together
from .buffers import recompute_buffers
from .groups import TpGroup, group_of
from .slices import pieces
from .storage import ParameterSpec, owners, parameter

INDEX = "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors names dtypes; narrower ones come with scales
SHARD_BYTES = 5_000_000_000  # a file's size at most, as transformers writes them


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: its file, shape, and dtype as safetensors names it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str = "F32"


@dataclass(frozen=True)
class ReadReport:
    """What loading cost this rank.

    Attributes:
        bytes_read: Bytes of the slices taken, as stored.
        bytes_total: Bytes of all tensors the model takes from the checkpoint, as stored.
        num_tensors: How many tensors that were.
    """

    bytes_read: int
    bytes_total: int
    num_tensors: int


def tensors_in(directory: str | Path) -> dict[str, Stored]:
    """What the headers of a checkpoint's files say it holds.

    Raises:
        SourceError: No such directory, no safetensors in it, an unreadable index or file, or a tensor the index
            promises in vain.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise SourceError(str(folder), "no such directory", need="a directory of safetensors files")
    index = folder / INDEX
    promised: dict[str, str] = {}
    if index.is_file():
        try:
            promised = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(str(index), f"not a safetensors index: {type(error).__name__}: {error}") from error
        files = sorted({folder / name for name in promised.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError(
            str(folder),
            "no safetensors files in it",
            remedy="Convert other formats first: save_pretrained writes safetensors.",
        )
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise SourceError(str(file), f"{INDEX} names it, but it does not exist", remedy="Download it again.")
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()  # it is no dict and cannot be iterated
                found |= {name: _stored(file, opened.get_slice(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise SourceError(
                str(file), f"not a readable safetensors file: {error}", remedy="Download it again."
            ) from error
    for name, file_name in promised.items():
        if name not in found or found[name].file.name != Path(file_name).name:
            raise SourceError(str(folder / file_name), f"{INDEX} says that {name} is in it, but it is not")
    return found


def _stored(file: Path, header: Any) -> Stored:
    return Stored(file, tuple(header.get_shape()), str(header.get_dtype()))


def check_checkpoint(
    model: nn.Module, directory: str | Path, plan: dict[str, ParameterSpec] | None = None
) -> dict[str, tuple[str, Stored]]:
    """Check, from headers alone, that a checkpoint holds what ``model`` needs, in its shapes, and nothing else.

    Args:
        model: Dense, or with DTensor parameters (then with ``plan``).
        directory: Of the checkpoint.
        plan: The spec of every parameter name, as ``store`` returned it.

    Returns:
        For every parameter and persistent buffer, under the first of its names: its name in the checkpoint, and where
        that is.

    Raises:
        SourceError: As ``tensors_in``; a tensor is missing, misshapen, quantised or unknown (each message names tensor
            and file).
    """
    found = tensors_in(directory)
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    floating: dict[int, bool] = {}
    for name, value in wanted(model):
        spec = (plan or {}).get(name)
        names.setdefault(id(value), []).append(name)
        shapes[id(value)] = tuple(spec.dense_shape(value.shape) if spec else value.shape)
        floating[id(value)] = value.is_floating_point()
    taken: dict[str, tuple[str, Stored]] = {}
    for key, tied in names.items():
        held = [name for name in tied if name in found]
        if not held:
            also = f" (nor {', '.join(tied[1:])}, tied to it)" if tied[1:] else ""
            raise SourceError(
                str(directory),
                f"{tied[0]} is missing{also}",
                need=shapes[key],
                remedy="Is this the checkpoint of this model?",
            )
        for name in held:
            if floating[key] and found[name].dtype not in FLOATING:
                raise SourceError(
                    str(found[name].file),
                    f"{name} is quantised",
                    got=found[name].dtype,
                    need=" or ".join(FLOATING),
                    remedy="Use the original checkpoint, or convert this one.",
                )
            if found[name].shape != shapes[key]:
                raise SourceError(
                    str(found[name].file), f"{name} has another shape", got=found[name].shape, need=shapes[key]
                )
        taken[tied[0]] = (held[0], found[held[0]])
    known = {name for tied in names.values() for name in tied}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name in sorted(found.keys() - known):
        if not any(pattern.search(name) for pattern in ignored):
            raise SourceError(
                str(found[name].file), f"{name} is not in the model", remedy="Is this the checkpoint of this model?"
            )
    return taken


def wanted(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of all parameters (under each of their names) and persistent buffers."""
    for name, _, _, value in owners(model):
        yield name, value
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def load_checkpoint(
    model: nn.Module, plan: dict[str, ParameterSpec], directory: str | Path, mesh: DeviceMesh
) -> ReadReport:
    """Fill a stored model from a checkpoint, reading only this rank's slices; meta parameters and buffers become real.

    Args:
        model: Its parameters are DTensors (``store`` has run), on meta or not.
        plan: The spec of every parameter name, as ``store`` returned it.
        directory: Of the checkpoint.
        mesh: The 1-D tp mesh; its device is where meta tensors become real.

    Returns:
        What was read, on this rank.

    Raises:
        SourceError: On every rank if on one: as ``check_checkpoint``, before a parameter is touched; a tensor cannot
            be read; or a buffer is on meta that no checkpoint holds and the model cannot recompute.
    """
    group, device = group_of(mesh), torch.device(mesh.device_type)
    taken = together(lambda: check_checkpoint(model, directory, plan), group, str(directory), SourceError)
    report = together(lambda: _fill(model, plan, taken, mesh, group.rank), group, str(directory), SourceError)
    together(lambda: recompute_buffers(model, device), group, str(directory), SourceError)
    _reports[model] = report
    return report


_reports: WeakKeyDictionary[nn.Module, ReadReport] = WeakKeyDictionary()


def read_report(model: nn.Module) -> ReadReport | None:
    """What this rank read when ``model`` was filled from a checkpoint; None if it was not, or is a copy."""
    return _reports.get(model)


def _fill(
    model: nn.Module, plan: dict[str, ParameterSpec], taken: dict[str, tuple[str, Stored]], mesh: DeviceMesh, rank: int
) -> ReadReport:
    """Read this rank's part of every tensor that ``taken`` names into the model."""
    device = torch.device(mesh.device_type)
    targets: dict[int, str] = {}
    read = total = 0
    made: dict[int, nn.Parameter] = {}
    for fqn, module, name, any_value in list(owners(model)):
        value = cast(DTensor, any_value)
        first = targets.setdefault(id(value), fqn)
        if first == fqn:
            spec, local = plan[fqn], value._local_tensor
            block = torch.empty_like(local, device=device if local.is_meta else local.device)
            mine, whole_bytes = read_block(*taken[fqn], spec, rank, block)
            read, total = read + mine, total + whole_bytes
            if local.is_meta:
                made[id(value)] = parameter(block, spec, mesh, value.requires_grad)
            else:
                local.detach().copy_(block)
        if id(value) in made:
            module._parameters[name] = made[id(value)]
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            key = f"{path}.{name}" if path else name
            if buffer is not None and key in taken:
                full = torch.empty_like(buffer, device=device if buffer.is_meta else buffer.device)
                mine, whole_bytes = read_block(*taken[key], ParameterSpec(key), rank, full)
                read, total = read + mine, total + whole_bytes
                module._buffers[name] = full
    return ReadReport(read, total, len(taken))


def read_block(name: str, stored: Stored, spec: ParameterSpec, rank: int, block: Tensor) -> tuple[int, int]:
    """Read into ``block`` what ``rank`` stores of a tensor, zeros as padding.

    The file is opened for this tensor alone: what safetensors maps of it counts as this process's memory until it is
    closed.

    Returns:
        Bytes taken, and bytes of the whole tensor.

    Raises:
        SourceError: Names the file and the tensor.
    """
    try:
        return _read_block(name, stored, spec, rank, block)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SourceError(
            str(stored.file), f"{name} cannot be read: {error}", remedy="Did the file change in the meantime?"
        ) from error


def _read_block(name: str, stored: Stored, spec: ParameterSpec, rank: int, block: Tensor) -> tuple[int, int]:
    with safe_open(stored.file, framework="pt") as opened:
        lazy = opened.get_slice(name)
        if spec.encoding == "whole" or not stored.shape:
            full = opened.get_tensor(name)
            block.copy_(full)
            return full.nbytes, full.nbytes
        assert spec.split is not None
        dim, layout = spec.split
        block.zero_()
        taken = width = 0
        for start, local, length in pieces(layout, rank):
            part = lazy[(*(slice(None),) * dim, slice(start, start + length))]
            block.narrow(dim, local, length).copy_(part)
            taken, width = taken + part.nbytes, part.element_size()
        return taken, torch.Size(stored.shape).numel() * (width or block.element_size())


def save_dense(model: nn.Module, directory: str | Path, group: TpGroup, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense checkpoint of a rewritten model: the tensors it was loaded from, bit for bit.

    A collective; rank 0 of ``group`` writes (every tp group has the same tensors: let one of them call). Files appear
    when all of them are complete. Tied tensors are written once, under the first of their names.

    Args:
        model: Rewritten.
        directory: Made if need be; older checkpoint files of the same names are replaced.
        group: The tensor-parallel group.
        shard_bytes: Size of a file at most (a larger tensor has a file to itself).

    Raises:
        SourceError: The directory cannot be written to; on every rank.
    """
    folder = Path(directory)
    state = dense_tensors(model)
    files: list[list[str]] = [[]]
    size = 0
    for name, value in state.items():
        if files[-1] and size + value.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += value.nbytes
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    written: list[tuple[Path, Path]] = []

    def write(i: int, content: dict[str, Tensor]) -> None:
        if group.rank:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=folder)
            os.close(handle)
            written.append((Path(temporary), folder / names[i]))
            save_file(content, temporary, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise SourceError(str(folder), f"cannot be written to: {error}") from error

    try:
        for i, members in enumerate(files):
            content = {name: whole(state[name]) for name in members}
            together(lambda i=i, content=content: write(i, content), group, str(folder), SourceError)  # type: ignore[misc]
        together(
            lambda: publish(folder, written, files, names, state) if group.rank == 0 else None,
            group,
            str(folder),
            SourceError,
        )
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def publish(
    folder: Path, written: list[tuple[Path, Path]], files: list[list[str]], names: list[str], state: dict[str, Tensor]
) -> None:
    """Give complete files their names, and write the index of several."""
    mask = os.umask(0)
    os.umask(mask)
    for temporary, final in written:
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's are private
        os.replace(temporary, final)
    (folder / INDEX).unlink(missing_ok=True)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(value.nbytes for value in state.values())},
            "weight_map": {name: file for file, members in zip(names, files, strict=True) for name in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's tensors, each once, in dense shape: DTensors where the model has them."""
    first: dict[int, str] = {}
    for name, value in wanted(model):
        first.setdefault(id(value), name)
    kept = set(first.values())
    return {name: value for name, value in model.state_dict().items() if name in kept}


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if it is distributed. Collective."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().to("cpu", copy=True).contiguous()
