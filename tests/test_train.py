"""train.py: what it accepts, what it measures, and that measuring changes nothing."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config, LlamaConfig, MixtralConfig
from wandb.errors import AuthenticationError
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

import train
from data import load_split
from inputs import InputError
from memory import OutOfMemory, fitting
from model import dequantised, model_arguments, noise_off
from settings import parse, swept_values

ROOT = Path(__file__).parent.parent
STARTER = ["--config", "recipes/starter.yaml"]
# In float32 on a GPU too: bfloat16 rounds a row alone and the same row in a batch differently, by half a percent.
FLOAT32 = ["--dtype", "float32", "--bf16", "false"]


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def trainer(tmp_path, *flags: str) -> train.Trainer:
    """A Trainer on 48 functions of the starter's data, evaluated on 24, that logs nowhere."""
    small = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--report_to", "none"]
    data, training, base = parse([*STARTER, *FLOAT32, *small, "--output_dir", str(tmp_path), *flags])
    rows = [load_split(data, split) for split in ("train[:48]", "test[:24]")]
    return train.Trainer(base, training, *rows)


def losses(trainer: train.Trainer) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
def test_evaluations_leave_the_trajectory_as_it_is(tmp_path):
    class Evaluate(train.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_evaluate = True

    plain = trainer(tmp_path, "--eval_on_start", "false")
    watched = trainer(tmp_path)
    watched.add_callback(Evaluate())
    plain.train()
    watched.train()
    assert losses(plain) == losses(watched)
    assert plain.state.log_history[-1]["train_loss"] == pytest.approx(sum(loss for loss, _ in losses(plain)) / 3)
    assert plain.first_batch_hash == watched.first_batch_hash and len(plain.first_batch_hash) == 16
    assert [row["step"] for row in watched.state.log_history if "eval_loss" in row] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_base_is_in_nf4_with_double_quantisation(tmp_path):
    subject = trainer(tmp_path)
    layers = [module for module in subject.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == len(subject.lora_layers) == 7 * subject.model.config.num_hidden_layers
    assert {(layer.weight.quant_type, layer.weight.quant_state.nested) for layer in layers} == {("nf4", True)}
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    base = AutoModelForCausalLM.from_pretrained("starter/model", dtype=torch.float32)
    stored = torch.stack([layer.mlp.up_proj.weight for layer in base.model.layers])
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert subject.weight_squares[name] == pytest.approx(stored[0].square().sum().item(), rel=0.02)
    described = train.describe(subject, SimpleNamespace(), SimpleNamespace(guide=None))
    kind = described["adapted_modules"]["up_proj"]
    assert (kind["count"], kind["d_out"], kind["d_in"]) == stored.shape
    assert kind["weight_std"] == pytest.approx(stored.square().mean().sqrt().item(), rel=0.02)
    assert described["versions"]["python"] == platform.python_version()


@pytest.mark.slow
def test_the_size_of_a_base_in_8_bits_is_that_of_its_weights_not_of_their_codes(tmp_path):
    subject = trainer(tmp_path, "--load_in_4bit", "false", "--load_in_8bit", "true")
    stored = trainer(tmp_path, "--load_in_4bit", "false").weight_squares
    assert subject.weight_squares == pytest.approx(stored, rel=1e-3)
    subject.evaluate()  # a forward pass moves the scales from the weight to the layer
    assert {name: train.weight_square(layer) for name, layer in subject.lora_layers.items()} == subject.weight_squares


@pytest.mark.slow
def test_what_trl_and_peft_refuse_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"Target modules .* not found in the base model"):
        trainer(tmp_path, "--lora_target_modules", "query", "value")
    template = write(tmp_path / "template.jinja", "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(InputError, match="The chat template is not training-compatible"):
        trainer(tmp_path, "--chat_template_path", template)


def test_what_has_no_known_matrix_is_named():
    with pytest.raises(InputError, match=r"lora_target_modules: Embedding of torch\.float32 is no linear layer"):
        dequantised(torch.nn.Embedding(2, 2))
    with pytest.raises(InputError, match=r"Linear of torch\.float8_e4m3fn is no linear layer"):
        dequantised(torch.nn.Linear(2, 2).to(torch.float8_e4m3fn))
    with pytest.raises(InputError, match="Identity is no linear layer"):
        dequantised(torch.nn.Identity())


def test_dropout_is_found_wherever_a_configuration_has_it():
    assert noise_off(GPT2Config()) == dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nested = Gemma3Config(text_config={"attention_dropout": 0.1})
    assert noise_off(nested) == {"text_config": {"attention_dropout": 0.0}}
    assert noise_off(MixtralConfig(router_jitter_noise=0.1)) == {"router_jitter_noise": 0.0}
    assert noise_off(LlamaConfig()) == {}


def test_dropout_that_a_recipe_sets_is_off_as_well(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, training, base = parse([*STARTER, "--model_init_kwargs", '{"attention_dropout": 0.5}'])
    assert model_arguments(base, training)["attention_dropout"] == 0.0


@pytest.mark.slow
def test_adapters_start_equal_in_float32_and_b_at_zero(tmp_path):
    first, second = trainer(tmp_path, "--learning_rate", "1.0e-5"), trainer(tmp_path, "--learning_rate", "5.0e-3")
    adapters = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * first.model.config.num_hidden_layers
    others = dict(second.model.named_parameters())
    for name, parameter in adapters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, others[name])
        assert ("lora_B" in name) == (not parameter.any())


@pytest.mark.slow
def test_adapter_dtype_bfloat16_reproduces_trl(tmp_path):
    kept = trainer(tmp_path, "--adapter_dtype", "bfloat16")
    assert {p.dtype for p in kept.model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
def test_bfloat16_weights_rounds_the_weights_alone(tmp_path):
    subject = trainer(tmp_path, "--adapter_dtype", "bfloat16_weights", "--eval_on_start", "false")
    subject.train()
    weights = [p for p in subject.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in weights)
    moments = [state["exp_avg"] for state in subject.optimizer.state.values()]
    assert len(moments) == len(weights)
    assert not any(torch.equal(moment, moment.bfloat16().float()) for moment in moments if moment.any())


@pytest.mark.slow
def test_a_frozen_a_stays_where_it_was(tmp_path):
    subject = trainer(tmp_path, "--freeze_a", "true", "--eval_on_start", "false")
    before = {name: p.clone() for name, p in subject.model.named_parameters() if "lora_" in name}
    subject.train()
    after = dict(subject.model.named_parameters())
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("lora_A" in name), name


MESSAGES = {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "the sum"}]}
PLAIN = {"prompt": "2 + 3 is ", "completion": "the sum"}  # ends in a space, which tokenizers merge into the answer
TURNS = {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "counted"), [(MESSAGES, True), (MESSAGES, False), (PLAIN, False), (TURNS, False)])
def test_the_question_is_what_a_user_gives(row, counted, tmp_path):
    model = tmp_path / "model"
    shutil.copytree("starter/model", model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("### Response:\n", "### Response: "))
    flags = [*STARTER, "--model_name_or_path", str(model), "--assistant_only_loss", str(counted).lower()]
    _, training, base = parse([*flags, "--report_to", "none", "--output_dir", str(tmp_path)])
    subject = train.Trainer(base, training, *[Dataset.from_list([row] * 2)] * 2)
    batch, references = subject.questions()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if row is PLAIN:
        expected = tokenizer(row["prompt"])["input_ids"]
    else:
        question = MESSAGES["messages"][:1]
        expected = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert batch["input_ids"].tolist() == [expected] * 2
    assert tokenizer.decode(expected).endswith(" ")
    assert references == ["the sum"] * 2


