"""Reads a YAML file of a user, and says in one line what is wrong with it."""

import re
from pathlib import Path

import yaml

from common import InputError

CONFIG_FILE_BYTES = 2**16
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
TOKEN_HINT = "; the Hub's token is read from HF_TOKEN or from `hf auth login`"


class _YamlLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML would take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """The content of a YAML file. Messages do not quote it, as a line may hold a secret.

    Raises:
        InputError: if it cannot be read, or a key stands there twice.
    """
    try:
        if not path.is_file():
            raise InputError(f"cannot read the configuration {shown(str(path))}: there is no such file")
        if path.stat().st_size > CONFIG_FILE_BYTES:
            raise InputError(f"cannot read the configuration {path}: it has more than {CONFIG_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        token = TOKEN.search(text)
        if token:
            line = text[: token.start()].count("\n") + 1
            raise InputError(f"line {line} of {path} holds a token{TOKEN_HINT}; remove it")
        return yaml.load(text, _YamlLoader)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InputError(f"cannot read the configuration {path}: line {line}: {shortened(error.problem)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the configuration {path}: it is no UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise InputError(f"cannot read the configuration {shown(str(path))}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"cannot read the configuration {path}: {shortened(str(error))}") from error
    except RecursionError:
        raise InputError(f"cannot read the configuration {path}: it is nested too deep") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML's own, as for 2026-99-99
        raise InputError(f"cannot read the configuration {path}: a value does not fit its type") from error


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
