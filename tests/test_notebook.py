"""`docs/from_noise_to_faces.ipynb`: cells and solutions run, claims hold, outputs are clean."""

import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from eval.distances import frechet_distance

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "from_noise_to_faces.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SOLUTION = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """The names defined by the cells and the solutions, run from top to bottom with few steps."""
    names = {"__name__": "notebook"}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.setenv("NOTEBOOK_QUICK", "1")
        patch.chdir(NOTEBOOK.parent)
        patch.setattr("sys.path", [*sys.path])
        matplotlib.use("Agg")
        for number, cell in enumerate(CELLS):
            source = "".join(cell["source"])
            for code in [source] if cell["cell_type"] == "code" else SOLUTION.findall(source):
                exec(compile(code, f"cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    return names


def test_claims_hold(names):
    assert names["ddim_difference"] < 1e-5
    assert names["ddpm_difference"] < 1e-5
    x, t = torch.randn(50, 2, dtype=torch.float64), names["at"](0.3)
    torch.testing.assert_close(names["score"](x, t), names["data"].at(names["sde"], t).score(x))
    features = np.random.default_rng(0).normal(size=(2, 100, 5))
    assert names["fid"](*features) == pytest.approx(frechet_distance(*features))
    assert names["bias"] * 100 == pytest.approx(3, rel=0.05)
    drawn, faces = (images.flatten(1) for images in (names["drawn_faces"], names["remembered"]))
    assert torch.cdist(faces, drawn).min(dim=1).values.max() < 0.1  # the perfect denoiser only memorises


def test_outputs_come_from_a_clean_run():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output.get("name", output["output_type"]) for output in outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}  # no stderr, no error
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 12
    text = re.sub(r'"image/png": ".*"', "", NOTEBOOK.read_text(encoding="utf-8"))
    assert not re.search(r"Warning|Traceback|/(home|tmp|root|work|usr)/", text)
    assert NOTEBOOK.stat().st_size < 2.5e6
