"""Worker processes that decode and load images."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader


def available_cores() -> int:
    """CPU cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS has no affinity


def load_batches(dataset, num_workers: int, **settings) -> Iterator:
    """What `dataset` returns for each item or batch of indices, in order, as a `DataLoader` reads it.

    The workers leave SIGINT and SIGTERM to their parent. Signals to a whole group, such as Ctrl-C, reach them too; a
    worker that one of these ended would take its parent along, before that has saved anything. So where the parent
    ends with an error, they are killed: multiprocessing would ask them by SIGTERM and wait.
    """
    before = {*multiprocessing.active_children()}
    loader = DataLoader(
        dataset, num_workers=num_workers, worker_init_fn=_ignore_signals, collate_fn=_as_it_is, **settings
    )
    batches = iter(loader)
    for worker in {*multiprocessing.active_children()} - before:
        atexit.register(_kill, worker)
    return batches


def _as_it_is(batch):
    return batch


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _kill(worker: multiprocessing.Process) -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    worker.kill()
