"""The training loop of all members: it issues steps and evaluations without waiting for what they compute.

What they compute stays on the device until a flush, at each evaluation or about twice a second. A thread of its own
then writes the rows in the order of the steps, and finds what has diverged; a member's later rows are dropped, so that
its record ends where train.py's would.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

import train
from checkpoint import interruption
from data import lengths
from gang.checkpoint import Checkpoints
from gang.fit import unfit
from gang.member import Member, Plan, plans
from gang.packing import packable
from gang.step import SCORED, Step, rows_to_score, twin
from inputs import InputError
from memory import OutOfMemory, fitting, release
from model import load_model

FLUSH_SECONDS = 0.5
AHEAD = 4  # steps whose rows are collated before they are needed
THREADS = 32  # that open and close runs: each waits for the server


class Loop:
    """The gangs of one process, one after another on the same base and data; `sweep` is its id for the runs."""

    def __init__(self, sweep: str | None = None, shared: "Shared | None" = None):
        self.sweep = sweep
        self.members: list[Member] = []
        self.shared = shared  # None: the first member reads it
        if shared:
            print(shared.read, flush=True)

    def train(self, members: list[Member], recruit: Callable[[Member], list[Member]] | None = None) -> None:
        """Train the members to their ends; each keeps its own error, and SystemExit or an interrupt reaches all.

        `recruit` gives more members, seeing the first one.
        """
        self.members, gang, start = list(members), None, time.monotonic()
        opening: dict[Member, Future] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                self.set_up(opening, pool, recruit)
                if opening:
                    gang = Gang(self.shared, opening, pool)
                    gang.seconds["set-up"] = time.monotonic() - start
                    with interruption.waits():
                        gang.train()
            except BaseException as caught:
                error = self.too_large(gang, caught) if isinstance(caught, torch.OutOfMemoryError) else caught
                if gang:
                    gang.stop(error)
                for member in self.members:
                    if not gang or member not in gang.closing:
                        member.error = member.error or error
                if not isinstance(caught, Exception):
                    raise
            finally:
                wait(opening.values())
                closing = gang.closing if gang else {}
                left = [member for member in opening if member not in closing]
                closed = time.monotonic()
                wait([*closing.values(), *(pool.submit(member.close) for member in left)])
                if gang:
                    gang.writer.shutdown()
                if gang and gang.step:
                    print(f"gang: {gang.account(time.monotonic() - closed)}", flush=True)

    def too_large(self, gang: "Gang | None", error: torch.OutOfMemoryError) -> OutOfMemory:
        """What the memory did not suffice for; of a gang of one, also what would fit."""
        training = not (gang and gang.step) or gang.step.model.training
        if gang:
            gang.step = None
        message, trainer = release(error), self.members[0].trainer
        if len(self.members) > 1 or trainer is None:
            return OutOfMemory(message)
        trainer.model.train(training)
        return OutOfMemory(f"{message}; {fitting(trainer)}")

    def set_up(self, opening: dict[Member, Future], pool: ThreadPoolExecutor, recruit) -> None:
        """Build the members' trainers one after another, while the runs of those before open."""
        for member in self.members:  # grows while it runs
            try:
                member.configure(self.sweep)
                if self.shared is None:
                    self.shared = Shared(member)
                    print(self.shared.read, flush=True)
                else:
                    self.shared.equip(member)
            except Exception as error:
                member.error = error
                continue
            opening[member] = pool.submit(member.open, self.sweep, self.shared.described, member is self.members[0])
            if recruit:
                self.members += recruit(member)
                recruit = None


class Shared:
    """What the first member reads and the others use: the base, the tokenised data, the questions of generations."""

    def __init__(self, first: Member):
        self.point = first.point
        configuration = first.data, first.training, first.base
        if reason := unfit(configuration):
            raise InputError(f"{reason}; use wandb agent")
        splits = train.read_data(*configuration)  # this also pins the commits that were got from the Hub
        self.checkpointing: bool | None = None  # as the recipe has it, unless a measurement says otherwise
        self.data, self.revision = first.data, first.base.model_revision
        self.model = load_model(first.base, first.training)
        first.equip(twin(self.model), splits)
        trainer = first.trainer
        self.described = train.describe_data(trainer, *splits)
        shared = self.described["rows_in_both_splits"]
        self.read = train.what_was_read(first.data, splits, trainer, shared)
        by_length = numpy.argsort(lengths(trainer.train_dataset), kind="stable")
        self.packed = packable(self.model, trainer.train_dataset.select(by_length[[0, -1]])["input_ids"])
        self.splits = trainer.train_dataset, trainer.eval_dataset
        self.questions, self.weight_squares = trainer.questions(), trainer.weight_squares
        self.tokens = numpy.array(list(map(scored_tokens, trainer.eval_dataset["labels"])))

    def equip(self, member: Member) -> None:
        member.data, member.base.model_revision = self.data, self.revision
        member.equip(twin(self.model), self.splits, tokenised=True)
        member.trainer.weight_squares = self.weight_squares


