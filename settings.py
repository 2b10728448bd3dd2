"""The settings of a run: a recipe and flags, read as TRL's own configurations with this study's defaults."""

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig, SFTConfig, TrlParser

import guides
import inputs
from data import DataConfig
from inputs import InputError, first_line

# Settings without which the measurements would be wrong, and why.
REQUIRED = {
    "use_peft": (True, "the study is one of LoRA's learning rate"),
    "logging_steps": (1, "an instability can be over within a few steps"),
    "logging_strategy": ("steps", "an instability can be over within a few steps"),
    "logging_nan_inf_filter": (False, "it logs the mean of the losses before in place of one that is NaN"),
    "packing": (False, "the paired statistics need one row per example"),
    "eval_packing": (False, "the paired statistics need one row per example"),
    "padding_free": (False, "the paired statistics need one row per example"),
    "train_sampling_strategy": ("random", "batches of like lengths imitate an oscillation"),
    "fp16": (False, "its loss scaling starts with an overflow, which looks like divergence; use bf16"),
    "batch_eval_metrics": (False, "the evaluation needs all examples at once"),
    "eval_do_concat_batches": (True, "the evaluation needs all examples at once"),
    "dataloader_drop_last": (False, "it would leave out test rows too"),
    "auto_find_batch_size": (False, "runs whose batches differ do not compare"),
    "load_best_model_at_end": (False, "the rates are compared at the last step"),
    "metric_for_best_model": (None, "the rates are compared at the last step"),
    "dataset_streaming": (False, "the data's fingerprint needs all rows"),
    "trust_remote_code": (False, "a model's own code could do anything here"),
}

# Of model_init_kwargs, what a flag says: there it would be used and not recorded.
FLAGS_OF_MODEL = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}
STEPS = 100  # of a schedule that is tried
DTYPES = ("bfloat16", "float16", "float32")  # that the matrices of a base in 4 bits can be computed in


@dataclass
class BaseConfig(ModelConfig):
    """TRL's ModelConfig with QLoRA's defaults (arXiv 2305.14314): NF4, double quantisation, all linear layers."""

    dtype: str | None = field(default=None, metadata={"help": "Compute dtype; default bfloat16 on a GPU that has it."})
    use_peft: bool = True
    load_in_4bit: bool = True
    use_bnb_nested_quant: bool = True
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"])
    lora_dropout: float = 0.0  # dropout noise would blur the comparison between learning rates
    guide: str | None = field(
        default=None,
        metadata={"help": "Of recipes/guides.yaml: its learning_rate, lora_r and lora_alpha replace the recipe's."},
    )

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
    eval_packing: bool | None = False
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
            self.bf16: bool | None = gpu_has_bfloat16()
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
        super().__init__(configurations, usage=inputs.USAGE, add_help=False)

    def error(self, message: str):
        raise InputError(message)

    def know(self, keys: Iterable[str]) -> None:
        """Raise InputError for a key that is no flag."""
        known = {action.dest for action in self._actions}
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise InputError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    def take(self, recipe: dict) -> None:
        """Make the recipe's values the defaults, read as flags would be; InputError for what no flag could give."""
        for action in self._actions:
            if (value := recipe.get(action.dest)) is None and action.dest not in recipe:
                continue
            if action.type in (int, float) and not isinstance(value, int | float | str | None):
                raise InputError(f"{action.dest}: {value} is no number; what varies stands in sweep.yaml")
            if action.type in (int, float, str) and value is None and action.default is not None and not action.nargs:
                raise InputError(f"{action.dest}: no value; the default is {action.default}")
            if action.choices and value is not None and str(value) not in action.choices:  # argparse trusts a default
                raise InputError(f"{action.dest}: {value}: choose from {', '.join(action.choices)}")
            action.default = str(value) if isinstance(value, int | float) else value


