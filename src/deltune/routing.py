"""Routing: which deltas act, on all rows of a batch, on each, or on copies of all."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltune.container import Deltas, Seats, container
from deltune.delta import deltas
from deltune.errors import AttachError, closest, listing
from deltune.mechanisms.lanes import Lane, Router, remade
from deltune.sites.quirks import COMPARES, rowless
from deltune.tree import Tree

Row = str | None | Sequence[str]
KEPT = 32  # routers of earlier blocks


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
        model: with the deltas attached, or a `Bank` beside it.
        rows: for each row of the batch the name of a delta, or of a member of a bank, several
            names, or None for the model alone.

    Raises:
        AttachError: no such delta, one that is merged, more members than a bank has room for; rows
            that are routed already; a model whose batches have their rows in the second dimension;
            in a forward, a batch of another number of rows, or a method on a model on which it
            cannot serve row by row.
        StoreError: a member that cannot be read, by its name.

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
    owners = _owners(model, held, lists)
    if held is None:
        yield {}
        return
    second = (n for n, m in model.named_modules() if getattr(m, "batch_first", True) is False)
    if odd := next(second, None):
        raise AttachError(
            f"`{odd}` has the rows of a batch in the second dimension (batch_first=False); rows "
            "are routed in the first"
        )
    _refuse_routed(held)
    were = {tree: tree.enabled for tree in held.trees()}
    try:
        named = _trees(held, owners)
        held.guests = [tree for tree in named.values() if tree not in were]
        _enable(model, held, dict.fromkeys(were, False))
        lanes = dict(zip(named, _lanes(model, held, lists, named), strict=True))
        for name, tree in named.items():
            _assign(tree, lanes[name])
        _enable(model, held, dict.fromkeys(named.values(), True))
        yield lanes
    finally:
        _enable(model, held, dict.fromkeys((*were, *held.guests), False))
        for tree in (*were, *held.guests):
            _assign(tree, None)
        held.guests = []
        for bank in held.banks:
            bank.rise()
        _enable(model, held, were)


@contextmanager
def only(model: nn.Module, name: str) -> Generator[None]:
    """While it is open one delta acts alone."""
    held = container(model)
    assert held is not None
    were = {tree: tree.enabled for tree in held.trees()}
    try:
        _enable(model, held, {tree: tree.name == name for tree in were})
        yield
    finally:
        _enable(model, held, were)


def activate(model: nn.Module, names: Row) -> None:
    """Lets just these of a model's deltas act, in the time that those take that change.

    Args:
        model: with the deltas attached.
        names: the name of a delta, several names, or None for the model alone.

    Raises:
        AttachError: no such delta; another one that is merged; rows that are routed.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> a, b = (dt.attach(model, "lora(rank=2, where='0')", name=n) for n in "ab")
        >>> dt.activate(model, "b")
        >>> a.enabled, b.enabled
        (False, True)
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    held = container(model)
    known = {tree.name: tree for tree in held.trees()} if held else {}
    for name in wanted:
        if name not in known:
            raise AttachError(
                f"no delta `{name}` is attached{closest(str(name), known)}; attached are "
                f"{listing(known) or 'none'}"
            )
    if held is None:
        return
    _refuse_routed(held)
    for name, tree in known.items():
        if tree.merged and name not in wanted:
            raise AttachError(
                f"delta `{name}` is merged into the weights and acts in any case; "
                "`unmerge()` it first, or name it too"
            )
    for name, tree in known.items():
        acts = name in wanted and not tree.merged
        if tree.enabled != acts:
            tree.enabled = acts
    held.act(model)


