"""A tutorial on score-based models through stochastic differential equations, with data whose score is known.

    python -m experiments.sde_tutorial --out assets/sde

It draws figures and records the numbers of each step, in a few minutes on one core. Read it with Song et al. 2021
(arXiv 2011.13456) at hand: equation and algorithm numbers refer to that paper. The SDEs and samplers are those of the
image models; only the data and the network are small, so that you can check each claim against the truth.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_1samp
from torch import Tensor

from common import Parser, make_folder, run_command
from eval.likelihood import log_density
from eval.results import write_results
from experiments.toys import (
    TWO_MODES,
    GaussianMixture,
    Score,
    at,
    denoiser_of,
    denoising_loss,
    eight_modes,
    exact_score,
    generator,
    mode_weight_error,
    noise_source,
    sliced_wasserstein,
    train,
)
from training import sde as solvers
from training.sde import SDE, VESDE, VPSDE, Denoiser, SubVPSDE, rms

SDES: dict[str, SDE] = {"VE": VESDE(0.01, 10.0), "VP": VPSDE(), "sub-VP": SubVPSDE()}
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2166ac", "#e08214", "#1b7837", "#b2182b", "#762a83", "#777777"
COLORS = (BLUE, GREEN, ORANGE, RED, PURPLE)
ARROWS = {"angles": "xy", "scale_units": "xy", "scale": 1, "headwidth": 2.5, "headlength": 3, "headaxislength": 3}


# The amount of computation of the steps below
PATHS, TRAIN_STEPS, SAMPLES, SEEDS, BUDGETS, POINTS = 20_000, 8000, 10_000, 5, (20, 50, 100, 200), 1000
DATA, VP = eight_modes(), SDES["VP"]
TRAINING_POINTS = DATA.sample(10_000, generator(1))
Scores = dict[str, Score]  # the exact and the learned score of DATA under VP

# Each step below takes these scores and the folder for its figure, and returns its numbers


def save(figure: plt.Figure, path: Path) -> dict[str, str]:
    """Writes a figure, reduced to 128 colours and a third of the size, and returns its entry in the record."""
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    return {"figure": path.name}


def finish(axes: plt.Axes, **legend) -> None:
    axes.grid(alpha=0.3)
    axes.legend(**legend)


# ---- 1. Data become noise: the forward SDE


def solve_paths(sde: SDE, x: Tensor, times: Tensor, weight: float, noise: Callable[[], Tensor] | None) -> Tensor:
    """Solves dx = (f x - weight g^2 score) dt + g dw by Euler-Maruyama, from x (N, 1) at times (S + 1,): (S + 1, N).

    Weight 0 gives the forward SDE (eq. 5), 1 the reverse SDE (eq. 6), and 1/2 without noise the ODE (eq. 13). The
    score is that of TWO_MODES.
    """
    paths = [x]
    for now, later in itertools.pairwise(times):
        dt, g, x = later - now, sde.diffusion(now), paths[-1]
        velocity = sde.drift(now) * x
        if weight > 0:
            velocity = velocity - weight * g**2 * TWO_MODES.at(sde, now).score(x)
        x = x + velocity * dt
        paths.append(x if noise is None else x + g * dt.abs().sqrt() * noise())
    return torch.stack(paths)[..., 0]


def forward(scores: Scores, out: Path) -> dict:
    """Compares simulated paths with the exact marginals: for a linear drift, x_t = alpha x_0 + n epsilon (eq. 29)."""
    numbers = {"paths": PATHS, "chance_level_95_percent": 1.358 / math.sqrt(PATHS)}
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), sharex=True)
    for (name, sde), (top, bottom) in zip(SDES.items(), axes.T, strict=True):
        backwards = solvers.sampling_times(sde, 1000)
        times, noise = backwards.flip(0), noise_source((PATHS, 1), 3)
        x = TWO_MODES.sample(PATHS, generator(2)) + sde.noise_scale(times[0]) * noise()
        paths = solve_paths(sde, x, times, 0, noise)
        height = 2.4 * math.hypot(1, sde.prior_std)
        grid = torch.linspace(-height, height, 500, dtype=torch.float64)[:, None]
        density = torch.stack([TWO_MODES.at(sde, t).log_density(grid).exp() for t in times[::5]], 1)
        density /= density.amax(0)  # otherwise the colours of late times are too faint
        for panel in (top, bottom):
            extent = (0, 1, -height, height)
            panel.imshow(density, alpha=0.9, extent=extent, origin="lower", aspect="auto", cmap="Blues")
            panel.set(ylim=(-height, height))
        top.plot(times[::5], paths[::5, :6], color=ORANGE, linewidth=0.8)
        start = sde.prior_std * torch.linspace(-1.8, 1.8, 6)[:, None].double()
        for weight, noise, color in ((1, noise_source((6, 1), 4), ORANGE), (0.5, None, "black")):
            lines = solve_paths(sde, start, backwards, weight, noise)
            bottom.plot(backwards[::5], lines[::5], color=color, linewidth=0.8)
        top.set(title=name)
        bottom.set(xlabel="time t")
        numbers[name] = {}
        for t in (0.1, 0.3, 0.5, 1.0):
            marginal, x = TWO_MODES.at(sde, at(t)), paths[round(t * 1000)]
            numbers[name][f"distance_at_{t}"] = float(ks_1samp(x.double().numpy(), marginal.cdf).statistic)
    axes[0, 0].set_ylabel("forward SDE")
    axes[1, 0].set_ylabel("reverse SDE (orange), ODE (black)")
    return numbers | save(figure, out / "forward.png")


# ---- 2. A network learns the score


def learning(scores: Scores, out: Path) -> dict:
    """Compares the learned score with the exact one, and with the minimiser of the loss on 2,000 training points.

    That minimiser is the score of these points plus noise. Where the noise is narrower than their spacing, it pulls
    towards single points, and a smooth network is closer to the truth.
    """
    points = TRAINING_POINTS[:2000]
    memory = GaussianMixture(torch.full((len(points),), 1 / len(points)).double(), points, 0.0)
    scores = scores | {"minimum of the loss on 2,000 points": exact_score(memory, VP)}
    times = torch.logspace(-3, 0, 16, dtype=torch.float64)
    errors, losses = {name: [] for name in scores}, {name: [] for name in scores}
    source = generator(5)
    for t in times:
        x_0, noise = DATA.sample(2000, source), torch.randn(2000, 2, generator=source)
        x = DATA.at(VP, t).sample(2000, source)
        exact = DATA.at(VP, t).score(x)
        for name, score in scores.items():
            errors[name].append(float((score(x, t) - exact).norm() / exact.norm()))
            losses[name].append(float(denoising_loss(VP, score, x_0, t, noise)))

    errors.pop("exact")
    numbers = {"times": times.tolist(), "relative_rms_error": errors, "denoising_loss": losses}
    return numbers | draw_learning(numbers, out / "score.png")


def draw_learning(numbers: dict, path: Path) -> dict[str, str]:
    """Draws the exact score at four times, above the errors and losses from `learning`."""
    figure = plt.figure(figsize=(9, 6))
    layout = figure.add_gridspec(2, 4, height_ratios=[1, 1.2])
    lines, fine = (torch.linspace(-end, end, n, dtype=torch.float64) for end, n in ((1.5, 7), (1.9, 120)))
    points, pixels = torch.cartesian_prod(lines, lines), torch.cartesian_prod(fine, fine)
    for column, t in enumerate((0.02, 0.1, 0.25, 0.6)):
        marginal, n, axes = DATA.at(VP, at(t)), float(VP.noise_scale(at(t))), figure.add_subplot(layout[0, column])
        density = marginal.log_density(pixels).exp().view(120, 120)  # (x, y)
        axes.imshow(density.T, extent=(-1.9, 1.9, -1.9, 1.9), origin="lower", cmap="Blues", alpha=0.7)
        arrows = n * marginal.score(points)
        shortened = 0.5 * arrows / (1 + arrows.norm(dim=1, keepdim=True))
        axes.quiver(*points.T, *shortened.T, color="black", width=0.016, **ARROWS)
        axes.set(title=f"t = {t}", xticks=[], yticks=[])
    left, right = figure.add_subplot(layout[1, :2]), figure.add_subplot(layout[1, 2:])
    for name, color in zip(numbers["denoising_loss"], ("black", ORANGE, PURPLE), strict=True):
        style = {"color": color, "label": name, "marker": ".", "linestyle": "--" if name == "exact" else "-"}
        if name in numbers["relative_rms_error"]:
            left.plot(numbers["times"], numbers["relative_rms_error"][name], **style)
        right.plot(numbers["times"], numbers["denoising_loss"][name], **style)
    left.set(xscale="log", yscale="log", xlabel="time t", ylabel="relative RMS error of the score")
    right.set(xscale="log", xlabel="time t", ylabel="denoising loss on new data (eq. 7)")
    finish(left, fontsize=8)
    finish(right, fontsize=8)
    figure.suptitle("n times the exact score of the noisy data; long arrows are shortened", fontsize=10)
    return save(figure, path)


# ---- 3. Samplers


def langevin(sde: SDE, score: Score, x: Tensor, times: Tensor, num_steps: int, noise: Callable[[], Tensor]) -> Tensor:
    """Langevin dynamics (eq. 2), `num_steps` per noise level with step size n^2 / 2; returns the expectation of x_0.

    A single level gives plain Langevin dynamics; decreasing levels anneal it (Song & Ermon 2019, algorithm 1).
    """
    for t in times:
        step = float(sde.noise_scale(t)) ** 2 / 2
        for _ in range(num_steps):
            x = x + step * score(x, t) + math.sqrt(2 * step) * noise()
    return denoiser_of(sde, score)(x, times[-1])


def heun(denoise: Denoiser, x: Tensor, num_steps: int) -> Tensor:
    """Solves the probability-flow ODE with Heun's method at the noise levels of Karras et al. 2022."""
    y = x / float(denoise.sde.signal_scale(at(denoise.sde.last_time)))
    sigmas = solvers.karras_sigmas(num_steps, *denoise.sde.noise_levels)
    return solvers.edm_heun(denoise, y, sigmas, noise=lambda: None)


