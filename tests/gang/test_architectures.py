"""Each architecture, tiny and random, is trained alike by train.py and by a gang, or refused by name."""

import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import trl
from transformers.models.auto import modeling_auto

import train
from data import load_split
from gang.fit import unfit
from gang.packing import packable
from gang.step import Step, rows_to_score, together
from inputs import InputError
from model import check_model, load_model
from settings import parse

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORDS = ["def", "return", "self", "list", "of", "the", "file", "name", "path", "value", "index", "open", "read"]
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 8}  # rows are longer
GEMMA = WINDOW | {"query_pre_attn_scalar": 16}
DELTA_NET = {"layer_types": ["linear_attention", "full_attention"]} | dict.fromkeys(
    ("linear_key_head_dim", "linear_value_head_dim"), 16
)  # fmt: skip
DELTA_NET |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
EYES = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14}
# model_type and what TINY does not say of it; None takes a key of TINY away.
ALIKE = {
    "Llama": ("llama", {}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3.5": ("qwen3_5_text", DELTA_NET),
    "Qwen3.5 with its image encoder": (
        "qwen3_5",
        {
            "text_config": TINY | DELTA_NET,
            "vision_config": EYES | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
        },
    ),
    "Mistral": ("mistral", WINDOW),
    "Gemma 2": ("gemma2", GEMMA | {"final_logit_softcapping": 3.0}),  # low enough to bend these logits
    "Gemma 3": ("gemma3_text", GEMMA),
    "Gemma 3 with its image encoder": (
        "gemma3",
        {
            "text_config": TINY | GEMMA | {"attention_dropout": 0.1},
            "vision_config": EYES | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
            "mm_tokens_per_image": 4,
        },
    ),
    "Phi-3": ("phi3", {}),
    "Phi-2": ("phi", {}),  # a bias in the head
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "SmolLM3": ("smollm3", {}),
    "Granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.5}),
    "Cohere": ("cohere", {"logit_scale": 0.5}),
    "GLM-4": ("glm4", {}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "GPT-NeoX": ("gpt_neox", {"hidden_dropout": 0.1}),
    "GPT-2": ("gpt2", {}),  # dropout 0.1 by default, as OPT
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "Falcon": ("falcon", {"head_dim": None}),
}
EXPERTS = {
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# TRL's copies of the templates that these have; TRL marks the answers in them. The others get the starter's.
TEMPLATES = {
    "llama": "llama3", "qwen2": "qwen2_5", "qwen3": "qwen3", "qwen3_5_text": "qwen3_5_think",
    "qwen3_5": "qwen3_5_nothink", "gemma2": "gemma", "gemma3_text": "gemma3", "gemma3": "gemma3", "phi3": "phi3",
    "cohere": "cohere", "glm4": "glm4moe", "lfm2": "lfm2", "qwen3_moe": "qwen3", "gpt_oss": "gptoss",
}  # fmt: skip
ATTENTION = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_documentation_names_them():
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    names = {part for name in ALIKE | EXPERTS for part in name.split(", ")}
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)} == set()


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def configure(tmp_path: Path, model_type: str, changes: dict, *more: str) -> tuple:
    """The tiny model, saved, and train.py's configuration for three steps of it on rows of unlike lengths."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    kind = transformers.CONFIG_MAPPING[model_type]
    named = changes if kind.sub_configs else {key: x for key, x in (TINY | changes).items() if x is not None}
    torch.manual_seed(0)
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model, folder = getattr(transformers, names[model_type])(kind(**named)), tmp_path / "model"
    for parameter in model.parameters():  # no bias stays 0, no norm 1
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"starter/model/{name}", folder)
    if name := TEMPLATES.get(model_type):
        shutil.copy(Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja", folder / "chat_template.jinja")
    chance = random.Random(0)
    lengths = [(chance.randint(3, 40), chance.randint(2, 20)) for _ in range(6)]
    rows = [
        {"messages": [{"role": role, "content": " ".join(chance.choices(WORDS, k=length))} for role, length in
                      zip(("user", "assistant"), pair, strict=True)]} for pair in lengths
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "model_name_or_path": folder, "dataset_name": tmp_path / "rows.jsonl", "dataset_test_split": "train[:3]",
        "assistant_only_loss": True, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "warmup_steps": 0, "gradient_checkpointing": False, "report_to": "none", "output_dir": tmp_path / "adapters",
        "disable_tqdm": True, "dtype": "float32", "bf16": False,
    }  # fmt: skip
    return parse([word for key, value in flags.items() for word in (f"--{key}", str(value))] + list(more))


class Recorder(train.Trainer):
    """train.py's trainer, which keeps its batches."""

    def training_step(self, model, inputs, items=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, items)


def both(configuration: tuple) -> tuple[list, list]:
    """Loss, gradient norm, entropy and share of right tokens of each step, and the examples' NLLs after them:
    train.py's, and those of a gang whose first member is the same run and whose second sees other batches."""
    data, training, base = configuration
    rows = [load_split(data, split) for split in (data.dataset_train_split, data.dataset_test_split)]
    trainer = Recorder(base, training, *rows)
    trainer.batches = []
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in weights]
    trainer.train()
    assert all(layer.lora_B["default"].weight.any() for layer in trainer.lora_layers.values())  # no adapter is bypassed
    trainer.evaluate()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    solo = [[row[key] for key in keys] for row in trainer.state.log_history if "loss" in row]
    nlls = trainer.example_losses["nll"][-1]
    for parameter, value in zip(weights, before, strict=True):
        parameter.data = value
    model, mine = load_model(base, training), []
    packed = packable(model, trainer.train_dataset["input_ids"])
    step = Step(model, [trainer.lora_layers] * 2, training)
    for pair in zip(trainer.batches, reversed(trainer.batches), strict=True):
        items = [float((batch["labels"][:, 1:] != -100).sum()) for batch in pair]
        rates = torch.tensor([training.learning_rate, 5e-3])
        loss, entropy, right, norm = step.train(together(pair, items, 0, 2, packed), rates, True)[0].tolist()
        mine.append([loss, norm, entropy, right])
    examples = list(trainer.eval_dataset.select_columns(["input_ids", "labels"]))
    scores = step.score(rows_to_score(examples, trainer.data_collator, 64, step.device))
    return [*solo, nlls], [*mine, scores[0, :, 0].tolist()]


