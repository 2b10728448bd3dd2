"""How many configurations to train at once: as many as pay and fit into the memory."""

import gc
import math
import re
import resource
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gang.member import Member
from gang.step import Step, free_memory, together

LIMIT = 64  # configurations at once where the sweep has no end
PROCESS = Path("/proc/self")
STEPS = {"cuda": 3}  # per measurement, of which the fastest counts; on a CPU one takes seconds and says enough


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


def choose(points: float, model: PreTrainedModel, first: Member, packed: bool) -> int:
    """The size of the gangs for a sweep that has `points` left, by measurement on the first member; prints why."""
    if points < 2:
        return 1
    seconds, fits = measure(model, first, packed)
    size = best_size(points, seconds, fits)
    print(
        f"gang: a step of one takes {seconds[0]:.3g} s, of two {seconds[1]:.3g} s; memory for {fits}; "
        f"{size} of {points:g} at once",
        flush=True,
    )
    return size


def measure(model: PreTrainedModel, first: Member, packed: bool) -> tuple[list[float], int]:
    """Seconds of a training step of one and of two members, not graphed, and how many fit in memory.

    Uses the longest batch that the data can give.
    """
    trainer, rows = first.trainer, first.training.per_device_train_batch_size
    data = trainer.train_dataset.select_columns(["input_ids", "labels"])
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    batch = trainer.data_collator(list(data.select(order[-rows:])))
    device, seconds, used = model.device, [], []
    for n in (1, 2):
        reset_peak_memory(device)
        step = Step(model, [trainer.lora_layers] * n, first.training)
        step.graphs = {}
        rows_of_all = together([batch] * n, [1.0] * n, 0, rows if device.type == "cuda" else None, packed)
        times = []
        for _ in range(STEPS.get(device.type, 1)):
            start = time.perf_counter()
            float(step.train(rows_of_all, torch.zeros(n), update=True).sum())
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        used.append(peak_memory(device))
        state = 4 * step.stack.values[0].nbytes  # weights, gradients and two moments: each needs that at least
        del step
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
