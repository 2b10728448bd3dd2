"""recipes/guides.yaml is a table that can be checked, and a name in it is a rate, a rank and an α, for any agent."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import guides
from inputs import InputError
from settings import parse
from sweep import of_guides

ROOT = Path(__file__).parent.parent
STARTER = ["--config", str(ROOT / "recipes/starter.yaml"), "--model_name_or_path", str(ROOT / "starter/model")]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def folder(path, **config):
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", guides.table())
def test_each_guide_says_what_it_sets_and_where_that_was_read(name):
    guide = guides.entry(name)
    assert 1e-6 < guide["learning_rate"] < 1e-2 and type(guide["lora_r"]) is type(guide["lora_alpha"]) is int
    assert re.fullmatch(r"https://[\w./@-]+", guide["url"]) and guide["date"].year >= 2026
    assert guide["title"] and guide["left_out"]
    assert set(guide) <= {*guides.SETTINGS, "title", "url", "date", "left_out", "exponent"}


def test_a_run_keeps_where_its_guide_was_read():
    assert guides.source(None) == {}
    for name in guides.table():
        kept = guides.source(name)["guide_source"]
        assert kept.keys() == {"title", "url", "date", "left_out"} and set(map(type, kept.values())) == {str}


def test_no_two_guides_are_the_same_run():
    settings = [tuple(guide[key] for key in guides.SETTINGS) for guide in guides.table().values()]
    assert len(set(settings)) == len(settings)


def test_a_formula_is_evaluated_for_the_model(tmp_path):
    """Tinker's get_lr for Llama-3.2-1B and Qwen3-8B: 10 · 5e-5 · (2000 / hidden_size)^exponent."""
    llama = folder(tmp_path, model_type="llama", hidden_size=2048)
    assert guides.settings("tinker", llama) == {"learning_rate": 4.91e-4, "lora_r": 32, "lora_alpha": 32}
    inner = folder(tmp_path, model_type="qwen3_vl", text_config={"model_type": "qwen3_vl_text", "hidden_size": 4096})
    assert guides.settings("tinker", inner)["learning_rate"] == 4.73e-4


def test_a_model_of_the_hub_tells_its_size(tmp_path, monkeypatch):
    path, asked = Path(folder(tmp_path, model_type="llama", hidden_size=2048), "config.json"), []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *words, revision: asked.append(revision) or path)
    assert guides.settings("tinker", "acme/llama", "v1")["learning_rate"] == 4.91e-4 and asked == ["v1"]
    for kind in (OSError, ValueError):
        monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(kind("\nno such model.\nmore")))
        with pytest.raises(InputError, match=r"^model_name_or_path acme/llama: no such model$"):
            guides.settings("tinker", "acme/llama")


def test_a_formula_without_the_models_family_is_left_out_by_name(tmp_path):
    model = folder(tmp_path, model_type="gemma3", hidden_size=2048)
    names, refused = guides.applicable(model)
    assert set(names) == {*guides.table()} - {"tinker"}
    assert refused == [f"guide: tinker: its formula is for llama and qwen, and {model} is a gemma3"]
    ranks = [guides.entry(name)["lora_r"] for name in names]
    assert ranks == sorted(ranks, reverse=True)


def test_a_guide_replaces_what_the_recipe_sets_and_nothing_else():
    _, plain, plain_base = parse(STARTER)
    _, training, base = parse([*STARTER, "--guide=qlora"])
    assert (training.learning_rate, base.lora_r, base.lora_alpha) == (2e-4, 64, 16)
    pairs = ((field.name, a, b) for a, b in ((plain, training), (plain_base, base)) for field in fields(a))
    changed = {name for name, a, b in pairs if getattr(a, name) != getattr(b, name)}
    assert changed == {"learning_rate", "lora_r", "lora_alpha", "guide"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guide=qlroa"], "guide: qlroa: recipes/guides.yaml has qlora, "),
        (["--guide=qlora", "--learning_rate", "1e-3"], "guide: qlora sets learning_rate by itself"),
        (["--lora-r=8", "--guide", "qlora"], "guide: qlora sets lora_r by itself"),
    ],
)
def test_what_a_guide_cannot_mean_is_refused(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse([*STARTER, *flags])


def test_the_sweep_of_guides_keeps_recipe_seeds_and_constants():
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    sweep["parameters"] |= {"seed": {"values": [0, 1]}, "max_steps": {"value": 5}, "lora_r": {"values": [8, 16]}}
    made = of_guides(sweep)
    assert made["parameters"].pop("guide") == {"values": guides.applicable(str(ROOT / "starter/model"))[0]}
    assert made["parameters"] == {"seed": {"values": [0, 1]}, "max_steps": {"value": 5}}
    assert (made["command"], made["method"], made["metric"]) == (sweep["command"], "grid", sweep["metric"])


def reports(checkout, name):
    (path,) = checkout.glob(f"outputs/{name}-*/all_results.json")
    return json.loads(path.read_text())


def test_the_guides_stand_beside_the_last_experiment_of_the_recipe(experiment, checkout, tiny_sweep):
    """All of them in one gang, whatever their ranks, and in one report with the grid."""
    sweep = tiny_sweep(2.0e-4, 1.0e-3)
    assert experiment("--sweep", sweep).returncode == 0
    result = experiment("--guides", "--sweep", sweep)
    assert result.returncode == 0, result.stdout + result.stderr
    found = reports(checkout, "guides")
    assert [x["learning_rate"] for x in found["rates"]] == [2e-4, 1e-3]
    rows = {x["name"]: x for x in found["guides"]["rows"]}
    assert set(rows) == set(guides.table()) and all(x["compared"] for x in rows.values())
    assert (rows["qlora"]["learning_rate"], rows["qlora"]["lora_r"], rows["qlora"]["lora_alpha"]) == (2e-4, 64, 16)
    assert rows["qlora"]["source"]["url"] == guides.entry("qlora")["url"]
    sizes = {run["config"]["gang_size"] for run in found["runs"] if run["config"].get("guide")}
    assert sizes == {len(rows)}
    assert not [check for check in found["checks"] if check["passed"] is False]
    assert "Of seven guides" in result.stdout


def test_wandbs_own_agent_runs_a_guide(experiment, checkout, tiny_sweep):
    path = tiny_sweep(2.0e-4)
    sweep = yaml.safe_load(path.read_text())
    sweep |= {"name": "one guide", "parameters": {"guide": {"values": ["unsloth"]}}}
    path.write_text(yaml.safe_dump(sweep))
    result = experiment("--sweep", path, "--one-by-one")
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = reports(checkout, "one-guide")["runs"]
    config = run["config"]
    assert run["name"] == "guide=unsloth" and config["guide"] == "unsloth"
    assert (config["learning_rate"], config["lora_r"], config["lora_alpha"]) == (2e-4, 16, 16)
