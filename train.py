"""One QLoRA run at one configuration:

    python train.py --config recipes/starter.yaml --learning_rate 2.0e-4

The recipe holds what is fixed, `sweep.yaml` what varies; every key of both is a flag of the same name (TRL's
SFTConfig, ModelConfig and ScriptArguments, with the changes marked below). The run is logged to Weights & Biases
under the column names of Hugging Face's callback. Its adapter goes to a folder in outputs/adapters, with a model card
that says how to load it.
"""

import gc
import hashlib
import json
import logging
import math
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import inputs

if __name__ == "__main__":
    inputs.answer_at_once(__doc__, sys.argv[1:])  # the imports below take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C within them is no error
    gc.disable()  # they make half a million objects and no garbage; to look for it takes a second
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' words to their own authors, above what a run says of its data
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for an optional package as if something had failed

import numpy
import torch
import wandb
from accelerate import PartialState
from datasets import Dataset
from peft import load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, EvalPrediction, TrainerCallback
from transformers.integrations import WandbCallback
from trl import SFTTrainer, get_peft_config
from trl.trainer import utils as trl_utils
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

import adapter
import guides
from checkpoint import Checkpoint, Keeper, Rows, find, identity, interruption, preempting
from data import DataConfig, answered, fingerprint, highest_token, lengths, load_splits, shared_rows, what_was_read
from inputs import InputError, first_line
from memory import OutOfMemory, fitting, release
from model import check_model, check_template, dequantised, load_model, model_arguments, template_options
from settings import BaseConfig, Parser, TrainConfig, check_warmup, parse, swept_values

# Without Triton (on a CPU) TRL's language-model head scores the prompt's tokens too and then masks them. Scoring the
# answer's tokens alone gives the same numbers in half the time.
trl_utils._use_triton = lambda device: True
# With an explicit mask (a padded batch has one), a length of 64 modulo 128 and a row whose logsumexp is below about
# -88, cuDNN's attention returns NaN in the gradient of the queries (torch >= 2.11, Hopper and newer; pytorch#196678).
# It looks like a divergence. PyTorch's other kernels are right.
torch.backends.cuda.enable_cudnn_sdp(False)

GENERATED_EXAMPLES = 5
GENERATION = {"do_sample": False, "max_new_tokens": 48}
SQUARINGS = 24  # 1 - 1e-6 to the power of 2²⁴ is 5e-8: what is left of a value that near to the largest
TINY = torch.finfo(torch.float32).tiny
PROJECT = "learning-rate-exploration"  # where neither a sweep nor WANDB_PROJECT names one
PATIENCE, PAUSE = 600.0, 5.0  # seconds that W&B's server may be away, and between two tries
T = TypeVar("T")


def evaluation_steps(max_steps: int) -> set[int]:
    """0, 1, 2, 4 and 8 % of the run, where the rates part, then every 5 %, and the end."""
    shares = (0.01, 0.02, 0.04, 0.08, *(0.05 * k for k in range(2, 20)))
    return {0, max_steps} | {max(1, round(share * max_steps)) for share in shares}


