"""Reads a YAML file of a user, and says in one line what is wrong with it."""

import errno
import re
from pathlib import Path

import yaml

from common import InputError

CONFIG_FILE_BYTES = 2**16
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
TOKEN_HINT = "; the Hub's token is read from HF_TOKEN or from `hf auth login`"


class _YamlLoader(yaml.SafeLoader):
    """Refuses a duplicate key, of which PyYAML would take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "duplicate key", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """The content of a YAML file. Messages do not quote it, as a line may hold a secret.

    Raises:
        InputError: if it cannot be read, or has a key twice.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        if path.stat().st_size > CONFIG_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {CONFIG_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        token = TOKEN.search(text)
        if token is None:
            return yaml.load(text, _YamlLoader)
        reason = f"line {text[: token.start()].count(chr(10)) + 1} holds a token{TOKEN_HINT}; remove it"
    except OSError as error:
        reason = error.strerror
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"line {mark.line + 1 if mark else 1}: {shortened(error.problem)}"
    except RecursionError:
        reason = "it is nested too deep"
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):  # PyYAML's own, as for 2026-99-99
        reason = "it is not YAML in UTF-8, or a value does not fit its type"
    raise InputError(f"cannot read the configuration {shown(str(path))}: {reason}")


def shown(value) -> str:
    """A value for a message: on one line, short, and never a nested one, which may be endless."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    return shortened(repr(value))


def shortened(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
