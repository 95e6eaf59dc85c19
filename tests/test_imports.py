"""Project rules: which folders may import which, which files are self-contained, and code style."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LAYERS = ["common", "custom_unet", "training", "pipelines", "eval", "train_unet", "experiments"]  # from the bottom up
OURS = set(LAYERS)
FORBIDDEN = {
    layer if layer not in ("common", "train_unet") else f"{layer}.py": set(LAYERS[level + 1 :])
    for level, layer in enumerate(LAYERS)
} | {"train_unet.py": {"eval", "experiments"}, "custom_unet": OURS - {"custom_unet"}}
ALLOWED = {"train_unet.py": {"eval.training_metric"}}  # file: modules; the metric reported during training
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
    """(module, imported names) of every import statement; relative modules start with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), {alias.name for alias in node.names}))
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_import_only_lower_layers(folder):
    files = [REPOSITORY / folder] if folder.endswith(".py") else sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    for path in files:
        for module, _ in imports(path):
            top = module.split(".")[0]
            name = path.relative_to(REPOSITORY).as_posix()
            assert top not in FORBIDDEN[folder] or module in ALLOWED.get(name, set()), f"{name} imports {module}"
            assert module != "eval", f"{name} hides the builtin eval"


def test_reading_images_does_not_import_accelerate_or_diffusers():
    code = "import sys, training.images; print(*sys.modules)\nimport training.data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = [{module.split(".")[0] for module in line.split()} for line in done.stdout.splitlines()]
    assert not {"torch", "transformers", "accelerate", "diffusers"} & loaded[0]
    assert not {"transformers", "accelerate", "diffusers"} & loaded[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_self_contained(name):
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


def test_planted_faults_fit_the_source():
    """`python -m tests.planted_faults` can plant each of them."""
    for fault in yaml.safe_load((REPOSITORY / "tests" / "planted_faults.yaml").read_text()):
        assert (REPOSITORY / fault["file"]).read_text().count(fault["find"]) == 1, fault
