"""The base model: whether it can be trained, how it is loaded, and its matrices as numbers."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX_NAME
from transformers.utils.hub import cached_files
from trl import get_peft_config, get_quantization_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.utils import create_model_from_path

from data import commit, is_conversational
from inputs import InputError, first_line
from settings import BaseConfig, TrainConfig

NOISE = re.compile("(?<!classifier_)(?<!summary_first_)drop|jitter")  # those belong to heads for other tasks
FIRST_ROWS = 8  # that a chat template is tried on
# What TRL adapts by itself: all linear layers, which are there in any model.
ADAPTED = {
    "lora_target_modules": "all-linear",
    "lora_target_parameters": None,
    "lora_modules_to_save": None,
    "lora_task_type": "CAUSAL_LM",
}
PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # how an unquantised matrix may be stored


def noise_off(config: PreTrainedConfig) -> dict:
    """The model's dropout and router jitter above 0, each as 0.0 instead, nested as its configuration is.

    As from_pretrained takes them; the run's config shows them in model_init_kwargs. Like lora_dropout, their noise
    would blur the comparison between learning rates.
    """
    off: dict = {key: noise_off(getattr(config, key)) for key in config.sub_configs if getattr(config, key, None)}
    for key, value in vars(config).items():
        if NOISE.search(key) and isinstance(value, float) and value > 0:
            off[key] = 0.0
    return {key: value for key, value in off.items() if value != {}}


def check_model(base: BaseConfig) -> None:
    """Fetch the model's files and pin its revision to the commit that was got.

    InputError says what is missing, or why the matrices cannot be adapted and measured.
    """
    name = f"model_name_or_path {base.model_name_or_path!r}"
    try:
        file = cached_file(base.model_name_or_path, CONFIG_NAME, revision=base.model_revision)
        base.model_revision = commit(file or "") or base.model_revision
        source = {"pretrained_model_name_or_path": base.model_name_or_path, "revision": base.model_revision}
        own = {"attn_implementation": base.attn_implementation, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(**source, **own)
        for file, listed in weight_files(base.model_name_or_path, base.model_revision).items():
            with safe_open(file, "pt") as tensors:  # compares the header with the length
                if lost := sorted(listed - set(tensors.keys())):
                    raise ValueError(f"{Path(file).name} lacks {lost[0]}, which {INDEX_NAME} has in it")
        AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of the network, the Hub, safetensors, tokenizers: each says in its first line what
        hint = "give a local directory or a Hub name (and a network)"
        if "gated repo" in str(error):
            hint = f"ask for access at https://huggingface.co/{base.model_name_or_path} and log in: hf auth login"
        raise InputError(f"{name}: {first_line(error)}; {hint}") from error
    if (method := quantization(config).get("quant_method", "bitsandbytes")) != "bitsandbytes":
        raise InputError(f"{name} is quantised with {method} already; use a checkpoint in bfloat16")
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind and (config.is_encoder_decoder or not kind.can_generate()):
        raise InputError(f"{name} is a {config.architectures[0]}; give one that writes text, such as a ...ForCausalLM")
    modules: Any = base.lora_target_modules  # TRL takes a list of one out of its list
    if modules == "all-linear" and (experts := expert_count(config)):
        hint = "use lora_target_modules: [q_proj, k_proj, v_proj, o_proj]"
        raise InputError(f"{name} has {experts} experts in one tensor, which all-linear cannot adapt alone; {hint}")
    if kind is None:
        what = f"architectures: {config.architectures}, of which transformers {transformers.__version__} has none"
        raise InputError(f"{name} says {what}; its own code is not run here")
    if base.attn_implementation or any(getattr(base, key) != value for key, value in ADAPTED.items()):
        check_adapted(base, config)


def check_adapted(base: BaseConfig, config: PreTrainedConfig) -> None:
    """Raise InputError for layers to adapt that the model does not have, or that are not linear, and for its attention.

    PEFT looks for them in the model without its weights. It passes over a name of a list that fits no layer.
    """
    modules: Any = base.lora_target_modules
    listed, alone = modules if isinstance(modules, list) else [], isinstance(modules, str) and modules != "all-linear"
    try:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except (ImportError, ValueError) as error:
        raise InputError(f"attn_implementation: {base.attn_implementation}: {first_line(error)}") from error
    for name in base.lora_modules_to_save or ():
        if not any(f".{layer}".endswith(f".{name}") for layer, _ in model.named_modules()):
            raise InputError(f"lora_modules_to_save: no layer of {base.model_name_or_path} is named {name}")
    linear = [f".{name}" for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    for name in listed:
        if not any(layer.endswith(f".{name}") for layer in linear):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))
            raise InputError(f"lora_target_modules: no linear layer is named {name}; there are {known}")
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = get_peft_model(model, get_peft_config(base))
    except (ValueError, re.error) as error:
        hint = (
            "; one name alone is a regular expression for a layer's whole path, such as '.*(q|v)_proj'" if alone else ""
        )
        raise InputError(f"lora_target_modules: {first_line(error)}{hint}") from error
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise InputError("lora_target_modules: TRL's loss passes over an adapter of lm_head; leave it out")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            dequantised(layer.get_base_layer())


def check_template(base: BaseConfig, training: TrainConfig, rows: Dataset) -> None:
    """Raise InputError for tokens that the tokenizer lacks, and for conversations that the template which TRL will use
    cannot write, or not mark the answers of.
    """
    tokenizer = AutoTokenizer.from_pretrained(base.model_name_or_path, revision=base.model_revision)
    for key, token in (("eos_token", training.eos_token), ("pad_token", training.pad_token)):
        if token not in (None, *tokenizer.get_vocab()):
            raise InputError(f"{key}: {token!r} is not in the vocabulary of {base.model_name_or_path}")
    if not (training.pad_token or tokenizer.pad_token or tokenizer.eos_token):  # in TRL's order
        raise InputError(
            f"model_name_or_path {base.model_name_or_path!r} says no pad_token and no eos_token; set pad_token"
        )
    if not is_conversational(rows):
        return
    name = f"the chat template of model_name_or_path {base.model_name_or_path!r}"
    template = tokenizer.chat_template
    if path := training.chat_template_path:
        name = f"chat_template_path {path!r}"
        try:  # as TRL does
            file = Path(path).suffix in (".jinja", ".j2") and Path(path).is_file()
            template = Path(path).read_text("utf-8") if file else AutoTokenizer.from_pretrained(path).chat_template
        except (OSError, ValueError) as error:
            hint = "give a .jinja file, or a model whose template to take"
            raise InputError(f"{name}: {first_line(error)}; {hint}") from error
    if not template:
        hint = "set chat_template_path, or give rows of prompt + completion as plain text"
        raise InputError(f"{name} is missing, and rows of turns need one; {hint}")
    tokenizer.chat_template, mark = template, training.assistant_only_loss
    if mark and not has_generation_markers(template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer)  # TRL has one for each well-known template
        except ValueError as error:
            hint = "mark them with {% generation %}, or give rows of prompt + completion"
            raise InputError(f"assistant_only_loss: {name} marks no answers; {hint}") from error
    for number, row in enumerate(rows.select(range(min(FIRST_ROWS, len(rows)))), 1):
        turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        options = {"return_dict": True, "return_assistant_tokens_mask": mark}
        try:
            written = tokenizer.apply_chat_template(turns, **template_options(row), **options)
        except Exception as error:  # of Jinja2, and whatever a template meets that it does not expect
            hint = "give rows that it can, or another chat_template_path"
            raise InputError(f"{name} cannot write row {number}: {first_line(error)}; {hint}") from error
        if mark and 1 not in written["assistant_masks"]:
            hint = "put {% generation %} and {% endgeneration %} around the turns of role assistant"
            raise InputError(f"assistant_only_loss: {name} marks no answer in row {number}; {hint}")


def template_options(row: dict) -> dict:
    """What a row of a conversation has for the template beside its turns, as TRL reads it."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (row.get("chat_template_kwargs") or {})


