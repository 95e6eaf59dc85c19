"""The data of a run: batches of training images, and the images of the held-out loss."""

import os
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from common import InputError, on_main_process
from training.config import TrainConfig
from training.data import ImageStore, open_image_store, random_flip, shuffled_batches, to_model_range
from training.diffusion import drop_labels
from training.workers import load_batches


class TrainingData:
    """Opens the data of a run.

    Attributes:
        config: configuration of the run, with the `in_channels` of the images.
        store: the training images.
        label_names: of the classes; None without labels.
        heldout_images: float32 (N, C, H, W) in [-1, 1], only on the main process; None without a validation split.
        heldout_labels: int64 (N,); None without labels.
        num_heldout_images: N, on every process.

    Raises:
        InputError: if the data cannot be loaded, or there are too few images.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        if config.train_data_dir and os.path.realpath(config.train_data_dir) == os.path.realpath(config.output_dir):
            raise InputError(f"--output_dir {config.output_dir} is the folder of the images; choose another one")
        self.store = self.open_store(config.split, config.max_images)
        self.config = replace(config, in_channels=self.store.images.shape[1])
        accumulated, num_processes = config.gradient_accumulation_steps, accelerator.num_processes
        images_per_update = config.train_batch_size * accumulated * num_processes
        if images_per_update > len(self.store):
            raise InputError(
                f"{len(self.store)} images are fewer than the {images_per_update} per update"
                f" ({config.train_batch_size} x {accumulated} accumulated x {num_processes} processes); lower"
                " --train_batch_size"
            )
        self.label_names: list[str] | None = self.store.description.get("label_names")
        self.heldout_images = self.heldout_labels = None
        self.num_heldout_images = 0
        if config.validation_split is not None:
            self.open_heldout(self.open_store(config.validation_split, config.validation_images))

    def open_store(self, split: str, max_images: int | None) -> ImageStore:
        """The main process decodes the images, unless they are cached; the other processes read the same store."""
        which = self.config.data_source() | {"split": split, "max_images": max_images}
        return on_main_process(self.accelerator, lambda: open_image_store(**which))

    def open_heldout(self, store: ImageStore) -> None:
        self.num_heldout_images = len(store)
        if len(store) < 4:
            raise InputError(
                f"split {self.config.validation_split} has {len(store)} held-out images; their loss needs at least 4,"
                " one for each quarter of the times: raise --validation_images or choose another --validation_split"
            )
        if self.label_names is not None:
            self.heldout_labels = torch.from_numpy(store.labels_among(self.label_names))
        if self.accelerator.is_main_process:
            self.heldout_images = to_model_range(torch.tensor(store.images))

    def open_batches(self, start_batch: int) -> None:
        """Opens this process's endless stream of batches at batch number `start_batch`; see `load_batches`."""
        config, rank, world_size = self.config, self.accelerator.process_index, self.accelerator.num_processes
        order = shuffled_batches(
            len(self.store), config.train_batch_size, config.seed, rank, world_size, start_batch=start_batch
        )
        self.batches = load_batches(self.store, config.dataloader_num_workers, order)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Randomly flipped clean images, float32 (B, C, H, W) in [-1, 1], and randomly dropped labels (B,)."""
        config = self.config
        images, labels = next(self.batches)
        clean_images = self.to_device(images)
        if config.random_flip:
            clean_images = random_flip(clean_images)
        clean_images = to_model_range(clean_images)
        if labels is not None:
            labels = drop_labels(self.to_device(labels), len(self.label_names), config.label_dropout)
        if config.channels_last:
            clean_images = clean_images.contiguous(memory_format=torch.channels_last)
        return clean_images, labels

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor, device = torch.from_numpy(array), self.accelerator.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy does not wait for the GPU
        return tensor.to(device, non_blocking=True)
