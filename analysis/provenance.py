"""What was run, at what price, and the commands that make it again."""

import shlex
from pathlib import Path

from analysis import folder
from analysis.files import number
from analysis.followups import file_of
from analysis.words import decimals, fence, plural


def conditions(r: dict) -> str:
    """One line on what was run: model, data, steps, runs, hardware, price."""
    recipe, data = r["recipe"], r["data"]
    parts = [str(recipe[key]) for key in ("model_name_or_path", "dataset_name") if recipe.get(key)]
    if data["train_examples"]:
        parts.append(
            f"{'' if data['train_examples_recorded'] else 'about '}{data['train_examples']:,} training examples"
        )
    if number(data["train_tokens"]):
        parts.append(f"{number(data['train_tokens']):,.0f} training tokens")
    if r["planned_steps"]:
        made = number(data["passes"])
        parts.append(f"{r['planned_steps']} steps" + (f" ({made:.2f} passes)" if made else ""))
    # Side by side all of this is the first group's, whose runs come first.
    runs = r["runs"][: r["groups"][0]["runs"]] if r["side_by_side"] else r["runs"]
    parts.append(plural(len(runs), "run"))
    parts += sorted({flat(x["config"]["hardware"]) for x in runs if x["config"].get("hardware")})
    seconds = [s for s in r["device_seconds"][: 1 if r["side_by_side"] else None] if s is not None]
    if seconds:
        parts.append(f"{sum(seconds):.0f} device seconds in training steps")
    return ", ".join(parts)


def flat(found: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else str(found)


def reproduction(r: dict, raw: dict, directory: Path) -> list[dict]:
    """Commands from the unescaped results, each word quoted for the shell."""
    here, found = folder.shown(directory), []
    for sweep, shown in zip(raw["sweeps"], r["sweeps"], strict=True):
        file = shlex.quote(f"{here}/{file_of(sweep)}")
        path = shlex.quote("/".join(str(sweep.get(key) or "?") for key in ("entity", "project", "id")))
        commands = [
            f"python experiment.py --sweep {file}",
            f"wandb sweep {file}",
            "wandb agent ENTITY/PROJECT/SWEEP  # as wandb sweep prints it",
            f"python -m analysis {path} --output {shlex.quote(here)}",
        ]
        found.append(
            {"title": f"{shown['id']} ({shown.get('name')}, {shown.get('state')})", "commands": fence(commands)}
        )
    return found


def adapter(r: dict, raw: dict) -> dict | None:
    """Which adapter to use, and the Python that loads it on the base as it was trained."""
    best = r["adapter"]
    if not best:
        return None
    words = (
        f"The adapter to use is that of {best['name']} ({best['run']}, final eval loss {decimals(best['loss'])}): in "
        f"{best['folder']}, and in W&B as model-{best['run']}:latest. Loaded so, it stands on the base that it was "
        "trained on; on the plain base the losses, and sometimes the order of the rates, are others."
    )
    return {"words": words, "load": fence(str(raw["adapter"]["load"]).splitlines(), "python")}


def settings(r: dict) -> list[dict]:
    found = [{"key": key, "value": str(value)} for key, value in r["recipe"].items()]
    if r["commits"]:
        found.append({"key": "commit", "value": ", ".join(r["commits"])})
    for key in ("hardware", "gang_size", "versions"):
        values = sorted({flat(x["config"][key]) for x in r["runs"] if key in x["config"]})
        found += [{"key": key, "value": "; ".join(values)}] if values else []
    return found
