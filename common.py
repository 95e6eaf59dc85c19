"""What the commands share: two kinds of errors, arguments, files that are replaced as a whole, and processes."""

import argparse
import hashlib
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

MOST_THREADS = 1024  # where threads cannot be made, OpenMP ends the process
NUM_SEEDS = 2**32  # torch's generator on the CPU takes a seed modulo this


class InputError(ValueError):
    """The user's mistake: an argument, a file, a setting. The message is one line; the exit code is 2."""


class Failed(RuntimeError):
    """What the user asked for was sound and could not be finished. The message is one line; the exit code is 1."""


def run_command(action: Callable[[], object], stopped: str = "stopped") -> int:
    """Runs a command and reports in one line on stderr what the user can do something about.

    Any other error is a fault of the code and is raised.

    Args:
        stopped: reported after Ctrl-C.

    Returns:
        the exit code: 0 done, 1 failed (`Failed`, a full disk, out of memory), 2 bad input, 130 stopped by Ctrl-C.
    """
    log_to_terminal()
    try:
        action()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (RuntimeError, InputError, OSError, MemoryError) as error:
        if not isinstance(error, (InputError, Failed, OSError)) and not is_out_of_memory(error):
            raise
        report_error(error)
        return 2 if isinstance(error, InputError) else 1
    return 0


def report_error(error: object) -> None:
    """Writes one line on stderr that says what ends the process, and which process of several."""
    rank = os.environ.get("RANK", "0")
    line = f"{'' if rank == '0' else f'[rank {rank}] '}error: {one_line(error)}\n"
    # Not print: after a progress bar the line would stand behind it. And with its end in one write, where Python is
    # told not to buffer: the lines of several processes would mix.
    tqdm.write(line, file=sys.stderr, end="")


class _Terminal(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record))  # on stdout, above a progress bar
        sys.stdout.flush()


def log_to_terminal() -> None:
    """Shows what the modules log; of several processes, only what the main one does."""
    for name in ("training", "pipelines", "eval", "experiments"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
            logger.addHandler(_Terminal())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, where torch has no error of its own for it."""
    texts = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def one_line(error: object) -> str:
    return " ".join(str(error).split())


# ---- Arguments


class Parser(argparse.ArgumentParser):
    """Raises InputError with one short line without control characters, and never shows a token."""

    def error(self, message):
        message = "".join(c if c.isprintable() else "?" for c in one_line(message))
        raise InputError(message if len(message) <= 300 else f"{message[:300]}...")

    def parse_args(self, arguments):
        options, unknown = self.parse_known_args(arguments)
        if any("token" in argument.lower() or argument.startswith("hf_") for argument in unknown):
            self.error("the Hub's token is not an argument; it is read from HF_TOKEN or from `hf auth login`")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options


def check_numbers(options: argparse.Namespace, least: dict[str, float], most: dict[str, float]) -> None:
    """Raises InputError unless each number that is given, or each of a list, is finite and in its range."""
    for name, low in least.items():
        value, high = getattr(options, name), most.get(name, math.inf)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (low <= number <= high and math.isfinite(number)):
                at_most = f" and at most {high}" if math.isfinite(high) else ""
                raise InputError(f"--{name} is {number}; it must be at least {low}{at_most}")


def check_seeds(options: argparse.Namespace) -> None:
    """Raises InputError unless each of `options.num_images` from `options.seed` on has a seed of its own."""
    last_seed = options.seed + options.num_images - 1
    if last_seed >= NUM_SEEDS:
        raise InputError(f"the last seed is {last_seed}; it must be below 2**32")


def without_folder(argument: str) -> str:
    """An absolute path reveals the author's machine: of /home/me/faces only `faces` is recorded."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def command_line(module: str, arguments: Iterable[str]) -> str:
    """The command as it is recorded."""
    return shlex.join(["python", "-m", module, *map(without_folder, arguments)])


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without a line break at its end."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


# ---- Files


def make_folder(folder: Path) -> None:
    """Creates the folder of `--out`.

    Raises:
        InputError: if something else has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {folder} is not a folder; choose another one") from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it, so that the old or the new content is there, never a part of it.

    Raises:
        OSError: naming the path; the old content is still there.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OSError:
    """The same error with the file's name: that of a full disk has none."""
    reason = os.strerror(error.errno) if error.errno else error
    return type(error)(f"could not write {path}: {reason}; check the disk and run the same command again")


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Processes


def on_main_process(state, action: Callable):
    """Runs an action on the main process alone; its (picklable) result, or its error, reaches every process.

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
