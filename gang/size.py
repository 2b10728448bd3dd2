"""How many configurations to train at once: from a step's time a + b·N, the memory of each, and the grid's points."""

import gc
import math
import re
import resource
import time
from pathlib import Path

import torch

from gang.step import Gang, free_memory

LIMIT = 64  # configurations at once where the sweep has no end
PROCESS = Path("/proc/self")
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
    device, seconds, used = trainer.model.device, [], []
    for n in (1, 2):
        reset_peak_memory(device)
        gang = Gang([trainer] * n)
        times = []
        for _ in range(STEPS.get(device.type, 1)):
            start = time.perf_counter()
            float(gang.train([batch] * n, [items] * n, [0.0] * n, update=True).sum())
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        used.append(peak_memory(device))
        gang.take_off()
        for p, value in zip(weights, before, strict=True):
            p.data = value.clone()
        state = 4 * gang.stack.values[0].nbytes  # weights, gradients and two moments: each needs that at least
        del gang
    reset_peak_memory(device)
    return seconds, 1 + int(0.9 * free_memory(device) / max(used[1] - used[0], state))


def reset_peak_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Bytes, the most since the reset (where there is no /proc, the most ever)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if PROCESS.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", (PROCESS / "status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
