"""The page of a comparison in a real browser (`nox -s ui`; needs Debian's `chromium`).

QLORA_EXP_SCREENSHOTS=FOLDER keeps pictures of it, 1400 and 400 pixels wide.
"""

import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.past_runs import answer, recorded
from playwright.sync_api import Browser, Page, expect

from qlora_exp.results import report
from qlora_exp.results.compare import compare

HOSTILE = "$x^$ </script><img src=http://evil.test/x onerror=alert(1)><b>bold</b><a href='//evil.test'>link</a> %{x}"
WORDS = [
    "the", "adapter", "learns", "low", "rank", "updates", "of", "frozen", "weights", "in", "four", "bits", "while",
    "memory", "stays", "small", "and", "the", "loss", "falls",
]  # fmt: skip


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def sweep(methods, ranks, alphas, seeds, items, answers, points):
    """Runs of a sweep over method, r and alpha, which nobody trained."""
    rng = random.Random(0)
    prompts = [sentence(rng, rng.randint(8, 40)).capitalize() + "?" for _ in range(answers)]
    items_loss = [rng.gauss(2.6, 0.5) for _ in range(items)]
    runs = []
    for place, method in enumerate(methods):
        for r in ranks:
            for alpha in alphas:
                for seed in seeds:
                    shift = 0.06 * place - 0.05 * math.log2(r) + 0.01 * abs(math.log2(alpha / r)) + rng.gauss(0, 0.004)
                    losses = [loss + shift + rng.gauss(0, 0.05) for loss in items_loss]
                    peak = 900.0 - 200 * place + 4 * r
                    steps = range(1, points + 1)
                    runs.append(recorded(
                        losses, seed=seed, method__name=method, method__r=r, method__lora_alpha=alpha,
                        tags={"sweep": "rank_scaling", "sweep.method": method, "sweep.method.r": str(r),
                              "sweep.method.lora_alpha": str(alpha)},
                        metrics={
                            "memory/rss_peak_mib": peak, "memory/baseline/rss_mib": 250.0,
                            "memory/load/rss_peak_mib": 0.6 * peak, "memory/steady/rss_peak_mib": peak,
                            "trainable_parameters": 24576.0 * r, "trainable_share": 0.0004 * r, "steps": 500.0,
                            "tokens_per_second": 4000.0 - 3 * r, "step_seconds_mean": 0.5 + r / 1000,
                            "after/rougeL": 0.3 + 0.01 * math.log2(r), "model_bytes": 1e5 * r,
                            **{f"more/metric_{number}": 1.0 for number in range(40)},
                        },
                        curves={
                            "train/loss": [(s, shift + 1.5 * math.exp(-s / 60) + rng.gauss(2.6, 0.1)) for s in steps],
                            "eval/loss": [(s, shift + 1.2 * math.exp(-s / 70) + 2.6) for s in steps[::25]],
                        },
                        answers=[
                            answer(prompt, sentence(rng, 20), f"Reference {number}.", rougeL=rng.random())
                            for number, prompt in enumerate(prompts)
                        ],
                        **{f"training__setting_{number}": number for number in range(100)},
                    ))  # fmt: skip
    return runs


def written(runs, folder: Path) -> str:
    (page,) = [file for file in report.write(compare(runs), folder, name="comparison") if file.suffix == ".html"]
    return page.as_uri()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """24 rows of three seeds, and one that failed."""
    runs = sweep(["lora", "qlora", "dora"], [4, 8, 16, 32], [16, 32], [1, 2, 3], 60, 16, 200)
    labels = {"sweep.method": "lora", "sweep.method.r": "512", "sweep.method.lora_alpha": "16"}
    failed = recorded(
        outcome="oom", tags={"failure": "out of memory", "sweep": "rank_scaling", **labels}, method__r=512
    )
    return written([*runs, failed], tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def big(tmp_path_factory) -> str:
    """200 rows."""
    powers = [2**power for power in range(10)]
    return written(sweep(["lora", "qlora"], powers, powers, [1], 500, 16, 500), tmp_path_factory.mktemp("big"))


@pytest.fixture
def visit(browser: Browser) -> Iterator:
    """Open a page; at the end, nothing may have been asked for or complained about."""
    asked: list[str] = []
    said: list[str] = []
    contexts = []

    def opened(address: str, width: int = 1400) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.set_default_timeout(5_000)
        page.goto(address, timeout=30_000)
        page.locator("html[data-ready]").wait_for(state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []


def names(page: Page) -> list[str]:
    return page.locator("#table tbody tr:visible .name button").all_inner_texts()


def cells(page: Page, heading: str) -> list[str]:
    place = page.locator("#table thead th", has_text=heading).first.get_attribute("data-place")
    return page.locator(f'#table tbody tr:visible td[data-place="{place}"]').all_inner_texts()


def figure(page: Page, title: str):
    card = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))
    card.scroll_into_view_if_needed()
    card.locator(".main-svg").first.wait_for()
    return card


