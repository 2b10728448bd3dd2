"""Simulated runs: exponential descent with heavy-tailed batch noise, and each way to leave it."""

import json
from pathlib import Path

import numpy as np

from analysis.files import to_json
from analysis.runs import Run, Series, learning_rate, rate_directory

BASE, FLOOR = 4.2, 2.7  # nats per token: untrained, and the best that a rate reaches
KINDS = (
    "good",
    "suboptimal",
    "slow",
    "plateaued",
    "overfitting",
    "spike",
    "bump",
    "rebound",
    "nan",
    "rising",
    "exploding",
    "harmed",
    "stopped",
    "cut",
    "flat",
    "hard tail",
    "two epochs",
    "drifting",
    "slow divergence",
    "fault",
)
CLASS = {
    "good": "stable, good",
    "suboptimal": "stable, suboptimal",
    "slow": "slow",
    "plateaued": "plateaued",
    "overfitting": "overfitting",
    "spike": "unstable",
    "bump": "unstable",
    "rebound": "unstable",
    "nan": "unstable",
    "rising": "diverged",
    "exploding": "diverged",
    "harmed": "diverged",
    "stopped": "diverged",
    "cut": "incomplete",
    "flat": "overfitting",
    "hard tail": "overfitting",
    "two epochs": "overfitting",
    "drifting": "drifting",
    "slow divergence": "diverged",
    "fault": "incomplete",
}
HARD_TAIL = 1.06  # factor on the train loss of every run over the last 10 % of the steps: hard batches
PASSES = {"overfitting": 2.0, "flat": 2.0, "hard tail": 2.0, "two epochs": 2.0, "rebound": 2.0}  # others: 0.9


def eval_steps(planned: int) -> np.ndarray:
    """Steps 0, 1, 2, 4, 8 % of the run, then every 5 %, as train.py evaluates."""
    shares = [0, 1, 2, 4, 8, *range(10, 101, 5)]
    return np.unique(np.round(np.array(shares) / 100 * planned).astype(int))


