"""The metrics of an evaluation: each takes what it needs from it, yields its results and draws its figures."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from common import InputError, on_main_process
from eval.colours import COLOURS, colour_distance, colour_statistics, share_of_extremes
from eval.cost import SamplerSetting, sample
from eval.distances import cmmd, frechet_distance, kernel_distance, prdc
from eval.encoders import open_extractor
from eval.evaluation import Evaluation
from eval.features import FeatureExtractor, ImageSet, cached_features, images_of_store
from eval.figures import plot_colours, plot_cost_curve, plot_curves, plot_nearest_distances
from eval.heldout import SIGMAS, denoising_curve, heldout_curve
from eval.likelihood import VARIANCES, noise_levels, ode_likelihood, variational_bound
from eval.memorisation import MemorisationReport, memorisation
from eval.results import result
from eval.swd import sliced_wasserstein, swd_floor
from pipelines.custom_unet_pipeline import CustomUNetPipeline, denoiser
from pipelines.loading import load_pipeline
from training.data import to_model_range


def check_metrics(evaluation: Evaluation) -> None:
    """Whether what the metrics need is there, before anything is drawn.

    Raises:
        InputError: if not.
    """
    options, metrics, num_real = evaluation.options, evaluation.options.metrics, len(evaluation.training)
    for name in {"memorisation", "heldout"}.intersection(metrics):
        if evaluation.heldout is None:
            raise InputError(f"the metric {name} needs held-out images; give --heldout_split or other --metrics")
    if "cost" in metrics:
        if not evaluation.has_floor(options.cost_images):
            needed = 2 * options.cost_images
            raise InputError(f"--cost_images {options.cost_images} needs {needed} real images; there are {num_real}")
        for setting in evaluation.cost_settings:
            evaluation.set_sampler(setting)
        evaluation.set_sampler(evaluation.sampler_setting)
    if "features" in metrics and options.features is not None:
        for name in options.features:
            _open(feature_space(name), evaluation)


def measure_swd(evaluation: Evaluation) -> Iterable[dict]:
    n = min(evaluation.options.num_images, len(evaluation.training) // 2)
    distances = sliced_wasserstein(evaluation.generated[:n], evaluation.real(n))
    floors = swd_floor(evaluation.real(2 * n))
    about = evaluation.setting | evaluation.reference | {"n": n, "n_reference": n}
    yield result("swd", "SWD, mean", "swd", mean(distances), floor=mean(floors), **about)
    for level, distance in distances.items():
        name = f"SWD, level {level}x{level}"
        yield result("swd", name, f"swd_{level}", distance, floor=floors[level], **about)


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
        yield result(
            family,
            _colour_name(name),
            name,
            colour_distance(values, real[name]),
            floor=colour_distance(others[name], real[name]) if others else None,
            n=n,
            n_reference=n,
            mean=float(values.mean()),
            spread=float(values.std()),
            real_mean=float(real[name].mean()),
            real_spread=float(real[name].std()),
            share_of_extremes=share_of_extremes(values, real[name]),
            share_of_extremes_expected=0.01,
            **about,
        )


PRDC = ("precision", "recall", "density", "coverage")


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A network whose features are compared, and by what.

    Attributes:
        extractor: as `open_extractor` names it.
        mode: of Inception.
        metrics: name in the tables of each metric: fid, kid, cmmd, precision, ...
    """

    extractor: str
    mode: str | None
    metrics: dict[str, str]


def feature_space(name: str) -> FeatureSpace:
    """The space of `inception`, `inception:MODE`, `dinov2`, `clip` or what else `open_extractor` takes."""
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


PUBLISHED = ("inception", "dinov2", "clip")


def measure_features(evaluation: Evaluation) -> Iterable[dict]:
    """All metrics in feature spaces, on all processes.

    Of the published networks that have no weights here, when none was asked for by name, it is said that they were
    not measured.
    """
    options = evaluation.options
    for space in map(feature_space, options.features or PUBLISHED):
        try:
            extractor = _open(space, evaluation)
        except InputError as error:
            if options.features is not None:
                raise
            mode = {"mode": space.mode} if space.mode else {}
            reason = str(error).replace(str(Path.home()), "~")  # results are shared, with the model's card
            for metric, name in space.metrics.items():
                yield result("features", name, metric, None, reason=reason, **mode)
        else:
            yield from _compare(evaluation, space, extractor)


