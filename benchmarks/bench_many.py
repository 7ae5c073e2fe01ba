"""The time of training K LoRAs at once over that of K runs of PEFT, one after another.

`train_many` on one Llama of 4 layers with random weights, whose K runs (other rates, seeds and
data, rank 8) share forward and backward passes, beside K plain loops around PEFT models: forward,
backward, clipping, fused AdamW, linear schedule. Both take the same steps (200 at 1 x 16) from the
same tensors on the same batches; setting up is counted in ours alone. Times are processor seconds,
interleaved, garbage collection kept out as everywhere here.

    PEFT / ours     how many times faster the K runs are at once: at least 2 at 1 x 16
    alone / ours    the same of K runs of `train`
    loss            largest difference of a loss from PEFT's over all runs and their first 50 steps;
                    with dropout PEFT's module is made to drop what ours drops, for this alone

Run by hand: `python benchmarks/bench_many.py`; `--width 512`, `--rounds 5`, `--many 4 8 16`.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_routing import llama
from timing import interleave, one_thread, table, verdict
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.mechanisms.factors import mask_of
from deltune.tasks.task import Record, Task
from deltune.training.batches import Order
from deltune.training.generators import seed_step
from deltune.training.many import train_many

LEAST, WORDS, COMPARED = 2.0, 2048, 50
STEPS = {(1, 16): 200, (4, 32): 16, (8, 64): 6}


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.ids)


class NextToken:
    """Mean loss of the next token."""

    def encode(self, records: Sequence[Record]) -> list[Example]:
        return [Example(tuple(map(int, row.input.split()))) for row in records]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([example.ids for example in examples])}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def predict(self, model: Any, batch: dict[str, Tensor]) -> list[str]:
        raise NotImplementedError


def data(plan: "Plan") -> Task:
    draw = torch.Generator().manual_seed(plan.number)
    size = (plan.steps * plan.rows, plan.tokens)
    ids = torch.randint(0, WORDS, size, generator=draw).tolist()
    records = [Record(" ".join(map(str, row)), "") for row in ids]
    return Task("numbers", "generation", "exact_match", None, records, [], [])


@dataclass(frozen=True)
class Plan:
    """One of the K runs."""

    number: int
    rows: int
    tokens: int
    dropout: float

    @property
    def steps(self) -> int:
        return STEPS[self.rows, self.tokens]

    @property
    def settings(self) -> dt.TrainSettings:
        return dt.TrainSettings(
            learning_rate=1e-3 * (1 + self.number % 4), seed=self.number, max_steps=self.steps,
            per_device_train_batch_size=self.rows, eval_steps="no",
        )  # fmt: skip


class Ours:
    """The K runs on one model."""

    def __init__(self, plans: Sequence[Plan], width: int) -> None:
        self.model, self.plans = llama(width), plans
        self.tasks = [data(plan) for plan in plans]
        self.deltas = [
            dt.attach(
                self.model,
                f"lora(rank=8, alpha=16.0, dropout={plan.dropout})",
                name=str(plan.number),
                seed=plan.number,
            )
            for plan in plans
        ]
        self.starts = [delta.vector().clone() for delta in self.deltas]

    def jobs(self) -> list[tuple[Any, ...]]:
        for delta, start in zip(self.deltas, self.starts, strict=True):
            delta.load_vector(start)
        named = zip(self.tasks, self.deltas, self.plans, strict=True)
        return [(task, delta, plan.settings, NextToken()) for task, delta, plan in named]

    def at_once(self) -> list[Sequence[float]]:
        results: Any = train_many(self.model, None, self.jobs())
        return [one.losses for one in results]

    def alone(self) -> list[Sequence[float]]:
        found = []
        for task, delta, settings, objective in self.jobs():
            for other in self.deltas:
                other.enable() if other is delta else other.disable()
            found.append(
                dt.train(self.model, None, task, delta, settings, objective=objective).losses
            )
        return found


class Dropping(nn.Module):
    """Drops what ours drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * mask_of(x, self.p, int(torch.randint(2**62, (), dtype=torch.int64)))