def batch_noise(planned: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Multiplicative batch noise (T,): Student t with 4 degrees of freedom, scaled to `noise`, on the log scale."""
    return np.exp(noise * rng.standard_t(4, planned) / np.sqrt(2))


def curves(
    kind: str, planned: int, noise: float, seed: int = 0, size: float | None = None, tail: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train steps (n,), train loss (n,), eval steps (k,), eval loss (k,) of one run of this kind.

    The batches' noise depends on the seed alone, so it cancels between kinds, up to a fifth that is each run's own.
    `size` fixes the factor by which a spike or a bump lifts the train loss, `tail` how much harder the last tenth of
    the batches is than the others (HARD_TAIL for that kind).
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    step = np.arange(1, planned + 1)
    at = np.concatenate([[0], step])
    gain = {"suboptimal": rng.uniform(0.93, 0.97), "plateaued": rng.uniform(0.4, 0.8)}.get(kind, 1.0)
    pace = {"slow": rng.uniform(0.8, 2.0)}.get(kind, rng.uniform(0.04, 0.1)) * planned
    floor = BASE - gain * (BASE - FLOOR)
    clean = floor + (BASE - floor) * np.exp(-at / pace)
    held_out = clean.copy()
    t0 = int(planned * rng.uniform(0.35, 0.6))
    after = np.maximum(at - t0, 0) / (planned - t0)
    if kind == "overfitting":
        clean = clean - 0.9 * after
        held_out = held_out + rng.uniform(0.05, 0.5) * after
    elif kind == "spike":
        length = int(rng.integers(5, 10))
        here = (at >= t0) & (at < t0 + length)
        clean = np.where(here, clean * (size or rng.uniform(1.8, 2.5)), clean)
    elif kind == "bump":
        width = planned * rng.uniform(0.06, 0.1)
        clean = clean * (1 + ((size - 1) if size else rng.uniform(0.9, 1.2)) * np.exp(-(((at - t0) / width) ** 2)))
    elif kind == "rebound":
        clean = clean * (1 + rng.uniform(0.22, 0.32) * after)
        held_out = held_out * (1 + rng.uniform(0.1, 0.3) * after)
    elif kind == "rising":
        clean = clean * (1 + rng.uniform(0.8, 1.4) * after)
        held_out = held_out * (1 + rng.uniform(0.3, 0.5) * after)
    elif kind == "exploding":
        clean = np.where(at > t0, 9.5, clean)
        held_out = np.where(at > t0, 9.5, held_out)
    elif kind == "harmed":
        clean = np.where(at > 3, BASE + 0.5, clean)
        held_out = np.where(at > 3, BASE + 0.5, held_out)
    elif kind in ("flat", "hard tail"):
        held_out = held_out + rng.uniform(0.06, 0.3) * after
        tail = HARD_TAIL if kind == "hard tail" else tail
    elif kind == "two epochs":
        again = np.maximum(at - planned / 2, 0) / (planned / 2)
        clean = clean - rng.uniform(0.3, 0.9) * (1 - np.exp(-8 * again))
        held_out = held_out + rng.uniform(0.06, 0.3) * (1 - np.exp(-3 * again))
    elif kind == "drifting":
        early = np.maximum(at - 0.12 * planned, 0) / (0.88 * planned)
        held_out = floor + (BASE - floor) * np.exp(-at / (0.03 * planned)) + rng.uniform(0.08, 0.3) * early
        clean = floor + (BASE - floor) * np.exp(-at / (0.03 * planned))
    elif kind == "slow divergence":
        rise = np.maximum(at - 0.1 * planned, 0) / (0.9 * planned)
        clean, held_out = (curve + rng.uniform(2.6, 3.2) * rise for curve in (clean, held_out))
    common = batch_noise(planned, noise, np.random.default_rng([seed, 99]))
    common = common * np.where(step > 0.9 * planned, tail, 1.0)
    train = clean[1:] * common * batch_noise(planned, noise / 5, rng)
    steps = eval_steps(planned)
    heldout = held_out[steps] * np.where(
        steps == 0, 1.0, 1 + rng.uniform(0.0003, 0.002) * rng.standard_normal(len(steps))
    )
    if kind == "nan":
        train[t0] = np.nan
    if kind == "fault":
        train[t0] = np.nan
        return step[: t0 + 1], train[: t0 + 1], steps[steps <= t0], heldout[steps <= t0]
    if kind == "slow divergence":
        end = int(0.85 * planned)
        train[end] = np.nan
        return step[: end + 1], train[: end + 1], steps[steps <= end], heldout[steps <= end]
    if kind == "stopped":
        train[t0] = np.inf
        return step[: t0 + 1], train[: t0 + 1], steps[steps <= t0], heldout[steps <= t0]
    if kind == "cut":
        return step[:t0], train[:t0], steps[steps <= t0], heldout[steps <= t0]
    return step, train, steps, heldout


def run(
    kind: str, planned: int = 200, noise: float = 0.08, seed: int = 0, size: float | None = None, tail: float = 1.0
) -> Run:
    """The curves of one kind as a Run, without the detour through rows: for calibration."""
    step, train, steps, held_out = curves(kind, planned, noise, seed, size, tail)
    summary = {"diverged_at_step": int(step[-1])} if kind == "stopped" else {}
    found = Run(
        id=kind,
        name=kind,
        state="finished",
        sweep="",
        created_at="",
        config={"learning_rate": 2e-4, "seed": seed, "max_steps": planned, "warmup_steps": 5, "vocab_size": 4096},
        summary=summary,
        history={
            "train/loss": Series(step, train),
            "eval/loss": Series(steps, held_out),
            "train/epoch": Series(step, PASSES.get(kind, 0.9) * step / planned),
        },
        eval_nll=None,
        generations=[],
        planned_steps=planned,
    )
    return found.before(found.not_finite_step) if kind == "fault" else found


def record(
    kind: str,
    rate: float = 2e-4,
    seed: int = 0,
    planned: int = 200,
    noise: float = 0.08,
    examples: int = 300,
    sweep: str = "sw1",
    shift: float = 0.0,
    **config: object,
) -> dict:
    """One run as pull.py writes it; `shift` is added to every eval loss after step 0 (nats per token)."""
    step, train, steps, held_out = curves(kind, planned, noise, seed)
    held_out = held_out + shift * (steps > 0)
    rng, scale = np.random.default_rng([seed, 7]), rate if isinstance(rate, float) else 2e-4
    norm = 1.5 * np.exp(0.2 * rng.standard_normal(len(step))) * (1 + 2e2 * scale)
    ratio = 25 * scale * np.sqrt(np.maximum(steps, 0))
    rows = [
        {
            "train/global_step": int(s),
            "train/loss": float(x),
            "train/grad_norm": float(g) if np.isfinite(x) else float("nan"),
            "train/learning_rate": scale * min(1.0, s / 5),
            "train/num_tokens": int(s) * 900,
            "train/epoch": PASSES.get(kind, 0.9) * int(s) / planned,
            "_runtime": 3 + 0.25 * int(s),
        }
        for s, x, g in zip(step, train, norm, strict=True)
    ]
    rows += [
        {"train/global_step": int(s), "eval/loss": float(e), "eval/update_ratio": float(u), "eval/stable_rank": 1.5}
        for s, e, u in zip(steps, held_out, ratio, strict=True)
    ]
    rows.sort(key=lambda row: (row["train/global_step"], "eval/loss" in row))
    rows = [{"_step": i, **row} for i, row in enumerate(rows)]
    draw = np.random.default_rng(5)
    tokens = draw.integers(8, 40, examples)
    own = np.exp(0.4 * draw.standard_normal(examples)) * np.exp(0.02 * rng.standard_normal(examples))
    weight = tokens * own
    nll = [(e * tokens.sum() * weight / weight.sum()).tolist() for e in held_out]
    diverged = {"diverged_at_step": int(step[-1])} if kind == "stopped" else {}
    return {
        "id": f"{kind}-{rate}-{seed}",
        "sweep": sweep,
        "name": f"lr {rate} seed {seed}",
        "state": "crashed" if kind == "cut" else "finished",
        "created_at": f"2026-01-01T00:00:{seed:02d}Z",
        "config": {
            "learning_rate": rate,
            "seed": seed,
            "max_steps": planned,
            "warmup_steps": 5,
            "lr_scheduler_type": "constant_with_warmup",
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "adapter_dtype": "float32",
            "model_name_or_path": "starter/model",
            "dataset_name": "starter/data",
            "vocab_size": 4096,
            "data_fingerprint": "abc123",
            "trainable_parameters": 400_000,
            "all_parameters": 6_000_000,
            "hardware": "2 CPU cores",
            "versions": {"torch": "2.13.0"},
            "adapted_modules": {
                "q_proj": {"count": 6, "d_in": 256, "d_out": 256, "weight_std": 0.021},
                "down_proj": {"count": 6, "d_in": 768, "d_out": 256, "weight_std": 0.019},
            },
            **config,
        },
        "summary": {"first_batch_hash": f"hash{seed}", "train_runtime": 60.0, **diverged},
        "files": {
            "eval_nll.json": {"steps": steps.tolist(), "tokens": tokens.tolist(), "nll": nll},
            "generations.json": [
                {
                    "prompt": "def add(a, b):\n    return a + b",
                    "reference": "Return the sum.",
                    "completion": f"Add {kind}.",
                }
            ],
        },
        "history": rows,
    }


# The seed's four rates as a small model shows them: slow, good, fast and a little worse, diverged.
SEED_RATES = {1e-5: "slow", 2e-4: "good", 1e-3: "suboptimal", 5e-3: "stopped"}


def sweep_of(rates: list[float], seeds: list[int], name: str = "sw1", **parameters: object) -> dict:
    values = {"learning_rate": {"values": rates}, "seed": {"values": seeds}} | parameters
    return {
        "id": name,
        "entity": "local",
        "project": "learning-rate",
        "name": "learning rate",
        "state": "FINISHED",
        "url": f"http://localhost/local/learning-rate/sweeps/{name}",
        "config": {
            "program": "train.py",
            "method": "grid",
            "metric": {"name": "eval/loss", "goal": "minimize"},
            "parameters": values,
            "command": ["${env}", "python", "${program}", "--config", "recipes/starter.yaml", "${args}"],
        },
    }


def write(directory: Path, records: list[dict], sweeps: list[dict]) -> Path:
    """An output directory as pull.py leaves it."""
    by_rate: dict[str, list[dict]] = {}
    for one in records:
        by_rate.setdefault(rate_directory(learning_rate(one["config"])), []).append(one)
    for name, group in by_rate.items():
        path = directory / name / "run_data.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json({"sweeps": sweeps, "runs": group}, lines=1), encoding="utf-8")
        json.loads(path.read_text(encoding="utf-8"))
    return directory


def study(directory: Path, seeds: int = 1, rates: dict[float, str] | None = None, **options: object) -> Path:
    """An output directory with one simulated run for each rate and seed."""
    rates = rates or SEED_RATES
    records = [record(kind, rate, seed, **options) for rate, kind in rates.items() for seed in range(seeds)]
    return write(directory, records, [sweep_of(list(rates), list(range(seeds)))])