def _open(space: FeatureSpace, evaluation: Evaluation) -> FeatureExtractor:
    key = space.extractor, space.mode or "clean"
    if key not in evaluation.extractors:
        open_it = partial(
            open_extractor,
            space.extractor,
            mode=key[1],
            path=getattr(evaluation.options, f"{space.extractor}_path", None),
            device=evaluation.state.device,
        )
        if evaluation.state.num_processes > 1:
            on_main_process(evaluation.state, lambda: bool(open_it()))  # it alone fetches weights
        evaluation.extractors[key] = open_it()
    return evaluation.extractors[key]


def _features(evaluation: Evaluation, extractor: FeatureExtractor, images: ImageSet) -> np.ndarray:
    return cached_features(images, extractor, evaluation.state, batch_size=evaluation.options.batch_size)


def _compare(evaluation: Evaluation, space: FeatureSpace, extractor: FeatureExtractor) -> Iterable[dict]:
    n, about = evaluation.options.num_images, evaluation.setting | evaluation.reference
    generated = _features(evaluation, extractor, evaluation.generated_set)
    real = _features(evaluation, extractor, evaluation.real_set(n))
    others = _features(evaluation, extractor, evaluation.real_set(n, 1)) if evaluation.has_floor(n) else None
    if evaluation.state.is_main_process:
        floors = {} if others is None else _feature_metrics(space, real, others, evaluation)
        yield from _compare_features("features", evaluation, space, extractor, (generated, real), floors, about)
    if "memorisation" in evaluation.options.metrics and space.mode != "legacy_tensorflow":
        yield from _memorisation_in_features(evaluation, extractor, generated)


def _compare_features(
    family: str,
    evaluation: Evaluation,
    space: FeatureSpace,
    extractor: FeatureExtractor,
    features: tuple[np.ndarray, np.ndarray],
    floors: dict[str, tuple[float, dict]],
    about: dict,
) -> Iterable[dict]:
    """The metrics of a space.

    Args:
        features: of the generated images, and of as many real ones.
        floors: `_feature_metrics` of real against real images, if there are enough.
    """
    generated, real = features
    values = _feature_metrics(space, real, generated, evaluation)
    about = about | {"n": len(generated), "n_reference": len(real)}
    about |= {"features": extractor.name, "features_file": getattr(extractor, "file", None)}
    about |= {"features_sha256": extractor.sha256, "mode": extractor.mode}
    for metric, name in space.metrics.items():
        value, more = values[metric]
        yield result(family, name, metric, value, floor=floors[metric][0] if floors else None, **about, **more)


def _feature_metrics(
    space: FeatureSpace, real: np.ndarray, generated: np.ndarray, evaluation: Evaluation
) -> dict[str, tuple[float, dict]]:
    """The value of each metric of the space, and how it was got."""
    found, options = {}, evaluation.options
    if "fid" in space.metrics:
        found["fid"] = frechet_distance(real, generated), {}
    if "kid" in space.metrics:
        value, std, num_subsets, subset_size = kernel_distance(real, generated, seed=options.seed)
        found["kid"] = value, {"std": std, "num_subsets": num_subsets, "subset_size": subset_size}
    if "cmmd" in space.metrics:
        found["cmmd"] = cmmd(real, generated), {}
    if "precision" in space.metrics:
        found |= {name: (value, {"k": options.k}) for name, value in prdc(real, generated, k=options.k).items()}
    return found


def measure_memorisation(evaluation: Evaluation) -> Iterable[dict]:
    """In pixels; `measure_features` does it in features."""
    duplicate_distance = evaluation.options.duplicate_distance
    report = memorisation(
        evaluation.generated,
        np.asarray(evaluation.heldout.images),
        evaluation.training.images,
        duplicate_distance=duplicate_distance,
    )
    about = {"mode": "pixels", "duplicate_distance": duplicate_distance}
    yield from _memorisation_results(evaluation, report, "grey levels", "memorisation.png", about)


