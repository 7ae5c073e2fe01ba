"""Full fine-tuning, the last layers and trained tokens: which parameters they own and change,
against the model's own."""

import pytest
import torch
from torch import nn

import deltune as dt
from deltune.errors import SpecError, TrainError, WhereError
from deltune.training.course import Course
from deltune.training.optim import groups
from shapes import meta_model
from zoo import ZOO


def _chosen(model: nn.Module, spec: str) -> set[str]:
    """The parameters that a delta changes, by one name each."""
    shared = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    delta = dt.attach(model, spec, head=False)
    found = {
        shared[id(model.get_submodule(unit.site.path)._parameters[place[0]])]
        for unit in delta.tree.units
        for place in unit.site.places
    }
    delta.detach()
    return found


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "marian", "whisper", "vit"])
def test_full_changes_what_the_model_leaves_trainable_and_no_fixed_table(name: str) -> None:
    model = ZOO[name].build(0)
    heads = tuple(f"{head}." for head in dt.plan(model, "full").atlas.heads)
    wanted = {n for n in _trainable(model) if not n.startswith(heads or ("-",))}
    assert _chosen(model, "full") == wanted


def _layer(name: str, prefix: str) -> int:
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1


def test_brackets_narrow_full_to_layers_and_stacks() -> None:
    bert, t5 = ZOO["bert"].build(0), ZOO["t5"].build(0)
    blocks = "bert.encoder.layer."
    assert _chosen(bert, "full[1:]") == {n for n in _trainable(bert) if _layer(n, blocks) == 1}
    assert _chosen(bert, "full[:1]") == {n for n in _trainable(bert) if _layer(n, blocks) == 0}
    decoder = {n for n in _trainable(t5) if _layer(n, "decoder.block.") == 1}
    cross = {n for n in decoder if "EncDecAttention" in n}
    assert len(cross) == 4  # cross-attention is a stack of its own in the `where` language
    assert _chosen(t5, "full[decoder, 1:]") == decoder - cross
    assert _chosen(t5, "full[cross, 1:]") == cross


def test_full_of_chosen_modules_and_of_all_as_before() -> None:
    """What is saved and studied of `full` without `where` is what it was."""
    llama, t5 = ZOO["llama"].build(0), ZOO["t5"].build(0)
    ends = {n for n in _trainable(llama) if "embed_tokens" in n or "lm_head" in n}
    assert _chosen(llama, "full(where='embed, head')") == ends and len(ends) == 2
    norms = {n for n in _trainable(t5) if "norm" in n and _layer(n, "encoder.block.") >= 0}
    assert _chosen(t5, "full(where='re:.*layer_norm')[encoder]") == norms
    assert dt.FullTuning().to_json() == {"kind": "full", "within": ""}
    with pytest.raises(WhereError, match="`pooler` is no role"):
        dt.attach(llama, "full(where='pooler')")


def test_brackets_narrow_the_last_layers_to_a_stack() -> None:
    model = ZOO["t5"].build(0)
    last = {
        stack: {n for n in _trainable(model) if _layer(n, f"{stack}.block.") == 1}
        for stack in ("encoder", "decoder")
    }
    assert _chosen(model, "last(layers=1)") == last["encoder"] | last["decoder"]
    assert _chosen(model, "last(layers=1)[encoder]") == last["encoder"]
    with pytest.raises(WhereError, match="2 blocks in encoder, 2 blocks in decoder"):
        dt.attach(model, "last(layers=3)")


