"""gang/answers.py: what follows the last attention sees the answers alone, and nothing that is read changes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gang.answers import OnAnswers, answers, on_answers, only


@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 3), st.integers(0, 11))
def test_answers_get_what_the_module_gives_and_the_others_zero(places, fillers, at):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(2, 6, 3, requires_grad=True)
    other = x.detach().clone()
    other.flatten(0, 1)[[token for token in range(12) if token not in places | {at}]] = torch.nan
    other.requires_grad_()
    token = torch.tensor([*sorted(places), *[at] * fillers])
    filler = torch.tensor([False] * len(places) + [True] * fillers)
    replaced = OnAnswers(module)
    weight = torch.zeros(12, 1).index_fill(0, token[: len(places)], 1).view(2, 6, 1) * torch.randn(2, 6, 2)
    (module(x) * weight).sum().backward()
    expected = [x.grad, *(parameter.grad.clone() for parameter in module.parameters())]
    module.zero_grad()
    with only([replaced], answers(token, filler, 12)):
        y = replaced(other)
        (y * weight).sum().backward()
    torch.testing.assert_close([other.grad, *(parameter.grad for parameter in module.parameters())], expected)
    torch.testing.assert_close(y[weight != 0], module(x)[weight != 0])
    assert not y[(weight == 0).all(-1)].any() and torch.equal(replaced(x), module(x))


def test_it_is_the_last_of_each_kind_that_is_replaced():
    model = nn.ModuleDict({name: nn.ModuleDict({"mlp": nn.Linear(2, 2), "a": nn.Linear(2, 2)}) for name in ("x", "y")})
    last = model["y"]["mlp"]
    (found,) = on_answers(model)
    assert model["y"]["mlp"] is found and found.module is last and isinstance(model["x"]["mlp"], nn.Linear)
