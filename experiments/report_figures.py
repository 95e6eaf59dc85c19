"""The figures of REPORT.md that need no training: the network, schedules, weights, noised faces, a run's progress.

    python -m experiments.report_figures --out assets/report

OUT/unet.png shows the modules of the network in configs/celeba32_cpu.yaml, OUT/time_embedding.png the output of its
time_proj, OUT/forward.png synthetic faces turning into noise, OUT/schedules.png signal-to-noise ratios,
OUT/weights.png the loss weight that each prediction target implies, and OUT/progress.png the FID during the training
of the shipped model and after it. Exit codes: 0 done, 2 bad input.
"""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from common import Parser, make_folder, run_command
from custom_unet import CustomUNet2DModel
from custom_unet.custom_unet_2d import Downsample, PositionalProjection, ResidualBlock, SelfAttention, Upsample
from eval.figures import labelled_grid, plot_curves, save_figure
from training.arguments import parse_config
from training.data import to_model_range, to_uint8
from training.log import read_log
from training.synthetic_faces import render_faces

REPOSITORY = Path(__file__).resolve().parent.parent
DRAWN_CONFIG = REPOSITORY / "configs" / "celeba32_cpu.yaml"
DRAWN_LOGS = [REPOSITORY / "samples" / "celeba64" / f"log_{part}.jsonl" for part in (1, 2, 3, 4, 5)]
SCHEDULES = {"linear": DDPMScheduler(), "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
SHOWN_TIMESTEPS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
SNR_GAMMA = 5.0
FACE_PIXELS = 64
KINDS = {  # colour and name of each kind of layer
    "conv": ("#888888", "3x3 convolution"),
    "resnet": ("#4c78a8", "residual block"),
    "attention": ("#e45756", "residual block, then attention"),
    "down": ("#72b7b2", "downsampling"),
    "up": ("#f2cf5b", "upsampling"),
}
SKIP_COLOUR = "#444444"


class Layer(NamedTuple):
    """One box of the drawn network; a residual block and the attention after it share a box."""

    kind: str  # a key of KINDS
    channels: int  # of the output (1, channels, side, side)
    side: int
    skip_from: int | None  # index of the layer whose output is concatenated to the input, or None


def layers_of(network: CustomUNet2DModel, side: int) -> list[Layer]:
    """The layers of a network without Skip blocks in the order of the forward pass, for images of side x side pixels.

    Args:
        network: on the meta device.
    """
    kinds = {ResidualBlock: "resnet", SelfAttention: "attention", Downsample: "down", Upsample: "up"}
    layers, skips = [], []

    def record(name: str, kind: str, _module, _inputs, output: torch.Tensor) -> None:
        if kind == "attention":
            layers[-1] = layers[-1]._replace(kind=kind)
            return
        takes_skip = name.startswith("up_blocks") and kind == "resnet"
        if name.startswith(("conv_in", "down_blocks")):
            skips.append(len(layers))
        layers.append(Layer(kind, *output.shape[1:3], skips.pop() if takes_skip else None))

    for name, module in network.named_modules():
        kind = "conv" if name in ("conv_in", "conv_out") else kinds.get(type(module))
        if kind is not None:
            module.register_forward_hook(partial(record, name, kind))
    with torch.device("meta"), torch.no_grad():
        network(torch.empty(1, 3, side, side), torch.ones(1))
    return layers


def draw_network(layers: list[Layer], path: Path) -> None:
    """Draws the layers as boxes from left to right, with one row per level and lines for skip connections."""
    sides = sorted({layer.side for layer in layers}, reverse=True)
    figure, axes = plt.subplots(figsize=(8.5, 0.6 + 1.2 * len(sides)))
    ends = {layer.skip_from: place for place, layer in enumerate(layers) if layer.skip_from is not None}
    for place, layer in enumerate(layers):
        level, height = sides.index(layer.side), layer.side / sides[0] * 0.45 + 0.25
        axes.add_patch(Rectangle((place - 0.32, -level - height / 2), 0.64, height, color=KINDS[layer.kind][0]))
        axes.text(place, -level, layer.channels, ha="center", va="center", rotation=90, fontsize=9)
        if place in ends:  # above the boxes, and above the connections inside it
            top, end = height / 2 - level, ends[place]
            y = top + 0.06 + 0.06 * sum(source > place and layers[source].side == layer.side for source in ends)
            axes.plot([place, place, end, end], [top + 0.01, y, y, top + 0.01], color=SKIP_COLOUR, linewidth=0.7)
    for level, side in enumerate(sides):
        axes.text(-1.1, -level, f"{side} x {side}", ha="right", va="center", fontsize=11)
    for colour, label in KINDS.values():
        axes.plot([], [], "s", color=colour, label=label)
    axes.plot([], [], color=SKIP_COLOUR, linewidth=0.7, label="skip connection, concatenated")
    axes.set(xlim=(-3.5, len(layers)), ylim=(-len(sides) + 0.6, 0.65))
    axes.axis("off")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    save_figure(figure, path)


def signal_to_noise(name: str) -> np.ndarray:
    """snr(t) = abar_t / (1 - abar_t) at every timestep; float64 (T,)."""
    alphas_cumprod = SCHEDULES[name].alphas_cumprod.double()
    return (alphas_cumprod / (1 - alphas_cumprod)).numpy()


def draw_schedules(path: Path) -> None:
    figure, (share, logarithm) = plt.subplots(1, 2, figsize=(8, 3))
    for name in SCHEDULES:
        ratio = signal_to_noise(name)
        share.plot(np.sqrt(ratio / (1 + ratio)), label=name)
        logarithm.plot(np.log(ratio), label=name)
    share.set(xlabel="timestep", title="sqrt(abar), the share of the image")
    logarithm.set(xlabel="timestep", title="ln(snr)", ylim=(-12, 12))
    for axes in (share, logarithm):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def draw_weights(path: Path) -> None:
    """Draws the weight of the squared error of x_0 that the unweighted loss of each target implies, and min-SNR."""
    snr = signal_to_noise("cosine")
    weights = {"epsilon": snr, "x_0": np.ones_like(snr), "v": snr + 1}
    weights[f"v with min-SNR, gamma {SNR_GAMMA:g}"] = np.minimum(snr, SNR_GAMMA)
    lines = {label: (weight, None) for label, weight in weights.items()}
    labels = {"xlabel": "timestep, cosine schedule", "ylabel": "weight of the squared error of x_0"}
    plot_curves(np.arange(len(snr)), lines, labels | {"yscale": "log", "ylim": (1e-3, 1e3)}, path)


def draw_time_embedding(projection: PositionalProjection, path: Path) -> None:
    """Draws the embedding of the first 400 timesteps before the two linear layers, one column per timestep."""
    codes = projection(torch.arange(400)).T.numpy()  # (features, timesteps)
    figure, axes = plt.subplots(figsize=(8, 2.8))
    image = axes.imshow(codes, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axes.axhline(len(codes) / 2 - 0.5, color="black", linewidth=1)
    axes.set(xlabel="timestep", yticks=[len(codes) / 4, 3 * len(codes) / 4], yticklabels=["cosines", "sines"])
    figure.colorbar(image, pad=0.01)
    save_figure(figure, path)


def noised_faces() -> dict[str, list[Image.Image]]:
    """A face with the same noise at SHOWN_TIMESTEPS of each schedule."""
    noise = torch.randn(1, 3, FACE_PIXELS, FACE_PIXELS, generator=torch.Generator().manual_seed(0))
    face = to_model_range(torch.from_numpy(render_faces([0], FACE_PIXELS)).permute(0, 3, 1, 2))
    faces, timesteps = face.expand(len(SHOWN_TIMESTEPS), -1, -1, -1), torch.tensor(SHOWN_TIMESTEPS)
    noisy = {name: to_uint8(schedule.add_noise(faces, noise, timesteps)) for name, schedule in SCHEDULES.items()}
    return {name: [to_pil_image(image) for image in images] for name, images in noisy.items()}


def draw_progress(logs: Iterable[Path], path: Path) -> None:
    """Draws FID against the images seen, and the hours of training as a second axis.

    Args:
        logs: of successive runs, each of which started from the weights of the previous one.
    """
    records = []
    for log in logs:
        before = {
            key: max((r[key] for r in records if key in r), default=0) for key in ("images_seen", "train_seconds")
        }
        records += [r | {key: r[key] + total for key, total in before.items() if key in r} for r in read_log(log)]
    seen, fid = zip(*((record["images_seen"], record["fid"]) for record in records if "fid" in record), strict=True)
    timed = [record for record in records if "train_seconds" in record]
    hours, images = zip(*((record["train_seconds"] / 3600, record["images_seen"]) for record in timed), strict=True)
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    axes.plot(np.array(seen) / 1000, fid, "o-")
    axes.set(xlabel="images seen, thousands", ylabel="FID", xlim=(0, seen[-1] * 1.05 / 1000), ylim=(0, max(fid) * 1.1))
    axes.grid(alpha=0.3)
    top, ticks = axes.twiny(), range(1, int(hours[-1]) + 1)
    top.set(xlabel="hours", xlim=axes.get_xlim(), xticks=np.interp(ticks, hours, images) / 1000, xticklabels=ticks)
    save_figure(figure, path)


def write_figures(out: Path) -> None:
    make_folder(out)
    config = parse_config(["--config", str(DRAWN_CONFIG), "--dataset_name", "any"])
    with torch.device("meta"):
        network = CustomUNet2DModel(**config.unet_kwargs()).eval()
    draw_network(layers_of(network, config.resolution), out / "unet.png")
    draw_time_embedding(network.time_proj, out / "time_embedding.png")
    columns = [f"t = {timestep}" for timestep in SHOWN_TIMESTEPS]
    labelled_grid(noised_faces(), columns).save(out / "forward.png")
    draw_schedules(out / "schedules.png")
    draw_weights(out / "weights.png")
    draw_progress(DRAWN_LOGS, out / "progress.png")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m experiments.report_figures", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    return run_command(lambda: write_figures(parser.parse_args(arguments).out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
