"""The handle: several deltas on one model, names, scale, merging, copies, precision, errors."""

import copy

import pytest
import torch
from torch import nn

import deltune as dt
from deltune.errors import AttachError, DeltuneError, SpecError
from zoo import ZOO


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


def _filled(model: nn.Module, spec: str, name: str = "delta", seed: int = 0) -> dt.Delta:
    delta = dt.attach(model, spec, name, seed=seed)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(seed))
    return delta.load_vector(delta.vector() + 0.1 * noise)


def test_a_module_that_was_replaced_is_noticed() -> None:
    for spec in ("lora(rank=2)", "adapter(width=2)", "norms", "lora(where='embed') + prompt"):
        model: nn.Module = ZOO["llama"].build(0)
        dt.attach(model, spec)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Embedding) or "norm" in path.split(".")[-1]:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, copy.deepcopy(module))
        if spec.startswith("adapter"):  # beside which modules may go
            ZOO["llama"].run(model)
            continue
        with pytest.raises(AttachError, match="another module than the one"):
            ZOO["llama"].run(model)
    model = ZOO["llama"].build(0)
    _filled(model, "lora(rank=2) + adapter(where='block', width=2)")
    out = ZOO["llama"].run(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = _Wrapper(layer)  # as that of a compiled block
    assert torch.equal(ZOO["llama"].run(model), out)


def test_attach_keeps_mode_class_and_keys() -> None:
    for training in (True, False):
        model = ZOO["bert"].build(0).train(training)
        cls, keys = type(model), list(model.state_dict())
        delta = dt.attach(model, "lora(dropout=0.5) + adapter")
        assert type(model) is cls and model.training is training
        assert all(unit.training is training for unit in delta.tree.units)
        assert [key for key in model.state_dict() if not key.startswith("deltas.")] == keys
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in delta.parameters()}


@pytest.mark.parametrize(
    "name", ["v1.5", "half", "training", "a/b c", "deltas", "frozen", "ü", "%2E", "type"]
)
def test_any_text_names_a_delta(name: str) -> None:
    model = ZOO["llama"].build(0)
    delta = _filled(model, "lora(rank=2)", name)
    other = _filled(model, "lora(rank=2)", "plain", seed=1)
    assert list(dt.deltas(model)) == [name, "plain"]
    again = dt.deltas(model)[name]
    assert torch.equal(again.vector(), delta.vector())
    other.detach()
    assert list(dt.deltas(model)) == [name]
    assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()


def test_names_do_not_leak_into_each_other() -> None:
    model = ZOO["bert"].build(0)
    a, b = _filled(model, "lora(rank=2)", "foo"), _filled(model, "lora(rank=2)", "foobar", seed=3)
    before = b.vector()
    a.load_vector(torch.zeros(a.layout.size))
    assert torch.equal(b.vector(), before)
    with pytest.raises(AttachError, match="attached already"):
        dt.attach(model, "bitfit", "foo")
    with pytest.raises(AttachError, match="needs a name"):
        dt.attach(model, "bitfit", "")
    a.detach()
    with pytest.raises(AttachError, match="not attached"):
        a.vector()


def test_scale_is_linear_in_the_change_of_weights() -> None:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "lora(rank=2) + bitfit", head=False)
    delta.load_vector(torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(0)))
    base = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("deltas.")}
    changes = []
    for scale in (1.0, 0.25):
        delta.scale = scale
        out = ZOO["bert"].run(model)
        delta.merge()
        assert torch.allclose(ZOO["bert"].run(model), out, atol=1e-5)
        merged = dict(model.named_parameters())
        changes.append({n: merged[n] - p for n, p in base.items()})
        delta.unmerge()
    for name, whole in changes[0].items():
        assert torch.allclose(changes[1][name], 0.25 * whole, atol=1e-5), name
    for spec in ("prefix", "prompt"):
        fixed = dt.attach(model, spec, spec, head=False)
        with pytest.raises(AttachError, match="has no scale"):
            fixed.scale = 2.0


