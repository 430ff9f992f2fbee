import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from scipy.integrate import quad

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
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_difference_of_items_is_students_paired_test():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 1, 40))
    found = stats.difference_of_items(scored(ours), scored(theirs))
    assert found.p == pytest.approx(scipy_stats.ttest_rel(ours[0], theirs[0]).pvalue)
    assert found.seeds == (1, 1)


def test_single_pair_has_no_interval():
    found = stats.difference_of_seeds([1.0], [2.0])
    assert found.p == 1
    assert math.isnan(found.interval[0])


def test_same_results_do_not_differ_and_constant_differences_are_judged_by_their_number():
    """Two seeds with the same difference are no proof; as many items as here are."""
    same = scored(np.ones((3, 5)))
    assert stats.difference_of_items(same, same).p == 1
    assert stats.difference_of_items(same, same).interval == (0, 0)
    assert stats.difference_of_items(same + np.array([1.0, 0]), same).p == 2**-4
    assert stats.difference_of_seeds([0.1, 0.2], [0.3, 0.4]).p == 0.5  # but for rounding, the same
    many = scored(np.ones((2, 60)))
    assert stats.difference_of_items(many + np.array([1.0, 0]), many).p < 1e-12


def test_seeds_that_differ_are_independent_samples():
    ours, theirs = np.random.default_rng(0).normal([[1.0], [1.03]], [[0.1], [0.2]], (2, 60))
    found = stats.difference_of_seeds(ours, theirs, common=0)
    assert found.p == pytest.approx(scipy_stats.ttest_ind(ours, theirs, equal_var=False).pvalue, rel=0.02)
    assert stats.difference_of_seeds(ours[:5], theirs[:4], common=0).value == ours[:5].mean() - theirs[:4].mean()


def test_one_seed_is_taken_to_vary_as_the_others_do():
    """Crawford and Howell's test (1998) of a single case."""
    others = np.array([1.0, 1.2, 0.9, 1.4])
    found = stats.difference_of_seeds([2.0], others, common=0)
    t = (2 - others.mean()) / (others.std(ddof=1) * math.sqrt(1 + 1 / 4))
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(t, 3))
    assert stats.difference_of_seeds(others, [2.0], common=1).p == pytest.approx(found.p)  # one pair has no variance


@pytest.mark.parametrize(("seeds", "paired"), [((5, 4, 4), True), ((3, 2, 2), True), ((5, 5, 2), False)])
def test_mixture_of_common_and_other_seeds_uses_all_and_pairs_where_most_are_common(seeds, paired):
    rng = np.random.default_rng(0)
    mine, other, common = seeds
    alike = rng.normal(0, 1, 10)  # cancels in pairs
    ours, theirs = (alike[:count] + rng.normal(0, 1e-3, count) for count in (mine, other))
    found = stats.difference_of_seeds(ours, theirs, common)
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    alone = stats.difference_of_seeds(ours, theirs, 0)
    assert (found.error < 0.6 * alone.error) is paired
    assert paired or found == alone


def chance_of(distance: float, sources: list[stats.Source]) -> float:
    """Integrate the Behrens-Fisher distribution of two sources directly: the sum of two scaled t variables."""
    one, other = (scipy_stats.t(source.freedom, scale=math.sqrt(source.variance)) for source in sources)
    inside, _ = quad(lambda x: one.pdf(x) * (other.cdf(distance - x) - other.cdf(-distance - x)), -np.inf, np.inf)
    return 1 - inside


@pytest.mark.parametrize("freedoms", [(1, 19), (2, 99), (4, 4), (9, 499)])
@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("distance", [1.5, 4.0])
def test_p_value_is_of_the_behrens_fisher_distribution(freedoms, share, distance):
    sources = [stats.Source(part, freedom, True) for part, freedom in zip((share, 1 - share), freedoms, strict=True)]
    found = stats.Difference(distance, tuple(sources), (2, 2), 0)
    assert found.p == pytest.approx(chance_of(distance, sources), rel=2e-3, abs=1e-6)
    assert stats.margin(sources, found.p) == pytest.approx(distance, rel=1e-3)


def test_margin_is_that_of_sukhatmes_table():
    assert stats.margin([stats.Source(0.5, 6, True), stats.Source(0.5, 6, True)], 0.05) == pytest.approx(
        2.435, abs=1e-3
    )


def test_scores_that_nothing_changed_do_not_count():
    """Four of 100 answers got right are no difference, as McNemar's exact test says (p = 0.125)."""
    ours, theirs = np.zeros((2, 1, 100))
    ours[0, :4] = 1
    assert stats.difference_of_items(scored(ours), scored(theirs)).p > 0.05
    ours[0, :12] = 1
    assert stats.difference_of_items(scored(ours), scored(theirs)).p < 0.01


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.data(),
)
@settings(max_examples=40)
def test_any_scores_of_any_seeds_have_a_p_value(rows, mine, other, data):
    """Few items, weights of zero, equal scores: nothing ends in NaN, and equal runs tie."""
    if not sum(weight for _, weight in rows):
        rows = [*rows, (0, 1)]
    common = data.draw(st.integers(0, min(mine, other)))
    one = np.array([[[score * weight, weight] for score, weight in rows]], float)
    noise = arrays(float, (mine + other, len(rows)), elements=st.sampled_from([0.0, 1.0, -1.0]))
    changes = data.draw(noise)[..., None] * one[..., 1:] * [1, 0]
    found = stats.difference_of_items(one + changes[:mine], one + changes[mine:], common)
    assert 0 < found.p <= 1
    low, high = found.interval
    assert low <= found.value <= high or not found.sources
    assert (stats.seeds_to_settle(found, 0.01) or 1) > 0
    same = stats.difference_of_items(one + changes[:mine], one + changes[:mine], mine)
    assert (same.p, same.value) == (1, 0)


