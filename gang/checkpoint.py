"""The checkpoints of a gang: each member's as Hugging Face's trainer writes it, so that train.py can go on with it."""

import time

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME

from checkpoint import Pace, interruption
from gang.member import Member
from gang.stack import Stack


class Checkpoints:
    """Of the members of a `Gang`: from time to time, and when the process is asked to end."""

    def __init__(self, gang):
        self.gang, self.pace, self.writing = gang, Pace(), False

    def after(self, number: int) -> None:
        """What is due after this step, with its evaluation; SystemExit if the process is asked to end."""
        gang, asked = self.gang, interruption.code is not None
        if number == gang.last_step:
            return  # the rest takes moments
        if asked or (self.pace.due and not self.writing):
            gang.flush()
            stack = gang.step.stack
            matrices = [matrix.to("cpu", copy=True) for matrix in (stack.values, stack.first, stack.second)]
            self.writing = True
            gang.submit(self.write, number, list(gang.rows), matrices)
        if asked:
            gang.settle()
            raise SystemExit(interruption.code)

    def write(self, number: int, rows: list[int], matrices: list[Tensor]) -> None:
        """In the writer's thread, after the rows up to this step: save those who are well."""
        begun = time.monotonic()
        for place, index in enumerate(rows):
            member = self.gang.members[index]
            if not member.ended:
                with self.gang.mind(member):
                    save(member, number, self.gang.step.stack, place, matrices)
        self.pace.save(begun)
        self.writing = False

    def restore(self) -> None:
        """Give the stack the moments of members that go on; their weights came with their adapters."""
        stack = self.gang.step.stack
        for place, member in enumerate(self.gang.members):
            saved = torch.load(member.resumed.folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)["state"]
            first, second = (windows(stack, place, member, matrix) for matrix in (stack.first, stack.second))
            for index, parameter in enumerate(first):
                first[parameter].copy_(saved[index]["exp_avg"])
                second[parameter].copy_(saved[index]["exp_avg_sq"])
        stack.updates.fill_(self.gang.start)
        self.gang.step.untrained = False


def windows(stack: Stack, place: int, member: Member, matrix: Tensor) -> dict[torch.nn.Parameter, Tensor]:
    """What a matrix like the stack's has of a member, by PEFT's parameter, in the order of its optimizer."""
    found = {}
    for name, a, b in stack.windows(matrix):
        rank, layer = stack.ranks[place][name], member.trainer.lora_layers[name]
        found[layer.lora_A["default"].weight] = a[place, :rank]
        found[layer.lora_B["default"].weight] = b[place, :, :rank]
    return {parameter: window for parameter, window in found.items() if parameter.requires_grad}


def save(member: Member, number: int, stack: Stack, place: int, matrices: list[Tensor]) -> None:
    """Write one member's checkpoint; `matrices` are all members' weights, first and second moments, on the CPU."""
    trainer = member.trainer
    weights, first, second = (windows(stack, place, member, matrix) for matrix in matrices)
    trainer.optimizer = trainer.lr_scheduler = None
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(trainer.state.max_steps, optimizer)
    for parameter, weight in weights.items():
        parameter.data.copy_(weight)
        state = {"exp_avg": first[parameter].clone(), "exp_avg_sq": second[parameter].clone()}
        optimizer.state[parameter] = state | {"step": torch.tensor(float(number))}
    for group in optimizer.param_groups:
        group["lr"] = member.rate(number + 1)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": number, "_last_lr": rates})
    trainer._save_checkpoint(trainer.model, None)
    member.keeper.complete(number)
