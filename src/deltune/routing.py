"""Routing: another delta for each row of a batch."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn

from deltune.container import Deltas, Tree, container
from deltune.delta import deltas
from deltune.errors import AttachError, closest, listing
from deltune.mechanisms.lanes import Lane, Router
from deltune.sites.quirks import rowless

Row = str | None | Sequence[str]


@contextmanager
def route(model: nn.Module, rows: Sequence[Row]) -> Generator[None]:
    """Inside the `with` block each row of a batch has its own deltas, in training as in use.

    Row i of every tensor is what the model alone would make of it with just the deltas of
    `rows[i]`: outputs, gradients, generated tokens. Deltas of several methods may share a batch.
    Deltas that no row names do not act, enabled or not; merged ones are part of the weights.

    Changes of linear maps by low-rank factors act on all rows at once; what else there is acts on
    the rows of each delta in turn, and where a delta changes a module's own parameters the module
    runs again for its rows. With several beams, or tokens laid end to end, a row's stand together,
    as `generate` lays them. Under gradient checkpointing call `backward` inside the block too: it
    runs the blocks again.

    Args:
        model: with the deltas attached.
        rows: for each row of the batch the name of a delta, several names, or None for the model
            alone.

    Raises:
        AttachError: no such delta, one that is merged; rows that are routed already; a model whose
            batches have their rows in the second dimension; in a forward, a batch of another number
            of rows, or a method on a model on which it cannot serve row by row.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> a = dt.attach(model, "lora(rank=2, where='0')", name="a", seed=0)
        >>> a = a.load_vector(torch.ones(16))
        >>> x = torch.ones(3, 4)
        >>> with dt.route(model, ["a", None, "a"]):
        ...     out = model(x)
        >>> torch.equal(out[0], out[2]), torch.equal(out[0], out[1])
        (True, False)
    """
    with lanes_of(model, rows):
        yield


@contextmanager
def lanes_of(model: nn.Module, rows: Sequence[Row]) -> Generator[dict[str, Lane]]:
    """`route`, with the lanes of the deltas by their names."""
    lists = [[row] if isinstance(row, str) else list(row or ()) for row in rows]
    held = container(model)
    named = _named(model, lists)
    if held is None:
        yield {}
        return
    second = (n for n, m in model.named_modules() if getattr(m, "batch_first", True) is False)
    if odd := next(second, None):
        raise AttachError(
            f"`{odd}` has the rows of a batch in the second dimension (batch_first=False); rows "
            "are routed in the first"
        )
    if any(unit.lane is not None for tree in held.trees() for unit in tree.units[:1]):
        raise AttachError("rows are routed already; leave that `with` block first")
    were = {tree.name: tree.enabled for tree in held.trees()}
    router = Router(len(lists), rowless(model))
    lanes = {
        name: Lane(router, [i for i, names in enumerate(lists) if name in names]) for name in named
    }
    try:
        _enable(model, held, dict.fromkeys(were, False))
        for name, tree in named.items():
            _assign(tree, lanes[name])
        _enable(model, held, dict.fromkeys(named, True))
        yield lanes
    finally:
        _enable(model, held, dict.fromkeys(were, False))
        for tree in named.values():
            _assign(tree, None)
        _enable(model, held, were)


@contextmanager
def only(model: nn.Module, name: str) -> Generator[None]:
    """While it is open one delta acts alone."""
    held = container(model)
    assert held is not None
    were = {tree.name: tree.enabled for tree in held.trees()}
    try:
        _enable(model, held, {other: other == name for other in were})
        yield
    finally:
        _enable(model, held, were)


def _named(model: nn.Module, rows: Sequence[Sequence[str]]) -> dict[str, Tree]:
    """The deltas that rows name."""
    known, found = deltas(model), {}
    if not rows:
        raise AttachError("no row is named; give the name of a delta, or None, for each row")
    for number, names in enumerate(rows):
        for name in names:
            if name not in known:
                raise AttachError(
                    f"row {number} names the delta `{name}`{closest(str(name), known)}, and "
                    f"attached are {listing(known) or 'none'}"
                )
            if known[name].merged:
                raise AttachError(
                    f"row {number} names `{name}`, which is merged into the weights and so acts on "
                    "every row; `unmerge()` it first"
                )
            found[name] = known[name].tree
    return found


def _assign(tree: Tree, lane: Lane | None) -> None:
    for unit in tree.units:
        unit.__dict__["lane"] = lane


def _enable(model: nn.Module, held: Deltas, names: dict[str, bool]) -> None:
    for tree in held.trees():
        tree.enabled = names.get(tree.name, tree.enabled)
    held.act(model)
