"""The adapter that a run leaves: the name of its folder, and a model card that says what it is and how to load it."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data import is_conversational

TEMPLATE = Path(__file__).with_name("adapter.md.jinja")
LONGEST_NAME = 96  # of a repository on the Hub


def folder_name(swept: dict, run_id: str) -> str:
    """What was swept, and the run: learning_rate-0.0002-seed-0-RUN_ID, also valid as a repository's name on the Hub."""
    values = "-".join(f"{key}-{value}" for key, value in swept.items())
    plain = re.sub(r"\.{2,}|[^A-Za-z0-9_.]+", "-", values)[: LONGEST_NAME - len(run_id) - 1].strip("-.")
    return f"{plain}-{run_id}".lstrip("-")


def save(trainer, run, diverged_at_step: int | None) -> dict:
    """Save the adapter of a trained `train.Trainer`, with its tokenizer and card; returns what the card says of it.

    The run's summary gets the Python that loads it, as `load_adapter`.
    """
    trainer.save_model()
    facts = about(trainer, run)
    run.summary["load_adapter"] = loading(trainer, facts)
    if trainer.is_world_process_zero():
        model_card(trainer, run, facts, diverged_at_step).save(Path(trainer.args.output_dir, "README.md"))
    return facts


def about(trainer, run) -> dict:
    """What the adapter is, for its card and its artifact, in plain numbers and strings."""
    config, settings = run.config, trainer.args
    losses = [(row["step"], float(row["eval_loss"])) for row in trainer.state.log_history if "eval_loss" in row]
    best = min(losses, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf, default=(None, math.nan))
    first, last = (losses[0][1], losses[-1][1]) if losses else (math.nan, math.nan)  # it diverged before the first one
    facts = {
        "base_model": config["model_name_or_path"],
        "base_model_commit": None if is_folder(config["model_name_or_path"]) else config["model_revision"],
        "quantization": quantization(trainer),
        "dtype": config["dtype"],
        "dataset": config["dataset_name"],
        "dataset_commit": None if is_folder(config["dataset_name"]) else config["dataset_revision"],
        "dataset_train_split": config["dataset_train_split"],
        "dataset_test_split": config["dataset_test_split"],
        "data_fingerprint": config["data_fingerprint"],
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": str(getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type)),
        "warmup_steps": settings.get_warmup_steps(trainer.state.max_steps),
        "steps": trainer.state.global_step,
        "rows_per_step": settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
        "seed": settings.seed,
        "lora_r": config["lora_r"],
        "lora_alpha": config["lora_alpha"],
        "adapter_dtype": settings.adapter_dtype,
        "eval_loss_first": number(first),
        "eval_loss_last": number(last),
        "eval_loss_best": number(best[1]),
        "eval_loss_best_step": best[0],
        "run": run.id,
        "sweep": run.sweep_id,
        "versions": dict(config["versions"]),
    }
    return {key: value for key, value in facts.items() if value is not None}


def number(value: float) -> float | str:
    """As JSON, and so an artifact's metadata, can hold it."""
    return round(value, 6) if math.isfinite(value) else str(value)


def is_folder(name: str) -> bool:
    return Path(name).exists()


def quantization(trainer) -> dict:
    """The arguments of BitsAndBytesConfig with which the base was loaded, as far as they are not the defaults."""
    config = getattr(trainer.model.config, "quantization_config", None)
    settings = config.to_diff_dict() if config else {}
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def quoted(value) -> str:
    """Python's literal, a string in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def loading(trainer, facts: dict) -> str:
    """The Python that loads the adapter on the base as it was trained: the same bits, dtype and commit."""
    folder, name = quoted(trainer.args.output_dir), type(trainer.model.get_base_model()).__name__
    arguments = [quoted(facts["base_model"]), f"dtype={quoted(facts['dtype'])}"]
    if "base_model_commit" in facts:
        arguments.append(f"revision={quoted(facts['base_model_commit'])}")
    imports, lines = f"AutoTokenizer, {name}", []
    if facts["quantization"]:
        arguments.append("quantization_config=quantization")
        imports = f"AutoTokenizer, BitsAndBytesConfig, {name}"
        settings = ", ".join(f"{key}={quoted(value)}" for key, value in facts["quantization"].items())
        lines.append(f"quantization = BitsAndBytesConfig({settings})")
    lines += [
        f"base = {name}.from_pretrained({', '.join(arguments)})",
        f"model = PeftModel.from_pretrained(base, {folder})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
    ]
    if trainer.args.device.type == "cpu" and facts["quantization"].get("load_in_4bit"):
        lines += [
            "for module in model.modules():",
            "    module.support_avx512bf16_for_cpu = False  # or bitsandbytes rounds to bfloat16 where a CPU has that",
        ]
    return "\n".join(["from peft import PeftModel", f"from transformers import {imports}", "", *lines])


def model_card(trainer, run, facts: dict, diverged_at_step: int | None) -> ModelCard:
    """The card in Hugging Face's format. A local folder is no name on the Hub, and stays out of what the Hub links."""
    name, base, data = Path(trainer.args.output_dir).name, facts["base_model"], facts["dataset"]
    result = EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split=facts["dataset_test_split"],
        dataset_revision=facts.get("dataset_commit"),
        metric_type="loss",
        metric_name="eval loss after the last step, nats per answer token",
        metric_value=facts["eval_loss_last"],
    )
    card = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=None if is_folder(base) else base,
        datasets=None if is_folder(data) else [data],
        tags=[*(["qlora"] if facts["quantization"] else []), "lora", "sft", "transformers", "trl"],
        model_name=name,
        eval_results=[result] if math.isfinite(float(facts["eval_loss_last"])) else None,
        training=facts,
    )
    more = {
        "name": name,
        "loading": loading(trainer, facts),
        "autocast": trainer.args.bf16,
        "chat": is_conversational(trainer.eval_dataset),
        "diverged_at_step": diverged_at_step,
        "url": run.url,
        "facts": facts,
    }
    return ModelCard.from_template(card, template_path=TEMPLATE, **facts, **more)
