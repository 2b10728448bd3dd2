"""The page in a real, headless Chromium, on a sweep logged by the real client."""

import json
import math
import shutil

import httpx
import pytest
import wandb

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

HOSTILE = "<b>bold</b>&lt;i&gt;<img src=x onerror=\"document.title='owned'\">"
RATES = {1e-5: None, 2e-4: None, 5e-3: 12}  # rate -> step at which it diverges


@pytest.fixture(scope="module")
def sweep(server):
    """The address of a sweep of three finished runs, one of them diverged; names and verdicts try to be HTML."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            if name.startswith("WANDB_"):
                patch.setenv(name, value)
        wandb.teardown()
        config = {"method": "grid", "name": HOSTILE, "parameters": {"learning_rate": {"values": list(RATES)}}}
        sid = wandb.sweep(config, project="page", entity="local")
        for i, (rate, diverges) in enumerate(RATES.items()):
            with log(f"page{i}", sid, rate, HOSTILE if i == 0 else f"lr={rate:g}") as run:
                for step in range(121):
                    loss = 4 - rate * 100 * step if diverges is None or step < diverges else math.nan
                    row = {"train/global_step": step, "train/loss": loss, "train/grad_norm": 1 + step}
                    if step % 10 == 0:
                        row |= {"eval/loss": loss, "eval/update_ratio": rate * step}
                    run.log(row)
                run.summary["behavior"] = HOSTILE if i == 0 else "stable"
                if diverges:
                    run.summary["diverged_at_step"] = diverges
                run.alert(HOSTILE, HOSTILE) if i == 0 else None
        wandb.teardown()
    return f"{server.url}/local/page/sweeps/{sid}"


def log(run: str, sweep: str, rate: float, name: str):
    return wandb.init(
        project="page", entity="local", id=run, name=name, reinit="create_new",
        settings=wandb.Settings(sweep_id=sweep, console="off"),
        config={"learning_rate": rate, "seed": 0, "max_steps": 120, "note": HOSTILE},
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    """A Chromium that has opened the address the server printed, so it holds the cookie."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1300,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.get(server.page)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, sweep):
    """The sweep's page, drawn. Nothing it does may leave a line in the browser's console (a CSP breach does)."""
    browser.get_log("browser")
    browser.get(sweep)
    wait(browser, "return document.querySelectorAll('#runs tbody tr').length === 3")
    yield browser
    assert browser.get_log("browser") == []


def wait(browser, condition: str):
    return WebDriverWait(browser, 20).until(lambda b: b.execute_script(condition))


def cells(browser, column: int) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, f"#runs tbody td:nth-child({column})")]


def test_from_the_start_page_to_the_sweep(page, server, sweep):
    page.get(server.url)
    page.find_element(By.LINK_TEXT, "local/page").click()
    assert page.find_elements(By.CSS_SELECTOR, f"a[href='{httpx.URL(sweep).path}']")
    page.find_element(By.PARTIAL_LINK_TEXT, "<img").click()
    assert page.current_url == sweep


def test_the_table_has_every_run(page):
    assert cells(page, 2) == ["1e-5", "2e-4", "5e-3"]
    assert cells(page, 3) == ["0"] * 3 and cells(page, 4) == ["finished"] * 3 and cells(page, 5) == ["120 / 120"] * 3
    assert cells(page, 6) == ["3.88", "1.6", "-1"] and cells(page, 7) == ["3.88", "1.6", "-1"]
    assert cells(page, 8)[1:] == ["stable", "✗ diverged at step 12 · stable"]


def test_hostile_text_stays_text(page):
    assert (
        page.title.startswith("Sweep <b>bold</b>&lt;i&gt;<img")
        and page.execute_script("return document.images.length") == 0
    )
    assert (cells(page, 1)[0], cells(page, 8)[0]) == (HOSTILE, HOSTILE)
    page.execute_script("Plotly.Fx.hover('chart-rates', [{curveNumber: 0, pointNumber: 0}])")
    assert "<b>bold</b>&lt;i&gt;" in wait(page, "return document.querySelector('#chart-rates .hoverlayer').textContent")
    assert page.execute_script("return document.querySelectorAll('#charts img, #charts b, #alerts b').length") == 0
    assert HOSTILE in page.find_element(By.ID, "alerts").text


def test_charts_have_a_colour_per_rate_and_a_cross_where_a_run_diverged(page):
    drawn = """return document.getElementById(arguments[0]).data.map(
        trace => [trace.x, trace.line?.color ?? null, trace.marker.symbol ?? null])"""
    for column in ("train/loss", "eval/loss", "train/grad_norm", "eval/update_ratio"):
        curves = page.execute_script(drawn, f"chart-{column}")
        assert len({colour for _, colour, _ in curves if colour}) == 3
        assert [x for x, _, symbol in curves if symbol == "x"] == [[12]]
    u = page.execute_script("return document.getElementById('chart-rates').data.map(t => [t.x, t.y])")
    assert u[0] == [[1e-5, 2e-4], [3.88, 1.6]] and u[1][0] == [5e-3]


