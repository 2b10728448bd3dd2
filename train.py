"""One QLoRA run at one configuration:

    python train.py --config recipes/starter.yaml --learning_rate 2.0e-4

The recipe holds what is fixed, `sweep.yaml` what varies; every key of both is a flag of the same name (TRL's
SFTConfig, ModelConfig and ScriptArguments, with the changes marked below). The run is logged to Weights & Biases
under the column names of Hugging Face's callback. Its adapter goes to a folder in outputs/adapters, with a model card
that says how to load it.
"""

import difflib
import hashlib
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import inputs

if __name__ == "__main__":
    inputs.answer_at_once(__doc__, sys.argv[1:])  # the imports below take seconds

import bitsandbytes as bnb
import numpy
import torch
import wandb
import yaml
from accelerate import PartialState
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX_NAME
from transformers.utils.hub import cached_files
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer import utils as trl_utils
from trl.trainer.utils import create_model_from_path

import adapter
from data import DataConfig, commit, fingerprint, is_conversational, load_splits, shared_rows, what_was_read
from inputs import InputError, first_line

# Without Triton (on a CPU) TRL's language-model head scores the prompt's tokens too and then masks them. Scoring the
# answer's tokens alone gives the same numbers in half the time.
trl_utils._use_triton = lambda device: True
# With an explicit mask (a padded batch has one), a length of 64 modulo 128 and a row whose logsumexp is below about
# -88, cuDNN's attention returns NaN in the gradient of the queries (torch >= 2.11, Hopper and newer; pytorch#196678).
# It looks like a divergence. PyTorch's other kernels are right.
torch.backends.cuda.enable_cudnn_sdp(False)

NOISE = re.compile("(?<!classifier_)(?<!summary_first_)drop|jitter")  # those belong to heads for other tasks
PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # how an unquantised matrix may be stored
GENERATED_EXAMPLES = 5
GENERATION = {"do_sample": False, "max_new_tokens": 48}
PROJECT = "learning-rate-exploration"  # where neither a sweep nor WANDB_PROJECT names one
# Settings without which the measurements would be wrong, and why.
REQUIRED = {
    "use_peft": (True, "the study is one of LoRA's learning rate"),
    "logging_steps": (1, "an instability can be over within a few steps"),
    "packing": (False, "the paired statistics need one row per example"),
    "padding_free": (False, "the paired statistics need one row per example"),
    "train_sampling_strategy": ("random", "batches of like lengths imitate an oscillation"),
    "fp16": (False, "its loss scaling starts with an overflow, which looks like divergence; use bf16"),
    "batch_eval_metrics": (False, "the evaluation needs all examples at once"),
    "dataset_streaming": (False, "the data's fingerprint needs all rows"),
    "trust_remote_code": (False, "a model's own code could do anything here"),
}


@dataclass
class BaseConfig(ModelConfig):
    """TRL's ModelConfig with QLoRA's defaults (arXiv 2305.14314): NF4, double quantisation, all linear layers."""

    dtype: str | None = field(default=None, metadata={"help": "Compute dtype; default bfloat16 on a GPU that has it."})
    use_peft: bool = True
    load_in_4bit: bool = True
    use_bnb_nested_quant: bool = True
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"])
    lora_dropout: float = 0.0  # dropout noise would blur the comparison between learning rates

    def __post_init__(self):
        super().__post_init__()
        if self.dtype is None:
            self.dtype = "bfloat16" if gpu_has_bfloat16() else "float32"