class Theirs:
    """The K runs in PEFT, one after another, each on a model of its own."""

    def __init__(self, ours: Ours, width: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.models, self.batches, self.plans = [], [], ours.plans
        objective = NextToken()
        for plan, delta, task in zip(ours.plans, ours.deltas, ours.tasks, strict=True):
            config = LoraConfig(
                r=8, lora_alpha=16, lora_dropout=plan.dropout,
                target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
            )  # fmt: skip
            model: Any = get_peft_model(llama(width), config)  # type: ignore[arg-type]
            self.models.append((model.train(), lora_tensors(model, delta)))
            examples = objective.encode(task.train)
            order = Order([one.length for one in examples], plan.settings)
            steps = [order.batch(step) for step in range(plan.steps)]
            self.batches.append([objective.collate([examples[i] for i in step]) for step in steps])

    def same_dropout(self) -> None:
        """Lets the models drop what ours drop."""
        for model, _ in self.models:
            for module in model.modules():
                for name, child in getattr(module, "lora_dropout", nn.ModuleDict()).items():
                    if isinstance(child, nn.Dropout):
                        module.lora_dropout[name] = Dropping(child.p)

    def run(self, seeded: bool = False) -> list[Sequence[float]]:
        parts = zip(self.models, self.batches, self.plans, strict=True)
        return [loop(*made, batches, plan, seeded) for made, batches, plan in parts]


def lora_tensors(model: Any, delta: dt.Delta) -> list[tuple[Tensor, Tensor]]:
    """PEFT's tensors with those of ours that they start from."""
    found, starts = [], {name: t.detach().clone() for name, t in delta.tensors().items()}
    for path in {unit.site.path for unit in delta.tree.units}:
        layer = model.base_model.model.get_submodule(path)
        found.append((layer.lora_A["default"].weight, starts[f"lora.{path}.A"]))
        found.append((layer.lora_B["default"].weight, starts[f"lora.{path}.B"]))
    return found


def loop(
    model: Any, starts: Sequence[tuple[Any, Tensor]], batches: Sequence[dict[str, Tensor]],
    plan: Plan, seeded: bool,
) -> list[float]:  # fmt: skip
    """A plain loop."""
    with torch.no_grad():
        for tensor, start in starts:
            tensor.copy_(start)
    objective, settings, losses = NextToken(), plan.settings, []
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / plan.steps)
    for step, batch in enumerate(batches):
        if seeded:
            seed_step(settings.seed, 0, step, torch.device("cpu"))
        loss = objective.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(own, settings.max_grad_norm)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(
    many: int, shape: tuple[int, int], dropout: float, width: int, rounds: int
) -> tuple[list[str], float, float]:
    """A line of the table, how many times faster than PEFT's, and the difference of losses."""
    plans = [Plan(number, *shape, dropout) for number in range(many)]
    ours = Ours(plans, width)
    theirs = Theirs(ours, width)
    works: dict[str, Callable[[], Any]] = {
        "ours": ours.at_once, "alone": ours.alone, "peft": theirs.run
    }  # fmt: skip
    seconds = interleave(works, rounds, warmup=1)
    theirs.same_dropout()
    far = max(
        abs(a - b)
        for one, other in zip(ours.at_once(), theirs.run(seeded=True), strict=True)
        for a, b in zip(one[:COMPARED], other[:COMPARED], strict=True)
    )
    ratio = {
        name: statistics.median(x / y for x, y in zip(seconds[name], seconds["ours"], strict=True))
        for name in ("peft", "alone")
    }
    each = 1e3 * statistics.median(seconds["ours"]) / plans[0].steps
    line = [
        f"{shape[0]} x {shape[1]}", str(many), f"{dropout:g}", f"{each:.1f}",
        f"{ratio['peft']:.2f}", f"{ratio['alone']:.2f}", f"{far:.0e}",
    ]  # fmt: skip
    return line, ratio["peft"], far


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--width", type=int, nargs="+", default=[64, 256])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--many", type=int, nargs="+", default=[4, 8, 16])
    given = options.parse_args()
    machine, most = one_thread(), 0.0
    for width in given.width:
        lines, least = [], {}
        for shape in STEPS:
            for dropout in (0.0, 0.1):
                for many in given.many if shape == (1, 16) else [8]:
                    line, ratio, far = compare(many, shape, dropout, width, given.rounds)
                    lines.append(line)
                    most = max(most, far)
                    if shape == (1, 16):
                        least[many] = min(ratio, least.get(many, ratio))
        table(
            f"LoRAs on a Llama of width {width}, {machine}",
            ["rows x tokens", "K", "dropout", "ms a turn", "PEFT / ours", "alone / ours", "loss"],
            lines,
        )
        for many, ratio in least.items():
            claim = f"width {width}, 1 x 16, K = {many}: PEFT over ours, at least"
            verdict(claim, ratio, LEAST, most=False)
    verdict("difference of losses, at most", most, 1e-4)


if __name__ == "__main__":
    main()
