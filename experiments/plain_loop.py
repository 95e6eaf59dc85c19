"""The other side of `experiments.speed`: UNet2DModel in a loop as `train_unconditional.py` of diffusers writes it.

    python -m experiments.plain_loop --config FILE.yaml

The flags are those of train_unet.py; of the objective only the cost matters here, so it is plain epsilon prediction.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from training.config import TrainConfig, parse_config
from training.data import open_image_store, random_flip, to_model_range
from training.run_log import RunLog


def run_plain_loop(config: TrainConfig) -> None:
    """Trains UNet2DModel as `train_unconditional.py` does and writes the same log as the main job.

    Images are in memory as fp32 tensors; the script itself decodes them anew in every epoch.
    """
    if config.num_cpu_threads is not None:
        torch.set_num_threads(config.num_cpu_threads)
    accelerator = Accelerator(mixed_precision="no")
    store = open_image_store(**config.data_source(), split=config.split, max_images=config.max_images)
    num_images = min(len(store), config.train_batch_size * config.max_train_steps)
    images = to_model_range(store.__getitems__(range(num_images)))
    loader = DataLoader(images, config.train_batch_size, shuffle=True, drop_last=True)
    model = UNet2DModel(**config.unet_kwargs()).train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas, config.adam_epsilon, config.adam_weight_decay
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    ema_options = {"use_ema_warmup": True, "inv_gamma": config.ema_inv_gamma, "power": config.ema_power}
    ema = EMAModel(model.parameters(), config.ema_max_decay, **ema_options)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    ema.to(accelerator.device)
    scheduler = DDPMScheduler(config.ddpm_num_steps, beta_schedule=config.ddpm_beta_schedule)
    log = RunLog(Path(config.output_dir) / "log.jsonl", step=0)
    train_seconds, batches = 0.0, iter(())
    for step in range(1, config.max_train_steps + 1):
        started_at_seconds = time.perf_counter()
        clean_images = next(batches, None)
        if clean_images is None:
            batches = iter(loader)
            clean_images = next(batches)
        if config.random_flip:
            clean_images = random_flip(clean_images)
        noise = torch.randn_like(clean_images)
        timesteps = torch.randint(config.ddpm_num_steps, (len(clean_images),), device=clean_images.device)
        noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
        loss = F.mse_loss(model(noisy_images, timesteps).sample.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss = loss.item()
        train_seconds += time.perf_counter() - started_at_seconds
        if step % config.logging_steps == 0 or step == config.max_train_steps:
            log.write(step, loss=loss, images_seen=step * config.train_batch_size, train_seconds=train_seconds)


if __name__ == "__main__":
    run_plain_loop(parse_config(sys.argv[1:]))
