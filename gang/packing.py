"""Rows without padding: all layers work on the members' tokens one after another, and attention alone sees rows.

Real instruction data have rows of 20 to 1,024 tokens; padded to the longest of all members', most of what the matrices
multiply would be padding. Attention gets the rows padded, as without packing, and so gives the same numbers.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "packed"  # of this attention in transformers' registry


@dataclass
class Packing:
    """Where T tokens lie in R rows of length s, as flat indices. Tokens that fill up a member's share lie nowhere."""

    rows: int  # R
    token: Tensor  # [R·s], the token at a place of the rows; where `padding` says that there is none, the row's first
    padding: Tensor  # [R·s]
    place: Tensor  # [T], the place of a token; for a filler, the member's first
    filler: Tensor  # [T]


class Move(torch.autograd.Function):
    """Vectors [n, d] to m places, [m, d]. Each place takes one vector, so that the gradient needs no sum either."""

    @staticmethod
    def forward(ctx, vectors: Tensor, there: Tensor, back: Tensor, nowhere: Tensor) -> Tensor:
        """there [m], the vector of a place; back [n], the place of a vector; nowhere [n], whether it has none."""
        ctx.back, ctx.nowhere = back, nowhere
        return vectors.index_select(0, there)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        chosen = gradient.index_select(0, ctx.back)
        return chosen.masked_fill_(ctx.nowhere[:, None], 0), None, None, None


class PackedAttention:
    """Causal attention of each row by itself, for tokens packed as `packing` says; set before each forward pass."""

    packing: Packing | None = None

    def __call__(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **rest):
        packing = self.packing

        def rows(heads: Tensor) -> Tensor:  # [1, H, T, D] to [R, H, s, D]
            tokens = heads[0].transpose(0, 1)
            padded = Move.apply(tokens.reshape(len(tokens), -1), packing.token, packing.place, packing.filler)
            return padded.view(packing.rows, -1, *tokens.shape[1:]).transpose(1, 2)

        output, _ = sdpa_attention_forward(module, rows(query), rows(key), rows(value), None, **rest)
        tokens = Move.apply(output.reshape(len(packing.token), -1), packing.place, packing.token, packing.padding)
        return tokens.view(1, len(tokens), *output.shape[2:]), None


attention = PackedAttention()
AttentionInterface.register(NAME, attention)


def packable(model: PreTrainedModel, rows: list[list[int]]) -> bool:
    """Whether packing gives this model's numbers: each token may see others only through causal attention.

    Told by the configuration, and then by two of the data's rows, the one packed behind the other.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    plain = set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None
    if config.get_text_config() is not config or config._attn_implementation != "sdpa":
        return False
    if not (plain and positions and model._supports_attention_backend):
        return False
    long, short = max(rows, key=len), min(rows, key=len)
    with torch.no_grad():
        ids = [torch.tensor([row], device=model.device) for row in (long, short)]
        expected = model.base_model(input_ids=ids[1], use_cache=False).last_hidden_state
        size, tokens = len(long), len(long) + len(short)
        token = torch.zeros(2, size, dtype=torch.long)
        token[0], token[1, : len(short)] = torch.arange(size), torch.arange(size, tokens)
        token[1, len(short) :] = size
        padding = torch.zeros(2, size, dtype=torch.bool)
        padding[1, len(short) :] = True
        parts = token.flatten(), padding.flatten(), torch.arange(tokens), torch.zeros(tokens, dtype=torch.bool)
        packing = Packing(2, *(part.to(model.device) for part in parts))
        position = torch.cat([torch.arange(len(row), device=model.device) for row in (long, short)])[None]
        with packed(model, packing):
            hidden = model.base_model(input_ids=torch.cat(ids, 1), position_ids=position, use_cache=False)
        hidden = hidden.last_hidden_state[:, size:]
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    return bool((hidden - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def packed(model: PreTrainedModel, packing: Packing) -> Iterator[None]:
    """Within, the model takes packed tokens [1, T] and their positions; the backward pass belongs within as well."""
    attention.packing, before = packing, model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
