"""The same grid by different means, measured in one run on one machine:

    python -m benchmarks.grid                                    # the starter: four train.py runs against one gang
    python -m benchmarks.grid --model 1b --peers train sft sft-tuned unsloth gang

Every peer starts its own processes and logs to a local_wandb of its own; the makespan is from the first process's
start to the last one's end. `sft` and `unsloth` train without the evaluations that train.py and the gang make.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from settings import parse

ROOT = Path(__file__).parent.parent
RATES = [1.0e-5, 2.0e-4, 1.0e-3, 5.0e-3]
LENGTH = 512
# Random weights: hidden size, layers, heads, key-value heads, MLP size, vocabulary.
MODELS = {
    "135m": (576, 30, 9, 3, 1536, 49152),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "7b": (4096, 32, 32, 32, 11008, 32000),
}
PEERS = {
    "train": "four train.py, one after another",
    "sft": "four SFTTrainer, TRL's defaults",
    "sft-tuned": "four SFTTrainer, no gradient checkpointing",
    "unsloth": "four Unsloth, no gradient checkpointing",
    "gang": "one gang",
}
H200 = 790e12  # FLOP/s, bf16 8192³ multiplications as measured (docs/performance.md)


@dataclass
class Result:
    seconds: float
    cpu_seconds: float  # of all its processes; on a shared machine steadier than the makespan
    tokens: float
    rate: float  # trained tokens per second while training, all configurations together
    gib: float


def make_model(name: str, folder: Path) -> None:
    """A Llama of random weights in bfloat16, with the starter's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv, mlp, vocabulary = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(ROOT / "starter/model").save_pretrained(folder)


def make_recipe(options: argparse.Namespace, folder: Path) -> Path:
    """The starter's recipe with fewer steps; or random words, each row LENGTH tokens, on a random model."""
    recipe = yaml.safe_load((ROOT / "recipes/starter.yaml").read_text())
    if options.model != "starter":
        make_model(options.model, folder / "model")
        words = random.Random(0)
        with open(folder / "rows.jsonl", "w") as file:
            for _ in range(options.batch * options.steps + 8):
                file.write(json.dumps({"text": " ".join(str(words.randrange(10**6)) for _ in range(LENGTH))}) + "\n")
        recipe = {
            "model_name_or_path": str(folder / "model"),
            "dataset_name": str(folder / "rows.jsonl"),
            "dataset_train_split": "train[8:]",
            "dataset_test_split": "train[:8]",
            "max_length": LENGTH,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": options.batch,
        }
    recipe |= {"max_steps": options.steps, "output_dir": str(folder / "adapters")}
    if options.examples:
        recipe["dataset_test_split"] = f"test[:{options.examples}]"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def matmul_parameters(name: str) -> int:
    hidden, layers, heads, kv, mlp, vocabulary = MODELS[name]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv // heads
    return layers * (attention + 3 * hidden * mlp) + vocabulary * hidden


def serve(folder: Path) -> tuple[subprocess.Popen, dict[str, str]]:
    command = [sys.executable, "-m", "local_wandb", "--data", str(folder / "wandb_data")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    exports = dict(process.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(2))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "WANDB_DIR": str(folder), "WANDB_ENTITY": "local", "WANDB_ERROR_REPORTING": "false"}
    return process, os.environ | exports | more


