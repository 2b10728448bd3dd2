"""Attention's kernels see the same causal call in a captured step as in an eager one, and cuDNN's is off."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from gang import step


def test_no_step_hands_attention_a_mask_while_a_graph_is_captured(monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(*arguments, attn_mask=None, is_causal=False, **rest):
        seen.append((attn_mask, is_causal))
        return original(*arguments, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        model.base_model(input_ids=torch.randint(0, 64, (6, 192)), use_cache=False)
    assert seen == [(None, True), (None, True)]


def test_what_the_gang_replaces_in_transformers_is_what_its_masks_ask():
    assert step.masking_utils.is_tracing() is False
    assert step.masking_utils.find_packed_sequence_indices(position_ids=torch.arange(3)[None]) is None


def test_cudnn_attention_is_off():
    assert train.torch is torch and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fault is in a GPU's kernel")
def test_the_gradient_of_a_masked_length_of_192_is_finite():
    """pytorch#196678, bare: with cuDNN's kernel every entry of q's gradient is NaN."""
    torch.manual_seed(0)
    q, k, v = (0.1 * torch.randn(2, 2, 192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -960
    q.requires_grad_()
    mask = torch.ones(192, 192, device="cuda").tril().bool()[None, None]
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    assert q.grad.isfinite().all()
