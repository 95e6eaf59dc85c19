"""The metrics of an evaluation: each takes what it needs from it, yields its results and draws its figures."""

import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from common import InputError, on_main_process
from eval.colours import COLOURS, colour_distance, colour_statistics, share_of_extremes
from eval.distances import cmmd, frechet_distance, kernel_distance, prdc
from eval.encoders import open_extractor
from eval.evaluation import Evaluation, SamplerSetting
from eval.features import FeatureExtractor, ImageSet, cached_features, images_of_store
from eval.figures import plot_colours, plot_cost_curve, plot_curves, plot_nearest_distances
from eval.heldout import SIGMAS, denoising_curve, heldout_curve
from eval.likelihood import VARIANCES, VariationalBound, noise_levels, ode_likelihood, variational_bound
from eval.memorisation import memorisation
from eval.results import result
from eval.swd import sliced_wasserstein, swd_floor
from pipelines.custom_unet_pipeline import CustomUNetPipeline, denoiser
from pipelines.loading import load_pipeline
from training.data import ImageStore, to_model_range

PRDC = ("precision", "recall", "density", "coverage")
PUBLISHED = ("inception", "dinov2", "clip")  # feature extractors
COST_METRICS = ("fid", "kid")  # beside SWD and colours
LOG_LOG = {"xscale": "log", "yscale": "log"}
NO_BOUND = "the bound is of discrete timesteps, but the model was trained in continuous time"


def check_metrics(evaluation: Evaluation) -> None:
    """Checks that what the metrics need is there, before anything is drawn.

    Raises:
        InputError: if not.
    """
    options, metrics, num_real = evaluation.options, evaluation.options.metrics, len(evaluation.training)
    for name in {"memorisation", "heldout"}.intersection(metrics):
        if evaluation.heldout is None:
            raise InputError(f"the metric {name} needs held-out images; give --heldout_split or other --metrics")
    if "cost" in metrics and not evaluation.has_floor(options.cost_images):
        needed = 2 * options.cost_images
        raise InputError(f"--cost_images {options.cost_images} needs {needed} real images; there are {num_real}")
    if "features" in metrics and options.features is not None:
        for name in options.features:
            feature_space(name).open(evaluation)


# ---- In pixels