def test_hover_is_linked(page):
    page.execute_script("""
        const plot = document.getElementById("chart-train/loss");
        plot.emit("plotly_hover", {xvals: [20], points: []});""")
    assert (
        wait(page, "return document.querySelectorAll('[id=\"chart-train/grad_norm\"] .hoverlayer .hovertext').length")
        >= 2
    )


def test_sort_hide_and_redraw_by_keyboard(page):
    header = page.find_element(By.CSS_SELECTOR, "[data-key='sort last']")
    header.send_keys(Keys.ENTER)
    assert cells(page, 6) == ["-1", "1.6", "3.88"]
    assert page.switch_to.active_element.get_attribute("data-key") == "sort last"  # focus outlives the redraw
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert cells(page, 6) == ["3.88", "1.6", "-1"]
    assert page.find_element(By.CSS_SELECTOR, "th[aria-sort=descending]").text.startswith("Last eval loss")

    count = "return document.getElementById('chart-train/loss').data.length"
    assert page.execute_script(count) == 4
    page.find_element(By.CSS_SELECTOR, "#rates button:nth-child(3)").send_keys(Keys.SPACE)
    assert page.execute_script(count) == 2  # the diverged curve and its cross are gone
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "false"

    page.find_element(By.ID, "smoothing").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    opacities = page.execute_script("return document.getElementById('chart-train/loss').data.map(t => t.opacity ?? 1)")
    assert opacities == [0.25, 1, 0.25, 1]  # raw, faint, behind each smoothed curve
    page.find_element(By.ID, "logy").send_keys(Keys.SPACE)
    axis = "return document.getElementById('chart-train/loss').layout.yaxis.type"
    assert page.execute_script(axis) == "log"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_both_schemes(page, scheme, sweep):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.get(sweep)
    wait(page, "return document.querySelectorAll('#runs tbody tr').length === 3")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390  # no sideways scrolling
    paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    ink = page.execute_script("return document.getElementById('chart-eval/loss').layout.font.color")
    assert (paper, ink) == {"light": ("rgb(255, 255, 255)", "#1c1f24"), "dark": ("rgb(20, 23, 28)", "#e8eaee")}[scheme]
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_follows_a_live_run(browser, server, sweep, api):
    sid = sweep.rpartition("/")[2]
    run = log("page-live", sid, 1e-3, "live")
    run.log({"train/global_step": 0, "train/loss": 4.0})
    browser.get(sweep)
    wait(browser, "return document.querySelectorAll('#runs tbody tr').length === 4")
    assert wait(browser, "return page.runs.some((run) => run.id === 'page-live' && run.step === 0)")
    assert browser.find_element(By.ID, "left").text == ""  # nobody knows yet
    browser.execute_script("window.same = true")
    run.log({"train/global_step": 60, "train/loss": 3.0})  # half of it since the page was opened
    assert wait(browser, r"return /^about \d+ (s|min) left$/.test(document.getElementById('left').textContent)")
    run.finish()
    handle = wandb.Api().run("local/page/page-live")
    handle.summary.update({"behavior": "stable, good"})  # as the analysis says it once a run has ended
    assert wait(browser, "return document.getElementById('run-page-live').textContent.includes('stable, good')")
    assert wait(browser, "return document.getElementById('run-page-live').textContent.includes('finished')")
    points = (
        "return document.getElementById('chart-train/loss').data.filter(t => t.name.startsWith('1e-3 ')).map(t => t.y)"
    )
    assert browser.execute_script(points) == [[4, 3]] and browser.execute_script("return window.same")
    assert browser.find_element(By.ID, "left").text == ""
    handle.delete()


def test_one_run_has_a_page(browser, server, sweep):
    browser.get(f"{server.url}/local/page/runs/page1")
    wait(browser, "return document.querySelectorAll('#runs tbody tr').length === 1")
    assert cells(browser, 2) == ["2e-4"]


def test_the_page_of_one_run_shows_hostile_config_and_console_as_text(browser, server, sweep):
    stream = f"{server.url}/files/local/page/page1/file_stream"
    body = {"files": {"output.log": {"offset": 0, "content": [f"2026-01-01T00:00:00 {HOSTILE}"]}}, "complete": True}
    assert httpx.post(stream, auth=("api", server.key), json=body).status_code == 200
    browser.get(f"{server.url}/local/page/runs/page1")
    text = browser.find_element(By.TAG_NAME, "main").text
    assert json.dumps(HOSTILE) in text and f"2026-01-01T00:00:00 {HOSTILE}" in text
    assert browser.execute_script("return document.images.length") == 0 and browser.title == "Run lr=0.0002"
    address = browser.find_element(By.LINK_TEXT, "config.yaml").get_attribute("href")
    assert "learning_rate" in httpx.get(address).text


def test_only_new_points_are_sent(server, sweep):
    def points(after: dict) -> int:
        answer = httpx.post(f"{sweep}/data", auth=("api", server.key), content=json.dumps(after)).json()
        return sum(len(run["points"]["train/loss"]) for run in answer["runs"] if run["id"] == "page0")

    assert (points({}), points({"page0": 118}), points({"page0": 120})) == (121, 2, 0)
