"""Deltas under `transformers.Trainer`."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltune.container import DELTAS
from deltune.errors import TrainError, listing
from deltune.training.checkpoint import Tensors
from deltune.training.course import Course
from deltune.training.evaluation import in_mode, to_device
from deltune.vector import gathered, sharded

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

_WEIGHTS = "model.safetensors"
_HAS_ADAPTER = "_hf_peft_config_loaded"


def DeltaCallback(delta: Any, *, keep_backbone: bool = False) -> "TrainerCallback":
    """A `Trainer` callback: checkpoints hold the delta and not the backbone, and what the delta's
    methods ask of training is done.

    An attached model trains under `Trainer` as it is. By itself `Trainer` writes the whole model
    at each save; with this callback `checkpoint-<step>/delta` is a folder for `dt.load`, and
    `checkpoint-<step>/model.safetensors` keeps only the delta's tensors, from which
    `resume_from_checkpoint` and `load_best_model_at_end` still work on the attached model.

    Methods with schedules, penalties, gradient masks or a look at the data get them, with the same
    draws as in `deltune.train` under the same seed. Differs from there: the gradient of a penalty
    joins after clipping. A method with learning rates of its own needs an optimiser with them,
    `Trainer(..., optimizers=(torch.optim.AdamW(deltune.training.optim.groups(...)), None))`, and
    is refused without.

    Args:
        delta: handle of the attached delta.
        keep_backbone: leave the whole model in `model.safetensors`.

    Raises:
        TrainError: the optimiser has not the rates that a method asks for.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[DeltaCallback(delta)])
    """
    return _callback_class()(delta, keep_backbone)


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class _DeltaCallback(TrainerCallback):
        def __init__(self, delta: Any, keep_backbone: bool) -> None:
            self._delta, self._keep_backbone = delta, keep_backbone
            self._open = ExitStack()
            # A Trainer is built after its callbacks, and refuses a quantised model that does not
            # say that it has an adapter.
            self._says = bool(getattr(delta.model, "is_quantized", False))
            if self._says:
                delta.model.__dict__[_HAS_ADAPTER] = True

        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._says:  # or saving the model would ask PEFT for its adapter
                self._delta.model.__dict__.pop(_HAS_ADAPTER, None)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._course = self._open.enter_context(Course(self._delta.model, args.seed))
            if self._course.idle:
                return
            _check_rates(kwargs["optimizer"], self._course, self._delta)
            if state.global_step == 0:
                loader, model = kwargs["train_dataloader"], self._delta.model

                def losses(
                    most: int, size: int | None = None, training: bool = True
                ) -> Iterator[Tensor]:
                    return _losses(model, loader, most, size, training)

                self._course.prepare(losses)
                for parameter in self._delta.parameters():
                    parameter.grad = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._course.before_step(state.global_step, state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._course.after_backward()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._course.after_step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._open.close()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _save(self._delta, self._keep_backbone, args, state)

    return _DeltaCallback


def _losses(
    model: Any, loader: Any, most: int, size: int | None, training: bool
) -> Iterator[Tensor]:
    """Losses of the loader's batches, or of pieces of them; see `Losses`."""
    for batch in loader:
        count = len(next(iter(batch.values())))
        for at in range(0, count, size or count):
            if most <= 0:
                return
            end = min(at + (size or count), at + most, count)
            most -= end - at
            part = {name: value[at:end] for name, value in batch.items()}
            with in_mode(model, training=training):
                loss = model(**to_device(part, model.device)).loss
            yield loss


def _check_rates(optimizer: Any, course: Course, delta: Any) -> None:
    factors = {
        id(p): group.get("factor", 1.0) for group in optimizer.param_groups for p in group["params"]
    }
    named = delta.tree.named()
    wrong = [n for n, p in named.items() if course.rate(p).factor != factors.get(id(p), 1.0)]
    if wrong:
        raise TrainError(
            f"`{delta.spec}` steps {listing(wrong, 4)} with learning rates of their own, which "
            "this optimiser does not have; pass `optimizers=(torch.optim.AdamW(deltune.training."
            "optim.groups(delta.parameters(), Course(model), learning_rate, weight_decay)), None)`"
            " to the Trainer"
        )


def _save(delta: Any, keep_backbone: bool, args: Any, state: Any) -> None:
    """Writes a checkpoint's delta; of a sharded model all processes take part."""
    model = delta.model
    if not args.should_save and not any(map(sharded, model.parameters())):
        return
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    delta.save(folder / "delta", overwrite=True)
    if not keep_backbone:
        kept = _kept(model)
        if args.should_save:
            _drop_backbone(folder, kept)


def _kept(model: "nn.Module") -> Tensors:
    """The tensors of all deltas, whole; of a sharded model every process has to ask for them."""
    # remove_duplicate=False: a tied tensor is looked for under each of its names on loading.
    trained = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {n: b for n, b in model.named_buffers() if n.startswith(f"{DELTAS}.")}
    return {n: gathered(t).cpu().clone() for n, t in {**trained, **kept}.items()}


def _drop_backbone(folder: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    whole = [path for path in folder.glob("model*.safetensors*") if path.is_file()]
    if not whole:
        raise TrainError(
            f"Trainer wrote no `{_WEIGHTS}` to `{folder}`; expected one to reduce to the delta; "
            "use DeltaCallback(delta, keep_backbone=True)"
        )
    part = folder / f".{_WEIGHTS}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / _WEIGHTS)
    for path in whole:
        if path.name != _WEIGHTS:
            path.unlink()
