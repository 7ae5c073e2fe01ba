"""Specs: JSON and text are each other's oracle (both round-trip); errors name value and remedy."""

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltune as dt
from deltune import spec as codec
from deltune.errors import SpecError

LORA = st.builds(
    dt.LoRA,
    rank=st.one_of(
        st.integers(1, 64),
        st.dictionaries(st.sampled_from(["attn.q", "ffn.up"]), st.integers(1, 9), min_size=1),
    ),
    alpha=st.floats(0.1, 64, allow_nan=False),
    dropout=st.floats(0, 0.9),
    scaling=st.sampled_from(["linear", "root"]),
    where=st.sampled_from(["attn.q", "attn, ffn", "re:.*\\.q", 'it\'s "quoted"']),
    within=st.sampled_from(["", "encoder", "4:8", "decoder, -2:"]),
)
ADAPTER = st.builds(
    dt.Adapter,
    width=st.integers(1, 99),
    placement=st.sampled_from(["serial", "pfeiffer", "parallel"]),
    scale=st.floats(0.5, 4),
)
PROMPT = st.one_of(
    st.builds(dt.Prompt, tokens=st.integers(1, 9)),
    st.builds(
        dt.Prompt, init=st.just("ids"), ids=st.lists(st.integers(0, 9), min_size=1).map(tuple)
    ),
)
SINGLE = st.one_of(LORA, ADAPTER, PROMPT, st.just(dt.BitFit()), st.just(dt.FullTuning()))
SPECS = st.one_of(
    SINGLE, st.lists(SINGLE, min_size=2, max_size=4).map(lambda specs: codec.Sum(tuple(specs)))
)


@given(SPECS)
def test_text_and_json_round_trip(spec: dt.Spec) -> None:
    assert dt.parse(str(spec)) == spec
    assert codec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(SPECS, SPECS)
def test_sums_are_flat_and_digests_tell_specs_apart(a: dt.Spec, b: dt.Spec) -> None:
    assert codec.parts(a + b) == (*codec.parts(a), *codec.parts(b))
    assert (a.digest() == b.digest()) == (a.to_json() == b.to_json())


def test_text_is_canonical() -> None:
    assert str(dt.LoRA(rank=4) + dt.BitFit()) == "lora(rank=4) + bitfit"
    assert str(dt.parse("prefix(tokens = 20) [encoder]")) == "prefix[encoder]"
    assert dt.parse("prefix(tokens=5)[4:8]") == dt.Prefix(tokens=5, within="4:8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra(rank=8)", "unknown method `lorra` (did you mean `lora`?)"),
        ("lora(rnk=8)", "`lora` has no field `rnk` (did you mean `rank`?)"),
        ("lora(rank=0)", "`rank` must be 1 or more"),
        ("lora(rank='x')", "`lora.rank='x'` is not a whole number"),
        ("lora(rank=9223372036854775808)", "`lora.rank` is a number of 64 bits; the most is 63"),
        ("lora(alpha=1" + "0" * 400 + ")", "`lora.alpha` is a number of 1329 bits; the most is 63"),
        ("lora(rank=True)", "`lora.rank=True` is not a whole number"),
        ("lora(dropout=1.0)", "`dropout` must be in [0, 1)"),
        ("lora(scaling='log')", "one of `linear`, `root`"),
        ("adapter(placement='above')", "one of `serial`, `pfeiffer`, `parallel`"),
        ("adapter(width=4, reduction=2.0)", "left out where `width` is given"),
        ("prompt(ids=(1, 2))", "`'ids'` where `ids` are given"),
        ("lora(rank=1+x)", "is not a plain value"),
        ("lora(8)", "is not a spec"),
        ("lora(rank=8", "is not a spec"),
        ("lora * bitfit", "is not a spec"),
        ("__import__('os').system('true')", "is not a spec"),
        ("(lora + bitfit)[encoder]", "put the brackets behind each method"),
    ],
)
def test_bad_text_is_named(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        dt.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: dt.Adapter(placement="serieel"), "`adapter.placement='serieel'` is not one of"),
        (lambda: dt.Adapter("ffn", 2.5), "`adapter.width=2.5` is not a whole number or None"),
        (lambda: dt.Adapter(gate="tokens"), "`adapter.gate='tokens'` is not True or False or one"),
        (lambda: dt.Adapter(where=3), "`adapter.where=3` is not a string"),
        (lambda: dt.Adapter(within=3), "`adapter.within=3` is not a string"),
        (lambda: dt.Adapter(scale=float("nan")), "`adapter.scale=nan` is not a finite number"),
        (lambda: dt.LoRA(alpha=float("inf")), "`lora.alpha=inf` is not a finite number"),
        (lambda: dt.Prompt(3, "nope"), "`prompt.init='nope'` is not one of `uniform`"),
        (lambda: dt.Prefix(tokens="3"), "`prefix.tokens='3'` is not a whole number"),
        (lambda: dataclasses.replace(dt.Prefix(), mlp=True), "`prefix.mlp=True` is not a whole"),
    ],
)
def test_values_given_in_python_are_held_to_the_types_of_the_fields(
    build: Callable[[], dt.Spec], said: str
) -> None:
    with pytest.raises(SpecError) as caught:
        build()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        None, [], {"rank": 8}, {"kind": "lora", "rank": "8"}, {"kind": "lora", "bogus": 1},
        {"kind": "sum", "parts": []}, {"kind": "sum", "parts": [{"kind": "bitfit"}] * 2, "x": 1},
    ],
)  # fmt: skip
def test_bad_json_is_refused(data: object) -> None:
    with pytest.raises(SpecError):
        codec.from_json(data)


def test_a_function_cannot_be_written_down() -> None:
    with pytest.raises(SpecError, match="Python function"):
        dt.LoRA(where=lambda path, module: True).to_json()


def test_every_method_is_described() -> None:
    for kind, method in dt.methods().items():
        assert method.kind == kind and method.family, kind
        assert method.mechanism or issubclass(method, codec.Composite), kind
        assert method.__doc__ and "\n" in method.__doc__.strip(), kind
        if method.family != "baseline":
            assert method.paper is not None and method.paper.arxiv in str(method.__doc__), kind


def test_options_that_came_later_leave_the_identity_of_older_specs() -> None:
    """The digest of a method from before it had `bias`."""
    plain = dt.parse("adapter(width=8)")
    assert "bias" not in plain.to_json()
    bare = dt.parse("adapter(width=8, bias=False)")
    assert bare.to_json() == {**plain.to_json(), "bias": False}
    assert codec.from_json(bare.to_json()) == bare
    assert codec.from_json(plain.to_json()) == plain
    assert codec.from_json({**plain.to_json(), "bias": True}) == plain
