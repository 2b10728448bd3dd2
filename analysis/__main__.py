"""Which learning rate, and why: analyse W&B sweeps, or an output directory without a network.

    python -m analysis ENTITY/PROJECT/SWEEP [SWEEP ...] [--output outputs/learning_rate_exploration]
    python -m analysis outputs/learning_rate_exploration [--refine]
    python -m analysis outputs/grid outputs/controls --output outputs/merged

Writes README.md, report.html, the figures, all_results.json, sweeps/*.yaml and, from a sweep, lr_*/run_data.json.
Several sweeps are merged into one report: a sweep, its refinement, and controls, which stand beside the grid.
"""

import argparse
import sys
from pathlib import Path

from analysis import followups, headline, report
from analysis.files import InputError, save, to_json
from analysis.results import results
from analysis.runs import load, merge
from analysis.study import Study, build

OUTPUT = Path("outputs/learning_rate_exploration")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", nargs="+", help="sweeps as ENTITY/PROJECT/SWEEP, or output directories")
    parser.add_argument("--output", type=Path, help=f"where to write (default: {OUTPUT}, or the directory itself)")
    parser.add_argument("--refine", action="store_true", help="also write the next sweep.yaml, and say why")
    options = parser.parse_args(arguments)
    try:
        return analyse(options)
    except InputError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2


def analyse(options: argparse.Namespace) -> int:
    directory, handles = Path(options.source[0]), []
    if not directory.is_dir():
        from analysis import pull  # wandb, which an analysis from files does not need

        directory = options.output or OUTPUT
        save(probe := directory / ".probe", "")  # an output that cannot be written shows before a long pull
        probe.unlink()
        handles = pull.pull(options.source, directory)
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
    """Write the next sweep.yaml into the output directory, or say why there is none."""
    grid, why = followups.refinement_grid(study)
    if not grid:
        print(f"No refinement: {why}.")
        return
    path = directory / "sweep.yaml"
    save(path, followups.to_yaml(followups.config(study, "refinement", learning_rate=grid)))
    print(f"Next: {why}. Rates {followups.labels(grid)} are in {path}: wandb sweep {path}")


if __name__ == "__main__":
    sys.exit(main())
