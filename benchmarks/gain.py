"""What a gang gains at each number of tokens per configuration and step, and where the gain ends:

    python -m benchmarks.gain --model 1b                          # rows of 512 tokens, 1 to 16 a step: for a GPU
    python -m benchmarks.gain --model starter --batches 1 4       # tiny, for a CPU

One process, random weights. A step of train.py is that of its own trainer: forward, backward, clipping, optimizer;
what Hugging Face's loop does around it, evaluations and the start of a process are left out, which favours train.py.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.grid import H200, MODELS, make_recipe, matmul_parameters
from benchmarks.kernels import seconds
from benchmarks.step import BATCHES, Work
from gang.step import Step


def measure(work: Work, members: int) -> tuple[float, float]:
    """Seconds of a configuration's step, with train.py and in a gang of so many; the least of three rounds."""
    alone = seconds(work.train) / BATCHES
    step = Step(work.model, [work.trainer.lora_layers] * members, work.training)
    batches = work.merged(members, packed=False)
    rates = torch.full((members,), 1e-6)

    def train() -> None:
        for batch in batches:
            step.train(batch, rates, True)

    train()  # captures
    return alone, seconds(train) / BATCHES / members


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["starter", *MODELS], default="135m")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="rows of a step")
    options = parser.parse_args()
    options.batch, options.steps, options.examples = max(options.batches), BATCHES, None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.model}, a gang of {options.members}, {device}, torch {torch.__version__}\n")
    print("| tokens per configuration and step | train.py, a step | gang, for each | × | of the 4N limit |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        recipe, model = make_recipe(options, Path(folder)), None
        for batch in options.batches:
            work = Work(["--config", str(recipe), f"--per_device_train_batch_size={batch}"], folder, model)
            model = work.model
            tokens = sum(batch["attention_mask"].sum().item() for batch in work.batches) / BATCHES
            alone, each = measure(work, options.members)
            limit = "—"
            if model.device.type == "cuda" and options.model in MODELS:
                limit = f"{100 * 4 * matmul_parameters(options.model) * tokens / each / H200:.0f} %"
            print(
                f"| {tokens:,.0f} | {1000 * alone:.1f} ms | {1000 * each:.1f} ms | {alone / each:.2f} | {limit} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
