"""Each member runs train.py's own code in a thread; where that needs the model, the gang answers for all together.

Only one thread runs at a time: a member that asks for a step hands over to the conductor, which computes once all
members have asked, and then lets them go on one by one. So a member is train.py down to its data order, schedule,
logging and files; what differs is who multiplies the matrices.
"""

import queue
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy
import torch
import wandb
from peft.tuners.lora import LoraLayer
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import WandbCallback

import train
from gang.fit import unfit
from gang.step import Gang


class Trainer(train.Trainer):
    """train.py's trainer, whose losses, gradients, optimizer steps and scores come from the gang."""

    def __init__(self, member: "Member", *arguments):
        self.member = member
        shared = member.conductor.model
        forward = shared and shared.forward
        super().__init__(*arguments, model=shared)
        if shared:
            shared.forward = forward  # SFTTrainer wraps it for a loss of its own, and once is enough
        member.trainer, member.conductor.model = self, self.model.get_base_model()
        self.token_flops = super().floating_point_ops({"input_ids": torch.zeros(1, 1)})
        self.accelerator.backward = lambda loss, **_: None  # the gang has done it
        self.accelerator.clip_grad_norm_ = lambda *_: self.gradient_norm
        run = member.run
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, WandbCallback):  # it would log to the global run, and there are several
                callback._wandb = SimpleNamespace(
                    run=run, config=run.config, log=run.log, define_metric=run.define_metric, watch=run.watch
                )
            elif isinstance(callback, ProgressCallback | PrinterCallback):
                self.remove_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts, items = 1, num_items_in_batch
        if items is None:  # Hugging Face's trainer then divides the loss by the micro-batches itself
            parts = self.current_gradient_accumulation_steps
            items = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1) * parts
        update = self.accelerator.gradient_state.sync_gradients
        result = self.member.ask("train", inputs, items, self._get_learning_rate(), update)
        loss, entropy, right, _, self.gradient_norm = result
        self._metrics["train"]["entropy"].append(entropy)
        self._metrics["train"]["mean_token_accuracy"].append(right)
        self._total_train_tokens += inputs["attention_mask"].sum()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss * parts

    def log(self, *arguments):
        for metrics in self._metrics.values():  # left on the device until now
            metrics.update({key: [float(value) for value in values] for key, values in metrics.items()})
        super().log(*arguments)

    def floating_point_ops(self, inputs):
        return self.token_flops * inputs["input_ids"].numel()  # counted while the model wore PEFT's layers

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return None, *self.member.ask("score", self._prepare_inputs(inputs))

    def train(self, *arguments, **keywords):
        output = super().train(*arguments, **keywords)
        self.member.ask("leave")
        return output


class Member:
    """One configuration: train.train in a thread, its W&B run, and the hand-overs to and from the conductor."""

    def __init__(self, conductor: "Conductor", run_id: str, point: dict, flags: list[str]):
        self.conductor, self.run_id, self.point = conductor, run_id, point
        self.flags = flags
        self.run = self.trainer = self.error = None
        self.stopped = False
        self.request: tuple = ("start",)
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.train, name=run_id, daemon=True)

    def train(self) -> None:
        try:
            configuration = train.parse(self.flags)
            if reason := unfit(configuration):
                raise train.InputError(f"{reason}; use wandb agent")
            swept = train.swept_values(configuration[1], self.point)
            train.train(*configuration, swept, self.start_run, lambda *rest: Trainer(self, *rest))
        except BaseException as error:  # of whatever kind, it ends this member alone
            self.error = error
        self.requests.put(("end",))

    def start_run(self, *arguments):
        alone = {} if self is self.conductor.members[0] else {"console": "off"}  # else each prints everybody's lines
        settings = wandb.Settings(sweep_id=self.conductor.sweep, **alone)
        self.run = train.start_run(*arguments, id=self.run_id, reinit="create_new", settings=settings)
        return self.run

    def ask(self, *request):
        """In the member's thread: hand over until the conductor answers. The random state is the member's own."""
        state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.requests.put(request)
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        random.setstate(state[0])
        numpy.random.set_state(state[1])
        torch.set_rng_state(state[2])
        return answer

    def resume(self, answer=None) -> None:
        """In the conductor's thread: let the member go on until it asks again or ends."""
        if self.request[0] == "start":
            self.thread.start()
        else:
            self.answers.put(SystemExit(143) if self.stopped else answer)
        self.request = ("running",)
        self.request = self.requests.get()


class Conductor:
    """Brings the members to the same point, computes for all of them at once, and lets them go on."""

    def __init__(self, sweep: str | None):
        self.sweep = sweep
        self.members: list[Member] = []
        self.model = self.gang = None

    def conduct(self, members: list[Member], recruit: Callable[[Trainer], list[Member]] | None = None) -> None:
        """Train the members to their ends; each keeps its own error, and SystemExit or an interrupt reaches all.

        `recruit` gives more members, seeing the first one's trainer.
        """
        self.members = list(members)
        try:
            for member in self.members:  # grows while it runs
                member.resume()
                self.undress()
                if recruit and member.trainer and member.request[0] != "end":
                    self.members += recruit(member.trainer)
                    recruit = None
            if members := self.waiting():
                self.gang = Gang([member.trainer for member in members])
                for member in members:
                    member.run.config.update({"gang": members[0].run_id, "gang_size": len(members)})
            while members := self.waiting():
                self.answer(members)
        except BaseException as error:
            self.end(error)
            if not isinstance(error, Exception):
                raise
        finally:
            if self.gang:
                self.gang.take_off()
            self.gang = None

    def waiting(self) -> list[Member]:
        """The members that have asked. One that has ended or leaves is dropped, and finishes its files first."""
        for member in self.members:
            if self.gang and member.request[0] in ("leave", "end") and member.trainer in self.gang.trainers:
                self.gang.drop(member.trainer)
                if member.request[0] == "leave":
                    member.resume()
                self.gang.wear(self.gang.stacked)
        return [member for member in self.members if member.request[0] != "end"]

    def answer(self, members: list[Member]) -> None:
        (kind,) = {member.request[0] for member in members}
        asked = [member.request[1:] for member in members]
        if kind == "train":
            batches, items, rates, updates = zip(*asked, strict=True)
            answers = self.gang.train(batches, items, rates, updates[0])
        else:
            scores, tokens = self.gang.score(asked[0][0])
            answers = [(score, tokens) for score in scores]
        for member, answer in zip(members, answers, strict=True):
            member.resume(answer)

    def undress(self) -> None:
        """Take PEFT's layers off the base, which the next member's PEFT adapts anew."""
        for name, module in list(self.model.named_modules() if self.model else ()):
            if isinstance(module, LoraLayer):
                self.model.set_submodule(name, module.get_base_layer())

    def end(self, error: BaseException) -> None:
        """Raise `error` in every member at its next request, so that its W&B run is closed as train.py would."""
        for member in self.members:
            if member.request[0] == "running":
                member.request = member.requests.get()
            while member.request[0] not in ("start", "end"):
                member.resume(error)