@pytest.mark.slow
def test_a_row_without_an_answer_is_not_trained_on(tmp_path):
    """Alone in a batch it would have no loss, which looks like divergence; here max_length makes TRL look for none."""
    flags = [*STARTER, "--assistant_only_loss", "false", "--report_to", "none", "--output_dir", str(tmp_path)]
    _, training, base = parse(flags)
    training.max_length = None
    rows = Dataset.from_list([{"text": ""}, {"text": "the sum"}])
    subject = train.Trainer(base, training, rows, rows)
    assert len(subject.train_dataset) == len(subject.eval_dataset) == 1


def test_of_other_rows_a_part_is_the_question():
    tokenizer = AutoTokenizer.from_pretrained("starter/model")
    subject = SimpleNamespace(
        processing_class=tokenizer, args=SimpleNamespace(max_length=5, truncation_mode="keep_start")
    )
    ids = tokenizer("one two three four five six seven").input_ids[:6]
    text = {"text": "", "input_ids": [*ids, tokenizer.eos_token_id]}
    assert train.Trainer.question(subject, text) == (ids[:3], tokenizer.decode(ids[3:]))
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    for answer, reference in (([called], '[{"name": "add"}]'), ([], "")):
        turns = [{"role": "system", "content": "Be brief."}, MESSAGES["messages"][0], *answer]
        expected = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        row = {"messages": turns, "input_ids": []}
        assert train.Trainer.question(subject, row) == (expected[:5], reference)
        for length, kept in ((5, expected[-5:]), (None, expected)):
            at_the_end = SimpleNamespace(max_length=length, truncation_mode="keep_end")
            ends = SimpleNamespace(processing_class=tokenizer, args=at_the_end)
            assert train.Trainer.question(ends, row) == (kept, reference)