def call(command: list, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def measure(peer: str, recipe: Path, environment: dict[str, str], project: str) -> Result:
    """One peer's grid; tokens and memory are as its runs report them."""
    environment = environment | {"WANDB_PROJECT": project}
    if peer == "gang":
        sweep = {
            "program": "train.py", "method": "grid", "parameters": {"learning_rate": {"values": RATES}},
            "command": ["${env}", "${interpreter}", "${program}", "--config", str(recipe), "${args}"],
        }  # fmt: skip
        recipe.with_name("sweep.yaml").write_text(yaml.safe_dump(sweep))
        created = call(
            [sys.executable, "-m", "wandb", "sweep", "--project", project, recipe.with_name("sweep.yaml")], environment
        )
        path = re.search(r"wandb agent (\S+)", created)[1]
    start, cpu = time.monotonic(), children_seconds()
    printed = []
    if peer == "gang":
        call([sys.executable, "-m", "gang", path], environment)
    for rate in RATES if peer != "gang" else ():
        flags = ["--config", str(recipe), f"--learning_rate={rate}"]
        script = ["train.py"] if peer == "train" else [__file__, "--run", peer]
        printed.append(call([sys.executable, *script, *flags], environment))
    seconds, cpu = time.monotonic() - start, children_seconds() - cpu
    if peer in ("train", "gang"):
        summaries = read_summaries(environment, project)
        rates = [summary["tokens_per_second"] for summary in summaries]
        tokens, gib = (sum(s["train/num_tokens"] for s in summaries), max(s["peak_memory_gib"] for s in summaries))
    else:
        lines = [json.loads(re.search(r'^{"tokens".*', text, re.MULTILINE)[0]) for text in printed]
        tokens, gib = sum(line["tokens"] for line in lines), max(line["gib"] for line in lines)
        rates = [line["tokens"] / line["seconds"] for line in lines]
    return Result(seconds, cpu, tokens, sum(rates) if peer == "gang" else len(rates) / sum(1 / r for r in rates), gib)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_summaries(environment: dict[str, str], project: str) -> list[dict]:
    program = "import json, sys, wandb; runs = wandb.Api().runs(sys.argv[1])\n"
    program += "print(json.dumps([dict(run.summary) for run in runs], default=str))"
    return json.loads(call([sys.executable, "-c", program, f"local/{project}"], environment).splitlines()[0])


def run_plain(peer: str, flags: list[str]) -> None:
    """In a process of its own: SFTTrainer as TRL or Unsloth sets it up, on train.py's recipe; prints one JSON line."""
    sys.path.insert(0, str(ROOT))
    if peer == "unsloth":
        from unsloth import FastLanguageModel  # before trl: it replaces parts of it
    from trl import SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

    from data import load_split

    data, training, base = parse([*flags, "--report_to=none", "--eval_on_start=false"])
    keys = ("output_dir", "max_steps", "per_device_train_batch_size", "max_length", "learning_rate", "bf16", "seed",
            "assistant_only_loss", "lr_scheduler_type", "warmup_steps")  # fmt: skip
    settings = {key: getattr(training, key) for key in keys} | {"report_to": "none", "save_strategy": "no"}
    if peer != "sft":
        settings |= {"gradient_checkpointing": False}
    model, more = base.model_name_or_path, {}
    if peer == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(
            model, max_seq_length=training.max_length, load_in_4bit=True
        )
        model = FastLanguageModel.get_peft_model(model, r=base.lora_r, lora_alpha=base.lora_alpha, lora_dropout=0)
        more = {"processing_class": tokenizer}
        settings |= {"gradient_accumulation_steps": 1}  # Unsloth otherwise sets 2: twice the effective batch
    else:
        more = {"peft_config": get_peft_config(base), "quantization_config": get_quantization_config(base)}
        settings |= {"model_init_kwargs": {"dtype": base.dtype}}
    rows = load_split(data, data.dataset_train_split)
    trainer = SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=rows, **more)
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    rss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else rss
    tokens = max(row.get("num_tokens", 0) for row in trainer.state.log_history)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "gib": peak / 2**30}))


def table(options: argparse.Namespace, results: dict[str, list[Result]]) -> str:
    """Medians over the rounds; the ratio is to the fastest peer that is not the gang."""
    middle = {peer: sorted(rounds, key=lambda r: r.seconds)[len(rounds) // 2] for peer, rounds in results.items()}
    best = min((r.seconds for peer, r in middle.items() if peer != "gang"), default=None)
    head = (
        "| | makespan | CPU time | tokens | tokens/s while training | peak memory | of the 4N limit | × fastest peer |"
    )
    lines = [head, "|" + "---|" * 8]
    for peer, r in middle.items():
        limit = "—"
        if options.model in MODELS and torch.cuda.is_available():
            limit = f"{100 * 4 * matmul_parameters(options.model) * r.rate / H200:.0f} %"
        ratio = f"{best / r.seconds:.2f}" if best else "—"
        cells = [
            PEERS[peer],
            f"{r.seconds:.1f} s",
            f"{r.cpu_seconds:.0f} s",
            f"{r.tokens:,.0f}",
            f"{r.rate:,.0f}",
            f"{r.gib:.2f} GiB",
            limit,
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["starter", *MODELS], default="starter")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["train", "gang"])
    parser.add_argument("--steps", type=int, default=100, help="of each configuration; default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a random model's step; default: %(default)s")
    parser.add_argument("--examples", type=int, help="test examples of the starter; default: all")
    parser.add_argument("--rounds", type=int, default=1, help="each peer's turns, alternating; default: %(default)s")
    options = parser.parse_args()
    if "unsloth" in options.peers and not importlib.util.find_spec("unsloth"):
        print("unsloth is not installed here: left out")
        options.peers.remove("unsloth")
    results: dict[str, list[Result]] = {peer: [] for peer in options.peers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(options, folder)
        server, environment = serve(folder)
        try:
            for turn in range(options.rounds):
                for peer in options.peers:
                    results[peer].append(measure(peer, recipe, environment, f"{peer}-{turn}"))
                    print(f"round {turn + 1}: {PEERS[peer]}: {results[peer][-1].seconds:.1f} s", flush=True)
        finally:
            server.terminate()
            server.wait()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{options.model}, {options.steps} steps, {len(RATES)} rates, {device}\n\n{table(options, results)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_plain(sys.argv[2], sys.argv[3:])
    else:
        main()
