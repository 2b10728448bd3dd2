"""Which learning rate, and why: analyse W&B sweeps, or an output directory without a network.

    python -m analysis ENTITY/PROJECT/SWEEP [SWEEP ...]         to outputs/NAME-ID, and outputs/latest links there
    python -m analysis outputs/latest [--refine]                the same from its files
    python -m analysis outputs/grid outputs/controls --output outputs/merged

Writes README.md, report.html, the figures, all_results.json, sweeps/*.yaml and, from a sweep, lr_*/run_data.json.
Several sweeps are merged into one report: a sweep, its refinement, and controls, which stand beside the grid.
"""

import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it in silence, in the imports below too; no file is torn

from analysis import folder, followups, headline, report, rounds
from analysis.files import InputError, save, to_json
from analysis.refinement import Decision
from analysis.results import results
from analysis.runs import load, merge
from analysis.study import Study, build


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", nargs="+", help="sweeps as ENTITY/PROJECT/SWEEP, or output directories")
    parser.add_argument("--output", type=Path, help="where to write (outputs/NAME-ID, or the directory itself)")
    parser.add_argument("--refine", action="store_true", help="also say which sweep to run next, or why none")
    options = parser.parse_args(arguments)
    try:
        return analyse(options)
    except InputError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2


def analyse(options: argparse.Namespace) -> int:
    directory = Path(options.source[0])
    handles: list = []  # of W&B's runs
    if not directory.is_dir():
        from analysis import pull  # wandb, which an analysis from files does not need

        if options.output is None:
            folder.check_latest()
        directory, handles = pull.pull(options.source, options.output)
        if options.output is None:
            folder.link_latest(directory)
    elif len(options.source) > 1:
        directory = merge_into(options.output, [Path(source) for source in options.source])
    elif options.output not in (None, directory):
        raise InputError(f"{directory} is analysed in place: give no other --output")
    study = build(*load(directory))
    found = results(study)
    save(directory / "all_results.json", to_json(found, lines=3))
    followups.write(study, directory)
    from analysis import figures, page  # matplotlib and plotly, only when figures are drawn

    pictures = figures.draw(study, directory)
    save(directory / "README.md", report.render(found, directory, pictures))
    save(directory / "report.html", page.render(study, found, directory, pictures))
    if handles:
        pull.write_back(handles, {row["id"]: row["behaviour"] for row in found["runs"]})
        if found["adapter"] and not found["side_by_side"]:
            pull.mark_best(handles, found["adapter"]["run"])
    for check in found["checks"]:
        if check["passed"] is False:
            print(f"CHECK FAILED: {check['check']}: {check['detail']}", file=sys.stderr)
    if options.refine:
        refine(study, directory)
    print(headline.plain(headline.answer(found)))
    print(f"Report: {directory / 'README.md'} and {directory / 'report.html'}")
    return 0


def merge_into(output: Path | None, directories: list[Path]) -> Path:
    missing = [str(directory) for directory in directories if not directory.is_dir()]
    if missing:
        raise InputError(f"{missing[0]} is no directory: give sweeps alone, or output directories alone")
    if output is None or output.resolve() in [directory.resolve() for directory in directories]:
        raise InputError("several directories are merged into a new one: give it with --output")
    merge(directories, output)
    return output


def refine(study: Study, directory: Path) -> None:
    """Say which sweep to run next, which is among the follow-ups, or why there is none."""
    found = rounds.following(study)
    if found is None:
        print("No refinement: no run has reached an end.")
    elif isinstance(found, Decision):
        print(f"No refinement: {found.why}")
    else:
        path = directory / followups.sweep_file(followups.round_of(study, found)["name"])
        print(f"Next: {found.asked} Its sweep is {path}: wandb sweep {path}")


if __name__ == "__main__":
    sys.exit(main())
