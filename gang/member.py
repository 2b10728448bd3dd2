"""One configuration of a gang: train.py's own trainer, asked for data, schedule and records, and never to train."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import wandb
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.trainer_utils import align_special_tokens, speed_metrics

import adapter
import train
from checkpoint import Checkpoint, find, identity
from gang.step import Batch, together
from inputs import InputError
from memory import OutOfMemory
from settings import parse, swept_values

CPU = torch.device("cpu")
# wandb reads the name and version of each installed package for each run; here one reading is for all.
assert callable(wandb.util.working_set), "wandb.util.working_set is no more"
PACKAGES = list(wandb.util.working_set())
wandb.util.working_set = lambda: PACKAGES


class Member:
    """A configuration that the server has given out as `run_id`; `error` is what ended it before its time."""

    def __init__(self, run_id: str, point: dict, flags: list[str]):
        self.run_id, self.point, self.flags = run_id, point, flags
        self.trainer: train.Trainer | None = None
        self.watch: train.Watch | None = None
        self.run: wandb.Run | None = None
        self.error: BaseException | None = None
        self.stopped = False  # the server wants it to end
        self.resumed: Checkpoint | None = None
        self.configured = False

    def configure(self, sweep: str | None) -> None:
        """Read its flags, and find what it goes on with, once; InputError if the flags are not train.py's."""
        if self.configured:
            return
        self.data, self.training, self.base = parse(self.flags)
        self.swept = swept_values(self.training, self.point)
        self.folder = self.training.output_dir
        self.settings = identity(self.data, self.training, self.base)
        self.resumed = find(self.training, self.settings, self.run_id, sweep)
        self.configured = True

    @property
    def start(self) -> int:
        """The step after which it goes on."""
        return self.resumed.step if self.resumed else 0

    def equip(self, model: PreTrainedModel, splits: tuple[Dataset, Dataset], tokenised: bool = False) -> None:
        """Build its trainer, on a model and data sets which members share; `tokenised` if another has done that."""
        training, given = self.training, self.training.dataset_kwargs
        training.output_dir = str(Path(self.folder, adapter.folder_name(self.swept, self.run_id)))
        if tokenised:
            training.dataset_kwargs = (given or {}) | {"skip_prepare_dataset": True}
        self.trainer = trainer = train.Trainer(self.base, training, *splits, model=model)
        training.dataset_kwargs = given
        # In this order, as in `Trainer.train`: the loader's order comes from the seed that the trainer has just set.
        align_special_tokens(trainer.model, trainer.processing_class)
        self.loader = trainer.get_train_dataloader()
        self.loader.device = None  # the gang puts all members' rows on the device together
        numbers = trainer.set_initial_training_values(training, self.loader)
        self.updates_per_epoch, self.samples, self.batches_per_epoch = numbers[1], numbers[3], numbers[5]
        trainer.state.max_steps, trainer.state.num_train_epochs = numbers[6], numbers[0]
        trainer.state.compute_steps(training, numbers[6])
        trainer.state.train_batch_size = training.train_batch_size
        schedule = trainer.create_scheduler(numbers[6], torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate))
        (self.factor,) = schedule.lr_lambdas
        if self.resumed:
            if not self.resumed.move(training.output_dir):
                raise InputError(f"{self.resumed.folder} is used by another run")
            trainer._load_from_checkpoint(str(self.resumed.folder))
            trainer.state = self.resumed.state()
        self.token_flops = trainer.floating_point_ops({"input_ids": torch.zeros(1, 1)})

    def open(self, sweep: str | None, described: dict, console: bool) -> None:
        """Open its W&B run and write the configuration, through Hugging Face's callback."""
        quiet: dict = {} if console else {"console": "off"}
        settings = wandb.Settings(sweep_id=sweep, **quiet)
        options = {"id": self.run_id, "reinit": "create_new", "settings": settings, "config": self.swept}
        resumed = self.resumed is not None and self.resumed.about["run"] == self.run_id
        self.run = run = train.start_run(self.training, self.data, self.base, self.swept, resumed, **options)
        handler = self.trainer.callback_handler
        for callback in list(handler.callbacks):
            if isinstance(callback, ProgressCallback | PrinterCallback):
                handler.remove_callback(callback)
        described = train.describe(self.trainer, self.data, self.base) | described
        self.watch, self.keeper = train.watch_run(self.trainer, run, described, self.settings, self.resumed)
        self.begun = time.time()
        handler.on_train_begin(self.training, self.trainer.state, self.trainer.control)

    @property
    def order(self) -> tuple:
        """Members of one order get the same batches."""
        return self.training.seed, self.training.data_seed

    def batches(self) -> Iterator[tuple[float, list[dict[str, Tensor]], list[float]]]:
        """Per step: the epoch after it, its micro-batches as Hugging Face's loader collates them, and what the NLL of
        each is divided by."""
        parts, position, epoch = self.training.gradient_accumulation_steps, 0, 0
        while True:
            self.loader.set_epoch(epoch)
            iterator = iter(self.loader)
            for update in range(self.updates_per_epoch):
                last = update == self.updates_per_epoch - 1
                count = (self.batches_per_epoch % parts or parts) if last else parts
                batches, items = self.trainer.get_batch_samples(iterator, count, CPU)
                position += len(batches)
                if items is None:  # Hugging Face's trainer then takes the mean of the micro-batches' means
                    items = [(batch["labels"][:, 1:] != -100).sum() * len(batches) for batch in batches]
                else:
                    items = [items] * len(batches)
                yield position / self.batches_per_epoch, batches, list(map(float, items))
            epoch, position = epoch + 1, (epoch + 1) * self.batches_per_epoch

    def rate(self, number: int) -> float:
        """The learning rate of a step, from the trainer's scheduler."""
        return self.training.learning_rate * self.factor(number - 1)

    def log_step(self, plan: "Plan", index: int, losses: numpy.ndarray, seconds: float) -> None:
        """The row of a step, for the [micro-batches, 4] that `Step.train` gave for this member."""
        state = self.trainer.state
        state.global_step, state.epoch = plan.number, plan.epochs[index]
        state.total_flos += self.token_flops * plan.elements[index]
        self.watch.seconds += seconds
        loss = float(losses[:, 0].sum())
        means = losses[:, 1:3].astype(float).mean(0).tolist()
        self.trainer.log(
            {"loss": loss, "grad_norm": float(losses[-1, 3]), "learning_rate": plan.rates[index]}
            | dict(zip(("entropy", "mean_token_accuracy"), means, strict=True))
            | {"num_tokens": plan.tokens[index]}
        )

    def log_evaluation(self, scores: numpy.ndarray, tokens: numpy.ndarray, sizes: dict, seconds: float) -> None:
        """The row of an evaluation, for the scores [examples, 2] and tokens [examples] as train.Trainer has them."""
        metrics = self.trainer.record_scores(scores, tokens) | sizes
        steps = math.ceil(len(tokens) / self.training.eval_batch_size)
        speed = speed_metrics("eval", time.time() - seconds, num_samples=len(tokens), num_steps=steps)
        self.trainer.log({f"eval_{key}": float(value) for key, value in metrics.items()} | speed)

    @property
    def diverged(self) -> bool:
        """Like train.py it takes a step before it ends, even where the base itself is not finite."""
        return bool(self.watch and self.watch.diverged_at_step is not None and self.trainer.state.global_step)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.diverged or self.stopped

    def close(self, answers: list[dict] | str | None = None) -> None:
        """Write what stays of it, as train.py does, and close its run; an error of its server or disk is its own."""
        try:
            if self.error is None:
                self.leave(answers)
        except Exception as error:
            self.error = error
        try:
            if self.run is not None:
                self.finish()
        except Exception as error:
            self.error = self.error or error

    def leave(self, answers: list[dict] | str | None) -> None:
        """The last row, files, adapter and summary of one that has trained to its end."""
        state = self.trainer.state
        steps = state.global_step - self.start
        samples = self.samples * steps / state.max_steps
        metrics = speed_metrics("train", self.begun, num_samples=samples, num_steps=steps)
        self.trainer.log(metrics | {"total_flos": state.total_flos, "train_loss": None})
        self.trainer.callback_handler.on_train_end(self.training, state, self.trainer.control)
        train.leave(self.trainer, self.watch, None if self.diverged else answers)

    def finish(self) -> None:
        """Close its run, in the state that its error tells."""
        if isinstance(self.error, OutOfMemory):
            self.run.summary["out_of_memory"] = str(self.error)
        if not isinstance(self.error, Exception | None) and not self.stopped:
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if self.error is None else 1)
        if self.error is None:
            self.keeper.remove()


