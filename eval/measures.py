"""The metrics of an evaluation. Each takes the `Evaluation`, yields its results and draws its figures."""

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy.stats import sem, wasserstein_distance

from common import InputError
from eval.colours import COLOURS, colour_statistics
from eval.distances import cmmd, frechet_distance, kernel_distance, prdc
from eval.evaluation import Evaluation, SamplerSetting
from eval.features import FeatureExtractor, cached_features
from eval.figures import plot_cost_curve, plot_curves, plot_histograms
from eval.heldout import SIGMAS, clean_image_errors, midpoint_timesteps
from eval.likelihood import VARIANCES, ode_likelihood, standard_error, variational_bound
from eval.memorisation import memorisation
from eval.results import result
from eval.swd import SMALLEST_RESOLUTION, pyramid_heights, sliced_wasserstein
from pipelines import CustomUNetPipeline
from training.data import to_model_range

PRDC = ("precision", "recall", "density", "coverage")
COST_METRICS = ("fid", "kid")  # measured, besides SWD and colours, if the first of the networks has them
SWD_NAME = {"swd": "SWD, mean"}
COLOUR_NAMES = {name: f"{name.capitalize()}, Wasserstein distance in grey levels" for name in COLOURS}


def check_metrics(evaluation: Evaluation) -> None:
    """Raises InputError if a metric lacks anything it needs, before any image is drawn."""
    options, metrics = evaluation.options, evaluation.options.metrics
    for name in ("memorisation", "heldout"):
        if name in metrics and evaluation.heldout is None:
            raise InputError(f"the metric {name} needs held-out images; give --heldout_split or other --metrics")
    if min(evaluation.pipeline.image_shape[1:]) < SMALLEST_RESOLUTION and not {"swd", "cost"}.isdisjoint(metrics):
        raise InputError(f"swd and cost need images of {SMALLEST_RESOLUTION} pixels; leave these metrics out")
    if "cost" in metrics and 2 * options.cost_images > len(evaluation.training):
        there = len(evaluation.training)
        raise InputError(f"--cost_images {options.cost_images} needs twice as many real images, but there are {there}")


# ---- Distances between images or their features and real ones: by metric, the `value` and how it was measured


def swd_distances(images: np.ndarray, real: np.ndarray) -> dict[str, dict]:
    levels = sliced_wasserstein(images, real)
    mean = {"swd": {"value": fmean(levels.values())}}
    return mean | {f"swd_{height}": {"value": distance} for height, distance in levels.items()}


def colour_distances(images: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, dict]:
    """From the `colour_statistics` of equally many images."""
    found = {}
    for name, values in images.items():
        facts = {"mean": values.mean(), "spread": values.std()}
        facts |= {"real_mean": real[name].mean(), "real_spread": real[name].std()}
        found[name] = {"value": wasserstein_distance(values, real[name])} | facts
    return found


def feature_distances(
    metrics: Iterable[str], features: np.ndarray, real: np.ndarray, extractor: FeatureExtractor, options: Namespace
) -> dict[str, dict]:
    """From features (N, D)."""
    found = {}
    if "fid" in metrics:
        found["fid"] = {"value": frechet_distance(real, features)}
    if "kid" in metrics:
        found["kid"] = kernel_distance(real, features, seed=options.seed)
    if "cmmd" in metrics:
        found["cmmd"] = {"value": cmmd(real, features)}
    if "precision" in metrics:
        values = prdc(real, features, k=options.k)
        found |= {name: {"value": value, "k": options.k} for name, value in values.items()}
    return {metric: values | _describe(extractor) for metric, values in found.items()}


def _results(
    family: str, names: dict[str, str], distances: dict[str, dict], floors: dict[str, dict] | None, about: dict
) -> Iterable[dict]:
    """One result for each metric in `names`; `floors` are the distances between real images, None if not known."""
    for metric, name in names.items():
        floor = floors and floors[metric]["value"]
        yield result(family, name, metric, floor=floor, **distances[metric], **about)


