"""Where the seconds of a sweep go: twelve configurations of a 97.5M base in one gang, or as many as asked for.

    python -m benchmarks.gang                                      # 200 steps, 24 evaluations: for a GPU
    python -m benchmarks.gang --model starter --steps 6 --rates 2 --seeds 1 --examples 16    # tiny, for a CPU

The base has random weights (12 layers × 768, vocabulary 16,384), the rows are the starter's, the server a local_wandb
of its own; nothing is downloaded. Prints the gang's own account of its time, and the wall time around it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.grid import ROOT, call, read_summaries, serve

RATES = [1.0e-5, 2.0e-4, 1.0e-3, 5.0e-3]


def make_model(folder: Path) -> None:
    """The flagship base's shape, with the starter's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=16384,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "starter/model").save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["flagship", "starter"], default="flagship")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rates", type=int, default=4, help="how many of the four; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=320, help="of the test set; default: all %(default)s")
    parser.add_argument("--size", default="auto", help="as python -m gang takes it; default: %(default)s")
    options = parser.parse_args()
    if not (ROOT / "starter/data/test.jsonl").exists():
        call([sys.executable, "-m", "starter.docstrings"], os.environ)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
        if options.model == "flagship":
            make_model(folder / "model")
            recipe["model_name_or_path"] = str(folder / "model")
        recipe |= {
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "dataset_test_split": f"test[:{options.examples}]",
            "output_dir": str(folder / "adapters"),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        parameters = {
            "learning_rate": {"values": RATES[: options.rates]},
            "seed": {"values": list(range(options.seeds))},
        }
        words = ["${env}", "${interpreter}", "${program}", "--config", str(folder / "recipe.yaml"), "${args}"]
        sweep = {"program": "train.py", "method": "grid", "parameters": parameters, "command": words}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        server, environment = serve(folder)
        environment["WANDB_SILENT"] = "true"
        try:
            create = [sys.executable, "-m", "wandb", "sweep", "--project", "bench", str(folder / "sweep.yaml")]
            path = re.search(r"wandb agent (\S+)", call(create, environment | {"WANDB_SILENT": "false"}))[1]
            start = time.monotonic()
            command = [sys.executable, "-m", "gang", path, "--size", options.size]
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as gang:
                lines = [(time.monotonic() - start, line) for line in gang.stdout]
            seconds = time.monotonic() - start
            summaries = read_summaries(environment | {"WANDB_SILENT": "false"}, "bench") if gang.returncode == 0 else []
        finally:
            server.terminate()
            server.wait()
    said = [(when, line) for when, line in lines if line.startswith("gang:")]
    print("".join(line for _, line in said), end="")
    print(f"imports and the first claim {said[0][0]:.1f} s, the process's end {seconds - said[-1][0]:.1f} s")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rate = sum(summary["tokens_per_second"] for summary in summaries)
    print(f"{len(summaries)} runs, {seconds:.1f} s of wall time, {rate:,.0f} tokens/s while training, on {device}")
    return gang.returncode


if __name__ == "__main__":
    sys.exit(main())