def json_number(value: float) -> float | str:
    """A float, or what W&B's API writes for one that JSON lacks: "NaN", "Infinity", "-Infinity"."""
    if math.isfinite(value):
        return round(value, 5)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class Trainer(SFTTrainer):
    """TRL's SFTTrainer, unchanged in how it trains, that measures more in each evaluation.

    eval/loss is the mean over all answer tokens; Hugging Face's would be the mean of the batches' means.
    """

    def __init__(self, base: BaseConfig, training: TrainConfig, train: Dataset, test: Dataset, model=None):
        model = model or load_model(base, training)  # a gang hands on the one that it has loaded
        used, training.model_init_kwargs = model_arguments(base, training), None
        lora = get_peft_config(base)
        lora.revision = base.model_revision  # so that PEFT loads the same base
        if model.config.get_text_config() is not model.config:
            lora.exclude_modules = ".*(visual|vision|audio|multi_modal).*"  # text gives them no gradient
        try:
            super().__init__(
                model=model,
                args=training,
                train_dataset=train,
                eval_dataset=test,
                processing_class=AutoTokenizer.from_pretrained(base.model_name_or_path, revision=base.model_revision),
                compute_metrics=self.evaluation_metrics,
                peft_config=lora,
            )
        except ValueError as error:  # TRL's and PEFT's own checks: a chat template, the names of layers
            raise InputError(first_line(error)) from error
        if not (training.dataset_kwargs or {}).get("skip_prepare_dataset"):  # another member of a gang has had them so
            self.train_dataset: Dataset = answered(self.train_dataset, "train", training.max_length)
            self.eval_dataset: Dataset = answered(self.eval_dataset, "test", training.max_length)
            self.check_tokens()
        training.model_init_kwargs = used  # for the record; TRL would have warned that it does not use them
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                dtype = torch.bfloat16 if training.adapter_dtype == "bfloat16" else torch.float32
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad = not (training.freeze_a and "lora_A" in name)
        if training.adapter_dtype == "bfloat16_weights":
            self.add_callback(RoundWeights())
        self.generation_examples = self.eval_dataset.select(range(min(GENERATED_EXAMPLES, len(self.eval_dataset))))
        by_length = numpy.argsort(-lengths(self.eval_dataset), kind="stable")
        self.eval_dataset = self.eval_dataset.select(by_length)  # equal lengths share a batch: least padding
        self.lora_layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        self.example_losses: dict = {"steps": [], "tokens": [], "nll": []}
        if "module" in self.eval_dataset.column_names:  # examples of one module are alike: the statistics cluster by it
            self.example_losses["module"] = self.eval_dataset["module"][:]
        self.first_batch_hash: str | None = None

    @cached_property
    def weight_squares(self) -> dict[str, float]:
        """‖W‖_F² of each adapted matrix."""
        return {name: weight_square(layer) for name, layer in self.lora_layers.items()}

    def check_tokens(self) -> None:
        """Raise InputError for a token that the model does not have: a tokenizer may have been given more."""
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        for rows, split in ((self.train_dataset, "train"), (self.eval_dataset, "test")):
            if (highest := highest_token(rows)) >= embeddings:
                token = self.processing_class.decode(highest)
                raise InputError(f"{split}: token {highest}, {token!r}, is beyond the model's {embeddings} embeddings")

    def training_step(self, model, inputs, *arguments, **keywords):
        self.record_first_batch(inputs)
        return super().training_step(model, inputs, *arguments, **keywords)

    def record_first_batch(self, inputs: dict[str, Tensor]) -> None:
        if self.first_batch_hash is None:
            rows = json.dumps([inputs["input_ids"].tolist(), inputs["labels"].tolist()])
            self.first_batch_hash = hashlib.sha256(rows.encode()).hexdigest()[:16]

    def log(self, logs: dict[str, float], *arguments) -> None:
        if "train_loss" in logs:  # Hugging Face's is the mean since the run was resumed
            losses = [row["loss"] for row in self.state.log_history if "loss" in row]
            logs["train_loss"] = sum(losses) / len(losses)
        super().log(logs, *arguments)

    def _load_from_checkpoint(self, checkpoint: str, model=None) -> None:
        """The adapter in its own dtype; PEFT's load_adapter, which Hugging Face would call, makes it float32."""
        set_peft_model_state_dict(self.model, load_peft_weights(checkpoint, device=str(self.model.device)))

    def create_model_card(self, *_, **__) -> None:
        """None in a checkpoint: the adapter gets its own (adapter.py)."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per example: sum of NLL in nats and number of right tokens [batch, 2], number of tokens [batch]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        scores = torch.stack([-outputs.log_probs.float().sum(-1), outputs.is_top1.float().sum(-1)], dim=-1)
        return None, scores, outputs.label_mask.sum(-1)

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = self.record_scores(prediction.predictions, prediction.label_ids)
        squares = update_squares(adapter_grams(self.lora_layers))
        return metrics | update_sizes(squares[None], sum(self.weight_squares.values()))[0]

    def record_scores(self, scores: numpy.ndarray, tokens: numpy.ndarray) -> dict[str, float]:
        """Keep the NLL of each example and give the metrics; the arguments are all that `prediction_step` returned."""
        nll, right = scores.T
        self.example_losses["steps"].append(self.state.global_step)
        self.example_losses["tokens"] = tokens.tolist()
        self.example_losses["nll"].append([json_number(value) for value in nll.tolist()])
        return {"loss": nll.sum() / tokens.sum(), "mean_token_accuracy": right.sum() / tokens.sum()}

    def question(self, row: dict) -> tuple[list[int], str]:
        """The ids of a test row's prompt, as the tokenizer makes them of what a user gives, and the reference answer.

        Not the row's ids before its answer: where the prompt ends in a space, a tokenizer joins the two.
        """
        tokenizer, ids = self.processing_class, row["input_ids"]
        if row.get("prompt"):
            asked, answer = row["prompt"], row["completion"]
        elif "messages" in row:
            turns = row["messages"]
            first = next((i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"), len(turns))
            asked, answer = turns[:first], turns[first:]
        else:  # plain text, or what follows an empty prompt, is all answer: half of it is the prompt
            half = max(1, len(ids) // 2)
            return ids[:half], tokenizer.decode(ids[half:], skip_special_tokens=True)
        if isinstance(asked, str):
            ids, reference = tokenizer(asked)["input_ids"], answer.removesuffix(tokenizer.eos_token)  # TRL has added it
        else:
            options = {"add_generation_prompt": True, "return_dict": True} | template_options(row)
            prompt = tokenizer.apply_chat_template(asked, **options)
            ids, reference = prompt["input_ids"], ""
            if answer:
                reference = answer[0].get("content") or json.dumps(answer[0].get("tool_calls"))
        longest = self.args.max_length  # a longer prompt is cut where TRL cuts a row
        return ids[-longest:] if longest and self.args.truncation_mode == "keep_end" else ids[:longest], reference

    def questions(self) -> tuple[BatchEncoding, list[str]]:
        """The first test prompts, padded on the left, and their reference answers."""
        prompts, references = zip(*map(self.question, self.generation_examples), strict=True)
        batch = self.processing_class.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        return batch.to(self.model.device), list(references)

    def generate_answers(self) -> list[dict[str, str]]:
        """Greedy answers to the first test prompts, each beside the reference and the untrained model's answer."""
        batch, references = self.questions()
        options = {"output_router_logits": False} if self.aux_loss_enabled else {}  # its loss has no padding mask here
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            trained = self.model.generate(**batch, **GENERATION, **options)
            with self.model.disable_adapter():
                untrained = self.model.generate(**batch, **GENERATION, **options)
        return self.answer_rows(batch, references, untrained, trained)

    def answer_rows(
        self, batch: BatchEncoding, references: list[str], untrained: Tensor, trained: Tensor
    ) -> list[dict]:
        """The rows of generations.json, for `questions` and what `generate` made of them."""
        length = batch["input_ids"].shape[1]
        decode = partial(self.processing_class.batch_decode, skip_special_tokens=True)
        columns = decode(batch["input_ids"]), references, decode(untrained[:, length:]), decode(trained[:, length:])
        keys = ("prompt", "reference", "untrained", "completion")
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def weight_square(layer: LoraLayer) -> float:
    """‖W‖_F² of the frozen matrix under an adapter."""
    return float(dequantised(layer.get_base_layer()).float().square().sum())


