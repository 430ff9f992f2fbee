import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from qlora_exp.results import stats


def scored(values: np.ndarray) -> stats.Items:
    """(seeds, items) scores as items of weight 1."""
    return np.stack([values, np.ones_like(values)], axis=-1)


def test_mean_has_students_interval_and_one_seed_has_none():
    found = stats.mean([1.0, 2.0, 3.0, 4.0])
    low, high = scipy_stats.t.interval(0.95, 3, 2.5, scipy_stats.sem([1, 2, 3, 4]))
    assert (found.value, found.low, found.high, found.seeds) == pytest.approx((2.5, low, high, 4))
    alone = stats.mean([2.0])
    assert (alone.value, alone.seeds) == (2.0, 1)
    assert math.isnan(alone.low)


def test_loss_is_the_mean_over_tokens_not_over_rows():
    rows = np.array([[[10.0, 10], [90.0, 30]]])
    assert stats.ratio(rows) == pytest.approx([100 / 40])


def test_difference_of_seeds_is_students_paired_test():
    ours, theirs = [1.0, 1.2, 0.9, 1.4], [1.1, 1.5, 1.3, 1.5]
    found = stats.difference_of_seeds(ours, theirs)
    expected = scipy_stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_difference_of_items_is_students_paired_test():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 1, 40))
    found = stats.difference_of_items(scored(ours), scored(theirs))
    assert found.p == pytest.approx(scipy_stats.ttest_rel(ours[0], theirs[0]).pvalue)
    assert found.seeds == 1
    assert math.isnan(found.variance_of_seeds)


def test_single_pair_has_no_interval():
    found = stats.difference_of_seeds([1.0], [2.0])
    assert found.p == 1
    assert math.isnan(found.low)


def test_same_results_do_not_differ_and_constant_differences_do():
    same = scored(np.ones((3, 5)))
    assert stats.difference_of_items(same, same).p == 1
    assert stats.difference_of_items(same + np.array([1.0, 0]), same).p == 0


def simulated(rng: np.random.Generator, effect: float, seeds: int, items: int) -> stats.Difference:
    """Two configurations that differ by `effect` beside what seeds and items do to the difference."""
    base = rng.normal(3, 1, size=items)
    of_seed, of_item = rng.normal(0, 0.1, size=(seeds, 1)), rng.normal(0, 0.3, size=items)
    noise = rng.normal(0, 0.1, size=(2, seeds, items))
    return stats.difference_of_items(scored(base + effect + of_seed + of_item + noise[0]), scored(base + noise[1]))


# Two seeds say little of how seeds vary: then the approximation is a little too sure of itself.
@pytest.mark.parametrize(("seeds", "items", "held"), [(2, 40, 0.89), (5, 40, 0.92), (5, 400, 0.92)])
def test_false_alarms_are_rare_and_intervals_cover_the_truth(seeds: int, items: int, held: float):
    rng = np.random.default_rng(seeds * items)
    found = [simulated(rng, 0.0, seeds, items) for _ in range(400)]
    assert np.mean([one.p < 0.05 for one in found]) < 0.08
    shifted = [simulated(rng, 0.7, seeds, items) for _ in range(400)]
    assert np.mean([one.low <= 0.7 <= one.high for one in shifted]) > held


def test_ignoring_item_variance_would_raise_false_alarms():
    rng = np.random.default_rng(0)
    found = [simulated(rng, 0.0, 5, 10) for _ in range(300)]
    careless = [scipy_stats.t.sf(abs(one.value) / math.sqrt(one.variance_of_seeds / 5), 4) * 2 for one in found]
    assert np.mean([p < 0.05 for p in careless]) > 2 * np.mean([one.p < 0.05 for one in found])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_p_values_and_keeps_their_order(p_values: list[float]):
    adjusted = stats.holm(p_values)
    assert all(p <= new <= 1 for p, new in zip(p_values, adjusted, strict=True))
    assert max(adjusted) >= max(p_values)
    by_p = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [adjusted[index] for index in by_p] == sorted(adjusted)


def test_holm_matches_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_seeds_to_settle_is_the_smallest_sufficient_number():
    rng = np.random.default_rng(3)
    each = rng.normal(0.1, 0.1, size=3)
    found = stats.difference_of_seeds(each - each.mean() + 0.1, np.zeros(3))
    more = stats.seeds_to_settle(found)
    assert found.p > 0.05
    assert more
    sd, count = each.std(ddof=1), 3 + more
    assert scipy_stats.t.ppf(0.975, count - 1) * sd / math.sqrt(count) < 0.1
    assert scipy_stats.t.ppf(0.975, count - 2) * sd / math.sqrt(count - 1) >= 0.1


def test_seeds_to_settle_is_none_if_items_are_too_few():
    few = scored(np.array([[1.0, 3.0, 0.5]] * 2) + np.array([[0.0], [0.01]]))
    found = stats.difference_of_items(few, scored(np.array([[1.5, 1.0, 1.5]] * 2)))
    assert found.p > 0.05
    assert stats.seeds_to_settle(found) is None
    assert stats.seeds_to_settle(stats.difference_of_seeds([1.0], [2.0])) is None


@given(st.integers(1, 9).flatmap(lambda count: arrays(bool, (count, count))), st.randoms(use_true_random=False))
def test_rows_share_a_letter_exactly_if_they_tie(drawn, random):
    differ = (drawn | drawn.T) & ~np.eye(len(drawn), dtype=bool)
    order = list(range(len(differ)))
    random.shuffle(order)
    letters = stats.groups_of_ties(order, differ.tolist())
    for one in order:
        for other in order:
            assert bool(set(letters[one]) & set(letters[other])) is not bool(differ[one][other])
    assert "a" in letters[order[0]]
