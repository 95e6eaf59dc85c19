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
    name: str, *, mode: str = "clean", path: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor of a name: `inception`, `dinov2`, `clip`, a TorchScript file, a transformers folder or Hub id.

    Args:
        mode: of Inception.
        path: local weights of `inception` (a file), `dinov2` or `clip` (a folder); under these names only the
            published weights are accepted.

    Raises:
        InputError: if it is not available.
    """
    if name == "inception":
        return Inception(mode, path=path, device=device)
    if name in ("dinov2", "clip"):
        published = {"dinov2": DINOV2, "clip": CLIP}[name]
        return TransformersEncoder(str(path) if path else published.hub_id, published=published, device=device)
    if Path(name).is_file():
        return TorchScriptEncoder(Path(name), device=device)
    return TransformersEncoder(name, device=device)


class TransformersEncoder:
    """A vision network of transformers; a `FeatureExtractor` for square images.

    DINOv2: the class token after the last norm, of images resized to 224 (antialiased bicubic, rounded to uint8) and
    normalised as ImageNet, as in the code of Stein et al. (dgm-eval). One difference remains: transformers resizes the
    position embeddings from 518 to 224 pixels by size, Meta's code by a factor with an offset of 0.1.

    CLIP: the projected image embedding divided by its length, of images resized to the network's size in the same way
    and normalised as CLIP's, as in the code of Jayasumana et al. (google-research/cmmd).

    Other networks: the pooled output or the class token, with the size of their configuration and the mean and
    standard deviation of their `preprocessor_config.json`.

    Args:
        source: a folder with config.json and safetensors, or a Hub id. No code from it is run; where there are no
            safetensors (as in CLIP's repository), pytorch_model.bin is read, as weights only.
        published: what it must be, and on the Hub the commit to take; by default anything.

    Attributes:
        name: Hub id, or the folder's name if it is not known to be that of a published network.
        sha256: of the file of weights; of several, of their hashes in order.
        commit: on the Hub; None for a folder.

    Raises:
        InputError: if it is not available, is another network, or the weights do not fill the network.
    """

    def __init__(self, source: str, *, published: Published | None = None, device: torch.device | str = "cpu"):
        folder, self.commit = _find_folder(source, published.commit if published else None)
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
            raise InputError(f"{source} could not be loaded: {error}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(
                f"the weights of {source} lack {len(missing)} of the network's parameters, such as {missing[0]};"
                " take another file"
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
        resized = resize_each(images, self._resize).to(self.device)  # (B, 3, size, size)
        output = self.network(pixel_values=(resized.float() / 255 - self.mean) / self.std)
        if self.is_clip:
            return normalize(output.image_embeds, dim=1)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def _resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (size, size, 3)."""
        return np.array(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))


class TorchScriptEncoder:
    """Any TorchScript file; a `FeatureExtractor`, named after the file.

    Args:
        path: a module that takes float32 (B, 3, H, W) in 0..255 and returns (B, D). Loading it runs its code, which is
            not Python's.

    Raises:
        InputError: if it is not such a file.
    """

    mode = "as they are"

    def __init__(self, path: Path, *, device: torch.device | str = "cpu"):
        self.name, self.sha256, self.device = path.name, sha256_of(path), torch.device(device)
        try:
            self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} is not a TorchScript module: {str(error).strip().splitlines()[0]}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, D)."""
        check_images(images)
        features = self.network(images.float().to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.name} returns {shape} for {len(images)} images; it must be a tensor (B, D)")
        return features.float()


def _pixels(folder: Path, config) -> tuple[int, tuple, tuple]:
    """Size, mean and standard deviation that a network wants its images in."""
    if config.model_type == "dinov2":
        return DINOV2_PIXELS
    try:
        facts = json.loads((folder / "preprocessor_config.json").read_text())
        return int(config.image_size), tuple(facts["image_mean"]), tuple(facts["image_std"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{folder} does not say how images are prepared: {error}; it needs a"
            " preprocessor_config.json with image_mean and image_std, and a configuration with image_size"
        ) from error


def _find_folder(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a network, downloaded from the Hub if need be, and its commit there."""
    if Path(source).is_dir():
        return Path(source), None
    wanted = ["config.json", "preprocessor_config.json", SAFETENSORS, f"{SAFETENSORS}.index.json"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not any(folder.glob(SAFETENSORS)):
            folder = Path(snapshot_download(source, revision=folder.name, allow_patterns=[*wanted, PICKLE]))
    except HFValidationError as error:
        raise InputError(f"{source} is neither a local folder nor the id of a Hub repository") from error
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{source} is not a local folder and could not be downloaded from the Hub: {error}; download it elsewhere"
            " and give the path of its folder"
        ) from error
    return folder, folder.name


def _sha256_of(folder: Path) -> str:
    files = sorted(folder.glob(SAFETENSORS)) or sorted(folder.glob(PICKLE))
    if not files:
        raise InputError(f"{folder} has no weights ({SAFETENSORS}); give the folder of a network")
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