@torch.no_grad()
def adapter_grams(layers: dict[str, LoraLayer]) -> Tensor:
    """[modules, 2, r, r]: (α/r) AAᵀ and (α/r) BᵀB of each adapted matrix."""
    grams = []
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        grams.append(torch.stack([a @ a.T, b.T @ b]) * layer.scaling["default"])
    return torch.stack(grams)


def update_squares(grams: Tensor) -> Tensor:
    """‖ΔW‖_F² and ‖ΔW‖_2² [..., 2] in float64, for `adapter_grams` [..., 2, r, r].

    ΔW = (α/r)BA is never formed: its squared singular values are the eigenvalues of M = (α/r)² AAᵀ BᵀB. Their sum is
    M's trace. The largest is ΔWΔWᵀ's Rayleigh quotient at Bx, for the largest column x of a high power of M. These are
    products of all matrices at once; decompositions go one after another and take seconds at r = 256.
    """
    exponents = torch.frexp(grams.abs().amax((-2, -1), keepdim=True)).exponent
    grams = torch.ldexp(grams, -exponents)  # exact; else a diverging adapter's would overflow
    power = grams[..., 0, :, :] @ grams[..., 1, :, :]
    for _ in range(SQUARINGS):
        power = power / power.abs().amax((-2, -1), keepdim=True).clamp(min=TINY)
        power = power @ power
    largest = power.square().sum(-2).argmax(-1)[..., None, None]
    a, b = grams.double().unbind(-3)
    x = torch.take_along_dim(power, largest, -1).double()
    y = b @ x
    trace = (a * b).sum((-2, -1))
    greatest = (y.mT @ a @ y / (x.mT @ y).clamp(min=TINY))[..., 0, 0]
    return torch.ldexp(torch.stack([trace, greatest], -1), exponents.sum(-3)[..., 0].double()).clamp(min=0)


