"""The second half of the report: why, samples, limits, follow-ups, checks, every run, reproduction."""

import math
import os
import shlex
from pathlib import Path

from analysis import statistics
from analysis.files import number
from analysis.followups import sweep_file
from analysis.mechanism import RULE_OF_THUMB
from analysis.wording import decimals, fence, grid, labels, plural, rate_label, shortened

PROJECT = Path(__file__).resolve().parent.parent


def why(r: dict) -> str:
    """The first step's size from the runs' own d, r and α, beside what was measured."""
    m = r["mechanism"]
    if m is None:
        return (
            "The runs do not record their adapted modules, r and α, so the size of the first step cannot be computed."
        )
    rows = []
    for x in m["rows"]:
        low, high = map(number, x["a_steps"])
        span = f"{low:.0f}" if math.isclose(low, high, rel_tol=0.01) else f"{low:.0f}–{high:.0f}"
        measured = [decimals(x["measured_early"], ".1e"), decimals(x["measured_end"], ".1e")]
        rows.append([rate_label(x["learning_rate"]), decimals(x["first_step"], ".1e"), span, *measured])
    early = "early" if m["early_step"] is None else f"step {m['early_step']}"
    header = ["Learning Rate", "‖ΔW‖/‖W‖ after one full step", "Steps until A moves by its own size"]
    header += [f"‖ΔW‖/‖W‖ measured, {early}", "at the end"]
    above = [x["learning_rate"] for x in m["rows"] if number(x["first_step"]) > RULE_OF_THUMB]
    below = [x["learning_rate"] for x in m["rows"] if number(x["first_step"]) <= RULE_OF_THUMB]
    parts = [
        f"One step exceeds the rule of thumb of {RULE_OF_THUMB:g} (cs231n) at {labels(above) if above else 'no rate'}"
    ]
    parts[0] += f", and not at {labels(below)}." if below else "."
    frozen = [
        x["learning_rate"] for x in m["rows"] if r["planned_steps"] and number(x["a_steps"][0]) > r["planned_steps"]
    ]
    if frozen:
        parts.append(
            f"At {labels(frozen)} A cannot move by its own size in {r['planned_steps']} steps: mostly B learns."
        )
    config = next((x["config"] for x in r["runs"] if x["compared"]), {})
    trained, total = number(config.get("trainable_parameters")), number(config.get("all_parameters"))
    if trained and total:
        parts.append(f"The adapters are {trained:,.0f} of {total:,.0f} parameters, {100 * trained / total:.2f} %.")
    shape = [decimals(found, "g") for found in (m["rank"], m["alpha"], m["matrices"], *m["widths"])]
    return (
        "Adam's first step moves every entry of B by ±η, whatever the gradient's size, while A is still at its start: "
        "‖ΔW‖ = (α/r)·η·sqrt(d_out·r/3). A moves by its own standard deviation in 1/(sqrt(3·d_in)·η) steps. These runs "
        f"have r = {shape[0]}, α = {shape[1]} and {shape[2]} matrices with d_in from {shape[3]} to {shape[4]}:\n\n"
        f"{grid(header, rows)}\n\n{' '.join(parts)}\n\n"
        "Two common reasons do not hold. Smaller gradients cannot explain LoRA's higher rates: Adam is invariant to "
        "the gradient's scale. And only A starts small and random: B starts at exactly zero. The LoRA paper "
        "(arXiv:2106.09685) used 2e-4 for GPT-2 and other rates elsewhere; 2e-4 for 7B and 13B models is QLoRA's "
        "(arXiv:2305.14314), at r = 64, α = 16."
    )


def samples(r: dict) -> str:
    """Greedy completions of the fixed prompts, from one run for each rate (its first seed)."""
    shown: dict[float, dict] = {}
    for x in r["runs"]:
        if x["compared"] and x["generations"]:
            shown.setdefault(x["learning_rate"], x)
    if not shown:
        return "No run recorded generated samples."
    parts = []
    for i, sample in enumerate(next(iter(shown.values()))["generations"]):
        rows = [["*reference*", shortened(sample.get("reference"))]]
        for rate, x in shown.items():
            completion = x["generations"][i].get("completion") if i < len(x["generations"]) else None
            rows.append([rate_label(rate), shortened(completion)])
        # In <pre> an entity is a character, line ends included, and nothing is markdown.
        prompt = shortened(sample.get("prompt"), 600)
        parts.append(f"<pre>{prompt}</pre>\n\n{grid(['Learning Rate', 'Completion'], rows)}")
    silent = [x["learning_rate"] for x in r["rates"] if x["learning_rate"] not in shown]
    return "\n\n".join(parts) + (f"\n\nNo samples were recorded at {labels(silent)}." if silent else "")


