"""Two processes, with whole copies of the model or with its pieces. Oracle: one process."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import deltune as dt
from deltune.errors import AttachError, DeltuneError, StoreError, TrainError
from deltune.training.trainables import Trainables
from zoo import ZOO

# Of rank 1, so that one of two processes has no row of A; and one of most kinds of mechanism.
SPEC = "lora(rank=1, where='attn, embed') + norms + adapter(width=3) + prefix(tokens=3) + ia3"
STEPS = 2


def attached() -> tuple[nn.Module, dt.Delta]:
    model = ZOO["llama"].build(0)
    delta = dt.attach(model, SPEC, "mine", seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    return model.train(), delta.load_vector(delta.vector() + 0.1 * noise)


def trained(model: nn.Module, parameters: list[nn.Parameter], rows: slice) -> list[Tensor]:
    """The gradients of the first step, after all steps on these rows of the batches."""
    optimizer, found = torch.optim.SGD(parameters, 0.1), []
    for step in range(STEPS):
        ids = torch.randint(4, 60, (4, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids[rows]).logits.square().mean().backward()
        found = found or [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found


def replicated(rank: int, out: Path) -> None:
    model, delta = attached()
    wrapped = nn.parallel.DistributedDataParallel(model)
    gradients = trained(wrapped, delta.parameters(), slice(2 * rank, 2 * rank + 2))
    check(delta, gradients)
    if rank == 0:
        delta.save(out)


def pieces(rank: int, out: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, delta = attached()
    before, mesh = delta.vector(), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert rank == 0 or any(p.to_local().numel() == 0 for p in delta.parameters())
    assert torch.equal(delta.vector(), before)
    assert torch.equal(delta.load_vector(2 * before).vector(), 2 * before)
    whole = {name: tensor.full_tensor() / 2 for name, tensor in delta.tensors().items()}
    assert torch.equal(delta.load_tensors(whole).vector(), before)
    gradients = trained(model, delta.parameters(), slice(2 * rank, 2 * rank + 2))
    check(delta, [gradient.full_tensor() for gradient in gradients])
    delta.save(out)
    assert (out / "delta.safetensors").is_file()
    refuses(StoreError, "exists", lambda: delta.save(out))
    refuses(AttachError, "no delta can be merged|cannot be merged", delta.merge)
    refuses(AttachError, "no delta can be attached", lambda: dt.attach(model, "norms", "more"))
    refuses(AttachError, "lies in pieces", lambda: delta.call(before, input_ids=torch.ones(1, 1)))
    refuses(TrainError, "use a loop of your own", lambda: Trainables(model, delta))
    assert list(dt.deltas(model)) == ["mine"]


def check(delta: dt.Delta, gradients: list[Tensor]) -> None:
    alone, other = attached()
    wanted = trained(alone, other.parameters(), slice(0, 4))
    for mine, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-7)
        assert one.abs().max() > 0
    torch.testing.assert_close(delta.vector(), other.vector(), rtol=1e-5, atol=1e-6)


def refuses(error: type[DeltuneError], words: str, what: Callable[[], object]) -> None:
    with pytest.raises(error, match=words):
        what()


def process(rank: int, port: str, out: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of rank 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    replicated(rank, out / "replicated")
    pieces(rank, out / "pieces")
    distributed.destroy_process_group()


def test_gradients_and_the_saved_delta_are_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.start_processes(process, (port, tmp_path), 2, start_method="fork")
    alone, other = attached()
    trained(alone, other.parameters(), slice(0, 4))
    for kind in ("replicated", "pieces"):
        loaded = dt.load(tmp_path / kind, ZOO["llama"].build(0))
        torch.testing.assert_close(loaded.vector(), other.vector(), rtol=1e-5, atol=1e-6)


def test_a_tensor_that_is_held_elsewhere_is_not_saved(tmp_path: Path) -> None:
    """As ZeRO-3 and FSDP's flat parameters leave them: empty, or one row of a matrix."""
    model = ZOO["llama"].build(0)
    delta = dt.attach(model, "lora(rank=2)")
    first = delta.parameters()[0]
    kept, first.data = first.data, torch.empty(0)
    with pytest.raises(StoreError, match=r"has the shape \(0,\) here.*Gather it first"):
        delta.save(tmp_path / "empty")
    with pytest.raises(StoreError, match="has the shape"):
        delta.vector()
    assert not (tmp_path / "empty").exists()
    first.data = kept
    delta.save(tmp_path / "whole")
