"""placeholder"""

from pathlib import Path


def report(run: Path) -> Path:
    return run
