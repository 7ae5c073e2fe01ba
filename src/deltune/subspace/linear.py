"""Subspaces in closed form: joint principal components, canonical correlation, and random maps.

They need no training and see the solutions through their inner products only, so their cost does
not grow with n beyond one pass. They are what a learned space is compared with.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deltune.errors import SubspaceError
from deltune.subspace.maps import RANDOM, Matrix, Random, Up
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace


def principal(solutions: Solutions, dimension: int) -> Subspace:
    """Joint principal components: codes C (tasks, d) that all methods share and maps U_t that
    together leave least of the solutions X_t (tasks, n_t),

        min over C, U_t of sum_t || X_t - C U_t^T ||^2 / || X_t ||^2

    C spans the d largest eigenvectors of sum_t X_t X_t^T / || X_t ||^2, with coordinates of unit
    mean square, and U_t = X_t^T C / tasks. With one method this is the SVD.

    Args:
        solutions: of at least `dimension` tasks.
        dimension: d.

    Raises:
        SubspaceError: a dimension that these solutions do not span.
    """
    return _spanned(solutions, dimension, {n: g / g.trace() for n, g in solutions.grams.items()},
                    "principal")  # fmt: skip


def correlated(solutions: Solutions, dimension: int, ridge: float = 0.1) -> Subspace:
    """Canonical correlation of several sets: codes on which the methods agree best, however little
    of each solution they are. They span the d largest eigenvectors of

        sum_t X_t X_t^T (X_t X_t^T + ridge || X_t ||^2 / tasks)^-1

    Without the ridge every set of fewer tasks than scalars explains every code.

    Source: MAXVAR of Kettenring, "Canonical analysis of several sets of variables", 1971,
    Biometrika 58(3), with a ridge.

    Args:
        solutions: of at least `dimension` tasks.
        dimension: d.
        ridge: above 0; larger ones come closer to the principal components.

    Raises:
        SubspaceError: as `principal`; a ridge that is not above 0.
    """
    if not ridge > 0:
        raise SubspaceError(f"ridge is {ridge}; give a number above 0")
    shares = {}
    for name, gram in solutions.grams.items():
        eye = torch.eye(len(gram), dtype=gram.dtype)
        shares[name] = gram @ torch.linalg.inv(gram + ridge * gram.trace() / len(gram) * eye)
    return _spanned(solutions, dimension, shares, "correlated")


def drawn(solutions: Solutions, dimension: int, seed: int = 0, kind: str = "dense") -> Subspace:
    """The control: maps U_t drawn at random, which know nothing of the solutions but how long they
    are. A code of unit mean square is decoded to a vector of the solutions' mean square.

    Args:
        solutions: give starts and lengths.
        dimension: d.
        seed: of the draw; each method has its own.
        kind: `dense`, or `fastfood` in memory that does not grow with d.

    Raises:
        SubspaceError: another kind; a dimension above the numbers of a method, of which a code
            would not be known by what it is decoded to.
    """
    if kind not in RANDOM:
        raise SubspaceError(f"kind is `{kind}`; choose one of {', '.join(RANDOM)}")
    least = min(solutions.methods, key=lambda name: solutions.starts[name].numel())
    most = solutions.starts[least].numel()
    if not 1 <= dimension <= most:
        raise SubspaceError(
            f"the dimension is {dimension} and a solution of `{least}` has {most} numbers; choose "
            f"1 to {most}"
        )
    ups: dict[str, Up] = {}
    for place, (name, gram) in enumerate(solutions.grams.items()):
        one = Random(kind, solutions.starts[name].numel(), dimension, seed + 1009 * place)
        length = (gram.trace() / len(gram)).sqrt()
        probe = one.project(torch.eye(dimension)).square().sum().sqrt()
        ups[name] = replace(one, factor=float(length / probe))
    about = {"found": f"random, {kind}", "seed": seed}
    space = Subspace(ups, solutions.starts, {}, solutions.tasks, about, deltas=solutions.deltas)
    return replace(space, codes=solutions.rowwise(space.encode))


def bound(solutions: Solutions, dimension: int) -> dict[str, Tensor]:
    """method -> the least || X_t - R || / || X_t || of any R of rank d: what no linear decoder of d
    numbers, joint or not, goes below (Eckart and Young)."""
    found = {}
    for name, gram in solutions.grams.items():
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        tail = values[: max(0, len(values) - dimension)].sum()
        found[name] = (tail / values.sum()).sqrt()
    return found


def _spanned(
    solutions: Solutions, dimension: int, shares: Mapping[str, Tensor], how: str
) -> Subspace:
    """The space of the codes that the largest eigenvectors of a sum over methods span."""
    tasks = len(solutions.tasks)
    values, vectors = torch.linalg.eigh(torch.stack(list(shares.values())).sum(dim=0))
    rank = int((values > values[-1] * tasks * torch.finfo(torch.float32).eps).sum())
    if not 1 <= dimension <= rank:
        raise SubspaceError(
            f"the dimension is {dimension} and {tasks} tasks' solutions span {rank}; choose 1 to "
            f"{rank}, or give more tasks"
        )
    codes = vectors[:, -dimension:].flip(1) * tasks**0.5
    codes = torch.where(codes.sum(dim=0) < 0, -codes, codes)  # the sign is no one's to choose
    ups: dict[str, Up] = {name: _regressed(solutions, name, codes) for name in solutions.read}
    kept = dict.fromkeys(solutions.methods, codes.float())
    about = {"found": how}
    return Subspace(ups, solutions.starts, kept, solutions.tasks, about, deltas=solutions.deltas)


def _regressed(solutions: Solutions, method: str, codes: Tensor) -> Matrix:
    """X^T C / tasks, a block of tasks at a time."""
    up = torch.zeros(())
    for some, rows in solutions.blocks(method):
        own = codes[some].to(rows.dtype)
        up = rows.T @ own if some.start == 0 else up.addmm_(rows.T, own)
    return Matrix(up / len(codes))
