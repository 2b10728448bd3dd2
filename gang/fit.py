"""What a gang computes: the settings and models that it trains as train.py does; it refuses all others by name."""

from transformers import AutoConfig

import train

# What the gang's step computes; train.py, and so wandb agent, can do the rest.
ONLY = {
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "loss_type": ("nll",),
    "lora_dropout": (0.0,),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "fp16": (False,),
    "torch_compile": (False,),
    "save_strategy": ("no",),
    "use_peft": (True,),
    "use_dora": (False,),
    "lora_modules_to_save": (None,),
    "lora_target_parameters": (None,),
}
# A model with one of these scales or caps its logits, or adds a loss for the router of its experts.
OTHER_HEADS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "num_experts",
    "num_local_experts",
)


def unfit(configuration: tuple) -> str | None:
    """What no gang can train, as "key: value; a gang has only value"."""
    for key, value in ((key, value) for part in configuration for key, value in vars(part).items()):
        if key in ONLY and value not in ONLY[key]:
            return f"{key}: {value}; a gang has only {' and '.join(map(str, ONLY[key]))}"
    if configuration[1].freeze_a and configuration[1].weight_decay:
        return "freeze_a with weight_decay; a gang has only weight_decay: 0.0"
    base = configuration[2]
    train.check_model(base)
    model = AutoConfig.from_pretrained(base.model_name_or_path, revision=base.model_revision).get_text_config()
    for key in OTHER_HEADS:
        if getattr(model, key, None) not in (None, 1.0):
            return f"{base.model_name_or_path} has {key}: {getattr(model, key)}, which a gang does not compute"
    return None
