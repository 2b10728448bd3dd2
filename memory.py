"""A GPU whose memory did not suffice: what was asked, what was free, and the setting that would have fitted."""

import gc
import traceback
from collections.abc import Callable
from functools import partial

import torch


class OutOfMemory(Exception):
    """What PyTorch's OutOfMemoryError says, without its frames: they hold the memory that the next try needs."""


def release(error: torch.OutOfMemoryError) -> str:
    """Free what the failed step holds; returns what was asked and what was free, in PyTorch's words."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return ". ".join(str(error).split(". ")[1:3]) or str(error)


def fitting(trainer) -> str:
    """The setting with which a step, or an evaluation, of this `train.Trainer` fits, tried on its longest rows."""
    settings, model = trainer.args, trainer.model
    if model.training:
        key, size, rows, step = "per_device_train_batch_size", settings.per_device_train_batch_size, "train", train
    else:
        key, size, rows, step = "per_device_eval_batch_size", settings.per_device_eval_batch_size, "eval", evaluate
    data = getattr(trainer, f"{rows}_dataset").select_columns(["input_ids", "labels"])
    lengths = list(map(len, data["input_ids"]))
    longest = sorted(range(len(data)), key=lengths.__getitem__)[-size:]
    while size > 1:
        size //= 2
        batch = trainer.data_collator(list(data.select(longest[-size:])))
        if fits(partial(step, trainer, batch)):
            times = -(-settings.per_device_train_batch_size // size) * settings.gradient_accumulation_steps
            return f"{key}: {size} fits" + (f", with gradient_accumulation_steps: {times}" if model.training else "")
    more = "" if settings.gradient_checkpointing else " or set gradient_checkpointing: true"
    return f"not even one row fits; lower max_length{more}"


def train(trainer, batch: dict) -> None:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    trainer.model.zero_grad()


def evaluate(trainer, batch: dict) -> None:
    trainer.prediction_step(trainer.model, batch, False)


def fits(step: Callable[[], None]) -> bool:
    try:
        step()
    except torch.OutOfMemoryError as error:
        release(error)
        return False
    return True
