"""Random numbers of training: a function of (seed, process, step), so no state need be saved."""

import hashlib
import random
import sys
from collections.abc import Generator
from contextlib import contextmanager

import torch


def seed_step(seed: int, rank: int, step: int, device: torch.device) -> None:
    """Seeds the generators of torch (on the CPU and the device), Python and numpy for one step."""
    text = f"{seed} {rank} {step}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
    # torch.manual_seed costs half a millisecond: it also queues a call for each absent device.
    torch.default_generator.manual_seed(number)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(number)
    random.seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number % 2**32)


@contextmanager
def kept_generators(device: torch.device) -> Generator[None]:
    """Gives the caller's generators back as they were."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy else None
    accelerator = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
    there = accelerator.get_rng_state(device) if accelerator else None
    here = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(here)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)
        if accelerator:
            accelerator.set_rng_state(there, device)
