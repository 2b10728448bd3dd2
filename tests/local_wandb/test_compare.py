"""The page of a project, its runs' media and its artifacts, in a browser, on what the real client logged."""

import json

import httpx
import pytest
import wandb
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from test_page import HOSTILE, browser, cells, wait  # noqa: F401
from test_sweeps import Agent
from test_sweeps import start as log_run

numpy = pytest.importorskip("numpy")
ROWS = "return document.querySelectorAll('#runs tbody tr').length"


@pytest.fixture(scope="module")
def project(server, tmp_path_factory):
    """The address of a project of 60 runs, the first with media and an artifact."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            if name.startswith("WANDB_"):
                patch.setenv(name, value)
        patch.chdir(tmp_path_factory.mktemp("compare"))
        wandb.teardown()
        for i in range(3):
            with wandb.init(
                project="compare", entity="local", id=f"logged{i}", name=f"{HOSTILE} {i}", reinit="create_new",
                config={"lr": 10.0**-i, "opt": "sgd" if i else "adam"}, settings=wandb.Settings(console="off"),
            ) as run:  # fmt: skip
                for step in range(5):
                    run.log({"loss": (i + 1) / (step + 1)})
                if i == 0:
                    run.log({
                        "picture": wandb.Image(numpy.zeros((4, 4, 3), dtype="uint8"), caption=HOSTILE),
                        "table": wandb.Table(columns=["x", HOSTILE], data=[[1, HOSTILE]]),
                        "html": wandb.Html(f"<p>seen</p><script>parent.document.title = 'owned'</script>{HOSTILE}"),
                    })  # fmt: skip
                    artifact = wandb.Artifact("data", "dataset", metadata={"note": HOSTILE})
                    with artifact.new_file("one.txt") as file:
                        file.write("one")
                    run.log_artifact(artifact).wait()
        wandb.teardown()
    create = """mutation ($n: String) {
      upsertBucket(input: {name: $n, modelName: "compare", state: "finished"}) { inserted } }"""
    with httpx.Client(base_url=server.url, auth=("api", server.key)) as http:
        for i in range(57):
            http.post("/graphql", json={"query": create, "variables": {"n": f"plain{i:02}"}}).raise_for_status()
    return f"{server.url}/local/compare"


@pytest.fixture
def page(browser, project):  # noqa: F811
    browser.get_log("browser")
    browser.get(project)
    wait(browser, f"{ROWS} === 50")
    yield browser
    assert browser.get_log("browser") == []


def test_search_filter_sort_and_pages(page):
    assert page.find_element(By.ID, "status").text == "60 of 60 runs"
    page.find_element(By.XPATH, "//button[text()='next page →']").send_keys(Keys.ENTER)
    wait(page, f"{ROWS} === 10")
    page.find_element(By.ID, "search").send_keys("logged")
    wait(page, f"{ROWS} === 3")
    assert HOSTILE in cells(page, 1)[0] and page.execute_script("return document.images.length") == 0
    page.find_element(By.CSS_SELECTOR, "[data-key='sort config.lr']").send_keys(Keys.ENTER)
    wait(page, "return document.querySelector('th[aria-sort=descending]')?.textContent.startsWith('lr')")
    assert cells(page, 5) == ["1", "0.1", "0.01"]
    page.find_element(By.ID, "filter").send_keys('{"config.opt": "sgd"}')
    wait(page, f"{ROWS} === 2")
    page.find_element(By.ID, "filter").send_keys("}")
    wait(page, "return document.getElementById('status').textContent.startsWith('the filter is not JSON')")


def choose(page, select: str, value: str) -> None:
    Select(page.find_element(By.ID, select)).select_by_value(value)


def test_groups_columns_and_curves(page):
    page.find_element(By.ID, "search").send_keys("logged")
    wait(page, f"{ROWS} === 3")
    page.find_element(By.CSS_SELECTOR, "[data-key='draw logged0']").send_keys(Keys.SPACE)
    choose(page, "metric", "loss")
    wait(page, "return document.getElementById('chart').data?.length === 1")
    assert page.execute_script("return document.getElementById('chart').data[0].y") == [1, 0.5, 1 / 3, 0.25, 0.2]
    page.find_element(By.CSS_SELECTOR, "#columns summary").click()
    page.find_element(By.CSS_SELECTOR, "[data-key='column config.lr']").send_keys(Keys.SPACE)
    wait(page, "return ![...document.querySelectorAll('#runs th')].some((th) => th.textContent === 'lr')")
    choose(page, "group", "config.opt")
    wait(page, f"{ROWS} === 2")
    found = dict(zip(cells(page, 1), zip(cells(page, 2), cells(page, 4), strict=True), strict=True))
    assert found == {"adam": ("1", "0.2 (n=1)"), "sgd": ("2", "0.5 ± 0.14142 (n=2)")}


def test_media_and_artifacts_have_a_page(page, project, api):
    page.get(f"{project}/runs/logged0/overview")
    wait(page, "return document.images.length === 1 && document.images[0].complete && document.images[0].naturalWidth")
    assert page.execute_script("return document.images[0].alt") == HOSTILE
    assert page.title.startswith("Run <b>")
    assert page.execute_script("return document.querySelectorAll('main b').length") == 0
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, ".gallery table").text
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, ".gallery iframe"))
    assert "seen" in page.find_element(By.TAG_NAME, "body").text
    page.switch_to.default_content()
    assert page.title.startswith("Run <b>")
    page.find_element(By.LINK_TEXT, "data:v0").click()
    assert page.current_url == api.artifact("local/compare/data:v0").url
    assert page.title == "Artifact data:v0" and json.dumps(HOSTILE) in page.find_element(By.TAG_NAME, "main").text
    assert httpx.get(page.find_element(By.LINK_TEXT, "one.txt").get_attribute("href")).text == "one"
    page.get_log("browser")  # what the sandbox kept from running


@pytest.mark.parametrize("tab", ["", "/workspace", "/table", "/runs", "/sweeps", "/artifacts", "/runs/logged0/files"])
def test_the_addresses_that_the_client_prints(server, project, tab):
    assert httpx.get(f"{server.url}/local", auth=("api", server.key)).status_code == 200
    assert httpx.get(project + tab, auth=("api", server.key)).status_code == 200


def test_a_sweep_of_several_parameters_shows_which_matters(browser, server, api):  # noqa: F811
    grid = {"method": "grid", "metric": {"name": "loss"}, "parameters": {
        "lr": {"values": [0.001, 0.1]}, "opt": {"values": ["adam", "sgd"]}
    }}  # fmt: skip
    sid = wandb.sweep(grid, project="agents", entity="local")
    agent = Agent(api, sid)
    for _ in range(4):
        (command,) = agent.beat()
        point = command["args"]
        with log_run(command["run_id"], sid) as run:
            run.log({"loss": point["lr"]["value"]})
    browser.get(f"{server.url}/local/agents/sweeps/{sid}")
    wait(browser, "return document.querySelectorAll('#importance tbody tr').length === 2")
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#importance tbody tr")]
    assert rows == ["lr 1 1 4", "opt 0 4"]  # all of the variance lies between the rates, none between the optimizers
    assert browser.execute_script("return document.getElementById('parallel').data.length") == 4
    assert browser.execute_script("return document.getElementById('chart-loss').data.length") == 4
