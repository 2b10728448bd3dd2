"""The end of a model on the answers' positions alone: nothing is read of the others once attention has seen them.

Of instruction data one token in five or so is an answer's, and what follows the last attention treats each by itself.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gang.packing import Move

LAST = ".o_proj", ".mlp"  # the ends of these modules' names, in the architectures that name them so


@dataclass
class Answers:
    """Where P answers lie among T tokens, as flat indices; fillers lie nowhere."""

    token: Tensor  # [P]
    filler: Tensor  # [P]
    answer: Tensor  # [T], the answer at a token; where there is none, any
    none: Tensor  # [T]


def answers(token: Tensor, filler: Tensor, tokens: int) -> Answers:
    """Answers at `token` [P] of so many tokens."""
    place = token.masked_fill(filler, tokens)  # one more, for the fillers
    answer = torch.zeros(tokens + 1, dtype=torch.long, device=token.device)
    none = torch.ones(tokens + 1, dtype=torch.bool, device=token.device)
    answer.index_copy_(0, place, torch.arange(len(token), device=token.device))
    none.index_fill_(0, place, False)
    return Answers(token, filler, answer[:-1], none[:-1])


class OnAnswers(nn.Module):
    """Takes the place of a module that treats each token by itself: within `only`, the others' results are zero."""

    answers: Answers | None = None

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if (at := self.answers) is None:
            return self.module(x)
        y = self.module(Move.apply(x.flatten(0, -2), at.token, at.answer, at.none)[None])[0]
        # Zeros, not what lies there by chance: that might be another member's NaN, and the backward pass would meet it.
        spread = Move.apply(y, at.answer, at.token, at.filler).masked_fill(at.none[:, None], 0)
        return spread.view(*x.shape[:-1], -1)


def on_answers(model: PreTrainedModel) -> list[OnAnswers]:
    """Replace what follows the model's last attention, as far as it is known by its name."""
    found = []
    for end in LAST:
        names = [name for name, _ in model.named_modules() if name.endswith(end)]
        if names and at_the_end(model, module := model.get_submodule(names[-1])):
            found.append(OnAnswers(module))
            model.set_submodule(names[-1], found[-1])
    return found


@torch.no_grad()
def at_the_end(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether no token's result depends on what the module sees of another.

    The name alone does not tell: a model may end with recurrent layers, or pass through its layers again.
    """
    if len(inspect.signature(module.forward).parameters) > 1:  # Bloom's adds what comes past it
        return False
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    first = torch.tensor([True, False], device=model.device)[:, None]
    hook = module.register_forward_pre_hook(lambda _, x: x[0].masked_fill(first, torch.nan))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    return bool(hidden[0, -1].isfinite().all())


@contextmanager
def only(modules: list[OnAnswers], at: Answers | None) -> Iterator[None]:
    """Within, these modules treat the answers alone; the backward pass belongs within as well."""
    for module in modules:
        module.answers = at
    try:
        yield
    finally:
        for module in modules:
            module.answers = None