def measure_swd(evaluation: Evaluation) -> Iterable[dict]:
    n = min(evaluation.options.num_images, len(evaluation.training) // 2)
    height, width = evaluation.pipeline.image_shape[1:]
    levels = pyramid_heights(height, width)
    names = SWD_NAME | {f"swd_{level}": f"SWD, level {level}x{level * width // height}" for level in levels}
    real, others = evaluation.real(n)
    distances, floors = swd_distances(evaluation.generated[:n], real), swd_distances(others, real)
    yield from _results("swd", names, distances, floors, evaluation.about(n))


def measure_colours(evaluation: Evaluation) -> Iterable[dict]:
    n = evaluation.options.num_images
    generated, real, *others = map(colour_statistics, (evaluation.generated, *evaluation.real(n)))
    floors = colour_distances(others[0], real) if others else None
    yield from _results("colours", COLOUR_NAMES, colour_distances(generated, real), floors, evaluation.about(n))
    panels = {f"{name}, grey levels": {"generated": generated[name], "real": real[name]} for name in real}
    plot_histograms(panels, evaluation.out / "colours.png")


def feature_metrics(network: str) -> dict[str, str]:
    """The names in the tables of the metrics in a network's feature space, by metric.

    Args:
        network: `inception`, `inception:MODE`, `dinov2`, `clip` or any other name that `open_extractor` accepts.
    """
    if network == "clip":
        return {"cmmd": "CMMD"}
    name, _, mode = network.partition(":")
    if name == "inception":
        metrics = {"fid": f"FID ({mode or 'clean'})", "kid": f"KID ({mode or 'clean'})"}
        return metrics | ({} if mode else {key: f"{key.capitalize()}, Inception" for key in PRDC})
    label = {"dinov2": "DINOv2"}.get(network, Path(network).name)
    return {"fid": f"FD-{label}"} | {key: f"{key.capitalize()}, {label}" for key in PRDC}


def measure_features(evaluation: Evaluation) -> Iterable[dict]:
    """Computes the metrics in all feature spaces, on all processes."""
    options, n = evaluation.options, evaluation.options.num_images
    for network, extractor in evaluation.extractors.items():
        is_memorisation_measured = "memorisation" in options.metrics and network != "inception:legacy_tensorflow"
        stores = (evaluation.heldout, evaluation.training) if is_memorisation_measured else ()
        sets = evaluation.generated, *evaluation.real(n)
        generated, real, *others = (_features(evaluation, extractor, images) for images in sets)
        splits = [_features(evaluation, extractor, store.images) for store in stores]
        if not evaluation.state.is_main_process:
            continue
        names, how = feature_metrics(network), (real, extractor, options)
        floors = feature_distances(names, others[0], *how) if others else None
        distances = feature_distances(names, generated, *how)
        yield from _results("features", names, distances, floors, evaluation.about(n))
        if splits:
            yield from _memorisation_results(evaluation, (generated, *splits), _describe(extractor))


def _describe(extractor: FeatureExtractor) -> dict[str, str]:
    return {"mode": extractor.mode, "features": extractor.name, "features_sha256": extractor.sha256}


def _features(evaluation: Evaluation, extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
    return cached_features(images, extractor, evaluation.state, batch_size=evaluation.options.batch_size)


# ---- Memorisation


def measure_memorisation(evaluation: Evaluation) -> Iterable[dict]:
    """Measures memorisation in pixels; `measure_features` measures it in features."""
    images = evaluation.generated, evaluation.heldout.images, evaluation.training.images
    facts = {"mode": "pixels", "duplicate_distance": evaluation.options.duplicate_distance}
    yield from _memorisation_results(evaluation, images, facts)


def _memorisation_results(
    evaluation: Evaluation, sets: tuple[np.ndarray, np.ndarray, np.ndarray], facts: dict
) -> Iterable[dict]:
    """Results from generated, held-out and training images, or from their features."""
    features = facts.get("features")
    report = memorisation(*sets, duplicate_distance=facts.get("duplicate_distance", 0.0))
    unit, where = features or "grey levels", f", {features}" if features else ""
    distances = {"generated": report.distances, "held-out": report.heldout_distances}
    figure = evaluation.out / (f"memorisation_{Path(features).name}.png" if features else "memorisation.png")
    plot_histograms({f"distance to the nearest training image, {unit}": distances}, figure)
    about = evaluation.about(len(sets[0])) | facts | {"mirrored_too": features is None, "n_reference": len(sets[2])}
    about |= {"n_heldout": len(report.heldout_distances), "heldout_duplicates_left_out": report.num_heldout_duplicates}
    measured = {  # metric: its name, its value, and the value of a model that generalises perfectly
        "memorisation_ratio": ("Nearest training image, generated / held-out (median)", report.ratio, 1.0),
        "memorisation_share": ("Share nearer than any held-out image", *report.share_below_minimum),
        "memorisation_share_1": ("Share nearer than 99 % of held-out images", *report.share_below_percentile),
        "memorisation_control": ("Share nearest to a held-out image", *report.share_nearest_heldout),
    }
    own = {"memorisation_control": {"n_heldout": len(sets[1]), "std": report.std_share_nearest_heldout}}
    for metric, (name, value, expected) in measured.items():
        facts = about | own.get(metric, {})
        yield result("memorisation", f"{name}{where}", metric, value, floor=expected, **facts)
    name, pairs = f"Median distance of held-out images, {unit}", report.nearest_pairs
    yield result("memorisation", name, "heldout_distance", report.heldout_median, nearest_pairs=pairs, **about)


# ---- Likelihood and held-out errors


def measure_likelihood(evaluation: Evaluation) -> Iterable[dict]:
    """Measures the likelihood by the ODE and, for a model with discrete timesteps, also by the variational bound."""
    variances = () if evaluation.pipeline.is_continuous else VARIANCES
    options, model = evaluation.options, (evaluation.network, evaluation.pipeline.scheduler)
    of_ode, terms = evaluation.splits(options.ode_images), {}
    for kind, (images, about) in evaluation.splits(options.likelihood_images).items():
        for variance in variances:
            name, metric = f"Variational bound ({variance}), {kind}", f"bits_per_dim_bound_{variance}"
            bound = variational_bound(*model, images, num_evaluations=options.bound_evaluations, variance=variance)
            terms[f"{kind}, {variance}"] = bound.terms, None
            facts = {"decoder": float(bound.decoder.mean()), "prior": float(bound.prior.mean())}
            facts |= {"std": standard_error(bound.bits_per_dim), "network_evaluations": options.bound_evaluations}
            yield result("likelihood", name, metric, bound.bits_per_dim.mean(), unit="bits/dim", **facts, **about)
        name, metric = f"Probability-flow ODE, {kind}", "bits_per_dim_ode"
        if evaluation.no_ode is not None:
            yield result("likelihood", name, metric, None, reason=evaluation.no_ode)
            continue
        images, about = of_ode[kind]
        bits_per_dim, num_evaluations = ode_likelihood(*model, images, tolerance=options.ode_tolerance)
        facts = {"std": standard_error(bits_per_dim), "network_evaluations": num_evaluations}
        facts |= {"tolerance": options.ode_tolerance, "first_sigma": evaluation.noise_levels[0]}
        yield result("likelihood", name, metric, bits_per_dim.mean(), unit="bits/dim", **facts, **about)
    if terms:  # timesteps 1 to T as in the paper, starting with L_0
        timesteps = np.arange(1, len(evaluation.pipeline.scheduler.alphas_cumprod) + 1)
        labels = {"xlabel": "timestep, from 1", "ylabel": "term of the bound, bits/dim"}
        labels |= {"xscale": "log", "yscale": "log"}
        plot_curves(timesteps, terms, labels, evaluation.out / "bound_terms.png")


def measure_heldout(evaluation: Evaluation) -> Iterable[dict]:
    """Held-out errors by noise level and, for a model with discrete timesteps, also by timestep."""
    if not evaluation.pipeline.is_continuous:
        timesteps, sigmas = midpoint_timesteps(evaluation.pipeline.scheduler)
        yield from _heldout_errors(evaluation, sigmas, timesteps)
    yield from _heldout_errors(evaluation, SIGMAS)


def _heldout_errors(
    evaluation: Evaluation, sigmas: Sequence[float], timesteps: list[int] | None = None
) -> Iterable[dict]:
    """The errors of x_0 at ascending noise levels or, given their timesteps, the errors of the noise."""
    name, metric, levels = "Error of x_0, mean over log sigma", "sample_mse", {"sigmas": sigmas}
    file, axis = "denoising_error.png", {"xlabel": "noise level sigma", "xscale": "log"}
    if timesteps is not None:
        name, metric, levels = "Error of the noise, mean over timesteps", "epsilon_mse", {"timesteps": timesteps}
        file, axis = "heldout_loss.png", {"xlabel": "timestep"}
    curves, reason = {}, evaluation.no_ode
    if reason is None:
        low, high = evaluation.noise_levels
        if low > sigmas[0] * (1 + 1e-6) or high < sigmas[-1]:
            reason = f"the model was trained with noise levels from {low:.3g} to {high:.3g}, but models are compared"
            reason += f" at {sigmas[0]:g} to {sigmas[-1]:g}"
    for kind, (images, about) in evaluation.splits(evaluation.options.heldout_images).items():
        if reason is not None:
            yield result("heldout", f"{name}, {kind}", metric, None, reason=reason)
            continue
        model = evaluation.network, evaluation.pipeline.scheduler
        errors = clean_image_errors(*model, to_model_range(images), sigmas)
        errors_of_noise = errors / np.square(sigmas)[:, None]
        curves[kind] = errors_of_noise.mean(axis=1), sem(errors_of_noise, axis=1)
        errors = errors if timesteps is None else errors_of_noise
        facts = levels | {"curve": errors.mean(axis=1).tolist(), "std": standard_error(errors.mean(axis=0))}
        yield result("heldout", f"{name}, {kind}", metric, errors.mean(), **about | facts)
    if curves:
        labels = axis | {"ylabel": "mean squared error of the noise", "yscale": "log"}
        plot_curves(timesteps or sigmas, curves, labels, evaluation.out / file)


# ---- Cost


def measure_cost(evaluation: Evaluation) -> Iterable[dict]:
    """Measures each sampler: its quality, on all processes, and the network evaluations and seconds of one batch."""
    options, n, entries, floors = evaluation.options, evaluation.options.cost_images, [], None
    network, extractor = next(iter(evaluation.extractors.items()))
    metrics = {key: name for key, name in feature_metrics(network).items() if key in COST_METRICS}
    real, others = evaluation.real(n)
    real_features, other_features = (_features(evaluation, extractor, images) for images in (real, others))
    real_colours = colour_statistics(real)

    def distances(images: np.ndarray, features: np.ndarray) -> dict[str, dict]:
        in_pixels = swd_distances(images, real) | colour_distances(colour_statistics(images), real_colours)
        return in_pixels | feature_distances(metrics, features, real_features, extractor, options)

    for setting in evaluation.cost_settings:
        images, _, pipeline = evaluation.draw(setting, n)
        features = _features(evaluation, extractor, images)
        if not evaluation.state.is_main_process:
            continue
        if floors is None:
            floors = distances(others, other_features)
            _cost_of_one_batch(evaluation, pipeline, setting)  # warm-up: it also initialises the libraries
        about = evaluation.about(n, setting) | _cost_of_one_batch(evaluation, pipeline, setting)
        names = SWD_NAME | COLOUR_NAMES | metrics
        found = [*_results("cost", names, distances(images, features), floors, about)]
        entries += found
        yield from found
    if entries:
        plot_cost_curve(entries, evaluation.out / "cost.png")


def _cost_of_one_batch(evaluation: Evaluation, pipeline: CustomUNetPipeline, setting: SamplerSetting) -> dict:
    options = evaluation.options
    seeds = range(options.seed, options.seed + min(options.batch_size, options.cost_images))
    labels = options.class_label and [options.class_label[seed % len(options.class_label)] for seed in seeds]
    guidance = {"class_labels": labels, "guidance_scale": options.guidance_scale}
    how = {"num_inference_steps": setting.steps, "eta": setting.eta, "output_type": "pt"}
    started_at_seconds = time.perf_counter()
    output = pipeline(seeds=seeds, **how, **guidance)
    output.images.cpu()  # waits for the device
    seconds = (time.perf_counter() - started_at_seconds) / len(seeds)
    cost = {"network_evaluations": output.network_evaluations, "seconds_per_image": seconds}
    threads = {"num_cpu_threads": torch.get_num_threads()} if evaluation.state.device.type == "cpu" else {}
    return cost | {"batch_size": len(seeds)} | threads


METRICS = {
    "swd": measure_swd,
    "colours": measure_colours,
    "features": measure_features,
    "memorisation": measure_memorisation,
    "likelihood": measure_likelihood,
    "heldout": measure_heldout,
    "cost": measure_cost,
}
