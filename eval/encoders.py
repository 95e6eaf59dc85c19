"""Feature spaces other than Inception: DINOv2 for FD-DINOv2, CLIP for CMMD, and networks given by path."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

from common import InputError, sha256_of
from eval.features import FeatureExtractor, resize_each
from eval.inception import open_inception

SAFETENSORS = "model.safetensors"


class Published(NamedTuple):
    """A network on the Hub; only weights with this sha256 get its name."""

    hub_id: str
    commit: str
    weights: str
    sha256: str


PUBLISHED = {
    "dinov2": Published(  # ViT-L/14, as in Stein et al. 2023 (arXiv 2306.04675)
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "model.safetensors",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "clip": Published(  # ViT-L/14 at 336 pixels, as in Jayasumana et al. 2024 (arXiv 2401.09603)
        "openai/clip-vit-large-patch14-336",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        "pytorch_model.bin",
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    ),
}
DINOV2_PIXELS = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # size, mean, standard deviation


def open_extractor(name: str, *, path: Path | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Opens a feature extractor; raises InputError if it is not available.

    Args:
        name: `inception`, `inception:MODE` (see `open_inception`), `dinov2`, `clip`, a TorchScript file, or a
            transformers folder or Hub id.
        path: local weights of `inception` (a file), `dinov2` or `clip` (a folder); these names accept only the
            published weights.
    """
    if name == "inception" or name.startswith("inception:"):
        return open_inception(name.partition(":")[2] or "clean", path=path, device=device)
    published = PUBLISHED.get(name)
    if published is None and Path(name).is_file():
        return open_torchscript(Path(name), device=device)
    source = path or (published.hub_id if published else name)
    return open_transformers(str(source), published, device=device)


def open_torchscript(path: Path, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Opens any TorchScript file that maps float32 (B, 3, H, W) in 0..255 to (B, D). Loading it runs its code."""
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a TorchScript module: {str(error).strip().splitlines()[0]}") from error
    return FeatureExtractor(path.name, "as they are", sha256_of(path), lambda x: network(x.float().to(device)))


def open_transformers(
    source: str, published: Published | None = None, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Opens a vision network from transformers, for square images. No code from the folder or repository is run.

    DINOv2: the class token after the last norm, for images resized to 224 (antialiased bicubic, rounded to uint8) and
    normalised with ImageNet statistics, as in the code of Stein et al. (dgm-eval). One difference remains:
    transformers resizes the position embeddings from 518 to 224 pixels by size, Meta's code by a factor with an offset
    of 0.1.

    CLIP: the projected image embedding divided by its norm, for images resized in the same way to the network's size
    and normalised with CLIP's statistics, as in the code of Jayasumana et al. (google-research/cmmd).

    Other networks: the pooled output or the class token, with the image size from their configuration and the mean and
    standard deviation from their `preprocessor_config.json`.

    Args:
        source: a folder with config.json and weights, or a Hub id.
        published: the network that it must be; by default, any network in safetensors. Pickles are read with
            weights_only.
    """
    weights = published.weights if published else SAFETENSORS
    is_local = Path(source).is_dir()
    folder = Path(source) if is_local else _download(source, weights, published and published.commit)
    if not (folder / weights).is_file():
        raise InputError(f"{folder} has no {weights}; give the folder of a network")
    sha256 = sha256_of(folder / weights)
    if published and sha256 != published.sha256:
        raise InputError(
            f"{folder} is not {published.hub_id} or is damaged: the sha256 of its weights is {sha256}, not"
            f" {published.sha256}; download it again, or pass the folder itself as the extractor"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        is_clip = config.model_type in ("clip", "clip_vision_model")
        network, loading = (CLIPVisionModelWithProjection if is_clip else AutoModel).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=weights.endswith(".safetensors")
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source} could not be loaded: {error}") from error
    if loading["missing_keys"]:
        raise InputError(f"the weights of {source} lack {', '.join(sorted(loading['missing_keys'])):.200}")
    network.eval().to(device)
    size, mean, std = DINOV2_PIXELS if config.model_type == "dinov2" else _pixels(folder, network.config)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))

    def resize(image: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))

    def features(images: Tensor) -> Tensor:
        resized = resize_each(images, resize).to(device)  # uint8 (B, 3, size, size)
        output = network(pixel_values=(resized.float() / 255 - mean) / std)
        if is_clip:
            return normalize(output.image_embeds, dim=1)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    name = published.hub_id if published else folder.resolve().name if is_local else source
    return FeatureExtractor(name, f"bicubic {size}", sha256, features)


def _pixels(folder: Path, config) -> tuple[int, list, list]:
    """The image size, mean and standard deviation that a network expects."""
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    return config.image_size, facts["image_mean"], facts["image_std"]


def _download(hub_id: str, weights: str, revision: str | None) -> Path:
    """Downloads a network from the Hub and returns its folder in the cache."""
    wanted = ["config.json", "preprocessor_config.json", weights]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"{hub_id} is not a local folder and could not be downloaded from the Hub: {error}; download it elsewhere"
            " and give the path of its folder"
        ) from error
