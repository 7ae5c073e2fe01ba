"""Lean training: the same gradients, with less kept for the backward pass."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature, unwrap
from typing import Any

from torch import nn

from deltune.errors import AttachError
from deltune.mechanisms.feedforward import recognise
from deltune.mechanisms.output import Output
from deltune.mechanisms.recompute import FORWARD, Norm
from deltune.sites.discover import Atlas, discover
from deltune.sites.matrices import is_norm


@dataclass(frozen=True, slots=True)
class Lean:
    """What is lean.

    Attributes:
        feed_forward: paths of the feed-forward modules.
        norms: number of norms.
        head: path of the output layer; '' for none.
    """

    feed_forward: tuple[str, ...]
    norms: int
    head: str


@contextmanager
def lean(
    model: nn.Module, *, feed_forward: bool = True, norms: bool = True, head: bool = True
) -> Generator[Lean]:
    """Inside the `with` block training keeps less for the backward pass, with the same gradients.

    A feed-forward part D (g(G x) (.) U x), or D g(U x), keeps G x and U x; its activation and
    product, elementwise, are computed again, also for a delta on D. A frozen norm that is written
    in Python, as RMSNorm is in transformers, keeps its input alone, and nothing in a wider type.
    The loss of a frozen output layer is computed some tokens at a time together with its gradient
    to the states, in the place of all logits: where a model is given labels while gradients are on,
    its output has a loss and no logits. No matrix product runs twice.

    Deltas may be attached before or inside; the model's modules stay as they are, hidden behind
    forwards that do the same, and outside of the block it is what it was. A compiled model keeps
    what its compiler chooses.

    Args:
        model: a model of which the sites of feed-forward parts are known.
        feed_forward: whether these are lean.
        norms: whether these are.
        head: whether the output layer is, where the model has one for tokens.

    Raises:
        AttachError: a part whose structure is not known, by its path; inside, an output layer that
            is trained, or labels where the model has a loss of its own.

    Source: recomputing activations and chunking the loss are common practice (Chen et al. 2016,
    arXiv:1604.06174, for recomputing; Hsu et al. 2024, arXiv:2410.10989, for the loss of a linear
    layer in chunks).

    Example:
        >>> import deltune as dt
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=50))
        >>> delta = dt.attach(model, "lora(rank=2, where='attn, ffn')")
        >>> with dt.lean(model) as parts:
        ...     parts
        Lean(feed_forward=('model.layers.0.mlp', 'model.layers.1.mlp'), norms=5, head='lm_head')
    """
    atlas = discover(model)
    parts = [site for site in atlas.sites if site.role == "ffn" and site.kind == "sublayer"]
    if feed_forward and not parts:
        raise AttachError(
            f"no feed-forward part was found in {type(model).__name__}; pass feed_forward=False"
        )
    made = [recognise(atlas, part) for part in parts] if feed_forward else []
    frozen = [module for module in atlas.modules.values() if norms and _written(module)]
    output = _output(model, atlas) if head else None
    forms = [*made, *((module, Norm(module)) for module in frozen)]
    try:
        for module, form in forms:
            module.__dict__[FORWARD] = form.forward
        if output is not None:
            output.enter()
        paths = tuple(form.path for _, form in made)
        yield Lean(paths, len(frozen), output.path if output else "")
    finally:
        if output is not None:
            output.leave()
        for module, _ in forms:
            module.__dict__.pop(FORWARD, None)


def _written(module: nn.Module) -> bool:
    """Whether a module is a norm of one tensor, written in Python."""
    if not is_norm(module) or type(module).__module__.startswith("torch."):
        return False
    given = signature(type(module).forward).parameters.values()
    names = [p.name for p in given if p.default is p.empty]
    leaf = not module._modules and not module._buffers and module._parameters
    return bool(leaf) and len(names) == 2 and FORWARD not in module.__dict__


def _output(model: Any, atlas: Atlas) -> Output | None:
    """The output layer over tokens, if the model has one."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        return None
    path = next((path for path, module in atlas.modules.items() if module is layer), "")
    if type(layer) is not nn.Linear or FORWARD in layer.__dict__:
        raise AttachError(
            f"the output layer `{path}` is a {type(layer).__name__}, no plain linear map, or its "
            "forward was replaced already; pass head=False"
        )
    from transformers.loss.loss_utils import ForCausalLMLoss

    code = getattr(unwrap(type(model).forward), "__code__", None)
    asked = code is not None and "loss_function" in code.co_names
    plain = asked and model.loss_function is ForCausalLMLoss
    return Output(model, layer, path, plain)
