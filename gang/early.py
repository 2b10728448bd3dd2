"""`python -m gang -`, as experiment.py starts it while its sweep does not exist yet.

Standard input gives a line of JSON with what the runs will be asked for; the answer, a line too, is what is wrong with
that, or null. A second line gives the words and the environment with which the process, whose slow imports are done and
whose base is loaded by then, goes on as a gang.
"""

import gc
import json
import logging
import math
import os
import shlex
import sys
import tempfile

import torch

import train
from checkpoint import find
from gang import agent
from gang.fit import unfit
from gang.loop import Shared
from gang.member import Member
from gang.step import Step, together
from inputs import InputError, first_line
from memory import release
from settings import Parser, check_warmup, parse, swept_values

TOGETHER = {f"--{key}" for key in agent.DIFFER}


def words() -> tuple[list[str], Shared | None]:
    """Answer the first line; return the words of the second, and what has been loaded. Exit if there is none."""
    gc.freeze()  # what is imported stays, and to look for garbage takes moments
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what libraries print is no answer
        shared, fault = None, None
        try:
            shared = check(**json.loads(sys.stdin.readline()))
        except InputError as error:
            fault = str(error)
        print(json.dumps(fault), file=answer)
    if not (line := sys.stdin.readline()):
        sys.exit(0)
    order = json.loads(line)
    os.environ.update(order["environment"])
    with open(order["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return order["words"], shared


def check(sweep: dict, calls: list[list[str]], gang: bool) -> Shared | None:
    """Raise InputError for what a run, or a gang, would refuse; return what the first gang can go on with.

    `calls` are train.py's arguments in the sweep. Those that no gang would train together are rehearsed, each.
    """
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what is wrong is said once
    if calls:
        Parser().know(map(str, sweep["parameters"]))  # calls lack those that have a distribution
    apart: dict[tuple, list[str]] = {}
    for arguments in calls:
        configuration = parse(arguments)
        if "wandb" not in configuration[1].report_to:
            raise InputError("report_to: the report is made of what W&B gets; leave report_to out")
        common = tuple(word for word in arguments if word.partition("=")[0] not in TOGETHER)
        if gang and common not in apart and (reason := unfit(configuration)):
            raise InputError(f"{reason}; {agent.ALONE}")
        apart.setdefault(common, arguments)
    for name, spec in sweep["parameters"].items():
        for value in spec.get("values", [spec.get("value")]) if calls else ():
            swept_values(configuration[1], {name: {"value": value}})
    shared, first = None, agent.first(sweep) if gang else None
    for arguments in apart.values():
        loaded = rehearsed(first, arguments)
        shared, first = shared or loaded, None
        gc.collect()  # a trainer and what it calls back hold each other, and the memory that is needed next
        torch.cuda.empty_cache()
    return shared


def rehearsed(first: Member | None, arguments: list[str]) -> Shared | None:
    """What `rehearse` returns; whatever it meets is an InputError, but for a lack of memory."""
    try:
        return rehearse(first, arguments)
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        release(error)  # a run tells what would fit, and a gang tries it
        return None
    except Exception as error:  # of whatever library meets what it did not expect
        alone = f"; if that runs, {agent.ALONE}" if first else ""
        hint = f"for all of it: python train.py {shlex.join(arguments)}{alone}"
        raise InputError(f"no run could begin: {type(error).__name__}: {first_line(error)}; {hint}") from error


def rehearse(first: Member | None, arguments: list[str]) -> Shared | None:
    """All that comes before a run's first update, but for its W&B run; of a gang's `first`, what it has loaded."""
    shared = None
    with tempfile.TemporaryDirectory() as folder:
        if first:
            first.configure(None)
            first.folder = folder
            shared, trainer = Shared(first), first.trainer
        else:
            data, training, base = parse(arguments)
            find(training, {}, None, None)
            splits = train.read_data(data, training, base)
            training.output_dir = folder
            trainer = train.Trainer(base, training, *splits)
        loader = first.loader if first else trainer.get_train_dataloader()
        check_warmup(trainer.args, trainer.set_initial_training_values(trainer.args, loader)[6])
        batch = next(iter(loader))
        if first:
            step = Step(shared.model, [trainer.lora_layers], trainer.args)
            step.graphs = {}
            loss = step.train(together([batch], [1.0], 0, None, shared.packed), torch.zeros(1), False)[0, 0]
        else:
            with torch.no_grad(), trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    if not math.isfinite(loss):
        raise InputError(f"the loss of the untrained model is {float(loss)}; see what the first row says, and dtype")
    return shared
