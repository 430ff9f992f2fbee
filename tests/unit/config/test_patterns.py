import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.patterns import may_hang
from qlora_exp.utils.processes.limits import LimitedProcess


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z._0-9])+)+Q", "(a|a)*$", "a?a?a?a?a", "(a+)+$", ".*.*.*.*Q", "([a-z]+)*", "(?:x|y){2,}", "((a|b)){1,30}",
        "(a?){50}b", r"(?P<n>a+)+", r"(\w+\s?)*$", "(?=(a+)+$)", r"[)]((a|b)x)+",
    ],
)  # fmt: skip
def test_pattern_that_may_run_for_ever_is_recognized(pattern: str):
    assert may_hang(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "Zaragoza", r".*\.(q|v)_proj", r".*layers\.\d+\.(self_attn|mlp)\.(q|k)_proj", "all-linear", "^(a|b)$",
        r"[(+*?]+x", "a*?b+", "facebook/opt-125m", r"model\.layers\.(1|2|3)\..*", "(?i)as an ai( language)? model",
        "C++", "x{2,3}", r"\(+\)+",
    ],
)  # fmt: skip
def test_usual_pattern_is_allowed(pattern: str):
    assert not may_hang(pattern)


_PROCESS = LimitedProcess(seconds=5)
PARTS = st.sampled_from(["a", "b", "(", ")", "(?:", "|", "*", "+", "?", "{1,9}", "[ab]", ".", r"\w", "a+", "(a", ")+"])


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


@given(st.lists(PARTS, max_size=12).map("".join))
def test_allowed_patterns_end(pattern: str):
    try:
        re.compile(pattern)
    except re.error:
        return
    if not may_hang(pattern):
        _PROCESS.call(matches, pattern, "ab" * 30 + "!")
        _PROCESS.call(matches, pattern, "a" * 60 + "!")
