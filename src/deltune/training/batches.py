"""The order of the training data: a function of seed and epoch, so any position is found again."""

import hashlib
from collections.abc import Sequence

import torch

from deltune.tasks.batching import group_by_length
from deltune.training.settings import TrainSettings


class Order:
    """Which examples each step sees.

    One step's examples are drawn together, for all processes and all its forward passes, so how
    a step is split between them changes nothing but memory and time.
    """

    def __init__(self, lengths: Sequence[int], settings: TrainSettings, processes: int = 1) -> None:
        self._lengths = list(lengths)
        self._settings = settings
        self._processes = processes
        part = settings.per_device_train_batch_size
        self._size = part * settings.gradient_accumulation_steps * processes
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.steps_per_epoch = -(-len(self._lengths) // self._size)

    def batch(self, step: int) -> list[int]:
        """Examples of the step that follows `step` finished ones."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = self._shuffled(epoch)
            self._epoch = epoch
        return self._batches[at]

    def parts(self, batch: list[int], rank: int = 0) -> list[list[int]]:
        """The forward passes of one process for this batch; a short batch can leave it none."""
        if self._settings.group_by_length:
            batch = sorted(batch, key=lambda at: -self._lengths[at])
        size = self._settings.per_device_train_batch_size
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return parts[rank :: self._processes]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        text = f"{self._settings.seed} epoch {epoch}".encode()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1)
        if self._settings.group_by_length:
            return [list(b) for b in group_by_length(self._lengths, self._size, generator)]
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        return [order[start : start + self._size] for start in range(0, len(order), self._size)]
