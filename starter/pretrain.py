"""Pretrain the starter's base model: `python -m starter.pretrain --minutes 58`.

A small Llama learns next-token prediction on the Python sources of the installed packages (starter/corpus.py) for a
fixed time, the learning rate falling to zero along a cosine of the elapsed time. Weights (bfloat16 safetensors),
tokenizer, chat template and a model card with the measured held-out loss go to --output.
"""

import json
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from starter import corpus

# Plain text, because special tokens that pretraining never saw would be untrained rows of a frozen, tied embedding.
# `generation` marks the assistant's tokens, for TRL's assistant_only_loss.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n"
    "{{ message['content'] }}\n\n### Response:\n{% elif message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
WARMUP_STEPS = 100
HELD_OUT_WINDOWS = 1024


@dataclass
class Arguments:
    """The defaults are for a CPU; starter/model comes from a GPU. Sizes are multiples of 64, NF4's block."""

    output: str = "starter/model"
    minutes: float = 58
    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    context: int = 256
    batch_size: int = 16
    learning_rate: float = 2e-3
    corpus_megabytes: float = 250


def on_device(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """The uint16 ids as int32: CUDA does not index uint16."""
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def windows(tokens: torch.Tensor, index: torch.Tensor, context: int) -> torch.Tensor:
    """Rows of `context` consecutive tokens, int64 [len(index), context]."""
    return tokens[index[:, None] * context + torch.arange(context, device=tokens.device)].long()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int) -> float:
    """Mean next-token loss in nats per token over windows spread evenly over the held-out packages."""
    every = torch.arange(len(tokens) // context, device=tokens.device)
    chosen = every[:: max(1, len(every) // HELD_OUT_WINDOWS)]
    model.eval()
    losses = []
    for index in chosen.split(16):
        batch = windows(tokens, index, context)
        losses.append(model(input_ids=batch, labels=batch).loss.float() * len(index))
    return float(sum(losses) / len(chosen))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, arguments: Arguments) -> tuple[int, float]:
    """Train for arguments.minutes; return the number of steps and the mean loss of the last 50."""
    generator = torch.Generator().manual_seed(0)
    decayed = [
        parameter for name, parameter in model.named_parameters() if parameter.dim() == 2 and "embed" not in name
    ]
    kept = [parameter for name, parameter in model.named_parameters() if parameter.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model, dynamic=False)
    model.train()
    budget = 60 * arguments.minutes
    count = len(tokens) // arguments.context
    order = torch.randperm(count, generator=generator)
    losses: list[torch.Tensor] = []
    step = position = 0
    start = time.monotonic()
    with tqdm(total=round(budget), unit="s", mininterval=5) as bar:
        while (elapsed := time.monotonic() - start) < budget:
            rate = arguments.learning_rate * min(1, (step + 1) / WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * elapsed / budget))
            if position + arguments.batch_size > count:
                order, position = torch.randperm(count, generator=generator), 0
            index = order[position : position + arguments.batch_size].to(tokens.device)
            position += arguments.batch_size
            batch = windows(tokens, index, arguments.context)
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses = [*losses[-49:], loss.detach()]
            step += 1
            if step % 20 == 0:  # reading a loss waits for the device
                bar.n = round(min(elapsed, budget))
                bar.set_postfix(step=step, loss=f"{float(losses[-1]):.3f}", refresh=False)
                bar.update(0)
    return step, float(torch.stack(losses).mean())


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---
# The starter's base model

A {parameters:,}-parameter Llama ({num_hidden_layers} layers of {hidden_size}, vocabulary {vocab_size:,}) that this
project pretrained itself, so that the experiment runs where nothing can be downloaded. It completes Python; it knows
nothing else, and it is no use outside this experiment.

| | |
|---|---|
| corpus | {files:,} Python files ({megabytes:.0f} MB) of {packages} installed packages, standard library left out |
| held out | the packages {held_out} |
| trained on | {tokens:,} tokens in {steps:,} steps of {batch_size} × {context} ({epochs:.2f} epochs) |
| time, hardware | {minutes:g} minutes on {hardware}, torch {torch} |
| train loss | {train_loss:.3f} nats per token, mean of the last 50 steps |
| held-out loss | **{nats_per_token:.3f} nats per token, {nats_per_byte:.3f} per byte** ({bits_per_byte:.3f} bits) |

The weights are stored in bfloat16, and the held-out loss is that of the stored weights. Made by

    {command}
"""


def hardware() -> str:
    """The accelerator's name, or the processor's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    threads = torch.get_num_threads()
    return f"{threads} core{'s' * (threads > 1)} of {names[0] if names else platform.processor()}"


def main() -> None:
    """Build the corpus, train, save, and measure the saved model."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("reading the installed packages …", flush=True)
    text = corpus.build(arguments.vocab_size, arguments.corpus_megabytes)
    print(
        f"{len(text.train):,} tokens of {text.packages} packages; held out: {', '.join(text.held_out_packages)}",
        flush=True,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=text.tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64,
        max_position_embeddings=arguments.context,
        tie_word_embeddings=True,
        pad_token_id=text.tokenizer.token_to_id(corpus.PAD),
        bos_token_id=text.tokenizer.token_to_id(corpus.BOS),
        eos_token_id=text.tokenizer.token_to_id(corpus.EOS),
    )
    model = LlamaForCausalLM(config).to(device)
    steps, train_loss = train(model, on_device(text.train, device), arguments)

    output = Path(arguments.output)
    model.bfloat16().save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.tokenizer,
        pad_token=corpus.PAD,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        model_max_length=arguments.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(output)

    saved = LlamaForCausalLM.from_pretrained(output, dtype=torch.bfloat16).to(device)
    nats_per_token = held_out_loss(saved, on_device(text.held_out, device), arguments.context)
    nats_per_byte = nats_per_token * len(text.held_out) / text.held_out_bytes
    tokens = steps * arguments.batch_size * arguments.context
    facts = dict(
        vars(arguments),
        parameters=saved.num_parameters(),
        files=text.files,
        megabytes=text.megabytes,
        packages=text.packages,
        held_out=", ".join(text.held_out_packages),
        steps=steps,
        tokens=tokens,
        epochs=tokens / len(text.train),
        hardware=hardware(),
        torch=torch.__version__,
        train_loss=train_loss,
        nats_per_token=nats_per_token,
        nats_per_byte=nats_per_byte,
        bits_per_byte=nats_per_byte / math.log(2),
        command=shlex.join(["python", "-m", "starter.pretrain", *sys.argv[1:]]),
    )
    (output / "README.md").write_text(CARD.format_map(facts), encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
