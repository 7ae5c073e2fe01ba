"""Every method as the laws try it, and the pairs of method and architecture that cannot work.

A new method adds a row to `METHODS`, and lines to `REFUSED` where it cannot serve an architecture.
"""

from dataclasses import dataclass
from functools import cache

from deltune.spec import parse, primitives

# sdpa picks other kernels where gradients are needed, so "equal" is only to rounding for some.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Method:
    """A spec, how near its start is to the identity, whether it merges, and whether it reads the
    whole sequence: then a call that continues a cache is refused."""

    text: str
    start: float | None = None
    merges: bool = False
    unmerged: str = ""
    whole: bool = False

    def merges_into(self, name: str) -> bool:
        """Whether it merges on this architecture; `unmerged` names those where it cannot."""
        return self.merges and name not in self.unmerged.split()


UNBIASED = "modernbert llama qwen3 gemma3 phi3 t5 t5-gated"  # no bias where feed-forward parts end
EXPERTS = "mixtral qwen3-moe"
METHODS = {
    "lora": Method("lora(rank=2, dropout=0.1)", ROUNDING, merges=True),
    "lora-all": Method("lora(rank=2, where='attn, ffn')", ROUNDING, merges=True),
    "lora-embed": Method("lora(rank=2, where='embed')", ROUNDING, merges=True),
    "lora-pissa": Method("lora(rank=2, init='pissa', where='attn, ffn')", ROUNDING, merges=True),
    "lora-frozen": Method(
        "lora(rank=2, init='corda', frozen=True, rate=4.0)", ROUNDING, merges=True
    ),
    "dora": Method("dora(rank=2, dropout=0.1)", ROUNDING, merges=True),
    "dora-all": Method("dora(rank=2, where='embed, attn, ffn')", ROUNDING, merges=True),
    "dora+lora": Method("dora(rank=2) + lora(rank=2) + bitfit", ROUNDING, merges=True),
    "adapter-serial": Method("adapter(width=3)", 1e-3),
    "adapter-pfeiffer": Method("adapter(width=3, placement='pfeiffer', init='zero')", ROUNDING),
    "adapter-parallel": Method("adapter(width=3, placement='parallel', init='zero')", ROUNDING),
    "prefix": Method("prefix(tokens=3)"),
    "prefix-mlp": Method("prefix(tokens=3, mlp=4, dropout=0.1)"),
    "prefix-mlp-plain": Method("prefix(tokens=3, mlp=4, bias=False)"),
    "prefix-shift": Method("prefix(tokens=2, positions='shift')"),
    "prompt": Method("prompt(tokens=3)"),
    "residual-prompt": Method("residual_prompt(tokens=3, width=4)"),
    "p-tuning": Method("p_tuning(slots=(2, 1), at=(0, 1), dropout=0.1)"),
    "p-tuning-end": Method("p_tuning(slots=(2, 1), at=(-1, 'end'), encoder='mlp')"),
    "p-tuning-v2": Method("p_tuning_v2(tokens=2)"),
    "lora-gated": Method("lora(rank=2, gate=True)", ROUNDING),
    "lora-token": Method("lora(rank=2, gate='token')", ROUNDING),
    "adapter-gated": Method("adapter(width=3, gate=True)", 1e-3),
    "unipelt": Method("unipelt(reduction=4, tokens=2, mlp=4, rank=2)"),
    "unipelt-encoder": Method("unipelt(reduction=4, tokens=2, mlp=None, rank=2)[encoder]"),
    "pals": Method("pals(width=4, heads=2)", whole=True),
    "apt": Method("apt(tokens=2)", whole=True),
    "apt-mean": Method("apt(tokens=2, summary='mean', positions='keep')[encoder]"),
    "ladder": Method("ladder(reduction=4, heads=2)", ROUNDING, whole=True),
    "ladder-alone": Method("ladder(reduction=2, heads=1, attention=False)", ROUNDING),
    "adapter-plain": Method("adapter(width=3, bias=False)", 1e-3),
    "adapter-robust": Method("adapter(width=3, robust=True)", 1e-3),
    "adapter-speech": Method("adapter(width=3, init='speech', norm=True, dropout=0.1)", 0.1),
    "adapter+norms": Method("adapter(width=3, placement='pfeiffer') + norms", 1e-3),
    "compacter": Method("compacter(n=2, width=4)", 1e-3),
    "compacter-phm": Method("compacter(n=2, rank=None, width=4, share=False)", 1e-2),
    "loreft": Method("loreft(rank=2, prefix=2)"),
    "direft": Method("direft(rank=2, prefix=1, suffix=2, dropout=0.1)[encoder]"),
    "adapter-bias": Method("adapter_bias", ROUNDING, merges=True, unmerged=UNBIASED),
    "adapter-bias-output": Method(
        "adapter_bias(reads='output', share=True)",
        ROUNDING,
        merges=True,
        unmerged=f"{UNBIASED} {EXPERTS}",
    ),
    "ia3": Method("ia3", ROUNDING, merges=True),
    "ia3-outputs": Method("ia3(inputs='', where='attn.q, ffn.up')", ROUNDING, merges=True),
    "list": Method("list(width=3)", ROUNDING, merges=True, unmerged=EXPERTS),
    "list+lora": Method(
        "list(width=3) + lora(rank=2, where='attn.o, ffn.down')",
        ROUNDING,
        merges=True,
        unmerged=EXPERTS,
    ),
    "mam": Method("mam(tokens=2, mlp=4, width=3)"),
    "norms": Method("norms", ROUNDING, merges=True),
    "norms-gain": Method("norms(tune='gain', where='norm')", ROUNDING, merges=True),
    "bitfit": Method("bitfit", ROUNDING, merges=True),
    "bitfit-where": Method("bitfit(where='attn.q, ffn.up')", ROUNDING, merges=True),
    "full": Method("full", ROUNDING, merges=True),
    "last": Method("last(layers=1)", ROUNDING, merges=True),
    "random-modules": Method("random_modules(share=0.3)", ROUNDING, merges=True),
    "head": Method("head", ROUNDING, merges=True),
    "tokens": Method(f"tokens(ids={tuple(range(4, 34))})", ROUNDING, merges=True),
    "intrinsic": Method("intrinsic(dimension=200)", ROUNDING, merges=True),
    "intrinsic-did": Method(
        "intrinsic(dimension=20, variant='did', projection='sparse')", ROUNDING, merges=True
    ),
    "intrinsic-global": Method("intrinsic(dimension=200, scope='global')", ROUNDING, merges=True),
    "mpo": Method("mpo(cores=3)", ROUNDING, merges=True),
    "mpo-cut": Method("mpo(cores=3, bonds=5, where='attn')", merges=True),
    "phm": Method("phm(n=2, where='attn, ffn')", ROUNDING, merges=True),
    "quaternion": Method("phm(algebra='quaternion')", ROUNDING, merges=True),
    "kronecker": Method("kronecker(rank=2, where='attn, ffn')", ROUNDING, merges=True),
    "kronecker-embed": Method("kronecker(rank=2, where='embed')", ROUNDING, merges=True),
    "adalora": Method("adalora(rank=3, target=2, dropout=0.1)", ROUNDING, merges=True),
    "adalora-embed": Method("adalora(rank=2, target=1, where='embed, ffn')", ROUNDING, merges=True),
    "loha": Method("loha(rank=2, where='attn, ffn')", ROUNDING, merges=True),
    "lokr": Method("lokr(rank=1, where='attn, ffn')", ROUNDING, merges=True),
    "lokr-both": Method("lokr(rank=1, both=True, factor=3)", ROUNDING, merges=True),
    "vera": Method("vera(rank=5, dropout=0.1)", ROUNDING, merges=True),
    "vera-all": Method("vera(rank=20, where='attn, ffn, embed')", ROUNDING, merges=True),
    "randlora": Method("randlora(rank=5, alpha=10.0, dropout=0.1)", ROUNDING, merges=True),
    "randlora-sparse": Method(
        "randlora(rank=6, alpha=10.0, bases='sparse', where='attn, ffn, embed')",
        ROUNDING,
        merges=True,
    ),
    "fourierft": Method("fourierft(frequencies=8, alpha=10.0, where='attn, ffn')", merges=True),
    "fourierft-embed": Method(
        "fourierft(frequencies=8, init='zero', where='embed')", ROUNDING, merges=True
    ),
    "c3a": Method("c3a(block=4, init='zero', where='attn, ffn')", ROUNDING, merges=True),
    "c3a-embed": Method("c3a(block=4, where='embed')", 1e-1, merges=True),
    "vblora": Method(
        "vblora(rank=2, vectors=6, length=4, dropout=0.1, where='attn, ffn')", 1e-2, merges=True
    ),
    "vblora-embed": Method("vblora(rank=2, vectors=6, length=8, where='embed')", 1e-2, merges=True),
    "shira": Method("shira(rank=1, where='attn, ffn')", ROUNDING, merges=True),
    "shira-embed": Method("shira(rank=1, where='embed')", ROUNDING, merges=True),
    "hra": Method("hra(rank=4, where='attn, ffn')", ROUNDING, merges=True),
    "hra-orthogonal": Method("hra(rank=3, orthogonal=True)", merges=True),
    "hra-embed": Method("hra(rank=2, where='embed')", ROUNDING, merges=True),
    "oft": Method("oft(block=4, where='attn, ffn')", ROUNDING, merges=True),
    "oft-exact": Method("oft(block=8, terms=None, share=True)", ROUNDING, merges=True),
    "oft-limit": Method("oft(block=None, blocks=2, limit=0.5)", ROUNDING, merges=True),
    "oft-embed": Method("oft(block=4, where='embed')", ROUNDING, merges=True),
    "boft": Method("boft(block=2, factors=2, where='attn, ffn')", ROUNDING, merges=True),
    "boft-embed": Method("boft(block=None, blocks=4, where='embed')", ROUNDING, merges=True),
    "miss": Method("miss(rank=5, dropout=0.1, where='attn, ffn')", ROUNDING, merges=True),
    "miss-bat": Method("miss(rank=4, bat=True, where='attn, ffn')", ROUNDING, merges=True),
    "miss-mini": Method("miss(rank=3, mini=2)", ROUNDING, merges=True),
    "miss-embed": Method("miss(rank=5, where='embed')", ROUNDING, merges=True),
    "diff": Method("diff(density=0.1)", ROUNDING, merges=True),
    "diff-plain": Method("diff(structured=False, start=0.5)", ROUNDING, merges=True),
    "masking": Method("masking(skip=0)", merges=True),
    "masking-sign": Method("masking(mode='sign', where='attn, ffn')", merges=True),
    "masking-bernoulli": Method(
        "masking(mode='bernoulli', sparsity=0.495, skip=0)", ROUNDING, merges=True
    ),
    "movement": Method("movement(keep=0.3, warmup=0.0)", ROUNDING, merges=True),
    "movement-soft": Method("movement(mode='soft')", ROUNDING, merges=True),
    "pruned": Method("pruned(count=1500)", merges=True),
    "sparse": Method("sparse(density=0.1)", ROUNDING, merges=True),
    "fish": Method("fish(density=0.1)", ROUNDING, merges=True),
    "child": Method("child(share=0.5)", ROUNDING, merges=True),
    "child-d": Method("child(mode='D', share=0.1)", ROUNDING, merges=True),
    "apet": Method("apet(budget=680, rank=2, width=3)", 1e-3),
    "apet-entries": Method("apet(budget=680, rank=2, width=3, backbone='entries')", 1e-3),
    "lora+bitfit": Method("lora(rank=2) + bitfit", ROUNDING, merges=True),
    "prefix+adapter": Method("prefix(tokens=2) + adapter(width=3)"),
}
NO_BIASES = "modernbert llama qwen3 gemma3 phi3 mixtral qwen3-moe t5 t5-gated"
NO_HEAD = (
    "gpt2 gpt-neox opt llama qwen3 gemma3 phi3 mixtral qwen3-moe t5 t5-gated bart marian clip "
    "whisper torch-encoder torch-mlp"
)
EXACT = "bert gpt2 llama t5 mixtral"  # where merging is measured in float64 too
PREFIXES = "prefix prefix-mlp prefix-mlp-plain prefix-shift p-tuning-v2 prefix+adapter mam"
PROMPTS = "prompt residual-prompt p-tuning p-tuning-end"
EMBED = (
    "lora-embed kronecker-embed adalora-embed fourierft-embed c3a-embed shira-embed vblora-embed "
    "hra-embed oft-embed boft-embed miss-embed"
)
CAUSAL = "gpt2 gpt-neox opt llama qwen3 gemma3 phi3 mixtral qwen3-moe"
TWO_STACKS = "t5 t5-gated bart marian whisper"
# (methods, architectures, what the error says): the pairs that cannot work.
REFUSED = [
    ("bitfit bitfit-where lora+bitfit dora+lora", NO_BIASES, "has no biases to tune"),
    ("bitfit-where", "gpt2 gpt-neox torch-encoder", "`attn.q` .* matches nothing .*`attn.qkv`"),
    ("head", NO_HEAD, "no newly initialised task head"),
    (
        f"{EMBED} dora-all vera-all randlora-sparse tokens",
        "vit dinov2 torch-encoder",
        "`embed` .*matches nothing",
    ),
    (PREFIXES, "deberta-v2 torch-encoder", "computes attention itself"),
    ("prefix-shift p-tuning-v2", "vit dinov2", "no position module was found"),
    ("prefix-shift p-tuning-v2", "clip whisper", "input of .* has a fixed length"),
    (PROMPTS, "vit dinov2 clip whisper torch-encoder", "takes `inputs_embeds`"),
    (PREFIXES, "torch-mlp", "needs attention layers"),
    ("p-tuning-end", CAUSAL, "before token -1 cannot stand in the causal model"),
    (PROMPTS, "torch-mlp", "needs a stack of blocks"),
    ("last child-d", "torch-mlp", "has no blocks"),
    ("loreft direft", "torch-mlp", "matches nothing .*no attention blocks found"),
    ("lora-gated adapter-gated unipelt", f"{CAUSAL} {TWO_STACKS} clip", "tokens only look back"),
    ("unipelt-encoder apt-mean direft", f"{CAUSAL} clip", "`.encoder.` leaves none"),
    ("lora-gated", "deberta-v2", "maps relative positions"),
    ("lora-gated lora-token", "torch-encoder", "a gate belongs to one example"),
    ("lora-frozen", "torch-encoder", "looks at what a linear map reads"),
    (
        "unipelt unipelt-encoder apt apt-mean",
        "deberta-v2 torch-encoder",
        "computes attention itself",
    ),
    ("apt", "vit dinov2", "no position module was found"),
    ("apt", "clip whisper", "input of .* has a fixed length"),
    ("apt apt-mean", "torch-mlp", "needs attention layers"),
    ("ladder ladder-alone", "torch-mlp", "needs blocks"),
    (
        "lora-gated lora-token adapter-gated unipelt unipelt-encoder pals",
        "torch-mlp",
        "matches nothing .*no attention blocks found",
    ),
    ("adapter-bias", EXPERTS, "finds no single linear map"),
    ("ia3 ia3-outputs", f"{EXPERTS} torch-encoder", "nothing calls the matrix at"),
    ("norms norms-gain", "torch-mlp", "has no normalisation layers"),
    (
        "adapter-plain adapter-robust adapter-speech adapter+norms compacter compacter-phm "
        "adapter-bias adapter-bias-output list list+lora",
        "torch-mlp",
        "matches nothing .*no attention blocks found",
    ),
    ("masking masking-bernoulli", "torch-mlp", "has no blocks"),
    (
        "masking-sign movement movement-soft pruned",
        "torch-mlp",
        "matches nothing .*no attention blocks found",
    ),
    (
        "lora lora-all lora-embed lora-pissa lora-frozen "
        "adapter-serial adapter-pfeiffer adapter-parallel bitfit-where "
        "lora+bitfit apet apet-entries mpo mpo-cut phm quaternion kronecker kronecker-embed "
        "ia3 ia3-outputs adalora adalora-embed dora dora-all dora+lora loha lokr lokr-both "
        "vera vera-all randlora randlora-sparse tokens "
        "fourierft fourierft-embed c3a c3a-embed shira shira-embed vblora vblora-embed "
        "hra hra-orthogonal hra-embed oft oft-exact oft-limit oft-embed boft boft-embed "
        "miss miss-bat miss-mini miss-embed",
        "torch-mlp",
        "matches nothing .*no attention blocks found",
    ),
]


