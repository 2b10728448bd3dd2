"""What is computed in fewer kernels is what Llama's own code computes, and nothing else is replaced."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.llama import modeling_llama as llama

from gang.fused import fuse, normalised, rotated
from gang.step import twin

TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYER = {"input_layernorm", "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("config", "replaced"),
    [(LlamaConfig, LAYER | {"norm", "self_attn"}),
     (Qwen3Config, LAYER | {"norm", "self_attn", "q_norm", "k_norm"}),
     (Phi3Config, LAYER | {"norm"}),  # rotates a part of each head
     (Gemma2Config, {"self_attn"})],  # its weights are from 1
)  # fmt: skip
def test_what_is_not_llamas_stays_and_so_do_other_models(config, replaced):
    model = AutoModelForCausalLM.from_config(config(**TINY))
    ids = torch.randint(3, 64, (2, 9))
    for parameter in model.parameters():  # no weight of 1 hides what is done with it
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    other = twin(model)
    fuse(other)
    assert {name.split(".")[-1] for name, module in other.named_modules() if "forward" in vars(module)} == replaced
    assert not any("forward" in vars(module) for module in model.modules())
    gradients = []
    for each in (model, other):
        model.zero_grad()
        each(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_and_its_gradient_are_equal_to_the_bit(dtype):
    q, k, towards = (torch.randn(2, 3, 5, 8, dtype=dtype) for _ in range(3))
    cos, sin = (torch.randn(2, 5, 8, dtype=dtype) for _ in range(2))
    results = []
    for rotate in (llama.apply_rotary_pos_emb, rotated):
        given = q.clone().requires_grad_(), k.clone().requires_grad_()
        both = rotate(*given, cos, sin)
        results.append([*both, *torch.autograd.grad(both, given, [towards, towards])])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("dtype", "weight"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32",) * 2])
def test_a_normalised_row_is_rounded_where_it_would_be(dtype, weight):
    norm = llama.LlamaRMSNorm(32).to(getattr(torch, weight))
    norm.weight.data = norm.weight.data + torch.rand_like(norm.weight)
    x = torch.randn(3, 32, dtype=getattr(torch, dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(normalised(norm, x), norm(x), rtol=2e-7, atol=0)