def parallel(model: nn.Module, names: Sequence[Row], *args: Any, **batch: Any) -> tuple[Any, ...]:
    """The model's outputs on one batch with several deltas, in one forward: one for each.

    The rows are repeated for each of `names` and routed (`route`), so each output is what the model
    makes of the batch with these deltas alone, with gradients. A key/value cache is one of all
    rows, and is left out of the outputs.

    Args:
        model: with the deltas attached.
        names: for each output the name of a delta, several names, or None for the model alone.
        args: of the model's forward, as for one run.
        batch: the same, by name.

    Raises:
        AttachError: as `route`; a model that compares rows with each other; an output that is not
            one of each row, such as the loss of all: leave `labels` out and compute it from the
            logits.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, "lora(rank=2, where='0')", name="a")
        >>> with_a, plain = dt.parallel(model, ["a", None], torch.ones(3, 4))
        >>> with_a.shape
        torch.Size([3, 4])
    """
    rows = next((x.shape[0] for x in _tensors((args, batch)) if x.ndim), 0)
    times = len(names)
    if not rows or not times:
        raise AttachError("`parallel` needs a batch with rows, and a name for each output")
    if any(name.rpartition(".")[2] == COMPARES for name, _ in model.named_parameters()):
        raise AttachError(
            f"{type(model).__name__} compares the rows of a batch with each other, and copies of "
            "them would be compared too; run the batch with each delta by itself"
        )
    with route(model, [name for name in names for _ in range(rows)]):
        output = model(*_mapped(args, _repeat(rows, times)), **_mapped(batch, _repeat(rows, times)))
    return tuple(_mapped(output, _taken(n, rows, times)) for n in range(times))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of tensors, with each changed."""
    if isinstance(value, dict):
        kind: Any = type(value)
        return kind(**{name: _mapped(one, change) for name, one in value.items()})
    if isinstance(value, list | tuple):
        return remade(value, [_mapped(one, change) for one in value])
    return change(value)


def _repeat(rows: int, times: int) -> Callable[[Any], Any]:
    def repeated(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or (x.shape[0] == 1 and rows > 1):
            return x
        if x.shape[0] != rows:
            raise AttachError(
                f"`parallel` repeats the {rows} rows of a batch, and {tuple(x.shape)} has another "
                "number; give every tensor a row for each, or one for all"
            )
        return torch.cat([x] * times)

    return repeated


def _taken(n: int, rows: int, times: int) -> Callable[[Any], Any]:
    def part(x: Any) -> Any:
        if hasattr(x, "get_seq_length"):
            return None
        if not isinstance(x, Tensor):
            return x
        if x.ndim == 0 or x.shape[0] != rows * times:
            raise AttachError(
                f"an output of shape {tuple(x.shape)} is not one of each row, and cannot be taken "
                "apart; leave `labels` out, and compute losses from the logits"
            )
        return x[n * rows : (n + 1) * rows]

    return part


def _owners(
    model: nn.Module, held: Deltas | None, rows: Sequence[Sequence[str]]
) -> dict[str, Tree | Seats]:
    """The deltas that rows name, and of members the banks that they are in."""
    known, found, banks = deltas(model), {}, held.banks if held else []
    if not rows:
        raise AttachError("no row is named; give the name of a delta, or None, for each row")
    for number, names in enumerate(rows):
        for name in names:
            if name in found:
                continue
            owners: list[Tree | Seats] = [known[name].tree] if name in known else []
            owners += [bank for bank in banks if name in bank]
            if not owners:
                every = [*known, *(member for bank in banks for member in bank)]
                raise AttachError(
                    f"row {number} names the delta `{name}`{closest(str(name), every)}, and "
                    f"attached{' or in a bank' if banks else ''} are {listing(every) or 'none'}"
                )
            if len(owners) > 1:
                raise AttachError(
                    f"row {number} names `{name}`, which is the name of {len(owners)}: attached "
                    "deltas and members of banks; give one of them another name"
                )
            if name in known and known[name].merged:
                raise AttachError(
                    f"row {number} names `{name}`, which is merged into the weights and so acts on "
                    "every row; `unmerge()` it first"
                )
            found[name] = owners[0]
    return found


def _trees(held: Deltas, owners: dict[str, Tree | Seats]) -> dict[str, Tree]:
    """The trees of these names, each member of a bank in one of the bank's."""
    seated: dict[str, Tree] = {}
    for bank in held.banks:
        names = [name for name, owner in owners.items() if owner is bank]
        seated |= zip(names, bank.seat(names), strict=True)
    return {n: owner if isinstance(owner, Tree) else seated[n] for n, owner in owners.items()}


def _lanes(
    model: nn.Module, held: Deltas, rows: Sequence[Sequence[str]], named: Iterable[str]
) -> list[Lane]:
    """A lane for each name; those of an earlier block whose rows had deltas in common as these do,
    so that a compiled model meets what it knows."""
    numbers = {name: number for number, name in enumerate(named)}
    pattern = tuple(tuple(sorted({numbers[name] for name in names})) for names in rows)
    lanes = held.routes.pop(pattern, None)
    if lanes is None:
        router = Router(len(rows), {})
        of = [[i for i, one in enumerate(pattern) if k in one] for k in range(len(numbers))]
        lanes = [Lane(router, mine) for mine in of]
    held.routes[pattern] = lanes  # now the latest
    if len(held.routes) > KEPT:
        del held.routes[next(iter(held.routes))]
    if lanes:
        lanes[0].router.reset(rowless(model))
    return lanes


def _refuse_routed(held: Deltas) -> None:
    trees = (*held.trees(), *held.guests)
    first = (unit for tree in trees for units in tree.parts.values() for unit in units[:1])
    if any(unit.lane is not None for unit in first):
        raise AttachError("rows are routed already; leave that `with` block first")


def _assign(tree: Tree, lane: Lane | None) -> None:
    for unit in tree.units:
        unit.__dict__["lane"] = lane


def _enable(model: nn.Module, held: Deltas, trees: dict[Tree, bool]) -> None:
    for tree, enabled in trees.items():
        tree.enabled = enabled
    held.act(model)
