"""Figures of the tutorial, from what its steps have computed."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2166ac", "#e08214", "#1b7837", "#b2182b", "#762a83", "#777777"
COLORS = (BLUE, GREEN, ORANGE, RED, PURPLE)
ARROWS = {"angles": "xy", "scale_units": "xy", "scale": 1, "headwidth": 2.5, "headlength": 3, "headaxislength": 3}


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90, metadata={"Software": None})
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes


def plot_forward(panels: dict[str, dict], path: Path) -> None:
    """Paths over p_t, and their histograms on the exact densities.

    Args:
        panels: by the name of the SDE: `height`; `density` (x, t) from -height to height; `times` and `paths` (t, N);
            `marginals`, of which each is a time, samples (N,), a grid and the density there, by standard deviations.
    """
    figure, axes = plt.subplots(2, 3, figsize=(10, 6.6), height_ratios=[1.2, 1])
    for (name, panel), (top, bottom) in zip(panels.items(), axes.T, strict=True):
        height = panel["height"]
        extent = (0, 1, -height, height)
        top.imshow(panel["density"], extent=extent, origin="lower", aspect="auto", cmap="Blues", alpha=0.9)
        top.plot(panel["times"][::5], panel["paths"][::5, :6], color=ORANGE, linewidth=0.8)
        top.set(title=name, xlabel="time t", ylim=(-height, height))
        for row, (t, x, grid, density) in enumerate(panel["marginals"]):
            counts, edges = np.histogram(x, bins=60, range=(-3, 3), density=True)
            floor = -1.7 * row
            bottom.stairs(counts + floor, edges, baseline=floor, fill=True, color=ORANGE, alpha=0.55)
            bottom.plot(grid, density + floor, color=BLUE, linewidth=1.2)
            bottom.text(2.95, 0.25 + floor, f"t = {t}", ha="right", fontsize=9)
        bottom.set(xlabel="x / its standard deviation", yticks=[], xlim=(-3, 3))
    axes[0, 0].set_ylabel("x: exact density (blue), paths")
    axes[1, 0].set_ylabel("density: exact (line), paths (filled)")
    _save(figure, path)


def plot_scores(fields: list[tuple], times: Tensor, errors: dict, losses: dict, path: Path) -> None:
    """Score fields at some times, each a time, the density (x, y), points, exact and learned arrows; and curves."""
    figure = plt.figure(figsize=(10, 6.6))
    layout = figure.add_gridspec(2, 4, height_ratios=[1, 1.1])
    for column, (t, density, points, exact, learned) in enumerate(fields):
        axes = figure.add_subplot(layout[0, column])
        axes.imshow(density.T, extent=(-1.8, 1.8, -1.8, 1.8), origin="lower", cmap="Blues", alpha=0.7)
        for arrows, color, width in ((exact, "black", 0.014), (learned, ORANGE, 0.006)):
            shortened = 0.3 * arrows / (1 + arrows.norm(dim=1, keepdim=True))
            axes.quiver(*points.T, *shortened.T, color=color, width=width, **ARROWS)
        axes.set(title=f"t = {t}", xticks=[], yticks=[])
    left, right = figure.add_subplot(layout[1, :2]), figure.add_subplot(layout[1, 2:])
    for name, color in zip(losses, ("black", ORANGE, PURPLE), strict=True):
        style = {"color": color, "label": name, "marker": ".", "linestyle": "--" if name == "exact" else "-"}
        if name in errors:
            left.plot(times, errors[name], **style)
        right.plot(times, losses[name], **style)
    left.set(xscale="log", yscale="log", xlabel="time t", ylabel="relative RMS error of the score")
    right.set(xscale="log", xlabel="time t", ylabel="denoising loss on new data (eq. 7)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("n times the score: exact (black), learned (orange); long arrows are shortened", fontsize=10)
    _save(figure, path)


def plot_samples(drawn: dict[str, tuple[Tensor, Tensor, str]], path: Path) -> None:
    """Eight panels by title: samples (N, 2), which of them lie at a heavy mode (N,), and a line of text."""
    figure, axes = plt.subplots(2, 4, figsize=(10, 6.4))
    for (name, (x, is_heavy, text)), panel in zip(drawn.items(), axes.flat, strict=True):
        for group, color in ((is_heavy, BLUE), (~is_heavy, ORANGE)):
            panel.plot(*x[group].T, ".", color=color, markersize=1)
        panel.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
        panel.set_title(f"{name}\n{text}", fontsize=9)
    _save(figure, path)


def plot_orders(panels: dict[str, dict], ylabels: tuple[str, str], path: Path) -> None:
    """Two panels by title: `evaluations`, `error` and `order` by method."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    colors = iter(COLORS)
    for panel, (title, lines), ylabel in zip(axes, panels.items(), ylabels, strict=True):
        for name, line in lines.items():
            label = f"{name}: order {line['order']:.1f}"
            panel.loglog(line["evaluations"], line["error"], "o-", color=next(colors), label=label)
        panel.set(title=title, xlabel="evaluations of the score", ylabel=ylabel)
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.set_xticks([50, 100, 200, 500], ["50", "100", "200", "500"])
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right")
    _save(figure, path)


def plot_corrector(budgets: tuple, chance: float, panels: dict[str, dict], path: Path) -> None:
    """Two panels by the kind of score: `mean` and `std_of_seeds` by method."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for panel, (kind, lines) in zip(axes, panels.items(), strict=True):
        for (label, line), color in zip(lines.items(), COLORS, strict=True):
            style = {"color": color, "label": label, "marker": "o", "markersize": 4, "capsize": 2}
            panel.errorbar(budgets, line["mean"], line["std_of_seeds"], **style)
        panel.axhline(chance, color=GREY, linestyle="--", label="chance: data against data")
        panel.set(xscale="log", yscale="log", xlabel="evaluations of the score", title=f"{kind} score")
        panel.minorticks_off()
        panel.set_xticks(budgets, map(str, budgets))
        panel.set_yticks([0.01, 0.02, 0.05], ["0.01", "0.02", "0.05"])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("sliced Wasserstein distance, spread of the seeds")
    axes[1].legend(fontsize=8)
    _save(figure, path)


def plot_codes(panels: dict[str, Tensor], mode: Tensor, path: Path) -> None:
    """Points (N, 2) by title, coloured by the mode that the data lie at."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6))
    for panel, (title, points) in zip(axes, panels.items(), strict=True):
        panel.scatter(*points.T, c=mode, cmap="tab10", s=3, linewidths=0)
        limit = 1.5 if title == "data" else 3.5
        panel.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    _save(figure, path)


def plot_likelihoods(tolerances: list, errors: dict, exact: Tensor, learned: Tensor, path: Path) -> None:
    """Error by tolerance for each SDE, and the log-densities of points by the learned score against the exact ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    for (name, values), color in zip(errors.items(), (GREEN, BLUE, ORANGE), strict=True):
        left.loglog(tolerances, values, "o-", color=color, label=name)
    left.set(xlabel="tolerance of the ODE solver", ylabel="RMS error of log p, nats", title="exact score")
    left.grid(alpha=0.3)
    left.legend()
    ends = [float(exact.min()) - 0.5, float(exact.max()) + 0.5]
    right.plot(ends, ends, color=GREY, linewidth=0.8)
    right.plot(exact, learned, ".", color=ORANGE, markersize=3)
    right.set(xlabel="exact log p(x), nats", ylabel="log p(x) by the ODE, nats", title="learned score, VP")
    _save(figure, path)
