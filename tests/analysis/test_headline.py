"""The headline's words, number by number: what a rate costs, how long to train, what is left open."""

import pytest

from analysis import headline
from analysis.words import rate_label

PRICED = {
    "learning_rate": 1e-3, "n": 3, "diverged": 0, "behaviours": {"stable": 3}, "basin": {"verdict": "out"},
    "last_eval": {"mean": 3.0}, "cut_off": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("end", "best", "changes", "words"),
    [
        (0.05, 0.05, {}, "costs 0.05"),
        (0.0099, 0.01, {}, "costs 0.010"),
        (0.25, 0.235, {}, "costs 0.25"),  # a rebound of less than a tenth of the price
        (0.25, 0.22, {}, "costs 0.22 at its best checkpoint and 0.25 at the end"),
        (0.02, 0.004, {}, "costs nothing at its best checkpoint and 0.02 at the end"),
        (0.02, 0.011, {}, "costs 0.02"),  # a rebound of less than 0.01 nats
        (0.05, None, {}, "costs 0.05"),
        (0.25, 0.22, {"basin": {"verdict": "undecided"}},
         "costs 0.22 at its best checkpoint and 0.25 at the end (95 % [0.15, 0.35])"),
        (0.05, 0.05, {"basin": {"verdict": "undecided"}}, "costs 0.05 (95 % [-0.05, 0.15])"),
        (0.05, 0.05, {"behaviours": {"slow": 2}}, "costs 0.05, still falling"),
        (0.05, 0.05, {"behaviours": {"slow": 1}, "n": 2}, "costs 0.05"),
        (None, None, {}, "reached no end"),
        (None, None, {"diverged": 2}, "diverged in 2 of 3 runs"),
        (None, None, {"diverged": 1, "n": 1}, "diverged"),
        (None, None, {"diverged": 2, "last_eval": {"mean": 4.0}}, "ends worse than untrained (4.00 against 4.00)"),
        (None, None, {"diverged": 2, "last_eval": {"mean": None}}, "diverged in 2 of 3 runs"),
        (None, None, {"diverged": 2, "last_eval": {"mean": 5.0}, "cut_off": 7},
         "was worse than untrained when cut off at step 7 (5.00 against 4.00)"),
    ],
)  # fmt: skip
def test_the_price_of_a_rate_in_words(end, best, changes, words):
    end = None if end is None else {"mean": end, "interval": [end - 0.1, end + 0.1]}
    best = None if best is None else {"mean": best}
    found = headline.cost({"base_loss": 4.0, "runs": []}, PRICED | {"difference": {"end": end, "best": best}} | changes)
    assert found == f"1e-3 {words}"


ADVICE = {
    "rate": 2e-4, "tied": [4e-4], "falling": [0.0, 0.0], "end": 2.71, "low": 2.68, "low_step": 60, "end_step": 100,
    "low_passes": 0.6, "rise": None, "stop": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "for all 100 steps (2.71, flat over the last quarter)"),
        ({"falling": [0.0149, 0.0]}, "for all 100 steps (2.71, flat over the last quarter)"),
        ({"falling": [0.015, 0.0]}, "(2.71; 4e-4 flat, 2e-4 still falling by 0.01 over the last quarter)"),
        ({"falling": [0.015, 0.03]}, "for all 100 steps (2.71, still falling: 0.03 over the last quarter)"),
        ({"rise": {"mean": 0.0099}}, "for all 100 steps (2.71, flat over the last quarter)"),
        ({"rise": {"mean": 0.01}}, "the rest gains nothing (2.68 and 2.71, not told apart)"),
        ({"rise": {"mean": 0.01}, "falling": [0.0, 0.02]}, "apart, 4e-4 still falling by 0.02 over the last quarter)"),
        ({"rise": {"mean": 0.01}, "falling": [0.02, 0.0]}, "(2.71; 4e-4 flat, 2e-4 still falling by 0.02"),
        ({"stop": True, "low_passes": 0.49}, "and stop at step 60 of 100 (step 60: 2.68; step 100: 2.71)"),
        ({"stop": True, "low_passes": 0.5}, "for about 0.5 passes over the data (step 60"),
        ({"stop": True, "low_passes": 0.89}, "for about 0.9 passes over"),
        ({"stop": True, "low_passes": 0.91}, "for about one pass over"),
        ({"stop": True, "low_passes": 1.11}, "for about 1.1 passes over"),
        ({"stop": True, "falling": [0.0, 0.02]}, "step 100: 2.71, 4e-4 still falling by 0.02 over the last quarter)"),
    ],
)
def test_how_long_to_train_in_words(changes, words):
    assert words in headline.when({"basin": {"width": 0.03}}, ADVICE | changes)


