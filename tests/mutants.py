"""Small faults at random places of the code, and whether the tests of that place see them:

    make mutants        or, of some rooms alone: python tests/mutants.py --each 30 analysis gang

Cosmic Ray makes the mutants. Each is tried in a copy of the repository, by the quick tests of its file, in a process
forked from one that has the libraries loaded: a mutant costs seconds, not the minutes of the whole suite. So what these
tests let live, the whole suite may still see.

2026-12-01, seed 301, drawn when the tests for all draws before it stood (seeds 101 to 105 and 201 to 204; of
their 328, drawn each when the tests for the one before stood, 268 had been seen):

    room         tried   seen by tests that were there   by tests since   by none
    analysis        15                              14                1         0
    local_wandb     15                              13                1         1
    gang            15                              14                0         1
    train           15                              13                2         0

Those of all draws that no test sees, and why:

- train.py: the assertion on the peak rate, which `analysis/checks.py` repeats; the last axis of two by its
  number; `use_cache`, which is a matter of memory
- settings.py: `max_steps` of 0, which is refused before
- gang/: 1,023 positions at a time for 1,024; `is` for `==` of two small numbers; the first member's layers by the last
  one's, which have the same sizes; when a line is flushed; `>=` for `==` of "cpu" and "cuda"; how often a GPU's step is
  measured
- settings.py, memory.py: `including_emulation`, and emptying a GPU's cache, where there is no GPU
- local_wandb/nodes.py: PAGE, how many rows a page has for a client that asks for no number
- local_wandb/runs.py: what is above -1 for what is above 0, of an infinity
- local_wandb/store.py: one byte more before the size of a page, which is SQLite's 0
- local_wandb/search.py: what a number that is not given counts as, where it is asked only whether it is above 0
- analysis/results.py, behaviour.py: `<=` for `<` and back, ties of two floats
- analysis/words.py, study.py, statistics.py, behaviour.py: the last of one word, a share of no steps, the curvature
  beside a lowest point, which is above 0, and a slope over batches that differ in nothing
"""

import argparse
import ast
import difflib
import importlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "bitsandbytes", "datasets", "graphql", "matplotlib.pyplot", "peft.tuners.lora", "scipy.ndimage",
    "scipy.special", "starlette.applications", "transformers.trainer", "trl.trainer.sft_trainer", "wandb.apis.public",
)  # fmt: skip
LOADED = "ignore::pytest.PytestAssertRewriteWarning"  # that libraries have been loaded before pytest
FAST = ["-m", "not slow"]
REPORT = ["tests/test_results.py", "tests/analysis/test_study.py", "tests/analysis/test_report.py", *FAST]
FAR = "not exit and not no_run_is_opened and not sigterm and not from_the_cache"  # processes of their own
TRAIN = ["tests/test_train.py", "tests/test_adapter.py", "tests/test_inputs.py", "tests/gang/test_early.py", "-k", FAR]
MODELS = ["a_mixture_of_experts", "a_checkpoint_quantised_otherwise", "dropout_that_stays", "what_the_base_would_drop"]
BASE = ["tests/gang/test_architectures.py", "tests/test_hub.py", *TRAIN[:-1]]
BASE += [f"{FAR} and (not architectures or encoder or {' or '.join(MODELS)})"]
RESUME = ["tests/test_checkpoint.py", "-k", "not killed"]


def of_gang(*names: str) -> list[str]:
    return [f"tests/gang/test_gang.py::test_{name}" for name in names]