def _memorisation_in_features(evaluation: Evaluation, extractor: FeatureExtractor, generated: np.ndarray):
    training, heldout = (
        cached_features(images_of_store(store), extractor, evaluation.state, batch_size=evaluation.options.batch_size)
        for store in (evaluation.training, evaluation.heldout)
    )
    report = memorisation(generated, heldout, training)
    about = {"mode": extractor.mode, "features": extractor.name, "features_sha256": extractor.sha256}
    yield from _memorisation_results(evaluation, report, extractor.name, f"memorisation_{extractor.name}.png", about)


def _memorisation_results(evaluation: Evaluation, report: MemorisationReport, space: str, figure: str, about: dict):
    if evaluation.state.is_main_process:
        plot_nearest_distances(
            report.bin_edges,
            {"generated": report.generated_counts, "held-out": report.heldout_counts},
            space,
            evaluation.out / figure,
        )
    about = evaluation.setting | evaluation.reference | about | {"mirrored_too": report.mirror}
    about |= {"n": report.num_generated, "n_reference": report.num_training, "n_heldout": report.num_heldout}
    about |= {"heldout_duplicates_left_out": report.num_heldout_duplicates}
    nearest = [pair._asdict() for pair in report.pairs]
    rows = {
        "Nearest training image, generated / held-out (median)": ("memorisation_ratio", report.ratio, 1.0),
        "Share nearer than any held-out image": (
            "memorisation_share",
            report.share_below_heldout_minimum,
            report.expected_share_below_heldout_minimum,
        ),
        "Share nearer than 99 % of held-out images": (
            "memorisation_share_1",
            report.share_below_heldout_percentile_1,
            0.01,
        ),
    }
    where = f", {about['features']}" if "features" in about else ""
    for name, (metric, value, expected) in rows.items():
        yield result("memorisation", f"{name}{where}", metric, value, floor=expected, **about)
    yield result(
        "memorisation",
        f"Share nearest to a held-out image{where}",
        "memorisation_control",
        report.share_nearest_heldout,
        floor=report.expected_share_nearest_heldout,
        std=report.std_share_nearest_heldout,
        **about | {"n_heldout": report.num_heldout + report.num_heldout_duplicates},
    )
    yield result(
        "memorisation",
        f"Median distance of held-out images, {space}",
        "heldout_distance",
        report.heldout_median,
        nearest_pairs=nearest,
        **about,
    )


def why_no_ode(evaluation: Evaluation) -> str | None:
    """Why the model has no predictions in continuous time; None if it has."""
    try:
        denoiser(evaluation.network, evaluation.pipeline.scheduler)
    except ValueError as error:
        return str(error)
    return None