def keep(page: Page, name: str, height: int = 0) -> None:
    """A picture for the README, if one is wanted: of what is on the screen, or of the page's upper part."""
    if wanted := os.environ.get("QLORA_EXP_SCREENSHOTS"):
        page.wait_for_timeout(500)
        part = {"full_page": True, "clip": {"x": 0, "y": 0, "width": 1400, "height": height}} if height else {}
        page.screenshot(path=Path(wanted) / f"report_{name}.png", **part)


def test_table_is_sorted_by_its_headings_also_by_keyboard(visit, small: str):
    page = visit(small)
    keep(page, "table")
    heading = page.locator("#table thead th", has_text="method.r")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    ranks = [int(text) for text in cells(page, "method.r")]
    assert ranks == sorted(ranks)
    assert len(ranks) == 25
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in cells(page, "method.r")] == sorted(ranks, reverse=True)
    page.locator("#table thead th", has_text="loss against").get_by_role("button").press("Space")
    verdicts = cells(page, "loss against")
    assert [text.split()[0] for text in verdicts[:3]] == ["better"] * 3
    assert verdicts[-1].startswith("oom")  # what has no value comes last, in both orders
    assert heading.get_attribute("aria-sort") == "none"


def test_rows_are_filtered_by_words_and_conditions(visit, small: str):
    page = visit(small)
    box = page.get_by_label("Filter")
    box.fill("qlora r>=16")
    assert len(names(page)) == 4
    assert all("qlora" in name for name in names(page))
    expect(page.locator("#count")).to_contain_text("4 of 25 rows")
    box.fill("no such row")
    assert names(page) == []
    box.fill("method=lora r=8 lora_alpha=32")
    assert len(names(page)) == 1
    page.get_by_role("button", name="all listed").click()
    expect(page.locator("#count")).to_contain_text("1 in figures")
    box.fill("")
    assert len(names(page)) == 25


