"""Transfer in a study's learned spaces with codes at the lengths that their decoders know.

    DELTUNE_DATA=... python docs/studies/lengths.py FOLDER

FOLDER is that of a finished study with learned spaces. Each code that a method s has found is
decoded by each other method d as it is, and multiplied by r_d / r_s, with r_m the root mean square
of the codes that the encoder of m gives of the seen tasks. Nothing is trained. Killed and started
again it goes on from FOLDER/lengths.json.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

from deltune.study.plan import read_plan
from deltune.study.spaces import OWN
from deltune.study.state import State
from deltune.study.statistics import corrected
from deltune.study.trial import model_of, settings_of, task_of
from deltune.subspace.store import load
from deltune.subspace.tuning import scores_at
from deltune.tasks.objectives import objective_for


def main() -> None:
    """Decodes, and prints the table."""
    folder = Path(sys.argv[1])
    plan = read_plan(folder)
    state, kept = State(plan, folder), folder / "lengths.json"
    scaled = json.loads(kept.read_text()) if kept.exists() else {}
    own = defaultdict(list)
    for cell in state.cells:
        own[cell.method, cell.task] += [one.result.test for one in state.results(cell)]
    print("| numbers | from | to | as they are | at the decoder's length |")
    print("|---|---|---|---|---|")
    for space in state.joint.spaces():
        if space.settings["how"] != "learned":
            continue
        found = load(folder / "spaces" / space.digest())
        length = {name: float(codes.square().mean().sqrt()) for name, codes in found.codes.items()}
        pairs = defaultdict(list)
        for run in state.joint.codes(space):
            rows = state.records[run.digest()].measures
            code = torch.tensor(next(row["code"] for row in rows if "code" in row))
            others = [name for name in found.methods if name != run.method]
            if run.digest() not in scaled:
                model, tokenizer = model_of(run, plan.places, None)
                task = task_of(run, run.task, plan.places, run.seed)
                asked = {n: v for n, v in run.settings.items() if n not in OWN}
                settings = settings_of(asked)
                objective = objective_for(task, model, tokenizer, max_length=settings.max_length)
                scaled[run.digest()] = {
                    name: scores_at(
                        found, model, tokenizer, task, [code * length[name] / length[run.method]],
                        [name], settings, objective=objective,
                    )[name][0]
                    for name in others
                }  # fmt: skip
                kept.write_text(json.dumps(scaled))
            plain = {row["decoder"]: row["value"] for row in rows if "decoder" in row}
            info = plan.task(run.task["name"])
            for name in others:
                reference = statistics.fmean(own[name, info.name])
                both = [
                    corrected(values[name], reference, info.chance, info.floor)
                    for values in (plain, scaled[run.digest()])
                ]
                if None not in both:
                    pairs[run.method, name].append(both)
        every = [both for some in pairs.values() for both in some]
        for (source, decoder), some in [*pairs.items(), (("all", "all"), every)]:
            means = [100 * statistics.fmean(column) for column in zip(*some, strict=True)]
            size = space.settings["dimension"]
            print(
                f"| {size} | {source} | {decoder} | {means[0]:.1f} | {means[1]:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