def parse(arguments: list[str]) -> tuple[DataConfig, TrainConfig, BaseConfig]:
    """Recipe and flags to configurations; InputError names a key that TRL does not know, or a value that is unfit."""
    recipe, flags = inputs.read(arguments)
    parser = Parser()
    used = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    parser.know((*recipe, *used))
    inputs.check(arguments)
    parser.take(recipe)
    try:
        data, training, base = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ImportError, OSError, TypeError, ValueError) as error:  # of TRL's and Hugging Face's own checks
        raise InputError(first_line(error)) from error
    if base.guide:
        follow(base, training, used)
    settings = vars(data) | vars(training) | vars(base)
    inputs.check_numbers(settings)
    for key, (value, reason) in REQUIRED.items():
        if settings.get(key, value) != value:
            said = settings[key].value if isinstance(settings[key], Enum) else settings[key]
            raise InputError(f"{key}: {said} is not possible here, use {str(value).lower()}: {reason}")
    check_made(training, base)
    if training.max_steps > 0:
        check_warmup(training, training.max_steps)
    return data, training, base


def check_warmup(training: TrainConfig, steps: int) -> None:
    """Raise InputError if so many steps are no more than the warm-up, or if the rate decays before it is reached."""
    warmup = training.get_warmup_steps(steps)
    if training.lr_scheduler_type != "constant" and steps <= warmup:
        what = f"num_train_epochs: {training.num_train_epochs:g}, {steps} steps,"
        if training.max_steps > 0:
            what = f"max_steps: {steps}"
        hint = "give more steps, or warmup_steps: 0"
        raise InputError(f"{what} ends in the warm-up, before learning_rate is reached; {hint}")
    factor = schedule(training, warmup, steps)
    peak = max(map(factor, {max(0, warmup - 1), warmup})) if factor else 1.0
    if not math.isclose(peak, 1):  # the run would fail for it, once it has trained
        what = f"in {steps} steps the rate comes to {peak:.6g} of learning_rate, and not to it"
        raise InputError(f"{schedule_name(training)}: {what}")


def schedule(training: TrainConfig, warmup: int, steps: int) -> Callable[[int], float] | None:
    """The share of learning_rate after so many steps; None if it depends on how the training goes."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    options = training.lr_scheduler_kwargs
    made = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    return made.lr_lambdas[0] if isinstance(made, LambdaLR) else None


def schedule_name(training: TrainConfig) -> str:
    kind, options = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs
    return f"lr_scheduler_type: {kind.value} with lr_scheduler_kwargs: {json.dumps(options)}"


def check_made(training: TrainConfig, base: BaseConfig) -> None:
    """Raise InputError for what Hugging Face's libraries could not make, as a run begins, of these settings."""
    if base.dtype not in DTYPES and (base.load_in_4bit or base.dtype != "auto"):
        raise InputError(f"dtype: {base.dtype} is not possible here, use one of {', '.join(DTYPES)}")
    for key in FLAGS_OF_MODEL.keys() & (training.model_init_kwargs or {}):
        raise InputError(f"model_init_kwargs: {key} is set by {FLAGS_OF_MODEL[key]}")
    if missing := set(training.report_to) - set(get_available_reporting_integrations()):
        raise InputError(f"report_to: {', '.join(sorted(missing))} is not installed; use wandb, the default")
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel: liger-kernel is not installed; leave it out")
    what = f"optim: {training.optim.value}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
        kind([torch.zeros(1)], **options)
        what = schedule_name(training)
        factor = schedule(training, 0, STEPS)
        if factor and max(map(factor, range(STEPS + 1))) > 1 + 1e-9:
            raise ValueError(f"the rate would go above learning_rate: {training.learning_rate}")
    except (ArithmeticError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"{what}: {first_line(error)}") from error


def follow(base: BaseConfig, training: TrainConfig, flags: list[str]) -> None:
    """Set what the guide recommends for this model; InputError if a flag sets the same."""
    settings = guides.settings(str(base.guide), str(base.model_name_or_path), base.model_revision)
    for key, value in settings.items():
        if key in flags:
            raise InputError(f"guide: {base.guide} sets {key} by itself; leave out one of them")
        setattr(training if key == "learning_rate" else base, key, value)


def swept_values(training: TrainConfig, point: dict | None = None) -> dict:
    """What the sweep varies, as W&B's agent wrote it down; for a run alone its learning rate."""
    if point is None:
        if not (path := os.environ.get("WANDB_SWEEP_PARAM_PATH")):
            return {"learning_rate": training.learning_rate}
        point = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    values = {key: entry["value"] for key, entry in point.items() if not key.startswith("wandb_")}
    for key, value in values.items():
        if isinstance(value, str) and isinstance(getattr(training, key, None), float):
            raise InputError(f"sweep.yaml: {key}: {value} is a string to YAML; write {float(value):.1e}")
    return values
