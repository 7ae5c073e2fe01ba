"""Prompt tuning: learned embeddings before the input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltune.errors import SpecError
from deltune.mechanisms.prompt import Prompting, embed
from deltune.mechanisms.tensors import Init, Param, uniform
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Prompt(Prompting):
    """Learned embeddings before the embedded input, of the encoder where there is one.

        [P; embed(x)],    P (l, d)

    Trainable: l d. At the input only, so there is nothing to merge.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021,
    arXiv:2104.08691, section 2 and 2.1.
    Differs: the prompt stands directly before the first real token of each row, and its states
    are taken out behind the last block, so an encoder's pooler still reads its [CLS] token and
    logits keep the length of the input. `uniform` is symmetric, U(-`bound`, `bound`), as in the
    paper; the released code samples [0, `bound`), which is `positive`. The authors take l = 100.
    They may also start from the words of the classes, each the mean of its pieces, and fill up
    with sampled rows; `from_text` repeats the pieces of a text.
    """

    kind: ClassVar[str] = "prompt"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Lester et al.", "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021,
        "2104.08691",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs and gradients"

    tokens: int = 20
    """Prompt length l."""
    init: Literal["uniform", "positive", "vocabulary", "ids"] = "uniform"
    """U(-`bound`, `bound`), U(0, `bound`), sampled rows of the first (most frequent) `vocabulary`
    tokens, or `ids`."""
    bound: float = 0.5
    """Range of `uniform` and `positive`."""
    vocabulary: int | None = 5000
    """How many tokens `vocabulary` samples from, without replacement; None: all."""
    ids: tuple[int, ...] = ()
    """Token ids whose embeddings start the prompt (repeated or cut to its length): a text, by
    `Prompt.from_text`."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, self, "tokens", "1 or more")
        require(self.bound >= 0.0, self, "bound", "0 or more")
        sampled = self.vocabulary is None or self.vocabulary >= 1
        require(sampled, self, "vocabulary", "1 or more, or None")
        require(self.init != "ids" or bool(self.ids), self, "ids", "given with `init='ids'`")
        require(self.init == "ids" or not self.ids, self, "init", "`'ids'` where `ids` are given")

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, tokens: int | None = None) -> "Prompt":
        """A prompt that starts as the embeddings of a text.

        Args:
            text: the words.
            tokenizer: of the model.
            tokens: prompt length; that of the text by default.
        """
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return cls(tokens=tokens or len(ids), init="ids", ids=tuple(int(i) for i in ids))

    @property
    def length(self) -> int:
        return self.tokens

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        stack, table = atlas.modules[site.path], atlas.modules[site.entry].get_parameter("weight")
        return {"P": Param((self.tokens, site.shape[-1]), self._start(stack, table))}

    def embeddings(self, t: Unit) -> Tensor:
        return t.P

    def _start(self, stack: nn.Module, table: Tensor) -> Init:
        if self.init in ("uniform", "positive"):
            return uniform(-self.bound if self.init == "uniform" else 0.0, self.bound)
        most = table.shape[0]
        if self.init == "ids":
            wrong = [i for i in self.ids if not 0 <= i < most]
            if wrong:
                raise SpecError(
                    f"`{self.kind}(ids=...)`: token {wrong[0]} is not in the vocabulary of {most}"
                )
            cycled = torch.tensor(self._cycled(self.ids), device=table.device)
            return lambda p, generator: p.copy_(embed(stack, cycled))
        pool = most if self.vocabulary is None else min(self.vocabulary, most)
        if pool < self.tokens:
            raise SpecError(
                f"`{self.kind}(tokens={self.tokens}, vocabulary={self.vocabulary})`: {self.tokens} "
                f"different tokens cannot be sampled from {pool}"
            )

        def sampled(p: Tensor, generator: torch.Generator | None) -> None:
            order = torch.randperm(pool, generator=generator, device=table.device)
            p.copy_(embed(stack, order[: self.tokens]))

        return sampled

    def _cycled(self, ids: Sequence[int]) -> list[int]:
        return [ids[i % len(ids)] for i in range(self.tokens)]
