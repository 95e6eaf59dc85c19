"""Small random networks with the interfaces of a feature extractor, DINOv2 and CLIP, and images to feed them."""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn


class StandInExtractor:
    """A `FeatureExtractor` of 8 features that counts its images."""

    name, mode, sha256 = "stand-in", "as they are", "1" * 64

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.num_images = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self.num_images += len(images)
        return torch.relu(self.convolution(images / 127.5 - 1)).mean([2, 3])


def write_features(path: Path) -> Path:
    """Writes a TorchScript network with 6 features."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, kernel_size=8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.jit.script(network.eval()).save(str(path))
    return path


def write_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """Writes both towers of a network and a pickle, as in OpenAI's repository."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = sizes | {"image_size": 48, "patch_size": 16, "projection_dim": 8}
    text = sizes | {"vocab_size": 99, "projection_dim": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    network = transformers.CLIPModel(config)
    network.save_pretrained(folder)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


def draw_images(count: int, seed: int, size: int = 20, tint: float = 0.0) -> np.ndarray:
    """Draws random smooth images, uint8 (count, 3, size, size); a tint changes their distribution."""
    generator = np.random.default_rng(seed)
    coarse = np.kron(generator.random((count, 3, 5, 5)), np.ones((size // 5, size // 5)))
    fine = generator.random((count, 3, size, size))
    return (255 * ((0.7 - tint) * coarse + 0.3 * fine + tint * (np.arange(3) / 2)[:, None, None])).astype(np.uint8)


def write_images(folder: Path, images: np.ndarray) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"seed-{index:07d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return paths