@dataclass
class Plan:
    """A step of all members: its micro-batches and rates for the device, and for the log, per member, the epoch, the
    rate, the tokens up to and with it, and the elements of its rows, padding included."""

    number: int
    batches: list[Batch]
    device_rates: Tensor  # [N]
    epochs: list[float]
    rates: list[float]
    tokens: list[int]
    elements: list[int]


def plans(members: list[Member], rows: int | None, packed: bool) -> Iterator[Plan]:
    """The steps of a gang in order, from where it goes on; with `rows`, for a GPU, in memory that it can copy from by
    itself."""
    streams = {member.order: member.batches() for member in members}
    tokens = dict.fromkeys(streams, 0)
    filler = members[0].trainer.processing_class.pad_token_id
    for number in range(1, members[0].trainer.state.max_steps + 1):
        steps = {order: next(stream) for order, stream in streams.items()}
        for order, (_, batches, _) in steps.items():
            tokens[order] += sum(int(batch["attention_mask"].sum()) for batch in batches)
        if number == 1:
            for member in members:
                member.trainer.record_first_batch(steps[member.order][1][0])
        if number <= members[0].start:
            continue
        epochs, micro, items = zip(*(steps[member.order] for member in members), strict=True)
        pairs = zip(zip(*micro, strict=True), zip(*items, strict=True), strict=True)
        merged = [together(batches, counts, filler, rows, packed) for batches, counts in pairs]
        rates = [member.rate(number) for member in members]
        device_rates = torch.tensor(rates)
        if rows:
            merged, device_rates = [batch.pinned() for batch in merged], device_rates.pin_memory()
        elements = [sum(batch["input_ids"].numel() for batch in batches) for batches in micro]
        numbers = [tokens[member.order] for member in members]
        yield Plan(number, merged, device_rates, list(epochs), rates, numbers, elements)
