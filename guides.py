"""What guides recommend, by name: the table recipes/guides.yaml, and what a guide means for a model."""

import json
from pathlib import Path

import yaml

from inputs import InputError, first_line

TABLE = Path(__file__).parent / "recipes/guides.yaml"
SETTINGS = ("learning_rate", "lora_r", "lora_alpha")  # what a guide stands for; all else is the recipe's
HIDDEN_SIZE = 2000  # of the model for which a guide's formula gives its learning_rate as it stands


def table() -> dict[str, dict]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def entry(name: str) -> dict:
    """A guide as the table has it. InputError for a name that it lacks."""
    guides = table()
    if name not in guides:
        raise InputError(f"guide: {name}: recipes/guides.yaml has {', '.join(guides)}")
    return guides[name]


def settings(name: str, model: str, revision: str = "main") -> dict[str, float | int]:
    """The guide's SETTINGS for a model. InputError if its formula does not cover the model's family.

    learning_rate · (HIDDEN_SIZE / hidden_size)^exponent where the guide has exponents, else learning_rate.
    """
    guide = entry(name)
    found = {key: guide[key] for key in SETTINGS}
    if exponents := guide.get("exponent"):
        config = model_config(model, revision)
        config = config.get("text_config", config)
        family = next((family for family in exponents if str(config.get("model_type")).startswith(family)), None)
        if family is None:
            known = " and ".join(exponents)
            raise InputError(f"guide: {name}: its formula is for {known}, and {model} is a {config.get('model_type')}")
        rate = found["learning_rate"] * (HIDDEN_SIZE / config["hidden_size"]) ** exponents[family]
        found["learning_rate"] = float(f"{rate:.3g}")
    return found


def applicable(model: str, revision: str = "main") -> tuple[list[str], list[str]]:
    """The guides that mean something for a model, highest rank first, and one line for each other one.

    A gang takes its size from its first member: were that of a low rank, the others would not fit.
    """
    ranks, refused = {}, []
    for name in table():
        try:
            ranks[name] = settings(name, model, revision)["lora_r"]
        except InputError as error:
            refused.append(str(error))
    return sorted(ranks, key=lambda name: -ranks[name]), refused


def source(name: str | None) -> dict:
    """Where a guide's settings were read, for the record of a run that follows it; {} without a guide."""
    if name is None:
        return {}
    return {
        "guide_source": {key: str(value) for key, value in entry(name).items() if key not in (*SETTINGS, "exponent")}
    }


def model_config(model: str, revision: str) -> dict:
    """config.json of a folder or of a model on the Hub."""
    path = Path(model, "config.json")
    if not path.parent.is_dir():
        from huggingface_hub import hf_hub_download  # takes part of a second, which a folder need not wait for

        try:
            path = Path(hf_hub_download(model, "config.json", revision=revision))
        except (OSError, ValueError) as error:
            raise InputError(f"model_name_or_path {model}: {first_line(error)}") from error
    return json.loads(path.read_text(encoding="utf-8"))
