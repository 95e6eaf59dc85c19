"""House rules: which folders may import which, which files are shipped alone, and clean code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS = ["common", "custom_unet", "training", "pipelines", "eval", "train_unet", "experiments"]  # from the ground up
OURS = set(FLOORS)
FORBIDDEN = {
    floor if floor not in ("common", "train_unet") else f"{floor}.py": set(FLOORS[height + 1 :])
    for height, floor in enumerate(FLOORS)
} | {"train_unet.py": {"eval", "experiments"}, "custom_unet": OURS - {"custom_unet"}}
ALLOWED = {"train_unet.py": {"eval.training_metric"}}  # file: module; the metric that it reports while training
SHIPPED = {
    "custom_unet/custom_unet_2d.py": {
        "diffusers.configuration_utils": {"ConfigMixin", "register_to_config"},
        "diffusers.models.modeling_utils": {"ModelMixin"},
        "diffusers.models.unets.unet_2d": {"UNet2DOutput"},
    },
    "pipelines/custom_unet_pipeline.py": None,
    "training/sde.py": None,
}


def imports(path: Path) -> list[tuple[str, set[str]]]:
    """(module, names taken from it) of every import statement; a relative one starts with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), {alias.name for alias in node.names}))
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_run_one_way(place):
    files = [REPOSITORY / place] if place.endswith(".py") else sorted((REPOSITORY / place).rglob("*.py"))
    assert files
    for path in files:
        for module, _ in imports(path):
            top = module.split(".")[0]
            name = path.relative_to(REPOSITORY).as_posix()
            assert top not in FORBIDDEN[place] or module in ALLOWED.get(name, set()), f"{name} imports {module}"
            assert module != "eval", f"{name} hides the builtin eval"


# Which modules of its own floor a module of training/ imports: from the images up to the run
TRAINING = {
    "images": "",
    "synthetic_faces": "",
    "workers": "",
    "sources": "images synthetic_faces workers",
    "data": "images sources workers",
}


@pytest.mark.parametrize("name", TRAINING)
def test_reading_images_imports_nothing_of_a_training(name):
    found = {module for module, _ in imports(REPOSITORY / "training" / f"{name}.py") if module.startswith("training")}
    assert found == {f"training.{other}" for other in TRAINING[name].split()}


def test_opening_an_image_loads_no_trainer():
    code = "import sys, training.images; print(*sys.modules)\nimport training.data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = [{module.split(".")[0] for module in line.split()} for line in done.stdout.splitlines()]
    assert not {"torch", "transformers", "accelerate", "diffusers"} & loaded[0]
    assert not {"transformers", "accelerate", "diffusers"} & loaded[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_stand_alone(name):
    for module, names in imports(REPOSITORY / name):
        top = module.split(".")[0]
        assert top in {"torch", "diffusers", *sys.stdlib_module_names}, f"{name} imports {module}"
        if top == "diffusers" and SHIPPED[name] is not None:
            assert names <= SHIPPED[name].get(module, set()), f"{name} takes {names} from {module}"


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
