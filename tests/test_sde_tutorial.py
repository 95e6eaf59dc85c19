"""The SDE tutorial: its score compared with autograd, and a small complete run."""

import json
from pathlib import Path

import pytest
import torch

from experiments import sde_tutorial
from experiments.sde_tutorial import SDES, STEPS, main
from experiments.toys import eight_modes

COMMITTED = Path(__file__).resolve().parent.parent / "assets" / "sde" / "tutorial.json"


def test_score_is_the_gradient_of_the_log_density():
    marginal = eight_modes().at(SDES["VE"], torch.tensor(0.3, dtype=torch.float64))
    x = marginal.sample(50, torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(marginal.log_density(x).sum(), x)
    torch.testing.assert_close(marginal.score(x.detach()), expected)


def test_small_tutorial_confirms_the_theory(tmp_path, monkeypatch):
    small = {"PATHS": 4000, "TRAIN_STEPS": 1500, "SAMPLES": 2000, "SEEDS": 2, "BUDGETS": (20, 50), "POINTS": 200}
    for name, value in small.items():
        monkeypatch.setattr(sde_tutorial, name, value)
    assert main(["--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "tutorial.json").read_text())
    assert {path.name for path in tmp_path.glob("*.png")} == figures_of(record)
    steps = record["steps"]
    for name in SDES:  # paths follow the exact marginals
        assert max(steps["forward"][name].values()) < 1.5 * steps["forward"]["chance_level_95_percent"], name

    learning = steps["learning"]
    errors = dict(zip(learning["times"], learning["relative_rms_error"]["learned"], strict=True))
    assert errors[0.3981] < 0.1
    assert errors[0.1] < 0.4
    for kind in ("learned", "minimum of the loss on 2,000 points"):
        losses = zip(learning["denoising_loss"][kind], learning["denoising_loss"]["exact"], strict=True)
        assert all(loss > exact - 0.05 for loss, exact in losses), f"nothing is below the exact score's loss: {kind}"

    rows = {row["method"]: row for row in steps["samplers"]["table"] if row["score"] == "exact"}
    assert rows.pop("Langevin, one level")["mode_weight_error"] > 0.15
    for method, row in rows.items():
        assert row["sliced_wasserstein"] < 0.05, method
        assert row["mode_weight_error"] < 0.08, method
        assert row["evaluations"] in (99, 100) or method == "ODE, adaptive"

    orders = {name: line["order"] for name, line in steps["orders"].items() if name != "figure"}
    assert orders["Euler-Maruyama"] == pytest.approx(1, abs=0.1)
    assert orders["reverse diffusion"] == pytest.approx(1, abs=0.1)
    assert orders["Heun"] == pytest.approx(2, abs=0.2)
    assert orders["Dormand-Prince, adaptive"] > 4

    assert steps["encoding"]["rms_difference_of_codes"]["VE from VP, exact score"] < 0.01
    errors = steps["likelihood"]["rms_error_nats"]
    assert max(errors["VP"][-1], errors["sub-VP"][-1]) < 1e-3
    assert errors["VE"][-1] < 0.02  # its prior lacks the variance of the data
    mean = steps["likelihood"]["mean_log_likelihood_nats"]
    assert mean["exact"] - 3 < mean["learned"] < mean["exact"]


def test_committed_figures_match_the_record():
    record = json.loads(COMMITTED.read_text())
    assert list(record["steps"]) == [step.__name__ for step in STEPS]
    assert figures_of(record) == {path.name for path in COMMITTED.parent.glob("*.png")}


def figures_of(record: dict) -> set[str]:
    return {step["figure"] for step in record["steps"].values() if "figure" in step}