@pytest.mark.parametrize(("row", "asked"), [({"prompt": "", "completion": "Sum them."}, None), ({"text": ""}, 1)])
def test_a_question_is_never_empty(row, asked):
    """Nothing could be generated from one, and the run would be lost after its last step."""
    tokenizer = AutoTokenizer.from_pretrained("starter/model")
    ids = tokenizer("".join(row.values()) + tokenizer.eos_token)["input_ids"]
    question, rest = train.Trainer.question(SimpleNamespace(processing_class=tokenizer), row | {"input_ids": ids})
    assert question == ids[: asked or len(ids) // 2] and question
    assert tokenizer.decode(question, skip_special_tokens=True) + rest == "".join(row.values())


def test_answers_are_what_follows_the_question():
    tokenizer = AutoTokenizer.from_pretrained("starter/model")
    question, untrained, trained = (tokenizer(words).input_ids for words in ("def add(a, b):", "Nothing.", "Add them."))
    batch = {"input_ids": torch.tensor([question])}
    rows = train.Trainer.answer_rows(
        SimpleNamespace(processing_class=tokenizer), batch, ["Sum."],
        torch.tensor([question + untrained]), torch.tensor([question + trained + [tokenizer.eos_token_id]]),
    )  # fmt: skip
    words = {"prompt": "def add(a, b):", "reference": "Sum.", "untrained": "Nothing.", "completion": "Add them."}
    assert rows == [words]


def test_the_defaults_are_those_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [write(tmp_path / "train.py", "")])
    write(tmp_path / "train.args", "--freeze_a true")  # Hugging Face's parser would read it
    _, training, base = parse(["--model_name_or_path", "starter/model", "--dataset_name", "starter/data"])
    assert (base.load_in_4bit, base.use_bnb_nested_quant, base.lora_dropout) == (True, True, 0)
    assert (training.eval_on_start, training.eval_strategy, training.save_strategy) == (True, "no", "no")
    assert (training.freeze_a, training.bf16) == (False, torch.cuda.is_available())


