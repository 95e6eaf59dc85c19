"""Feature spaces beside Inception: DINOv2 for FD-DINOv2, CLIP for CMMD, and networks given by path."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

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
from eval.features import FeatureExtractor, check_images, resize_each
from eval.inception import Inception


@dataclass(frozen=True)
class Published:
    """A network on the Hub.

    Attributes:
        sha256: of its file of weights; one of another hash does not get its name.
    """

    hub_id: str
    commit: str
    sha256: str


# ViT-L/14, as Stein et al. 2023 (arXiv 2306.04675); model.safetensors
DINOV2 = Published(
    "facebook/dinov2-large",
    "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
)
# ViT-L/14 for 336 pixels, as Jayasumana et al. 2024 (arXiv 2401.09603); pytorch_model.bin
CLIP = Published(
    "openai/clip-vit-large-patch14-336",
    "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
)
DINOV2_PIXELS = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # size, mean, standard deviation
SAFETENSORS, PICKLE = "model*.safetensors", "pytorch_model.bin"


def open_extractor(
    name: str,
    *,
    mode: str = "clean",
    path: Path | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """The extractor of a name: `inception`, `dinov2`, `clip`, a TorchScript file, a transformers folder or Hub id.

    Args:
        mode: of Inception.
        path: the weights of `inception` (a file), `dinov2` or `clip` (a folder), where they are not to be fetched;
            others than the published ones are refused under these names.
        revision: of a Hub id.
        resolution: what images are resized to for a TorchScript file.

    Raises:
        InputError: if it cannot be had.
    """
    if name == "inception":
        return Inception(mode, path=path, device=device)
    if name in ("dinov2", "clip"):
        published = {"dinov2": DINOV2, "clip": CLIP}[name]
        return TransformersEncoder(str(path) if path else published.hub_id, published=published, device=device)
    if Path(name).is_file():
        return TorchScriptEncoder(Path(name), resolution=resolution, device=device)
    return TransformersEncoder(name, revision=revision, device=device)


class TransformersEncoder:
    """A vision network of transformers; a `FeatureExtractor` for square images.

    DINOv2: the class token after the last norm, of images resized to 224 (antialiased bicubic, rounded to uint8) and
    normalised as ImageNet, as in the code of Stein et al. (dgm-eval). One difference is left: transformers resizes the
    position embeddings from 518 to 224 pixels to a size, Meta's code by a factor with an offset of 0.1.

    CLIP: the projected image embedding divided by its length, of images resized to the network's size in the same way
    and normalised as CLIP's, as in the code of Jayasumana et al. (google-research/cmmd).

    Other networks: the pooled output or the class token, with the size of their configuration and the mean and
    standard deviation of their `preprocessor_config.json`.

    Args:
        source: a folder with config.json and safetensors, or a Hub id. No code from it is run; where there are no
            safetensors (as in CLIP's repository), pytorch_model.bin is read, as weights only.
        revision: of a Hub id.
        published: what it must be, and on the Hub the commit to take; by default anything.

    Attributes:
        name: Hub id, or the folder's name if it is not known to be that of a published network.
        sha256: of the file of weights; of several, of their hashes in order.
        commit: on the Hub; None for a folder.

    Raises:
        InputError: if it cannot be had, is another one, or the weights do not fill the network.
    """

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        published: Published | None = None,
        device: torch.device | str = "cpu",
    ):
        folder, self.commit = _find_folder(source, published.commit if published else revision)
        self.sha256, self.device = _sha256_of(folder), torch.device(device)
        if published and self.sha256 != published.sha256:
            raise InputError(
                f"{folder} is not {published.hub_id} or is damaged: the sha256 of its weights is {self.sha256}, it"
                f" must be {published.sha256}; fetch it again, or name the folder itself as the extractor"
            )
        self.name = published.hub_id if published else source if self.commit else folder.resolve().name
        try:
            config = AutoConfig.from_pretrained(folder)
            self.model_type: str = config.model_type
            architecture = CLIPVisionModelWithProjection if self.is_clip else AutoModel
            network, loading = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{source} could not be loaded: {' '.join(str(error).split())}") from error
        if loading["missing_keys"]:
            raise InputError(
                f"the weights of {source} lack {len(loading['missing_keys'])} of the network's parameters, as"
                f" {sorted(loading['missing_keys'])[0]}; take another file"
            )
        self.network = network.eval().to(self.device)
        self.size, mean, std = _pixels(folder, network.config)
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1).to(self.device) for values in (mean, std))
        self.mode = f"bicubic {self.size}"

    @property
    def is_clip(self) -> bool:
        return self.model_type in ("clip", "clip_vision_model")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, R, R) -> float32 (B, D)."""
        check_images(images)
        resized = _resize(images, self.size).to(self.device)  # (B, 3, size, size)
        output = self.network(pixel_values=(resized.float() / 255 - self.mean) / self.std)
        if self.is_clip:
            return normalize(output.image_embeds, dim=1)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class TorchScriptEncoder:
    """Any TorchScript file; a `FeatureExtractor`.

    Args:
        path: a module that takes float32 (B, 3, H, W) in 0..255 and returns (B, D). Loading it runs its code, which is
            not Python's.
        resolution: what images are resized to before (antialiased bicubic, rounded to uint8); by default they are not.

    Attributes:
        name: the file's name.

    Raises:
        InputError: if it is no such file.
    """

    def __init__(self, path: Path, *, resolution: int | None = None, device: torch.device | str = "cpu"):
        if not path.is_file():
            raise InputError(f"there is no file {path}; give that of a TorchScript module")
        self.name, self.resolution, self.device = path.name, resolution, torch.device(device)
        self.mode = f"bicubic {resolution}" if resolution else "as they are"
        self.sha256 = sha256_of(path)
        try:
            self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} is no TorchScript module: {str(error).strip().splitlines()[0]}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, D)."""
        check_images(images)
        resized = _resize(images, self.resolution) if self.resolution else images
        features = self.network(resized.float().to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.name} returns {shape} for {len(images)} images; it must be a tensor (B, D)")
        return features.float()


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, size, size)."""

    def resize(image: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))

    return resize_each(images, resize)


