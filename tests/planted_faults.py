"""Plants the faults of `planted_faults.yaml` in a copy of the repository, one at a time, and runs the tests on each.

    python -m tests.planted_faults [NUMBER ...]

Without numbers it plants all of them, which takes about an hour. Exit codes: 0 all faults were found; 1 a fault was
not found or could not be planted.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


def is_found(copy: Path, fault: dict[str, str]) -> bool | None:
    """Whether a test fails; None if the fault does not match the source."""
    path = copy / fault["file"]
    source = path.read_text()
    if source.count(fault["find"]) != 1:
        return None
    path.write_text(source.replace(fault["find"], fault["replace"]))
    tests = [f"tests/{name}.py" for name in fault["tests"].split()]
    try:
        command = [sys.executable, "-m", "pytest", "-qx", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1
    finally:
        path.write_text(source)


def main(arguments: list[str]) -> int:
    faults = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    numbers = [int(argument) for argument in arguments] or range(1, len(faults) + 1)
    with tempfile.TemporaryDirectory() as copy:
        subprocess.run(["git", "clone", "-q", REPOSITORY, copy], check=True)
        outcomes = []
        for number in numbers:
            fault = faults[number - 1]
            outcomes.append(is_found(Path(copy), fault))
            words = {True: "found", False: "NOT FOUND", None: "does not fit"}[outcomes[-1]]
            print(f"{number:2} {words:12} {fault['file']}: {fault['replace'].strip()}", flush=True)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
