"""Which errors a command reports in one line, with which exit code, and which ones it raises."""

import pytest
import torch

from common import Failed, InputError, Parser, run_command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--steps is\n0"), 2),
        (Failed("the disk"), 1),
        (OSError("the disk"), 1),
        (torch.OutOfMemoryError("out of memory"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
    ],
)
def test_user_errors_are_reported_in_one_line_with_an_exit_code(error, code, capsys):
    def action():
        raise error

    assert run_command(action) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.endswith(f"{' '.join(str(error).split())}\n")
    assert ("lower the batch size" in line) == ("memory" in line)


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours")])
def test_programming_errors_propagate(error, capsys):
    def action():
        raise error

    with pytest.raises(type(error), match="ours"):
        run_command(action)
    assert capsys.readouterr().err == ""


def test_token_in_the_arguments_is_not_shown():
    with pytest.raises(InputError) as error:
        Parser(prog="x").parse_args(["hf_" + "a" * 34])
    assert "hf_a" not in str(error.value)
