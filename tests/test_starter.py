"""starter/: the instruction data and the base model."""

import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from starter import corpus, docstrings, pretrain

MODEL = Path(__file__).parent.parent / "starter" / "model"


@pytest.fixture(scope="module")
def splits():
    return docstrings.build(Path(sysconfig.get_paths()["stdlib"]))


@pytest.mark.slow
def test_splits_are_large_and_share_no_module_source_or_answer(splits):
    train, test = splits["train"], splits["test"]
    assert len(train) >= 1500 and len(test) >= 300  # distributions leave out parts of the library
    for part in (lambda row: row["module"], lambda row: row["messages"][0]["content"], answer):
        assert not set(map(part, train)) & set(map(part, test))


def answer(row: dict) -> str:
    return row["messages"][1]["content"]


@pytest.mark.slow
def test_the_question_does_not_hold_the_docstring(splits):
    assert not [row for row in splits["train"] if '"""' + answer(row) in row["messages"][0]["content"]]


def test_summaries_are_first_lines_and_the_source_lacks_them(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "@cache\ndef add(left, right):\n    '''Return the sum of both.\n\n    More.\n    '''\n    return left + right\n"
        "def undocumented(left, right):\n    return left * right + left - right\n"
    )
    expected = ("@cache\ndef add(left, right):\n    return left + right", "Return the sum of both.")
    assert list(docstrings.summaries(path)) == [expected]


def test_corpus_drops_tests_duplicates_generated_files_and_test_answers(tmp_path):
    text = "def number():\n    return 1\n" * 10
    summary = "Return the number, read over again."
    files = {
        "package/kept.py": text,
        "package/copy.py": text,
        "package/tests/check.py": text + "# 1\n",
        "package/generated.py": "# Automatically generated\n" + text,
        "package/backport.py": f'def backport():\n    """\n    {summary}\n    """\n' + text,
        "package/raw.py": f'def raw():\n    r"""{summary}"""\n' + text,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert corpus.read_sources([tmp_path], {summary}) == {"package": [text]}


def test_encoding_keeps_special_tokens_of_a_source_as_text():
    tokenizer = corpus.train_tokenizer(["print('<s>')\n"] * 5, 300)
    ids = corpus.encode(tokenizer.to_str(), ["print('<s>')\n"])
    assert (ids == tokenizer.token_to_id(corpus.BOS)).sum() == 1 and ids[-1] == tokenizer.token_to_id(corpus.EOS)


def test_the_template_marks_the_answer_and_its_end_alone():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "def f(): pass"}, {"role": "assistant", "content": "Do nothing."}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Do nothing." + tokenizer.eos_token


def test_the_base_is_small_safe_and_knows_python():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 12e6
    assert not [path for path in MODEL.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = model.config
    assert all(size % 64 == 0 for size in (config.hidden_size, config.intermediate_size))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = Path(pretrain.__file__).read_text()
    ids = torch.tensor(tokenizer(text).input_ids[: config.max_position_embeddings])[None]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        python, noise = (model(input_ids=each, labels=each).loss.item() for each in (ids, shuffled))
    assert python < 0.7 * noise
    assert f"{model.num_parameters():,}" in (MODEL / "README.md").read_text()
