"""Deltas under `transformers.Trainer`."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.errors import TrainError
from deltune.training.checkpoint import Tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

_WEIGHTS = "model.safetensors"


def SaveDelta(delta: Any, *, keep_backbone: bool = False) -> "TrainerCallback":
    """A `Trainer` callback that makes checkpoints hold the delta and not the backbone.

    An attached model trains under `Trainer` as it is. By itself `Trainer` writes the whole model
    at each save; with this callback `checkpoint-<step>/delta` is a folder for `dt.load`, and
    `checkpoint-<step>/model.safetensors` keeps only the trainable tensors, from which
    `resume_from_checkpoint` and `load_best_model_at_end` still work on the attached model.

    Args:
        delta: handle of the attached delta.
        keep_backbone: leave the whole model in `model.safetensors`.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SaveDelta(delta)])
    """
    return _callback_class()(delta, keep_backbone)


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class _SaveDelta(TrainerCallback):
        def __init__(self, delta: Any, keep_backbone: bool) -> None:
            self._delta = delta
            self._keep_backbone = keep_backbone

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not args.should_save:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._delta.save(folder / "delta", overwrite=True)
            if not self._keep_backbone:
                _drop_backbone(folder, self._delta.model)

    return _SaveDelta


def _drop_backbone(folder: Path, model: "nn.Module") -> None:
    from safetensors.torch import save_file

    whole = [path for path in folder.glob("model*.safetensors*") if path.is_file()]
    if not whole:
        raise TrainError(
            f"Trainer wrote no `{_WEIGHTS}` to `{folder}`; expected one to reduce to the delta; "
            "use SaveDelta(delta, keep_backbone=True)"
        )
    # remove_duplicate=False: a tied tensor is looked for under each of its names on loading.
    trainable: Tensors = {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    part = folder / f".{_WEIGHTS}.part"
    save_file(trainable, part, metadata={"format": "pt"})
    part.replace(folder / _WEIGHTS)
    for path in whole:
        if path.name != _WEIGHTS:
            path.unlink()
