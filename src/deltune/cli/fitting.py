"""`deltune subspace fit`: find a space of a study's deltas."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from deltune.cli import show
from deltune.cli.shelf import free_folder
from deltune.errors import StudyError, closest, listing
from deltune.subspace.settings import FitSettings, How


@dataclass(frozen=True)
class Fit:
    """Find a subspace of the deltas that a study has kept (`keep_deltas = true`, or `[subspace]`).

    The deltas of the first seed count; the methods need one for each of the tasks. A learned space
    is saved every two minutes; the same command goes on where it was stopped.
    """

    study: Positional[Path]
    """The folder of the study."""
    out: Path
    """Folder to write."""
    how: How = "principal"
    """In closed form, learned with encoders and the tasks' losses, or drawn as a control."""
    methods: tuple[str, ...] = ()
    """Methods that share the space; all that are not baselines if not given."""
    tasks: tuple[str, ...] = ()
    """Tasks that it is made of; all if not given."""
    without: tuple[str, ...] = ()
    """Tasks to leave out, such as those with a damaged delta."""
    model: str | None = None
    """The model, where the study has several."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    json: bool = False
    """Write JSON to standard output."""
    settings: FitSettings = field(default_factory=FitSettings)
    """The dimension, and how a learned space is found."""

    def run(self) -> None:
        """Finds the space, and says how much of the deltas of all tasks together it leaves out:

            sqrt(sum_i || D_i - U I_i ||^2 / sum_i || D_i ||^2)

        beside the least that any space of so many numbers leaves.
        """
        from deltune.study.spaces import space
        from deltune.subspace.store import load, save

        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=False)
        run, places = self._planned()
        with show.Counter("steps", quiet=self.json) as bar:
            rows = space(run, places, self.study, bar)
        made = self.study / "spaces" / run.digest()
        save(load(made), self.out, self.overwrite)
        if self.json:
            show.say_json(rows)
            return
        methods = list(dict.fromkeys(row["method"] for row in rows))
        lines = []
        for name in methods:
            own = [row for row in rows if row["method"] == name]
            left = math.hypot(*(row["error"] * row["length"] for row in own))
            error = left / math.hypot(*(row["length"] for row in own))
            lines.append([name, str(len(own)), f"{error:.3f}", f"{own[0]['bound']:.3f}"])
        columns = ["method", "tasks", "left out of the deltas", "least possible"]
        show.out().print(show.table(columns, lines))
        show.out().print(f"subspace: {self.out.resolve()}", markup=False)

    def _planned(self) -> tuple[Any, dict[str, str]]:
        """The run that finds the space, out of the study's own records."""
        from deltune.study.joint import Joint
        from deltune.study.plan import read_plan
        from deltune.study.state import State

        plan = read_plan(self.study)
        asked = self._asked(plan)
        state = State(plan, self.study)  # rates are chosen by tasks that may not be asked for
        found = list(Joint(asked, state.records, state.finals, state.blocked).spaces())
        if not found:
            raise StudyError(
                f"not every one of {listing(asked.subspace.methods)} has a finished run on each of "
                f"the {len(asked.tasks)} tasks; run the study to its end, or name --tasks or "
                "--methods that have"
            )
        for target in found[0].targets or ():
            final, task = target["final"], target["task"]["name"]
            there = (self.study / "deltas" / final).exists()
            if not there and not plan.keeps(state.records[final].spec):
                raise StudyError(
                    f"the study did not keep its delta of {target['method']} on {task}; set "
                    f"`keep_deltas = true` in its [study], delete `{self.study / 'runs'}` and run "
                    "it again"
                )
        return found[0], plan.places

    def _asked(self, plan: Any) -> Any:
        """The plan with this space alone in it."""
        from deltune.study.plan import SubspaceInfo

        single = [method.name for method in plan.methods if not method.stages]
        deltas = [name for name in single if plan.method(name).family != "baseline"]
        if not (methods := self.methods or tuple(deltas)):
            raise StudyError(
                f"the study's methods are baselines or trained in stages; name those that are to "
                f"share a space: --methods, of {listing(single)}"
            )
        names = [task.name for task in plan.tasks]
        models = [model.name for model in plan.models]
        for what, given, known in (
            ("method", methods, single),
            ("task", (*self.tasks, *self.without), names),
            ("model", (self.model,) if self.model else (), models),
        ):
            for name in given:
                if name not in known:
                    raise StudyError(
                        f"the study has no {what} `{name}`{closest(name, known)}; it has "
                        f"{listing(known)}"
                    )
        if len(models) > 1 and self.model is None:
            raise StudyError(f"the study has the models {listing(models)}; name one: --model")
        fit = self.settings.to_json()
        spaces: dict[str, list[int]] = {self.how: [fit.pop("dimension")]}
        settings = plan.method(methods[0]).settings
        tasks = [name for name in self.tasks or names if name not in self.without]
        return dataclasses.replace(
            plan,
            subspace=SubspaceInfo((), methods, spaces, (), settings, fit),
            tasks=tuple(task for task in plan.tasks if task.name in tasks),
            models=tuple(model for model in plan.models if self.model in (None, model.name)),
        )