def update_sizes(squares: Tensor, weight_square: float) -> list[dict[str, float]]:
    """‖ΔW‖_F/‖W‖_F over all adapted matrices, and the mean stable rank ‖ΔW‖_F²/‖ΔW‖_2² of the matrices.

    For `update_squares` [adapters, modules, 2] and Σ‖W‖_F². The stable rank is left out where ΔW = 0, as at step 0.
    """
    sizes = []
    for square in squares.cpu():
        if not square.isfinite().all():
            sizes.append({"update_ratio": math.nan, "stable_rank": math.nan})
            continue
        sizes.append({"update_ratio": math.sqrt(float(square[:, 0].sum()) / weight_square)})
        moved = square[square[:, 1] > 0]
        if len(moved):
            sizes[-1]["stable_rank"] = float((moved[:, 0] / moved[:, 1]).mean())
    return sizes


class RoundWeights(TrainerCallback):
    """Rounds the adapter's weights to bfloat16's values after each step; gradients and moments stay float32."""

    def on_train_begin(self, args, state, control, model, **_):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.data.bfloat16())

    on_optimizer_step = on_train_begin


class Watch(TrainerCallback):
    """Evaluates at the planned steps, times the training steps alone, and stops a run that is no longer finite."""

    def __init__(self, run):
        self.run = run
        self.peak_learning_rate = 0.0
        self.seconds = 0.0
        self.tokens = 0
        self.diverged_at_step: int | None = None

    def on_train_begin(self, args, state, control, **_):
        self.evaluation_steps = evaluation_steps(state.max_steps)
        planned = {"max_steps": state.max_steps, "warmup_steps": args.get_warmup_steps(state.max_steps)}
        self.run.config.update(planned, allow_val_change=True)

    def on_step_begin(self, args, state, control, **_):
        self.step_start = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the backward pass would run on outside the measured time
        self.seconds += time.monotonic() - self.step_start
        control.should_evaluate = state.global_step in self.evaluation_steps

    def on_log(self, args, state, control, logs, **_):
        self.tokens = logs.get("num_tokens", self.tokens)
        self.peak_learning_rate = max(self.peak_learning_rate, logs.get("learning_rate", 0.0))
        values = [logs[key] for key in ("loss", "grad_norm", "eval_loss") if key in logs]
        if not all(map(math.isfinite, values)) and self.diverged_at_step is None:
            self.diverged_at_step = state.global_step
            self.run.summary["diverged_at_step"] = state.global_step
            control.should_training_stop = True


def describe_data(trainer: Trainer, train: Dataset, test: Dataset) -> dict:
    """The config entries about the rows as they were read, and as the trainer has tokenised them."""
    return {
        "data_fingerprint": fingerprint(train, test),
        "rows_in_both_splits": shared_rows(train, test),
        "train_examples": len(trainer.train_dataset),
        "eval_examples": len(trainer.eval_dataset),
        "train_tokens": int(lengths(trainer.train_dataset).sum()),
    }