def assert_alike(configuration: tuple) -> None:
    assert unfit(configuration) is None
    solo, mine = both(configuration)
    assert len(solo) == 4
    for expected, found in zip(solo, mine, strict=True):
        # A GPU's kernels add in another order for two members' rows: GLM-4's entropy was 1.2e-5 apart there.
        assert found == pytest.approx(expected, rel=1e-4 if torch.cuda.is_available() else 1e-5)


@pytest.mark.parametrize("name", ALIKE)
def test_train_py_and_a_gang_train_it_alike(name, tmp_path):
    assert_alike(configure(tmp_path, *ALIKE[name]))


@pytest.mark.parametrize(
    ("name", "flags"),
    [("Llama", ["--load_in_4bit", "false"]), ("Llama", ["--bnb_4bit_quant_type", "fp4"]),
     ("Llama", ["--use_bnb_nested_quant", "false"]), ("GPT-2", ["--load_in_4bit", "false"]),
     ("Falcon", ["--load_in_4bit", "false"])],
)  # fmt: skip
def test_so_do_they_with_other_storage_of_the_base(name, flags, tmp_path):
    assert_alike(configure(tmp_path, *ALIKE[name], *flags))


def test_what_the_base_would_drop_is_kept_and_said(tmp_path, capsys):
    data, training, base = configure(tmp_path, *ALIKE["GPT-2"])
    trainer = train.Trainer(base, training, *[load_split(data, "train[:3]")] * 2)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    assert f"the base model's dropout is off, its noise would blur the comparison: {off}" in capsys.readouterr().out
    assert off.items() <= training.model_init_kwargs.items()
    assert off.items() <= trainer.model.config.to_dict().items()


def test_dropout_that_stays_on_is_refused(tmp_path, monkeypatch):
    _, training, base = configure(tmp_path, *ALIKE["GPT-2"])
    monkeypatch.setattr("model.noise_off", lambda config: {})  # as if its configuration did not have it
    with pytest.raises(InputError, match=r"has dropout 0\.1 in transformer\.drop, which its configuration"):
        load_model(base, training)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_trains_its_attention_in_train_py_alone(name, tmp_path, monkeypatch, capsys):
    data, training, base = configuration = configure(tmp_path, *EXPERTS[name], *ATTENTION)
    assert "model has 4 experts; a gang does not compute the loss of their router" in unfit(configuration)
    trainer = train.Trainer(base, training, *[load_split(data, "train[:3]")] * 2)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert len(trainer.generate_answers()) == 3
    flags = {"model_name_or_path": base.model_name_or_path, "dataset_name": data.dataset_name}
    splits = ["--dataset_test_split", "train"]
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{key}={value}" for key, value in flags.items()), *splits])
    monkeypatch.setattr(train.interruption, "install", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        train.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert "all-linear cannot adapt" in line and "lora_target_modules: [q_proj, k_proj, v_proj, o_proj]" in line


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({}, ["--load_in_4bit", "false", "--load_in_8bit", "true"], "load_in_8bit: True; a gang has only False"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, [], "quantised to 8 bits"),
        ({"rope_parameters": DYNAMIC}, [], "has only up to 256"),
        ({"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 128}}, [], "has only up to 128"),
    ],
)
def test_other_storage_and_positions_are_refused_by_name(changes, flags, reason, tmp_path):
    configuration = configure(tmp_path, "llama", {}, *flags)
    rewrite(tmp_path / "model" / "config.json", changes)
    assert reason in unfit(configuration)
    if "rope_parameters" in changes:
        configuration[1].max_length = int(reason.split()[-1])
        assert unfit(configuration) is None
        configuration[1].max_length = None
        assert reason in unfit(configuration)


@pytest.mark.parametrize("method", ["awq", "mxfp4"])
def test_a_checkpoint_quantised_otherwise_is_refused_by_both(tmp_path, method):
    configuration = configure(tmp_path, "llama", {})
    rewrite(tmp_path / "model" / "config.json", {"quantization_config": {"quant_method": method}})
    with pytest.raises(InputError, match=f"is quantised with {method} already; use a checkpoint in bfloat16"):
        check_model(configuration[2])
    with pytest.raises(InputError, match=f"is quantised with {method}"):
        unfit(configuration)


def rewrite(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
