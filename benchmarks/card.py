"""Which models fit a card of 16 GB, how many rates at once, and how long a step takes:

    python -m benchmarks.card --gib 15.6

On a larger GPU a ballast process leaves only that much free. Weights are random, in the shapes of Qwen2.5; the rows
have the lengths of instruction data: a median of 200 tokens, up to 1,024, half of them the answer's.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.grid import RATES, ROOT, call, read_summaries, serve

# Hidden size, layers, heads, key-value heads, MLP size, vocabulary, whether the head is the embedding.
SIZES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
LONGEST, MEDIAN, SPREAD = 1024, 200, 0.8  # tokens; the spread is the standard deviation of the lengths' logarithm
RTX_5060_TI = 47e12  # FLOP/s, bf16 dense by its data sheet: the estimates' only ingredient that is not measured here
BALLAST = """
import sys, time, torch
free = torch.cuda.mem_get_info()[0] - float(sys.argv[1]) * 2**30
kept = torch.empty(max(0, int(free)), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0] / 2**30, flush=True)
sys.stdin.read()
"""


def make_model(name: str, folder: Path) -> None:
    """A Qwen2 of random weights in bfloat16, with the starter's tokenizer and chat template."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, kv, mlp, vocabulary, tied = SIZES[name]
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=LONGEST, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        Qwen2ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "starter/model")
    tokenizer.model_max_length = LONGEST
    tokenizer.save_pretrained(folder)


def make_rows(path: Path, count: int) -> None:
    draw, per_word = random.Random(0), 5.0  # tokens of a random number of six digits, about

    def words(tokens: float) -> str:
        return " ".join(str(draw.randrange(10**5, 10**6)) for _ in range(max(1, round(tokens / per_word))))

    with open(path, "w") as file:
        for _ in range(count):
            tokens = min(LONGEST, max(20, draw.lognormvariate(0, SPREAD) * MEDIAN))
            turns = [{"role": role, "content": words(tokens / 2)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")


def make_recipe(options: argparse.Namespace, folder: Path, checkpointing: bool) -> Path:
    recipe = yaml.safe_load((ROOT / "recipes/rtx-16gb.yaml").read_text())
    del recipe["dataset_test_split"], recipe["dataset_train_split"], recipe["model_revision"]
    recipe |= {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "rows.jsonl"),
        "dataset_train_split": "train[8:]",
        "dataset_test_split": "train[:8]",
        "max_steps": options.steps,
        "eval_on_start": False,
        "gradient_checkpointing": checkpointing,
        "output_dir": str(folder / "adapters"),
    }
    path = folder / f"recipe-{checkpointing}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(kind: str, recipe: Path, environment: dict[str, str], project: str) -> dict:
    """What train.py or a gang reports of its runs; an end by a lack of memory is a result."""
    if kind == "train":
        command = [sys.executable, "train.py", "--config", str(recipe), "--learning_rate=2.0e-4"]
    else:
        parameters = {"learning_rate": {"values": RATES}}
        words = ["${env}", "${interpreter}", "${program}", "--config", str(recipe), "${args}"]
        sweep = {"program": "train.py", "method": "grid", "parameters": parameters, "command": words}
        file = recipe.with_name(f"{project}.yaml")
        file.write_text(yaml.safe_dump(sweep))
        created = call([sys.executable, "-m", "wandb", "sweep", "--project", project, str(file)], environment)
        command = [sys.executable, "-m", "gang", re.search(r"wandb agent (\S+)", created)[1]]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"WANDB_PROJECT": project}, capture_output=True, text=True
    )
    seconds, text = time.monotonic() - start, done.stdout + done.stderr
    if done.returncode:
        causes = [line for line in text.splitlines() if "Error" in line or "error" in line] or text.splitlines()
        return {"failed": causes[-1][:160] if causes else done.returncode, "seconds": seconds}
    summaries = read_summaries(environment, project)
    chosen = re.findall(r"^gang: .*(?:at once|memory).*$", text, re.MULTILINE)
    return {
        "members": len(summaries),
        "step_seconds": max(s["train_seconds"] / s["train/global_step"] for s in summaries),
        "tokens_per_second": sum(s["tokens_per_second"] for s in summaries),
        "peak_gib": max(s["peak_memory_gib"] for s in summaries),
        "seconds": seconds,
        "said": chosen[-1] if chosen else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--gib", type=float, default=15.6, help="memory left free; default: %(default)s")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", choices=["train", "gang"], default=["train", "gang"])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["on", "off"])
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", 16 * options.steps + 8)
        server, environment = serve(folder)
        ballast = None
        try:
            for size in options.sizes:
                make_model(size, folder / "model")
                command = [sys.executable, "-c", BALLAST, str(options.gib)]
                ballast = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                free = float(ballast.stdout.readline())
                for state in options.checkpointing:
                    recipe = make_recipe(options, folder, state == "on")
                    for kind in options.kinds:
                        project = f"{kind}-{size.replace('.', '_')}-{state}"
                        result = measure(kind, recipe, environment, project)
                        facts = {"model": size, "free_gib": round(free, 2), "checkpointing": state, "kind": kind}
                        print(json.dumps(facts | result), flush=True)
                ballast.communicate()
        finally:
            if ballast:
                ballast.kill()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
