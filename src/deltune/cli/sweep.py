"""`deltune sweep`: one delta with several learning rates, trained at once."""

import json as json_module
import shutil
from dataclasses import asdict, dataclass, replace
from typing import Any

from deltune.cli import show
from deltune.cli.learn import Train, attached, opened, say, scored
from deltune.cli.shelf import Shelf, free_folder, write_result
from deltune.errors import DeltuneError, TrainError
from deltune.study import numbers
from deltune.training.settings import TrainSettings

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Sweep(Train):
    """Train a delta with several learning rates at once, and keep the best on dev.

    Where batches are small the runs share the forward passes of one model; each becomes what
    `deltune train` would make of its rate. Writes what `deltune train` writes of the best run, and
    OUT/sweep.json (all of them).
    """

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Rates to try, in the place of --learning-rate."""

    def run(self) -> None:
        """Trains and chooses."""
        import deltune as dt

        spec, rates = dt.parse(self.spec), sorted(set(self.learning_rates))
        if not rates or self.settings.eval_steps == "no":
            raise TrainError(
                f"a sweep over {len(rates)} rates with --eval-steps {self.settings.eval_steps} "
                "cannot choose; give at least one rate, and let it evaluate"
            )
        if self.settings.learning_rate != TrainSettings().learning_rate:
            raise TrainError(
                f"--learning-rate is {self.settings.learning_rate:g}, and a sweep tries "
                "--learning-rates; give that alone"
            )
        free_folder(self.out, self.overwrite, self.resume)
        task, model, tokenizer = opened(self.task, self.model, self.head, self.settings.seed)
        task = task.limited(train=self.max_train, dev=self.max_dev)
        deltas = [attached(model, spec, self.settings.seed, f"rate {rate:g}") for rate in rates]
        results = self._trained(model, tokenizer, task, deltas, rates)
        chosen = _best(results)
        for delta in deltas[:chosen] + deltas[chosen + 1 :]:
            delta.detach()
        delta, best = deltas[chosen], results[chosen]
        settings = replace(self.settings, learning_rate=rates[chosen])
        delta.save(self.out / "delta", overwrite=self.overwrite or self.resume)
        test = scored(model, tokenizer, task, "test", settings) if self.test else None
        data = write_result(
            self.out, str(spec), Shelf.of(self.model, self.head, task, self.task, settings),
            settings=settings, trainable=delta.count(), result=asdict(best), test=test,
        )  # fmt: skip
        self._tell(task.metric, data, [_row(*one) for one in zip(rates, results, strict=True)])

    def _trained(
        self, model: Any, tokenizer: Any, task: Any, deltas: list[Any], rates: list[float]
    ) -> list[Any]:
        from deltune.training.many import Job, train_many

        jobs = [
            Job(
                task, delta, replace(self.settings, learning_rate=rate),
                folder=self.out / CHECKPOINTS / delta.name,
            )
            for delta, rate in zip(deltas, rates, strict=True)
        ]  # fmt: skip
        with show.TrainingBar([delta.name for delta in deltas], quiet=self.json) as bar:
            return train_many(model, tokenizer, jobs, on_event=lambda n, event: bar(event, n))

    def _tell(self, metric: str, data: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        from deltune.study.records import write_atomic

        write_atomic(self.out / "sweep.json", json_module.dumps(rows, indent=1) + "\n")
        shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
        if self.json:
            show.say_json({**data, "sweep": rows})
            return
        lines = [
            [f"{row['learning_rate']:g}",
             row.get("error") or numbers.metric(row["best_dev"]), str(row.get("best_step", ""))]
            for row in rows
        ]  # fmt: skip
        show.out().print(show.table(["rate", f"best dev {metric}", "at step"], lines))
        say(self.out, metric, data)


def _best(results: list[Any]) -> int:
    """The place of the best on dev; of equal ones the first, which has the smallest rate."""
    found = [place for place, one in enumerate(results) if not isinstance(one, DeltuneError)]
    if not found:
        raise results[0]
    return max(found, key=lambda place: (results[place].best_dev, -place))


def _row(rate: float, result: Any) -> dict[str, Any]:
    if isinstance(result, DeltuneError):
        return {"learning_rate": rate, "error": str(result)}
    return {
        "learning_rate": rate, "best_dev": result.best_dev, "best_step": result.best_step
    }  # fmt: skip
