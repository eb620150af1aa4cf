"""The tensor-parallel group: which ranks share a model, as static numbers that compilers can bake in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colrow.cost_models.errors import UsageError

TP_AXIS = "tp"


class TpGroup(NamedTuple):
    """What a collective needs to know of its group.

    Attributes:
        name: Process group name, as ``torch.ops._c10d_functional`` takes it.
        rank: This process's rank on the tp axis.
        size: Ranks on the tp axis.
    """

    name: str
    rank: int
    size: int


def tp_mesh(mesh: DeviceMesh | None) -> DeviceMesh:
    """The 1-D mesh of the tp axis: the dim named "tp", else a 1-D mesh itself, else (None) the default process group.

    Raises:
        UsageError: The mesh has several dims and none is named "tp", or there is no process group.
    """
    if mesh is None:
        if not dist.is_initialized():
            raise UsageError(
                "mesh",
                "None means the default process group, and there is none",
                remedy="Call torch.distributed.init_process_group first, or use colrow run.",
            )
        device = "cuda" if dist.get_backend() == "nccl" and torch.cuda.is_available() else "cpu"
        return DeviceMesh(device, list(range(dist.get_world_size())), mesh_dim_names=(TP_AXIS,))
    names = mesh.mesh_dim_names or ()
    if TP_AXIS in names:
        return mesh if mesh.ndim == 1 else mesh[TP_AXIS]
    if mesh.ndim == 1:
        return mesh
    raise UsageError(
        "mesh",
        "no dim of it is the tensor-parallel one",
        got=f"{mesh.ndim} dims named {tuple(names)}",
        need=f'a dim named "{TP_AXIS}", or a 1-D mesh',
        remedy='Pass init_device_mesh(device, sizes, mesh_dim_names=("dp", "tp")).',
    )


def group_of(mesh: DeviceMesh | None) -> TpGroup:
    """The tensor-parallel group of ``mesh`` (see ``tp_mesh``)."""
    axis = tp_mesh(mesh)
    return TpGroup(axis.get_group().group_name, axis.get_local_rank(), axis.size())
