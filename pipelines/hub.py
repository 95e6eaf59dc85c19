"""Pushes a model repository to the Hub: only its own files, in one commit.

The token comes from the environment (HF_TOKEN) or from `hf auth login`, and is never printed.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError  # from the HTTP library in use, which differs between releases
from huggingface_hub.utils import get_session, validate_repo_id

from common import Failed, InputError, one_line
from pipelines.card_edits import FILES, keep_edits, recorded
from pipelines.model_card import read_card, read_mapping, render_card

TIMEOUT_SECONDS = 60  # per connect, read or write; the library's default is to wait forever
OPTIONAL = ("README.md", "training.json", "training_config.yaml", "samples.png", "results.json")
WEIGHTS = re.compile(r"unet/diffusion_pytorch_model[\w.-]*\.safetensors(\.index(\.\w+)?\.json)?")


def model_files(folder: Path) -> list[str]:
    """The files of a model repository, relative to its folder; others in the folder, such as pickles, are left out.

    Raises:
        InputError: if a file is missing or broken, or if a name or a link points outside the folder.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is not a model repository: it lacks model_index.json")
    index = read_mapping(folder / "model_index.json")
    names = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    for component in ("_class_name", "unet", "scheduler"):
        pair = index.get(component)
        if not (isinstance(pair, list) and len(pair) == 2 and all(str(part).isidentifier() for part in pair)):
            raise InputError(f"{folder}/model_index.json: {component} is {pair!r:.80}, not a module and a class name")
        if pair[0] != "diffusers":
            names.append(f"{pair[0]}.py" if component == "_class_name" else f"{component}/{pair[0]}.py")
    in_unet = [path.relative_to(folder).as_posix() for path in sorted((folder / "unet").glob("*"))]
    weights = [name for name in in_unet if WEIGHTS.fullmatch(name)] or ["unet/diffusion_pytorch_model.safetensors"]
    for name in [name for name in weights if name.endswith(".json")]:
        shards = read_mapping(folder / name).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{folder}/{name} lists no weight files; export the model again")
        weights += [f"unet/{shard}" for shard in shards.values()]
    names += [*weights, *(name for name in OPTIONAL if (folder / name).is_file())]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model repository: it lacks {name}")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder}/{name} resolves to a path outside the folder; put the file itself there")
    return sorted({"README.md", *names})


@contextmanager
def _asking_the_hub(repo_id: str) -> Iterator[HfApi]:
    """Turns errors into InputError: missing or invalid token, bad name, no permission, no answer."""
    if get_token() is None:
        raise InputError("there is no token for the Hub: set HF_TOKEN or log in with `hf auth login`")
    get_session().timeout = TIMEOUT_SECONDS
    try:
        yield HfApi()
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot push to {repo_id}: {_reason(error)}") from error


def check_account(repo_id: str) -> None:
    """Checks that there is a token with write access whose user may own the repository; creates nothing.

    Raises:
        InputError: for a missing, invalid or read-only token, a name that is not allowed or belongs to another user,
            an existing repository that the token may not write to, or no answer.
    """
    with _asking_the_hub(repo_id) as api:
        validate_repo_id(repo_id)
        user = api.whoami()
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        owner, slash, _ = repo_id.rpartition("/")
        if slash and owner not in owners:
            raise ValueError(f"the token belongs to {', '.join(owners)}, not to {owner}")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token is read-only; use one with write access")
        whole_id = repo_id if slash else f"{user['name']}/{repo_id}"
        if api.repo_exists(whole_id):
            api.auth_check(whole_id, write=True)


def push_to_hub(folder: Path, repo_id: str, private: bool = False) -> str:
    """Pushes a model repository in one commit, which also deletes files that only earlier pushes wrote.

    A repository that does not exist is created.

    The examples in the pushed card use the repository's id on the Hub; manual edits of the local card and of the card
    on the Hub are kept. The local folder is only read. If the Hub does not answer, the library retries for about half
    a minute.

    Returns:
        the URL of the commit.

    Raises:
        InputError: if the folder is not valid, before the Hub is contacted.
        Failed: if the push fails, with the command to retry it.
    """
    names = model_files(folder)
    render_card(folder)
    try:
        with _asking_the_hub(repo_id) as api, TemporaryDirectory() as temporary:
            # None keeps the visibility of an existing repository; a new one is public
            whole_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
            there = api.model_info(whole_id)
            on_hub = {file.rfilename for file in there.siblings}
            if "README.md" in on_hub:
                api.hf_hub_download(whole_id, "README.md", revision=there.sha, local_dir=temporary)
            old_card = read_card(Path(temporary))
        card = keep_edits(render_card(folder, whole_id, read_card(folder)), old_card, is_on_hub=True)
        card = f"{card}\n{FILES.format(' '.join(names))}\n"
        stale = on_hub & {*(recorded(FILES, old_card) or [])} - {*names}
        operations = [CommitOperationAdd("README.md", card.encode(errors="surrogateescape"))]
        operations += [CommitOperationAdd(name, folder / name) for name in names if name != "README.md"]
        operations += [CommitOperationDelete(name, is_folder=False) for name in sorted(stale)]
        about = {"commit_message": "Push the model", "parent_commit": there.sha}
        with _asking_the_hub(repo_id) as api:  # not `upload_folder`, which may split a push into several commits
            return api.create_commit(whole_id, operations, **about).commit_url
    except InputError as error:
        words = ["python", "-m", "pipelines.export", "push", "--pipeline", str(folder), "--repo_id", repo_id]
        words += ["--private"] * private
        raise Failed(f"{error}; {folder} is unchanged; push it again with: {shlex.join(words)}") from error


def _reason(error: Exception) -> str:
    """One line that says why a request failed and, if known, what to do; never shows the token."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "error while uploading FILE"
        error = error.__cause__
    text = one_line(error) or type(error).__name__
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        text += "; use a token with write access there, through HF_TOKEN or `hf auth login`"
    return text.replace(get_token(), "***")[:500]