def quantization(config: PreTrainedConfig) -> dict:
    """How a checkpoint is quantised, as it says itself; empty if it is not."""
    return getattr(config, "quantization_config", None) or {}


def expert_count(config: PreTrainedConfig) -> int:
    """The experts of a mixture (the architectures name their number differently), else 0."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(config.get_text_config(), key, None) or 0 for key in keys]
    return max(counts) if max(counts) > 1 else 0


def weight_files(name: str, revision: str) -> dict[str, set[str]]:
    """The model's safetensors files, fetched where they are on the Hub, and what each holds if an index says so."""
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if not cached_file(name, SAFE_WEIGHTS_NAME, **optional) and (index := cached_file(name, INDEX_NAME, **optional)):
        place = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(place.values()))
        files = cached_files(name, shards, revision=revision)
        return {file: {key for key in place if place[key] == shard} for file, shard in zip(files, shards, strict=True)}
    return {file: set() for file in cached_files(name, [SAFE_WEIGHTS_NAME], revision=revision)}


def silenced(base: BaseConfig, training: TrainConfig) -> dict:
    """The noise that is off in the base, whether its own configuration has it or model_init_kwargs."""
    given = {"revision": base.model_revision} | (training.model_init_kwargs or {}) | {"trust_remote_code": False}
    return noise_off(AutoConfig.from_pretrained(base.model_name_or_path, **given))


