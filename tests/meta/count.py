"""How many tests there are: ``make count`` collects them and fails when it are fewer than before, or when one cannot be
collected. The floor is raised when tests are added; it goes down only with a change that says why."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Final

__all__ = ["FLOOR", "check_count", "main"]

FLOOR: Final = 2540


def check_count(output: str, status: int) -> str:
    """What is wrong with pytest's account of a collection; empty when nothing is."""
    if status != 0:
        return f"collecting ended with an error (status {status})"
    match = re.search(r"^(\d+)(?:/\d+)? tests? collected", output, re.MULTILINE)
    if match is None:
        return "pytest told no count"
    if int(match[1]) < FLOOR:
        return f"fewer tests than there were: {match[1]}, and the floor is {FLOOR}"
    return ""


def main() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "-p", "no:randomly"]
    done = subprocess.run([*command, "-o", "addopts="], capture_output=True, text=True, check=False)
    complaint = check_count(done.stdout, done.returncode)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr)
    if complaint:
        print(complaint, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
