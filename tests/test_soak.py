"""The soak test for a few kills; `make soak` does a hundred."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_few_kills_leave_no_trace():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.soak", "--kills", "4"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills (")
