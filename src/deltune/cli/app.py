"""Reads a command, runs it, and turns its end into words and an exit status."""

import importlib.metadata
import os
import sys
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from deltune.cli.convert import Convert
from deltune.cli.exchange import Export, Import
from deltune.cli.fitting import Fit
from deltune.cli.learn import Evaluate, Predict, Train
from deltune.cli.look import Inspect, Methods, Plan, Tasks
from deltune.cli.merge import Diff, Merge
from deltune.cli.studies import Quickstart, Run, Study
from deltune.cli.subspaces import Landscape, Subspaces, Tune
from deltune.cli.sweep import Sweep
from deltune.errors import DeltuneError

Command = (
    Annotated[Methods, subcommand("methods", description="List the methods, or describe one.")]
    | Annotated[Tasks, subcommand("tasks", description="List the tasks of a folder.")]
    | Annotated[Inspect, subcommand("inspect", description="Show a model's sites and roles.")]
    | Annotated[Plan, subcommand("plan", description="Show what a delta would add to a model.")]
    | Annotated[Train, subcommand("train", description="Train a delta on a task.")]
    | Annotated[Sweep, subcommand("sweep", description="Train with several learning rates.")]
    | Annotated[Evaluate, subcommand("evaluate", description="Score a delta on a task.")]
    | Annotated[Predict, subcommand("predict", description="Predict with a delta.")]
    | Annotated[Merge, subcommand("merge", description="Make one delta of several, or a model.")]
    | Annotated[Diff, subcommand("diff", description="Show how alike two deltas are.")]
    | Annotated[Convert, subcommand("convert", description="Make a delta of another method.")]
    | Annotated[Export, subcommand("export", description="Write a delta for PEFT or vLLM.")]
    | Annotated[Import, subcommand("import", description="Read other libraries' checkpoints.")]
    | Annotated[Study, subcommand("study", description="Compare methods: run, status, report.")]
    | Annotated[Subspaces, subcommand("subspace", description="One space of several methods.")]
    | Annotated[Quickstart, subcommand("quickstart", description="A small study on real data.")]
)

ABOUT = """Adapt frozen pre-trained models through small deltas, and compare the methods.

Every command explains itself: deltune COMMAND --help. Begin with: deltune quickstart."""
CONFIG = (OmitSubcommandPrefixes, OmitArgPrefixes, FlagCreatePairsOff)
AGAIN = (Run, Quickstart, Fit, Landscape)
"""Commands that go on where they were interrupted."""
RESUMED = (Train, Sweep, Tune)
"""Those that do so when they are asked to."""
REFUSED, INTERRUPTED = 2, 130


def run(args: list[str] | None = None) -> int:
    """Runs one command; its exit status: 0, 2 for what was refused, 130 when interrupted."""
    words = sys.argv[1:] if args is None else list(args)
    if words == ["--version"]:
        print(f"deltune {importlib.metadata.version('deltune')}")
        return 0
    words, traceback = _traceback(words)
    command = tyro.cli(Command, prog="deltune", description=ABOUT, args=words, config=CONFIG)
    try:
        command.run()
    except DeltuneError as error:
        if traceback:
            raise
        print(f"deltune: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"deltune: interrupted{_how_on(command)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; silence the flush at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _how_on(command: Any) -> str:
    """What to say of a command that may go on, or of its verb."""
    begun = getattr(command, "verb", command)
    if isinstance(begun, AGAIN):
        return "; the same command goes on"
    return "; the same command with --resume goes on" if isinstance(begun, RESUMED) else ""


def _traceback(words: list[str]) -> tuple[list[str], bool]:
    """Takes `--traceback`, which any command accepts anywhere, out of the words."""
    asked = "--traceback" in words or os.environ.get("DELTUNE_TRACEBACK", "0") not in ("", "0")
    return [word for word in words if word != "--traceback"], asked
