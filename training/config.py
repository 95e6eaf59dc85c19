"""The configuration of a training run: one flat dataclass, read from a YAML file and command-line flags.

A flag that also exists in diffusers' `train_unconditional.py` has the same name and meaning; an option of the network
has the name and the default of `UNet2DModel`. A flag given on the command line overrides the file.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from custom_unet import CustomUNet2DModel

DEFAULT_CONFIG_PATH = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


class ConfigError(ValueError):
    """A configuration that cannot work. The message is one line: what is wrong, the value seen, what to do."""


def option(default, help, **kwargs):
    """A dataclass field with the help text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainConfig:
    """Every setting of a run. Times and counts carry their unit in the name; steps are optimizer updates.

    Raises:
        ConfigError: if a value is out of range or two values do not go together.
    """

    # Data
    dataset_name: str | None = option(None, "Hub id of an image data set, or `synthetic-faces` (embedded)")
    dataset_config_name: str | None = option(None, "configuration of the Hub data set")
    dataset_revision: str | None = option(None, "commit, tag or branch of the Hub data set")
    train_data_dir: str | None = option(None, "folder of images, of parquet, or written by `save_to_disk`")
    split: str = option("train", "split to train on")
    validation_split: str | None = option(None, "split for the held-out loss; none is computed without it")
    validation_images: int = option(512, "images of the validation split in the held-out loss")
    image_column: str = option("image", "column that holds the images")
    crop: Literal["celeba_140", "celeba_128", "center", "none"] = option("center", "crop by name, before resizing")
    resolution: int = option(64, "side length of the training images, in pixels")
    random_flip: bool = option(False, "flip images horizontally with probability 1/2")
    max_images: int | None = option(None, "use the first images of the split only")
    skip_bad_images: bool = option(False, "leave out unreadable images and count them, instead of an error")
    streaming: bool = option(False, "read a Hub data set as a stream; only the decoded images are kept")
    cache_dir: str | None = option(None, "where the decoded images are kept")
    dataloader_num_workers: int = option(0, "processes that read batches; 0 reads them in the training process")

    # Network: the constructor arguments of UNet2DModel; sample_size is the resolution, in and out channels are RGB
    down_block_types: list[str] = option(["DownBlock2D", *["AttnDownBlock2D"] * 3], "contracting path, top to bottom")
    mid_block_type: str | None = option("UNetMidBlock2D", "the bottleneck")
    up_block_types: list[str] = option([*["AttnUpBlock2D"] * 3, "UpBlock2D"], "expanding path, bottom to top")
    block_out_channels: list[int] = option([224, 448, 672, 896], "channels of each level")
    layers_per_block: int = option(2, "residual blocks of each level")
    mid_block_scale_factor: float = option(1.0, "divisor of the bottleneck's residual sums")
    downsample_padding: int = option(1, "padding of the downsampling convolution")
    downsample_type: str = option("conv", "conv or resnet")
    upsample_type: str = option("conv", "conv or resnet")
    dropout: float = option(0.0, "dropout in the residual blocks")
    act_fn: str = option("silu", "activation")
    attention_head_dim: int | None = option(8, "width of an attention head; null in YAML: one head")
    norm_num_groups: int = option(32, "groups of the group norms")
    attn_norm_num_groups: int | None = option(None, "groups of the group norm in the bottleneck's attention")
    norm_eps: float = option(1e-5, "epsilon of the group norms")
    resnet_time_scale_shift: str = option("default", "default adds the time embedding, scale_shift modulates with it")
    add_attention: bool = option(True, "attention in the bottleneck")
    center_input_sample: bool = option(False, "map the input x to 2x - 1")
    time_embedding_type: str = option("positional", "positional, fourier or learned")
    time_embedding_dim: int | None = option(None, "width of the time embedding; 4 times the first level's by default")
    freq_shift: int = option(0, "frequency shift of the positional time embedding")
    flip_sin_to_cos: bool = option(True, "cosines before sines in the positional time embedding")

    # Diffusion
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "what the network predicts")
    ddpm_num_steps: int = option(1000, "timesteps T of the forward process")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option("linear", "noise schedule")
    beta_start: float = option(1e-4, "first beta of the linear schedules")
    beta_end: float = option(0.02, "last beta of the linear schedules")
    rescale_betas_zero_snr: bool = option(False, "rescale the betas so that the last timestep is pure noise")
    snr_gamma: float | None = option(None, "gamma of the min-SNR loss weighting; the plain loss without it")
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "uniform", "timesteps of a batch: independent, one from each of B equal strata, or in pairs t and T - 1 - t"
    )

    # Optimisation
    train_batch_size: int = option(16, "images per process and micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer update")
    learning_rate: float = option(1e-4, "peak learning rate")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("cosine", "schedule")
    lr_warmup_steps: int = option(500, "updates of linear warm-up")
    adam_beta1: float = option(0.95, "beta1 of AdamW")
    adam_beta2: float = option(0.999, "beta2 of AdamW")
    adam_weight_decay: float = option(1e-6, "decoupled weight decay of AdamW")
    adam_epsilon: float = option(1e-8, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "largest norm of the gradient, over all parameters")
    ema_inv_gamma: float = option(1.0, "warm-up length of the EMA: decay = 1 - (1 + step / inv_gamma) ** -power")
    ema_power: float = option(0.75, "warm-up exponent of the EMA")
    ema_max_decay: float = option(0.9999, "largest decay of the EMA")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "autocast type of the network")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "channels-last memory format")
    num_cpu_threads: int | None = option(None, "threads per process on a CPU; its share of the cores by default")
    max_nonfinite_steps: int = option(20, "stop after so many NaN or infinite gradients in a row")
    seed: int = option(0, "everything random derives from (seed, step, rank)")

    # Length
    max_train_steps: int | None = option(None, "optimizer updates in all; overrides num_epochs")
    num_epochs: float | None = option(None, "passes over the data in all")
    max_train_minutes: float | None = option(None, "time budget of this start: then checkpoint, export and exit 0")

    # Output
    output_dir: str = option("runs/unet", "checkpoints, samples, logs and the pipeline folder")
    overwrite_output_dir: bool = option(False, "delete the checkpoints and logs of an earlier run in output_dir")
    resume_from_checkpoint: str = option("latest", "latest (a fresh run where there is none) or a checkpoint's path")
    checkpointing_steps: int = option(500, "updates between checkpoints; each also exports the pipeline folder")
    checkpoints_total_limit: int | None = option(2, "newest checkpoints kept; null in YAML keeps all")
    validation_steps: int = option(500, "updates between held-out losses")
    save_images_steps: int = option(500, "updates between sample grids")
    eval_batch_size: int = option(16, "images in a sample grid")
    ddpm_num_inference_steps: int = option(50, "sampling steps for a sample grid")
    sampler: Literal["ddim", "ddpm"] = option("ddim", "sampler of the grids and of the exported pipeline")
    logging_steps: int = option(10, "updates between log records")
    logging_dir: str = option("logs", "folder of the trackers, inside output_dir")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option("tensorboard", "trackers besides log.jsonl")
    dry_run: bool = option(False, "pre-flight and one update, then stop without writing a checkpoint")
    push_to_hub: bool = option(False, "push the pipeline folder to the Hub when the run ends in good order")
    hub_model_id: str | None = option(None, "repository on the Hub; by default the last part of output_dir")
    hub_private_repo: bool = option(False, "create the repository on the Hub as a private one")

    def __post_init__(self):
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} is {value}; it must be positive")
        for name in NON_NEGATIVE:
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must not be negative")
        for name in BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ConfigError("give either --dataset_name or --train_data_dir, exactly one of them")
        if not self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"--beta_start {self.beta_start} and --beta_end {self.beta_end} must rise and stay below 1"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                "--rescale_betas_zero_snr does not go with --prediction_type epsilon: at zero SNR the noise tells"
                " nothing of the image; use v_prediction or sample"
            )
        if self.max_train_steps is None and self.num_epochs is None and self.max_train_minutes is None:
            raise ConfigError("the run has no length: give --max_train_steps, --num_epochs or --max_train_minutes")
        if self.lr_scheduler in ("linear", "cosine") and self.max_train_steps is None and self.num_epochs is None:
            raise ConfigError(
                f"--lr_scheduler {self.lr_scheduler} ends at the last step: give --max_train_steps or --num_epochs, or"
                " take constant_with_warmup"
            )
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ConfigError(
                f"--ddpm_num_inference_steps {self.ddpm_num_inference_steps} is more than the {self.ddpm_num_steps}"
                " timesteps of --ddpm_num_steps"
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ConfigError(f"--hub_model_id is {self.hub_model_id}, but nothing is pushed without --push_to_hub")

    def unet_kwargs(self) -> dict:
        """The constructor arguments of `CustomUNet2DModel` for this run."""
        kwargs = {name: getattr(self, name) for name in UNET_OPTIONS}
        kwargs |= {name: tuple(value) for name, value in kwargs.items() if isinstance(value, list)}
        kwargs["sample_size"] = self.resolution
        if self.time_embedding_type == "learned":
            kwargs["num_train_timesteps"] = self.ddpm_num_steps
        return kwargs

    def data_source(self) -> dict:
        """The arguments of `open_image_store` that all splits of this run have in common."""
        names = (
            "dataset_name dataset_config_name dataset_revision train_data_dir image_column crop resolution streaming"
            " skip_bad_images cache_dir"
        ).split()
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        """The resolved configuration; as a file, `--config` reads it back unchanged."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, default_flow_style=None, width=119)

    def to_public_yaml(self) -> str:
        """`to_yaml` for the model repository: it tells nothing of this machine, and who reads it back pushes nothing.

        Of each path the last part is left, so the folder of the images has to be given anew.
        """
        private = {"cache_dir": None, "resume_from_checkpoint": "latest", "push_to_hub": False, "hub_model_id": None}
        for name in ("train_data_dir", "output_dir", "logging_dir"):
            path = getattr(self, name)
            private[name] = path and Path(path).resolve().name
        return dataclasses.replace(self, **private).to_yaml()

    @property
    def hub_repo_id(self) -> str:
        """The repository on the Hub; without a namespace it is the user's own."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


TYPES = typing.get_type_hints(TrainConfig)
UNET_OPTIONS = [name for name in inspect.signature(CustomUNet2DModel.__init__).parameters if name in TYPES]
POSITIVE = (
    "resolution ddpm_num_steps beta_start beta_end snr_gamma train_batch_size gradient_accumulation_steps"
    " learning_rate adam_epsilon max_grad_norm ema_inv_gamma ema_power max_nonfinite_steps max_train_steps num_epochs"
    " max_train_minutes checkpointing_steps checkpoints_total_limit validation_steps validation_images"
    " save_images_steps eval_batch_size ddpm_num_inference_steps logging_steps max_images num_cpu_threads"
).split()
NON_NEGATIVE = "dataloader_num_workers lr_warmup_steps adam_weight_decay seed".split()
BELOW_ONE = "dropout adam_beta1 adam_beta2 ema_max_decay".split()


class _Parser(HfArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message):
        raise ConfigError(message)


def parse_config(arguments: list[str], report=print) -> TrainConfig:
    """Reads `[--config FILE.yaml] [--flag value ...]`; without `--config`, `configs/quickstart.yaml`.

    `null` stands for no value, in the file and after a flag.

    Each entry of the file is turned into the flag of the same name, so that file and command line are read and checked
    by the same rules; flags of the command line come later and win.

    Raises:
        ConfigError: for an unreadable file, an unknown key or flag (naming the nearest known one) or a bad value.
    """
    parser = _Parser(TrainConfig, allow_abbrev=False, description="Trains an unconditional diffusion model of images.")
    parser.add_argument("--config", type=Path, help="YAML file whose keys are the flags below")
    given, (arguments, flag_nulls) = arguments, _take_nulls(arguments)
    path = parser.parse_known_args(arguments)[0].config
    if path is None:
        path = DEFAULT_CONFIG_PATH
        report(f"no --config given: taking configs/{path.name}")
    tokens, file_nulls = _yaml_tokens(path, without=flag_nulls)
    parser.set_defaults(**file_nulls, **flag_nulls)
    config, _, unknown = parser.parse_args_into_dataclasses(
        [*tokens, *arguments], return_remaining_strings=True, look_for_args_file=False
    )
    for token in unknown:  # a value may be a secret, so none is printed
        if not token.startswith("--"):
            raise ConfigError(f"argument {given.index(token) + 1} belongs to no flag; write --name value")
        name = token.removeprefix("--").split("=")[0]
        raise ConfigError(f"unknown flag --{name}{_nearest(name, '--')}")
    return config


def _take_nulls(arguments: list[str]) -> tuple[list[str], dict[str, None]]:
    """The arguments without each `--key null`, and those keys: argparse knows no type for it."""
    rest, nulls = [], {}
    for argument in arguments:
        key = rest[-1].removeprefix("--").replace("-", "_") if rest else ""
        if argument == "null" and key in TYPES and _is_optional(TYPES[key]):
            nulls[key] = None
            rest.pop()
        else:
            rest.append(argument)
    return rest, nulls


def _yaml_tokens(path: Path, without: dict) -> tuple[list[str], dict[str, None]]:
    """The YAML file as command-line tokens, and the keys that it sets to null; keys in `without` are left out."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:  # its text quotes the line, which may hold a secret
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"cannot read the configuration {path}: line {line}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} is not a mapping of keys to values")
    tokens, nulls = [], {}
    for key, value in values.items():
        if key not in TYPES:
            raise ConfigError(f"unknown key {key!r} in {path}{_nearest(str(key))}")
        if key in without:
            continue
        if value is None:
            if not _is_optional(TYPES[key]):
                raise ConfigError(f"{key} is null in {path}; it needs a value")
            nulls[key] = None
        elif isinstance(value, dict) or isinstance(value, list) != (typing.get_origin(TYPES[key]) is list):
            raise ConfigError(f"{key} in {path} is {value!r}; it should be {_type_name(TYPES[key])}")
        else:
            # "=" keeps a value that begins with a dash from being read as a flag
            tokens += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return tokens, nulls


def _is_optional(annotation) -> bool:
    return isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)


def _type_name(annotation) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _nearest(name: str, prefix: str = "") -> str:
    if "token" in name.lower():
        return "; the Hub's token is read from HF_TOKEN or from `hf auth login`"
    matches = difflib.get_close_matches(name.replace("-", "_"), [*TYPES, "config"], n=1, cutoff=0.4)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
