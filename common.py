"""Shared by all commands: two kinds of errors, argument parsing, atomic file writes, and multi-process helpers."""

import argparse
import difflib
import hashlib
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

MOST_THREADS = 1024  # OpenMP aborts the process when it cannot create a thread
NUM_SEEDS = 2**32  # torch's CPU generator takes seeds modulo this
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")  # access token of the Hub
TOKEN_HINT = "the Hub's token is read from HF_TOKEN or from `hf auth login`; remove it from the arguments and files"


class InputError(ValueError):
    """A user error in an argument, a file or a setting. The message is one line; the exit code is 2."""


class Failed(RuntimeError):
    """A valid request that could not be completed. The message is one line; the exit code is 1."""


def run_command(action: Callable[[], object], stopped: str = "stopped") -> int:
    """Runs a command and reports errors that the user can act on as one line on stderr.

    Any other error is a bug and is raised.

    Args:
        stopped: message after Ctrl-C.

    Returns:
        the exit code: 0 done, 1 failed (`Failed`, a full disk, out of memory), 2 bad input, 130 stopped by Ctrl-C.
    """
    log_to_terminal()
    try:
        action()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (InputError, Failed, OSError) as error:
        report_error(error)
        return 2 if isinstance(error, InputError) else 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        report_error(f"out of memory; lower the batch size or use a smaller network: {error}")
        return 1
    return 0


def report_error(error: object) -> None:
    """Writes the error that ends the process as one line on stderr, with the rank unless it is 0."""
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f"[rank {rank}] "
    # above a progress bar; as a single write, so that the lines of several processes do not interleave
    tqdm.write(f"{process}error: {one_line(error)}\n", file=sys.stderr, end="")


class _Terminal(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record))  # on stdout, above a progress bar
        sys.stdout.flush()


def log_to_terminal() -> None:
    """Shows the log messages of our modules on the terminal; processes other than the main one show only warnings."""
    for name in ("training", "pipelines", "eval", "experiments"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
            logger.addHandler(_Terminal())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or CPU memory ran out; torch has no exception class for the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def one_line(error: object) -> str:
    return " ".join(str(error).split())


# ---- Arguments


def difference(saved: dict, current: dict) -> str:
    """The differences between two flat dictionaries, as `key: saved -> current; ...`; empty if they are equal."""
    keys = sorted({*saved, *current})
    return "; ".join(f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k))


class Parser(argparse.ArgumentParser):
    """Raises InputError with a short one-line message, which never shows the Hub's token."""

    def error(self, message):
        raise InputError(one_line(message)[:300])

    def parse_args(self, arguments):
        if TOKEN.search(" ".join(arguments)):
            self.error(TOKEN_HINT)
        options, unknown = self.parse_known_args(arguments)
        if any("token" in argument.lower() or argument.startswith("hf_") for argument in unknown):
            self.error(TOKEN_HINT)
        if unknown:
            flag = unknown[0].split("=")[0]
            nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
            self.error(f"unknown flag {flag}; {f'did you mean {nearest[0]}?' if nearest else 'see --help'}")
        return options


def check_numbers(options: argparse.Namespace, least: dict[str, float], most: dict[str, float]) -> None:
    """Raises InputError unless every number given, alone or in a list, is finite and in its range."""
    for name, low in least.items():
        value, high = getattr(options, name), most.get(name, math.inf)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (low <= number <= high and math.isfinite(number)):
                at_most = f" and at most {high}" if math.isfinite(high) else ""
                raise InputError(f"--{name} is {number}; it must be at least {low}{at_most}")


def check_seeds(options: argparse.Namespace) -> None:
    """Raises InputError unless all `options.num_images` seeds, starting at `options.seed`, are below 2**32."""
    last_seed = options.seed + options.num_images - 1
    if last_seed >= NUM_SEEDS:
        raise InputError(f"the last seed is {last_seed}; it must be below 2**32")


def without_folder(argument: str) -> str:
    """Shortens an absolute path such as /home/me/faces to `faces`, so that records reveal nothing of the machine."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def command_line(module: str, arguments: Iterable[str]) -> str:
    """The command as it is recorded, without absolute paths."""
    return shlex.join(["python", "-m", module, *map(without_folder, arguments)])


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without a trailing newline."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


# ---- Files


def make_folder(folder: Path) -> None:
    """Creates the `--out` folder. Raises InputError if the path exists and is not a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {folder} is not a folder; choose another one") from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it, so that readers see the old or the new content, never a partial file.

    Raises OSError, naming the path; the old content is kept.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OSError:
    """The same error with the file's name, which the error for a full disk lacks."""
    reason = os.strerror(error.errno) if error.errno else error
    return type(error)(f"could not write {path}: {reason}; check the disk and run the same command again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Processes


def on_main_process(state, action: Callable):
    """Runs an action on the main process only and returns its picklable result, or raises its error, on every process.

    Args:
        state: accelerate's `Accelerator` or `PartialState`.
    """
    outcome = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # raised again below, on every process
            outcome[1] = error
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result
