"""A classifier of noisy images, p(y | x_t, t), for classifier guidance.

Adding its gradient to the score makes an unconditional model class-conditional: grad log p(x_t | y) = grad log p(x_t)
+ grad log p(y | x_t) (Song et al. 2021, arXiv 2011.13456, section 5 and appendix I; Dhariwal & Nichol 2021, arXiv
2105.05233, section 4).

The network sees x_t = alpha x_0 + n epsilon as x_0 + sigma epsilon with sigma = n / alpha, so that one classifier
works for every noise process: DDPM, VP, sub-VP, VE and EDM.

    python -m experiments.classifier --dataset_name synthetic-faces --label_column hair_style --resolution 32 --out DIR

    DIR/config.json, DIR/diffusion_pytorch_model.safetensors  for NoisyImageClassifier.from_pretrained(DIR)
    DIR/classifier.json   accuracy on the validation split by noise level, and the training settings

DIR is written in one step at the end. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import itertools
import json
import math
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from common import NUM_SEEDS, Failed, Parser, check_numbers, run_command
from custom_unet.custom_unet_2d import DownBlock, PositionalProjection, TimestepEmbedding, group_norm
from eval.results import table
from training.data import CROPS, ImageStore, make_loader, open_image_store, shuffled_batches, to_model_range
from training.sde import spread

RECORD = "classifier.json"
LEAST_SIGMA, MOST_SIGMA = 0.01, 100.0  # range in training: from invisible noise to pure noise
REPORTED_SIGMAS = (0.0, 0.1, 0.5, 1.0, 3.0, 10.0)
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 64, 2e-3, 50
DATA_OPTIONS = "dataset_name train_data_dir label_column crop resolution".split()


class NoisyImageClassifier(ModelMixin, ConfigMixin):
    """p(y | x_t, t), computed by the contracting path of a U-Net, average pooling and a linear layer.

    Args:
        label_names: names of the K classes, in the order of the logits.
        label_column: the attribute that the classes describe.
        sample_size: height and width of the images.
        in_channels: channels of the images.
        block_out_channels: width of each level; the first level has half the image resolution, and each further level
            half the resolution of the one before.
        sigma_data: standard deviation of the pixel values, for scaling the input.

    Raises:
        ValueError: unless there are at least two classes with distinct names.
    """

    @register_to_config
    def __init__(
        self,
        label_names: list[str],
        label_column: str,
        sample_size: int,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        sigma_data: float = 0.5,
    ):
        super().__init__()
        if len(set(label_names)) != len(label_names) or len(label_names) < 2:
            raise ValueError(f"label_names are {label_names!s:.200}; they must be two or more, and differ")
        options = SimpleNamespace(  # the U-Net options that its blocks read
            block_out_channels=block_out_channels,
            time_embedding_dim=None,
            layers_per_block=1,
            downsample_type="conv",
            downsample_padding=1,
            norm_num_groups=8,
            norm_eps=1e-5,
            act_fn="silu",
            dropout=0.0,
            resnet_time_scale_shift="scale_shift",
        )
        first, last = block_out_channels[0], block_out_channels[-1]
        self.noise_proj = PositionalProjection(first, flip_sin_to_cos=True, freq_shift=0)
        self.noise_embedding = TimestepEmbedding(first, 4 * first)
        self.conv_in = nn.Conv2d(in_channels, first, kernel_size=5, stride=2, padding=2)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(block_out_channels):
            before = block_out_channels[max(level - 1, 0)]
            is_last = level == len(block_out_channels) - 1
            self.down_blocks.append(DownBlock(before, width, options, downsample=not is_last))
        self.norm_out = group_norm(last, options.norm_num_groups, options.norm_eps)
        self.linear_out = nn.Linear(last, len(label_names))

    def forward(self, noisy_images: Tensor, signal_scale: Tensor | float, noise_scale: Tensor | float) -> Tensor:
        """The class logits, whose softmax is p(y | x_t, t); differentiable with respect to the images.

        Noise levels sigma = n / alpha outside the training range, 0.01 to 100, are clamped to it.

        Args:
            noisy_images: alpha x_0 + n epsilon for x_0 in [-1, 1], shape (B, in_channels, sample_size, sample_size).
            signal_scale: alpha >= 0, one for all images or one per image, (B,).
            noise_scale: n >= 0, likewise; the two must not both be 0.

        Returns:
            (B, K), in the dtype of the network.

        Raises:
            ValueError: if the images have another shape.
        """
        size, shape = self.config.sample_size, tuple(noisy_images.shape)
        if len(shape) != 4 or shape[1:] != (self.config.in_channels, size, size):
            expected = f"(B, {self.config.in_channels}, {size}, {size})"
            raise ValueError(f"noisy_images have shape {shape}; this classifier takes {expected}")
        alpha, n = (
            torch.as_tensor(scale, device=noisy_images.device, dtype=torch.float32).expand(shape[0])
            for scale in (signal_scale, noise_scale)
        )
        # (x_0 + sigma epsilon) / sqrt(sigma^2 + sigma_data^2), in a form that also works for alpha = 0
        norm = (n.square() + (self.config.sigma_data * alpha).square()).sqrt()
        log_sigma = (n / alpha).clamp(LEAST_SIGMA, MOST_SIGMA).log()  # (B,)

        emb = self.noise_embedding(self.noise_proj(10 * log_sigma).to(self.dtype))  # (B, E)
        hidden = self.conv_in((noisy_images / spread(norm, noisy_images)).to(self.dtype))  # (B, C_0, H/2, W/2)
        for block in self.down_blocks:
            hidden, _, _ = block(hidden, emb, None)  # (B, C_i, H / 2^(i+2), W / 2^(i+2)), the last not halved
        hidden = F.silu(self.norm_out(hidden)).mean((2, 3))  # (B, C)
        return self.linear_out(hidden)


# ---- Training


def train_classifier(classifier: NoisyImageClassifier, store: ImageStore, max_train_steps: int, seed: int) -> None:
    """Trains in place on noisy images, with cross-entropy and sigma log-uniform in [0.01, 100].

    AdamW's learning rate warms up over the first 50 steps and decays to 0 as a cosine. Batches and noise depend only
    on the seed.

    Raises:
        InputError: if there are fewer images than one batch.
        Failed: if the loss is not finite.
    """
    device, generator = classifier.device, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / max_train_steps)) / 2,
    )
    batches = itertools.islice(shuffled_batches(len(store), BATCH_SIZE, seed), max_train_steps)
    classifier.train()
    progress = tqdm(make_loader(store, batches, 0, pin_memory=False), total=max_train_steps, unit=" steps")
    for step, (images, labels) in enumerate(progress):
        positions = torch.rand(BATCH_SIZE, generator=generator, dtype=torch.float64)
        sigma = LEAST_SIGMA * (MOST_SIGMA / LEAST_SIGMA) ** positions
        noisy_images = add_noise(to_model_range(images), sigma, generator)
        loss = F.cross_entropy(classifier(noisy_images.to(device), 1.0, sigma.to(device)), labels.to(device))
        if not math.isfinite(loss.item()):
            raise Failed(f"the loss is {loss.item()} at step {step}; lower LEARNING_RATE of {__name__}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    classifier.eval()


def add_noise(clean_images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """x_0 + sigma epsilon, with sigma (B,) or ()."""
    noise = torch.randn(clean_images.shape, generator=generator)
    return clean_images + spread(sigma, clean_images) * noise


@torch.no_grad()
def predict(classifier: NoisyImageClassifier, images: np.ndarray, sigma: float = 0.0) -> Tensor:
    """Logits (N, K) of uint8 images (N, C, R, R) after adding noise of one level, with a fixed seed."""
    generator, logits = torch.Generator().manual_seed(0), []
    for first in range(0, len(images), 256):
        clean_images = to_model_range(torch.from_numpy(np.array(images[first : first + 256])))
        noisy_images = add_noise(clean_images, torch.tensor(sigma), generator)
        logits.append(classifier(noisy_images.to(classifier.device), 1.0, sigma).float().cpu())
    return torch.cat(logits)


def measure(classifier: NoisyImageClassifier, store: ImageStore) -> dict:
    """Accuracy and cross-entropy (nats) on the images of a store at each of REPORTED_SIGMAS."""
    labels = torch.from_numpy(store.labels_among(classifier.config.label_names))
    by_noise = []
    for sigma in REPORTED_SIGMAS:
        logits = predict(classifier, store.images, sigma)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        cross_entropy = F.cross_entropy(logits, labels).item()
        by_noise.append({"sigma": sigma, "accuracy": round(accuracy, 4), "cross_entropy": round(cross_entropy, 4)})
    return {"split": store.description["split"], "num_images": len(store), "by_noise": by_noise}


# ---- The command


def parse_options(arguments: list[str]) -> Namespace:
    """Parses and checks the arguments; raises InputError."""
    parser = Parser(prog="python -m experiments.classifier", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset_name", help="Hub id or synthetic-faces; must have the splits train and validation")
    add("--train_data_dir", help="folder of images, of parquet, or written by save_to_disk")
    add("--label_column", required=True, help="column with the classes")
    add("--crop", default="center", choices=CROPS)
    add("--resolution", type=int, default=64)
    add("--out", required=True, type=Path, help="output folder, which must not exist")
    add("--max_train_steps", type=int, default=1000)
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_numbers(options, {"max_train_steps": 1, "seed": 0}, {"seed": NUM_SEEDS - 1})
    nearest = next(parent for parent in options.out.absolute().parents if parent.exists())
    if options.out.exists() or not nearest.is_dir():
        parser.error(f"--out {options.out} exists already or lies in a file; choose another one")
    return options


def run(options: Namespace) -> None:
    """Trains a classifier and writes its folder.

    Raises:
        InputError: for bad data.
        Failed: if the loss is not finite.
        OSError: if the folder cannot be written; a partial folder is removed.
    """
    data = {name: getattr(options, name) for name in DATA_OPTIONS}
    store, validation = (open_image_store(**data, split=split) for split in ("train", "validation"))
    names = store.description["label_names"]
    validation.labels_among(names)  # fail before the training if the training images lack a class
    torch.manual_seed(options.seed)
    classifier = NoisyImageClassifier(names, options.label_column, options.resolution)
    classifier.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    train_classifier(classifier, store, options.max_train_steps, options.seed)
    training = {"data": {key: store.description[key] for key in ("source", "split", "num_images", "fingerprint")}}
    training |= {"label_column": options.label_column, "label_names": names, "seed": options.seed}
    training |= {"max_train_steps": options.max_train_steps, "train_batch_size": BATCH_SIZE}
    training |= {"learning_rate": LEARNING_RATE}
    measured = measure(classifier, validation)
    write_classifier(classifier, {"training": training, "validation": measured}, options.out)
    print(table(measured["by_noise"], {"sigma": "sigma", "accuracy": "accuracy", "cross_entropy": "cross-entropy"}))
    print(f"wrote {options.out}")


def write_classifier(classifier: NoisyImageClassifier, record: dict, out: Path) -> None:
    """Writes the folder in one step.

    Raises:
        OSError: if the folder cannot be written; a partial folder is removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        classifier.save_pretrained(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"could not write {out}: {error}") from error


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(parse_options(arguments)), stopped="stopped before the end; nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
