"""Runs in training that share their forward passes."""

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deltune.delta import deltas
from deltune.errors import DeltuneError, TrainError
from deltune.mechanisms.lanes import Lane
from deltune.mechanisms.piles import Piles
from deltune.mechanisms.streams import Stream, Streams, generators, set_generators
from deltune.routing import lanes_of, only
from deltune.training.events import Event, Noted, OnEvent, TrainResult
from deltune.training.joining import Answering, Asked, Call, Joiner
from deltune.training.joint_step import JointSteps
from deltune.training.precision import autocast
from deltune.training.run import Due, Outcome, Part, Run
from deltune.tree import Tree

LONE = "no other run has a batch that could share this forward; told once"
LARGE = "this batch fills the machine, so it has a forward of its own; told once"
TOGETHER, MOST = {"cpu": 1024}, 2**16
"""Numbers (tokens) in the batches of one forward, at most, by the kind of device; a batch of more
than a quarter of that goes by itself. On a CPU more only drive each other out of its caches."""
LENGTHENING = ("kv", "prompt")
CLOSE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far a loss in the first shared forward may be from that of the run by itself, over 1 + it."""


class Mixed(TrainError):
    """Rows are not what they would be by themselves; of no single run."""


class Member:
    """One run of a crowd.

    Args:
        name: of its delta.
        run: the run, opened.
        tree: of the delta.
        device: of the model.
    """

    def __init__(self, name: str, run: Run, tree: Tree, device: torch.device) -> None:
        self.name, self.run, self.tree = name, run, tree
        self.steps = run.all()
        self.stream = Stream(device)
        self.part: Part | None = None
        self.due: Due | None = None
        self.result: TrainResult | DeltuneError | None = None
        self.expected: float | None = None
        self.compared = self.noted = False
        specs = [(unit.site.path, unit.spec) for unit in tree.units]
        self.longer = tuple(
            (path, getattr(spec, "length", 0))
            for path, spec in specs
            if spec.mechanism in LENGTHENING
        )
        self.counts = any(spec.gated == "padded" for _, spec in specs)

    def acting(self) -> tuple[object, ...]:
        """How the delta acts."""
        tree, first = self.tree, next(iter(self.tree.parts.values()))[0]
        return tree.enabled, tree.merged, tree.factor, tree.skipped, first.lane

    def go(self, sent: Tensor | Outcome | None) -> None:
        """Goes on to the next part, to a step of the optimiser that is due, or to the end."""
        try:
            with self.stream:
                asked = self.steps.send(sent)
            self.part = None if isinstance(asked, Due) else asked
            self.due = asked if isinstance(asked, Due) else None
        except StopIteration as end:
            self.end(end.value)
        except DeltuneError as error:
            self.end(error)

    def end(self, result: TrainResult | DeltuneError) -> None:
        """Takes no further part."""
        self.part, self.due, self.result = None, None, result
        self.run.trainables.clear_gradients()


class Crowd:
    """Runs that share their forward passes, on one model."""

    def __init__(
        self, model: nn.Module, device: torch.device, on_event: Callable[[int, Event], None] | None
    ) -> None:
        self.model, self.device, self.on_event = model, device, on_event
        self.members: list[Member] = []
        self.joiner = Joiner(model)
        self.draws = self.meet = False
        self._route = ExitStack()
        self._rows: list[str] = []
        self._lanes: dict[str, Lane] = {}
        self._piles = Piles()
        self._joint = JointSteps(self._piles)

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *failure: object) -> None:
        self.unroute()

    def teller(self) -> OnEvent | None:
        """Where the events of the next member go."""
        number, on_event = len(self.members), self.on_event
        return None if on_event is None else lambda event: on_event(number, event)

    def join(self, member: Member) -> None:
        """Adds a run."""
        self.members.append(member)

    def train(self) -> list[TrainResult | DeltuneError]:
        """All runs to their ends."""
        order = list(deltas(self.model))  # that in which their hooks act
        members = sorted(self.members, key=lambda one: order.index(one.name))
        for member in members:
            member.go(None)
        while live := [member for member in members if member.part is not None]:
            self.turn(live)
        return [member.result for member in self.members if member.result is not None]

    def turn(self, live: Sequence[Member]) -> None:
        """One part of each run: forward, backward, and on to the next."""
        batches: dict[Member, Any] = {}
        for member in live:
            assert member.part is not None
            batches[member] = member.run.collate(member.part.examples)
            if member.expected is None:
                self.try_out(member, batches[member])
        for band in self.bands(batches):
            losses = self.losses(band)
            if losses:
                total: Any = sum(losses.values())
                total.backward()
            for member, loss in losses.items():
                member.go(loss.detach())
            self.update(list(band))

    def update(self, members: Sequence[Member]) -> None:
        """Steps of the optimisers that are due, and on to the next parts."""
        due = {member.run: member.due.loss for member in members if member.due is not None}
        outcomes = self._joint.update([member.run for member in members], due)
        for member in members:
            if member.run in outcomes:
                member.go(outcomes[member.run])

    def bands(self, batches: dict[Member, Any]) -> list[dict[Member, Any]]:
        """The batches that go through the model together: as many as make the machine faster."""
        most = TOGETHER.get(self.device.type, MOST)
        bands: list[dict[Member, Any]] = [{}]
        held = 0
        for member, batch in batches.items():
            if member.part is None:
                continue
            count = max((x.numel() for x in batch.values() if isinstance(x, Tensor)), default=0)
            large = count > most // 4
            if large and len(batches) > 1:
                self.tell(member, LARGE)
            if bands[-1] and (large or held + count > most):
                bands.append({})
                held = 0
            bands[-1][member] = batch
            held += most if large else count
        return bands

    def losses(self, batches: dict[Member, Any]) -> dict[Member, Tensor]:
        """The share of each run's part in its loss, but of those that fail."""
        found: dict[Member, Tensor] = {}
        answers: dict[Member, list[Any]] = {member: [] for member in batches}
        waiting = list(batches)
        while waiting:
            calls: dict[Member, Call] = {}
            for member in waiting:
                model: Any = Answering(self.model, answers[member], member.acting)
                try:
                    with self.arithmetic(member):
                        loss = member.run.objective.loss(model, batches[member])
                    assert member.part is not None
                    found[member] = member.run.shared(self.checked(member, loss), member.part)
                except Asked as question:
                    calls[member] = question.call
                except Mixed:
                    raise
                except DeltuneError as error:
                    member.end(error)
            self.answer(calls, answers)
            waiting = list(calls)
        return found

    def try_out(self, member: Member, batch: Any) -> None:
        """What the first shared loss has to be, and whether random numbers are drawn for it."""
        before = member.stream.state
        try:
            with self.alone(member.name), member.stream, self.arithmetic(member), torch.no_grad():
                member.expected = member.run.objective.loss(self.model, batch).item()
        except DeltuneError as error:
            member.end(error)
        self.draws |= not _same(before, member.stream.state)
        member.stream.state = before

    def checked(self, member: Member, loss: Any) -> Tensor:
        """The loss, which in a member's first shared forward has to be that of it alone."""
        expected, bound = member.expected, CLOSE[member.run.precision]
        if not member.compared and expected is not None:
            value = loss.item() if isinstance(loss, Tensor) else float("nan")
            far = abs(value - expected) > bound * (1 + abs(expected))
            if far or (value == value) != (expected == expected):
                raise Mixed(
                    f"the loss of `{member.name}` is {value:.6g} in the shared forward and "
                    f"{expected:.6g} by itself; expected the same; rows of a batch see each other "
                    "in this model, or its objective does not compute its loss from the rows of "
                    "what the model puts out; train the deltas one by one"
                )
            member.compared = True
        return loss

    def answer(self, calls: dict[Member, Call], answers: dict[Member, list[Any]]) -> None:
        """Adds to each member's answers what the model makes of its call."""
        members = list(calls)
        marks = [self.mark(member) for member in members]
        for group in self.joiner.groups(list(calls.values()), marks):
            mine = [members[at] for at in group]
            if len(mine) == 1 and len(members) > 1:
                self.tell(mine[0], LONE)
            asked = [calls[member] for member in mine]
            with torch.set_grad_enabled(asked[0].grads):
                found = self.forward(mine, asked)
            for member, made in zip(mine, found, strict=True):
                answers[member].append(made)

    def tell(self, member: Member, why: str) -> None:
        """Reports, once, that a run has a forward of its own."""
        if not member.noted:
            member.noted = True
            member.run.report(Noted(f"step {member.run.progress.step + 1}: {why}"))

    def mark(self, member: Member) -> Any:
        """None where a member's rows may be padded further; those of one mark share a forward."""
        if member.counts or (self.draws and member.longer):
            return ("exact", *member.longer)
        return None

    def forward(self, members: Sequence[Member], calls: Sequence[Call]) -> list[Any]:
        """What the model makes of calls of one kind, in one forward."""
        if len(calls) == 1:  # of many rows, or of what has no rows
            with self.alone(members[0].name), members[0].stream, self.arithmetic(members[0]):
                return [self.model(*calls[0].args, **calls[0].kwargs)]
        joined = self.joiner.join(calls)
        rows = [m.name for m, n in zip(members, joined.rows, strict=True) for _ in range(n)]
        lanes = self.route(rows)
        for member, sizes in zip(members, joined.sizes, strict=True):
            lane = lanes[member.name]
            lane.stream, member.stream.index, member.stream.sizes = (
                member.stream, lane.index, sizes
            )  # fmt: skip
        streams = [member.stream for member in members]
        with self.arithmetic(members[0]):
            return joined.split(self.drawn(joined.call, streams, any(joined.sizes)))

    def drawn(self, call: Call, streams: Sequence[Stream], padded: bool) -> Any:
        """What the model makes of a call, with each run's random numbers in its rows."""
        before, python = generators(self.device), random.getstate()
        states = [stream.state for stream in streams]
        # What deltas draw comes from the streams anyway; to meet the backbone's costs time.
        meet = self.draws and (self.meet or padded)
        with Streams(streams) if meet else nullcontext():
            output = self.model(*call.args, **call.kwargs)
        if _same(before, generators(self.device)) and python == random.getstate():
            return output
        if meet or not self.draws:
            raise TrainError(
                f"{type(self.model).__name__} draws random numbers in training beside those of "
                "dropout, which cannot be told apart by rows; use backbone_dropout=False, or train "
                "the deltas one by one"
            )
        self.meet = True
        set_generators(self.device, before)
        for stream, state in zip(streams, states, strict=True):
            stream.state = state
        return self.drawn(call, streams, padded)

    def arithmetic(self, member: Member) -> torch.autocast:
        """The arithmetic of forward passes."""
        return autocast(self.device, member.run.precision)

    def route(self, rows: list[str]) -> dict[str, Lane]:
        """The lanes of rows, which stay as they are while the same come."""
        if rows != self._rows:
            self.unroute()
            self._lanes, self._rows = self._route.enter_context(lanes_of(self.model, rows)), rows
            for lane in self._lanes.values():
                lane.router.piles = self._piles
        return self._lanes

    def unroute(self) -> None:
        """Lets the deltas act on all rows again."""
        for lane in self._lanes.values():
            lane.stream = lane.router.piles = None  # the lanes are kept for later routes
        self._joint.end()
        self._piles.end()
        self._rows, self._lanes = [], {}
        self._route.close()

    @contextmanager
    def alone(self, name: str) -> Generator[None]:
        """While it is open the model acts with one delta on all rows."""
        self.unroute()
        with only(self.model, name):
            yield


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
