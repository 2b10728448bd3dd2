"""gang/answers.py: what follows the last attention sees the answers alone, and nothing that is read changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

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


TINY = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
LINEAR = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8) | {
    "layer_types": ["full_attention", "linear_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "replaced"),
    [
        ("llama", {}, ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp"]),
        ("qwen3_5_text", LINEAR, ["model.layers.1.mlp"]),  # its last o_proj has a recurrent layer after it
        ("bloom", {"n_head": 2, "n_layer": 1}, []),  # its mlp adds to the residual by itself
    ],
)
def test_what_no_other_token_sees_is_replaced(kind, changes, replaced):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TINY | changes))
    before = dict(model.named_modules())
    found = on_answers(model)
    assert [name for name, module in model.named_modules() if isinstance(module, OnAnswers)] == replaced
    assert [one.module for one in found] == [before[name] for name in replaced]