@dataclass
class TrainConfig(SFTConfig):
    """TRL's SFTConfig with the defaults that a study of learning rates needs."""

    output_dir: str = field(default="outputs/adapters", metadata={"help": "The adapter goes to a folder in it."})
    report_to: str = "wandb"
    logging_steps: int = 1  # an instability can be over within a few steps
    logging_nan_inf_filter: bool = False  # the filter replaces a NaN loss by the running mean, and hides divergence
    eval_on_start: bool = True  # B = 0, so step 0 is the base model: equal for all rates, and the yardstick for harm
    eval_strategy: str = "no"  # the steps of `evaluation_steps` instead: dense early, where the rates part
    save_strategy: str = "no"
    # "constant" ignores warm-up without a word; decay would show the schedule along with the rate.
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 0.03
    adapter_dtype: str = field(
        default="float32",
        metadata={
            "choices": ["float32", "bfloat16", "bfloat16_weights"],
            # TRL stores QLoRA adapters in bfloat16. Its 8 significant bits round small updates away: at 1e-5 most of
            # A never moves, which looks like a rate that is too low.
            "help": "Storage of the adapter; bfloat16 reproduces TRL's own choice (weights, gradients and Adam's "
            "moments), bfloat16_weights rounds the weights alone after each step.",
        },
    )
    freeze_a: bool = field(default=False, metadata={"help": "Keep LoRA's A at its initialisation: a control."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = gpu_has_bfloat16()
        elif self.bf16 and not gpu_has_bfloat16():
            raise InputError(
                "bf16: true needs a GPU with bfloat16, and none is visible; recipes/starter.yaml runs on a CPU"
            )
        super().__post_init__()


def gpu_has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


class Parser(TrlParser):
    """TRL's parser, whose refusals are InputErrors."""

    def __init__(self):
        configurations = (DataConfig, TrainConfig, BaseConfig)
        super().__init__(configurations, usage=inputs.USAGE, allow_abbrev=False, add_help=False)

    def error(self, message: str):
        raise InputError(message)

    def take(self, recipe: dict) -> None:
        """Make the recipe's values the defaults, read as flags would be; a list or nothing for a number is refused."""
        for action in self._actions:
            if (value := recipe.get(action.dest)) is None and action.dest not in recipe:
                continue
            if action.type in (int, float) and not isinstance(value, int | float | str | None):
                raise InputError(f"{action.dest}: {value} is no number; what varies stands in sweep.yaml")
            if action.type in (int, float) and value is None and action.default is not None:
                raise InputError(f"{action.dest}: no value; the default is {action.default}")
            action.default = str(value) if isinstance(value, int | float) else value


def parse(arguments: list[str]) -> tuple[DataConfig, TrainConfig, BaseConfig]:
    """Recipe and flags to configurations; InputError names a key that TRL does not know, or a value that is unfit."""
    recipe, flags = inputs.read(arguments)
    parser = Parser()
    known = {action.dest for action in parser._actions}
    used = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    for key in (*recipe, *used):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise InputError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    inputs.check(arguments)
    parser.take(recipe)
    try:
        data, training, base = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except ValueError as error:  # of TRL's and Hugging Face's own checks of the values
        raise InputError(first_line(error)) from error
    settings = vars(data) | vars(training) | vars(base)
    inputs.check_numbers(settings)
    for key, (value, reason) in REQUIRED.items():
        if settings.get(key, value) != value:
            raise InputError(f"{key}: {settings[key]} is not possible here, use {str(value).lower()}: {reason}")
    warmup = training.get_warmup_steps(training.max_steps)
    if training.lr_scheduler_type != "constant" and 0 < training.max_steps <= warmup:
        hint = "give more steps, or warmup_steps: 0"
        raise InputError(
            f"max_steps: {training.max_steps} ends in the warm-up, before learning_rate is reached; {hint}"
        )
    return data, training, base


def noise_off(config: PreTrainedConfig) -> dict:
    """The model's dropout and router jitter above 0, each as 0.0 instead, nested as its configuration is.

    As from_pretrained takes them; the run's config shows them in model_init_kwargs. Like lora_dropout, their noise
    would blur the comparison between learning rates.
    """
    off = {key: noise_off(getattr(config, key)) for key in config.sub_configs if getattr(config, key, None)}
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
        config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
        for file in weight_files(base.model_name_or_path, base.model_revision):
            with safe_open(file, "pt"):  # compares the header with the length
                pass
        AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of the network, the Hub, safetensors, tokenizers: each says in its first line what
        hint = "give a local directory or a Hub name (and a network)"
        if "gated repo" in str(error):
            hint = f"ask for access at https://huggingface.co/{base.model_name_or_path} and log in: hf auth login"
        raise InputError(f"{name}: {first_line(error)}; {hint}") from error
    if (method := quantization(config).get("quant_method", "bitsandbytes")) != "bitsandbytes":
        raise InputError(f"{name} is quantised with {method} already; use a checkpoint in bfloat16")
    if base.lora_target_modules == "all-linear" and (experts := expert_count(config)):
        hint = "use lora_target_modules: [q_proj, k_proj, v_proj, o_proj]"
        raise InputError(f"{name} has {experts} experts in one tensor, which all-linear cannot adapt alone; {hint}")


def check_template(base: BaseConfig, training: TrainConfig, rows: Dataset) -> None:
    """Raise InputError for conversations that the model's tokenizer cannot write, or not mark the answers of."""
    if not is_conversational(rows) or training.chat_template_path:
        return
    tokenizer = AutoTokenizer.from_pretrained(base.model_name_or_path, revision=base.model_revision)
    name = f"model_name_or_path {base.model_name_or_path!r}"
    if not tokenizer.chat_template:
        hint = "set chat_template_path, or give rows of prompt + completion as plain text"
        raise InputError(f"{name} has no chat template, which rows of turns need; {hint}")
    if training.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)  # TRL has one for each well-known template
        except ValueError as error:
            hint = "mark them with {% generation %}, or give rows of prompt + completion"
            raise InputError(f"assistant_only_loss: the chat template of {name} marks no answers; {hint}") from error


def quantization(config: PreTrainedConfig) -> dict:
    """How a checkpoint is quantised, as it says itself; empty if it is not."""
    return getattr(config, "quantization_config", None) or {}


def expert_count(config: PreTrainedConfig) -> int:
    """The experts of a mixture (the architectures name their number differently), else 0."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(config.get_text_config(), key, None) or 0 for key in keys]
    return max(counts) if max(counts) > 1 else 0


def weight_files(name: str, revision: str) -> list[str]:
    """The model's safetensors files, fetched where they are on the Hub."""
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if not cached_file(name, SAFE_WEIGHTS_NAME, **optional) and (index := cached_file(name, INDEX_NAME, **optional)):
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        return cached_files(name, sorted(set(shards)), revision=revision)
    return cached_files(name, [SAFE_WEIGHTS_NAME], revision=revision)


def swept_values(training: TrainConfig, point: dict | None = None) -> dict:
    """What the sweep varies, as W&B's agent wrote it down; for a run alone its learning rate."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path and point is None:
        return {"learning_rate": training.learning_rate}
    written = point or yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    values = {key: entry["value"] for key, entry in written.items() if not key.startswith("wandb_")}
    for key, value in values.items():
        if isinstance(value, str) and isinstance(getattr(training, key, None), float):
            raise InputError(f"sweep.yaml: {key}: {value} is a string to YAML; write {float(value):.1e}")
    return values


def evaluation_steps(max_steps: int) -> set[int]:
    """0, 1, 2, 4 and 8 % of the run, where the rates part, then every 5 %, and the end."""
    shares = (0.01, 0.02, 0.04, 0.08, *(0.05 * k for k in range(2, 20)))
    return {0, max_steps} | {max(1, round(share * max_steps)) for share in shares}


def json_number(value: float) -> float | str:
    """A float, or what W&B's API writes for one that JSON lacks: "NaN", "Infinity", "-Infinity"."""
    if math.isfinite(value):
        return round(value, 5)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class Trainer(SFTTrainer):
    """TRL's SFTTrainer, unchanged in how it trains, that measures more in each evaluation.

    eval/loss is the mean over all answer tokens; Hugging Face's would be the mean of the batches' means.
    """

    def __init__(self, base: BaseConfig, training: TrainConfig, train: Dataset, test: Dataset, model=None):
        model = model or load_model(base, training)  # a gang hands on the one that it has loaded
        used, training.model_init_kwargs = model_arguments(base, training), None
        lora = get_peft_config(base)
        lora.revision = base.model_revision  # so that PEFT loads the same base
        if model.config.get_text_config() is not model.config:
            lora.exclude_modules = ".*(visual|vision|audio|multi_modal).*"  # text gives them no gradient
        try:
            super().__init__(
                model=model,
                args=training,
                train_dataset=train,
                eval_dataset=test,
                processing_class=AutoTokenizer.from_pretrained(base.model_name_or_path, revision=base.model_revision),
                compute_metrics=self.evaluation_metrics,
                peft_config=lora,
            )
        except ValueError as error:  # TRL's and PEFT's own checks: a chat template, the names of layers
            raise InputError(first_line(error)) from error
        training.model_init_kwargs = used  # for the record; TRL would have warned that it does not use them
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                dtype = torch.bfloat16 if training.adapter_dtype == "bfloat16" else torch.float32
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad = not (training.freeze_a and "lora_A" in name)
        if training.adapter_dtype == "bfloat16_weights":
            self.add_callback(RoundWeights())
        self.generation_examples = self.eval_dataset.select(range(min(GENERATED_EXAMPLES, len(self.eval_dataset))))
        by_length = sorted(range(len(self.eval_dataset)), key=lambda i: -len(self.eval_dataset[i]["input_ids"]))
        self.eval_dataset = self.eval_dataset.select(by_length)  # equal lengths share a batch: least padding
        self.lora_layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        self.weight_squares = {name: weight_square(layer) for name, layer in self.lora_layers.items()}
        self.example_losses: dict = {"steps": [], "tokens": [], "nll": []}
        if "module" in self.eval_dataset.column_names:  # examples of one module are alike: the statistics cluster by it
            self.example_losses["module"] = list(self.eval_dataset["module"])
        self.first_batch_hash: str | None = None

    def training_step(self, model, inputs, *arguments, **keywords):
        self.record_first_batch(inputs)
        return super().training_step(model, inputs, *arguments, **keywords)

    def record_first_batch(self, inputs: dict[str, Tensor]) -> None:
        if self.first_batch_hash is None:
            rows = json.dumps([inputs["input_ids"].tolist(), inputs["labels"].tolist()])
            self.first_batch_hash = hashlib.sha256(rows.encode()).hexdigest()[:16]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per example: sum of NLL in nats and number of right tokens [batch, 2], number of tokens [batch]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        scores = torch.stack([-outputs.log_probs.float().sum(-1), outputs.is_top1.float().sum(-1)], dim=-1)
        return None, scores, outputs.label_mask.sum(-1)

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = self.record_scores(prediction.predictions, prediction.label_ids)
        return metrics | update_sizes(adapter_grams(self.lora_layers)[None], sum(self.weight_squares.values()))[0]

    def record_scores(self, scores: numpy.ndarray, tokens: numpy.ndarray) -> dict[str, float]:
        """Keep the NLL of each example and give the metrics; the arguments are all that `prediction_step` returned."""
        nll, right = scores.T
        self.example_losses["steps"].append(self.state.global_step)
        self.example_losses["tokens"] = tokens.tolist()
        self.example_losses["nll"].append([json_number(value) for value in nll.tolist()])
        return {"loss": nll.sum() / tokens.sum(), "mean_token_accuracy": right.sum() / tokens.sum()}

    def question(self, row: dict) -> tuple[list[int], str]:
        """The ids of a test row's prompt, as the tokenizer makes them of what a user gives, and the reference answer.

        Not the row's ids before its answer: where the prompt ends in a space, a tokenizer joins the two.
        """
        tokenizer, ids = self.processing_class, row["input_ids"]
        if "prompt" in row:
            asked, answer = row["prompt"], row["completion"]
        elif "messages" in row:
            turns = row["messages"]
            first = next((i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"), len(turns))
            asked, answer = turns[:first], turns[first:]
        else:  # plain text is all answer: half of it is the prompt
            return ids[: len(ids) // 2], tokenizer.decode(ids[len(ids) // 2 :], skip_special_tokens=True)
        if isinstance(asked, str):
            ids, reference = tokenizer(asked)["input_ids"], answer.removesuffix(tokenizer.eos_token)  # TRL has added it
        else:
            tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}  # as TRL has them
            options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, **options)
            ids, reference = prompt["input_ids"], ""
            if answer:
                reference = answer[0].get("content") or json.dumps(answer[0].get("tool_calls"))
        return ids[: self.args.max_length], reference

    def questions(self) -> tuple[BatchEncoding, list[str]]:
        """The first test prompts, padded on the left, and their reference answers."""
        prompts, references = zip(*map(self.question, self.generation_examples), strict=True)
        batch = self.processing_class.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        return batch.to(self.model.device), list(references)

    def generate_answers(self) -> list[dict[str, str]]:
        """Greedy answers to the first test prompts, each beside the reference and the untrained model's answer."""
        batch, references = self.questions()
        options = {"output_router_logits": False} if self.aux_loss_enabled else {}  # its loss has no padding mask here
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            trained = self.model.generate(**batch, **GENERATION, **options)
            with self.model.disable_adapter():
                untrained = self.model.generate(**batch, **GENERATION, **options)
        return self.answer_rows(batch, references, untrained, trained)

    def answer_rows(
        self, batch: BatchEncoding, references: list[str], untrained: Tensor, trained: Tensor
    ) -> list[dict]:
        """The rows of generations.json, for `questions` and what `generate` made of them."""
        length = batch["input_ids"].shape[1]
        decode = partial(self.processing_class.batch_decode, skip_special_tokens=True)
        columns = decode(batch["input_ids"]), references, decode(untrained[:, length:]), decode(trained[:, length:])
        keys = ("prompt", "reference", "untrained", "completion")
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def model_arguments(base: BaseConfig, training: TrainConfig) -> dict:
    """What `from_pretrained` is called with, besides the quantisation; the base's dropout is off."""
    config = AutoConfig.from_pretrained(base.model_name_or_path, revision=base.model_revision)
    return {
        "revision": base.model_revision,
        "attn_implementation": base.attn_implementation,
        "dtype": base.dtype,
        "use_safetensors": True,
        **(training.model_init_kwargs or {}),
        **noise_off(config),
    }


def load_model(base: BaseConfig, training: TrainConfig) -> PreTrainedModel:
    """The base as SFTTrainer would load it from its name, its dropout off; InputError if some stays on."""
    if noise := noise_off(AutoConfig.from_pretrained(base.model_name_or_path, revision=base.model_revision)):
        print(f"train.py: the base model's dropout is off, its noise would blur the comparison: {noise}")
    device_map = {"device_map": None} if PartialState().num_processes > 1 else {}  # each process has its own GPU
    model = create_model_from_path(
        base.model_name_or_path,
        quantization_config=get_quantization_config(base),
        trust_remote_code=False,
        **device_map,
        **model_arguments(base, training),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            what = f"dropout {module.p:g} in {name}, which its configuration cannot turn off"
            raise InputError(f"model_name_or_path {base.model_name_or_path!r} has {what}; use another model")
        if isinstance(module, bnb.nn.Linear4bit):
            # With AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation; from then on no gradient
            # passes through them, and norms halve without an error (docs/upstream.md).
            module.support_avx512bf16_for_cpu = False
    return model


def dequantised(layer: nn.Module) -> torch.Tensor:
    """The matrix W [out, in] of a linear layer, in bitsandbytes' 4 or 8 bits or plain; InputError on other kinds."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bnb.nn.Int8Params):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward pass moves it
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    if isinstance(layer, nn.Linear | Conv1D) and type(weight.data) is torch.Tensor and weight.dtype in PLAIN:
        return weight.data.T if isinstance(layer, Conv1D) else weight.data
    kind = type(layer).__name__ if weight is None else f"{type(layer).__name__} of {weight.dtype}"
    raise InputError(f"lora_target_modules: {kind} is no linear layer in NF4, FP4, int8, bfloat16, float16 or float32")


def weight_square(layer: LoraLayer) -> float:
    """‖W‖_F² of the frozen matrix under an adapter."""
    return float(dequantised(layer.get_base_layer()).float().square().sum())


@torch.no_grad()
def adapter_grams(layers: dict[str, LoraLayer]) -> Tensor:
    """[modules, 2, r, r]: (α/r) AAᵀ and (α/r) BᵀB of each adapted matrix."""
    grams = []
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        grams.append(torch.stack([a @ a.T, b.T @ b]) * layer.scaling["default"])
    return torch.stack(grams)


def update_sizes(grams: Tensor, weight_square: float) -> list[dict[str, float]]:
    """‖ΔW‖_F/‖W‖_F over all adapted matrices, and the mean stable rank ‖ΔW‖_F²/‖ΔW‖_2² of the matrices.

    For the grams [adapters, modules, 2, r, r] and Σ‖W‖_F². ΔW = (α/r)BA is never formed: its squared singular values
    are (α/r)² times the eigenvalues of (AAᵀ)^½ (BᵀB) (AAᵀ)^½, an r×r matrix. The stable rank is left out where ΔW = 0,
    as at step 0.
    """
    grams = grams.double().cpu()
    finite = grams.flatten(1).isfinite().all(1)
    grams = torch.where(finite[:, None, None, None, None], grams, 0.0)
    values, vectors = torch.linalg.eigh(grams[:, :, 0])
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]
    squares = torch.linalg.eigvalsh(root.mT @ grams[:, :, 1] @ root).clamp(min=0)
    sizes = []
    for ok, square in zip(finite.tolist(), squares, strict=True):
        if not ok:
            sizes.append({"update_ratio": math.nan, "stable_rank": math.nan})
            continue
        sizes.append({"update_ratio": math.sqrt(float(square.sum()) / weight_square)})
        moved = square[square[:, -1] > 0]
        if len(moved):
            sizes[-1]["stable_rank"] = float((moved.sum(1) / moved[:, -1]).mean())
    return sizes


class RoundWeights(TrainerCallback):
    """Rounds the adapter's weights to bfloat16's values after each step; gradients and moments stay float32."""

    def on_train_begin(self, args, state, control, model, **_):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.data.bfloat16())

    on_optimizer_step = on_train_begin


class Watch(TrainerCallback):
    """Evaluates at the planned steps, times the training steps alone, and stops a run that is no longer finite."""

    def __init__(self, run):
        self.run = run
        self.peak_learning_rate = 0.0
        self.seconds = 0.0
        self.tokens = 0
        self.diverged_at_step: int | None = None

    def on_train_begin(self, args, state, control, **_):
        self.evaluation_steps = evaluation_steps(state.max_steps)
        planned = {"max_steps": state.max_steps, "warmup_steps": args.get_warmup_steps(state.max_steps)}
        self.run.config.update(planned, allow_val_change=True)

    def on_step_begin(self, args, state, control, **_):
        self.step_start = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the backward pass would run on outside the measured time
        self.seconds += time.monotonic() - self.step_start
        control.should_evaluate = state.global_step in self.evaluation_steps

    def on_log(self, args, state, control, logs, **_):
        self.tokens = logs.get("num_tokens", self.tokens)
        self.peak_learning_rate = max(self.peak_learning_rate, logs.get("learning_rate", 0.0))
        values = [logs[key] for key in ("loss", "grad_norm", "eval_loss") if key in logs]
        if not all(map(math.isfinite, values)) and self.diverged_at_step is None:
            self.diverged_at_step = state.global_step
            self.run.summary["diverged_at_step"] = state.global_step
            control.should_training_stop = True


def describe_data(trainer: Trainer, train: Dataset, test: Dataset) -> dict:
    """The config entries about the rows as they were read, and as the trainer has tokenised them."""
    return {
        "data_fingerprint": fingerprint(train, test),
        "rows_in_both_splits": shared_rows(train, test),
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "train_tokens": sum(map(len, trainer.train_dataset["input_ids"])),
    }


def describe(trainer: Trainer, data: DataConfig, base: BaseConfig) -> dict:
    """The config entries beyond TRL's arguments: what the analysis and a reader need to know about the run."""
    trainable, total = trainer.model.get_nb_trainable_parameters()  # counts packed 4-bit weights right
    adapted: dict[str, dict] = {}
    for name, layer in trainer.lora_layers.items():
        kind = adapted.setdefault(name.rsplit(".", 1)[-1], {"count": 0, "square": 0.0})
        kind |= {"d_in": layer.in_features, "d_out": layer.out_features}
        kind["count"] += 1
        kind["square"] += trainer.weight_squares[name]
    for kind in adapted.values():
        kind["weight_std"] = math.sqrt(kind.pop("square") / (kind["count"] * kind["d_in"] * kind["d_out"]))
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "wandb")
    cuda = torch.cuda.is_available()
    return (
        vars(data)
        | vars(base)
        | {
            "vocab_size": trainer.model.config.get_text_config().vocab_size,
            "adapted_modules": adapted,
            "trainable_parameters": trainable,
            "all_parameters": total,
            "hardware": torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)",
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        }
    )


def start_run(training: TrainConfig, data: DataConfig, base: BaseConfig, swept: dict, **options):
    """Open the W&B run: named after the swept values, grouped by learning rate, resumed if an agent restarts it."""
    try:
        return wandb.init(
            project=None if "WANDB_SWEEP_ID" in os.environ or "WANDB_PROJECT" in os.environ else PROJECT,
            name=" ".join(f"{key}={value}" for key, value in swept.items()),
            group=f"learning_rate={training.learning_rate}",
            tags=[Path(name).resolve().name[:64] for name in (base.model_name_or_path, data.dataset_name)],
            resume="allow",
            mode=None if PartialState().is_main_process else "disabled",
            **options,
        )
    except wandb.Error as error:
        hint = "run `wandb login`, start `python -m local_wandb`, or set WANDB_MODE=offline"
        raise InputError(f"W&B: {first_line(error)}; {hint}") from error


def save_with_run(run, name: str, content) -> None:
    path = Path(run.dir, name)
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    run.save(str(path), base_path=run.dir, policy="now")


def read_data(data: DataConfig, training: TrainConfig, base: BaseConfig) -> tuple[Dataset, Dataset]:
    """The two splits. Whatever can be wrong before a run begins is an InputError here."""
    splits = load_splits(data, training.assistant_only_loss)
    check_model(base)
    check_template(base, training, splits[0])
    if PartialState().num_processes == 1 and torch.cuda.device_count() > 1:
        raise InputError("several GPUs are visible: set CUDA_VISIBLE_DEVICES to one, or start with accelerate launch")
    try:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=training.output_dir).close()
    except OSError as error:
        raise InputError(f"output_dir {training.output_dir}: {error.strerror}; choose a writable directory") from error
    return splits