def simulated(rng: np.random.Generator, rows: int, seeds: int, items: int, sd: tuple[float, float, float], scale=(1,)):
    """Rows that do not differ but for what seeds, items and both do to each, weighted by tokens."""
    weights = np.clip(np.round(np.exp(rng.normal(4, 0.8, items))), 5, 400)
    scale = np.resize(scale, rows)[:, None, None]
    of_seed, of_item, of_both = (rng.normal(0, part, shape) for part, shape in zip(
        sd, ((rows, seeds, 1), (rows, 1, items), (rows, seeds, items)), strict=True
    ))  # fmt: skip
    values = rng.normal(3, 1, items) + scale * (of_seed + of_both) + of_item
    return np.stack([values * weights, np.broadcast_to(weights, values.shape)], axis=-1)


SEEDS, ITEMS, BOTH, UNEQUAL = (0.04, 0.04, 0.04), (0.007, 0.2, 0.07), (0.003, 0.01, 0.2), (0.02, 0.05, 0.03)


@pytest.mark.parametrize(
    ("seeds", "sd", "scale"),
    [
        *((seeds, SEEDS, (1,)) for seeds in (2, 3, 5)),
        *((seeds, UNEQUAL, (1, 30, *[1] * 9)) for seeds in (2, 3)),
        (3, ITEMS, (1,)),
        (3, BOTH, (1,)),
    ],
)
def test_any_false_verdict_among_ten_rows_is_as_rare_as_promised(seeds, sd, scale):
    """A simulation in small of `nox -s statistics`; 5 % and two standard errors of 150 repetitions are 8.6 %."""
    rng = np.random.default_rng(seeds)
    false, covered = [], []
    for _ in range(150):
        baseline, *rows = simulated(rng, 11, seeds, 30, sd, scale)
        found = stats.moderated([stats.difference_of_items(row, baseline) for row in rows])
        false.append(min(stats.holm([each.p for each in found])) < 0.05)
        covered.append(np.mean([each.p >= 0.05 for each in found]))
    assert np.mean(false) < 0.086
    assert np.mean(covered) > 0.93


def test_any_false_pair_of_letters_is_as_rare_as_promised():
    rng = np.random.default_rng(0)
    false = []
    for _ in range(60):
        rows = simulated(rng, 8, 2, 30, SEEDS)
        found = stats.moderated([stats.difference_of_items(a, b) for a, b in combinations(rows, 2)])
        false.append(min(stats.holm([each.p for each in found])) < 0.05)
    assert np.mean(false) < 0.11  # two standard errors


def test_other_rows_let_three_seeds_find_more_where_items_matter_most():
    rng = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(40):
        baseline, *rows = simulated(rng, 11, 3, 100, ITEMS)
        found = [stats.difference_of_items(row + row[..., 1:] * [0.13, 0], baseline) for row in rows]
        alone += [p < 0.05 for p in stats.holm([each.p for each in found])]
        together += [p < 0.05 for p in stats.holm([each.p for each in stats.moderated(found)])]
    assert np.mean(together) > np.mean(alone) + 0.05


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_p_values_and_keeps_their_order(p_values: list[float]):
    adjusted = stats.holm(p_values)
    assert all(p <= new <= 1 for p, new in zip(p_values, adjusted, strict=True))
    assert max(adjusted) >= max(p_values)
    by_p = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [adjusted[index] for index in by_p] == sorted(adjusted)


def test_holm_matches_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_ties_are_settled_with_the_number_of_seeds_that_is_named():
    rng = np.random.default_rng(3)
    settled = []
    while len(settled) < 20:
        ours, theirs = simulated(rng, 2, 3 + stats.MANY_SEEDS, 60, (0.05, 0.05, 0.05))
        ours = ours + ours[..., 1:] * [0.1, 0]
        tie = stats.difference_of_items(ours[:3], theirs[:3])
        if tie.p > 0.005 and (more := stats.seeds_to_settle(tie, 0.005)):
            settled.append(stats.difference_of_items(ours[: 3 + more], theirs[: 3 + more]).p < 0.005)
    assert np.mean(settled) > 0.75


def test_no_number_of_seeds_is_named_for_an_effect_of_about_zero_or_too_few_items():
    each = np.array([0.1, -0.11, 0.02])
    assert stats.seeds_to_settle(stats.difference_of_seeds(each, np.zeros(3)), 0.05) is None
    few = scored(np.array([[1.0, 3.0, 0.5]] * 3) + np.array([[0.0], [0.01], [0.02]]))
    assert stats.seeds_to_settle(stats.difference_of_items(few, scored(np.array([[1.5, 1.0, 1.5]] * 3))), 0.05) is None
    assert stats.seeds_to_settle(stats.difference_of_seeds([1.0], [2.0]), 0.05) is None


def test_detectable_difference_is_found_in_four_of_five_cases():
    rng = np.random.default_rng(0)
    draws = rng.normal(0, 0.1, (400, 8))
    least = stats.detectable(stats.difference_of_seeds(0.1 * scipy_stats.zscore(draws[0], ddof=1), np.zeros(8)), 0.05)
    power = np.mean([stats.difference_of_seeds(draw + least, np.zeros(8)).p < 0.05 for draw in draws])
    assert 0.75 < power < 0.88


def test_more_comparisons_need_more_seeds():
    assert [stats.seeds_needed(rows) for rows in (1, 10, 50)] == [3, 4, 5]


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
