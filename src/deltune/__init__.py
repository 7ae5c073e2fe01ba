"""deltune: attach, train, save, serve and compare deltas of frozen pre-trained models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.attaching import attach as attach
    from deltune.attaching import load as load
    from deltune.banks.bank import Bank as Bank
    from deltune.delta import Delta as Delta
    from deltune.delta import deltas as deltas
    from deltune.errors import DeltuneError as DeltuneError
    from deltune.exchange.peft.checkpoint import load_peft as load_peft
    from deltune.exchange.peft.checkpoint import save_peft as save_peft
    from deltune.families.addition.adapter import Adapter as Adapter
    from deltune.families.addition.prefix import Prefix as Prefix
    from deltune.families.addition.prompt import Prompt as Prompt
    from deltune.families.reparameterization.lora import LoRA as LoRA
    from deltune.families.specification.baselines import FullTuning as FullTuning
    from deltune.families.specification.baselines import LastLayers as LastLayers
    from deltune.families.specification.bitfit import BitFit as BitFit
    from deltune.mechanisms.head import HeadOnly as HeadOnly
    from deltune.merging.combine import merge as merge
    from deltune.planning import plan as plan
    from deltune.routing import activate as activate
    from deltune.routing import parallel as parallel
    from deltune.routing import route as route
    from deltune.show import inspect as inspect
    from deltune.spec import Spec as Spec
    from deltune.spec import methods as methods
    from deltune.spec import parse as parse
    from deltune.tasks.models import load_model as load_model
    from deltune.tasks.records import load_task as load_task
    from deltune.training.lean import lean as lean
    from deltune.training.loop import evaluate as evaluate
    from deltune.training.loop import train as train
    from deltune.training.many import train_many as train_many
    from deltune.training.settings import TrainSettings as TrainSettings

# Loaded on first use, so that `deltune --help` and `import deltune` cost next to nothing.
_PUBLIC = {
    "Adapter": "deltune.families.addition.adapter",
    "Bank": "deltune.banks.bank",
    "BitFit": "deltune.families.specification.bitfit",
    "Delta": "deltune.delta",
    "DeltuneError": "deltune.errors",
    "FullTuning": "deltune.families.specification.baselines",
    "HeadOnly": "deltune.mechanisms.head",
    "LastLayers": "deltune.families.specification.baselines",
    "LoRA": "deltune.families.reparameterization.lora",
    "Prefix": "deltune.families.addition.prefix",
    "Prompt": "deltune.families.addition.prompt",
    "Spec": "deltune.spec",
    "TrainSettings": "deltune.training.settings",
    "activate": "deltune.routing",
    "attach": "deltune.attaching",
    "deltas": "deltune.delta",
    "evaluate": "deltune.training.loop",
    "inspect": "deltune.show",
    "lean": "deltune.training.lean",
    "load": "deltune.attaching",
    "load_model": "deltune.tasks.models",
    "load_peft": "deltune.exchange.peft.checkpoint",
    "load_task": "deltune.tasks.records",
    "merge": "deltune.merging.combine",
    "methods": "deltune.spec",
    "parallel": "deltune.routing",
    "parse": "deltune.spec",
    "plan": "deltune.planning",
    "route": "deltune.routing",
    "save_peft": "deltune.exchange.peft.checkpoint",
    "train": "deltune.training.loop",
    "train_many": "deltune.training.many",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deltune' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
