"""Settings for all tests."""

import logging

import pytest
import torch
from loopback_hub import LoopbackHub

from common import log_to_terminal

pytest.register_assert_rewrite("tiny_training")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and their tensors are too small to be worth sharing among threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def shown_logs():
    """Logs to the terminal, as the commands do."""
    log_to_terminal()


@pytest.fixture
def own_caches(tmp_path, monkeypatch, caplog):
    """Keeps this process and its children away from the user's caches; shows what is logged."""
    caplog.set_level(logging.INFO)
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub():
    """A stand-in for the Hub on this machine."""
    hub = LoopbackHub()
    yield hub
    hub.stop()
