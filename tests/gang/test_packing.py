"""gang/packing.py: whose rows may be packed. That the numbers are then the same, test_gang.py says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gang.packing import packable

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [2, 7, 1, 8, 2]]


def configure(key: str, value):
    return lambda model: setattr(model.config, key, value)


def look_at_all(model: LlamaForCausalLM) -> None:
    """Each token sees the mean of all others."""
    model.model.embed_tokens.register_forward_hook(lambda module, given, found: found + found.mean(1, keepdim=True))


PACKABLE = {
    "as it is": (lambda model: None, True),
    "all full": (configure("layer_types", ["full_attention"]), True),
    "some slide": (configure("layer_types", ["full_attention", "sliding_attention"]), False),
    "all slide": (configure("sliding_window", 2), False),
    "eager": (configure("_attn_implementation", "eager"), False),
    "attention of its own": (lambda model: setattr(model, "_supports_attention_backend", False), False),
    "sees all": (look_at_all, False),
}


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_see_others_through_causal_attention_alone_are_packed(kind, dtype):
    change, expected = PACKABLE[kind]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(dtype)
    change(model)
    before = model.config._attn_implementation
    assert packable(model, ROWS) == expected
    assert model.config._attn_implementation == before
