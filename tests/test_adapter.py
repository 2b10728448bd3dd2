"""A run's adapter: its card loads it as it was trained, and W&B has it as Hugging Face's callback would log it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import adapter
import train
from data import load_split
from settings import parse

ROOT = Path(__file__).parent.parent
SMALL = ["--max_steps", "4", "--warmup_steps", "1", "--per_device_train_batch_size", "4", "--learning_rate", "5.0e-3"]
SPLITS = ["--dataset_train_split", "train[:64]", "--dataset_test_split", "test[:8]"]


def code(card: ModelCard, section: str) -> str:
    return card.text.split(f"## {section}\n")[1].split("```python\n")[1].split("```")[0]


def eval_loss(model, rows) -> float:
    """In nats per answer token, row by row."""
    total = count = 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0, :-1].cpu()
        total += torch.nn.functional.cross_entropy(scores.float(), labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


@pytest.mark.usefixtures("api")
def test_the_card_loads_what_was_trained(server, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it has read the environment already
    trainers, answers = [], []

    class Trainer(train.Trainer):
        def generate_answers(self):
            trainers.append(self)
            answers.extend(super().generate_answers())
            return answers

    monkeypatch.setattr(train, "Trainer", Trainer)
    flags = ["--config", "recipes/starter.yaml", *SMALL, *SPLITS, "--output_dir", str(tmp_path / "adapters")]
    train.train(*parse(flags), {"learning_rate": 5e-3})
    (folder,) = (tmp_path / "adapters").iterdir()
    assert folder.name.startswith("learning_rate-0.005-")
    card = ModelCard.load(folder / "README.md")
    facts, rows = card.data.training, trainers[0].eval_dataset

    names: dict = {}
    exec(code(card, "Load it"), names)
    assert eval_loss(names["model"], rows) == pytest.approx(facts["eval_loss_last"], abs=1e-4)
    assert card.data.eval_results[0].metric_value == facts["eval_loss_last"] < facts["eval_loss_first"] - 0.1
    with names["model"].disable_adapter():
        assert eval_loss(names["model"], rows) == pytest.approx(facts["eval_loss_first"], abs=1e-4)

    question = trainers[0].generation_examples["messages"][0][0]["content"]
    use = code(card, "Use it").replace('"..."', json.dumps(question)).replace("print(", "answer = (")
    exec(use, names)
    assert names["answer"] == answers[0]["completion"]

    plain = type(names["base"]).from_pretrained(facts["base_model"], dtype=facts["dtype"])
    assert abs(eval_loss(names["PeftModel"].from_pretrained(plain, folder), rows) - facts["eval_loss_last"]) > 1e-3
    merged = names["PeftModel"].from_pretrained(names["model"].unload().dequantize(), folder).merge_and_unload()
    assert eval_loss(merged, rows) == pytest.approx(facts["eval_loss_last"], abs=1e-4)

    (run,) = tmp_path.glob("wandb/offline-run-*")
    synced = server.run("wandb", "sync", "--yes", str(run))
    assert synced.returncode == 0, synced.stderr
    summary = wandb.Api().run(f"local/test/{facts['run']}").summary
    assert summary["first_batch_hash"] == trainers[0].first_batch_hash and len(answers) == 5
    tokens = max(row.get("num_tokens", 0) for row in trainers[0].state.log_history)
    assert summary["tokens_per_second"] * summary["train_seconds"] == pytest.approx(tokens)
    assert 0.1 < summary["peak_memory_gib"] < 64
    artifact = wandb.Api().artifact(f"local/test/model-{facts['run']}:latest")
    assert artifact.type == "model" and set(artifact.aliases) == {"latest", "final_model"}
    assert artifact.metadata == facts | {"final_model": True}
    got = load_file(Path(artifact.download(tmp_path / "got"), "adapter_model.safetensors"))
    kept = load_file(folder / "adapter_model.safetensors")
    assert got.keys() == kept.keys() and all(torch.equal(got[name], kept[name]) for name in kept)
    artifact.aliases.append("best")
    artifact.save()
    assert wandb.Api().artifact(f"local/test/model-{facts['run']}:best").version == artifact.version


@pytest.mark.parametrize(
    ("losses", "told"),
    [([], ["nan", "nan", "nan", None]), ([4.4, 3.3333333, 3.9, math.nan], [4.4, "nan", 3.333333, 1])],
)
def test_a_diverged_run_says_so_in_valid_json(losses, told, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--config", "recipes/starter.yaml", *SMALL, "--gradient_accumulation_steps", "3"]
    flags += ["--report_to", "none", "--output_dir", str(tmp_path)]
    data, training, base = parse(flags)
    trainer = train.Trainer(base, training, *[load_split(data, "test[:4]")] * 2)
    trainer.state.log_history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    config = vars(data) | vars(base) | {"data_fingerprint": "0", "versions": {}, "dataset_revision": "main"}
    run = SimpleNamespace(config=config, summary={}, id="abc", sweep_id=None, url=None)
    facts = adapter.save(trainer, run, 1)
    json.dumps(facts, allow_nan=False)
    assert facts["rows_per_step"] == 4 * 3
    assert [facts.get(f"eval_loss_{key}") for key in ("first", "last", "best", "best_step")] == told
    assert not {"base_model_commit", "dataset_commit"} & set(facts)  # a folder has none
    card = ModelCard.load(tmp_path / "README.md")
    assert "diverged at step 1" in card.text and card.data.eval_results is None and "qlora" in card.data.tags
    assert card.data.base_model is None and card.data.datasets is None  # folders are no names on the Hub


@pytest.mark.parametrize(
    ("device", "bits", "told"),
    [("cpu", {"load_in_4bit": True}, True), ("cuda", {"load_in_4bit": True}, False), ("cpu", {}, False)],
)
def test_four_bits_are_loaded_on_a_cpu_as_they_were_trained(device, bits, told):
    settings = SimpleNamespace(output_dir="folder", device=torch.device(device))
    trainer = SimpleNamespace(args=settings, model=SimpleNamespace(get_base_model=dict))
    facts = {"base_model": "starter/model", "dtype": "float32", "quantization": bits}
    assert ("support_avx512bf16_for_cpu" in adapter.loading(trainer, facts)) == told


@given(
    st.dictionaries(st.text(), st.floats() | st.text() | st.lists(st.text())),
    st.from_regex(r"[a-z0-9]{8}", fullmatch=True),
)
def test_a_folders_name_is_valid_on_the_hub_and_ends_in_the_run(swept, run):
    name = adapter.folder_name(swept, run)
    validate_repo_id(name)
    assert name.endswith(run)


def test_a_folders_name_says_what_varies():
    assert adapter.folder_name({"learning_rate": 2e-4, "seed": 0}, "abc") == "learning_rate-0.0002-seed-0-abc"
    assert adapter.folder_name({"lora_target_modules": ["q", "v"]}, "abc") == "lora_target_modules-q-v-abc"
    assert len(adapter.folder_name({"model": "m" * 200}, "abc")) == 96  # the most that the Hub takes
