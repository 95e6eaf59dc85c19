"""Finds and loads a model repository, which may be damaged or untrusted."""

import json
import logging
from pathlib import Path

import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import safe_open

from common import InputError, one_line
from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import check_fractional_timesteps, noise_levels
from training.sde import PREDICTION_TYPES, SDEScheduler

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS, WEIGHTS_INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARDS = "diffusion_pytorch_model-?????-of-?????.safetensors"
# Files to download from the Hub: no code and no pickles
NEEDED_FILES = [
    *(f"{folder}{name}" for folder in ("unet/", "") for name in ("config.json", WEIGHTS, WEIGHTS_INDEX, SHARDS)),
    *("scheduler/*.json", "scheduler_config.json", "training.json"),
]
FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors names them
LARGEST_SIDE = 8192
MOST_TIMESTEPS = 1_000_000
SDE_NUMBERS = "beta_min beta_max sigma_min sigma_max sigma_data noise_mean noise_std".split()
LARGEST_SDE_NUMBER = 1_000_000
NUM_TIMES_CHECKED = 1001


def find_pipeline(name: str, revision: str | None, flag: str = "--pipeline") -> tuple[Path, str | None]:
    """The folder of a model repository, downloaded from the Hub if it is not local, and its commit there.

    Args:
        flag: flag that gave the name, for error messages.

    Raises:
        InputError: if there is no such repository.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} is for the Hub, but {flag} {name} is a folder; leave it out")
        return Path(name), None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED_FILES))
    except HFValidationError as error:
        raise InputError(f"{flag} {name} is neither a folder nor the id of a Hub repository") from error
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{flag} {name} is not a local folder and could not be downloaded from the Hub: {one_line(error)}"
        ) from error
    return folder, folder.name


def part_folder(source: Path, name: str) -> Path:
    """The folder of the `unet` or the `scheduler`: the repository itself if it is flat, like google/ddpm-*."""
    return source / name if (source / name).is_dir() else source


def weight_files(source: Path) -> list[Path]:
    """The weights files of the network.

    Raises:
        InputError: if there are none.
    """
    unet = part_folder(source, "unet")
    files = sorted(unet.glob(SHARDS)) if (unet / WEIGHTS_INDEX).exists() else [unet / WEIGHTS]
    if not files or not all(path.is_file() for path in files):
        raise InputError(f"{source} is not a model repository: it lacks unet/{WEIGHTS}")
    return files


def load_pipeline(
    source: Path,
    dtype: str,
    sampler: str | None,
    network_class: type[ModelMixin] = CustomUNet2DModel,
    **settings: float,
) -> CustomUNetPipeline:
    """Loads a model repository without running its code, in channels-last format, with the progress bar disabled.

    Args:
        sampler: name of the sampler to set; None for the repository's own.
        network_class: class of the network to load the weights into.
        settings: settings of a continuous-time sampler.

    Raises:
        InputError: if the repository is damaged, or the sampler or a setting does not suit it.
    """
    pipeline = load_folder(source, weight_files(source), DTYPES[dtype], network_class)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    if sampler is None and settings:
        if pipeline.continuous_sampler is None:
            raise InputError(f"--{min(settings)} is for a sampler in continuous time; name one with --scheduler")
        sampler = pipeline.continuous_sampler.name
    if sampler is not None:
        try:
            pipeline.set_sampler(sampler, **settings)
        except ValueError as error:
            raise InputError(str(error)) from error
    return pipeline


def load_folder(
    folder: Path, weight_files: list[Path], dtype: torch.dtype, network_class: type[ModelMixin]
) -> CustomUNetPipeline:
    """Loads a model repository without running its code, and checks what diffusers does not.

    diffusers only warns about missing and unexpected weights, and accepts numbers of any type.

    Args:
        weight_files: weights files of the network.

    Raises:
        InputError: if a file is missing or damaged, the weights do not match the network, or a number in a
            configuration is invalid.
    """
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings are errors here
    try:
        source = part_folder(folder, "unet")
        _read_object(source / "config.json")  # diffusers would take a plain string for an id on the Hub
        _check_scheduler_config(_read_object(part_folder(folder, "scheduler") / "scheduler_config.json"))
        unet = network_class.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
        pipeline = CustomUNetPipeline.from_pretrained(folder, unet=unet)
        _check_weights(pipeline, weight_files)
        _check_numbers(pipeline)
    except InputError as error:
        raise InputError(f"{folder} could not be loaded: {error}") from error
    except Exception as error:  # with damaged files, the libraries raise almost anything
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{folder} could not be loaded: {reason}") from error
    finally:
        logger.setLevel(level)
    return pipeline


def _read_object(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path.name} holds a {type(values).__name__}; it should be an object")
    return values


def _check_scheduler_config(config: dict) -> None:
    """Checks a configuration before a scheduler allocates tables of its length or takes text for a number."""
    if config.get("_class_name") != SDEScheduler.__name__:
        number = config.get("num_train_timesteps", 1000)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_TIMESTEPS:
            raise InputError(f"num_train_timesteps of its scheduler is {number!r}; it must be 1 to {MOST_TIMESTEPS}")
        return
    objective = config.get("objective", "vp")
    if not isinstance(objective, str) or objective not in PREDICTION_TYPES:
        raise InputError(f"objective of its SDE is {objective!r:.80}; it must be one of {', '.join(PREDICTION_TYPES)}")
    for name in [name for name in SDE_NUMBERS if name in config]:
        number = config[name]
        if number is None and name in ("sigma_min", "sigma_max"):
            continue
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not -LARGEST_SDE_NUMBER <= number <= LARGEST_SDE_NUMBER:
            raise InputError(
                f"{name} of its SDE is {number!r:.80}; it must be a number of at most {LARGEST_SDE_NUMBER:,} in size"
            )


def _check_weights(pipeline: CustomUNetPipeline, weight_files: list[Path]) -> None:
    network = pipeline.unet.state_dict()
    stored = {}
    for path in weight_files:
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dictionary)
    missing = [name for name, tensor in network.items() if tensor.is_meta]
    # names alone are not enough, because diffusers translates those of its old releases
    unknown = sorted(stored.keys() - network.keys()) if len(stored) > len(network) else []
    for count, name, verb in ((len(missing), missing[:1], "lack"), (len(unknown), unknown[:1], "have")):
        if count:
            what = "of the network's tensors" if verb == "lack" else "tensors that the network does not have"
            raise InputError(f"its weights {verb} {count} {what}, {name[0]} for one; they are not of unet/config.json")
    wrong = [f"{name} is {dtype}" for name, dtype in stored.items() if dtype not in FLOATS]
    if wrong:
        raise InputError(f"{len(wrong)} of its tensors are not of floating-point numbers ({wrong[0]})")


def _check_numbers(pipeline: CustomUNetPipeline) -> None:
    size, scheduler = pipeline.unet.config.sample_size, pipeline.scheduler
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides):
        raise InputError(f"sample_size of its network is {size!r}; it must be 1 to {LARGEST_SIDE} pixels")
    if isinstance(scheduler, SDEScheduler):
        check_fractional_timesteps(pipeline.unet)
        return _check_noise_levels(scheduler)
    levels = scheduler.alphas_cumprod  # signal variance in x_t, for DDPM: above 0 except at zero terminal SNR
    steps = scheduler.config.num_train_timesteps
    if tuple(levels.shape) != (steps,) or not (torch.isfinite(levels) & (levels >= 0) & (levels < 1)).all():
        raise InputError(f"the noise schedule of its scheduler is not {steps} numbers from below 1 to 0 or more")
    bound = scheduler.config.get("clip_sample_range", 1.0)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e6:
        raise InputError(f"clip_sample_range of its scheduler is {bound!r}; it must be a positive number")


def _check_noise_levels(scheduler: SDEScheduler) -> None:
    """Checks that the noise levels increase, and that the network's inputs and coefficients are finite."""
    sde = scheduler.sde
    times = torch.linspace(sde.first_time, sde.last_time, NUM_TIMES_CHECKED, dtype=torch.float64)
    sigmas = sde.sigma(times)
    if not (torch.isfinite(sigmas) & (sigmas > 0)).all() or not (sigmas.diff() > 0).all():
        raise InputError("the noise levels of its SDE are not positive and increasing")
    values = (*scheduler.preconditioning(times), sde.drift(times), sde.diffusion(times))
    if not all(torch.isfinite(value.float()).all() for value in values):
        raise InputError("the numbers of its SDE are too large or too small for this network")


def check_schedule(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raises InputError if the scheduler cannot make a schedule of `num_inference_steps` steps."""
    try:
        scheduler.set_timesteps(num_inference_steps)
        noise_levels(scheduler, scheduler.timesteps.tolist())
    except Exception as error:  # with settings of the wrong type, numpy and torch raise almost anything
        reason = one_line(error) or type(error).__name__
        raise InputError(f"the scheduler cannot make a schedule of {num_inference_steps} steps: {reason}") from error