LEARNED = of_gang(
    "adapters_in_bfloat16_learn_what_train_py_s_learn", "a_member_that_diverges_leaves_the_others_bit_for_bit"
)
KIND = "every_kind_of_training_equals_train_py"
NUMBERS = [f"tests/gang/test_{name}.py" for name in ("head", "attention", "packing")]
NUMBERS += of_gang(
    "lengths_are_rounded_to_few",
    "free_memory_is_that_of_the_machine_or_of_the_gpu",
    "a_gpus_steps_are_graphs_unless_activations_are_recomputed",
    "matrices_are_kept_where_a_third_of_the_memory_is_enough",
    "padded_ranks_stay_zero_and_adamw_is_torchs",
    "what_a_graph_has_captured_stays_where_it_is",
    "what_a_gpu_does_differently_changes_nothing",
)
NUMBERS += LEARNED
MEMBERS = ["tests/gang/test_member.py", "tests/gang/test_loop.py"]
MEMBERS += of_gang(
    "the_hosts_time_is_told_for_a_member_and_step",
    "a_row_goes_on_where_new_graphs_would_cost_more",
    "what_no_gang_computes_is_refused_by_name",
    "an_evaluation_takes_as_many_tokens_at_once_as_a_step",
    "a_crash_ends_one_member_alone",
    f"{KIND}[gradient_accumulation_steps]",
    f"{KIND}[per_device_train_batch_size]",
)
MEMBERS += [*LEARNED, "tests/gang/test_resume.py"]
SERVER = [f"tests/local_wandb/test_{name}.py" for name in ("run_answers", "sweep_answers", "schema", "runs", "sweeps")]
SERVER += FAST
MIRRORED = ("headline", "hypotheses", "mechanism", "questions", "tables")
STUDY_FILES = ("checks", "controls", "followups", "provenance", "rates", "results", "study", "sweep")
# Per room: its files, and the tests that are to see a fault in each. Not here: what is looked at (figures, pages).
ROOMS: dict[str, dict[str, list[str]]] = {
    "train": {
        "train.py": TRAIN,
        "model.py": BASE,
        "memory.py": ["tests/test_train.py", "-k", "memory"],
        "data.py": ["tests/test_data.py", "tests/test_hub.py", "-k", FAR],
        "inputs.py": ["tests/test_inputs.py", *FAST],
        "settings.py": ["tests/test_inputs.py", "tests/test_train.py", "tests/test_recipe_guides.py", *FAST],
        "guides.py": ["tests/test_recipe_guides.py", *FAST],
        "adapter.py": ["tests/test_adapter.py"],
        "checkpoint.py": RESUME,
    },
    "gang": {
        **{f"gang/{name}.py": NUMBERS for name in ("head", "lora", "packing", "step")},
        "gang/stack.py": [*NUMBERS, *of_gang(*(f"{KIND}[{kind}]" for kind in ("freeze_a", "max_grad_norm")))],
        **{f"gang/{name}.py": [f"tests/gang/test_{name}.py"] for name in ("early", "fused")},
        **{f"gang/{name}.py": MEMBERS for name in ("checkpoint", "loop", "member")},
        "gang/agent.py": [
            "tests/gang/test_agent.py",
            "tests/gang/test_early.py",
            *of_gang("what_differs_otherwise_is_named"),
        ],
        "gang/fit.py": [
            "tests/gang/test_gang.py",
            "tests/gang/test_architectures.py",
            "-k",
            "named or refused or mixture or freezes",
        ],
        "gang/size.py": of_gang(
            "the_size_with_the_least_makespan",
            "activations_are_recomputed_only_where_memory_asks_for_it",
            "a_processs_memory_is_what_linux_says",
            "free_memory_is_that_of_the_machine_or_of_the_gpu",
            "how_many_fit_is_told_by_the_second_one",
            "what_a_gpu_does_differently_changes_nothing",
        ),
    },
    "analysis": {
        "analysis/behaviour.py": ["tests/analysis/test_behaviour.py", *REPORT],
        "analysis/budget.py": ["tests/analysis/test_budget.py", *REPORT],
        "analysis/curves.py": ["tests/analysis/test_behaviour.py", "tests/analysis/test_statistics.py", *REPORT],
        "analysis/guides.py": ["tests/analysis/test_guides.py", "tests/test_results.py", "-k", "not figure", *FAST],
        "analysis/runs.py": ["tests/analysis/test_run_data.py", "tests/analysis/test_behaviour.py", *REPORT],
        "analysis/statistics.py": ["tests/analysis/test_statistics.py", *REPORT],
        "analysis/pull.py": ["tests/analysis/test_pull.py"],
        **{f"analysis/{name}.py": ["tests/analysis/test_command.py"] for name in ("__main__", "folder")},
        **{f"analysis/{name}.py": ["tests/analysis/test_words.py", *REPORT] for name in ("files", "words")},
        "analysis/refinement.py": ["tests/analysis/test_refinement.py", "tests/test_results.py", *FAST],
        "analysis/rounds.py": ["tests/analysis/test_rounds.py"],
        **{
            f"analysis/{name}.py": [f"tests/analysis/test_{name}.py", *REPORT]
            for name in ("hypotheses", "mechanism", "tables")
        },
        **{f"analysis/{name}.py": REPORT for name in STUDY_FILES},
        "analysis/report.py": [*REPORT, "tests/analysis/test_budget.py", "tests/analysis/test_guides.py"],
    },
    "local_wandb": {
        "local_wandb/search.py": ["tests/local_wandb/test_search.py"],
        "local_wandb/filters.py": ["tests/local_wandb/test_filters.py", *SERVER],
        "local_wandb/store.py": ["tests/local_wandb/test_store.py", *SERVER],
        **{f"local_wandb/{name}.py": SERVER for name in ("nodes", "runs", "sweeps")},
    },
}