def spacing(r: dict) -> str:
    """What the grid's spacing forbids to say about the optimum; empty if the grid is fine enough."""
    swept, best = [x["learning_rate"] for x in r["rates"]], r["best_rate"]
    if best is None:
        return ""
    place, coarse, sides = swept.index(best), statistics.COARSE * 1.1, []
    if place > 0 and best / swept[place - 1] > coarse:
        sides.append(f"{best / swept[place - 1]:.3g}× below")
    if place < len(swept) - 1 and swept[place + 1] / best > coarse:
        sides.append(f"{swept[place + 1] / best:.3g}× above")
    if not sides:
        return ""
    refinement = next((f for f in r["follow_ups"] if f["name"] == "refinement"), None)
    finer = refinement["config"]["parameters"]["learning_rate"]["values"] if refinement else []
    more = f"; a grid with {labels(finer)} would" if finer else ""
    return (
        f"The grid's gaps ({' and '.join(sides)} {rate_label(best)}) are too wide to place the optimum by argmin{more}."
    )


def limits(r: dict) -> list[str]:
    """What the sweep cannot say, one sentence each."""
    found, c = [], r["basin"]
    if c is None:
        found.append("No rate is feasible with a final eval loss, so nothing is compared.")
    elif r["seeds"] < 2:
        found.append(f"Seed variance unknown: one seed. The intervals cover {c['covers']}.")
    else:
        shrink = math.sqrt((r["seeds"] - 1) / r["seeds"])
        found.append(
            f"{r['seeds']} seeds with a standard deviation of {decimals(c['seed_sd'], '.4f')} nats (median over "
            f"rates): a "
            f"percentile bootstrap of so few shrinks it by a factor of about {shrink:.2f}. Intervals cover "
            f"{c['covers']}."
        )
    if c is not None and c["left_out"]:
        found.append(
            f"{plural(c['left_out'], 'run')} of a seed that some rate lacks: in the means, not in the differences."
        )
    if c is not None and not c["paired_seeds"]:
        found.append("The rates share no seed, so their differences are not paired.")
    found += [spacing(r)] if spacing(r) else []
    if any("edge of the feasible range" in x["flags"] for x in r["rates"]):
        best = rate_label(r["best_rate"])
        found.append(f"The best rate, {best}, is at the edge of the feasible range: the optimum may lie beyond it.")
    if r["recipe"].get("lr_scheduler_type") is not None:
        found.append(
            f"The schedule is {r['recipe']['lr_scheduler_type']} with {decimals(r['recipe'].get('warmup_steps'), 'g')} "
            "steps of warm-up; another schedule moves the best peak rate."
        )
    if r["planned_steps"]:
        found.append(f"The best rate is the best for {r['planned_steps']} steps of this model, data, batch and α.")
    for x in r["runs"]:
        who = f"Run {x['id']} ({rate_label(x['learning_rate'])}, {x['state']})"
        if x["excluded"]:
            found.append(f"{who} is not in the statistics: {x['excluded']}.")
        elif x["behaviour"] == "incomplete":
            found.append(f"{who} has no end: {x['reason']}.")
    mixed = [f"{key} ({', '.join(map(str, values))})" for key, values in r["differing"].items()]
    if mixed:
        found.append(
            f"Runs differ in more than rate and seed: {'; '.join(mixed)}. Only those of the most frequent recipe "
            f"are compared."
        )
    return found


