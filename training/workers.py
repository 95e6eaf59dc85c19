"""Worker processes that decode and load images."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize

from torch.utils.data import DataLoader

from common import Failed, one_line

CHUNK = 64  # images per item of a decoding process


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _identity(item):
    return item


def load_batches(dataset, num_workers: int, order: Iterable | None = None, convert: Callable = _identity) -> Iterator:
    """Yields `convert(dataset[i])` for each i in `order`, by default 0 to the last, loaded by a `DataLoader`.

    Results should be NumPy arrays: tensors would go through /dev/shm, which is small in a container, and those that do
    not fit are lost. The workers ignore SIGINT and SIGTERM; a signal to the whole process group, such as Ctrl-C, also
    reaches their parent, which handles it. They are killed when the parent ends, because multiprocessing would send
    them a SIGTERM and wait.

    Raises Failed, while iterating, if a worker dies.
    """
    before, on_child = {*multiprocessing.active_children()}, signal.getsignal(signal.SIGCHLD)
    settings = {"num_workers": num_workers, "worker_init_fn": _ignore_signals, "collate_fn": convert}
    loader = DataLoader(dataset, batch_size=None, sampler=order, **settings)
    try:
        batches = iter(loader)
    finally:  # even if only some of them could be started
        for worker in {*multiprocessing.active_children()} - before:
            Finalize(None, worker.kill, exitpriority=0)  # before multiprocessing sends SIGTERM
    if signal.getsignal(signal.SIGCHLD) is not on_child:  # torch's handler would raise at any point in the main thread
        signal.signal(signal.SIGCHLD, on_child)
    return _received(batches)


def _received(batches: Iterator) -> Iterator:
    try:
        yield from batches
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise Failed(
            f"{one_line(error)}, perhaps because memory ran out; free some or lower --dataloader_num_workers,"
            " and run the same command again"
        ) from error


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def on_all_cores(decode: Callable[[slice], list], num_images: int) -> Iterator:
    """Yields the images that `decode` returns for the slices of `range(num_images)`, on all cores and in order."""
    parts = [slice(first, min(first + CHUNK, num_images)) for first in range(0, num_images, CHUNK)]
    num_workers = min(available_cores(), len(parts)) if len(parts) > 1 else 0
    for images in load_batches(parts, num_workers, convert=decode):
        yield from images
