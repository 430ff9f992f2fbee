"""MLflow's own page in a real browser, on a sweep of this tool (`nox -s ui`; needs Debian's `chromium`).

With QLORA_EXP_UI_FOLDER=FOLDER on the newest sweep that ran there; QLORA_EXP_SCREENSHOTS=FOLDER keeps the pictures.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Page, expect

ORDER = ("attributes.`Run Name`", "tags.`sweep.", "metrics.`after/loss`", "metrics.`memory/rss_peak_mib`")
SWEEP = [
    "train", "-m", "model=tiny_llama", "method=lora", "method.r=4,8", "training.max_steps=4", "device=cpu",
    "training.per_device_train_batch_size=2", "dataset.max_train_rows=16", "dataset.max_eval_rows=4",
    "evaluation.generate_rows=2", "evaluation.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if given := os.environ.get("QLORA_EXP_UI_FOLDER"):
        return Path(given).resolve()
    made = tmp_path_factory.mktemp("ui")
    subprocess.run([sys.executable, "-m", "qlora_exp", *SWEEP], cwd=made, check=True)
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The page that `qlora-exp ui` names, once its server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "qlora_exp", "ui", "--port", str(port)]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    yield _answering(server.stdout.readline().strip(), f"http://127.0.0.1:{port}/health")
    server.terminate()
    server.wait(30)


def _answering(page: str, health: str) -> str:
    for _ in range(120):
        try:
            urllib.request.urlopen(health, timeout=5)
        except (URLError, OSError):
            time.sleep(0.5)
        else:
            return page
    raise AssertionError(f"{health} does not answer")


@pytest.fixture
def page(browser, address: str) -> Iterator[Page]:
    """A new visitor's page, at the address; whatever it asks for must be on this machine."""
    context = browser.new_context(viewport={"width": 1900, "height": 1000})
    # MLflow greets a new visitor with its assistant, which covers a third of the page.
    context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    asked: list[str] = []
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    hosts = {urlparse(url).hostname for url in asked if url.startswith("http")}
    context.close()
    assert hosts == {"127.0.0.1"}


def keep(page: Page, name: str) -> None:
    """A picture for the README, if one is wanted."""
    if wanted := os.environ.get("QLORA_EXP_SCREENSHOTS"):
        page.wait_for_timeout(1500)  # animations
        page.screenshot(path=Path(wanted) / f"mlflow_{name}.png")


def column(page: Page, name: str) -> list[str]:
    """The cells of a column of the runs table, from above."""
    cells = page.locator(f'[role="gridcell"][col-id="{name}"]')
    cells.first.wait_for()
    rows = page.evaluate(
        """name => [...document.querySelectorAll(`[role="gridcell"][col-id="${name}"]`)]
               .map(cell => [Number(cell.closest('[row-index]').getAttribute('row-index')), cell.innerText])""",
        name.replace("\\", ""),
    )
    return [text for _, text in sorted(rows)]


def test_page_opens_on_the_newest_sweep_best_first(page: Page):
    losses = [float(text) for text in column(page, "metrics.`after/loss`")]
    assert len(losses) >= 2
    assert losses == sorted(losses)
    keep(page, "runs")
    places = [page.locator(f'[role="columnheader"][col-id^="{name}"]').first.bounding_box() for name in ORDER]
    assert [place["x"] for place in places] == sorted(place["x"] for place in places)
    headings = page.locator('[role="columnheader"]').all_inner_texts()
    page.locator(".ag-center-cols-viewport").evaluate(
        "grid => { grid.scrollLeft = 10000 }"
    )  # only what is seen is there
    page.get_by_role("columnheader", name="Dataset").first.wait_for()
    headings += page.locator('[role="columnheader"]').all_inner_texts()
    for wanted in ("after/loss", "memory/rss_peak_mib", "tokens_per_second", "outcome", "Models", "Dataset"):
        assert wanted in headings
    assert [heading for heading in headings if heading.startswith("sweep.")]
    assert set(column(page, "tags.`outcome`")) == {"ok"}


def test_metric_measured_once_is_drawn_as_a_bar(page: Page):
    jobs = len(column(page, "metrics.`after/loss`"))
    page.goto(f"{page.url}&compareRunsMode=CHART")
    page.reload()
    page.get_by_text("after/loss", exact=True).first.wait_for()
    keep(page, "charts")
    search = page.get_by_placeholder("Search metric charts")
    for metric, drawn in (
        ("after/loss", ".barlayer .point"),
        ("memory/steady", ".barlayer .point"),
        ("train/loss", ".lines"),
    ):
        search.fill(metric)
        page.get_by_text(re.compile(metric)).first.wait_for()
        expect(page.locator(drawn).first).to_be_attached()
        page.wait_for_timeout(1000)
        assert page.locator(drawn).count() >= jobs


def test_two_runs_are_compared_by_what_differs(page: Page):
    column(page, "metrics.`after/loss`")
    boxes = page.locator('[role="gridcell"][col-id="1"] .ag-checkbox-input')
    for job in (0, -1):  # of other configurations
        boxes.nth(job).click()
        page.wait_for_timeout(500)
    page.get_by_test_id("runs-compare-button").click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    expect(page.get_by_text("model.model_name_or_path", exact=True)).to_be_visible()
    page.get_by_role("switch").first.click()
    expect(page.get_by_text("model.model_name_or_path", exact=True)).to_have_count(0)
    assert page.get_by_text(re.compile(r"^(method\.|training\.|seed)")).count() > 0
    keep(page, "compare")


def test_model_page_shows_metrics_dataset_and_run(page: Page):
    column(page, "attributes.`Models`")
    link = page.locator('[role="gridcell"][col-id="attributes.`Models`"] a').first.get_attribute("href")
    page.goto(f"{page.url.partition('#')[0]}{link}")
    page.get_by_text("About this logged model").wait_for()
    for wanted in ("after/loss", "lora_alpha", "model_name_or_path", "Source run"):
        page.get_by_text(wanted, exact=True).first.wait_for()
    page.get_by_text(re.compile("-evaluation")).first.wait_for()
    keep(page, "model")


def test_sweep_unfolds_into_its_jobs_and_has_its_comparison(page: Page, address: str):
    page.get_by_text("Runs", exact=True).first.wait_for()
    page.goto(re.sub(r"&viewStateShareKey=\w+", "", address))
    page.reload()
    before = len(column(page, "attributes.`Run Name`"))
    page.locator('[role="gridcell"][col-id="attributes.`Run Name`"] button').first.click()
    page.wait_for_timeout(2000)
    assert len(column(page, "attributes.`Run Name`")) >= before + 2
    page.locator('[role="gridcell"][col-id="attributes.`Run Name`"] a').first.click()
    page.get_by_text("loss against the baseline").first.wait_for()
    keep(page, "sweep")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(re.compile(r"^comparison_.*\.html$")).first.wait_for()