def follow_ups(r: dict, directory: Path) -> str:
    if not r["follow_ups"]:
        return "None: no run has reached an end."
    lines = []
    for count, f in enumerate(r["follow_ups"], 1):
        swept = [
            f"{key} {', '.join(rate_label(v) if isinstance(v, float) else str(v) for v in spec['values'])}"
            for key, spec in f["config"]["parameters"].items()
            if "values" in spec
        ]
        command = f"`wandb sweep {folder(directory)}/{f['file']}`"
        lines.append(
            f"{count}. **{f['question']}** Because {f['why']}. {'; '.join(swept)}: [{f['file']}]({f['file']}), "
            f"{command}"
        )
    return "\n".join(lines)


def checks(r: dict) -> str:
    mark = {True: "passed", False: "**FAILED**", None: "unknown"}
    return grid(["Check", "Result", "Detail"], [[c["check"], mark[c["passed"]], c["detail"]] for c in r["checks"]])


def runs(r: dict) -> str:
    """Every run of the sweep in every state: diverged and crashed ones are rows, not silence."""
    rows = []
    for x in r["runs"]:
        remarks = [x["reason"], *x["notes"], *([f"not compared: {x['excluded']}"] if x["excluded"] else [])]
        rows.append(
            [
                x["id"],
                rate_label(x["learning_rate"]),
                "—" if x["seed"] is None else str(x["seed"]),
                x["state"],
                f"{x['last_step']} of {x['planned_steps'] or '?'}",
                decimals(x["final_train_loss"]),
                decimals(x["final_eval_loss"]),
                x["behaviour"] + (f" ({x['onset']})" if x["onset"] else ""),
                "; ".join(remarks),
            ]
        )
    header = [
        "Run",
        "Rate",
        "Seed",
        "State",
        "Steps",
        "Train",
        "Eval",
        "Behavior",
        "Why, and what the reading repaired",
    ]
    return grid(header, rows)


def reproduction(r: dict, raw: dict, directory: Path) -> str:
    """Commands from the unescaped results, each word quoted for the shell; the settings from the escaped ones."""
    here, lines = folder(directory), []
    for sweep, shown in zip(raw["sweeps"], r["sweeps"], strict=True):
        file = shlex.quote(f"{here}/{sweep_file(sweep['id'])}")
        path = shlex.quote("/".join(str(sweep.get(key) or "?") for key in ("entity", "project", "id")))
        lines += [
            f"Sweep {shown['id']} ({shown.get('name')}, {shown.get('state')}), in one command or in W&B's own three:",
            "",
            fence(
                [
                    f"python experiment.py --sweep {file}",
                    f"wandb sweep {file}",
                    "wandb agent ENTITY/PROJECT/SWEEP  # as wandb sweep prints it",
                    f"python -m analysis {path} --output {shlex.quote(here)}",
                ]
            ),
            "",
        ]
    lines += ["This page again from the pulled data, without a network:", ""]
    lines += [fence([f"python -m analysis {shlex.quote(here)}"]), ""]
    settings = [[key, str(found)] for key, found in r["recipe"].items()]
    for key in ("hardware", "gang_size", "versions"):
        values = sorted({flat(x["config"][key]) for x in r["runs"] if key in x["config"]})
        settings += [[key, "; ".join(values)]] if values else []
    return "\n".join(lines) + "\n" + grid(["Setting", "Value"], settings)


def conditions(r: dict) -> str:
    """One line on what was run: model, data, steps, runs, hardware."""
    recipe = r["recipe"]
    parts = [str(recipe[key]) for key in ("model_name_or_path", "dataset_name") if recipe.get(key)]
    if r["planned_steps"]:
        parts.append(f"{r['planned_steps']} steps")
    parts.append(plural(len(r["runs"]), "run"))
    parts += sorted({flat(x["config"]["hardware"]) for x in r["runs"] if x["config"].get("hardware")})
    return ", ".join(parts)


def flat(found: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else str(found)


def folder(directory: Path) -> str:
    """The output directory as a user of the project writes it; outside the project only its name."""
    full = directory.resolve()
    return full.relative_to(PROJECT).as_posix() if full.is_relative_to(PROJECT) else full.name


def docs(directory: Path) -> str:
    """The relative path from the report to the project's docs."""
    full = directory.resolve()
    return Path(os.path.relpath(PROJECT / "docs", full)).as_posix() if full.is_relative_to(PROJECT) else "../../docs"
