"""What varies: a sweep's parameters and grid points, and which runs train on the same recipe.

Runs are compared only within a group of one recipe. Everything in a run's config counts as its recipe but for
NOT_TRAINED_ON, so a key that nobody thought of separates runs rather than being ignored.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import product

from analysis.files import number
from analysis.runs import Run, learning_rate

# The recipe's settings that a report shows, in this order; all others are compared as well.
SHOWN = (
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "data_fingerprint",
    "vocab_size",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "dtype",
    "max_length",
    "assistant_only_loss",
    "max_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "weight_decay",
    "optim",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "adapter_dtype",
    "freeze_a",
    "trainable_parameters",
)
# Settings that change nothing that a run trains on: what a sweep varies, what only names or follows from others, who
# computes it, and how it is watched.
NOT_TRAINED_ON = frozenset(
    """
    learning_rate seed guide guide_source output_dir run_name project report_to peft_config quantization_config
    model_init_kwargs
    trainable_parameters all_parameters model/num_parameters adapted_modules train_examples eval_examples train_tokens
    eval_tokens transformers_version id2label label2id hub_token gang gang_size hardware versions use_cpu local_rank
    tf32 disable_tqdm skip_memory_metrics do_train do_eval do_predict prediction_loss_only batch_eval_metrics
    include_for_metrics include_num_input_tokens_seen torch_empty_cache_steps metric_for_best_model greater_is_better
    load_best_model_at_end restore_callback_states_from_checkpoint resume_from_checkpoint ignore_data_skip debug
    per_device_eval_batch_size enable_jit_checkpoint push_to_hub use_cache
    """.split()  # noqa: SIM905 - a list of fifty lines says less
)
NOT_TRAINED_ON_PREFIXES = (
    "_",
    "hub_",
    "save_",
    "log_",
    "logging_",
    "eval_",
    "trackio_",
    "ddp_",
    "dataloader_",
    "dataset_num",
)
GUIDED = ("learning_rate", "lora_r", "lora_alpha")  # settings that a guide stands for
FOLLOW = {"guide": GUIDED, "max_steps": ("warmup_steps",)}  # what a setting sets besides: warm-up is a share of them
VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes")  # packages whose version changes what is trained
ABSENT = {"freeze_a": False}  # settings that older records lack, with the value that they had


@dataclass
class Group:
    """Runs of one recipe. `differs`: the settings in which it differs from the first group, its own values."""

    recipe: dict
    runs: list[Run] = field(default_factory=list)
    differs: dict = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Its number of rates, then of (rate, seed) points: what makes one group the main grid."""
        points = {(run.learning_rate, run.seed) for run in self.runs}
        return len({rate for rate, _ in points}), len(points)


def parameters(sweep: dict) -> dict:
    """The `parameters` of a sweep's configuration; {} if it has none."""
    config = sweep.get("config")
    found = config.get("parameters") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def values(parameter: object) -> list:
    """The values of one parameter of a grid, whether given as {"values": [...]}, {"value": ...} or alone."""
    spec = parameter if isinstance(parameter, dict) else {"value": parameter}
    found = spec.get("values", [spec.get("value")])
    return [value for value in found if value is not None] if isinstance(found, list) else []


def points(sweep: dict) -> set[tuple[float, float | None]] | None:
    """The (rate, seed) points that a sweep asks for; None if it is no grid over learning_rate."""
    asked = parameters(sweep)
    if "learning_rate" not in asked or sweep["config"].get("method") != "grid":
        return None
    rates = [rate for value in values(asked["learning_rate"]) if (rate := learning_rate({"learning_rate": value}))]
    seeds = [number(value) for value in values(asked.get("seed"))] or [None]
    return set(product(rates, seeds))


def asked_guides(sweeps: list[dict]) -> list[str]:
    """The guides that the sweeps ask for."""
    return list(dict.fromkeys(str(name) for sweep in sweeps for name in values(parameters(sweep).get("guide"))))


def declared(sweep: dict) -> set[str]:
    """The settings that a sweep's file sets on purpose: its parameters, and the flags of its command."""
    config = sweep.get("config")
    command = config.get("command") if isinstance(config, dict) else None
    words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
    found = {*parameters(sweep), *(word[2:].split("=")[0] for word in words if word.startswith("--"))} - {"config"}
    return found.union(*(FOLLOW.get(key, ()) for key in found))


def recipe(run: Run) -> dict:
    """Everything that a run trains on, but for its rate and seed."""
    found = {
        key: value
        for key, value in run.config.items()
        if key not in NOT_TRAINED_ON and not key.startswith(NOT_TRAINED_ON_PREFIXES)
    }
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        found |= {f"versions.{name}": str(versions[name]).split("+")[0] for name in VERSIONS if name in versions}
    return found


def token(value: object) -> str:
    """A setting as text to compare by: None, False and "" are the same, and so are 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value or None, sort_keys=True, default=str) if value != 0 or value is False else "0"


def groups(runs: list[Run]) -> list[Group]:
    """The runs by recipe, the group with most rates (then points) first; a setting that a run lacks agrees with any."""
    found: list[tuple[dict[str, str], Group]] = []
    for run in runs:
        own = recipe(run)
        compared = tokens_of(own)
        agreeing = (pair for pair in found if all(pair[0].get(key, value) == value for key, value in compared.items()))
        tokens, group = next(agreeing, ({}, Group({})))
        if not group.runs:
            found.append((tokens, group))
        tokens.update(compared)
        group.recipe.update({key: value for key, value in own.items() if key not in group.recipe})
        group.runs.append(run)
    found.sort(key=lambda pair: pair[1].size, reverse=True)  # stable: of equal ones the first
    for _, part in found[1:]:
        part.differs = differences(found[0][1], part)
    return [group for _, group in found]


def tokens_of(recipe: dict) -> dict[str, str]:
    return {key: token(value) for key, value in (ABSENT | recipe).items()}


def differences(first: Group, other: Group) -> dict:
    """The settings in which a group differs from the first, its own values."""
    wanted = tokens_of(first.recipe)
    keys = sorted(key for key, value in tokens_of(other.recipe).items() if wanted.get(key, value) != value)
    return {key: other.recipe.get(key, ABSENT.get(key)) for key in order(keys)}


def guide_of(run: Run) -> str | None:
    """The guide that a run follows, as train.py recorded it."""
    name = run.config.get("guide")
    return name if name and isinstance(name, str) else None


def mean_end(group: Group) -> float:
    """The mean final eval loss of a group's runs; infinite if one has none, or none that is finite."""
    ends = [math.nan if run.end is None else run.end.loss for run in group.runs]
    return sum(ends) / len(ends) if all(map(math.isfinite, ends)) else math.inf


def guided(runs: list[Run], first: Group | None) -> list[Group]:
    """A group for each guide that some of these runs follow, the lowest first; `differs` from `first`, or from that."""
    names = sorted({name for run in runs if (name := guide_of(run))})
    found = [group for name in names for group in groups([run for run in runs if guide_of(run) == name])]
    found.sort(key=mean_end)
    for group in found:
        group.differs = differences(first or found[0], group)
    return found


def order(keys: list[str]) -> list[str]:
    """Settings as a report lists them: the shown ones in their order, then the others."""
    return [key for key in SHOWN if key in keys] + [key for key in keys if key not in SHOWN]