def test_merging_in_any_order_is_exact() -> None:
    model = ZOO["gpt2"].build(0)
    plain = ZOO["gpt2"].run(model)
    a, b = _filled(model, "lora(rank=2)", "a"), _filled(model, "lora(rank=2, where='attn')", "b", 1)
    both = ZOO["gpt2"].run(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    a.merge(), b.merge()
    assert torch.allclose(ZOO["gpt2"].run(model), both, atol=1e-5)
    with pytest.raises(AttachError, match="unmerge"):
        a.disable()
    with pytest.raises(AttachError, match="merged"):
        a.call(a.vector(), **ZOO["gpt2"].batch(0))
    a.unmerge()
    assert torch.allclose(ZOO["gpt2"].run(model), both, atol=1e-5)
    b.unmerge()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    a.merge(), b.merge(), a.detach()
    assert b.merged and list(dt.deltas(model)) == ["b"]
    b.detach()
    assert torch.equal(ZOO["gpt2"].run(model), plain)


def test_merging_a_tied_embedding_leaves_the_other_use_and_says_so() -> None:
    model = ZOO["gpt2"].build(0)
    assert model.lm_head.weight is model.transformer.wte.weight
    delta = _filled(model, "lora(rank=2, where='embed')")
    out = ZOO["gpt2"].run(model)
    delta.merge()
    assert torch.allclose(ZOO["gpt2"].run(model), out, atol=1e-5)
    assert not model.config.tie_word_embeddings
    delta.unmerge()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


def test_moving_a_merged_model_moves_the_originals() -> None:
    model = ZOO["bert"].build(0)
    delta = _filled(model, "lora(rank=2)")
    delta.merge()
    model.to(torch.float64)
    delta.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ZOO["bert"].run(model)


@pytest.mark.parametrize("spec", ["adapter", "prefix", "prompt", "lora + prompt"])
def test_what_is_no_change_of_weights_does_not_merge(spec: str) -> None:
    model = ZOO["llama"].build(0)
    delta = dt.attach(model, spec, seed=0)
    before = ZOO["llama"].run(model)
    with pytest.raises(AttachError, match="cannot be merged"):
        delta.merge()
    assert not delta.merged and torch.equal(ZOO["llama"].run(model), before)


def test_the_seed_makes_initialisation_independent_of_the_global_generator() -> None:
    states = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        model = ZOO["t5"].build(0)
        delta = dt.attach(model, "lora + adapter + prefix(mlp=4) + prompt", seed=7)
        states.append(delta.vector())
        assert torch.initial_seed() == global_seed
    assert torch.equal(*states)


def test_a_low_precision_backbone_keeps_a_float32_delta() -> None:
    for spec in ("lora", "adapter", "prefix", "prompt", "bitfit"):
        model = ZOO["bert"].build(0).to(torch.bfloat16)
        delta = _filled(model, spec)
        assert {p.dtype for p in delta.parameters()} == {torch.float32}
        out = ZOO["bert"].run(model)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())


class Odd(nn.Linear):
    """Its submodules are called like attributes of a delta's own modules."""

    NAMES = ("scale", "site", "spec", "shared", "own", "handles", "type")

    def __init__(self) -> None:
        super().__init__(4, 4)
        for name in self.NAMES:
            self._modules[name] = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(self._modules[name](x) for name in self.NAMES)


def _odd(spec: str) -> tuple[dt.Delta, torch.Tensor]:
    torch.manual_seed(0)
    delta = _filled(nn.Sequential(Odd(), nn.Tanh(), Odd()), spec)
    return delta, delta.vector() + 0.1 * torch.randn(delta.layout.size)


