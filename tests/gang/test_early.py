"""gang/early.py: what runs, or a gang, would refuse is known before their sweep exists."""

import io
import json
import os
import re
import shutil
import weakref
from pathlib import Path

import pytest
import yaml

import sweep
from gang import early
from inputs import InputError

ROOT = Path(__file__).resolve().parents[2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


def change(key: str, value) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def name_a_token() -> None:
    """The tokenizer gets a token that the model's embeddings lack, and test rows have it."""
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 4096, "content": "<new>"})
    path.write_text(json.dumps(content))
    Path("test.jsonl").write_text(Path("rows.jsonl").read_text().replace("2 + 3?", "<new>"))


@pytest.mark.parametrize(
    ("spoil", "recipe", "parameters", "message"),
    [
        (None, {}, {}, None),
        (None, {}, {"lora_r": [8, 16], "dataset_name": ["rows.jsonl"]}, None),
        (None, {"max_step": 4}, {}, "unknown key 'max_step'; did you mean 'max_steps'"),
        (None, {}, {"lr": [1.0e-4]}, "unknown key 'lr'"),
        (None, {"packing": True}, {}, "packing: True is not possible here, use false"),
        (None, {"eval_packing": True}, {}, "eval_packing: True is not possible here, use false"),
        (None, {"dataloader_drop_last": True}, {}, "dataloader_drop_last: True is not possible here, use false"),
        (None, {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, {},
         "load_best_model_at_end: True is not possible here, use false"),
        (None, {"metric_for_best_model": "foo"}, {}, "metric_for_best_model: foo is not possible here, use none"),
        (None, {"model_init_kwargs": {"revision": "x"}}, {}, "model_init_kwargs: revision is set by model_revision"),
        (None, {"logging_strategy": "epoch"}, {}, "logging_strategy: epoch is not possible here, use steps"),
        (None, {"warmup_steps": 9}, {"max_steps": [10, 9]}, "max_steps: 9 ends in the warm-up"),
        (None, {}, {"lr_scheduler_type": ["cosine", "linaer"]}, "linaer"),
        (None, {}, {"guide": ["qlora", "nonesuch"]}, "guide: nonesuch: recipes/guides.yaml has"),
        (None, {"max_length": 12}, {}, "^train: no row has an answer within max_length: 12$"),
        (None, {}, {"max_length": [64, 12]}, "train: no row has an answer within max_length: 12"),
        (None, {"lora_target_modules": ["v_proj", "proj"]}, {}, "no linear layer is named proj; there are down_proj, "),
        (None, {"lora_target_modules": ["embed_tokens"]}, {}, "one name alone is a regular expression for a layer's"),
        (None, {"lora_target_modules": ".*embed_tokens"}, {}, "Embedding of torch.float32 is no linear layer"),
        (None, {"lora_target_modules": "(q_proj"}, {}, "lora_target_modules: missing ., unterminated subpattern"),
        (None, {"lora_target_modules": ["q_proj", "lm_head"]}, {}, "TRL's loss passes over an adapter of lm_head"),
        (None, {"eos_token": "</x>"}, {}, "eos_token: '</x>' is not in the vocabulary of ./model"),
        pytest.param(None, {}, {"pad_token": ["<x>"]}, "pad_token: '<x>' is not in the vocabulary of ./model",
                     marks=pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")),
        (None, {"loss_type": "mse"}, {}, "loss_type: mse: choose from nll, dft"),
        (None, {"adapter_dtype": "bf16"}, {}, "adapter_dtype: bf16: choose from float32, bfloat16, bfloat16_weights"),
        (None, {"dtype": "auto"}, {}, "dtype: auto is not possible here, use one of bfloat16, float16, float32"),
        (None, {"dataset_test_split": None}, {}, "dataset_test_split: no value; the default is test"),
        (None, {"accelerator_config": {"x": 1}}, {}, "unexpected keyword argument 'x'"),
        (None, {"adam_beta2": 1.0}, {}, "optim: adamw_torch_fused: Invalid beta parameter at index 1: 1.0"),
        (None, {"lr_scheduler_type": "warmup_stable_decay"}, {}, "lr_scheduler_kwargs: null: .*'num_decay_steps'"),
        (None, {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}, {}, None),
        (None, {"attn_implementation": "flash"}, {}, "attn_implementation: flash: .*flash.* is not supported"),
        (None, {"attn_implementation": "eager"}, {}, None),
        (None, {"report_to": "none"}, {}, "report_to: the report is made of what W&B gets"),
        (None, {"report_to": "swanlab"}, {}, "report_to: swanlab is not installed"),
        (None, {}, {"learning_rate": ["0.001"]}, "learning_rate: 0.001 is a string to YAML; write 1.0e-03"),
        (None, {}, {"lr": {"min": 0.1, "max": 0.2}}, "unknown key 'lr'"),
        (None, {}, {"learning_rate": {"min": 0, "max": 0.1}}, None),
        (None, {}, {"learning_rate": {"min": -0.1, "max": 0.1}}, "learning_rate: -0.0998 cannot be"),
        (None, {}, {"lora_r": {"min": 0, "max": 8}}, "lora_r: 0 cannot be"),
        (None, {}, {"lora_r": {"min": 2.5, "max": 8}}, "lora-r: invalid int value: '2.5055'"),
        (None, {}, {"lora_r": {"distribution": "q_uniform", "min": 4, "max": 8}}, "lora-r: invalid int value: '4.0'"),
        (None, {}, {"max_steps": [10, None]}, "max-steps: invalid int value: 'None'"),
        (None, {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0e-4}},
         {"learning_rate": [1.0e-3, 1.0e-5]}, "{.min_lr.: 0.0001}: the rate would go above learning_rate: 1e-05"),
        (None, {}, {"optim": ["adamw_torch", "sgd"]}, "optim: sgd; a gang has only"),
        (None, {}, {"bnb_4bit_quant_storage": ["uint8", "int3"]}, "`bnb_4bit_quant_storage` must be"),
        (lambda: (shutil.copytree("model", "whole"), change("intermediate_size", 64)), {},
         {"model_name_or_path": ["./whole", "./model"]}, "no run could begin: .*size of tensor.*path=./model$"),
        (None, {"lora_target_modules": ".*[qk]_proj"}, {}, None),
        (None, {}, {"seed": [2**32]}, "seed: 4294967296 cannot be; give a whole number from 0 to 4294967295"),
        (None, {"data_seed": -1}, {}, "data_seed: -1 cannot be"),
        (None, {"optim": "sgd"}, {}, "optim: sgd; a gang has only .*; use wandb agent .experiment"),
        (None, {}, {"optim": ["adamw_torch", "sgd"]}, "optim: sgd; a gang has only .*; use wandb agent .experiment"),
        (None, {}, {"bnb_4bit_quant_storage": ["uint8", "int3"]}, "no run could begin: .*_4bit_quant_storage=int3"),
        (lambda: Path("rows.jsonl").write_text("{"), {}, {}, "rows.jsonl, line 1, column 2: Expecting property"),
        (None, {"assistant_only_loss": False}, {"dataset_name": ["rows.jsonl", "more.jsonl"]},
         "more.jsonl, train: row 1: 5 stands where text"),
        (lambda: Path("model/chat_template.jinja").write_text("{{ 1 / 0 }}"), {"assistant_only_loss": False}, {},
         "the chat template of model_name_or_path './model' cannot write row 1: division by zero"),
        (lambda: cut(Path("model/model.safetensors")), {}, {}, "model_name_or_path './model': .*not fully covered"),
        (lambda: Path("model/config.json").write_text('{"model_type": "x"}'), {}, {}, "model_name_or_path './model': "),
        (lambda: change("architectures", None), {}, {}, "says architectures: None, of which transformers .* has none"),
        (lambda: change("architectures", ["Yi"]), {}, {}, "says architectures: .'Yi'., of which transformers"),
        (lambda: change("architectures", ["LlamaModel"]), {}, {}, "is a LlamaModel; give one that writes text"),
        (lambda: Path("model/tokenizer_config.json").write_text("{}"), {}, {}, "says no pad_token and no eos_token"),
        (lambda: Path("file").touch(), {"output_dir": "file/x"}, {}, "output_dir file/x: Not a directory; choose a wr"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_is_one_line(spoil, recipe, parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect(message, spoil, recipe, parameters, gang=True)


def expect(message: str | None, spoil, recipe: dict, parameters: dict, gang: bool) -> None:
    """In the current folder, the check of such a sweep refuses it with this message, or finds nothing."""
    shutil.copytree(ROOT / "starter/model", "model")
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    Path("rows.jsonl").write_text(json.dumps({"messages": turns}))
    Path("more.jsonl").write_text('{"text": 5}\n')
    fixed = {"model_name_or_path": "./model", "dataset_name": "rows.jsonl", "dataset_test_split": "train"}
    fixed |= {"assistant_only_loss": True, "max_steps": 10} | recipe
    Path("recipe.yaml").write_text(yaml.safe_dump(fixed))
    if spoil:
        spoil()
    config = {
        "program": "train.py",
        "method": "grid",
        "command": ["python", "${program}", "--config", "recipe.yaml", "${args}"],
        "parameters": {
            name: {"values": given} if isinstance(given, list) else given
            for name, given in ({"seed": [0, 1]} | parameters).items()
        },
    }
    shared, found = None, None
    try:
        shared = early.check(config, sweep.calls(config), gang)
    except InputError as error:
        found = str(error)
    assert (found or "").count("\n") == 0
    assert found is None if message is None else re.search(message, found), found
    assert (shared is None) == (message is not None or not gang)
    assert not Path("outputs/adapters").exists() or not list(Path("outputs/adapters").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("gang", [True, False])
@pytest.mark.parametrize(
    ("spoil", "recipe", "message"),
    [
        (None, {}, None),
        (None, {"max_steps": -1, "num_train_epochs": 3, "warmup_steps": 3},
         "num_train_epochs: 3, 3 steps, ends in the warm-up, before learning_rate is reached"),
        (None, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "no run could begin: .*: python train.py --config"),
        (None, {"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers > 0"),
        (None, {"pad_to_multiple_of": 0}, "ZeroDivisionError"),
        (None, {"model_init_kwargs": {"atn_implementation": "eager"}}, "'atn_implementation'"),
        (None, {"bnb_4bit_quant_storage": "int3"}, "`bnb_4bit_quant_storage` must be"),
        (None, {"lora_modules_to_save": ["wte"]}, "no layer of ./model is named wte|a gang has only None"),
        (None, {"fsdp": "full_shard"}, "fsdp only works in distributed"),
        (lambda: change("intermediate_size", 64), {}, "size of (the )?tensor"),
        (lambda: change("tie_word_embeddings", False), {}, "'./model': no file has lm_head.weight; copy all weights"),
        (name_a_token, {"dataset_test_split": "test.jsonl"}, "test: token 4096, '<new>', is beyond the model's 4096 "),
        (lambda: Path("rows.jsonl").write_text('{"text": "2"}'), {"assistant_only_loss": False, "max_length": 1},
         "^train: no row has an answer within max_length: 1$"),
    ],
)  # fmt: skip
def test_the_first_run_is_rehearsed(spoil, recipe, message, gang, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect(message, spoil, recipe, {}, gang)


def test_a_trainer_is_freed_before_the_next_one_is_built(monkeypatch):
    class Trainer:
        pass

    def rehearse(first, arguments) -> None:
        assert all(trainer() is None for trainer in left)
        trainer = Trainer()
        trainer.calls_back = trainer
        left.append(weakref.ref(trainer))

    left: list[weakref.ref] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(early, "rehearse", rehearse)
    calls = [["--config", "recipes/starter.yaml", f"--max_steps={steps}"] for steps in (20, 30)]
    assert early.check({"parameters": {}}, calls, gang=False) is None
    assert [trainer() for trainer in left] == [None, None]


@pytest.mark.parametrize("started", [True, False])
def test_one_line_is_answered_and_the_next_one_says_what_to_train(started, tmp_path, monkeypatch, capfd):
    order = {"environment": {"NAMED": "here"}, "log": str(tmp_path / "log"), "words": ["a/b/c", "--size", "2"]}
    asked = {"sweep": {}, "calls": [], "gang": True}
    lines = [json.dumps(asked), *([json.dumps(order)] if started else [])]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    def check(**words) -> str:
        os.write(1, b"of a library ")
        if not started:
            raise InputError("the one line")
        return f"loaded for {words}"

    monkeypatch.setattr(early, "check", check)
    monkeypatch.setenv("NAMED", "elsewhere")
    if started:
        assert early.words() == (order["words"], f"loaded for {asked}") and os.environ["NAMED"] == "here"
        os.write(1, b"a row ")
        os.write(2, b"a warning")
        assert Path(order["log"]).read_text() == "a row a warning"
    else:
        with pytest.raises(SystemExit, match="0"):
            early.words()
    assert capfd.readouterr() == ("null\n" if started else '"the one line"\n', "of a library ")