def test_columns_can_be_hidden(visit, small: str):
    page = visit(small)
    expect(page.get_by_role("columnheader", name="trainable")).to_be_visible()
    page.locator("#columns summary").click()
    page.locator("#columns").get_by_label("trainable", exact=True).uncheck()
    expect(page.get_by_role("columnheader", name="trainable")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#columns .panel")).to_be_hidden()


def test_row_opens_all_its_settings_and_metrics(visit, small: str):
    page = visit(small)
    page.locator("#table .name button").nth(1).press("Enter")
    dialog = page.get_by_role("dialog")
    for text in ("seed 1", "seed 3", "after/rougeL", "training.setting_42", "method.lora_alpha"):
        expect(dialog.get_by_text(text).first).to_be_visible()
    keep(page, "settings")
    dialog.get_by_role("searchbox").fill("rougel")
    expect(dialog.get_by_text("training.setting_42")).to_be_hidden()
    expect(dialog.get_by_text("after/rougeL")).to_be_visible()
    dialog.get_by_role("button", name="Close").focus()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_label("Filter").fill("r=512")
    page.locator("#table tr:visible .name button").click()
    expect(page.get_by_role("dialog").get_by_text("out of memory")).to_be_visible()


def test_figures_show_what_is_chosen(visit, small: str):
    page = visit(small)
    front = figure(page, "Cost against quality")
    keep(page, "figures")
    page.evaluate("window.scrollTo({top: 0, behavior: 'instant'})")
    keep(page, "page", height=1700)
    assert "no row is better in both than" in front.locator(".plot").get_attribute("aria-label")
    page.set_viewport_size({"width": 1400, "height": 1000})  # names stay when the window changes
    page.wait_for_timeout(500)
    labels = front.locator(".annotation-text").all_text_contents()
    assert len(labels) == len(set(labels)) > 3
    boxes = [label.bounding_box() for label in front.locator(".annotation").all()]
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            assert apart or one["y"] + one["height"] <= other["y"] + 1 or other["y"] + other["height"] <= one["y"] + 1
    front.locator("select").select_option(label="training speed, tokens per second")
    expect(front.locator(".xtitle")).to_contain_text("tokens per second (higher is better)")

    curves = figure(page, "Loss curves")
    assert curves.locator(".legend button").count() == 13
    drawn = curves.locator(".scatterlayer .trace").count()
    curves.locator(".legend button").first.press("Enter")
    expect(curves.locator(".legend button").first).to_have_attribute("aria-pressed", "false")
    assert curves.locator(".scatterlayer .trace").count() < drawn
    curves.locator("select").first.select_option(label="training loss")
    expect(curves.locator(".ytitle")).to_contain_text("training loss, nats per token (lower is better)")
    path = curves.locator(".scatterlayer .trace .js-line").last
    rough = path.get_attribute("d")
    curves.locator("input").press("End")
    page.wait_for_timeout(300)
    assert path.get_attribute("d") != rough
    curves.get_by_text("Numbers").click()
    expect(curves.locator(".numbers tbody tr")).to_have_count(13)

    page.get_by_role("button", name="none").click()
    ranking = figure(page, "Ranked")
    expect(ranking.get_by_text("no row is chosen")).to_be_visible()
    page.locator("#table .name input").first.check()
    ranking = figure(page, "Ranked")
    expect(ranking.locator(".ytick")).to_have_count(1)


def test_hovering_shows_the_settings(visit, small: str):
    page = visit(small)
    card = figure(page, "Ranked")
    card.locator(".points path").first.hover(force=True)
    label = card.locator(".hoverlayer")
    expect(label).to_contain_text("method.lora_alpha = ")
    expect(label).to_contain_text("held-out loss: ")


def test_every_figure_is_drawn(visit, small: str):
    page = visit(small)
    for title, mark in (
        ("Memory by phase", ".barlayer .point"), ("Rank and alpha", ".heatmaplayer image"), ("Over rank", ".js-line"),
    ):  # fmt: skip
        card = figure(page, title)
        assert card.locator(mark).count() > 1
        assert card.locator("figcaption").inner_text()
        assert card.get_by_role("button", name="Share").count() == 0  # Plotly's own would upload the figure
        assert "The numbers are in the table" in card.locator(".plot").get_attribute("aria-label")


def test_answers_are_searched_and_read_side_by_side(visit, small: str):
    page = visit(small)
    section = page.locator("#answers")
    page.get_by_role("link", name="Answers").click()
    keep(page, "answers")
    expect(section.locator(".reference")).to_contain_text("Reference 0.")
    assert section.locator(".answer").count() == 24
    assert section.locator(".answer").first.locator(".scores").all_inner_texts()[1].startswith("seed 2 · rougeL 0.")
    section.get_by_role("button", name="Next prompt").click()
    expect(section.locator(".reference")).to_contain_text("Reference 1.")
    section.get_by_role("button", name="Next prompt").press("ArrowRight")
    expect(section.locator("#position")).to_have_text("3 of 16")
    page.keyboard.press("ArrowLeft")
    expect(section.locator("#position")).to_have_text("2 of 16")
    section.get_by_label("Search prompts").fill("reference 12")
    expect(section.locator("#position")).to_contain_text("1 of 1 that match, 16 in all")
    expect(section.locator(".reference mark").first).to_have_text("Reference")
    section.get_by_label("Search prompts").fill("")
    section.locator("#prompt").select_option("5")
    expect(section.locator(".reference")).to_contain_text("Reference 5.")
    section.get_by_label("Order").select_option(label="best rougeL first")
    means = [
        sum(scores) / len(scores)
        for card in section.locator(".answer").all()
        for scores in [[float(text.split()[-1]) for text in card.locator(".scores").all_inner_texts()]]
    ]
    assert means == sorted(means, reverse=True)
    page.get_by_label("Filter").fill("qlora r=8")
    expect(section.locator(".answer")).to_have_count(2)


def test_losses_of_two_runs_are_compared_item_by_item(visit, small: str):
    page = visit(small)
    card = figure(page, "Item against item")
    keep(page, "losses")
    assert card.locator(".points path").count() == 60
    before = card.locator(".plot").get_attribute("aria-label")
    page.get_by_label("Swap the two").click()
    expect(card.locator(".plot")).not_to_have_attribute("aria-label", before)
    page.locator("#second").select_option(label="method=qlora r=4 lora_alpha=16, seed 2")
    expect(card.locator(".ytitle")).to_contain_text("method=qlora r=4 lora_alpha=16, seed 2")
    expect(card.locator(".ytitle")).to_contain_text("loss, nats per token (lower is better)")
    card.get_by_text("Numbers").click()
    expect(card.locator(".numbers tbody tr")).to_have_count(60)
    differences = [abs(float(text)) for text in card.locator(".numbers tbody td:nth-child(5)").all_inner_texts()]
    assert differences == sorted(differences, reverse=True)
    card.locator(".points path").nth(3).hover(force=True)
    expect(card.locator(".hoverlayer")).to_contain_text("tokens")


def test_hostile_text_is_shown_and_does_nothing(visit, tmp_path):
    runs = [
        recorded([2.0 + r, 3.0], method__name=f"{HOSTILE} {r}", tags={"sweep": HOSTILE}, method__r=r,
                 metrics={"memory/rss_peak_mib": 900.0 + r, "memory/steady/rss_peak_mib": 900.0 + r},
                 curves={"eval/loss": [(1, 3.0), (2, 2.0)]},
                 answers=[answer(HOSTILE, HOSTILE, HOSTILE, **{HOSTILE: 1.0})])
        for r in (1, 2)
    ]  # fmt: skip
    page = visit(written(runs, tmp_path))
    assert page.locator("h1").inner_text().startswith(HOSTILE[:70])
    for title in ("Cost against quality", "Ranked", "Loss curves", "Memory by phase", "Item against item"):
        card = figure(page, title)
        assert card.locator("img, a:not(.modebar-btn), [style*=bold] >> text=bold").count() == 0
    ranking = figure(page, "Ranked")
    ranking.locator(".points path").first.hover(force=True)
    expect(ranking.locator(".hoverlayer")).to_contain_text("<b>bold</b>")
    expect(ranking.locator(".hoverlayer")).to_contain_text("%{x}")
    expect(page.locator("#question .text").first).to_have_text(HOSTILE)
    page.locator("#table .name button").first.click()
    expect(page.get_by_role("dialog").get_by_text("<b>bold</b>").first).to_be_visible()
    assert page.locator("main img, dialog img").count() == 0


def test_phone_has_no_sideways_scrolling(visit, small: str):
    page = visit(small, 400)
    for title in ("Cost against quality", "Loss curves", "Ranked", "Memory by phase", "Rank and alpha", "Over rank",
                  "Item against item"):  # fmt: skip
        figure(page, title)
        page.wait_for_timeout(150)
        keep(page, f"phone_{title.split()[0].lower()}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator("#table .name button").first.click()
    assert page.get_by_role("dialog").bounding_box()["width"] <= 400
    keep(page, "phone_settings")


def test_whole_page_can_be_used_by_keyboard(visit, small: str):
    page = visit(small)
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the table")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"filter"} <= reached
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select')].filter(control =>
             !control.textContent.trim() && !control.getAttribute('aria-label') && !control.labels?.length).length"""
    )
    assert unnamed == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


def test_200_runs_stay_fluid(visit, big: str):
    started = time.perf_counter()
    page = visit(big)
    loaded = time.perf_counter() - started
    figure(page, "Cost against quality")
    drawn = time.perf_counter() - started
    page.wait_for_timeout(1000)
    timed = """([what, value]) => {
        const box = document.querySelector('#filter'), start = performance.now();
        if (what === 'sort') document.querySelectorAll('#table thead button')[value].click();
        else { box.value = value; box.dispatchEvent(new Event('input')); }
        document.body.offsetHeight;
        return performance.now() - start;
    }"""
    times = {}
    for action in (("sort", 3), ("sort", 6), ("sort", 7), ("filter", "qlora r>=8"), ("filter", "")):
        times[str(action)] = round(page.evaluate(timed, action))
        page.wait_for_timeout(700)
    print(f"loaded in {loaded:.1f} s, first figure after {drawn:.1f} s; ms: {times}")
    assert len(names(page)) == 200
    # Generous, for slow machines: what is wanted is 3 s and 100 ms.
    assert loaded < 10
    assert all(each < 500 for each in times.values())
    page.get_by_role("button", name="all listed").click()
    expect(page.locator("#count")).to_contain_text("64 in figures")