FIRST_ON = "bert gpt2 llama t5 mixtral vit"
FORMS_ON = "bert gpt2 mixtral"
FIRST_OF_KIN = (
    "bert albert deberta-v2 modernbert gpt2 gpt-neox opt llama gemma3 phi3 mixtral t5 bart vit "
    "clip whisper torch-encoder torch-mlp"
)
"""The code of each other architecture is close to that of one of these: roberta, distilbert and
electra to bert, qwen3 to llama, qwen3-moe to mixtral, t5-gated to t5, marian to bart, dinov2 to
vit."""


@cache
def leaders(by_unit: bool) -> frozenset[str]:
    """The first row of each method, or of each way to act: the kind of unit, and whether it knows
    factors."""
    found: dict[object, str] = {}
    for row, method in METHODS.items():
        specs = [type(part) for part in primitives(parse(method.text))]
        acts = [(getattr(s, "unit", s), getattr(s, "factored", None)) for s in specs]
        found.setdefault(tuple(acts if by_unit else specs), row)
    return frozenset(found.values())


def usual(method: str, name: str) -> bool:
    """Whether the laws try this pair on every run: the first row of those that act alike on every
    architecture, the first of a method on several, its other forms on a few. The rest is for
    `-m thorough`."""
    if method in leaders(by_unit=True):
        return True
    return name in (FIRST_ON if method in leaders(by_unit=False) else FORMS_ON).split()


def refusals() -> dict[tuple[str, str], str]:
    """The reason for each pair that cannot work."""
    return {
        (method, name): reason
        for methods, names, reason in REFUSED
        for method in methods.split()
        for name in names.split()
    }