def priced(rate: float, n: int = 2, verdict: str = "in", excess: float = 0.01, **behaviours: int) -> dict:
    basin = {"verdict": verdict, "excess": excess}
    return {
        "learning_rate": rate,
        "n": n,
        "final_eval": {"n": n},
        "basin": basin,
        "behaviours": behaviours,
        "difference": {"end": {"mean": 1.0}},
    }


def test_which_rates_do_as_well_and_how_unsteady_they_were():
    rows = [priced(1e-4), priced(2e-4, 3, "undecided", 0.02, unstable=1), priced(4e-4, 3, unstable=2), priced(8e-4)]
    r = {"rates": rows, "best_rate": 4e-4, "basin": {"width": 0.03}, "seeds": 3}

    def advice(*rates):
        return {"rate": rates[0], "tied": list(rates[1:])}

    assert headline.to_use(r, advice(4e-4)) == "4e-4" and headline.to_use(r, advice(4e-4, 2e-4)) == "4e-4 or 2e-4"
    assert headline.to_use(r, advice(4e-4, 1e-4, 2e-4)) == "4e-4 (all from 1e-4 to 4e-4 do as well)"
    assert headline.to_use(r, advice(4e-4, 1e-4, 8e-4)) == "4e-4 (1e-4 and 8e-4 do as well)"
    assert headline.ties(r, advice(4e-4)) == []
    assert headline.ties(r, advice(4e-4, 8e-4)) == ["8e-4 ends 0.010 above 4e-4, less than matters here (0.030)."]
    assert headline.ties(r, advice(1e-4, 2e-4, 4e-4)) == [
        "They end within 0.020 of 4e-4, less than matters here (0.030), though two to three seeds do not settle it; of "
        "those within 0.007 of it 1e-4 is the lowest, so the safest."
    ]
    for used, said in (
        (advice(8e-4), []),
        (advice(4e-4, 8e-4), ["4e-4 was unstable in 2 of 3 runs: prefer 8e-4."]),
        (advice(4e-4, 2e-4), ["2e-4 and 4e-4 were unstable in at least one run."]),
    ):
        assert headline.unsteady(r, used) == said
    assert headline.unsteady(r | {"seeds": 1}, advice(4e-4)) == ["4e-4 was unstable."]
    assert [headline.seeds_do(x) for x in ({1}, {2}, {1, 3})] == [
        "one seed does",
        "two seeds do",
        "one to three seeds do",
    ]


def test_what_is_left_open_names_the_rates_and_their_seeds():
    r = {"best_rate": 2e-4, "advice": {"rate": 2e-4, "tied": []}, "basin": {"width": 0.03, "seed_sd": None}, "seeds": 2}

    def said(*rows, seeds=2):
        return headline.left_open(r | {"rates": [priced(2e-4), *rows], "seeds": seeds})

    assert said(priced(1e-3)) == [] and said(priced(1e-3), seeds=1) == ["One seed: how much seeds vary is unknown."]
    one, other = priced(1e-3, 2, "undecided"), priced(1e-4, 3, "undecided")
    assert said(one) == ["Two seeds do not settle whether 1e-3 costs more than matters (0.030)."]
    assert said(other) == ["At 1e-4 three seeds do not settle whether it costs more than matters (0.030)."]
    assert said(one, other) == [
        "At 1e-4 and 1e-3 two to three seeds do not settle whether they cost more than matters (0.030)."
    ]
    assert said(priced(1e-3, 1, "undecided"), seeds=1) == [
        "One seed does not settle whether 1e-3 costs more than matters (0.030), nor how much seeds vary."
    ]
    assert said(one | {"difference": {"end": None}}) == []


def test_the_margin_is_the_largest_of_three():
    for best, sd, said in ((0.5, None, "0.01 nats"), (2.0, 0.0, "1 % of"), (2.0, 0.02, "2 standard deviations")):
        assert headline.margin_of({"best_loss": best, "basin": {"seed_sd": sd}}).startswith(said)


@pytest.mark.parametrize(
    ("used", "names"),
    [([3e-4], ["4e-4", "5e-4", "2e-4", "1e-4"]), ([1e-4, 2e-4, 3e-4], ["4e-4", "5e-4"]), ([5e-4], ["4e-4", "1e-4"]),
     ([2e-4, 3e-4, 4e-4], ["5e-4", "1e-4"])],
)  # fmt: skip
def test_on_each_side_the_next_and_the_outermost_are_named(used, names):
    rows = [{"learning_rate": rate} for rate in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)]
    r = {"rates": rows, "best_rate": used[0], "advice": {"rate": used[0], "tied": used[1:]}}
    found = [rate_label(row["learning_rate"]) for side in headline.either_side(r) for row in side]
    assert found == names