def test_random_modules_fill_their_share_with_whole_modules() -> None:
    """The greedy fill, written out: no module that was left would have fitted at the end."""
    bert = meta_model("bert-base")
    modules = {
        path: sum(p.numel() for p in module.parameters(recurse=False))
        for path, module in bert.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    budget = int(0.2 * sum(modules.values()))
    drawn = set()
    for seed in (0, 1, 2):
        names = _chosen(bert, f"random_modules(share=0.2, seed={seed})")
        taken = {name.rpartition(".")[0] for name in names}
        used = sum(modules[path] for path in taken)
        assert names == {
            f"{path}.{name}" for path in taken
            for name, _ in bert.get_submodule(path).named_parameters(recurse=False)
        }  # fmt: skip
        assert budget - min(n for path, n in modules.items() if path not in taken) < used <= budget
        drawn.add(frozenset(taken))
    assert len(drawn) == 3
    with pytest.raises(dt.DeltuneError, match=r"has 109 scalars .* give a larger `share`"):
        dt.attach(bert, "random_modules(share=1e-6)")


def test_counts_on_bert_base() -> None:
    """A block has 4 (d^2 + d) + 2 d f + f + d + 4 d parameters."""
    bert, d, f = meta_model("bert-base"), 768, 3072
    block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    assert [dt.plan(bert, f"last(layers={n})").count() for n in (1, 3, 12)] == [
        block, 3 * block, 12 * block
    ]  # fmt: skip
    assert dt.plan(bert, "full").count() == 109_482_240


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_trained_tokens_change_their_rows_wherever_the_table_is_tied(name: str) -> None:
    """Oracle: the model with its own table written over, tied layers with it."""
    case, ids = ZOO[name], [9, 4, 33]
    written, d = case.build(0), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    delta = dt.attach(case.build(0), f"tokens(ids={tuple(ids)})")
    assert delta.count() == 3 * 16 and not delta.vector().any()
    with torch.no_grad():
        assert torch.equal(case.run(delta.model), case.run(written))
        delta.load_vector(d.flatten())
        delta.scale = 0.5
        written.get_input_embeddings().weight[ids] += 0.5 * d
        expected = case.run(written)
        assert torch.allclose(case.run(delta.model), expected, atol=1e-6)
        delta.merge()
        assert torch.allclose(case.run(delta.model), expected, atol=1e-6)
    merged = delta.model.get_input_embeddings().weight
    assert torch.equal(merged, written.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tokens", r"`tokens\(ids=\(\)\)`: `ids` must be one number of 0 or more"),
        ("tokens(ids=(3, -1))", "`ids` must be one number of 0 or more"),
        ("tokens(ids=(3, 3))", "`ids` must be different numbers"),
        (
            "tokens(ids=(3, 64))",
            r"`bert.embeddings.word_embeddings` has 64 rows, and `ids` has 64; use numbers",
        ),
    ],
)
def test_tokens_that_a_table_has_not_are_refused(text: str, words: str) -> None:
    model = ZOO["bert"].build(0)
    with pytest.raises(SpecError, match=words):
        dt.attach(model, text)
    with pytest.raises(WhereError, match=r"`ffn` .*matches"):
        dt.attach(model, "tokens(ids=(3,), where='ffn')")
    assert not dt.deltas(model)


def test_norms_leave_out_those_of_the_task_head() -> None:
    model = ZOO["modernbert"].build(0)
    norms = {n for n, p in model.named_parameters() if "norm" in n and p.requires_grad}
    assert "head.norm.weight" in norms
    assert _chosen(model, "norms") == {n for n in norms if not n.startswith("head.")}


def test_equal_parts_of_a_sum_are_two_methods() -> None:
    model, twice = ZOO["bert"].build(0), dt.parse("child(mode='F')[:1]")
    delta = dt.attach(model, twice + twice, head=False)
    members = delta.tree.members()
    assert [spec for spec, _ in members] == [twice, twice]
    assert not {id(u) for u in members[0][1]} & {id(u) for u in members[1][1]}
    assert sum(len(units) for _, units in members) == len(delta.tree.units)
    assert len(Course(model).parts) == 2


def test_a_head_with_a_rate_of_its_own_is_stepped_by_it_and_by_no_plain_loop() -> None:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "lora(rank=2) + head(rate=30.0)", seed=0)
    made = groups(delta.parameters(), Course(model), 1e-3, 0.0)
    found = {id(p): group["lr"] for group in made for p in group["params"]}
    rates = {n: found[id(p)] for n, p in delta.tree.named().items()}
    assert {round(r, 9) for n, r in rates.items() if n.startswith("head.")} == {3e-2}
    assert {r for n, r in rates.items() if n.startswith("lora.")} == {1e-3}
    with pytest.raises(TrainError, match=r"`head` asks for more .* a learning rate of its own"):
        model.train()(**ZOO["bert"].batch(0))
    with Course(model):
        model(**ZOO["bert"].batch(0))
    with pytest.raises(SpecError, match="`rate` must be above 0"):
        dt.parse("head(rate=0.0)")
