"""Pushing a model repository to the Hub: its own files and nothing else, in one commit.

The token comes from the environment (HF_TOKEN) or from `hf auth login`, and is never printed.
"""

import json
import re
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError  # of the HTTP library in use, which differs between releases
from huggingface_hub.utils import get_session, validate_repo_id
from safetensors import SafetensorError, safe_open

from common import Failed, InputError, one_line
from pipelines.model_card import render_card

TIMEOUT_SECONDS = 60  # of one connection, read or write; the library itself waits for ever
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
OPTIONAL = ("training.json", "training_config.yaml", "samples.png", "results.json")
WEIGHTS = re.compile(r"unet/diffusion_pytorch_model[\w.-]*\.safetensors(\.index(\.\w+)?\.json)?")


def model_files(folder: Path) -> list[str]:
    """The files of a model repository, relative to its folder; others that lie there are left out.

    Raises:
        InputError: if one is missing or broken, if a name or a link leads out of the folder, or if weights
            are pickled: reading a pickle can run any code.
    """
    index = _read_json(folder / "model_index.json")
    names = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    names += [name for name in OPTIONAL if (folder / name).is_file()]
    for component in ("_class_name", "unet", "scheduler"):
        pair = index.get(component)
        if not (isinstance(pair, list) and len(pair) == 2 and all(str(part).isidentifier() for part in pair)):
            raise InputError(
                f"{folder}/model_index.json: {component} is {pair!r:.80}; it should be a module's name and a class's"
            )
        if pair[0] != "diffusers":
            names.append(f"{pair[0]}.py" if component == "_class_name" else f"{component}/{pair[0]}.py")
    names += _weight_files(folder)
    for name in names:
        if name != "README.md" and not (folder / name).is_file():
            raise InputError(f"{folder} is not a model repository: it lacks {name}")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder}/{name} is a link out of the folder; put the file itself there")
    return sorted(names)


def _weight_files(folder: Path) -> list[str]:
    paths = [path for path in sorted((folder / "unet").glob("*")) if path.is_file()]
    pickles = [path.name for path in paths if path.suffix in PICKLES]
    if pickles:
        raise InputError(f"{folder}/unet holds pickled weights, {pickles[0]}; keep safetensors only")
    names = [f"unet/{path.name}" for path in paths if WEIGHTS.fullmatch(f"unet/{path.name}")]
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{folder}/unet has no weights: no diffusion_pytorch_model*.safetensors")
    for name in names:
        if name.endswith(".json"):
            missing = {f"unet/{shard}" for shard in _read_json(folder / name).get("weight_map", {}).values()} - {
                *names
            }
            if missing:
                raise InputError(f"{folder}/{name} names {min(missing)}, which is none of the weight files")
            continue
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder}/{name} is damaged: {error}") from error
    return names


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.parent} is not a model repository: {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; it should be an object")
    return values


def check_account(repo_id: str) -> None:
    """Whether there is a token, and of whom the repository would be; nothing is created.

    Raises:
        InputError: for no token or a wrong one, a name that is not allowed or is another's, no answer.
    """
    _require_token()
    try:
        validate_repo_id(repo_id)
        get_session().timeout = TIMEOUT_SECONDS
        user = HfApi().whoami()
    except (OSError, HTTPError, ValueError) as error:
        raise InputError(f"cannot push to {repo_id}: {_reason(error)}") from error
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, slash, _ = repo_id.rpartition("/")
    if slash and owner not in owners:
        raise InputError(f"cannot push to {repo_id}: the token is that of {', '.join(owners)}, not of {owner}")


def _require_token() -> None:
    if get_token() is None:
        raise InputError("there is no token for the Hub: set HF_TOKEN or log in with `hf auth login`")


def open_repository(repo_id: str, private: bool = False, branch: str | None = None) -> str:
    """Creates the repository on the Hub if there is none, and checks that this user may write to it.

    Args:
        repo_id: with or without the user's name before a slash.

    Returns:
        the whole id, with the user's name.

    Raises:
        InputError: for no token or a wrong one, a name that is not allowed, no permission, no answer.
    """
    _require_token()
    api = HfApi()
    try:
        get_session().timeout = TIMEOUT_SECONDS
        # None leaves an existing repository as it is; it is public where it has to be created
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    except (OSError, HTTPError, ValueError) as error:
        raise InputError(f"cannot open the repository {repo_id} on the Hub: {_reason(error)}") from error
    return repo_id


def push_to_hub(folder: Path, repo_id: str, private: bool = False, branch: str | None = None) -> str:
    """Pushes a model repository in one commit, which also deletes what an earlier push left of other weights.

    The card that goes up names the repository on the Hub in its examples; the local folder is only read. The library
    tries again for about half a minute where the Hub does not answer.

    Returns:
        the address of the commit.

    Raises:
        InputError: if the folder is not fit to be pushed; nothing is asked of the Hub then.
        Failed: if the push fails, with the command to try it again.
    """
    names = model_files(folder)
    render_card(folder)
    try:
        whole_id = open_repository(repo_id, private, branch)
        operations = [CommitOperationAdd("README.md", render_card(folder, whole_id).encode())]
        operations += [CommitOperationAdd(name, folder / name) for name in names if name != "README.md"]
        there = HfApi().list_repo_files(whole_id, revision=branch)
        stale = [name for name in there if name not in names and _is_ours(name)]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        # not `upload_folder`, which may split a push into several commits
        commit = HfApi().create_commit(whole_id, operations, commit_message="Push the model", revision=branch)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        retry = push_command(folder, repo_id, private, branch)
        reason = str(error) if isinstance(error, InputError) else f"the push to {repo_id} failed: {_reason(error)}"
        raise Failed(f"{reason}; {folder} is as it was, push it again with: {retry}") from error
    return commit.commit_url


def push_command(folder: Path, repo_id: str, private: bool = False, branch: str | None = None) -> str:
    """The command line that pushes the folder."""
    words = ["python", "-m", "pipelines.export", "push", "--pipeline", str(folder), "--repo_id", repo_id]
    words += ["--private"] if private else []
    return shlex.join(words + (["--revision", branch] if branch else []))


def _is_ours(name: str) -> bool:
    """Whether a file on the Hub belongs to what a push writes; a LICENSE or a picture added there does not."""
    return name in OPTIONAL or name.startswith(("unet/", "scheduler/"))


def _reason(error: Exception) -> str:
    """One line that says why a request failed, with what to do where that is known, and without the token."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "error while uploading FILE"
        error = error.__cause__
    text = one_line(error) or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        text += "; take a token that may write there, in HF_TOKEN or by `hf auth login`"
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return text[:500]
