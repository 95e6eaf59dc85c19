"""Feature spaces other than Inception: DINOv2 for FD-DINOv2, CLIP for CMMD, and TorchScript files."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import Tensor
from torchvision import transforms
from transformers import CLIPVisionModelWithProjection, Dinov2Model, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from common import InputError, sha256_of
from eval.features import FeatureExtractor, in_threads
from eval.inception import open_inception


class Published(NamedTuple):
    """A network on the Hub, and the format of its input images."""

    network_class: type[PreTrainedModel]
    hub_id: str
    commit: str
    weights: str
    size: int  # side of the images, pixels
    mean: list[float]
    std: list[float]


PUBLISHED = {
    "dinov2": Published(  # ViT-L/14, as in Stein et al. 2023 (arXiv 2306.04675)
        Dinov2Model,
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "model.safetensors",
        224,
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    ),
    "clip": Published(  # ViT-L/14 at 336 pixels, as in Jayasumana et al. 2024 (arXiv 2401.09603)
        CLIPVisionModelWithProjection,
        "openai/clip-vit-large-patch14-336",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        "pytorch_model.bin",
        336,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    ),
}


def open_extractor(
    name: str, *, inception_path: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Opens a feature extractor; raises InputError if it is not available.

    Args:
        name: `inception`, `inception:MODE` (see `open_inception`), `dinov2`, `clip` or a TorchScript file.
    """
    network, _, mode = name.partition(":")
    if network == "inception":
        return open_inception(mode or "clean", path=inception_path, device=device)
    if name in PUBLISHED:
        return open_published(PUBLISHED[name], device=device)
    return open_torchscript(Path(name), device=device)


def open_torchscript(path: Path, *, device: torch.device | str) -> FeatureExtractor:
    """Opens any TorchScript file that maps float32 (B, 3, H, W) in 0..255 to (B, D). Loading it runs its code."""
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a TorchScript module: {str(error).strip().splitlines()[0]}") from error
    return FeatureExtractor(path.name, "as they are", sha256_of(path), lambda x: network(x.float().to(device)))


def open_published(published: Published, *, device: torch.device | str) -> FeatureExtractor:
    """Opens DINOv2 or CLIP from the Hub or its cache, without running code from there.

    Images are resized (antialiased bicubic, rounded to uint8) and normalised as in the authors' code.

    DINOv2: the class token after the last norm, as in the code of Stein et al. (dgm-eval). One difference remains:
    transformers resizes the position embeddings from 518 to 224 pixels by the target size, Meta's code by a factor
    with an offset of 0.1.

    CLIP: the projected image embedding divided by its norm, as in the code of Jayasumana et al.
    """
    files = ["config.json", published.weights]
    try:
        folder = Path(snapshot_download(published.hub_id, revision=published.commit, allow_patterns=files))
        use_safetensors = published.weights.endswith(".safetensors")  # otherwise a pickle, read with weights_only
        network = published.network_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=use_safetensors)
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        raise InputError(f"{published.hub_id} could not be downloaded from the Hub: {error}") from error
    network.eval().to(device)
    size = published.size
    resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)  # by Pillow, which rounds to uint8
    normalize = transforms.Normalize(published.mean, published.std)
    prepare = transforms.Compose([transforms.ToPILImage(), resize, transforms.ToTensor(), normalize])

    def features(images: Tensor) -> Tensor:
        output = network(pixel_values=torch.stack(in_threads(prepare, images.cpu())).to(device))
        if isinstance(network, CLIPVisionModelWithProjection):
            return F.normalize(output.image_embeds, dim=1)
        return output.pooler_output

    return FeatureExtractor(published.hub_id, f"bicubic {size}", sha256_of(folder / published.weights), features)