def measure_likelihood(evaluation: Evaluation) -> Iterable[dict]:
    options, scheduler = evaluation.options, evaluation.pipeline.scheduler
    unet, no_ode = evaluation.network, why_no_ode(evaluation)
    about = {"unit": "bits/dim"} | {key: evaluation.reference[key] for key in ("dataset", "crop", "resolution")}
    splits = {"training": evaluation.training} | ({"held-out": evaluation.heldout} if evaluation.heldout else {})
    curves = {}
    for kind, store in splits.items():
        images = evaluation.tensors(store, options.likelihood_images)
        for variance in VARIANCES:
            name, metric = f"Variational bound ({variance}), {kind}", f"bits_per_dim_bound_{variance}"
            if evaluation.pipeline.is_continuous:
                yield result("likelihood", name, metric, None, reason=NO_BOUND)
                continue
            bound = variational_bound(
                unet, scheduler, images, num_evaluations=options.bound_evaluations, variance=variance
            )
            curves[f"{kind}, {variance}"] = (bound.terms[1:], None)
            yield result(
                "likelihood",
                name,
                metric,
                bound.mean,
                std=bound.standard_error,
                n=len(images),
                split=store.description["split"],
                decoder=float(bound.decoder.mean()),
                prior=float(bound.prior.mean()),
                network_evaluations=bound.num_evaluations,
                **about,
            )
        if no_ode is not None:
            yield result("likelihood", f"Probability-flow ODE, {kind}", "bits_per_dim_ode", None, reason=no_ode)
            continue
        images = evaluation.tensors(store, options.ode_images)
        ode = ode_likelihood(unet, scheduler, images, num_draws=options.ode_draws, tolerance=options.ode_tolerance)
        yield result(
            "likelihood",
            f"Probability-flow ODE, {kind}",
            "bits_per_dim_ode",
            ode.mean,
            std=ode.standard_error,
            n=len(images),
            split=store.description["split"],
            draws=options.ode_draws,
            draw_standard_error=ode.draw_standard_error if options.ode_draws > 1 else None,
            tolerance=options.ode_tolerance,
            first_sigma=noise_levels(denoiser(unet, scheduler)[0])[0],
            network_evaluations=ode.num_evaluations,
            **about,
        )
    if not curves:
        return
    timesteps = np.arange(1, len(next(iter(curves.values()))[0]) + 1)
    plot_curves(
        timesteps,
        curves,
        {"xlabel": "timestep", "ylabel": "term of the bound, bits/dim", "yscale": "log", "xscale": "log"},
        evaluation.out / "bound_terms.png",
    )


def measure_heldout(evaluation: Evaluation) -> Iterable[dict]:
    """Against the noise level, and for a model with discrete timesteps against these too."""
    count = evaluation.options.heldout_images
    about = {key: evaluation.reference[key] for key in ("dataset", "crop", "resolution")}
    sets = {
        kind: (to_model_range(evaluation.tensors(store, count)), about | {"split": store.description["split"]})
        for kind, store in {"training": evaluation.training, "held-out": evaluation.heldout}.items()
    }
    if not evaluation.pipeline.is_continuous:
        yield from _errors_by_timestep(evaluation, sets)
    yield from _errors_by_noise_level(evaluation, sets)


def _errors_by_timestep(evaluation: Evaluation, sets: dict) -> Iterable[dict]:
    curves = {}
    for kind, (images, about) in sets.items():
        curve = heldout_curve(evaluation.network, evaluation.pipeline.scheduler, images)
        curves[kind] = (curve.epsilon_mse, curve.epsilon_standard_error)
        yield result(
            "heldout",
            f"Error of the noise, mean over timesteps, {kind}",
            "epsilon_mse",
            float(curve.epsilon_mse.mean()),
            n=len(images),
            timesteps=curve.timesteps.tolist(),
            curve=curve.epsilon_mse.tolist(),
            **about,
        )
    labels = {"xlabel": "timestep", "ylabel": "mean squared error of the noise", "yscale": "log"}
    plot_curves(curve.timesteps, curves, labels, evaluation.out / "heldout_loss.png")


def _errors_by_noise_level(evaluation: Evaluation, sets: dict) -> Iterable[dict]:
    curves, reason = {}, why_no_ode(evaluation)
    if reason is None:
        low, high = noise_levels(denoiser(evaluation.network, evaluation.pipeline.scheduler)[0])
        if not low <= SIGMAS[0] * (1 + 1e-6) or not SIGMAS[-1] <= high:
            reason = (
                f"the model was trained with noise levels from {low:.3g} to {high:.3g}, and models are compared at"
                f" {SIGMAS[0]:g} to {SIGMAS[-1]:g}"
            )
    for kind, (images, about) in sets.items():
        name = f"Error of x_0, mean over log sigma, {kind}"
        if reason is not None:
            yield result("heldout", name, "sample_mse", None, reason=reason)
            continue
        curve = denoising_curve(evaluation.network, evaluation.pipeline.scheduler, images)
        curves[kind] = (curve.epsilon_mse, curve.sample_standard_error / curve.sigmas**2)
        yield result(
            "heldout",
            name,
            "sample_mse",
            curve.mean,
            std=curve.standard_error,
            n=len(images),
            sigmas=curve.sigmas.tolist(),
            curve=curve.sample_mse.tolist(),
            **about,
        )
    if curves:
        labels = {"xlabel": "noise level sigma", "ylabel": "mean squared error of the noise"}
        scales = {"xscale": "log", "yscale": "log"}
        plot_curves(curve.sigmas, curves, labels | scales, evaluation.out / "denoising_error.png")


