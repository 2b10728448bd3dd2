"""`report.html`: one file that needs no network, whose curves a real Chromium draws and switches off and on."""

import json
import re
import shutil

import pytest

from analysis import figures, page
from analysis.files import to_json
from analysis.results import results
from analysis.runs import load
from analysis.study import build
from analysis.words import html
from tests.analysis import simulate
from tests.analysis.test_report import NASTY

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


def write(directory, change=None, kinds=None, seeds=2, **options):
    """The page of a simulated sweep, as a file beside its figures."""
    kinds = kinds or simulate.SEED_RATES
    records = [
        simulate.record(kind, rate, seed, **{"planned": 100, "examples": 20} | options)
        for rate, kind in kinds.items()
        for seed in range(seeds)
    ]
    for record in records:
        if change:
            change(record)
    simulate.write(directory, records, [simulate.sweep_of(list(kinds), list(range(seeds)))])
    study = build(*load(directory))
    found = json.loads(to_json(results(study)))
    path = directory / "report.html"
    path.write_text(page.render(study, found, directory, figures.draw(study, directory)), encoding="utf-8")
    return path


def curves(text):
    return json.loads(re.search(r'<script id="curves" type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_is_one_file_of_less_than_5_mb_that_asks_no_network(tmp_path):
    path = write(tmp_path, seeds=3)
    text = path.read_text()
    assert path.stat().st_size < 5_000_000
    assert not re.findall(r"<link|<script[^>]* src=|@import|url\(|src=\"(?!data:)", text)


def test_long_runs_are_thinned_to_what_a_page_can_hold(tmp_path):
    few, many = (curves(write(tmp_path / str(n), planned=2000, seeds=n).read_text()) for n in (1, 4))
    for found in (few, many):
        drawn = sum(len(line["x"]) for chart in found["charts"] for line in chart["lines"] if not line["mean"])
        assert 0 < drawn <= page.VALUES / 2
        assert found["charts"][0]["lines"][0]["x"][-1] == 2000


def test_the_curves_are_those_of_the_runs(tmp_path):
    found = curves(write(tmp_path, kinds={2e-4: "good", 1e-3: "stopped"}, seeds=2).read_text())
    logged = simulate.record("good", 2e-4, 1, planned=100, examples=20)["history"]
    losses = [row["eval/loss"] for row in logged if "eval/loss" in row]
    (line,) = [x for x in found["charts"][0]["lines"] if x["rate"] == 2e-4 and x["seed"] == 1]
    assert line["y"] == pytest.approx(losses, rel=1e-4) and not line["diverged"]
    assert sum(x["diverged"] for x in found["charts"][0]["lines"]) == 2
    assert [x["label"] for x in found["rates"]] == ["2e-4", "1e-3"]
    assert found["rates"][0]["colour"] == figures.colour(2e-4)


def test_the_page_has_the_numbers_of_the_readme(tmp_path):
    from analysis import report

    text = write(tmp_path).read_text()
    study = build(*load(tmp_path))
    context = report.context(json.loads(to_json(results(study))), tmp_path, [])
    assert all(html(cell) in text for row in context["rates"].rows for cell in row)
    assert all(html(line) in text for line in context["limits"])
    assert html("[2e-4](a/2e-4.yaml)") == '<a href="a/2e-4.yaml"><span class="whole">2e-4</span></a>'


def test_no_value_of_a_run_is_markup_in_the_page(tmp_path):
    def poison(record):
        record["name"] = record["state"] = NASTY
        record["id"] += NASTY
        record["config"] |= dict.fromkeys(
            ("model_name_or_path", "dataset_name", "hardware", "lr_scheduler_type"), NASTY
        )
        record["files"]["generations.json"] = [{"prompt": NASTY, "reference": NASTY, "completion": NASTY}]

    text = write(tmp_path, poison).read_text()
    body = text[: text.index('<script id="curves"')]
    assert body.count("alert(1)") > 10
    for markup in ("<script>alert", "<b\n", "http://e.vil", 'href="http', "<img src=//"):
        assert markup not in body


def test_a_sweep_without_rates_is_a_page(tmp_path):
    text = write(tmp_path, lambda record: record["config"].update(learning_rate="fast"), seeds=1).read_text()
    assert "no learning rate can be named" in text and 'id="charts"' not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_curves_are_drawn_from_a_file_and_switched_off_and_on(browser, tmp_path):
    browser.execute_cdp_cmd("Network.enable", {})
    browser.get(write(tmp_path).as_uri())
    drawn = "return document.querySelectorAll('.live .plot .main-svg .xy').length"
    WebDriverWait(browser, 30).until(lambda page: page.execute_script(drawn) >= 6)
    traces = "return document.querySelectorAll('#plot0 .scatterlayer .trace').length"
    before = browser.execute_script(traces)
    button = browser.find_element(By.CSS_SELECTOR, "#controls button[data-rate='0.001']")
    button.click()
    WebDriverWait(browser, 10).until(lambda page: page.execute_script(traces) < before)
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    WebDriverWait(browser, 10).until(lambda page: page.execute_script(traces) == before)
    phone = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    width = "return document.documentElement.scrollWidth"
    WebDriverWait(browser, 10).until(lambda page: page.execute_script(width) <= 360)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = {name: browser.find_element(By.CLASS_NAME, name).is_displayed() for name in ("paper", "screen")}
    assert shown == {"paper": True, "screen": False}
    assert (
        browser.find_element(By.ID, "still").is_displayed() and not browser.find_element(By.ID, "charts").is_displayed()
    )


def test_one_rate_has_no_charts_and_buttons_that_compare(browser, tmp_path):
    browser.get(write(tmp_path, kinds={2e-4: "good"}, seeds=1).as_uri())
    last = "return document.querySelectorAll('.live #plot3 .ytick').length"
    WebDriverWait(browser, 30).until(lambda page: page.execute_script(last))
    texts = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    titles = browser.execute_script(texts, "figcaption")
    assert titles == ["Eval loss", "Train loss, smoothed", "Gradient norm, smoothed", "Size of the update, ‖ΔW‖/‖W‖"]
    assert browser.execute_script(texts, "#controls button") == ["whole eval loss"]
    assert (
        len(browser.execute_script(texts, "#plot2 .ytick")) > 2
    )  # a norm that stays within a decade is still read off


def test_a_diverged_rate_is_on_the_chart_of_costs_though_its_last_loss_was_low(browser, tmp_path):
    path = write(tmp_path, kinds={2e-4: "good", 5e-3: "stopped"})
    assert [(x["diverged"], x["ended"]) for x in curves(path.read_text())["costs"]] == [(False, True), (True, False)]
    browser.get(path.as_uri())
    points = "return document.querySelectorAll('#plot1 .scatterlayer .point').length"
    WebDriverWait(browser, 30).until(lambda page: page.execute_script(points) == 2)


def test_charts_without_data_are_not_drawn(browser, tmp_path):
    def train_loss_only(record):
        keep = {"_step", "_timestamp", "train/global_step", "train/loss"}
        record["history"] = [{key: row[key] for key in row if key in keep} for row in record["history"]]
        record["files"] = {}

    browser.get(write(tmp_path, train_loss_only, kinds={2e-4: "good", 1e-3: "suboptimal"}).as_uri())
    WebDriverWait(browser, 30).until(
        lambda page: page.execute_script("return document.querySelectorAll('.live .plot .xy').length") > 0
    )
    titles = "return [...document.querySelectorAll('#charts figcaption')].map((one) => one.textContent)"
    assert browser.execute_script(titles) == ["Train loss, smoothed"]


def test_rates_of_many_digits_are_the_same_in_every_chart(tmp_path):
    """The results have 7 digits, a rate that a sweep draws has 17."""
    rates = {1e-5 * 1.9**k: "good" for k in range(3)}
    folder = simulate.study(tmp_path / "study", rates=rates)
    study = build(*load(folder))
    drawn = json.loads(json.dumps(page.curves(study, results(study))))
    known = {entry["rate"] for entry in drawn["rates"]}
    assert len(known) == 3
    assert {cost["rate"] for cost in drawn["costs"]} == known
    assert {line["rate"] for chart in drawn["charts"] for line in chart["lines"]} == known
