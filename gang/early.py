"""`python -m gang -`, as experiment.py starts it while its sweep does not exist yet.

Standard input gives a line of JSON with what the runs will be asked for; the answer, a line too, is what is wrong with
that, or null. A second line gives the words and the environment with which the process, whose slow imports are done by
then, goes on as a gang.
"""

import json
import logging
import os
import sys
from pathlib import Path

import datasets

import train
from data import BUILT_IN
from gang import agent
from inputs import InputError
from model import ADAPTED
from settings import Parser, parse, swept_values

# What train.read_data looks at beside the data; it is asked again only where one of these differs.
OF_ROWS = (
    "assistant_only_loss", "chat_template_path", "completion_only_loss", "eos_token", "max_length", "pad_token",
    "truncation_mode",
)  # fmt: skip
OF_MODEL = ("model_name_or_path", "model_revision", "attn_implementation", *ADAPTED)


def words() -> list[str]:
    """Answer the first line, and return the words of the second; exit if there is none."""
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what libraries print is no answer
        print(json.dumps(fault(**json.loads(sys.stdin.readline()))), file=answer)
    if not (line := sys.stdin.readline()):
        sys.exit(0)
    order = json.loads(line)
    os.environ.update(order["environment"])
    with open(order["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return order["words"]


def fault(sweep: dict, calls: list[list[str]], gang: bool) -> str | None:
    """What a run, or a gang, would refuse before its first step; `calls` are train.py's arguments in the sweep."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what is wrong is said once
    known: list[list] = []
    try:
        if calls:
            Parser().know(map(str, sweep["parameters"]))  # calls lack those that have a distribution
        for arguments in calls:
            data, training, base = parse(arguments)
            read = [vars(data), *(vars(training)[key] for key in OF_ROWS), *(vars(base)[key] for key in OF_MODEL)]
            if read not in known:
                if Path(data.dataset_name) == BUILT_IN or Path(data.dataset_name).exists():
                    datasets.disable_progress_bars()  # what comes from the Hub may take long
                train.read_data(data, training, base)
                known.append(read)
            if "wandb" not in training.report_to:
                raise InputError("report_to: the report is made of what W&B gets; leave report_to out")
        for name, spec in sweep["parameters"].items():
            for value in spec.get("values", [spec.get("value")]) if calls else ():
                swept_values(training, {name: {"value": value}})
        if gang:
            agent.check(sweep)
    except InputError as error:
        return str(error)
    return None
