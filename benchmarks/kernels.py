"""Which kernels a training step and an evaluation of a gang spend their time in, and what the host adds:

    python -m benchmarks.kernels                                  # twelve members on the flagship's shape: for a GPU
    python -m benchmarks.kernels --model starter --members 2      # tiny, for a CPU

Prints seconds by the wall clock, each with the device waited for, then torch.profiler's table of the dearest kernels.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from benchmarks.gang import make_model
from benchmarks.grid import ROOT
from benchmarks.step import Work
from gang.step import SCORED, Step, rows_to_score
from train import update_squares


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["flagship", "starter"], default="flagship")
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--rows", type=int, default=25, help="of the table; default: %(default)s")
    options = parser.parse_args()
    n = options.members
    with tempfile.TemporaryDirectory() as name:
        folder, recipe = Path(name), yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
        if options.model == "flagship":
            make_model(folder / "model")
            recipe["model_name_or_path"] = str(folder / "model")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        work = Work(["--config", str(folder / "recipe.yaml")], name)
        on_gpu = work.model.device.type == "cuda"
        rates = torch.full((n,), 1e-6)
        step = Step(work.model, [work.trainer.lora_layers] * n, work.training)

        def train(batches: list) -> None:
            for batch in batches:
                step.train(batch, rates, True)

        for packed in (False, True):
            batches = work.merged(n, packed)
            train(batches)  # captures
            words = f"a step of {n} members, rows {'packed' if packed else 'padded'}: {batches[0].ids.numel()} tokens"
            print(f"{words}, {seconds(lambda b=batches: train(b)) / len(batches):.4f} s; ", end="")
            collating = seconds(lambda p=packed: work.merged(n, p)) / len(batches)
            print(f"to collate it on the host {collating:.4f} s", flush=True)
        for times, packed in ((4, False), (16, False), (4, True), (16, True)):
            tests = rows_to_score(work.examples, work.trainer.data_collator, times * SCORED // n, step.device, packed)
            took, tokens = seconds(lambda t=tests: step.score(t)), sum(n * rows.batch.ids.numel() for rows in tests)
            words = f"{len(work.examples)} examples, rows {'packed' if packed else 'padded'}: {tokens} tokens"
            print(f"an evaluation of {words} in {len(tests)} passes, {took:.4f} s", flush=True)
        squares = seconds(lambda: update_squares(step.stack.grams()))
        print(f"the sizes of {n} updates of rank {step.stack.rank}: {squares:.4f} s", flush=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        for what, task in (("training", lambda: train(batches)), ("an evaluation", lambda: step.score(tests))):
            with profile(activities=activities) as found:
                task()
                wait()
            order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
            print(f"{what}:\n{found.key_averages().table(sort_by=order, row_limit=options.rows)}", flush=True)


if __name__ == "__main__":
    main()
