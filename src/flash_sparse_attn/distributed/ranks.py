"""The ranks that share a text, and tables of fixed sizes from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Mesh = DeviceMesh | dist.ProcessGroup
"""What says which ranks share a text: a mesh of one dimension, or a process group."""


@dataclass(frozen=True)
class Ranks:
    """A process group as its members see it; texts lie along it, rank 0 has the beginning.

    Attributes:
        group: The process group. Its timeout is that of every exchange.
        rank: The number of this process in it.
        size: The number of its processes.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: Mesh) -> Ranks:
        """The ranks of a mesh or group.

        Raises:
            TypeError: It is neither.
            ValueError: The mesh has several dimensions, or this process is no member.
        """
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(
                    f"mesh: expected one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); name "
                    'the one along which texts are cut, as in mesh["context"]'
                )
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(
                f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}; use "
                "torch.distributed.init_device_mesh, or torch.distributed.group.WORLD"
            )
        rank = dist.get_rank(mesh)
        if rank < 0:
            raise ValueError(
                f"mesh: expected a group that has process {dist.get_rank()} as a member, got one "
                "without it; call on the members only"
            )
        return cls(mesh, rank, dist.get_world_size(mesh))

    def send(self, table: Tensor, targets: Sequence[int], sources: Sequence[int]) -> Transfer:
        """Start to send ``table[i]`` to ``targets[i]``; every rank has to take part.

        Args:
            table: ``[len(targets), ...]``.
            targets: Ranks in rising order.
            sources: The ranks that send to this one, in rising order.
        """
        received = table.new_empty(len(sources), *table.shape[1:])
        work = dist.all_to_all_single(
            received,
            table.contiguous(),
            [int(rank in sources) for rank in range(self.size)],
            [int(rank in targets) for rank in range(self.size)],
            group=self.group,
            async_op=True,
        )
        return Transfer(work, received)

    def gather(self, numbers: Tensor) -> Tensor:
        """The equally shaped `numbers` of all ranks, ``[size, ...]``."""
        everything = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(everything, numbers.contiguous(), group=self.group)
        return torch.stack(everything)

    def check_agreement(self, device: torch.device, **facts: int) -> None:
        """All ranks call with the same `facts`. Costs an exchange and a wait.

        Raises:
            ValueError: They do not; on every rank.
        """
        own = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
        everybody = self.gather(own).tolist()
        for name, *values in zip(facts, *everybody, strict=True):
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name}: expected the same on every rank of the mesh, got {values} on ranks "
                    f"0 ... {self.size - 1}"
                )


@dataclass(frozen=True)
class Transfer:
    """Tables under way."""

    work: dist.Work
    received: Tensor

    def wait(self) -> Tensor:
        """What came, ``[sources, ...]`` in the order of ranks. On a GPU the stream waits."""
        self.work.wait()
        return self.received