def model_arguments(base: BaseConfig, training: TrainConfig) -> dict:
    """What `from_pretrained` is called with, besides the quantisation; the base's dropout is off."""
    return {
        "revision": base.model_revision,
        "attn_implementation": base.attn_implementation,
        "dtype": base.dtype,
        **(training.model_init_kwargs or {}),
        "use_safetensors": True,
        **silenced(base, training),
    }


def load_model(base: BaseConfig, training: TrainConfig) -> PreTrainedModel:
    """The base as SFTTrainer would load it from its name, its dropout off; InputError if some stays on.

    And if the files lack a weight, which would then be random, or a norm's start, with a warning in a log.
    """
    if noise := silenced(base, training):
        print(f"train.py: the base model's dropout is off, its noise would blur the comparison: {noise}")
    device_map = {"device_map": None} if PartialState().num_processes > 1 else {}  # each process has its own GPU
    model, loading = create_model_from_path(
        base.model_name_or_path,
        output_loading_info=True,
        quantization_config=get_quantization_config(base),
        trust_remote_code=False,
        **device_map,
        **model_arguments(base, training),
    )
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"model_name_or_path {base.model_name_or_path!r}: no file has {missing[0]}; copy all weights")
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            what = f"dropout {module.p:g} in {name}, which its configuration cannot turn off"
            raise InputError(f"model_name_or_path {base.model_name_or_path!r} has {what}; use another model")
        if isinstance(module, bnb.nn.Linear4bit):
            # With AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation; from then on no gradient
            # passes through them, and norms halve without an error (docs/upstream.md).
            module.support_avx512bf16_for_cpu = False
    return model


def dequantised(layer: Any) -> torch.Tensor:
    """The matrix W [out, in] of a linear layer, in bitsandbytes' 4 or 8 bits or plain; InputError on other kinds."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bnb.nn.Int8Params):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward pass moves it
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    if isinstance(layer, nn.Linear | Conv1D) and type(weight.data) is torch.Tensor and weight.dtype in PLAIN:
        return weight.data.T if isinstance(layer, Conv1D) else weight.data
    kind = type(layer).__name__ if weight is None else f"{type(layer).__name__} of {weight.dtype}"
    raise InputError(f"lora_target_modules: {kind} is no linear layer in NF4, FP4, int8, bfloat16, float16 or float32")