def solve(sde: SDE, score: Score, x: Tensor, start: float, end: float, tolerance: float) -> tuple[Tensor, int]:
    """Solves the probability-flow ODE (eq. 13) between two times with adaptive steps; also returns its evaluations."""
    return solvers.solve_ode(denoiser_of(sde, score).pf_ode, x, start, end, tolerance)


def sample(
    method: str, sde: SDE, score: Score, budget: int, noise: Callable[[], Tensor], snr: float = 0.16
) -> tuple[Tensor, int]:
    """Draws samples by one of `METHODS` and counts its score evaluations: `budget` or one fewer.

    The adaptive ODE takes as many as its tolerance requires.
    """
    evaluations = 0

    def counted(x, t):
        nonlocal evaluations
        evaluations += 1
        return score(x, t)

    denoise, x = denoiser_of(sde, counted), sde.prior_std * noise()
    match method:
        case "Langevin, one level":
            x = langevin(sde, counted, x, sde.time_of(at(0.05))[None], budget - 1, noise)
        case "Langevin, annealed":
            sigmas = torch.logspace(math.log10(5), math.log10(0.02), budget - 1, dtype=torch.float64)
            x = langevin(sde, counted, x, sde.time_of(sigmas), 1, noise)
        case "Euler-Maruyama":
            x = solvers.euler_maruyama(denoise, x, solvers.sampling_times(sde, budget - 1), noise)
        case "reverse diffusion":
            times = solvers.sampling_times(sde, budget - 1)
            x = solvers.predictor_corrector(denoise, x, times, noise, snr, corrector_steps=0)
        case "predictor-corrector":
            x = solvers.predictor_corrector(denoise, x, solvers.sampling_times(sde, budget // 2), noise, snr)
        case "ODE, Heun":
            x = heun(denoise, x, budget // 2)
        case "ODE, adaptive":
            x = denoise(solve(sde, counted, x, sde.last_time, sde.first_time, tolerance=1e-3)[0], at(sde.first_time))
    return x, evaluations


METHODS = ("Langevin, one level", "Langevin, annealed", "Euler-Maruyama", "reverse diffusion", "predictor-corrector")
METHODS += ("ODE, Heun", "ODE, adaptive")


def samplers(scores: Scores, out: Path) -> dict:
    """Compares all methods with 100 evaluations of the exact and the learned score, from the same prior noise."""
    truth, again = (DATA.sample(SAMPLES, generator(6, i)) for i in range(2))

    def errors(x: Tensor) -> dict[str, float]:
        return {"sliced_wasserstein": sliced_wasserstein(x, truth), "mode_weight_error": mode_weight_error(DATA, x)}

    rows = []
    for (kind, score), method in itertools.product(scores.items(), METHODS):
        x, evaluations = sample(method, VP, score, 100, noise_source((SAMPLES, 2), 7))
        rows.append({"score": kind, "method": method, "evaluations": evaluations} | errors(x))
    return {"samples": SAMPLES, "chance": errors(again), "table": rows}


def gaussian_variance(method: str, num_steps: int) -> float:
    """Variance of a stochastic sampler's output for data N(0, 1), without sampling error.

    The exact score is linear, so the output is a sum of the noises with fixed factors. With one noise set to 1 and the
    others to 0, the sampler returns the factor of that noise; the variance is the sum of the squared factors. One row
    per noise.
    """
    noises = iter(torch.eye(num_steps + 1, dtype=torch.float64)[:, :, None])
    data = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 1).double(), 1.0)
    x, _ = sample(method, VP, exact_score(data, VP), num_steps + 1, lambda: next(noises))
    return float(x.square().sum())


def orders(scores: Scores, out: Path) -> dict:
    """Error against work: the SDE solvers have (weak) order 1, Heun's method 2, Dormand-Prince 5 for fixed steps."""
    of_sde, of_ode = {}, {}

    def line(work: list[int], errors: list[float]) -> dict:
        slope, _ = np.polyfit(np.log(work[-3:]), np.log(errors[-3:]), 1)
        return {"evaluations": work, "error": errors, "order": -float(slope)}

    # x_0 ~ N(0, 1): p_t has variance alpha^2 + n^2 = 1, and the samplers end with the expectation of x_0, alpha x
    exact_variance = float(VP.signal_scale(at(VP.first_time))) ** 2
    steps = [32, 64, 128, 256, 512]
    for method in ("Euler-Maruyama", "reverse diffusion"):
        errors = [abs(gaussian_variance(method, n) / exact_variance - 1) for n in steps]
        of_sde[method] = line([n + 1 for n in steps], errors)

    score, first = scores["exact"], at(VP.first_time)
    x, denoise = noise_source((500, 2), 8)().double(), denoiser_of(VP, score)
    exact = denoise(solve(VP, score, x, VP.last_time, VP.first_time, 1e-11)[0], first)

    def error(x_0: Tensor) -> float:  # the median, because between two modes small errors grow large
        return float((x_0 - exact).norm(dim=1).median())

    steps = [20, 40, 80, 160, 320]
    of_ode["Heun"] = line([2 * n - 1 for n in steps], [error(heun(denoise, x, n)) for n in steps])
    solved = [solve(VP, score, x, VP.last_time, VP.first_time, 10.0**-k) for k in range(3, 9)]
    errors = [error(denoise(y, first)) for y, _ in solved]
    of_ode["Dormand-Prince, adaptive"] = line([n + 1 for _, n in solved], errors)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    axes[0].set(title="SDE solvers, data N(0, 1)", ylabel="relative error of the variance")
    axes[1].set(title="ODE solvers, eight modes, the same noise", ylabel="median error of a sample")
    colors = iter(COLORS)
    for panel, lines in zip(axes, (of_sde, of_ode), strict=True):
        for name, found in lines.items():
            label = name if "adaptive" in name else f"{name}: order {found['order']:.1f}"
            panel.loglog(found["evaluations"], found["error"], "o-", color=next(colors), label=label)
        panel.set(xlabel="evaluations of the score")
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.set_xticks([50, 100, 200, 500], ["50", "100", "200", "500"])
        finish(panel, loc="upper right")
    return of_sde | of_ode | save(figure, out / "orders.png")


# ---- 4. Is a corrector worth its evaluations?


def corrector(scores: Scores, out: Path) -> dict:
    """Compares predictor-corrector with predictors that take twice the steps and therefore as many evaluations."""
    shape = (SAMPLES // 2, 2)
    truth = DATA.sample(shape[0], generator(9))
    chance = [sliced_wasserstein(DATA.sample(shape[0], generator(10, seed)), truth) for seed in range(SEEDS)]
    variants = {name: (name, 0.16) for name in ("Euler-Maruyama", "reverse diffusion")}
    variants |= {f"predictor-corrector, snr {snr}": ("predictor-corrector", snr) for snr in (0.05, 0.16, 0.3)}

    def distance(method: str, snr: float, score: Score, budget: int, seed: int) -> float:
        x, _ = sample(method, VP, score, budget, noise_source(shape, 11, seed), snr)
        return sliced_wasserstein(x, truth)

    mean_chance, found = float(np.mean(chance)), {kind: {} for kind in scores}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for (kind, score), panel in zip(scores.items(), axes, strict=True):
        for (label, (method, snr)), color in zip(variants.items(), COLORS, strict=True):
            distances = [[distance(method, snr, score, n, s) for s in range(SEEDS)] for n in BUDGETS]
            mean, std = np.mean(distances, 1), np.std(distances, 1, ddof=1)
            found[kind][label] = {"mean": mean.tolist(), "std_of_seeds": std.tolist()}
            style = {"color": color, "label": label, "marker": "o", "markersize": 4, "capsize": 2}
            panel.errorbar(BUDGETS, mean, std, **style)
        panel.axhline(mean_chance, color=GREY, linestyle="--", label="chance: data against data")
        panel.set(xscale="log", yscale="log", xlabel="evaluations of the score", title=f"{kind} score")
        panel.minorticks_off()
        panel.set_xticks(BUDGETS, map(str, BUDGETS))
        panel.set_yticks([0.01, 0.02, 0.05], ["0.01", "0.02", "0.05"])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("sliced Wasserstein distance, spread of the seeds")
    axes[1].legend(fontsize=8)
    numbers = {"samples": shape[0], "seeds": SEEDS, "chance": mean_chance, "budgets": BUDGETS}
    return numbers | found | save(figure, out / "corrector.png")


# ---- 5. Each point has a code


def encoding(scores: Scores, out: Path) -> dict:
    """The ODE (eq. 13) encodes points into codes that depend on the score but hardly on the network or the SDE
    (section 4.3): x / alpha follows the same curves for all."""
    x, ve = DATA.sample(POINTS, generator(12)), SDES["VE"]

    def codes(sde: SDE, score: Score) -> Tensor:
        start = float(sde.signal_scale(at(sde.first_time))) * x
        return solve(sde, score, start, sde.first_time, sde.last_time, 1e-6)[0] / sde.prior_std

    of_vp = codes(VP, scores["exact"])
    differences = {"VE from VP, exact score": rms(codes(ve, exact_score(DATA, ve)) - of_vp)}
    differences |= {"learned from exact score, VP": rms(codes(VP, scores["learned"]) - of_vp)}
    return {"points": POINTS, "rms_difference_of_codes": differences}


# ---- 6. Likelihoods


def likelihood(scores: Scores, out: Path) -> dict:
    """Compares `log_density`, by the ODE, with the exact log-density, in nats, for the exact and the learned score.

    Where a smaller tolerance no longer helps, the error comes from the prior, which differs from the noised data.
    """
    n, tolerances = POINTS // 2, [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    probes = torch.eye(2, dtype=torch.float64)[:, None].expand(-1, n, -1)  # for the exact divergence
    errors = {}
    for name, sde in SDES.items():
        marginal = replace(DATA, std=math.hypot(DATA.std, sde.noise_levels[0]))  # of x_0 + sigma epsilon
        x, denoise = marginal.sample(n, generator(13)), denoiser_of(sde, exact_score(DATA, sde))
        found = [log_density(denoise, x, probes, tolerance)[0] for tolerance in tolerances]
        errors[name] = [rms(values - marginal.log_density(x)) for values in found]

    marginal = replace(DATA, std=math.hypot(DATA.std, VP.noise_levels[0]))
    x = marginal.sample(n, generator(13))
    exact, (learned, _) = marginal.log_density(x), log_density(denoiser_of(VP, scores["learned"]), x, probes, 1e-4)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    for (name, values), color in zip(errors.items(), (GREEN, BLUE, ORANGE), strict=True):
        left.loglog(tolerances, values, "o-", color=color, label=name)
    left.set(xlabel="tolerance of the ODE solver", ylabel="RMS error of log p, nats", title="exact score")
    finish(left)
    ends = [float(exact.min()) - 0.5, float(exact.max()) + 0.5]
    right.plot(ends, ends, color=GREY, linewidth=0.8)
    right.plot(exact, learned, ".", color=ORANGE, markersize=3)
    right.set(xlabel="exact log p(x), nats", ylabel="log p(x) by the ODE, nats", title="learned score, VP")
    means = {"exact": float(exact.mean()), "learned": float(learned.mean())}
    numbers = {"points": n, "tolerances": tolerances, "rms_error_nats": errors, "mean_log_likelihood_nats": means}
    numbers |= {"learned_rms_error_nats": rms(learned - exact)}
    return numbers | save(figure, out / "likelihood.png")


STEPS = (forward, learning, samplers, orders, corrector, encoding, likelihood)


def rounded(numbers: dict) -> dict:
    """Rounds to 4 significant digits, since the last digits differ between machines."""
    return json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.4g}"))


def run(out: Path) -> None:
    """Runs the steps and writes the record after each one."""
    make_folder(out)
    torch.set_num_threads(1)  # the tensors are small, and sums agree between machines
    scores, steps = {"exact": exact_score(DATA, VP), "learned": train(VP, TRAINING_POINTS, TRAIN_STEPS)}, {}
    for step in STEPS:
        started_at_seconds = time.perf_counter()
        steps[step.__name__] = rounded(step(scores, out))
        write_results(out / "tutorial.json", {"steps": steps})
        print(f"{step.__name__}: {time.perf_counter() - started_at_seconds:.0f} s", flush=True)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m experiments.sde_tutorial", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures and tutorial.json")
    return run_command(lambda: run(parser.parse_args(arguments).out), "stopped; finished steps are kept")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
