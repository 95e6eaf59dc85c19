"""What a person is told before a training starts: sizes, length, memory."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from training.config import TrainConfig


def preflight_summary(
    config: TrainConfig, network: nn.Module, loss_of: Callable[[Tensor], Tensor], **facts: str | int | None
) -> str:
    """The pre-flight table.

    Args:
        loss_of: the loss of the training on images of shape (B, 3, H, W); called with one image to see what its
            backward pass keeps.
        facts: `source`, `num_images`, `num_heldout_images`, `num_classes` (None without labels), `num_processes`,
            `total_steps`, `step`, `device`.
    """
    parameters = list(network.parameters())
    image = torch.zeros(1, 3, config.resolution, config.resolution, device=parameters[0].device)
    state_bytes = sum(p.numel() * p.element_size() for p in parameters) * (7 if config.post_hoc_ema else 5)
    batch_bytes = activation_bytes(lambda: loss_of(image), parameters) * config.train_batch_size
    images_per_update = config.train_batch_size * config.gradient_accumulation_steps * facts["num_processes"]
    length = "no last step"
    if facts["total_steps"]:
        epochs = facts["total_steps"] * images_per_update / facts["num_images"]
        length = f"{facts['total_steps']:,} updates = {epochs:.1f} epochs"
    if config.max_train_minutes:
        length += f", at most {config.max_train_minutes:g} minutes in this start"
    rows = {
        "network": f"{sum(p.numel() for p in parameters):,} parameters at {config.resolution}x{config.resolution}",
        "objective": objective_text(config),
        "data": f"{facts['source']}, {config.split}: {facts['num_images']:,} images an epoch",
        "held-out data": f"{facts['num_heldout_images']:,} images",
        "classes": "none" if facts["num_classes"] is None else f"{facts['num_classes']} of {config.label_column}",
        "images per update": f"{images_per_update} = {config.train_batch_size} x"
        f" {config.gradient_accumulation_steps} accumulated x {facts['num_processes']} processes",
        "length": length,
        "memory": f"{_mebibytes(state_bytes)} for weights, gradients, AdamW and EMA; {_mebibytes(batch_bytes)} for the"
        " activations of a batch (estimate)",
        "device": f"{facts['device']}, precision {config.mixed_precision}",
        "output": config.output_dir,
        "starts at": f"step {facts['step']}",
    }
    if config.metric is not None:
        rows["metric"] = (
            f"{config.metric.upper()} of {config.metric_images:,} images every {config.metric_steps:,} updates"
        )
    deaf = levels_without_time(config)
    if deaf:
        rows["note"] = (
            f"level {deaf[0]} has one channel a group, so group norm takes the time embedding out again; lower"
            " --norm_num_groups, or take --resnet_time_scale_shift scale_shift"
        )
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def levels_without_time(config: TrainConfig) -> list[int]:
    """Levels of the network whose residual blocks cannot tell the timestep.

    The embedding is one number for each channel, added before the second norm, and a group of one channel has its mean
    subtracted.
    """
    if config.resnet_time_scale_shift != "default":
        return []
    blocks = zip(config.block_out_channels, config.down_block_types, strict=True)
    return [
        level for level, (width, block) in enumerate(blocks) if "Skip" not in block and width == config.norm_num_groups
    ]


def objective_text(config: TrainConfig) -> str:
    """What the network learns, in a line."""
    settings = config.objective_settings()
    kind = config.objective
    if kind == "ddpm":
        return f"{config.prediction_type}, {config.ddpm_beta_schedule}, {config.ddpm_num_steps} timesteps"
    if kind in ("vp", "subvp"):
        text = f"{kind} SDE, {config.prediction_type}, beta from {config.sde_beta_min:g} to {config.sde_beta_max:g}"
    elif kind == "flow":
        text = f"flow, {config.time_density} times"
    else:
        name = "ve SDE" if kind == "ve" else "edm"
        text = f"{name}, sigma from {settings['sigma_min']:g} to {settings['sigma_max']:g}"
    if kind == "edm":
        text += (
            f", in training ln(sigma) ~ N({config.noise_mean:g}, {config.noise_std:g}^2), sigma_data"
            f" {config.sigma_data:g}"
        )
    return text + (", likelihood weighting" if config.likelihood_weighting else "")


def activation_bytes(compute_loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out; each storage counts once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        loss = compute_loss()  # held until the end: a freed storage's address could be taken again
    del loss
    return total


def speed_report(images_per_second: float, num_images_left: float, seconds_left: float) -> str:
    """The speed, and the time left until all images are seen or the time is up; either may be infinite."""
    seconds_left = min(seconds_left, num_images_left / images_per_second)
    left = f", {duration(seconds_left)} left" if math.isfinite(seconds_left) else ""
    return f"{images_per_second:.1f} images/s{left}"


def duration(seconds: float) -> str:
    """h:mm:ss, rounded to seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
