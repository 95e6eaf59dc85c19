"""Figures of an evaluation, from arrays and results; no figure shows a reference image."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from pipelines.applications import enlarged

SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.0), 120
NUM_COLOURS = 10  # in matplotlib's colour cycle; further lines are dashed
CELL_PIXELS = 64  # approximate height of an image in a grid
FEW_CURVES = 5  # with more curves, the legend is placed beside the plot


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes the file and closes the figure."""
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    plt.close(figure)


def plot_cost_curve(entries: list[dict], path: Path) -> None:
    """Plots FID (or SWD if there is no FID) against network evaluations, one line per sampler, from `cost` results."""
    metric = "fid" if any(entry["metric"] == "fid" for entry in entries) else "swd"
    entries = [entry for entry in entries if entry["metric"] == metric]
    figure, axes = plt.subplots(figsize=SIZE_INCHES)
    lines = {}
    for entry in entries:
        label = entry["sampler"] + (f", eta {entry['eta']:g}" if entry.get("eta") else "")
        lines.setdefault(label, []).append((entry["network_evaluations"], entry["value"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label, markersize=4)
    axes.axhline(entries[0]["floor"], color="grey", linestyle="--", label="real against real")
    axes.set(xlabel="network evaluations per image", ylabel=f"{entries[0]['name']}, n = {entries[0]['n']:,}")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def plot_histograms(panels: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plots panels side by side, each with histograms of several sets of values: x label -> label -> values >= 0."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(2 + 3 * len(panels), 4), squeeze=False)
    for axes, (label, sets) in zip(all_axes[0], panels.items(), strict=True):
        edges = np.linspace(0, max(values.max() for values in sets.values()), 51)
        for name, values in sets.items():
            axes.stairs(np.histogram(values, edges)[0] / len(values), edges, label=name, fill=True, alpha=0.5)
        axes.set_xlabel(label)
    all_axes[0, 0].set_ylabel("share of the images")
    all_axes[0, -1].legend()
    save_figure(figure, path)


def plot_curves(
    x: Sequence[float], curves: dict[str, tuple[np.ndarray, np.ndarray | None]], labels: dict, path: Path
) -> None:
    """Plots lines with bands of one standard error.

    Args:
        curves: mean (len(x),) and standard error or None, by label.
        labels: arguments of matplotlib's `Axes.set`: labels and scales.
    """
    many = len(curves) > FEW_CURVES
    figure, axes = plt.subplots(figsize=(SIZE_INCHES[0] + 2 * many, SIZE_INCHES[1]))
    for place, (label, (mean, error)) in enumerate(curves.items()):
        (line,) = axes.plot(x, mean, "--" if place >= NUM_COLOURS else "-", label=label)
        if error is not None:
            axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set(**labels)
    axes.legend(**({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}))
    save_figure(figure, path)


def labelled_grid(rows: dict[str, list[Path | Image.Image]], columns: Sequence[str] = ()) -> Image.Image:
    """A grid of images or image files with labels to the left of each row and above each column.

    Images smaller than a cell are enlarged by an integer factor.
    """
    font, top = ImageFont.truetype(findfont("DejaVu Sans"), 13), 20 if columns else 0
    margin = 12 + max(int(font.getlength(label)) for label in rows)
    images = {label: [x if isinstance(x, Image.Image) else Image.open(x) for x in row] for label, row in rows.items()}
    sample = next(iter(images.values()))[0]
    scale = max(1, round(CELL_PIXELS / sample.height))
    width, height = sample.width * scale, sample.height * scale
    sheet_width = margin + width * max(len(row) for row in images.values())
    sheet = Image.new("RGB", (sheet_width, top + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(columns):
        draw.text((margin + (j + 0.5) * width, top / 2), label, "black", font, anchor="mm")
    for i, (label, row) in enumerate(images.items()):
        draw.text((margin - 6, top + (i + 0.5) * height), label, "black", font, anchor="rm")
        for j, image in enumerate(row):
            image = enlarged(image, max(1, round(height / image.height)))
            sheet.paste(image, (margin + j * width, top + i * height))
    return sheet
