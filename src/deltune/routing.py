"""Routing: another delta for each row of a batch."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from torch import nn

from deltune.container import Deltas, Seats, Tree, container
from deltune.delta import deltas
from deltune.errors import AttachError, closest, listing
from deltune.mechanisms.lanes import Lane, Router
from deltune.sites.quirks import rowless

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
    lists = [[row] if isinstance(row, str) else list(row or ()) for row in rows]
    held = container(model)
    owners = _owners(model, held, lists)
    if held is None:
        yield
        return
    second = (n for n, m in model.named_modules() if getattr(m, "batch_first", True) is False)
    if odd := next(second, None):
        raise AttachError(
            f"`{odd}` has the rows of a batch in the second dimension (batch_first=False); rows "
            "are routed in the first"
        )
    acting = (*held.trees(), *held.guests)
    if any(unit.lane is not None for tree in acting for unit in tree.units[:1]):
        raise AttachError("rows are routed already; leave that `with` block first")
    were = {tree: tree.enabled for tree in held.trees()}
    try:
        named = _trees(held, owners)
        held.guests = [tree for tree in named.values() if tree not in were]
        _enable(model, held, dict.fromkeys(were, False))
        for tree, lane in zip(named.values(), _lanes(model, held, lists, named), strict=True):
            _assign(tree, lane)
        _enable(model, held, dict.fromkeys(named.values(), True))
        yield
    finally:
        _enable(model, held, dict.fromkeys((*were, *held.guests), False))
        for tree in (*were, *held.guests):
            _assign(tree, None)
        held.guests = []
        for bank in held.banks:
            bank.rise()
        _enable(model, held, were)


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


def _assign(tree: Tree, lane: Lane | None) -> None:
    for unit in tree.units:
        unit.__dict__["lane"] = lane


def _enable(model: nn.Module, held: Deltas, trees: dict[Tree, bool]) -> None:
    for tree, enabled in trees.items():
        tree.enabled = enabled
    held.act(model)
