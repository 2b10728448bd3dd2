"""data.py: which rows are read from which files, what is refused, and what a run shows of them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import data

ROOT = Path(__file__).parent.parent
TEXT = '{"text": "a"}\n'
PAIR = '{"prompt": "2 + 3?", "completion": "5"}\n'
CSV = "prompt,completion\n2 + 3?,five\n"


def chat(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": f"{role}'s words"} for role in roles]}) + "\n"


CHAT = chat("user", "assistant")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder, and a cache of its own for `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def read(files: dict[str, str], assistant_only_loss: bool = False, **settings: str) -> list[list[dict]]:
    """The rows of the two splits, of a folder `rows` with these files unless the settings name others."""
    for name, text in files.items():
        path = Path("rows", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, errors="surrogateescape")
    splits = data.load_splits(data.DataConfig(**{"dataset_name": "rows"} | settings), assistant_only_loss)
    return [split.to_list() for split in splits]


A, B = [{"text": "a"}], [{"text": "b"}]


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        ({"train.jsonl": TEXT, "test.jsonl": '{"text": "b"}\n'}, {}, [A, B]),
        ({"train.csv": "text\na\n", "test.csv": "text\nb\n"}, {}, [A, B]),
        ({"train.json": '[{"text": "a"}]', "test.json": '[{"text": "b"}]'}, {}, [A, B]),
        ({"train/1.jsonl": TEXT, "train/2.jsonl": TEXT, "test/1.jsonl": TEXT}, {}, [A + A, A]),
        ({"train.csv": CSV, "test.csv": CSV}, {}, [[{"prompt": "2 + 3?", "completion": "five"}]] * 2),
        ({"train.csv": "prompt,completion,n\n1?,007\n", "test.csv": "n,completion,prompt\n1,None,2?\n"}, {},
         [[{"prompt": "1?", "completion": "007", "n": None}], [{"prompt": "2?", "completion": "None", "n": "1"}]]),
        ({"mine.jsonl": TEXT, "own.csv": "text\nb\n"},
         {"dataset_name": "rows/mine.jsonl", "dataset_test_split": "rows/own.csv"}, [A, B]),
        ({"all.jsonl": TEXT + '{"text": "b"}\n'},
         {"dataset_name": "rows/all.jsonl", "dataset_train_split": "train[:1]", "dataset_test_split": "train[1:]"},
         [A, B]),
        ({"chat/rows.jsonl": TEXT, "own.csv": "text\nb\n"},
         {"dataset_name": "rows/chat", "dataset_test_split": "rows/own.csv"}, [A, B]),
        ({"chat.jsonl": TEXT, "holdout.jsonl": '{"text": "b"}\n',
          "README.md": "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: chat.jsonl}\n"
                       "  - {split: test, path: holdout.jsonl}\n---\n"}, {}, [A, B]),
    ],
)  # fmt: skip
def test_rows_are_read_from_what_people_have(files, settings, expected):
    assert read(files, **settings) == expected


def test_parquet_is_read():
    Path("rows").mkdir()
    for split, rows in (("train", A), ("test", B)):
        Dataset.from_list(rows).to_parquet(f"rows/{split}.parquet")
    assert read({}) == [A, B]


ONE = {"dataset_name": "rows/all.jsonl"}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"chat.jsonl": TEXT, "holdout.jsonl": TEXT}, {}, "rows: chat.jsonl, holdout.jsonl: to train on or to test on"),
        ({"train.jsonl": TEXT, "test.jsonl": TEXT, "more.csv": "text\na\n"}, {}, "rows: more.csv: to train on or to"),
        ({"chat.jsonl": TEXT, "test.jsonl": TEXT}, {}, "rows: chat.jsonl: to train on or to test on"),
        ({"train.jsonl": TEXT}, {}, 'Unknown split "test"'),
        ({"all.jsonl": TEXT}, ONE, 'Unknown split "test".*slice the file.*or give a second file as dataset_test_split'),
        ({"README.md": "nothing"}, {}, "doesn't contain any data files"),
        ({"all.jsonl": TEXT + '{"text": \n'}, ONE, "rows/all.jsonl, line 2, column 9: Expecting value"),
        ({"all.jsonl": TEXT + '\n{"text": "\udcff"}\n'}, ONE, "rows/all.jsonl, line 3: not in UTF-8"),
        ({"train.jsonl": TEXT, "test.jsonl": TEXT + "[1]\n"}, {}, "rows/test.jsonl, line 2: a row is an object"),
        ({"train.jsonl": TEXT, "test.jsonl": ""}, {}, "rows/test.jsonl is empty"),
        ({"train.json": '[{"text', "test.jsonl": TEXT}, {}, "dataset_name rows: .*JSON|dataset_name rows: Unmatched"),
        ({"train.jsonl": TEXT, "test.jsonl": '{"question": "a"}\n'}, {}, "all files of .* need the same columns"),
        ({"all.jsonl": TEXT}, ONE | {"dataset_train_split": "train[:0]"}, 'train\\[:0\\]" corresponds to no data'),
        ({"all.jsonl": TEXT}, ONE | {"dataset_train_split": "train[1:]"}, "no data|no rows"),
        ({"all.jsonl": TEXT}, ONE | {"dataset_train_split": "trian"}, 'Unknown split "trian"'),
        ({"all.jsonl": '{"question": "a", "answer": "b"}\n'}, ONE, "columns question, answer; TRL needs messages"),
        ({"all.jsonl": TEXT + '{"text": 5}\n'}, ONE, "all.jsonl, train: row 2: 5 stands where text is expected"),
        ({"all.jsonl": TEXT + '{"text": null}\n'}, ONE, "row 2: None stands where text is expected"),
        ({"all.csv": 'messages\n"[{""role"": ""user""}]"\n'}, {"dataset_name": "rows/all.csv"}, "messages: a list of"),
        ({"all.csv": "text\na, b\n"}, {"dataset_name": "rows/all.csv"}, "first row has 2 fields and the header 1; a"),
        ({"all.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": "b"}\n'}, ONE,
         "row 2: text where others have a list of turns"),
        ({"train.csv": CSV, "test.csv": "text\na\n"}, {}, "train.csv: columns completion, prompt: all files of a data"),
        ({"train.csv": "text\na\n", "test.csv": CSV}, {}, "train.csv: columns text: all files of a data set need the"),
        ({"train.csv": CSV, "test.csv": ""}, {}, "rows/test.csv is empty"),
        ({"all.csv": "prompt,completion\na,\n"}, {"dataset_name": "rows/all.csv"}, "row 1: None stands where text"),
        ({"all.jsonl": '{"messages": [{"role": "user", "content": 5}]}\n'}, ONE, "row 1: 5 stands where text"),
        ({"all.jsonl": '{"messages": [{"from": "human", "content": "a"}]}\n'}, ONE, "row 1: a turn without a role"),
        ({"all.jsonl": '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n'}, ONE, "row 1: .*is text"),
        ({}, {"dataset_name": "no/such"}, "no/such.*give a local folder, a file, or the name of a Hub data set"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(files, settings, message):
    with pytest.raises(data.InputError) as caught:
        read(files, **settings)
    said = str(caught.value)
    assert re.search(message, said), said
    assert "\n" not in said and ": dataset_name rows" not in said
    assert ("slice the file" in said) == ("Unknown split" in said and "dataset_name" in settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PAIR, "assistant_only_loss: true needs messages; of prompt \\+ completion the completion's tokens count"),
        (TEXT, "assistant_only_loss: true needs messages; of text every token count"),
        (CHAT + chat("user"), "row 2: no turn of the assistant, so assistant_only_loss has nothing to count"),
    ],
)
def test_without_an_answer_to_count_a_row_is_named(rows, message):
    assert read({"train.jsonl": rows, "test.jsonl": rows})
    assert data.load_split(data.DataConfig(dataset_name="rows"), "test")
    with pytest.raises(data.InputError, match=f"dataset_name rows, train: {message}"):
        read({}, assistant_only_loss=True)


def test_the_built_in_rows_are_made_when_they_are_used(monkeypatch):
    made = []
    monkeypatch.setattr(data.subprocess, "run", lambda command, check: made.append(command[-1] if check else None))
    read({"train.jsonl": TEXT, "test.jsonl": TEXT})
    with pytest.raises(data.InputError, match="starter/data"):
        read({}, dataset_name="starter/data")
    assert made == []
    Path("starter").mkdir()
    with pytest.raises(data.InputError, match="starter/data"):
        read({}, dataset_name="starter/data")
    assert made == ["starter.docstrings"]


@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
def test_rows_of_both_splits_are_counted(train, test):
    splits = [Dataset.from_dict({"text": rows, "source": [str(n) for n in range(len(rows))]}) for rows in (train, test)]
    assert data.shared_rows(*splits) == sum(row in train for row in test)


def test_rows_are_shared_whatever_the_order_of_their_keys():
    turns = json.loads(CHAT)["messages"]
    turned = [dict(reversed(turn.items())) for turn in turns]
    train, test = (Dataset.from_list([{"messages": row}]) for row in (turns, turned))
    assert data.shared_rows(train, test) == 1 and data.fingerprint(train) == data.fingerprint(test)
    assert data.shared_rows(train, Dataset.from_list(A)) == 0


def test_data_are_told_apart_by_every_row():
    one, other = (Dataset.from_list(rows) for rows in (A + B, B + A))
    assert data.fingerprint(one, other) == data.fingerprint(one, Dataset.from_list(B + A))
    found = {data.fingerprint(*splits) for splits in ((one, other), (other, one), (one,), (other,), ())}
    assert len(found) == 5 and {len(hexadecimal) for hexadecimal in found} == {16}


def test_of_a_long_text_the_ends_are_shown():
    letters = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens)))
    for length, shown in ((300, "a" + "b" * 299), (301, f"a{'b' * 149} … {'b' * 150}")):
        row = {"input_ids": [97] + [98] * (length - 1) + [99], "labels": [-100] * length + [99]}
        assert data.marked(row, letters) == shown + "⟦c⟧"


def test_a_commit_is_told_by_the_folder():
    assert data.commit(f"/cache/{'0a' * 20}/rows.arrow") == "0a" * 20
    assert data.commit("/cache/rows.arrow") is None


def test_a_row_of_which_the_loss_counts_nothing_is_left_out():
    labels = [[-100, 5], [-100, -100], [5], [], [5, -100], [5, 5]]
    rows = Dataset.from_dict({"labels": labels, "input_ids": labels})
    assert data.answered(rows, "train", None)["labels"] == [[-100, 5], [5, 5]]
    for none in (rows.select([1]), rows.select([])):
        with pytest.raises(data.InputError, match=r"^train: no row has an answer within max_length: 64$"):
            data.answered(none, "train", 64)


def test_a_run_shows_what_it_reads():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "starter/model")
    question, answer = tokenizer("What?")["input_ids"], tokenizer("That.")["input_ids"]
    tokenised = Dataset.from_dict(
        {"input_ids": [question + answer, question], "labels": [[-100] * len(question) + answer, question]}
    )
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    settings = SimpleNamespace(
        max_length=64, train_batch_size=4, gradient_accumulation_steps=2, world_size=1, max_steps=10, num_train_epochs=3
    )
    trainer = SimpleNamespace(
        args=settings, train_dataset=tokenised, eval_dataset=tokenised.select([1]), processing_class=tokenizer
    )
    config = data.DataConfig(dataset_test_split="test[:1]")
    shown = data.what_was_read(config, (rows, rows.select([2])), trainer, shared=1)
    total, counted = 2 * len(question) + len(answer), len(question) + len(answer)
    assert f"train (train): 3 rows, {total} tokens, longest {len(question + answer)}, {counted / total:.0%}" in shown
    assert "1 left out, without an answer within max_length: 64" in shown
    assert f"test (test[:1]): 1 rows, {len(question)} tokens, longest {len(question)}, 100% of them answers" in shown
    assert "10 steps of 8 rows, 40 epochs" in shown
    settings.max_steps = -1  # then the epochs decide, and a batch that is not full is a step too
    assert "3 steps of 8 rows, 12 epochs" in data.what_was_read(config, (rows, rows), trainer, shared=0)
    assert "What?⟦That.⟧" in shown
    assert "warning: 1 of 1 test rows are training rows too" in shown
    assert data.counts("train", rows, tokenised, None).endswith("1 left out, without an answer")
