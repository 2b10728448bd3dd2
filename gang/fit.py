"""What a gang computes: the settings and models that it trains as train.py does; it refuses all others by name."""

from enum import Enum

from transformers import AutoConfig, SchedulerType

from model import check_model, expert_count, quantization

# What the gang's step computes; train.py, and so wandb agent, can do the rest.
ONLY = {
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "loss_type": ("nll",),
    "load_in_8bit": (False,),  # LLM.int8() quantises the activations too
    "lora_dropout": (0.0,),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "fp16": (False,),
    "lr_scheduler_type": tuple(
        kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")
    ),
    "eval_strategy": ("no",),  # the steps of train.evaluation_steps, and no others
    "shuffle_dataset": (False,),  # members share the tokenised rows
    "torch_compile": (False,),
    "save_strategy": ("no",),  # checkpoints are by time (checkpoint.py)
    "resume_from_checkpoint": (None,),
    "use_peft": (True,),
    "use_dora": (False,),
    "lora_modules_to_save": (None,),
    "lora_target_parameters": (None,),
}


def unfit(configuration: tuple) -> str | None:
    """What no gang can train, as "key: value; a gang has only value"."""
    for key, value in ((key, value) for part in configuration for key, value in vars(part).items()):
        if key in ONLY and value not in ONLY[key]:
            said = value.value if isinstance(value, Enum) else value
            return f"{key}: {said}; a gang has only {' and '.join(map(str, ONLY[key]))}"
    if configuration[1].freeze_a and configuration[1].weight_decay:
        return "freeze_a with weight_decay; a gang has only weight_decay: 0.0"
    _, training, base = configuration
    if not training.accelerator_config.use_seedable_sampler:
        return "accelerator_config: use_seedable_sampler: False; a gang has only True"
    check_model(base)
    config = AutoConfig.from_pretrained(base.model_name_or_path, revision=base.model_revision)
    name = base.model_name_or_path
    if experts := expert_count(config):
        return f"{name} has {experts} experts; a gang does not compute the loss of their router"
    if quantization(config).get("load_in_8bit"):
        return f"{name} is quantised to 8 bits; a gang has only 4 and 16"
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if training.max_length is None or training.max_length > limit:
                what = f"beyond {limit} the longest row of a batch changes how {name} reads the others"
                return f"max_length: {training.max_length}; a gang has only up to {limit}: {what}"
    return None
