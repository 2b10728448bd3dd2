"""What one training step and one evaluation batch cost, per configuration, on a CPU:

    OMP_NUM_THREADS=1 python -m benchmarks.step

train.py's own trainer against gangs of several sizes and with single ideas left out, in turns within one process.
CPU time, the best of the rounds: other processes on the machine change it little.
"""

import argparse
import tempfile
import time
from unittest.mock import patch

import train
from data import load_split
from gang import lora
from gang.step import Gang

BATCHES = 4


def alone(trainer, batches: list[dict], items: list, tests: list[dict]) -> tuple[float, float]:
    """CPU seconds of train.py's step and evaluation batch."""
    start = time.process_time()
    for batch, count in zip(batches, items, strict=True):
        trainer.training_step(trainer.model, batch, count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
    middle = time.process_time()
    trainer.model.eval()
    for batch in tests:
        trainer.prediction_step(trainer.model, batch, False)
    return (middle - start) / len(batches), (time.process_time() - middle) / len(tests)


def together(n: int, trainer, batches: list[dict], items: list, tests: list[dict], **options) -> tuple[float, float]:
    """The same of a gang of n, for each of them."""
    gang = Gang([trainer] * n, **options)
    gang.train(batches[:1] * n, items[:1] * n, [0.0] * n, True)
    start = time.process_time()
    for batch, count in zip(batches, items, strict=True):
        gang.train([batch] * n, [count] * n, [0.0] * n, True)
    middle = time.process_time()
    for batch in tests:
        gang.score(batch)
    end = time.process_time()
    gang.wear(trainer.lora_layers)
    return (middle - start) / len(batches) / n, (end - middle) / len(tests) / n


def without_onednn(*arguments) -> tuple[float, float]:
    with patch.object(lora, "onednn", lambda x: False):
        return together(4, *arguments)


WAYS = {
    "train.py": alone,
    **{f"gang of {n}": lambda *rest, n=n: together(n, *rest) for n in (1, 2, 4, 8)},
    "gang of 4 without oneDNN": without_onednn,
    "gang of 4, dequantising in each pass": lambda *rest: together(4, *rest, keep=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/starter.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", options.config, "--report_to", "none", "--output_dir", folder]
        data, training, base = train.parse(flags)
        splits = (data.dataset_train_split, data.dataset_test_split)
        trainer = train.Trainer(base, training, *(load_split(data, split) for split in splits))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        iterator = iter(trainer.get_train_dataloader())
        batches = [next(iterator) for _ in range(BATCHES)]
        items = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
        tests = list(trainer.get_eval_dataloader())[::4]
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, measure in WAYS.items():
                times[way].append(measure(trainer, batches, items, tests))
    best = {way: [min(column) for column in zip(*rounds, strict=True)] for way, rounds in times.items()}
    print("| per configuration | training step | × | evaluation batch | × |\n|---|---|---|---|---|")
    for way, (step, test) in best.items():
        ratios = [reference / seconds for reference, seconds in zip(best["train.py"], (step, test), strict=True)]
        print(f"| {way} | {1000 * step:.0f} ms | {ratios[0]:.2f} | {1000 * test:.0f} ms | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
