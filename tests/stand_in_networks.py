"""Small random networks with the interfaces of Inception, DINOv2 and CLIP, as files; images to put through them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from cleanfid import inception_pytorch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from eval.inception import Weights

LIVE_FEATURES = 32  # of 2,048; the others are 0, as a root of 2,048 x 2,048 matrices takes clean-fid a minute


class StandInLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, LIVE_FEATURES, kernel_size=8, stride=8)
        self.num_zeros = 2048 - LIVE_FEATURES

    def forward(self, images: Tensor) -> Tensor:
        features = 20 * torch.relu(self.convolution(images)).mean([2, 3])
        return functional.pad(features, [0, self.num_zeros])


class StandInInception(nn.Module):
    """Called like NVIDIA's inception-2015-12-05.pt: images in 0..255 of any size, or its `layers` from 299x299."""

    def __init__(self):
        super().__init__()
        self.layers = StandInLayers()

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        resized = functional.interpolate(images, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((resized - 128) / 128)


def write_torchscript(folder: Path) -> Path:
    path = folder / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(StandInInception().eval()).save(str(path))
    return path


def write_pytorch_inception(folder: Path) -> Path:
    """Random weights of pytorch-fid's network, at their full size."""
    path = folder / "pt_inception.pth"
    torch.manual_seed(0)
    network = inception_pytorch._inception_v3(num_classes=1008, aux_logits=False, pretrained=False)
    torch.save(network.state_dict(), path)
    return path


def stand_in_weights(path: Path) -> Weights:
    return Weights("stand-in", "http://127.0.0.1:9/stand-in.pt", hashlib.sha256(path.read_bytes()).hexdigest())


def write_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """Both towers, as in OpenAI's repository."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = sizes | {"image_size": 48, "patch_size": 16, "projection_dim": 8}
    text = sizes | {"vocab_size": 99, "projection_dim": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    pixels = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def draw_images(count: int, seed: int, size: int = 20, tint: float = 0.0) -> np.ndarray:
    """uint8 (count, 3, size, size), smooth at random; a tint makes another distribution."""
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