COST_METRICS = ("fid", "kid")  # beside SWD and colours


def measure_cost(evaluation: Evaluation) -> Iterable[dict]:
    """Quality of each sampler, on all processes, beside network evaluations and seconds of one batch."""
    options, state, n = evaluation.options, evaluation.state, evaluation.options.cost_images
    space, extractor = _cost_features(evaluation)
    names = {"SWD, mean", *map(_colour_name, COLOURS), *space.metrics.values()}
    entries, floors, swd_floor_of_n, pipeline, real_features = [], {}, None, None, None
    for setting in evaluation.cost_settings:
        about = evaluation.describe(setting, n) | evaluation.reference | {"n": n}
        found = on_main_process(state, partial(evaluation.measured_before, "cost", about))
        if names <= {entry["name"] for entry in found}:
            if state.is_main_process:
                print(f"cost: {setting} was measured by an earlier start", flush=True)
        else:
            images, _ = evaluation.draw(setting, n)
            if extractor and real_features is None:
                real_features, others = (_features(evaluation, extractor, evaluation.real_set(n, i)) for i in (0, 1))
                floors = _feature_metrics(space, real_features, others, evaluation)
            features = _features(evaluation, extractor, images) if extractor else None
            if not state.is_main_process:
                continue
            if pipeline is None:
                pipeline = load_pipeline(evaluation.source, options.dtype, None).to(state.device)
                swd_floor_of_n = mean(swd_floor(evaluation.real(2 * n)))
                _cost_of_one_batch(evaluation, pipeline, setting)  # the first one also sets the libraries up
            about |= _cost_of_one_batch(evaluation, pipeline, setting)
            pixels, real = images.read(range(n)), evaluation.real(n)
            distance = mean(sliced_wasserstein(pixels, real))
            found = [result("cost", "SWD, mean", "swd", distance, floor=swd_floor_of_n, n_reference=n, **about)]
            del about["n"]
            colours = colour_statistics(pixels), colour_statistics(real)
            found += _compare_colours("cost", evaluation, *colours, about)
            if extractor:
                sets = features, real_features
                found += _compare_features("cost", evaluation, space, extractor, sets, floors, about)
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
        return space, _open(space, evaluation)
    except InputError as error:
        if options.features is not None:
            raise
        print(f"cost: FID and KID are not measured: {error}", flush=True)
        return dataclasses.replace(space, metrics={}), None


def _cost_of_one_batch(evaluation: Evaluation, pipeline: CustomUNetPipeline, setting: SamplerSetting) -> dict:
    options, classes = evaluation.options, {}
    seeds = range(options.seed, options.seed + min(options.batch_size, options.cost_images))
    if options.class_label is not None:
        labels = [options.class_label[seed % len(options.class_label)] for seed in seeds]
        classes = {"class_labels": labels, "guidance_scale": options.guidance_scale}
    _, evaluations, seconds = sample(pipeline, setting, seeds, len(seeds), **classes)
    cost = {"network_evaluations": evaluations, "seconds_per_image": seconds, "batch_size": len(seeds)}
    return cost | evaluation.threads


NO_BOUND = "the bound is of discrete timesteps, but the model was trained in continuous time"


def mean(distances: dict[int, float]) -> float:
    return sum(distances.values()) / len(distances)


METRICS = {
    "swd": measure_swd,
    "colours": measure_colours,
    "features": measure_features,
    "memorisation": measure_memorisation,
    "likelihood": measure_likelihood,
    "heldout": measure_heldout,
    "cost": measure_cost,
}
