import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path

from helpers.past_runs import answer, recorded, shifted

import qlora_exp.results.page as package
from qlora_exp.results import report
from qlora_exp.results.compare import compare

HOSTILE = "</script><img src=x onerror=alert(1)> <b>x</b> {{data}} \u2028 <!--<script>"


def page_of(runs, folder: Path) -> str:
    (page,) = [file for file in report.write(compare(runs), folder) if file.suffix == ".html"]
    return page.read_text("utf-8")


def content_of(page: str) -> dict:
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_hostile_text_stays_in_the_data(tmp_path):
    runs = [
        recorded(shifted(0.1 * r), method__name=f"{HOSTILE}{r}", tags={"sweep": HOSTILE, "failure": HOSTILE},
                 metrics={HOSTILE: 1.0}, answers=[answer(HOSTILE, HOSTILE, HOSTILE)])
        for r in (1, 2)
    ]  # fmt: skip
    page = page_of(runs, tmp_path)
    assert page.count("onerror=alert") == page.count(r"\u003cimg src=x onerror=alert") + page.count(
        "&lt;img src=x onerror=alert"
    )
    content = content_of(page)
    assert content["answers"]["prompts"][0][0] == HOSTILE.replace("\u2028", r"\u2028")
    assert "\u2028" not in page
    before, _, _ = page.partition('id="data">')
    assert "<img" not in before
    assert before.count("<script") == 1
    plain = HOSTILE.replace("\u2028", r"\u2028")
    assert content["rows"][0]["label"]["method"].startswith(plain[:60])


def test_page_is_one_file_whose_policy_allows_only_its_own_scripts(tmp_path):
    page = page_of([recorded(shifted(0.0), method__r=4), recorded(shifted(0.1), method__r=8)], tmp_path)
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.partition("style-src")[0]
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall("'sha256-([^']+)'", policy) == hashes
    assert len(scripts) == 2
    own = page.replace(scripts[0], "")
    assert not re.search(r"""(?:src|href)=["'](?!#)""", own)
    assert "{{" not in own.replace(scripts[1], "")


def test_files_of_the_page_are_in_the_package():
    names = {file.name for file in files(package).iterdir()}
    assert {"report.html", "report.css", "table.js", "figures.js", "answers.js"} <= names
