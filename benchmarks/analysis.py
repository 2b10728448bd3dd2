"""How long the analysis takes: python -m benchmarks.analysis [--rows 10000] [--runs 200].

A large sweep from files to report: 200 runs × 10,000 rows; target ≤ 26 s on 2 cores and ≤ 2 GB.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from analysis import figures, followups, page, report
from analysis.files import save, to_json
from analysis.results import results
from analysis.runs import load, rate_directory
from analysis.study import build


def write_large(directory: Path, runs: int, rows: int) -> int:
    """`runs` runs at 20 rates with `rows` history rows each, as pull.py writes them; returns bytes."""
    rng, size = np.random.default_rng(0), 0
    rates, tokens = np.geomspace(1e-5, 5e-3, 20), rng.integers(8, 40, 300)
    steps = np.unique(np.round(np.linspace(0, 1, 26) * rows).astype(int))
    sweep = {"id": "big", "entity": "e", "project": "p", "name": "big", "state": "FINISHED", "url": "", "config": {}}
    for i, rate in enumerate(float(f"{rate:.2e}") for rate in rates):
        records = []
        for seed in range(runs // 20):
            noise = rng.lognormal(0, 0.08, rows + 1)
            floor, pace = 2.7 + 0.05 * abs(i - 10), 0.05 * rows
            loss = (floor + 1.5 * np.exp(-np.arange(rows + 1) / pace)) * noise
            held_out = floor + 1.5 * np.exp(-steps / pace)
            nll = held_out[:, None] * tokens * rng.lognormal(0, 0.3, 300)
            history = [
                {
                    "_step": t,
                    "_runtime": 0.1 * t,
                    "train/global_step": t,
                    "train/loss": round(loss[t], 6),
                    "train/grad_norm": 1.0,
                    "train/learning_rate": rate,
                    "train/epoch": t / rows,
                    "train/num_tokens": 900 * t,
                }
                for t in range(1, rows + 1)
            ]
            history += [{"train/global_step": int(t), "eval/loss": e} for t, e in zip(steps, held_out, strict=True)]
            about = {
                "id": f"{i}-{seed}",
                "sweep": "big",
                "name": "",
                "state": "finished",
                "created_at": "",
                "summary": {},
            }
            config = {"learning_rate": rate, "seed": seed, "max_steps": rows, "lora_r": 16, "lora_alpha": 32}
            file = {"steps": steps.tolist(), "tokens": tokens.tolist(), "nll": nll.tolist()}
            records.append(about | {"config": config, "history": history, "files": {"eval_nll.json": file}})
        text = json.dumps({"sweeps": [sweep], "runs": records})
        save(directory / rate_directory(rate) / "run_data.json", text)
        size += len(text)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        megabytes = write_large(directory, options.runs, options.rows) / 1e6
        print(f"{options.runs} runs × {options.rows} rows, {megabytes:.0f} MB of JSON")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        last = start

        def phase(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            print(f"  {name:10} {now - last:6.1f} s")
            last = now

        sweeps, runs = load(directory)
        phase("load")
        study = build(sweeps, runs)
        phase("build")
        found = results(study)
        save(directory / "all_results.json", to_json(found, lines=3))
        phase("results")
        followups.write(study, directory)
        pictures = figures.draw(study, directory)
        phase("figures")
        save(directory / "README.md", report.render(found, directory, pictures))
        save(directory / "report.html", page.render(study, found, directory, pictures))
        phase("report")
        print(f"  report.html is {(directory / 'report.html').stat().st_size / 1e6:.1f} MB")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - start
        print(f"  in all     {seconds:6.1f} s, peak {peak / 1e6:.2f} GB, {before / 1e6:.2f} GB before")


if __name__ == "__main__":
    main()
