"""How many configurations to train at once: as many as pay and fit into the memory."""

import gc
import math
import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from transformers import PreTrainedModel

from data import lengths
from gang.member import Member
from gang.step import Step, free_memory, together
from inputs import InputError

LIMIT = 64  # configurations at once where the sweep has no end
PROCESS = Path("/proc/self")
USABLE = 0.85  # of the memory; the rest is for graphs, evaluations and what lies scattered
STEPS = {"cuda": 3}  # per measurement, of which the fastest counts; on a CPU one takes seconds and says enough


def best_size(points: float, seconds: list[float], fits: int) -> int:
    """The N ≤ `fits` of least makespan ⌈points/N⌉ · (a + b·N), for the `seconds` of a step of one and of two members.

    Among equals the smallest: it needs the least memory. An endless sweep (infinite points) takes the most per second.
    """
    fits = int(max(1, min(fits, LIMIT, points if math.isfinite(points) else LIMIT)))
    costs = {n: makespan(points, seconds, n) for n in range(1, fits + 1)}
    # A hundredth is measurement noise; makespans within it count as equal.
    return next(n for n, cost in costs.items() if cost <= 1.01 * min(costs.values()))


def makespan(points: float, seconds: list[float], size: int) -> float:
    """⌈points/N⌉ · (a + b·N) for gangs of N = `size`; without an end, the time of a configuration."""
    b = max(0.0, seconds[1] - seconds[0])
    step = max(0.0, seconds[0] - b) + b * size
    return math.ceil(points / size) * step if math.isfinite(points) else step / size


@dataclass
class Cost:
    """What training takes: seconds of a step of one and of two members, not graphed, and how many fit in memory."""

    seconds: list[float]
    fits: int


def choose(points: float, model: PreTrainedModel, first: Member, packed: bool) -> tuple[int, bool]:
    """The size of the gangs for a sweep that has `points` left, and whether they recompute activations; prints why.

    Recomputing (gradient checkpointing) changes no number, so it is a matter of memory alone, whatever the recipe says.
    """
    if points < 2:
        return 1, first.training.gradient_checkpointing
    cost, checkpointing = measure(model, first, packed, False), False
    if cost.fits < min(points, LIMIT):
        other = measure(model, first, packed, True)
        sizes = [best_size(points, each.seconds, each.fits) if each.fits else 0 for each in (cost, other)]
        if not sizes[0] or (
            sizes[1] > 1 and makespan(points, other.seconds, sizes[1]) < makespan(points, cost.seconds, sizes[0])
        ):
            cost, checkpointing = other, True
    if not cost.fits:
        raise InputError("the GPU's memory is too small for a step; lower per_device_train_batch_size or max_length")
    size = best_size(points, cost.seconds, cost.fits)
    print(
        f"gang: a step of one takes {cost.seconds[0]:.3g} s, of two {cost.seconds[1]:.3g} s; memory for {cost.fits}"
        f"{', with activations recomputed' if checkpointing else ''}; {size} of {points:g} at once",
        flush=True,
    )
    return size, checkpointing


def measure(model: PreTrainedModel, first: Member, packed: bool, checkpointing: bool) -> Cost:
    """Steps of one and of two members on the longest batch that the data can give."""
    trainer, rows = first.trainer, first.training.per_device_train_batch_size
    data = trainer.train_dataset.select_columns(["input_ids", "labels"])
    longest = numpy.argsort(lengths(data), kind="stable")[-rows:]
    collated = trainer.data_collator(list(data.select(longest)))
    device, seconds, used = model.device, [], []
    # On a CPU that other processes use as well, their share would be taken for the cost of a member.
    clock, threads = (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, torch.get_num_threads())
    for n in (1, 2):
        reset_peak_memory(device)
        batch = together([collated] * n, [1.0] * n, 0, rows if device.type == "cuda" else None, packed)
        try:
            step = Step(model, [trainer.lora_layers] * n, first.training, checkpointing=checkpointing)
            step.graphs = {}
            times = []
            for _ in range(STEPS.get(device.type, 1)):
                start = clock()
                float(step.train(batch, torch.zeros(n), update=True).sum())
                times.append((clock() - start) / threads)
        except torch.OutOfMemoryError:
            step = None
            break
        seconds.append(min(times))
        used.append(peak_memory(device))
        state = 4 * step.stack.values[0].nbytes  # weights, gradients and two moments: each needs that at least
        step = None
    reset_peak_memory(device)
    if len(used) < 2:
        return Cost([*seconds, *(2 * s for s in seconds)], len(used))
    each = max(used[1] - used[0], state)
    return Cost(seconds, 1 + max(0, int((USABLE * reachable_memory(device) - used[0]) / each)))


def reachable_memory(device: torch.device) -> int:
    """Bytes that this process has, or could have."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) + free_memory(device)
    pages = int((PROCESS / "statm").read_text().split()[1]) if PROCESS.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") + free_memory(device)


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