@pytest.mark.parametrize(
    "flags",
    [["--max_steps=-1", "--num_train_epochs=1"], ["--max_steps=1", "--warmup_steps=0"], ["--loss_type=dft"],
     ["--max_steps=1", "--lr_scheduler_type=constant"]],
)  # fmt: skip
def test_what_can_be_trained_is_not_refused(flags):
    parse([*STARTER, *flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cpu_computes_in_float32():
    assert parse(STARTER)[2].dtype == "float32"


@pytest.mark.slow
def test_evaluation_is_the_mean_over_answer_tokens(tmp_path):
    subject = trainer(tmp_path)
    metrics = subject.evaluate()
    lengths = list(map(len, subject.eval_dataset["input_ids"]))
    assert lengths == sorted(lengths, reverse=True)  # the least padding
    assert subject.example_losses["module"] == list(subject.eval_dataset["module"])
    total = count = right = 0
    for row, nll, tokens in zip(
        subject.eval_dataset, subject.example_losses["nll"][0], subject.example_losses["tokens"], strict=True
    ):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            scores = subject.model(input_ids=ids.to(subject.model.device)).logits[0, :-1].log_softmax(-1).cpu()
        answer = labels[1:] != -100
        expected = -scores[answer, labels[1:][answer]].sum().item()
        assert nll == pytest.approx(expected, abs=2e-3)
        assert tokens == answer.sum().item()
        total, count = total + expected, count + tokens
        right += (scores.argmax(-1) == labels[1:])[answer].sum().item()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / count) and 0 < right < count
    assert metrics["eval_loss"] == pytest.approx(total / count, abs=1e-4)
    assert metrics["eval_update_ratio"] == 0


def adapter(a: torch.Tensor, b: torch.Tensor, scaling: float) -> LoraLayer:
    layer = LoraLayer(torch.nn.Linear(a.shape[1], len(b)))
    layer.lora_A["default"], layer.lora_B["default"] = torch.nn.Linear(*a.mT.shape), torch.nn.Linear(*b.mT.shape)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    layer.scaling["default"] = scaling
    return layer


SPECTRA = {
    "random": lambda rank: torch.randn(rank).abs() + 0.1,
    "equal": torch.ones,
    "nearly equal": lambda rank: 1 - 1e-6 * torch.arange(rank),
    "of lower rank": lambda rank: (torch.arange(rank) < (rank + 1) // 2).float(),
    "one far above": lambda rank: 1 + 29 * (torch.arange(rank) == 0),
    "vanishing": lambda rank: 0.7 ** torch.arange(rank),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.sampled_from([1, 2, 16, 64]), scale=st.sampled_from([1e-15, 1.0, 1e12]))
def test_update_size_equals_that_of_the_full_matrix(spectrum, seed, rank, scale):
    torch.manual_seed(seed)
    adapters, squares = {}, []
    for index in range(3):
        turn, left = (torch.linalg.qr(torch.randn(96, rank).double())[0].float() for _ in range(2))
        a, b = torch.randn(rank, rank) @ turn.mT / 8, scale * left * SPECTRA[spectrum](rank)
        if spectrum != "random":
            a = turn.mT
        adapters[str(index)] = adapter(a, b, 0.5 + index)
        values = torch.linalg.svdvals((0.5 + index) * b.double() @ a.double()).square()
        squares.append([float(values.sum()), float(values[0])])
    found = train.update_squares(train.adapter_grams(adapters))
    assert found.tolist() == [pytest.approx(pair, rel=2e-6, abs=0) for pair in squares]
    (sizes,) = train.update_sizes(found[None], 2.0)
    totals, greatest = zip(*squares, strict=True)
    assert sizes["update_ratio"] == pytest.approx(math.sqrt(sum(totals) / 2), rel=2e-6, abs=0)
    ranks = [total / most for total, most in zip(totals, greatest, strict=True)]
    assert sizes["stable_rank"] == pytest.approx(sum(ranks) / 3, rel=2e-6)


def test_matrices_that_have_not_moved_have_no_stable_rank():
    grams = torch.eye(2).repeat(2, 2, 2, 1, 1)
    grams[0, :, 1], grams[1, 0, 1] = 0, 0
    none, one = train.update_sizes(train.update_squares(grams), 8.0)
    assert none == {"update_ratio": 0.0}
    assert one == pytest.approx({"update_ratio": 0.5, "stable_rank": 2.0})


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_be_beyond_single_precision(scale):
    grams = scale * torch.eye(2).repeat(2, 1, 1)
    assert train.update_squares(grams).tolist() == pytest.approx([2 * scale**2, scale**2], rel=1e-6, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_leaves_the_others_their_size(value):
    grams = torch.eye(2).repeat(3, 1, 2, 1, 1)  # of ΔW with two singular values of 1
    grams[1, 0, 1, 0, 0] = value
    first, second, third = train.update_sizes(train.update_squares(grams), 8.0)
    assert first == third == pytest.approx({"update_ratio": 0.5, "stable_rank": 2.0})
    assert all(map(math.isnan, second.values()))
    assert train.update_sizes(torch.zeros(1, 2, 2, 2, 2), 8.0) == [{"update_ratio": 0.0}]  # as at step 0


@given(st.integers(1, 100_000))
def test_evaluation_steps_are_dense_early_and_hold_both_ends(max_steps):
    steps = train.evaluation_steps(max_steps)
    assert {0, max_steps} <= steps <= set(range(max_steps + 1))
    assert len(steps) <= 25
    if max_steps >= 100:
        for percent in (
            1,
            2,
            4,
            8,
            *range(10, 100, 5),
        ):  # in integers; half a step may go either way
            assert min(abs(100 * step - percent * max_steps) for step in steps) <= 50


def test_sweep_keys_are_flags_and_rates_are_floats():
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    rates = sweep["parameters"]["learning_rate"]["values"]
    assert [type(rate) for rate in rates] == [float] * 4
    for recipe in set(Path("recipes").glob("*.yaml")) - {Path("recipes/guides.yaml")}:  # that one is a table
        keys = set(yaml.safe_load(recipe.read_text())) | set(sweep["parameters"])
        flags = [f"--{key}=1" for key in sweep["parameters"]]
        gpu_only = yaml.safe_load(recipe.read_text()).get("bf16")
        if gpu_only and not torch.cuda.is_available():
            with pytest.raises(InputError, match="needs a GPU"):
                parse(["--config", str(recipe), *flags])
        else:
            data, training, base = parse(["--config", str(recipe), *flags])
            assert keys <= set(vars(data)) | set(vars(training)) | set(vars(base))
    assert sweep["command"][4] == "recipes/starter.yaml"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*STARTER, "--lora_rank", "8"], "unknown key 'lora_rank'"),
        ([*STARTER, "--help"], "unknown key 'help'"),
        ([*STARTER, "--use_peft", "false"], "use_peft: False is not possible here, use true"),
        ([*STARTER, "{recipe with loss_type: mse}"], "loss_type: mse: choose from nll, dft"),
        ([*STARTER, "--learning_rat=1"], "did you mean 'learning_rate'"),
        (["{recipe with lora_rank: 8}"], "unknown key 'lora_rank'; did you mean"),
        (["{recipe with env: {WANDB_API_KEY: x}}"], "remove the block env"),
        (["{recipe with - 1}"], "expected `key: value`"),
        (["--config", "no-such-recipe.yaml"], "no-such-recipe.yaml: .*No such file"),
        (["--learning_rate", "1.0e-4"], "model_name_or_path and dataset_name are needed"),
        ([*STARTER, "--packing", "true"], "packing: True is not possible here, use false"),
        ([*STARTER, "--fp16", "true"], "fp16: True is not possible here|At most one of fp16 and bf16"),  # bf16 on a GPU
        ([*STARTER, "--logging_steps", "10"], "logging_steps: 10 is not possible here, use 1"),
        ([*STARTER, "--trust_remote_code", "true"], "trust_remote_code"),
        ([*STARTER, "--load_in_8bit", "true"], "8 bit and 4 bit"),
        ([*STARTER, "--max_steps", "1"], "max_steps: 1 ends in the warm-up, before learning_rate is reached"),
        ([*STARTER, "--warmup_steps", "100"], "max_steps: 100 ends in the warm-up"),
        ([*STARTER, "--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 194}'],
         "in 100 steps the rate comes to 0.666667 of learning_rate, and not to it"),
        ([*STARTER, "--max_steps", "two"], "argument --max_steps.*invalid int value: 'two'"),
        ([*STARTER, "--logging_nan_inf_filter"], "logging_nan_inf_filter: True is not possible here, use false"),
        ([*STARTER, "--weight_decay", "nan"], "weight_decay: nan is not a finite number"),
        ([*STARTER, "left over"], "left over"),
        ([*STARTER, "{recipe with learning_rate: [1.0e-4, 2.0e-4]}"], "learning_rate: .* is no number; .*sweep.yaml"),
        ([*STARTER, "{recipe with max_steps: 100.5}"], "argument --max_steps.*invalid int value: '100.5'"),
        ([*STARTER, "{recipe with max_steps: true}"], "argument --max_steps.*invalid int value: 'True'"),
        ([*STARTER, "{recipe with max_steps:}"], "max_steps: no value; the default is -1"),
        ([*STARTER, "{recipe with lr_scheduler_type: linaer}"], "linaer"),
        pytest.param(
            [*STARTER, "--bf16", "true"], "needs a GPU.*starter.yaml",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message, tmp_path):
    if arguments[-1].startswith("{recipe with "):
        starter = Path(STARTER[1]).read_text() if arguments[:2] == STARTER else ""
        arguments = ["--config", write(tmp_path / "recipe.yaml", starter + arguments[-1][13:-1])]
    with pytest.raises(InputError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"", "the chat template of .*'MODEL' is missing, and rows of turns need one"),
        ("chat_template.jinja", b"{{ messages }}", "the chat template of .*'MODEL' marks no answers; mark them"),
        ("chat_template.jinja", b"{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ messages }}",
         "'MODEL' marks no answer in row 1; put {% generation %} and"),
        ("chat_template.jinja", b"{% generation %}{% if %}", "'MODEL' cannot write row 1: Expected an expression"),
        ("chat_template.jinja", b"{% generation %}{{ messages[9].content }}{% endgeneration %}",
         "'MODEL' cannot write row 1: list object has no element 9; give rows that it can, or another chat_template"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "'MODEL': .*header"),
        ("model.safetensors", b"half of it", "'MODEL': .*not fully covered"),
        ("tokenizer.json", b"{", "'MODEL': .*"),
        ("config.json", b"{", "'MODEL': .*config.json"),
        ("config.json", b'{"model_type": "nonesuch"}', "'MODEL': .*nonesuch"),
    ],
)  # fmt: skip
def test_an_unfit_model_is_named_before_a_run_begins(name, content, message, tmp_path):
    model, output = tmp_path / "model", tmp_path / "adapters"
    shutil.copytree("starter/model", model)
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[: len(whole) // 2] if content == b"half of it" else content)
    if not content:
        (model / name).unlink()
    flags = ["--model_name_or_path", str(model), "--dataset_test_split", "test[:8]", "--output_dir", str(output)]
    with pytest.raises(InputError, match=message.replace("MODEL", re.escape(str(model)))) as caught:
        train.read_data(*parse([*STARTER, *flags]))
    assert "\n" not in str(caught.value) and not output.exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages }}", "chat_template_path 'FILE' marks no answers; mark them with {% generation %}"),
        ("", "chat_template_path 'FILE' is missing, and rows of turns need one"),
        (None, "chat_template_path 'FILE': .*; give a .jinja file, or a model whose template to take"),
    ],
)
def test_an_unfit_template_file_is_named_before_a_run_begins(template, message, tmp_path):
    path = tmp_path / "template.jinja"
    if template is not None:
        path.write_text(template)
    flags = ["--chat_template_path", str(path), "--dataset_test_split", "test[:8]", "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match=message.replace("FILE", str(path))) as caught:
        train.read_data(*parse([*STARTER, *flags]))
    assert "\n" not in str(caught.value)


def test_a_model_in_parts_is_whole(tmp_path):
    shutil.copytree("starter/model", model := tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"weight_map": {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    first, second = ({name: tensors[name] for name in list(tensors)[part::2]} for part in (0, 1))
    output = tmp_path / "adapters" / "mine"
    flags = ["--model_name_or_path", str(model), "--dataset_test_split", "test[:8]", "--output_dir", str(output)]
    save_file(first, model / "0.safetensors")
    with pytest.raises(InputError, match=r"'.*/model': .* 1\.safetensors"):
        train.read_data(*parse([*STARTER, *flags]))
    save_file(dict(list(second.items())[1:]), model / "1.safetensors")
    with pytest.raises(InputError, match=rf"1.safetensors lacks {re.escape(next(iter(second)))}, which model.safe"):
        train.read_data(*parse([*STARTER, *flags]))
    save_file(second, model / "1.safetensors")
    for _ in range(2):  # the output's folder may be there already
        train.read_data(*parse([*STARTER, *flags]))
    assert output.is_dir()


def test_of_several_gpus_one_is_to_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="several GPUs are visible: set CUDA_VISIBLE_DEVICES to one"):
        train.read_data(*parse([*STARTER, "--dataset_test_split", "test[:8]", "--output_dir", str(tmp_path)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "said"),
    [(["--dataset_name", "{rows}", "--assistant_only_loss", "false"], "The dataset appears to be vision-related"),
     (["--max_steps", "-1", "--num_train_epochs", "0.01", "--warmup_steps", "2"],
      "num_train_epochs: 0.01, 2 steps, ends in the warm-up")],
)  # fmt: skip
def test_no_run_is_opened_for_what_is_known_only_with_the_data(more, said, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "start_run", lambda *_: pytest.fail("a run was opened"))
    rows, output = tmp_path / "rows.jsonl", tmp_path / "output"
    rows.write_text('{"text": "a", "image": "b"}\n')
    split = "train" if "{rows}" in more else "test[:8]"
    flags = [word.format(rows=rows) for word in more] + ["--dataset_test_split", split, "--output_dir", str(output)]
    with pytest.raises(InputError, match=said):
        train.train(*parse([*STARTER, *flags]), {})
    assert not any(output.iterdir())


@pytest.mark.slow
def test_without_a_key_the_ways_to_have_one_are_named(tmp_path, monkeypatch):
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    data, training, base = parse([*STARTER, "--output_dir", str(tmp_path)])
    train.wandb.teardown()
    with pytest.raises(InputError, match=r"W&B: .*; run `wandb login`, start `python -m local_wandb`"):
        train.start_run(training, data, base, {}, False)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("resumed", "said"), [(True, "allow"), (False, None)])
def test_a_run_that_goes_on_is_resumed_and_no_other(resumed, said, tmp_path, monkeypatch):
    """Begun anew under its id, it would lose the rows that it has; `wandb agent` says so itself."""
    data, training, base = parse([*STARTER, "--output_dir", str(tmp_path)])
    data.dataset_name = "acme/" + 80 * "x"  # W&B takes 64 characters
    if resumed:
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    with train.start_run(training, data, base, {"learning_rate": 2e-4, "seed": 0}, resumed, id="own") as run:
        assert run.settings.resume == said and run.project == ("mine" if resumed else train.PROJECT)
        assert (run.name, run.group) == ("learning_rate=0.0002 seed=0", "learning_rate=2e-05")
        assert set(run.tags) == {"model", 64 * "x"}


def test_a_watch_times_the_steps_and_stops_what_is_no_longer_finite(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    state, control, config = SimpleNamespace(max_steps=100), SimpleNamespace(should_training_stop=False), {}
    config = SimpleNamespace(update=lambda planned, allow_val_change: config.__dict__.update(planned))
    watch = train.Watch(SimpleNamespace(config=config, summary={}))
    watch.on_train_begin(SimpleNamespace(get_warmup_steps=lambda steps: steps // 4), state, control)
    assert (config.max_steps, config.warmup_steps) == (100, 25)
    for state.global_step, evaluated in ((2, True), (3, False)):
        watch.on_step_begin(None, state, control)
        watch.on_step_end(None, state, control)
        assert control.should_evaluate == evaluated
    assert watch.seconds == 2.0 + 3.0
    for logs in ({"loss": 1.0, "learning_rate": 0.2, "num_tokens": 5.0}, {"learning_rate": 0.1}, {"eval_loss": 1.0}):
        watch.on_log(None, state, control, logs)
    assert (watch.peak_learning_rate, watch.tokens) == (0.2, 5.0)
    assert watch.diverged_at_step is None and not control.should_training_stop
    for state.global_step, key in ((4, "grad_norm"), (5, "eval_loss")):
        watch.on_log(None, state, control, {"loss": 1.0, key: math.inf})
        assert watch.diverged_at_step == watch.run.summary["diverged_at_step"] == 4 and control.should_training_stop


@pytest.mark.parametrize(("said", "logged"), [(None, 1), ("checkpoint", 1), ("false", 0), ("False", 0), ("0", 0)])
def test_the_adapter_is_logged_unless_that_is_not_wanted(said, logged, tmp_path, monkeypatch):
    if said:
        monkeypatch.setenv("WANDB_LOG_MODEL", said)
    artifacts = []
    run = SimpleNamespace(id="own", log_artifact=lambda artifact, aliases: artifacts.append((artifact.name, aliases)))
    train.log_adapter(run, {}, write(tmp_path / "adapter.txt", "") and str(tmp_path))
    assert artifacts == [("model-own", ["final_model"])] * logged


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(InputError("no"), "2", "train.py: no\n"), (OutOfMemory("no"), "1", "OutOfMemoryError: no\n")],
)
def test_what_ends_a_run_is_a_line_and_a_code(error, code, line, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train.interruption, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *STARTER])
    with pytest.raises(SystemExit, match=code):
        train.main()
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_one_line_and_exit_code_2():
    command = [sys.executable, "train.py", *STARTER, "--model_name_or_path", "no-such/model"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py:")]
    assert "no-such/model" in line and "local directory or a Hub name" in line


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_out_of_memory_is_a_row_with_what_would_fit(tmp_path, monkeypatch):
    """As PyTorch says it on a GPU: three rows of four do not fit, nor four."""
    compute = train.Trainer.compute_loss

    def limited(trainer, model, inputs, *arguments, **keywords):
        if len(inputs["input_ids"]) > 2:
            said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which"
            raise torch.OutOfMemoryError(f"{said} 1.20 GiB is free. Including non-PyTorch memory, this process has 78")
        return compute(trainer, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(train.Trainer, "compute_loss", limited)
    flags = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "adapters")]
    with pytest.raises(OutOfMemory) as caught:
        train.train(*parse([*STARTER, *flags, "--dataset_test_split", "test[:8]"]), {"learning_rate": 2e-4})
    train.wandb.teardown()
    fits = "per_device_train_batch_size: 2 fits, with gradient_accumulation_steps: 2"
    free = "GPU 0 has a total capacity of 79.1 GiB of which 1.20 GiB is free"
    assert str(caught.value) == f"Tried to allocate 2.00 GiB. {free}; {fits}"
    (run,) = tmp_path.glob("wandb/offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    assert fits in subprocess.check_output(inspect, text=True)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_run_is_not_lost_for_its_sample_answers(tmp_path, capsys):
    shutil.copytree("starter/model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"num_beams": 0}')
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "adapters")]
    flags += ["--max_steps", "1", "--warmup_steps", "0", "--dataset_test_split", "test[:8]"]
    train.train(*parse([*STARTER, *flags]), {"learning_rate": 2e-4})
    assert "no sample answers: ZeroDivisionError: integer division" in capsys.readouterr().out
    assert list(tmp_path.glob("adapters/*/adapter_model.safetensors"))
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert "eval_nll.json" in os.listdir(run / "files") and "generations.json" not in os.listdir(run / "files")
    train.wandb.teardown()
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    assert re.search(r"no_answers.*ZeroDivisionError: integer", subprocess.check_output(inspect, text=True))


@pytest.mark.parametrize(
    ("training", "most", "said"),
    [(True, 2, "per_device_train_batch_size: 2 fits, with gradient_accumulation_steps: 6"),
     (True, 1, "per_device_train_batch_size: 1 fits, with gradient_accumulation_steps: 10"),
     (False, 3, "per_device_eval_batch_size: 3 fits"),
     (False, 0, "not even one row fits; lower max_length or set gradient_checkpointing: true")],
)  # fmt: skip
def test_what_fits_in_memory_is_tried_on_the_longest_rows(training, most, said):
    """Of rows of 1 to 8 tokens; a step of more than `most` of them takes too much memory."""
    tried = []

    def take(rows) -> None:
        tried.append(sorted(len(row["input_ids"]) for row in rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError

    rows = Dataset.from_dict({"input_ids": [[0] * length for length in (3, 8, 1, 5, 2, 7, 4, 6)], "labels": [[0]] * 8})
    sizes = {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 6, "gradient_accumulation_steps": 2}
    subject = SimpleNamespace(
        args=SimpleNamespace(**sizes, gradient_checkpointing=False),
        model=SimpleNamespace(training=training, zero_grad=lambda: None),
        train_dataset=rows, eval_dataset=rows, data_collator=list, _prepare_inputs=lambda batch: batch,
        compute_loss=lambda model, batch: SimpleNamespace(backward=lambda: take(batch)),
        prediction_step=lambda model, batch, loss_only: take(batch),
    )  # fmt: skip
    assert fitting(subject) == said
    assert tried == [list(range(9 - len(lengths), 9)) for lengths in tried]


@pytest.mark.slow
def test_sigterm_keeps_every_row_and_exits_with_143(tmp_path):
    flags = ["--max_steps", "500", "--per_device_train_batch_size", "1", "--eval_on_start", "false"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "train.py", *STARTER, *flags, "--output_dir", str(tmp_path / "adapters")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        logged = 0
        while logged < 3:
            logged += "'loss'" in process.stdout.readline()
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    (run,) = tmp_path.glob("wandb/offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    records = [json.loads(line) for line in subprocess.check_output(inspect, env=environment, text=True).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert len([row for row in rows if "train/loss" in row]) >= 3
    assert records[-1]["type"] == "exit"


def test_a_server_that_is_away_is_waited_for(monkeypatch, capsys):
    def answer(*failures: Exception):
        left = list(failures)

        def ask() -> str:
            if left:
                raise left.pop(0)
            return "it is back"

        return train.patiently(ask)

    monkeypatch.setattr("train.PAUSE", 0)
    assert answer(WandbApiFailedError("no answer"), AuthenticationError("no answer")) == "it is back"
    assert capsys.readouterr().out == 2 * "the server does not answer: no answer; another try follows\n"
    monkeypatch.setattr("train.PATIENCE", -1)
    with pytest.raises(InputError, match="the server does not answer: no answer"):
        answer(WandbApiFailedError("no answer"))


def test_a_rate_that_yaml_reads_as_a_string_is_named(tmp_path, monkeypatch):
    parameters = write(tmp_path / "parameters.yaml", "wandb_version: 1\nlearning_rate:\n  value: 1e-5\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", parameters)
    _, training, _ = parse([*STARTER, "--learning_rate=1e-5"])
    with pytest.raises(InputError, match=r"learning_rate: 1e-5 is a string to YAML; write 1\.0e-05"):
        swept_values(training)
    assert isinstance(yaml.safe_load("1.0e-05"), float)
    write(Path(parameters), "wandb_version: 1\nlearning_rate:\n  value: 1.0e-5\nguide:\n  value: qlora\n")
    assert swept_values(training) == {"learning_rate": 1e-5, "guide": "qlora"}
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH")
    assert swept_values(training) == {"learning_rate": 1e-5}
    assert swept_values(training, {"seed": {"value": 1}}) == {"seed": 1}


@pytest.mark.parametrize("value", [1.5, math.nan, math.inf, -math.inf])
def test_json_numbers_are_strict_and_come_back(value):
    back = float(json.loads(json.dumps(train.json_number(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert train.json_number(1 / 3) == 0.33333
