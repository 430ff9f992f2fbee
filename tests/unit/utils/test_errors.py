from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.errors import did_you_mean, nearest


@given(st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_nearest_is_one_of_the_candidates_or_none(known: list[str]):
    assert nearest("training.lr", known) in [*known, None]


def test_existing_word_is_its_own_nearest():
    assert nearest("training.seed", ["training.seed", "method.r"]) == "training.seed"


def test_did_you_mean_without_a_near_word_is_empty():
    assert did_you_mean("zzz", ["alpha"]) == "."
