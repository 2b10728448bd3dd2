"""What one training step and one evaluation cost, per configuration, on a CPU:

    OMP_NUM_THREADS=1 python -m benchmarks.step

train.py's own trainer against gangs of several sizes and with single ideas left out, in turns within one process.
CPU time, the best of the rounds: other processes on the machine change it little.
"""

import argparse
import tempfile
import time
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import train
from data import load_splits
from gang import lora
from gang.step import SCORED, Batch, Step, rows_to_score, together, twin
from model import load_model
from settings import parse

BATCHES = 4


class Work:
    """Some training batches and every fourth test example, for train.py's trainer and for a gang."""

    def __init__(self, flags: list[str], folder: str, model: PreTrainedModel | None = None):
        data, self.training, base = parse([*flags, "--report_to", "none", "--output_dir", folder])
        self.model = model or load_model(base, self.training)
        self.trainer = trainer = train.Trainer(base, self.training, *load_splits(data), model=twin(self.model))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        iterator = iter(trainer.get_train_dataloader())
        self.batches = [next(iterator) for _ in range(BATCHES)]
        self.on_host = [{key: value.cpu() for key, value in batch.items()} for batch in self.batches]
        self.items = [float((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches]
        rows = trainer.eval_dataset.select_columns(["input_ids", "labels"])
        self.examples = list(rows.select(range(0, len(rows), 4)))
        size = self.training.per_device_eval_batch_size
        self.tests = [trainer.data_collator(self.examples[i : i + size]) for i in range(0, len(self.examples), size)]

    def train(self) -> None:
        """train.py's steps."""
        trainer = self.trainer
        for batch, count in zip(self.batches, self.items, strict=True):
            trainer.training_step(trainer.model, dict(batch), torch.tensor(count))
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), self.training.max_grad_norm)
            trainer.optimizer.step()
            trainer.model.zero_grad()

    def alone(self) -> tuple[float, float]:
        """CPU seconds of train.py's step and evaluation."""
        start = time.process_time()
        self.train()
        middle = time.process_time()
        self.trainer.model.eval()
        for batch in self.tests:
            self.trainer.prediction_step(self.trainer.model, dict(batch), False)
        return (middle - start) / BATCHES, time.process_time() - middle

    def merged(self, n: int, packed: bool) -> list[Batch]:
        """The batches of n members; for a GPU as a gang has them, of few shapes and in memory that it can copy from."""
        on_gpu = self.model.device.type == "cuda"
        rows = self.training.per_device_train_batch_size if on_gpu else None
        pairs = zip(self.on_host, self.items, strict=True)
        batches = [together([batch] * n, [count] * n, 0, rows, packed) for batch, count in pairs]
        return [batch.pinned() for batch in batches] if on_gpu else batches

    def gang(self, n: int, packed: bool = True, **options) -> tuple[float, float]:
        """The same of a gang of n, for each of them."""
        step = Step(self.model, [self.trainer.lora_layers] * n, self.training, **options)
        tests = rows_to_score(self.examples, self.trainer.data_collator, SCORED // n, step.device, packed)
        batches = self.merged(n, packed)
        rates = torch.full((n,), 1e-6)
        step.train(batches[0], rates, True)
        start = time.process_time()
        for batch in batches:
            step.train(batch, rates, True)
        middle = time.process_time()
        step.score(tests)
        return (middle - start) / BATCHES / n, (time.process_time() - middle) / n


def without_onednn(work: Work) -> tuple[float, float]:
    with patch.object(lora, "onednn", lambda x: False):
        return work.gang(4)


WAYS = {
    "train.py": Work.alone,
    **{f"gang of {n}": lambda work, n=n: work.gang(n) for n in (1, 2, 4, 8)},
    "gang of 4, rows padded": lambda work: work.gang(4, packed=False),
    "gang of 4 without oneDNN": without_onednn,
    "gang of 4, dequantising in each pass": lambda work: work.gang(4, keep=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/starter.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(["--config", options.config], folder)
        for _ in range(options.rounds):
            for way, measure in WAYS.items():
                times[way].append(measure(work))
    best = {way: [min(column) for column in zip(*rounds, strict=True)] for way, rounds in times.items()}
    print("| per configuration | training step | × | evaluation of a quarter | × |\n|---|---|---|---|---|")
    for way, (step, test) in best.items():
        ratios = [reference / seconds for reference, seconds in zip(best["train.py"], (step, test), strict=True)]
        print(f"| {way} | {1000 * step:.0f} ms | {ratios[0]:.2f} | {1000 * test:.0f} ms | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