def measure_swd(evaluation: Evaluation) -> Iterable[dict]:
    n = min(evaluation.options.num_images, len(evaluation.training) // 2)
    distances = sliced_wasserstein(evaluation.generated[:n], evaluation.real(n))
    floors = swd_floor(evaluation.real(2 * n))
    about = evaluation.setting | evaluation.reference | {"n": n, "n_reference": n}
    yield result("swd", "SWD, mean", "swd", mean(distances), floor=mean(floors), **about)
    for level, distance in distances.items():
        name = f"SWD, level {level}x{level}"
        yield result("swd", name, f"swd_{level}", distance, floor=floors[level], **about)


def mean(distances: dict[int, float]) -> float:
    return sum(distances.values()) / len(distances)


def measure_colours(evaluation: Evaluation) -> Iterable[dict]:
    about = evaluation.setting | evaluation.reference
    real = colour_statistics(evaluation.real(evaluation.options.num_images))
    generated = colour_statistics(evaluation.generated)
    yield from _compare_colours("colours", evaluation, generated, real, about)
    plot_colours({"generated": generated, "real": real}, evaluation.out / "colours.png")


def _colour_name(name: str) -> str:
    return f"{name.capitalize()}, Wasserstein distance in grey levels"


def _compare_colours(
    family: str, evaluation: Evaluation, generated: dict[str, np.ndarray], real: dict[str, np.ndarray], about: dict
) -> Iterable[dict]:
    """Results from the `colour_statistics` of generated and of as many real images."""
    n = len(generated[COLOURS[0]])
    others = colour_statistics(evaluation.real(n, 1)) if evaluation.has_floor(n) else {}
    for name, values in generated.items():
        facts = {"n": n, "n_reference": n, "mean": float(values.mean()), "spread": float(values.std())}
        facts |= {"real_mean": float(real[name].mean()), "real_spread": float(real[name].std())}
        facts |= {"share_of_extremes": share_of_extremes(values, real[name]), "share_of_extremes_expected": 0.01}
        facts |= {"floor": colour_distance(others[name], real[name])} if others else {}
        yield result(family, _colour_name(name), name, colour_distance(values, real[name]), **facts, **about)


# ---- In feature spaces


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A network whose features are compared, and by what.

    Attributes:
        extractor: as `open_extractor` names it.
        mode: of Inception.
        metrics: fid, kid, cmmd, precision, ...: the name of each metric in the tables.
    """

    extractor: str
    mode: str | None
    metrics: dict[str, str]

    def open(self, evaluation: Evaluation) -> FeatureExtractor:
        """Raises InputError if its weights are not found."""
        key = self.extractor, self.mode or "clean"
        if key not in evaluation.extractors:
            path = getattr(evaluation.options, f"{self.extractor}_path", None)
            open_it = partial(open_extractor, key[0], mode=key[1], path=path, device=evaluation.state.device)
            if evaluation.state.num_processes > 1:
                on_main_process(evaluation.state, lambda: bool(open_it()))  # it alone downloads weights
            evaluation.extractors[key] = open_it()
        return evaluation.extractors[key]

    def measure(
        self, real: np.ndarray, generated: np.ndarray, evaluation: Evaluation
    ) -> dict[str, tuple[float, dict]]:
        """The value of each metric from features (N, D), and how it was measured."""
        found, options = {}, evaluation.options
        if "fid" in self.metrics:
            found["fid"] = frechet_distance(real, generated), {}
        if "kid" in self.metrics:
            value, std, num_subsets, subset_size = kernel_distance(real, generated, seed=options.seed)
            found["kid"] = value, {"std": std, "num_subsets": num_subsets, "subset_size": subset_size}
        if "cmmd" in self.metrics:
            found["cmmd"] = cmmd(real, generated), {}
        if "precision" in self.metrics:
            found |= {name: (value, {"k": options.k}) for name, value in prdc(real, generated, k=options.k).items()}
        return found


def feature_space(name: str) -> FeatureSpace:
    """The space of `inception`, `inception:MODE`, `dinov2`, `clip` or any other name that `open_extractor` takes."""
    if name == "clip":
        return FeatureSpace(name, None, {"cmmd": "CMMD"})
    if name.partition(":")[0] == "inception":
        mode = name.partition(":")[2] or "clean"
        metrics = {"fid": f"FID ({mode})", "kid": f"KID ({mode})"}
        if mode == "clean":
            metrics |= {key: f"{key.capitalize()}, Inception" for key in PRDC}
        return FeatureSpace("inception", mode, metrics)
    label = {"dinov2": "DINOv2"}.get(name, Path(name).name)
    return FeatureSpace(name, None, {"fid": f"FD-{label}"} | {key: f"{key.capitalize()}, {label}" for key in PRDC})


def measure_features(evaluation: Evaluation) -> Iterable[dict]:
    """All metrics in feature spaces, on all processes.

    Published networks whose weights are not found, if none was asked for by name, are reported as not measured.
    """
    options, n = evaluation.options, evaluation.options.num_images
    for space in map(feature_space, options.features or PUBLISHED):
        try:
            extractor = space.open(evaluation)
        except InputError as error:
            if options.features is not None:
                raise
            mode = {"mode": space.mode} if space.mode else {}
            reason = str(error).replace(str(Path.home()), "~")  # results are shared, with the model's card
            for metric, name in space.metrics.items():
                yield result("features", name, metric, None, reason=reason, **mode)
            continue
        generated = _features(evaluation, extractor, evaluation.generated_set)
        real = _features(evaluation, extractor, evaluation.real_set(n))
        others = _features(evaluation, extractor, evaluation.real_set(n, 1)) if evaluation.has_floor(n) else None
        if evaluation.state.is_main_process:
            floors = {} if others is None else space.measure(real, others, evaluation)
            about = evaluation.setting | evaluation.reference
            values = space.measure(real, generated, evaluation)
            yield from _compare_features("features", space, extractor, values, floors, about | {"n": n})
        if "memorisation" in options.metrics and space.mode != "legacy_tensorflow":
            training, heldout = (
                _features(evaluation, extractor, images_of_store(store))
                for store in (evaluation.training, evaluation.heldout)
            )
            facts = {"mode": extractor.mode, "features": extractor.name, "features_sha256": extractor.sha256}
            yield from _memorisation_results(evaluation, (generated, heldout, training), facts)


def _features(evaluation: Evaluation, extractor: FeatureExtractor, images: ImageSet) -> np.ndarray:
    return cached_features(images, extractor, evaluation.state, batch_size=evaluation.options.batch_size)


def _compare_features(
    family: str, space: FeatureSpace, extractor: FeatureExtractor, values: dict, floors: dict, about: dict
) -> Iterable[dict]:
    """The results of a space.

    Args:
        values, floors: by `FeatureSpace.measure`; floors may be empty.
        about: with `n`, the number of generated and of real images.
    """
    about = about | {"n_reference": about["n"], "features": extractor.name}
    about |= {"features_file": getattr(extractor, "file", None), "features_sha256": extractor.sha256}
    for metric, name in space.metrics.items():
        value, more = values[metric]
        floor = floors[metric][0] if floors else None
        yield result(family, name, metric, value, floor=floor, mode=extractor.mode, **about, **more)


# ---- Memorisation


def measure_memorisation(evaluation: Evaluation) -> Iterable[dict]:
    """In pixels; `measure_features` does it in features."""
    images = evaluation.generated, np.asarray(evaluation.heldout.images), evaluation.training.images
    facts = {"mode": "pixels", "duplicate_distance": evaluation.options.duplicate_distance}
    yield from _memorisation_results(evaluation, images, facts)


def _memorisation_results(
    evaluation: Evaluation, sets: tuple[np.ndarray, np.ndarray, np.ndarray], facts: dict
) -> Iterable[dict]:
    """From generated, held-out and training images or features."""
    features = facts.get("features")
    report = memorisation(*sets, duplicate_distance=facts.get("duplicate_distance", 0.0))
    unit, where = features or "grey levels", f", {features}" if features else ""
    if evaluation.state.is_main_process:
        counts = {"generated": report.generated_counts, "held-out": report.heldout_counts}
        figure = evaluation.out / (f"memorisation_{features}.png" if features else "memorisation.png")
        plot_nearest_distances(report.bin_edges, counts, unit, figure)
    about = evaluation.setting | evaluation.reference | facts | {"mirrored_too": report.mirror}
    about |= {"n": report.num_generated, "n_reference": report.num_training, "n_heldout": report.num_heldout}
    about |= {"heldout_duplicates_left_out": report.num_heldout_duplicates}
    values = {  # value and, for a model that generalises, what to expect
        "Nearest training image, generated / held-out (median)": ("memorisation_ratio", report.ratio, 1.0),
        "Share nearer than any held-out image": ("memorisation_share", *report.share_below_heldout_minimum),
        "Share nearer than 99 % of held-out images": (
            "memorisation_share_1",
            *report.share_below_heldout_percentile,
        ),
    }
    for name, (metric, value, expected) in values.items():
        yield result("memorisation", f"{name}{where}", metric, value, floor=expected, **about)
    value, expected = report.share_nearest_heldout
    control = about | {"n_heldout": report.num_heldout + report.num_heldout_duplicates}
    control |= {"floor": expected, "std": report.std_share_nearest_heldout}
    yield result("memorisation", f"Share nearest to a held-out image{where}", "memorisation_control", value, **control)
    name, nearest = f"Median distance of held-out images, {unit}", [pair._asdict() for pair in report.pairs]
    yield result("memorisation", name, "heldout_distance", report.heldout_median, nearest_pairs=nearest, **about)


# ---- Likelihood and held-out errors


def why_no_ode(evaluation: Evaluation) -> str | None:
    """Why the model has no predictions in continuous time; None if it has."""
    try:
        denoiser(evaluation.network, evaluation.pipeline.scheduler)
    except ValueError as error:
        return str(error)
    return None


def measure_likelihood(evaluation: Evaluation) -> Iterable[dict]:
    no_ode, terms = why_no_ode(evaluation), {}
    for kind, store in {"training": evaluation.training, "held-out": evaluation.heldout}.items():
        if store is None:
            continue
        about = {"unit": "bits/dim", "split": store.description["split"]}
        about |= {key: evaluation.reference[key] for key in ("dataset", "crop", "resolution")}
        for variance in VARIANCES:
            name, metric = f"Variational bound ({variance}), {kind}", f"bits_per_dim_bound_{variance}"
            if evaluation.pipeline.is_continuous:
                yield result("likelihood", name, metric, None, reason=NO_BOUND)
            else:
                bound = _bound(evaluation, store, variance)
                terms[f"{kind}, {variance}"] = bound.terms, None
                facts = {"std": bound.standard_error, "n": len(bound.bits_per_dim)}
                facts |= {"decoder": float(bound.decoder.mean()), "prior": float(bound.prior.mean())}
                facts["network_evaluations"] = bound.num_evaluations
                yield result("likelihood", name, metric, bound.mean, **facts, **about)
        name = f"Probability-flow ODE, {kind}"
        if no_ode is None:
            ode, facts = _ode(evaluation, store)
            yield result("likelihood", name, "bits_per_dim_ode", ode, **facts, **about)
        else:
            yield result("likelihood", name, "bits_per_dim_ode", None, reason=no_ode)
    if terms:  # of timesteps 1 to T as in the paper, the first of them L_0
        timesteps = np.arange(1, len(evaluation.pipeline.scheduler.alphas_cumprod) + 1)
        labels = {"xlabel": "timestep, from 1", "ylabel": "term of the bound, bits/dim"}
        plot_curves(timesteps, terms, labels | LOG_LOG, evaluation.out / "bound_terms.png")


def _bound(evaluation: Evaluation, store: ImageStore, variance: str) -> VariationalBound:
    options, images = evaluation.options, evaluation.tensors(store, evaluation.options.likelihood_images)
    unet, scheduler = evaluation.network, evaluation.pipeline.scheduler
    return variational_bound(unet, scheduler, images, num_evaluations=options.bound_evaluations, variance=variance)


def _ode(evaluation: Evaluation, store: ImageStore) -> tuple[float, dict]:
    """Bits/dim, and how they were measured."""
    options, unet, scheduler = evaluation.options, evaluation.network, evaluation.pipeline.scheduler
    images = evaluation.tensors(store, options.ode_images)
    ode = ode_likelihood(unet, scheduler, images, num_draws=options.ode_draws, tolerance=options.ode_tolerance)
    facts = {"std": ode.standard_error, "n": len(images), "draws": options.ode_draws}
    facts["draw_standard_error"] = ode.draw_standard_error if options.ode_draws > 1 else None
    facts |= {"tolerance": options.ode_tolerance, "network_evaluations": ode.num_evaluations}
    return ode.mean, facts | {"first_sigma": noise_levels(denoiser(unet, scheduler)[0])[0]}


def measure_heldout(evaluation: Evaluation) -> Iterable[dict]:
    """Against the noise level, and for a model with discrete timesteps against these too."""
    images, about = {}, {}
    for kind, store in {"training": evaluation.training, "held-out": evaluation.heldout}.items():
        images[kind] = to_model_range(evaluation.tensors(store, evaluation.options.heldout_images))
        about[kind] = {key: evaluation.reference[key] for key in ("dataset", "crop", "resolution")}
        about[kind] |= {"split": store.description["split"], "n": len(images[kind])}
    if not evaluation.pipeline.is_continuous:
        yield from _errors_by_timestep(evaluation, images, about)
    yield from _errors_by_noise_level(evaluation, images, about)


def _errors_by_timestep(evaluation: Evaluation, images: dict[str, Tensor], about: dict) -> Iterable[dict]:
    found = {kind: heldout_curve(evaluation.network, evaluation.pipeline.scheduler, images[kind]) for kind in images}
    for kind, curve in found.items():
        more = about[kind] | {"timesteps": curve.x.tolist(), "curve": curve.mse.tolist()}
        name = f"Error of the noise, mean over timesteps, {kind}"
        yield result("heldout", name, "epsilon_mse", float(curve.mse.mean()), **more)
    labels = {"xlabel": "timestep", "ylabel": "mean squared error of the noise", "yscale": "log"}
    curves = {kind: (curve.mse, curve.mse_standard_error) for kind, curve in found.items()}
    plot_curves(found["training"].x, curves, labels, evaluation.out / "heldout_loss.png")


def _errors_by_noise_level(evaluation: Evaluation, images: dict[str, Tensor], about: dict) -> Iterable[dict]:
    unet, scheduler, reason = evaluation.network, evaluation.pipeline.scheduler, why_no_ode(evaluation)
    if reason is None:
        low, high = noise_levels(denoiser(unet, scheduler)[0])
        if not low <= SIGMAS[0] * (1 + 1e-6) or not SIGMAS[-1] <= high:
            reason = (
                f"the model was trained with noise levels from {low:.3g} to {high:.3g}, and models are compared at"
                f" {SIGMAS[0]:g} to {SIGMAS[-1]:g}"
            )
    curves = {}
    for kind in images:
        name = f"Error of x_0, mean over log sigma, {kind}"
        if reason is not None:
            yield result("heldout", name, "sample_mse", None, reason=reason)
            continue
        curve = denoising_curve(unet, scheduler, images[kind])
        curves[kind] = (curve.mse / curve.x**2, curve.mse_standard_error / curve.x**2)
        more = about[kind] | {"std": curve.standard_error, "sigmas": curve.x.tolist(), "curve": curve.mse.tolist()}
        yield result("heldout", name, "sample_mse", curve.mean, **more)
    if curves:
        labels = {"xlabel": "noise level sigma", "ylabel": "mean squared error of the noise"}
        plot_curves(np.array(SIGMAS), curves, labels | LOG_LOG, evaluation.out / "denoising_error.png")


# ---- Cost


def measure_cost(evaluation: Evaluation) -> Iterable[dict]:
    """Quality of each sampler, on all processes, beside network evaluations and seconds of one batch."""
    options, state, n = evaluation.options, evaluation.state, evaluation.options.cost_images
    space, extractor = _cost_features(evaluation)
    names = {"SWD, mean", *map(_colour_name, COLOURS), *space.metrics.values()}
    entries, floors, floor, pipeline, real_features = [], {}, None, None, None
    for setting in evaluation.cost_settings:
        about = evaluation.describe(setting, n) | evaluation.reference
        found = on_main_process(state, partial(evaluation.measured_before, "cost", about | {"n": n}))
        if names <= {entry["name"] for entry in found}:
            if state.is_main_process:
                print(f"cost: {setting} was measured by an earlier start", flush=True)
        else:
            images, _ = evaluation.draw(setting, n)
            if extractor and real_features is None:
                real_features, others = (_features(evaluation, extractor, evaluation.real_set(n, i)) for i in (0, 1))
                floors = space.measure(real_features, others, evaluation)
            features = _features(evaluation, extractor, images) if extractor else None
            if not state.is_main_process:
                continue
            if pipeline is None:
                pipeline = load_pipeline(evaluation.source, options.dtype, None).to(state.device)
                floor = mean(swd_floor(evaluation.real(2 * n)))
                _cost_of_one_batch(evaluation, pipeline, setting)  # the first one also sets the libraries up
            about |= _cost_of_one_batch(evaluation, pipeline, setting)
            pixels, real = images.read(range(n)), evaluation.real(n)
            distance = mean(sliced_wasserstein(pixels, real))
            found = [result("cost", "SWD, mean", "swd", distance, floor=floor, n=n, n_reference=n, **about)]
            colours = colour_statistics(pixels), colour_statistics(real)
            found += _compare_colours("cost", evaluation, *colours, about)
            if extractor:
                values = space.measure(real_features, features, evaluation)
                found += _compare_features("cost", space, extractor, values, floors, about | {"n": n})
        entries += found
        yield from found
    if state.is_main_process:
        plot_cost_curve(entries, evaluation.out / "cost.png")


def _cost_features(evaluation: Evaluation) -> tuple[FeatureSpace, FeatureExtractor | None]:
    """The first of the feature spaces and its network; None, and no metrics, if its weights are not found."""
    options = evaluation.options
    space = feature_space((options.features or PUBLISHED)[0])
    space = dataclasses.replace(space, metrics={k: v for k, v in space.metrics.items() if k in COST_METRICS})
    try:
        return space, space.open(evaluation)
    except InputError as error:
        if options.features is not None:
            raise
        print(f"cost: FID and KID are not measured: {error}", flush=True)
        return dataclasses.replace(space, metrics={}), None


def _cost_of_one_batch(evaluation: Evaluation, pipeline: CustomUNetPipeline, setting: SamplerSetting) -> dict:
    options, arguments = evaluation.options, setting.set_on(pipeline)
    seeds = range(options.seed, options.seed + min(options.batch_size, options.cost_images))
    if options.class_label is not None:
        labels = [options.class_label[seed % len(options.class_label)] for seed in seeds]
        arguments |= {"class_labels": labels, "guidance_scale": options.guidance_scale}
    started_at_seconds = time.perf_counter()
    output = pipeline(seeds=seeds, output_type="pt", **arguments)
    output.images.cpu()  # waits for the device
    seconds = (time.perf_counter() - started_at_seconds) / len(seeds)
    cost = {"network_evaluations": output.network_evaluations, "seconds_per_image": seconds}
    return cost | {"batch_size": len(seeds)} | evaluation.threads


METRICS = {
    "swd": measure_swd,
    "colours": measure_colours,
    "features": measure_features,
    "memorisation": measure_memorisation,
    "likelihood": measure_likelihood,
    "heldout": measure_heldout,
    "cost": measure_cost,
}
