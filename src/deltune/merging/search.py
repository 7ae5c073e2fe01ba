"""Weights by trying: gradient-free search of them on a few examples, and the greedy soup.

Deltas that are attached together add up, and `scale` is the weight of each, so that a weighted sum
is tried without being made; `merge` with the weights that were found makes it.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deltune.delta import Delta
from deltune.errors import MergeError, listing


@dataclass(frozen=True, slots=True)
class Found:
    """The best weights that were tried."""

    weights: tuple[float, ...]
    value: float
    """loss + penalty mean_i |w_i| at them."""
    tried: int


@dataclass(frozen=True, slots=True)
class Soup:
    """The deltas whose mean scores best, of those that were tried."""

    members: tuple[int, ...]
    """Numbers of the deltas, the best alone first; their weights are 1 / len(members) each."""
    score: float
    scores: tuple[float, ...]
    """Of each delta alone."""


def search_weights(
    deltas: Sequence[Delta],
    loss: Callable[[], float],
    *,
    most: float = 1.5,
    penalty: float = 0.05,
    steps: int = 40,
    seed: int = 0,
) -> Found:
    """Finds weights of attached deltas whose sum has a small loss, without gradients:

        min over w in [-most, most]^n of loss(sum_i w_i T_i) + penalty / n sum_i |w_i|

    Half of the losses are those at the points of a Sobol sequence, 0 the first of them; the rest is
    Powell's method, from the best of those on.

    Args:
        deltas: attached to one model; other deltas act as they are.
        loss: of the model as it stands, on the same few examples at every call.
        most: largest absolute weight.
        penalty: on the mean absolute weight.
        steps: losses that are computed, at most.
        seed: of the search.

    Returns:
        The best weights, to be given to `merge`. The deltas are as before.

    Raises:
        MergeError: deltas on several models, merged ones, ones without a scale; a loss that is no
            finite number at any weights.

    Source: Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA
    Composition", arXiv:2307.13269.
    Differs: the changes themselves are summed, not their factors A and B each by itself; the
    penalty is on the mean, as in the authors' code; scipy's search takes the place of Shiwa.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.merging import search_weights
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
        >>> delta = dt.attach(model, "full").load_vector(torch.ones(4))
        >>> target = model(torch.ones(1, 4)).item() - 2.0
        >>> def loss(): return abs(model(torch.ones(1, 4)).item() - target)
        >>> found = search_weights([delta], loss, penalty=0.0)
        >>> round(found.weights[0], 2)
        0.5
    """
    from scipy.optimize import minimize
    from scipy.stats import qmc

    if not deltas or most <= 0 or steps < 1:
        raise MergeError(f"nothing to search: {len(deltas)} deltas, {most=}, {steps=}")
    n = len(deltas)
    best: tuple[float, tuple[float, ...]] = (float("inf"), ())
    tried = 0

    def value(weights: Sequence[float]) -> float:
        nonlocal best, tried
        if tried >= steps:
            raise _Enough
        tried += 1
        with torch.no_grad(), weighed(deltas, weights):
            found = float(loss())
        found += penalty * sum(abs(w) for w in weights) / n
        if found < best[0]:
            best = found, tuple(float(w) for w in weights)
        return found

    broad = qmc.Sobol(n, seed=seed).random_base2(max(1, (max(2, steps // 2) - 1).bit_length()))
    try:
        value([0.0] * n)
        for point in broad[: max(0, steps // 2 - 1)]:
            value([most * (2.0 * float(share) - 1.0) for share in point])
        if best[1]:
            minimize(value, best[1], method="Powell", bounds=[(-most, most)] * n)
    except _Enough:
        pass
    if not best[1]:
        raise MergeError(f"the loss was no finite number at any of {tried} weights that were tried")
    return Found(best[1], best[0], tried)


class _Enough(Exception):
    """All steps are spent."""


def greedy_soup(deltas: Sequence[Delta], score: Callable[[], float]) -> Soup:
    """The mean of some deltas, chosen greedily: from the best alone on, each is taken whose mean
    with those before does not score lower. Task heads are means too.

    Args:
        deltas: attached to one model; other deltas act as they are.
        score: of the model as it stands, on held-out examples; higher is better.

    Returns:
        The members, to be given to `merge` with `keep_head="mean"`. The deltas are as before.

    Raises:
        MergeError: as `search_weights`; heads of several shapes.

    Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models
    improves accuracy without increasing inference time", arXiv:2203.05482, recipe 1.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.merging import greedy_soup
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> deltas = [dt.attach(model, "full", str(i)) for i in range(3)]
        >>> for delta, value in zip(deltas, (1.0, 3.5, 9.0)):
        ...     delta = delta.load_vector(torch.tensor([value]))
        >>> base = model[0].weight.item()
        >>> greedy_soup(deltas, lambda: -abs(model(torch.ones(1, 1)).item() - base - 2.0)).members
        (0, 1)
    """
    if not deltas:
        raise MergeError("there is no delta to make a soup of")

    def mean(members: Sequence[int]) -> float:
        shares = [1.0 / len(members) if i in members else 0.0 for i in range(len(deltas))]
        with torch.no_grad(), weighed(deltas, shares, heads=True):
            return float(score())

    alone = [mean([i]) for i in range(len(deltas))]
    order = sorted(range(len(deltas)), key=lambda i: -alone[i])
    members, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        found = mean([*members, i])
        if found >= best:
            members, best = [*members, i], found
    return Soup(tuple(members), best, tuple(alone))


@contextmanager
def weighed(
    deltas: Sequence[Delta], weights: Sequence[float], heads: bool = False
) -> Generator[None]:
    """The weighted sum of attached deltas inside a `with` block, on top of their own scales.

    Args:
        deltas: of one model.
        weights: one for each.
        heads: whether the head is the weighted mean, and deltas of weight 0 do not act; else it is
            that of the delta attached last.
    """
    model = deltas[0].model
    odd = [d.name for d in deltas if d.merged or d.model is not model]
    if odd:
        raise MergeError(
            f"{listing(odd)} is merged into the weights or on another model; weights are tried on "
            "deltas that act side by side"
        )
    before = [(delta, delta.enabled, delta.scale) for delta in deltas]
    acting = [d for d, w in zip(deltas, weights, strict=True) if w]
    kept = _mean_head(deltas, acting, weights) if heads and acting else {}
    try:
        for (delta, _, scale), weight in zip(before, weights, strict=True):
            if weight or not heads:
                delta.enable().scale = scale * weight
            else:
                delta.disable()
        yield
    finally:
        for delta, enabled, scale in before:
            delta.scale = scale
            delta.enable() if enabled else delta.disable()
        for tensor, value in kept.items():
            tensor.copy_(value)


def _mean_head(
    deltas: Sequence[Delta], acting: Sequence[Delta], weights: Sequence[float]
) -> dict[Tensor, Tensor]:
    """Writes the weighted mean of the heads into that of each delta that acts; what was there."""
    shares = {d.name: w for d, w in zip(deltas, weights, strict=True)}
    heads = [{n: t for n, t in d.tensors().items() if n.startswith("head.")} for d in acting]
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in heads]
    if any(one != shapes[0] for one in shapes):
        raise MergeError(f"the heads of {listing(d.name for d in acting)} have different shapes")
    total = sum(shares[d.name] for d in acting)
    kept: dict[Tensor, Tensor] = {}
    means = {
        name: torch.stack(
            [shares[d.name] / total * one[name] for d, one in zip(acting, heads, strict=True)]
        ).sum(0)
        for name in shapes[0]
    }
    for one in heads:
        for name, tensor in one.items():
            kept[tensor] = tensor.clone()
            tensor.copy_(means[name])
    return kept
