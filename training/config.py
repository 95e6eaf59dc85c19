"""The configuration of a training run: one flat dataclass, read from a YAML file and command-line flags.

A flag that also exists in diffusers' `train_unconditional.py` has the same name and meaning; an option of the network
has the name and the default of `UNet2DModel`. A flag given on the command line overrides the file.
"""

import dataclasses
import inspect
import math
import os
import typing
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Literal

import yaml
from diffusers import DDPMScheduler

from common import MOST_THREADS, InputError, one_line
from custom_unet import CustomUNet2DModel
from training.diffusion import make_noise_scheduler
from training.images import CROPS, compact, height_and_width
from training.sde import SDEScheduler

OWN_PREDICTION = {"ve": "score", "edm": "edm", "flow": "flow_prediction"}  # the others use --prediction_type
PATHS = "train_data_dir cache_dir pretrained_model_name_or_path inception_path".split()
PATHS += ["output_dir", "resume_from_checkpoint"]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
BOUNDS = {"min": (ge, "at least"), "max": (le, "at most"), "above": (gt, "above"), "below": (lt, "below")}


def option(default, help: str, **limits):
    """A field of `TrainConfig`.

    Args:
        help: text for `--help`.
        limits: `min` and `max` (inclusive), `above` and `below` (exclusive); `only`: the objectives that use the
            option; `needs`: another option that it requires.
    """
    metadata = {"help": help, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """All settings of a run. Names of times and counts include the unit; steps are optimizer updates.

    Raises:
        InputError: if a value is out of range or two values are incompatible.
    """

    # Data
    dataset_name: str | None = option(None, "Hub id of an image data set, or `synthetic-faces` (embedded)")
    dataset_config_name: str | None = option(None, "configuration of the Hub data set")
    dataset_revision: str | None = option(None, "commit, tag or branch of the Hub data set")
    train_data_dir: str | None = option(None, "folder of images or parquet files, or one written by `save_to_disk`")
    split: str = option("train", "split to train on")
    validation_split: str | None = option(None, "split for the held-out loss; without one, there is none")
    validation_images: int = option(512, "number of images for the held-out loss", min=1, max=100_000)
    image_column: str = option("image", "column that holds the images")
    label_column: str | None = option(None, "column of class labels, which makes the network class-conditional")
    label_dropout: float = option(0.1, "fraction of labels dropped for guidance", min=0, below=1, needs="label_column")
    crop: Literal[CROPS] = option("center", "crop applied before resizing")
    resolution: list[int] = option([64], "side length of the images in pixels, or height and width", min=1, max=8192)
    random_flip: bool = option(False, "flip images horizontally with probability 1/2")
    max_images: int | None = option(None, "use only the first images of the split", min=1)
    preserve_input_precision: bool = option(False, "keep the 16 bits per pixel of 16-bit grey images")
    skip_bad_images: bool = option(False, "skip and count unreadable images instead of failing")
    streaming: bool = option(False, "read a Hub data set as a stream; only the decoded images are kept")
    cache_dir: str | None = option(None, "folder for the decoded images")
    dataloader_num_workers: int = option(0, "worker processes of the data loader", min=0, max=256)

    # Network: the constructor arguments of UNet2DModel; sample_size is the resolution, out_channels are in_channels
    in_channels: Literal[1, 2, 3, 4] | None = option(None, "1 grey, 3 RGB, 2 or 4 with alpha; null: 1 or 3")
    pretrained_model_name_or_path: str | None = option(None, "model folder or Hub id whose weights start a new run")
    down_block_types: list[str] = option(["DownBlock2D", *["AttnDownBlock2D"] * 3], "contracting path, top to bottom")
    mid_block_type: str | None = option("UNetMidBlock2D", "the bottleneck")
    up_block_types: list[str] = option([*["AttnUpBlock2D"] * 3, "UpBlock2D"], "expanding path, bottom to top")
    block_out_channels: list[int] = option([224, 448, 672, 896], "channels of each level", max=2**16)
    layers_per_block: int = option(2, "residual blocks per level", max=100)
    mid_block_scale_factor: float = option(1.0, "divisor of the bottleneck's residual sums")
    downsample_padding: int = option(1, "padding of the downsampling convolution")
    downsample_type: str = option("conv", "conv or resnet")
    upsample_type: str = option("conv", "conv or resnet")
    dropout: float = option(0.0, "dropout in the residual blocks", min=0, below=1)
    act_fn: str = option("silu", "activation")
    attention_head_dim: int | None = option(8, "channels per attention head; null for a single head")
    norm_num_groups: int = option(32, "groups of the group norms")
    attn_norm_num_groups: int | None = option(None, "groups of the group norm in the bottleneck's attention")
    norm_eps: float = option(1e-5, "epsilon of the group norms")
    resnet_time_scale_shift: str = option("default", "default adds the time embedding, scale_shift modulates with it")
    add_attention: bool = option(True, "attention in the bottleneck")
    center_input_sample: bool = option(False, "map the input x to 2x - 1")
    time_embedding_type: str = option("positional", "positional, fourier or learned")
    time_embedding_dim: int | None = option(None, "width of the embedding; null: 4 x the first level", max=2**16)
    freq_shift: int = option(0, "frequency shift of the positional time embedding")
    flip_sin_to_cos: bool = option(True, "cosines before sines in the positional time embedding")

    # Diffusion: in discrete timesteps (ddpm), or in continuous time with an SDE
    objective: Literal["ddpm", "vp", "subvp", "ve", "edm", "flow"] = option(
        "ddpm", "noise process and loss: DDPM, VP, sub-VP or VE SDE, EDM, or rectified flow"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option(
        "v_prediction",
        "what the network predicts; v is best in short runs; fixed for ve (score), edm (mixture), flow (velocity)",
        only="ddpm vp subvp",
    )
    ddpm_num_steps: int = option(1000, "timesteps T of the forward process", min=1, max=100_000, only="ddpm")
    ddpm_beta_schedule: Literal[BETA_SCHEDULES] = option("linear", "noise schedule", only="ddpm")
    beta_start: float = option(1e-4, "first beta of the linear schedules", above=0, below=1, only="ddpm")
    beta_end: float = option(0.02, "last beta of the linear schedules", above=0, below=1, only="ddpm")
    rescale_betas_zero_snr: bool = option(False, "rescale betas so that the last timestep is pure noise", only="ddpm")
    snr_gamma: float | None = option(None, "gamma of the min-SNR loss weighting", above=0, only="ddpm")
    snr_weighting: Literal["min", "soft_min"] = option(
        "min", "weight of the x_0 error: min(SNR, gamma) or SNR gamma / (SNR + gamma)", only="ddpm", needs="snr_gamma"
    )
    likelihood_weighting: bool = option(False, "weight the loss by g^2, not n^2", only="vp subvp ve")
    sde_beta_min: float = option(0.1, "beta at time 0", above=0, only="vp subvp")
    # exp(-(beta_min + beta_max) / 4), at most 0.05 of the image, remains at time 1
    sde_beta_max: float = option(20.0, "beta at time 1", min=12, max=100, only="vp subvp")
    # from nearly clean images to nearly pure noise: at sigma_max, the divergence from the prior is at most
    # (rms / sigma_max)^2 / 2 per dimension, where rms, the root mean square of the pixels in [-1, 1], is about 0.5
    sigma_min: float | None = option(
        None, "lowest noise level; null: 0.02 for ve, 0.002 for edm", min=1e-5, max=0.05, only="ve edm"
    )
    sigma_max: float | None = option(
        None, "highest noise level; null: 100 for ve, 80 for edm", min=10, max=1e6, only="ve edm"
    )
    sigma_data: float = option(0.5, "standard deviation of pixels in [-1, 1]", min=1e-3, max=1e3, only="edm")
    noise_mean: float = option(-1.2, "mean of ln(sigma) in training", only="edm")
    noise_std: float = option(1.2, "standard deviation of ln(sigma) in training", above=0, max=100, only="edm")
    time_density: Literal["uniform", "logit_normal"] = option("uniform", "density of training times", only="flow")
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "uniform", "times of a batch: independent, one from each of B equal strata, or in pairs t and T - 1 - t"
    )

    # Optimisation
    train_batch_size: int = option(16, "images per process and micro-batch", min=1, max=2**20)
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer update", min=1)
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW, or Muon for the weight matrices of hidden layers and AdamW for the rest"
    )
    learning_rate: float = option(1e-4, "peak learning rate", above=0, max=100)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("cosine", "schedule")
    lr_warmup_steps: int = option(500, "updates of linear warm-up", min=0)
    adam_beta1: float = option(0.95, "beta1 of AdamW", min=0, below=1)
    adam_beta2: float = option(0.999, "beta2 of AdamW", min=0, below=1)
    adam_weight_decay: float = option(1e-6, "decoupled weight decay of AdamW", min=0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0, max=1)
    max_grad_norm: float = option(1.0, "maximum global gradient norm, for clipping", above=0)
    ema_inv_gamma: float = option(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma) ** -power", above=0)
    ema_power: float = option(0.75, "EMA warm-up exponent", above=0)
    ema_max_decay: float = option(0.9999, "maximum EMA decay", min=0, below=1)
    post_hoc_ema: bool = option(False, "keep two more weight averages, to choose the EMA length later")
    post_hoc_ema_steps: int = option(1000, "updates between snapshots of these averages (float16, all kept)", min=1)
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = option(
        "no",
        "autocast type; auto times float32 and bf16 (fp16 on GPUs without bf16) at the start and uses the faster one",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "channels-last memory format")
    num_cpu_threads: int | None = option(None, "threads per process on a CPU", min=1, max=MOST_THREADS)
    max_nonfinite_steps: int = option(20, "stop after this many NaN or infinite gradients in a row", min=1)
    seed: int = option(0, "seed; all randomness derives from (seed, attempted update, rank)", min=0, max=2**63 - 1)

    # Length
    max_train_steps: int | None = option(None, "total optimizer updates; overrides num_epochs", min=1)
    num_epochs: float | None = option(None, "total passes over the data", above=0)
    max_train_minutes: float | None = option(None, "time budget of this launch, then checkpoint and export", above=0)

    # Output
    output_dir: str = option("runs/unet", "folder for checkpoints, samples, logs and the pipeline")
    overwrite_output_dir: bool = option(False, "delete the outputs of an earlier run in output_dir")
    resume_from_checkpoint: str = option("latest", "latest (a new run if there is none) or a checkpoint's path")
    checkpointing_steps: int = option(500, "updates between checkpoints; each also exports the pipeline folder", min=1)
    checkpoints_total_limit: int | None = option(2, "newest checkpoints to keep; null keeps all", min=1)
    validation_steps: int = option(500, "updates between held-out losses", min=1)
    save_images_steps: int = option(500, "updates between sample grids", min=1)
    eval_batch_size: int = option(16, "images in a sample grid", min=1, max=4096)
    ddpm_num_inference_steps: int = option(50, "sampling steps for a sample grid", min=1, max=100_000)
    sampler: Literal["ddim", "ddpm"] = option("ddim", "sampler for grids and the exported pipeline", only="ddpm")
    metric: Literal["fid", "kid"] | None = option(None, "metric during training; the best EMA network is kept")
    metric_images: int = option(2048, "number of generated and of training images", min=2, max=100_000, needs="metric")
    metric_steps: int = option(5000, "updates between measurements of the metric", min=1, needs="metric")
    inception_path: str | None = option(None, "Inception weights file for the metric", needs="metric")
    logging_steps: int = option(10, "updates between log records", min=1)
    logging_dir: str = option("logs", "folder for tracker logs, inside output_dir")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option("tensorboard", "trackers besides log.jsonl")
    dry_run: bool = option(False, "run the pre-flight checks and one update, then stop without writing a checkpoint")
    push_to_hub: bool = option(False, "push the pipeline folder to the Hub when the run ends normally")
    hub_model_id: str | None = option(None, "Hub repository; null: output_dir's name", needs="push_to_hub")
    hub_private_repo: bool = option(False, "create a private repository", needs="push_to_hub")

    def __post_init__(self):
        for name in PATHS:
            value = getattr(self, name)
            setattr(self, name, value and os.path.expanduser(value))
        for name, limits in LIMITS.items():
            value, objectives, needed = getattr(self, name), limits.get("only", self.objective), limits.get("needs")
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, (int, float, str)):
                    _check_value(name, entry, limits)
            if value == DEFAULTS[name]:
                continue
            if self.objective not in objectives.split():
                raise InputError(f"--{name} {value} has no effect with --objective {self.objective}; omit it")
            if needed and getattr(self, needed) in (None, False):
                raise InputError(f"--{name} {value} has no effect without --{needed}; give both or neither")
        sides = height_and_width(self.resolution)
        if len(sides) > 2:
            raise InputError(f"--resolution has {len(sides)} numbers; give one, or height and width")
        self.resolution = compact(sides)
        if any("Skip" in block for block in (*self.down_block_types, *self.up_block_types)):
            self.in_channels = self.in_channels or 3
        self._check_combinations()

    def _check_combinations(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise InputError("give exactly one of --dataset_name and --train_data_dir")
        train, heldout = ("validation" if split == "valid" else split for split in (self.split, self.validation_split))
        if train == heldout:
            raise InputError(f"--validation_split {self.split} is trained on, so it is not held out; choose another")
        embeddings = {"ddpm": ("positional", "learned"), "ve": ("fourier",)}.get(self.objective, ("positional",))
        if self.time_embedding_type not in embeddings:
            raise InputError(f"--objective {self.objective} needs --time_embedding_type {' or '.join(embeddings)}")
        is_on_hub = self.train_data_dir is None and self.dataset_name != "synthetic-faces"
        for name in ("streaming", "dataset_revision"):
            if getattr(self, name) and not is_on_hub:
                raise InputError(f"--{name} is for data sets on the Hub; omit it")
        if self.beta_start > self.beta_end:
            raise InputError(f"--beta_start {self.beta_start} must not exceed --beta_end {self.beta_end}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":  # pure noise does not determine x_0
            raise InputError("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample, not epsilon")
        if self.rescale_betas_zero_snr and self.snr_gamma is not None:
            raise InputError("--snr_gamma gives the last timestep of --rescale_betas_zero_snr weight 0; use only one")
        if self.objective == "ddpm" and self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise InputError(f"--ddpm_num_inference_steps exceeds --ddpm_num_steps {self.ddpm_num_steps}")
        has_last_step = self.max_train_steps is not None or self.num_epochs is not None
        if not has_last_step and self.max_train_minutes is None:
            raise InputError("the run has no length: give --max_train_steps, --num_epochs or --max_train_minutes")
        if not has_last_step and self.lr_scheduler in ("linear", "cosine"):  # which end at the last step
            raise InputError(f"--lr_scheduler {self.lr_scheduler} needs --max_train_steps or --num_epochs")
        if self.overwrite_output_dir and self.resume_from_checkpoint != "latest":
            raise InputError("--overwrite_output_dir deletes checkpoints; omit --resume_from_checkpoint")

    def noise_scheduler(self) -> DDPMScheduler | SDEScheduler:
        """The noise process of this run. Raises ValueError if these settings do not define one."""
        betas = (self.ddpm_beta_schedule, self.beta_start, self.beta_end)
        same = ("objective", "sigma_min", "sigma_max", "sigma_data", "noise_mean", "noise_std", "time_density")
        if self.objective == "ddpm":
            zero_snr = self.rescale_betas_zero_snr
            return make_noise_scheduler(self.ddpm_num_steps, *betas, self.prediction_type, zero_snr)
        return SDEScheduler(
            prediction_type=OWN_PREDICTION.get(self.objective, self.prediction_type),
            beta_min=self.sde_beta_min,
            beta_max=self.sde_beta_max,
            clip_sample=self.objective != "flow",  # for flow, the error of x_0 is at most that of the velocity
            **{name: getattr(self, name) for name in same},
        )

    def objective_settings(self) -> dict:
        """The objective and the options that it uses, with sigma_min and sigma_max resolved."""
        names = [name for name, limits in LIMITS.items() if self.objective in limits.get("only", "").split()]
        settings = {"objective": self.objective} | {name: getattr(self, name) for name in names}
        if self.objective in ("ve", "edm"):
            sde = self.noise_scheduler().sde
            settings |= {"sigma_min": sde.sigma_min, "sigma_max": sde.sigma_max}
        return settings

    def loss_settings(self) -> dict:
        """The arguments of `diffusion_loss` for this run."""
        names = ("timestep_sampling", "snr_gamma", "snr_weighting", "likelihood_weighting")
        return {name: getattr(self, name) for name in names}

    def unet_kwargs(self, num_classes: int | None = None) -> dict:
        """The constructor arguments of `CustomUNet2DModel` for this run, with a null class added to the K classes."""
        kwargs = {name: getattr(self, name) for name in UNET_OPTIONS}
        kwargs |= {name: tuple(value) for name, value in kwargs.items() if isinstance(value, list)}
        kwargs["sample_size"] = self.resolution if isinstance(self.resolution, int) else tuple(self.resolution)
        kwargs["in_channels"] = kwargs["out_channels"] = self.image_shape[0]
        if self.time_embedding_type == "learned":
            kwargs["num_train_timesteps"] = self.ddpm_num_steps
        if num_classes is not None:
            kwargs["num_class_embeds"] = num_classes + 1
        return kwargs

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the training images; C is 3 until the images have been read."""
        return self.in_channels or 3, *height_and_width(self.resolution)

    def data_source(self) -> dict:
        """The arguments of `open_image_store` that all splits of this run share."""
        names = (
            "dataset_name dataset_config_name dataset_revision train_data_dir image_column label_column crop"
            " resolution in_channels preserve_input_precision streaming skip_bad_images cache_dir"
        ).split()
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, which `--config` reads back unchanged."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, default_flow_style=None, width=119)

    def to_public_yaml(self) -> str:
        """`to_yaml` for the model repository: it reveals nothing about this machine and does not push when reused.

        Only the last part of each path is kept, so `--train_data_dir` must be given again.
        """
        names = "cache_dir inception_path resume_from_checkpoint overwrite_output_dir push_to_hub hub_model_id"
        public = {name: DEFAULTS[name] for name in [*names.split(), "hub_private_repo"]}
        for name in ("train_data_dir", "output_dir", "logging_dir"):
            path = getattr(self, name)
            public[name] = path and Path(path).resolve().name
        public["pretrained_model_name_or_path"] = self.pretrained_name
        return dataclasses.replace(self, **public).to_yaml()

    @property
    def pretrained_name(self) -> str | None:
        """The pretrained model of this run: its id on the Hub, or the name of its folder."""
        name = self.pretrained_model_name_or_path
        if name is None or not os.path.isdir(name):
            return name
        folder = Path(name).resolve()
        # model folders have the same name in every run: use the name of the run
        return folder.parent.name if folder.name in ("pipeline", "best_pipeline") else folder.name

    @property
    def hub_repo_id(self) -> str:
        """The id of the repository on the Hub; without a namespace it belongs to the user."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


TYPES = typing.get_type_hints(TrainConfig)
DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}
LIMITS = {entry.name: entry.metadata["limits"] for entry in dataclasses.fields(TrainConfig)}
UNET_OPTIONS = [name for name in inspect.signature(CustomUNet2DModel.__init__).parameters if name in TYPES]


def _check_value(name: str, value: float | str, limits: dict) -> None:
    """Raises InputError for an empty string, and for a number that is not finite or is out of range."""
    if value == "":
        raise InputError(f"--{name} is empty")
    for bound, (is_met, words) in BOUNDS.items():
        if bound in limits and not is_met(value, limits[bound]):  # also catches nan
            raise InputError(f"--{name} is {shown(value)}; it must be {words} {limits[bound]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} is {value}; it must be finite")


def shown(value) -> str:
    """A value for a message, as one short line."""
    return one_line(repr(value))[:200]
