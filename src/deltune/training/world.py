"""The processes of a run: one, or those started by `accelerate launch` or `torchrun`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from deltune.errors import TrainError


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the run. Only the one of rank 0 writes and reports."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    """Where the launcher wants the model; None leaves it where it is."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            distributed.barrier()

    def same_start(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the values of the first."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)
                torch.autograd.graph.increment_version(tensor)  # broadcasting leaves it out

    def join_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sums the gradients over the processes, in place, and returns the summed loss.

        A parameter without gradient in every process keeps none.
        """
        if self.size == 1:
            return loss
        has = torch.tensor([p.grad is not None for p in parameters], device=loss.device).float()
        distributed.all_reduce(has)
        used = [p for p, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for dtype in {p.dtype: None for p in used}:
            gradients = [p.grad for p in used if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            distributed.all_reduce(flat)
            for g, summed in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                g.copy_(summed.view_as(g))
        distributed.all_reduce(loss)
        return loss

    def gather(self, mine: Any) -> list[Any]:
        """Every process's object, by rank."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, mine)
        return everyone


def this_world() -> World:
    """The processes of this run, joined.

    Raises:
        TrainError: several processes were started but accelerate is not installed.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    joined = distributed.is_available() and distributed.is_initialized()
    if started <= 1 and not joined:
        return World()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise TrainError(
            f"{started} processes were started, and joining them takes the package accelerate; "
            "install `deltune[train]`, or start a single process"
        ) from error
    # Without cpu=True accelerate takes each process on a machine without GPU for a lone one.
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=asked or not torch.accelerator.is_available())
    if state.num_processes < started:
        raise TrainError(
            f"{started} processes were started and accelerate joined {state.num_processes}; "
            "expected all; create no `Accelerator` before, or create it with cpu=True on CPUs"
        )
    return World(state.process_index, state.num_processes, state.device)
