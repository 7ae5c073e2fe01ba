"""What `torch.compile` has to be told."""

import sys
from typing import Any

import torch


def heed_hooks() -> None:
    """Compiled models take notice of hooks that come later; to be called when one has come.

    By default torch's compiler takes a module without hooks for one that will never have any
    (`torch._dynamo.config.skip_nnmodule_hook_guards`), so that a delta which acts later would be
    ignored without a word. The first time that the setting is met it is switched off, and what this
    process compiled under it is forgotten: it is compiled again when it is called.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")  # without it nothing was compiled yet
    config: Any = getattr(dynamo, "config", None)
    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