def describe(trainer: Trainer, data: DataConfig, base: BaseConfig) -> dict:
    """The config entries beyond TRL's arguments: what the analysis and a reader need to know about the run."""
    trainable, total = trainer.model.get_nb_trainable_parameters()  # counts packed 4-bit weights right
    adapted: dict[str, dict] = {}
    for name, layer in trainer.lora_layers.items():
        kind = adapted.setdefault(name.rsplit(".", 1)[-1], {"count": 0, "square": 0.0})
        kind |= {"d_in": layer.in_features, "d_out": layer.out_features}
        kind["count"] += 1
        kind["square"] += trainer.weight_squares[name]
    for kind in adapted.values():
        kind["weight_std"] = math.sqrt(kind.pop("square") / (kind["count"] * kind["d_in"] * kind["d_out"]))
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "wandb")
    cuda = torch.cuda.is_available()
    return (
        vars(data)
        | vars(base)
        | guides.source(base.guide)
        | {
            "vocab_size": trainer.model.config.get_text_config().vocab_size,
            "adapted_modules": adapted,
            "trainable_parameters": trainable,
            "all_parameters": total,
            "hardware": torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)",
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        }
    )


def start_run(training: TrainConfig, data: DataConfig, base: BaseConfig, swept: dict, resumed: bool, **options):
    """Open the W&B run: named after the swept values, grouped by learning rate; `resumed`, or begun anew."""
    try:
        return wandb.init(
            project=None if "WANDB_SWEEP_ID" in os.environ or "WANDB_PROJECT" in os.environ else PROJECT,
            name=" ".join(f"{key}={value}" for key, value in swept.items()),
            group=f"learning_rate={training.learning_rate}",
            tags=[Path(name).resolve().name[:64] for name in (base.model_name_or_path, data.dataset_name)],
            resume="allow" if resumed else None,
            mode=None if PartialState().is_main_process else "disabled",
            **options,
        )
    except wandb.Error as error:
        hint = "run `wandb login`, start `python -m local_wandb`, or set WANDB_MODE=offline"
        raise InputError(f"W&B: {first_line(error)}; {hint}") from error


def save_with_run(run, name: str, content) -> None:
    path = Path(run.dir, name)
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    run.save(str(path), base_path=run.dir, policy="now")


def read_data(data: DataConfig, training: TrainConfig, base: BaseConfig) -> tuple[Dataset, Dataset]:
    """The two splits. Whatever can be wrong before a run begins is an InputError here."""
    splits = load_splits(data, training.assistant_only_loss)
    check_model(base)
    check_template(base, training, splits[0])
    if PartialState().num_processes == 1 and torch.cuda.device_count() > 1:
        raise InputError("several GPUs are visible: set CUDA_VISIBLE_DEVICES to one, or start with accelerate launch")
    try:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=training.output_dir).close()
    except OSError as error:
        raise InputError(f"output_dir {training.output_dir}: {error.strerror}; choose a writable directory") from error
    return splits


def watch_run(
    trainer: Trainer, run, described: dict, settings: dict, resumed: Checkpoint | None
) -> tuple[Watch, Keeper]:
    """Let the run know what it is, a Watch follow the training, and a Keeper save it and go on with `resumed`."""
    rows = Rows(run)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):  # it would log to the global run; a gang has several
            assert callback._wandb is wandb, "WandbCallback keeps wandb elsewhere"
            own = {"run": run, "config": run.config, "summary": run.summary, "log": rows.log}
            callback._wandb = SimpleNamespace(**vars(wandb) | own | {"define_metric": run.define_metric})
    watch = Watch(run)
    trainer.add_callback(watch)
    run.config.update(described, allow_val_change=True)
    about = {"run": run.id, "sweep": run.sweep_id, "settings": settings}
    about["data_fingerprint"] = described["data_fingerprint"]
    keeper = Keeper(trainer, watch, about, resumed)
    trainer.add_callback(keeper)
    return watch, keeper


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a server that may be away for a while. InputError once that is PATIENCE."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except (WandbApiFailedError, wandb.errors.AuthenticationError) as error:
            if time.monotonic() > end:
                raise InputError(f"the server does not answer: {first_line(error)}") from error
            print(f"the server does not answer: {first_line(error)}; another try follows", flush=True)
            time.sleep(PAUSE)