@pytest.mark.parametrize("spec", ["lora(rank=2, where='*')", "full", "bitfit"])
def test_call_reaches_modules_of_any_name(spec: str) -> None:
    """Oracle: the same vector written into the delta, and its gradients there."""
    delta, vector = _odd(spec)
    assert len(delta.layout) >= 2 * (1 + len(Odd.NAMES))
    x = torch.randn(5, 4)
    before = delta.vector()
    leaf = vector.clone().requires_grad_()
    called = delta.call(leaf, input=x)
    called.square().mean().backward()
    assert torch.equal(delta.vector(), before)
    assert all(p.grad is None for p in delta.parameters())
    delta.load_vector(vector)
    expected = delta.model(x)
    expected.square().mean().backward()
    assert torch.allclose(called, expected, atol=1e-6)
    gradients = torch.cat([p.grad.reshape(-1) for p in delta.parameters() if p.grad is not None])
    assert torch.allclose(leaf.grad, gradients, atol=1e-6)


@pytest.mark.parametrize("spec", ["lora(rank=2, where='*')", "full", "bitfit"])
def test_call_is_a_function_of_the_vector(spec: str) -> None:
    """Oracle of the transforms of `torch.func`: one vector at a time, differences."""
    delta, vector = _odd(spec)
    x, way = torch.randn(5, 4), torch.randn_like(vector)

    def f(v: torch.Tensor) -> torch.Tensor:
        return delta.call(v, input=x).square().sum()

    leaf = vector.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    assert torch.allclose(torch.func.grad(f)(vector), expected, rtol=1e-4, atol=1e-5)
    _, slope = torch.func.jvp(f, (vector,), (way,))
    assert torch.allclose(slope, expected @ way, rtol=1e-4)
    several = torch.stack([vector, 2 * vector, vector - way])
    each = torch.stack([torch.func.grad(f)(v) for v in several])
    assert torch.allclose(torch.vmap(torch.func.grad(f))(several), each, rtol=1e-4, atol=1e-4)


def test_a_module_called_scale_leaves_the_scale_alone() -> None:
    delta, _ = _odd("lora(rank=2, where='*')")
    x = torch.randn(5, 4)
    acting = delta.model(x)
    delta.scale = 0.0
    scaled = delta.model(x)
    with delta.disabled():
        assert torch.equal(delta.model(x), scaled)
    delta.scale = 1.0
    assert torch.equal(delta.model(x), acting) and not torch.equal(acting, scaled)


def test_nested_and_failed_calls_put_the_parameters_back() -> None:
    delta, vector = _odd("lora(rank=2, where='*')")
    x, own, ids = torch.randn(5, 4), delta.vector(), [id(p) for p in delta.parameters()]
    with torch.no_grad():
        outer, inner = delta.call(vector, input=x), delta.call(-vector, input=x)
        found = []

        def nest(*_: object) -> None:
            hook.remove()
            found.append(delta.call(-vector, input=x))

        hook = delta.model[1].register_forward_hook(nest)
        assert torch.equal(delta.call(vector, input=x), outer)
        assert torch.equal(found[0], inner)
    for wrong in ({"input": torch.randn(5, 3)}, {"unknown": x}):
        with pytest.raises((RuntimeError, TypeError)):
            delta.call(vector, **wrong)
    with pytest.raises(AttachError, match="layout takes"):
        delta.call(vector[1:], input=x)
    assert torch.equal(delta.vector(), own)
    assert [id(p) for p in delta.parameters()] == ids
    assert all(isinstance(p, nn.Parameter) for p in delta.model.parameters())


def test_call_is_refused_where_checkpointing_would_bend_its_gradients() -> None:
    case = ZOO["llama"]
    delta = _filled(case.build(0), "lora(rank=2)")
    vector = (2 * delta.vector()).requires_grad_()
    case.output(delta.call(vector, **case.batch(0))).square().mean().backward()
    expected = vector.grad
    delta.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    delta.model.train()
    with pytest.raises(AttachError, match="under gradient checkpointing would give wrong"):
        delta.call(vector, **case.batch(0))
    with torch.no_grad():
        delta.call(vector, **case.batch(0))
    delta.model.eval()
    vector.grad = None
    case.output(delta.call(vector, **case.batch(0))).square().mean().backward()
    assert torch.equal(vector.grad, expected)