class Result:
    """Numbers on their way from the device, and when they were complete there."""

    def __init__(self, *values: Tensor):
        self.values = [value.to("cpu", non_blocking=True) for value in values]
        self.event, self.time = None, time.monotonic()
        if torch.cuda.is_available():
            self.event = torch.cuda.Event(enable_timing=True, blocking=True)
            self.event.record()

    def arrays(self) -> list[numpy.ndarray]:
        if self.event:
            self.event.synchronize()
        return [value.numpy() for value in self.values]

    def seconds_since(self, other: "Result") -> float:
        return other.event.elapsed_time(self.event) / 1000 if self.event else self.time - other.time


def scored_tokens(labels: list[int]) -> int:
    """How many tokens of a row count; not its first, which nothing predicts."""
    return sum(label != -100 for label in labels[1:])


class Gang:
    """Members that train together, from their first evaluation to their closed runs."""

    def __init__(self, shared: Shared, opening: dict[Member, Future], pool: ThreadPoolExecutor):
        self.shared, self.opening, self.pool = shared, opening, pool
        self.members = list(opening)
        self.rows = list(range(len(self.members)))  # whose adapters the stack holds, as indices of the members
        self.closing: dict[Member, Future] = {}
        first = self.members[0]
        self.first, self.start, self.last_step = first, first.start, first.trainer.state.max_steps
        self.checkpoints = Checkpoints(self)
        self.writer, self.pending = ThreadPoolExecutor(1), deque[Future]()
        self.issued: list[tuple[Plan, list[Tensor]]] = []
        self.seconds = dict.fromkeys(("set-up", "issuing", "writing", "steps", "evaluations", "answers"), 0.0)
        self.evaluated = 0
        self.step: Step | None = None
        self.submit(self.opened)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - start

    def opened(self) -> None:
        """In the writer's thread, before anything else there: all runs are open, or their members end here."""
        for member, future in self.opening.items():
            with self.mind(member):
                future.result()
                member.run.config.update({"gang": self.first.run_id, "gang_size": len(self.members)})

    @contextmanager
    def mind(self, member: Member) -> Iterator[None]:
        """Whatever goes wrong with a member's record ends this member alone."""
        try:
            yield
        except Exception as error:
            member.error = error

    def train(self) -> None:
        with self.timed("set-up"):
            training = self.first.training
            layers = [member.trainer.lora_layers for member in self.members]
            self.step = Step(self.shared.model, layers, training, checkpointing=self.shared.checkpointing)
            device, rows = self.step.device, training.per_device_train_batch_size
            longest = int(lengths(self.shared.splits[0]).max())
            # A step keeps what every layer computes for its backward pass, an evaluation nothing; more than that many
            # rows at once save launches on a GPU and miss the caches of a CPU.
            layers_kept = 1 if device.type == "cpu" or self.step.checkpointing else self.step.hidden_layers // 2
            tokens = max(SCORED, len(self.members) * rows * longest * max(1, layers_kept)) // len(self.members)
            examples = list(self.shared.splits[1].select_columns(["input_ids", "labels"]))
            self.tests = rows_to_score(examples, self.first.trainer.data_collator, tokens, device, self.shared.packed)
            evaluations = train.evaluation_steps(self.last_step) - (set() if training.eval_on_start else {0})
            if self.start:
                self.checkpoints.restore()
        self.result = Result()
        flushed = time.monotonic()
        if 0 in evaluations and not self.start:
            self.evaluate(0)
        for plan in ahead(plans(self.members, rows if device.type == "cuda" else None, self.shared.packed)):
            self.part_with_those_that_ended(plan.number)
            if not self.training():
                return
            with self.timed("issuing"):
                self.issue(plan)
            if plan.number in evaluations:
                self.evaluate(plan.number)
            elif time.monotonic() - flushed > FLUSH_SECONDS:
                self.flush()
                flushed = time.monotonic()
            self.checkpoints.after(plan.number)
        self.flush()
        self.settle()
        self.part_with_those_that_ended(self.last_step)
        if self.training():
            self.finish()

    def issue(self, plan: Plan) -> None:
        rates, batches = plan.device_rates, plan.batches
        if len(self.rows) < len(self.members):
            rates, batches = rates[self.rows], [batch.of(self.rows) for batch in batches]
        last = len(batches) - 1
        self.issued.append((plan, [self.step.train(batch, rates, i == last) for i, batch in enumerate(batches)]))

    def flush(self) -> None:
        """Send the losses of the steps since the last flush on their way to the records."""
        issued, self.issued = self.issued, []
        if issued:
            result = Result(torch.stack([losses for _, parts in issued for losses in parts]))
            self.submit(self.write_steps, [plan for plan, _ in issued], list(self.rows), result, self.result)
            self.result = result

    def evaluate(self, number: int) -> None:
        self.flush()
        result = Result(self.step.score(self.tests), train.update_squares(self.step.stack.grams()))
        self.submit(self.write_evaluation, number, list(self.rows), result, self.result)
        self.result = result

    def submit(self, task: Callable, *arguments) -> None:
        """Give the writer a task; wait while it has two, so that the host does not run away from the device."""
        while len(self.pending) > 1:
            self.pending.popleft().result()
        self.pending.append(self.writer.submit(task, *arguments))

    def settle(self) -> None:
        """Wait until all that was submitted is written."""
        while self.pending:
            self.pending.popleft().result()

    def write_steps(self, done: list[Plan], rows: list[int], result: Result, before: Result) -> None:
        (losses,) = result.arrays()
        seconds, start = result.seconds_since(before), 0
        self.seconds["steps"] += seconds
        with self.timed("writing"):
            for plan in done:
                parts = losses[start : start + len(plan.batches)]
                start += len(plan.batches)
                for place, index in enumerate(rows):
                    member = self.members[index]
                    if member.error is None and not member.diverged:
                        with self.mind(member):
                            member.log_step(plan, index, parts[:, place], seconds / len(done))

    def write_evaluation(self, number: int, rows: list[int], result: Result, before: Result) -> None:
        scores, squares = result.arrays()
        seconds = result.seconds_since(before)
        self.seconds["evaluations"] += seconds
        self.evaluated += 1
        means = " ".join(f"{mean:.3f}" for mean in scores[:, :, 0].sum(1) / self.shared.tokens.sum())
        print(f"gang: step {number} of {self.last_step}: eval/loss {means}", flush=True)
        sizes = train.update_sizes(torch.from_numpy(squares), sum(self.first.trainer.weight_squares.values()))
        for place, index in enumerate(rows):
            member = self.members[index]
            if member.error is None and (not member.diverged or member.trainer.state.global_step == number):
                with self.mind(member):
                    member.log_evaluation(scores[place], self.shared.tokens, sizes[place], seconds)

    def part_with_those_that_ended(self, number: int) -> None:
        """Before step `number`, close the runs of members that diverged, failed or were stopped; the others go on."""
        for index in [index for index in self.training() if self.members[index].ended]:
            self.flush()
            self.settle()
            member, place = self.members[index], self.rows.index(index)
            if member.stopped:
                member.error = member.error or SystemExit(143)
            self.step.stack.export(place, member.trainer.lora_layers)
            self.closing[member] = self.pool.submit(member.close)
            # The rows go on without a record where new graphs would cost more than they do.
            rest = self.seconds["steps"] / (number - self.start) * (self.last_step - number) / len(self.rows)
            if not self.step.graphs or rest > sum(self.step.captures):
                self.rows.pop(place)
                self.step.drop(place)

    def training(self) -> list[int]:
        """The members that have not ended, as indices."""
        return [index for index in self.rows if self.members[index] not in self.closing]

    def finish(self) -> None:
        """The answers and weights of those that have reached the end."""
        with self.timed("answers"):
            answers = train.sampled(self.answers)
            for index in self.training():
                member, place = self.members[index], self.rows.index(index)
                self.step.stack.export(place, member.trainer.lora_layers)
                own = answers if isinstance(answers, str) else answers[place]
                self.closing[member] = self.pool.submit(member.close, own)

    def answers(self) -> list[list[dict]]:
        """What train.py's `generate_answers` gives, of each row of the stack."""
        batch, references = self.shared.questions
        untrained, trained = self.step.generate(batch, self.first.trainer.model.generation_config)
        return [self.first.trainer.answer_rows(batch, references, untrained, own) for own in trained]

    def account(self, closing: float) -> str:
        """Where the time went, in seconds; steps and evaluations by the device's clock."""
        steps, used = max(member.trainer.state.global_step for member in self.members), self.seconds
        each, captures = 1000 / (steps * len(self.members) or 1), sum(self.step.captures)
        return (
            f"{len(self.members)} members, {steps} steps: set-up {used['set-up']:.1f} s · "
            f"steps {used['steps']:.1f} s, of which {len(self.step.captures)} captures {captures:.1f} s · "
            f"{self.evaluated} evaluations {used['evaluations']:.1f} s · answers {used['answers']:.1f} s · "
            f"closing {closing:.1f} s · the host's time for a member and step: "
            f"issuing {(used['issuing'] - captures) * each:.2f} ms, writing {used['writing'] * each:.2f} ms"
        )

    def stop(self, error: BaseException) -> None:
        """Write what has been computed; a device that has failed is not asked for more."""
        if not isinstance(error, Exception):
            self.flush()
        wait(self.pending)


def ahead(stream: Iterator[Plan]) -> Iterator[Plan]:
    """The same, made in a thread of its own before they are asked for."""
    with ThreadPoolExecutor(1) as maker:
        waiting = deque(maker.submit(next, stream, None) for _ in range(AHEAD))
        while (plan := waiting.popleft().result()) is not None:
            waiting.append(maker.submit(next, stream, None))
            yield plan