def _pixels(folder: Path, config) -> tuple[int, tuple, tuple]:
    """Size, mean and standard deviation that a network wants its images in."""
    if config.model_type == "dinov2":
        return DINOV2_PIXELS
    try:
        facts = json.loads((folder / "preprocessor_config.json").read_text())
        return int(config.image_size), tuple(facts["image_mean"]), tuple(facts["image_std"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{folder} does not tell how images are prepared: {' '.join(str(error).split())}; it needs a"
            " preprocessor_config.json with image_mean and image_std, and a configuration with image_size"
        ) from error


def _find_folder(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a network, fetched from the Hub if need be, and its commit there."""
    if Path(source).is_dir():
        return Path(source), None
    wanted = ["config.json", "preprocessor_config.json", SAFETENSORS, f"{SAFETENSORS}.index.json"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not any(folder.glob(SAFETENSORS)):
            folder = Path(snapshot_download(source, revision=folder.name, allow_patterns=[*wanted, PICKLE]))
    except HFValidationError as error:
        raise InputError(f"{source} is neither a folder nor the id of a Hub repository") from error
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{source} is no folder, and it could not be had from the Hub: {' '.join(str(error).split())};"
            " fetch it elsewhere and give the path of its folder"
        ) from error
    return folder, folder.name


def _sha256_of(folder: Path) -> str:
    files = sorted(folder.glob(SAFETENSORS)) or sorted(folder.glob(PICKLE))
    if not files:
        raise InputError(f"{folder} has no weights ({SAFETENSORS}); give the folder of a network")
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