def watch_run(trainer: Trainer, run, described: dict) -> Watch:
    """Let the run know what it is, and a Watch follow the training."""
    watch = Watch(run)
    trainer.add_callback(watch)
    run.config.update(described, allow_val_change=True)
    return watch


def log_adapter(run, facts: dict, folder: str) -> None:
    """Log the adapter as an artifact, under the name, type and alias of Hugging Face's callback.

    Unless WANDB_LOG_MODEL is false. That is Hugging Face's default, made for whole models: an adapter is small.
    """
    if os.environ.get("WANDB_LOG_MODEL", "end").lower() not in ("false", "0"):
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=facts | {"final_model": True})
        artifact.add_dir(folder)
        run.log_artifact(artifact, aliases=["final_model"])


def leave(trainer: Trainer, watch: Watch, answers: list[dict] | None) -> None:
    """What stays of a run that has trained to its end: files, adapter, summary. One that diverged has no answers."""
    run, training = watch.run, trainer.args
    save_with_run(run, "eval_nll.json", trainer.example_losses)
    if answers is not None:
        save_with_run(run, "generations.json", answers)
    log_adapter(run, adapter.save(trainer, run, watch.diverged_at_step), training.output_dir)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * kilobytes
    run.summary["first_batch_hash"] = trainer.first_batch_hash
    run.summary["train_seconds"] = watch.seconds
    run.summary["tokens_per_second"] = watch.tokens / watch.seconds
    run.summary["peak_memory_gib"] = peak_memory / 2**30
    if trainer.state.global_step > training.get_warmup_steps(trainer.state.max_steps):
        requested, peak = training.learning_rate, watch.peak_learning_rate
        assert math.isclose(peak, requested), f"the peak learning rate was {peak}, not the requested {requested}"


def train(data: DataConfig, training: TrainConfig, base: BaseConfig, swept: dict) -> None:
    """The whole run: data, trainer, W&B, training, measurements, adapter."""
    splits = read_data(data, training, base)
    trainer = Trainer(base, training, *splits)
    described = describe_data(trainer, *splits)
    first_lines = what_was_read(data, splits, trainer, described["rows_in_both_splits"])
    with start_run(training, data, base, swept) as run:  # whatever is refused has been by now
        training.output_dir = str(Path(training.output_dir, adapter.folder_name(swept, run.id)))
        if PartialState().is_main_process:
            print(first_lines, flush=True)
        watch = watch_run(trainer, run, describe(trainer, data, base) | described)
        trainer.train()
        leave(trainer, watch, trainer.generate_answers() if watch.diverged_at_step is None else None)


def main() -> None:
    # W&B loses what it has not sent yet when the process dies of a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "--help-all" in sys.argv:
        Parser().print_help()
        return
    try:
        data, training, base = parse(sys.argv[1:])
        train(data, training, base, swept_values(training))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
