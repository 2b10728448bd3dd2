"""A sweep agent that trains several configurations at once on one frozen base:

    python -m gang ENTITY/PROJECT/SWEEP

Each of its N members claims a configuration through W&B's own protocol, as N `wandb agent` processes would, and logs
to its own run. Configurations may differ in learning_rate, seed, lora_r and lora_alpha, or in the guide that sets
these; any other goes into a later gang.
"""

import argparse
import gc
import os
import signal
import sys
import warnings


def size(text: str) -> int | None:
    if text != "auto" and int(text) < 1:
        raise ValueError
    return None if text == "auto" else int(text)


def main(words: list[str], shared=None) -> int:
    """`shared` is what the process has loaded before it had a sweep (gang/early.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m gang", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="ENTITY/PROJECT/SWEEP")
    parser.add_argument("--size", default="auto", type=size, metavar="N|auto", help="at once; default: measured")
    options = parser.parse_args(words)
    if options.sweep.count("/") != 2:
        print(f"gang: {options.sweep!r}: give ENTITY/PROJECT/SWEEP, as `wandb sweep` prints it", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the imports below are done
    # Under these W&B's client would give every run of this process the same id.
    for variable in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        os.environ.pop(variable, None)
    entity, project, _ = options.sweep.split("/")
    os.environ.update(WANDB_ENTITY=entity, WANDB_PROJECT=project)
    from checkpoint import interruption  # here, since torch and TRL take seconds
    from gang.agent import Agents, InputError, Sweep

    gc.freeze()
    gc.enable()
    interruption.install()
    try:
        Agents(Sweep(options.sweep), options.size, shared).work()
    except InputError as error:
        print(f"gang: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gc.disable()  # half a million objects are to come, and no garbage; to look for it takes seconds
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # as train.py
    if sys.argv[1:] == ["-"]:
        from gang import early  # here, since torch and TRL take seconds

        sys.exit(main(*early.words()))
    sys.exit(main(sys.argv[1:]))
