"""The soak test for a few kills; `make soak` does a hundred."""

import subprocess
import sys

from tiny_training import REPOSITORY


def test_a_few_kills_leave_no_trace():
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak", "--kills", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills (")
