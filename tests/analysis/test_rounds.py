"""The rounds of a search, found again in the sweeps, and the story that the report makes of them."""

import pytest

from analysis import followups, headline, questions, report, rounds, study
from analysis.files import number
from analysis.refinement import Decision, Round
from analysis.results import results
from analysis.runs import read_run
from tests.analysis import simulate

GRID = {1e-4: 0.5, 5e-4: 0.1, 2e-3: 0.2}  # rate -> nats above the lowest


def records(losses: dict[float, float], seeds=(0,), sweep: str = "sw1") -> list[dict]:
    return [
        simulate.record("good", rate, seed, 100, examples=20, sweep=sweep, shift=shift)
        for rate, shift in losses.items()
        for seed in seeds
    ]


def round_of(number: int, losses: dict[float, float], asked: str, seeds=(0,)) -> tuple[dict, list[dict]]:
    sweep = simulate.sweep_of(list(losses), list(seeds), f"id{number}")
    sweep["config"] |= {"name": f"round-{number}", "description": asked}
    return sweep, records(losses, seeds, f"id{number}")


def searched(*rounds: tuple[dict, list[dict]]) -> study.Study:
    sweeps, runs = [simulate.sweep_of(list(GRID), [0])], records(GRID)
    for sweep, more in reversed(rounds):  # in whatever order they are pulled
        sweeps, runs = [*sweeps, sweep], [*runs, *more]
    return study.build(sweeps, [read_run(run) for run in runs])


FIRST = round_of(1, {2.5e-4: 0.2, 1e-3: 0.0}, "Is 2.5e-4 or 1e-3 better than 5e-4?")
SECOND = round_of(2, {5e-4: 0.1, 1e-3: 0.0}, "Over more seeds, is 1e-3 or 5e-4 best?", (1, 2))


def test_a_grid_alone_has_no_story():
    assert rounds.story(searched()) is None
    found = results(searched())
    assert report.search(found) == "" and "Run or not" not in headline.answer(found)


def test_the_story_of_two_rounds():
    found = results(searched(FIRST, SECOND))
    grid, first, second = found["search"]["rounds"]
    assert (grid["name"], grid["runs"], grid["rate"]) == ("grid", 3, 5e-4)
    assert first["asked"] == "Is 2.5e-4 or 1e-3 better than 5e-4?" and first["rate"] == 1e-3
    assert (second["name"], second["rates"], second["seeds"], second["runs"]) == ("round-2", [5e-4, 1e-3], [1, 2], 4)
    words = report.search(found)
    assert "6 runs in 2 rounds" in words and "It stopped: every other rate is worse by clearly more than" in words
    assert found["seeds"] == 3  # of the one rate that is left


def test_the_report_places_the_best_rate_where_the_search_does():
    found = results(searched(FIRST, SECOND))
    assert found["optimum"]["interval"] == found["search"]["rounds"][-1]["interval"]
    low, high = map(number, found["optimum"]["interval"])
    assert low < found["best_rate"] < high
    assert "Run or not, the best of all rates lies in [" in headline.answer(found)
    words = questions.optimum(found)
    assert "The best rate lies at about " in words and "through five rates" in words


def test_what_is_left_of_the_budget():
    assert [rounds.budget_left(searched(*some), None) for some in ((), (FIRST,), (FIRST, SECOND))] == [3, 1, -3]
    assert rounds.budget_left(searched(FIRST), 12) == 10
    sweep, runs = FIRST
    begun_anew = [simulate.record("cut", 1e-3, 0, 100, examples=20, sweep=sweep["id"]), *runs]
    begun_anew[0] |= {"id": "killed", "state": "crashed"}
    assert len(searched((sweep, begun_anew)).runs) == 6 and rounds.budget_left(searched((sweep, begun_anew)), 12) == 10


def test_the_next_round_is_a_sweep_and_a_follow_up():
    known = searched()
    found = rounds.following(known, 1)
    assert isinstance(found, Round) and len(found.rates) * len(found.seeds) == 1
    (follow,) = (f for f in results(known)["follow_ups"] if f["name"] == "round-1")
    assert follow["file"] == "sweeps/round-1.yaml" and follow["why"] == "5e-4 is the rate to use so far"
    assert followups.round_of(searched(FIRST), found)["name"] == "round-2"
    assert isinstance(rounds.following(searched(FIRST), 0), Decision)


@pytest.mark.parametrize("name", ["round-", "round-1b", "a round-1", None])
def test_another_sweep_is_no_round(name):
    assert rounds.number_of({"config": {"name": name}}) is None


def test_where_nothing_ended_nothing_follows():
    cut = [read_run(simulate.record("cut", 2e-4, planned=100, examples=20))]
    assert rounds.following(study.build([simulate.sweep_of([2e-4], [0])], cut)) is None
