"""The catalogue of methods: what each is, where it comes from, what it costs."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from deltune.errors import DeltuneError
from deltune.planning import plan
from deltune.spec import OPERATORS, Composite, Spec, methods, primitives

FAMILIES = ("addition", "specification", "reparameterization", "composite", "baseline")


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a method."""

    name: str
    type: str
    default: Any
    doc: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One method as the catalogue lists it."""

    kind: str
    family: str
    mechanism: str
    merges: bool
    paper: str
    title: str
    about: str
    """The first sentence of its description."""
    equation: str
    """The first displayed equation of its description."""
    doc: str
    """The whole description: equation, symbols, source, deviations."""
    checked: str
    """What its equation is tested against."""
    example: str
    options: tuple[Option, ...]

    def trainable(self) -> str:
        """Trained scalars at the defaults without a task head: on BERT-base, else on T5-base."""
        for name, build in REFERENCES.items():
            try:
                return f"{plan(build(), self.example, head=False).count():,} ({name})"
            except DeltuneError:
                continue
        return "depends on the model"


@cache
def bert_base() -> nn.Module:
    """BERT-base with its pooler and without head, on the meta device: shapes, no memory."""
    import transformers

    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig())


@cache
def t5_base() -> nn.Module:
    """T5-base on the meta device."""
    import transformers

    config = transformers.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


REFERENCES: dict[str, Callable[[], nn.Module]] = {"BERT-base": bert_base, "T5-base": t5_base}


def entry(kind: str) -> Entry:
    """The catalogue's entry of one method, or of an operator on them."""
    cls = {**methods(), **OPERATORS}[kind]
    doc = inspect.getdoc(cls) or ""
    paper = cls.paper
    return Entry(
        kind=kind, family=cls.family, mechanism=_mechanism(cls), merges=_merges(cls),
        paper=str(paper) if paper else "", title=paper.title if paper else "",
        about=doc.split("\n\n")[0].replace("\n", " "), equation=_equation(doc), doc=doc,
        checked=vars(cls).get("checked", Spec.checked), example=cls.example or kind,
        options=tuple(_options(cls)),
    )  # fmt: skip


def entries() -> list[Entry]:
    """Every method, by family and name."""
    found = [entry(kind) for kind in sorted(methods())]
    return sorted(found, key=lambda one: FAMILIES.index(one.family))


def markdown() -> str:
    """The catalogue as a page."""
    known = entries()
    lines = ["# Methods", "", _INTRODUCTION, ""]
    for family in FAMILIES:
        members = [one for one in known if one.family == family]
        if members:
            lines += [f"## {_TITLES[family]}", "", *_table(members), ""]
    lines += ["## Not here", "", _ELSEWHERE, ""]
    for one in known:
        lines += [f"## `{one.kind}`", "", one.doc, ""]
        lines += [f'`dt.attach(model, "{one.example}")`', ""]
        if one.options:
            lines += ["| option | default | what it is |", "|---|---|---|"]
            lines += [f"| `{o.name}` | `{o.default!r}` | {_cell(o.doc)} |" for o in one.options]
            lines += [""]
    return "\n".join(lines)


_TITLES = {
    "addition": "Addition: new modules and tokens",
    "specification": "Specification: chosen parameters of the backbone",
    "reparameterization": "Reparameterization: changes of a low-dimensional form",
    "composite": "Combinations under a name of their own",
    "baseline": "Baselines",
}
_INTRODUCTION = """\
Every method by its family. *Trained* counts the scalars at the defaults, without a task head. A
method that *merges* is added to the weights exactly. *Checked against* names the independent oracle
of its tests. `a + b` is both at once, and [other operators](algebra.md) make one delta of several;
`deltune methods lora` prints one entry. This page is made by
`deltune methods --markdown`."""

_ELSEWHERE = """\
AdapterFusion is an operator on deltas, `fuse`, beside others: [the algebra](algebra.md). Of the
literature of delta tuning these are no single method for one model and one task, and are still to
come: HyperFormer, CA-MTL and the sharing of VL-Adapter (several tasks); MEND and KnowledgeEditor
(editing); intrinsic prompt tuning (a subspace of many tasks' prompts). The
language adapters of speech translation are `adapter(init='speech', norm=True)`, one for each
language. LiST is here as its adapter; its self-training is a way of training, not a delta."""


def _table(members: list[Entry]) -> list[str]:
    head = "| method | what it is | mechanism | paper | trained | merges | checked against |"
    return [head, "|---|---|---|---|---|---|---|"] + [
        f"| [`{one.kind}`](#{one.kind}) | {_cell(one.about)} | {one.mechanism} | {one.paper} | "
        f"{one.trainable()} | {'exactly' if one.merges else 'no'} | {one.checked} |"
        for one in members
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _mechanism(cls: type[Spec]) -> str:
    if issubclass(cls, Composite):
        return " + ".join(dict.fromkeys(part.mechanism for part in primitives(cls())))
    return cls.mechanism


def _merges(cls: type[Spec]) -> bool:
    if issubclass(cls, Composite):
        return all(part.merges for part in primitives(cls()))
    return cls.merges


def _equation(doc: str) -> str:
    """The first indented block of a description."""
    found = re.search(r"(?:^|\n\n)((?:[ ]{4,}\S.*(?:\n|$))+)", doc)
    return textwrap.dedent(found[1]).rstrip() if found else ""


def _options(cls: type[Spec]) -> list[Option]:
    docs = _field_docs(cls)
    return [
        Option(field.name, _type(field.type), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(cls)
    ]


def _field_docs(cls: type[Any]) -> dict[str, str]:
    """The string literals under the fields of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for one, following in itertools.pairwise(body.body):
            match one, following:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(typing|collections\.abc|[a-z_.]+)\.(?=[A-Z])", "", text)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