class Mutant(NamedTuple):
    path: str
    source: str
    fault: str  # the lines that differ

    @classmethod
    def draw(cls, paths: list[str], generator: random.Random) -> "Mutant":
        """One of a random place and kind: files by their number of places, then the place, then what is put there."""
        places = [(path, place) for path in paths for place in sorted(places_of(path))]
        while True:
            path, place = generator.choice(places)
            operator, occurrence = generator.choice(sorted(places_of(path)[place]))
            before = (ROOT / path).read_text()
            with suppress(AttributeError, SyntaxError):  # operators fail at `except a.B:`, or make what is no Python
                after = mutate_code(before, plugins.get_operator(operator)(), occurrence)
                if after is not None and meaning(after) != meaning(before):
                    return cls(path, after, changes(before, after))


PLACES: dict[str, dict[tuple, list[tuple[str, int]]]] = {}


def places_of(path: str) -> dict[tuple, list[tuple[str, int]]]:
    """The (operator, occurrence) pairs of each place, a (start, end), of a file."""
    if path not in PLACES:
        PLACES[path] = {}
        nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
        for name in plugins.operator_names():
            if not plugins.get_operator(name).arguments():
                operator = plugins.get_operator(name)()
                found = [place for node in nodes for place in operator.mutation_positions(node)]
                for occurrence, place in enumerate(found):
                    PLACES[path].setdefault(place, []).append((name, occurrence))
    return PLACES[path]


def meaning(source: str) -> str:
    """What runs of it: a fault in an annotation alone is none, nor one in a zip's `strict`, which looks for others."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
    return ast.dump(tree)


def changes(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    place, *rest = list(lines)[2:]
    number = place.split()[1].removeprefix("-").partition(",")[0]
    return f"{number}: " + "  →  ".join(line[1:].strip() for line in rest if not line.startswith("@@"))


def passes(copy: Path, tests: list[str], limit: float) -> bool | None:
    """Whether the tests pass in this copy; None if they take more than `limit` seconds."""
    child = os.fork()
    if not child:
        status = 70  # of a child that pytest itself has failed
        try:
            os.setsid()
            output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(copy)
            sys.path[0] = str(copy)
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", LOADED, *tests])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def interval(killed: int, n: int) -> str:
    """Wilson's 95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    p, z = killed / n, 1.96
    half, middle = z * math.sqrt(p * (1 - p) / n + (z / n) ** 2 / 4), p + z**2 / (2 * n)
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return f"{killed} of {n} seen, {100 * p:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def try_room(room: str, options: argparse.Namespace, copy: Path) -> int:
    """Try the mutants of a room, print those that live, and return how many were seen."""
    generator, seen = random.Random(f"{options.seed} {room}"), 0
    seconds: dict[tuple, float] = {}  # that the tests take without a mutant
    for count in range(1, options.each + 1):
        mutant = Mutant.draw(list(ROOMS[room]), generator)
        tests, place = ROOMS[room][mutant.path], copy / mutant.path
        if tuple(tests) not in seconds:
            start = time.monotonic()
            if not passes(copy, tests, math.inf):
                sys.exit(f"the tests of {mutant.path} fail without a mutant:\n{(copy / 'output.txt').read_text()}")
            seconds[tuple(tests)] = time.monotonic() - start
        original = place.read_text()
        place.write_text(mutant.source)
        verdict = passes(copy, tests, 30 + 5 * seconds[tuple(tests)])
        place.write_text(original)
        seen += verdict is not True
        word = {True: "LIVES", False: "seen", None: "too slow, so seen"}[verdict]
        print(f"{room} {count}/{options.each} {word}: {mutant.path}:{mutant.fault}", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="Small faults in the code, and whether tests see them.")
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; default all")
    parser.add_argument("--each", type=int, default=30, help="mutants per room (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rooms = options.rooms or list(ROOMS)
    if unknown := set(rooms) - set(ROOMS):
        parser.error(f"no room {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        os.environ |= {"TMPDIR": folder, "HF_HOME": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True  # a mutant of the same second and size would pass for the one before
        tempfile.tempdir = folder
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
        for name in LIBRARIES:
            importlib.import_module(name)
        seen = {room: try_room(room, options, copy) for room in rooms}
    for room, killed in seen.items():
        print(f"{room}: {interval(killed, options.each)}")
    print(f"all: {interval(sum(seen.values()), len(rooms) * options.each)}")


if __name__ == "__main__":
    main()
