"""The SDE tutorial: its data compared with autograd and torch, and a small complete run."""

import json
from pathlib import Path

import pytest
import torch

from experiments.sde_tutorial import SDES, STEPS, exact_score, log_likelihood, main
from experiments.toys import GaussianMixture, eight_modes

COMMITTED = Path(__file__).resolve().parent.parent / "assets" / "sde" / "tutorial.json"


def figures_of(record: dict) -> set[str]:
    return {step["figure"] for step in record["steps"].values() if "figure" in step}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    assert main(["--out", str(folder), "--quick"]) == 0
    record = json.loads((folder / "tutorial.json").read_text())
    assert {path.name for path in folder.glob("*.png")} == figures_of(record)
    return record["steps"]


def test_score_is_the_gradient_of_the_log_density():
    marginal = eight_modes().at(SDES["VE"], torch.tensor(0.3, dtype=torch.float64))
    x = marginal.sample(50, torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(marginal.log_density(x).sum(), x)
    torch.testing.assert_close(marginal.score(x.detach()), expected)


def test_log_density_and_cdf_match_torch():
    data = GaussianMixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [0.6]]).double(), 0.15)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)
    components = torch.distributions.Normal(data.means[:, 0], torch.tensor(0.15, dtype=torch.float64))
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(data.weights), components)
    torch.testing.assert_close(data.log_density(x[:, None]), mixture.log_prob(x))
    cdf = (components.cdf(x[:, None]) * data.weights).sum(1)
    torch.testing.assert_close(torch.from_numpy(data.cdf(x.numpy())), cdf)


def test_log_likelihood_of_a_gaussian_matches_its_density():
    data = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), 2.0)
    x = torch.tensor([[0.5, -1.0], [3.0, 0.1]], dtype=torch.float64)
    found = log_likelihood(SDES["VP"], exact_score(data, SDES["VP"]), x, 1e-6)
    torch.testing.assert_close(found, data.log_density(x), rtol=0, atol=2e-4)


def test_paths_match_the_exact_marginals(steps):
    forward = steps["forward"]
    for name in SDES:
        assert max(forward[name].values()) < 1.5 * forward["chance_level_95_percent"], name


def test_network_learns_the_score(steps):
    learning = steps["learning"]
    errors = dict(zip(learning["times"], learning["relative_rms_error"]["learned"], strict=True))
    assert errors[0.3981] < 0.1
    assert errors[0.1] < 0.4
    for kind in ("learned", "minimum of the loss on 2,000 points"):
        losses = zip(learning["denoising_loss"][kind], learning["denoising_loss"]["exact"], strict=True)
        assert all(loss > exact - 0.05 for loss, exact in losses), f"nothing is below the exact score's loss: {kind}"


def test_samplers_match_the_data_but_single_level_langevin_does_not(steps):
    rows = {row["method"]: row for row in steps["samplers"]["table"] if row["score"] == "exact"}
    plain = rows.pop("Langevin, one level")
    assert plain["mode_weight_error"] > 0.15
    for method, row in rows.items():
        assert row["sliced_wasserstein"] < 0.05, method
        assert row["mode_weight_error"] < 0.08, method
        assert row["evaluations"] in (99, 100) or method == "ODE, adaptive"


def test_measured_orders_match_theory(steps):
    orders = {name: line["order"] for name, line in steps["orders"].items() if name != "figure"}
    assert orders["Euler-Maruyama"] == pytest.approx(1, abs=0.1)
    assert orders["reverse diffusion"] == pytest.approx(1, abs=0.1)
    assert orders["Heun"] == pytest.approx(2, abs=0.2)
    assert orders["Dormand-Prince, adaptive"] > 4


def test_encodings_round_trip_and_likelihoods_are_accurate(steps):
    assert all(errors[-1] < 1e-3 for errors in steps["encoding"]["round_trip_rms_error"].values())
    assert steps["encoding"]["rms_difference_of_codes"]["VE from VP, exact score"] < 0.01
    errors = steps["likelihood"]["rms_error_nats"]
    assert max(errors["VP"][-1], errors["sub-VP"][-1]) < 1e-3
    assert errors["VE"][-1] < 0.02  # its prior lacks the variance of the data
    mean = steps["likelihood"]["mean_log_likelihood_nats"]
    assert mean["exact"] - 3 < mean["learned"] < mean["exact"]


def test_committed_figures_match_the_record():
    record = json.loads(COMMITTED.read_text())
    assert record["size"] == "full"
    assert list(record["steps"]) == [step.__name__ for step in STEPS]
    figures = figures_of(record)
    assert figures == {path.name for path in COMMITTED.parent.glob("*.png")}
    assert all((COMMITTED.parent / name).stat().st_size < 200_000 for name in figures)
