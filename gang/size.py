"""How many configurations to train at once: from a step's time a + b·N, the memory of each, and the grid's points."""

import math
import resource
import time

import torch

from gang.step import Gang, free_memory

LIMIT = 64  # configurations at once where the sweep has no end
STEPS = {"cuda": 5}  # per measurement, of which the fastest counts; on a CPU one takes seconds and says enough


def best_size(points: float, seconds: list[float], fits: int) -> int:
    """The N ≤ `fits` of least makespan ⌈points/N⌉ · (a + b·N), for the `seconds` of a step of one and of two members.

    Among equals the smallest: it needs the least memory. An endless sweep (infinite points) takes the most per second.
    """
    b = max(0.0, seconds[1] - seconds[0])
    a = max(0.0, seconds[0] - b)
    fits = max(1, min(fits, LIMIT, points if math.isfinite(points) else LIMIT))

    def cost(n: int) -> float:
        return (math.ceil(points / n) if math.isfinite(points) else 1 / n) * (a + b * n)

    # A hundredth is measurement noise; makespans within it count as equal.
    least = min(map(cost, range(1, int(fits) + 1)))
    return next(n for n in range(1, int(fits) + 1) if cost(n) <= 1.01 * least)


def measure(trainer) -> tuple[list[float], int]:
    """Seconds of a training step of one and of two members, and how many fit in memory.

    Uses the longest batch that the data can give, and leaves the trainer's adapter as it was.
    """
    weights = [p for layer in trainer.lora_layers.values() for p in layer.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    order = sorted(range(len(trainer.train_dataset)), key=lambda i: len(trainer.train_dataset[i]["input_ids"]))
    longest = trainer.train_dataset.select(order[-trainer.args.per_device_train_batch_size :])
    batch = trainer._prepare_inputs(
        trainer.data_collator([{k: x[k] for k in ("input_ids", "labels")} for x in longest])
    )
    items = (batch["labels"][:, 1:] != -100).sum()
    seconds, used = [], []
    for n in (1, 2):
        gang = Gang([trainer] * n)
        times = []
        for _ in range(STEPS.get(gang.device.type, 1)):
            start = time.perf_counter()
            float(gang.train([batch] * n, [items] * n, [0.0] * n, update=True).sum())
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        used.append(peak_memory(gang.device))
        gang.take_off()
        for p, value in zip(weights, before, strict=True):
            p.data = value.clone()
    each = max(used[1] - used[0], 1)
    device = trainer.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return seconds, 1 + int(0.9 * free_memory(device) / each)


def peak_memory(device: torch.device) -> int:
    """Bytes, the most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
