"""What `import deltune` costs beyond `import torch`, in new processes; and with every public name
used, since the package loads its parts when they are first asked for.

Run by hand: `python benchmarks/bench_import.py`.
"""

import statistics
import subprocess
import sys

from timing import table, verdict

BOUND = 0.3
HEAVY = ("transformers", "datasets", "duckdb", "matplotlib", "peft", "sklearn", "scipy")
CODE = """
import sys, time, torch
start = time.process_time()
import deltune
{use}
seconds = time.process_time() - start
print(seconds, *[name for name in {heavy!r} if name in sys.modules])
"""
CASES = {
    "import deltune": "",
    "and every public name": "for name in deltune.__all__: getattr(deltune, name)",
}


def measure(use: str, rounds: int) -> tuple[float, set[str]]:
    """The median of the processor seconds, and the heavy packages that came along."""
    seconds, came = [], set()
    for _ in range(rounds):
        code = CODE.format(use=use, heavy=HEAVY)
        words = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        seconds.append(float(words[0]))
        came |= set(words[1:])
    return statistics.median(seconds), came


def main(rounds: int = 7) -> None:
    found = {name: measure(use, rounds) for name, use in CASES.items()}
    table(
        f"import beyond `import torch` ({rounds} processes each)",
        ["", "s", "heavy packages imported"],
        [[k, f"{s:.3f}", ", ".join(sorted(came)) or "none"] for k, (s, came) in found.items()],
    )
    verdict("import deltune, s", found["import deltune"][0], BOUND)
    verdict("with every public name, s", found["and every public name"][0], BOUND)


if __name__ == "__main__":
    main()