def log_adapter(run, facts: dict, folder: str) -> None:
    """Log the adapter as an artifact, under the name, type and alias of Hugging Face's callback.

    Unless WANDB_LOG_MODEL is false. That is Hugging Face's default, made for whole models: an adapter is small.
    """
    if os.environ.get("WANDB_LOG_MODEL", "end").lower() not in ("false", "0"):
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=facts | {"final_model": True})
        artifact.add_dir(folder)
        patiently(lambda: run.log_artifact(artifact, aliases=["final_model"]))  # it asks the server at once


def sampled(answer: Callable[[], T]) -> T | str:
    """The samples of what was trained, or why there are none: a run that has come to its end is not lost for them."""
    try:
        return answer()
    except Exception as error:  # of the base's generation_config.json, its chat template, or memory
        why = f"{type(error).__name__}: {first_line(error)}"
        print(f"no sample answers: {why}", flush=True)
        return why


def leave(trainer: Trainer, watch: Watch, answers: list[dict] | str | None) -> None:
    """What stays of a run that has trained to its end: files, adapter, summary. One that diverged has no answers."""
    run, training = watch.run, trainer.args
    save_with_run(run, "eval_nll.json", trainer.example_losses)
    if isinstance(answers, str):
        run.summary["no_answers"] = answers
    elif answers is not None:
        save_with_run(run, "generations.json", answers)
    log_adapter(run, adapter.save(trainer, run, watch.diverged_at_step), training.output_dir)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * kilobytes
    run.summary["first_batch_hash"] = trainer.first_batch_hash
    run.summary["train_seconds"] = watch.seconds
    run.summary["tokens_per_second"] = watch.tokens / watch.seconds
    run.summary["peak_memory_gib"] = peak_memory / 2**30
    if trainer.state.global_step > training.get_warmup_steps(trainer.state.max_steps):
        requested, peak = training.learning_rate, watch.peak_learning_rate
        assert math.isclose(peak, requested), f"the peak learning rate was {peak}, not the requested {requested}"


def train(data: DataConfig, training: TrainConfig, base: BaseConfig, swept: dict) -> None:
    """The whole run: data, trainer, W&B, training, measurements, adapter."""
    settings, run_id = identity(data, training, base), os.environ.get("WANDB_RUN_ID")
    resumed = find(training, settings, run_id, os.environ.get("WANDB_SWEEP_ID"))
    splits = read_data(data, training, base)
    trainer = Trainer(base, training, *splits)
    check_warmup(training, trainer.set_initial_training_values(training, trainer.get_train_dataloader())[6])
    described = describe_data(trainer, *splits)
    first_lines = what_was_read(data, splits, trainer, described["rows_in_both_splits"])
    own = resumed is not None and resumed.about["run"] == run_id
    with start_run(training, data, base, swept, own) as run, preempting(run):  # whatever is refused has been by now
        training.output_dir = str(Path(training.output_dir, adapter.folder_name(swept, run.id)))
        if resumed and not training.resume_from_checkpoint and not resumed.move(training.output_dir):
            resumed = None
        if PartialState().is_main_process:
            print(first_lines, flush=True)
        described |= describe(trainer, data, base)
        watch, keeper = watch_run(trainer, run, described, settings, resumed)
        try:
            with interruption.waits(lambda: trainer.state.global_step == trainer.state.max_steps):
                trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
        except torch.OutOfMemoryError as error:
            run.summary["out_of_memory"] = message = f"{release(error)}; {fitting(trainer)}"
            raise OutOfMemory(message) from None
        leave(trainer, watch, sampled(trainer.generate_answers) if watch.diverged_at_step is None else None)
    keeper.remove()


def main() -> None:
    gc.freeze()
    gc.enable()
    interruption.install()  # W&B loses what it has not sent yet when the process dies of a signal
    if "--help-all" in sys.argv:
        Parser().print_help()
        return
    try:
        data, training, base = parse(sys.argv[1:])
        train(data, training, base, swept_values(training))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OutOfMemory as error:
        print(f"OutOfMemoryError: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
