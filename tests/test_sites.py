"""Roles and `where`: the oracle is what the model's own code does with each matrix.

For every architecture, the discovered query rows are checked by replacing them and watching the
query that reaches the attention function; widths and roles are checked against the configuration.
"""

import pytest
import torch
from torch import nn

import deltune as dt
from deltune.errors import WhereError
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import discover
from deltune.sites.where import select
from zoo import HIDDEN, LAYERS, ZOO

TRANSFORMERS = [name for name in ZOO if not name.startswith("torch")]
GATED = {"modernbert", "llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe", "t5-gated"}
STACKS = {
    "encoder-decoder": {"encoder", "decoder", "cross"}, "speech": {"encoder", "decoder", "cross"},
    "dual": {"text", "vision"}, "decoder": {"decoder"}, "encoder": {"encoder"},
    "vision": {"encoder"}, "plain": {"encoder"},
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in ZOO if n != "torch-mlp"])
def test_every_role_is_found_in_every_block(name: str) -> None:
    case = ZOO[name]
    atlas = discover(case.build(0))
    wanted = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down", "attn", "ffn"}
    wanted |= {"ffn.gate"} if name in GATED else set()
    found: dict[tuple[str, int | None], set[str]] = {}
    for site in atlas.sites:
        if site.layer is not None:
            found.setdefault((site.stack, site.layer), set()).add(site.role)
    assert {stack for stack, _ in found} == STACKS[case.family]
    layers = 1 if name == "albert" else LAYERS  # one shared block
    for stack in STACKS[case.family]:
        assert [layer for s, layer in found if s == stack] == list(range(layers))
        part = (
            {role for role in wanted if not role.startswith("ffn")} if stack == "cross" else wanted
        )
        for layer in range(layers):
            assert part <= found[stack, layer], (stack, layer)


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in ("deberta-v2",)])
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_roles_move_exactly_what_they_are_called(
    name: str, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of `attn.q` reaches the query that attention sees, and neither key nor value."""
    case = ZOO[name]
    model = case.build(0)

    def seen() -> list[tuple[torch.Tensor, ...]]:
        calls: list[tuple[torch.Tensor, ...]] = []
        from transformers.integrations import sdpa_attention

        original = sdpa_attention.sdpa_attention_forward

        def spy(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *a, **kw):
            calls.append((q, k, v))
            return original(module, q, k, v, *a, **kw)

        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
            case.run(model)
        assert calls
        return calls

    before = seen()
    stack = next(s.stack for s in discover(model).sites if s.role == "attn.q")
    delta = dt.attach(model, f"lora(rank=1, where='{stack}.attn.{letter}[0]')", head=False)
    delta.load_vector(delta.vector() + 1.0)
    moved = (
        [letter for letter, x, y in zip("qkv", *pair, strict=True) if not torch.equal(x, y)]
        for pair in zip(before, seen(), strict=True)
    )
    assert next(filter(None, moved)) == [letter]


def test_where_counts() -> None:
    model = ZOO["t5"].build(0)
    atlas = discover(model)

    def count(where: str, within: str = "") -> int:
        return len(select(atlas, where, matrices(atlas), within))

    assert count("attn.q") == 3 * LAYERS and count("encoder.attn.q") == LAYERS
    assert count("cross.attn.q, encoder.attn.v[0]") == LAYERS + 1
    assert count("attn") == 4 * 3 * LAYERS and count("attn, !attn.o") == 3 * 3 * LAYERS
    assert count("ffn.up[-1:]") == 2 and count("attn.q", "decoder, 1:") == 1
    assert count("*.SelfAttention.q") == 2 * LAYERS
    assert count(r"re:encoder\.block\.[01]\.layer\.0\..*\.[qv]") == 4
    assert count("attn.q", "0") == 3
    picked = select(atlas, lambda path, m: path.endswith(".wo"), matrices(atlas))
    assert [s.role for s in picked] == ["ffn.down"] * 4


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("attn.x", "did you mean `attn."),
        ("cross.attn.q", "matches nothing"),
        ("attn.q, nothing.here", "`nothing.here` in `where='attn.q, nothing.here'`"),
        ("attn.q[7]", "matches nothing"),
        ("attn.q[a:b]", "not a layer range"),
        ("attn.q[1:9]", "reaches to 9, and the model has 2 layers, 0 to 1"),
        ("attn.q[-5:]", "reaches to -5, and the model has 2 layers"),
        ("attn.q,,attn.v", "empty term"),
        ("re:(", "not a regular expression"),
        ("attn.q, !attn.q", "takes away every site"),
        ("attn.quary", "did you mean"),
    ],
)
def test_bad_where_is_named(where: str, said: str) -> None:
    model = ZOO["bert"].build(0)
    keys = set(model.state_dict())
    with pytest.raises(WhereError) as caught:
        dt.attach(model, dt.LoRA(where=where))
    assert said in str(caught.value)
    assert set(model.state_dict()) == keys and not hasattr(model, "deltas")


def test_bad_brackets_are_named() -> None:
    model = ZOO["bert"].build(0)
    with pytest.raises(WhereError, match="no stack `encodr`"):
        dt.plan(model, "lora[encodr]")
    with pytest.raises(WhereError, match="leaves none"):
        dt.plan(model, "lora[decoder]")


def test_plain_modules_are_addressed_by_names_globs_and_predicates() -> None:
    model = ZOO["torch-mlp"].build(0)
    assert dt.plan(model, dt.LoRA(rank=2, where="0, 2")).count() == 2 * (HIDDEN + 24 + 24 + 24)
    linear = dt.LoRA(rank=2, where=lambda path, module: isinstance(module, nn.Linear))
    assert len(dt.plan(model, linear).steps) == 3
    with pytest.raises(WhereError, match="use module names"):
        dt.plan(model, "lora")


def test_inspect_folds_layers_and_names_roles() -> None:
    view = dt.inspect(ZOO["bert"].build(0))
    row = next(r for r in view.rows() if "attn.q" in r[1])
    assert row[0].startswith("bert.encoder.layer.*.attention.self.query") and "x2" in row[0]
    assert "attn.q" in view.roles() and "attn.q" in str(view)
    total = sum(int(r[-1].replace(",", "")) for r in view.rows() if r[-1])
    assert total == sum(p.numel() for p in ZOO["bert"].build(0).parameters())
