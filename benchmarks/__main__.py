"""All benchmarks, each in a process of its own: `python -m benchmarks [NAME ...]`; the table of all comes last.

The rows beside peers that are not installed are measured by `make bench-peers`, in an environment that has them.
"""

import argparse
import subprocess
import sys

from benchmarks.harness import RESULTS, Row, figure, recorded

ALONE = (
    *("startup", "step", "methods", "strategies", "losses", "dense", "views", "store", "preprocessing", "inference"),
    *("metrics", "scale"),
)
WITH_PEERS = ("losses", "dense", "views", "store")


def table() -> str:
    """All that was recorded, as Markdown."""
    heads = ("what", "glocal", "against", "ratio", "goal", "reached", "note")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for path in sorted(RESULTS.glob("*.json")):
        lines += [_line(row) for row in recorded(path.stem)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    goal = "" if row.goal is None else f"{'≥' if row.sense == 'at least' else '≤'} {row.goal:g}"
    reached = {None: "", True: "yes", False: "**no**"}[row.reached]
    against = f"{row.against}: {figure(row.theirs, row.unit)}" if row.theirs else row.against
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    cells = (row.what, figure(row.ours, row.unit), against, ratio, goal, reached, row.note)
    return "| " + " | ".join(cells) + " |"


def main(names: list[str]) -> int:
    """Run, then print and keep the table; the number of benchmarks that failed."""
    failed = [
        name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    ]
    (RESULTS / "table.md").write_text(table(), encoding="utf-8")
    print(table())
    for name in failed:
        print(f"benchmarks.{name} failed: see above.")
    return len(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks and keep their figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALONE)}; all without any")
    parser.add_argument("--peers", action="store_true", help=f"those beside peers: {', '.join(WITH_PEERS)}")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {*ALONE, *WITH_PEERS}:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    sys.exit(main(asked.names or list(WITH_PEERS if asked.peers else ALONE)))
