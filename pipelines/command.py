"""What the commands have in common: arguments that are checked, and one line for what goes wrong."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pipelines.loading import InputError

MOST_THREADS = 1024  # where threads cannot be made, OpenMP ends the process
NUM_SEEDS = 2**32  # torch's generator on the CPU takes a seed modulo this


def run_command(
    action: Callable[[], object],
    bad_input: tuple[type[Exception], ...] = (InputError,),
    failures: tuple[type[Exception], ...] = (ValueError, OSError, torch.OutOfMemoryError),
    stopped: str = "stopped",
) -> int:
    """Does what a command is for, and tells on stderr in one line what ended it too early.

    Args:
        bad_input: errors that the user's input has caused.
        failures: other errors; what is in neither is a fault of the code and is raised.
        stopped: told after Ctrl-C.

    Returns:
        the exit code: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        action()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (*bad_input, *failures) as error:
        # in one write: print makes two where Python is told not to buffer, and the lines of several processes mix
        sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}error: {one_line(error)}\n")
        return 2 if isinstance(error, bad_input) else 1
    return 0


def one_line(error: object) -> str:
    return " ".join(str(error).split())


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one short line without control characters, and shows no token."""

    def error(self, message):
        message = "".join(c if c.isprintable() else "?" for c in one_line(message))
        raise InputError(message if len(message) <= 300 else f"{message[:300]}...")

    def parse_args(self, arguments):
        options, unknown = self.parse_known_args(arguments)
        if any("token" in argument.lower() or argument.startswith("hf_") for argument in unknown):
            self.error("the Hub's token is no argument; it is read from HF_TOKEN or from `hf auth login`")
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


def make_folder(folder: Path) -> None:
    """Makes the folder of `--out`.

    Raises:
        InputError: if something else is there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {folder} is no folder; take another one") from error


def without_folder(argument: str) -> str:
    """An absolute path tells of the author's machine: of /home/me/faces only `faces` is written down."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def command_line(module: str, arguments: Iterable[str]) -> str:
    """The command as a record tells it."""
    return shlex.join(["python", "-m", module, *map(without_folder, arguments)])