def test_dropout_in_lora_is_dropout_on_its_input() -> None:
    """Closed form: unbiased around s x A^T B^T in training, equal to it in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8)).train()
    delta = dt.attach(model, dt.LoRA(rank=2, dropout=0.5, where="0"))
    delta.load_vector(torch.randn(delta.layout.size))
    x = torch.randn(500, 64)
    with delta.disabled():
        base = model(x)
    tensors = delta.tensors()
    full = 8.0 * x @ tensors["lora.0.A"].T @ tensors["lora.0.B"].T
    assert not torch.allclose(model(x) - base, full, atol=1e-2)
    average = torch.stack([(model(x) - base).detach() for _ in range(300)]).mean(0)
    assert (average - full).norm() / full.norm() < 0.15  # unbiased: mean of 300 draws
    model.eval()
    assert torch.allclose(model(x) - base, full, atol=1e-4)


def test_a_dropped_linear_is_differentiable_like_the_plain_one() -> None:
    from deltune.mechanisms.factors import DroppedLinear

    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: DroppedLinear.apply(x, w, 0.3, 11), (x, w))


def test_ranks_per_role_and_limits() -> None:
    model = ZOO["llama"].build(0)
    delta = dt.attach(model, dt.LoRA(rank={"attn.q": 1, "attn.v": 3}))
    ranks = {s.name.split(".")[-2]: s.shape[0] for s in delta.layout if s.name.endswith(".A")}
    assert ranks == {"q_proj": 1, "v_proj": 3}
    with pytest.raises(SpecError, match=r"rank 9 is above the matrix at .*\(8 x 16\)"):
        dt.plan(model, "lora(rank=9, where='attn.v')")
    with pytest.raises(SpecError, match="several ranks"):
        dt.plan(model, dt.LoRA(rank={"attn": 1, "attn.v": 3}))


def test_plans_are_what_attach_does() -> None:
    for name, spec in [
        ("t5", "lora + prompt"),
        ("bert", "adapter + bitfit"),
        ("bart", "prefix(mlp=3)"),
    ]:
        model = ZOO[name].build(0)
        before = list(model.state_dict())
        plan = dt.plan(model, spec)
        assert list(model.state_dict()) == before
        delta = dt.attach(model, spec)
        assert plan.layout == delta.layout and plan.count() == delta.count()
        assert f"{plan.count():,}" in str(plan) and "<table>" in plan._repr_html_()
        assert f"{delta.count():,}" in repr(delta) and "<table>" in delta._repr_html_()


def test_known_parameter_counts() -> None:
    """BERT-base figures: LoRA r=8 on q, v; Houlsby m=64; Pfeiffer 16; BitFit; prefix l=10."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    counts = {
        "lora(rank=8)": 294_912,
        "adapter(width=64)": 2_379_264,
        str(dt.Adapter.pfeiffer()): 894_528,
        "bitfit": 102_912,
        "bitfit(where='attn.q, ffn.up')": 46_080,
        "prefix(tokens=10)": 184_320,
        "full": 109_482_240,
    }
    assert {spec: dt.plan(model, spec).count() for spec in counts} == counts
    assert dt.attach(model, "lora(rank=8)").count() == 294_912


def test_failures_are_library_errors_and_leave_nothing() -> None:
    model = ZOO["deberta-v2"].build(0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for spec in (
        "prefix",
        "lora(where='nothing')",
        "lora(rank=99)",
        "prompt(init='ids', ids=(999,))",
    ):
        with pytest.raises(DeltuneError):
            dt.attach(model, spec)
        assert not hasattr(model, "deltas")
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with pytest.raises(SpecError, match="is not a spec"):
        dt.attach(model, 3)  # type: ignore[arg-type]
    delta = dt.attach(model, "bitfit")
    with pytest.raises(AttachError, match="layout takes"):
        delta.load_vector(torch.zeros(3))
    with pytest.raises(AttachError, match="are not the tensors"):
        delta.load_tensors({})
    taken = nn.Linear(2, 2)
    taken.deltas = 3
    with pytest.raises(AttachError, match="attribute `deltas` of its own"):
        dt.attach(taken, "bitfit")
