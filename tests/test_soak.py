"""The soak test with a few kills; `make soak` runs a hundred."""

import subprocess
import sys

from tiny_training import REPOSITORY


def test_resume_after_several_kills_is_bit_identical():
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak", "--kills", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills over")
