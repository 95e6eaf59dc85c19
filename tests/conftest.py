"""Settings for all tests."""

import pytest
import torch

from common import log_to_terminal

pytest.register_assert_rewrite("tiny_training")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and their tensors are too small to be worth sharing among threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def shown_logs():
    """As in the commands."""
    log_to_terminal()
