"""Which errors a command reports in one line, with which exit code, and which ones it raises."""

import pytest
import torch

from common import Failed, InputError, Parser, run_command, sha256_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--steps is\n0"), 2),
        (Failed("the disk"), 1),
        (OSError("the disk"), 1),
        (torch.OutOfMemoryError("CUDA"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
    ],
)
def test_user_errors_are_reported_in_one_line_with_an_exit_code(error, code, capsys):
    def action():
        raise error

    assert run_command(action) == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), KeyError("ours"), TypeError("ours")])
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


def test_sha256_of_a_file_matches_fips_180_2(tmp_path):
    """The digest that FIPS 180-2 gives for "abc"."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
