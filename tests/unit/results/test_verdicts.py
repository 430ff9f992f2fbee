from dataclasses import replace

from qlora_exp.results.stats import Difference
from qlora_exp.results.verdicts import Verdict, too_few_seeds


def tie(*seeds: int) -> Verdict:
    return Verdict(Difference(0.1, (), (seeds[0], seeds[1]), 0), 1.0, 0.05, True)


def test_ties_of_rows_with_few_seeds_are_explained_by_them():
    assert too_few_seeds({}) == ""
    assert too_few_seeds({"one": tie(3, 3)}) == ""  # enough for one verdict
    assert too_few_seeds({"one": tie(1, 1)}) == ""  # that verdict says so itself
    assert too_few_seeds({"one": tie(2, 2)}).startswith("2 seeds are too few for 1 verdict where results vary")
    mixed = {str(row): tie(5, 5) for row in range(9)} | {"few": tie(3, 5)}
    assert too_few_seeds(mixed).startswith("3 seeds, as some rows have, are too few for 10 verdicts")
    significant = {name: replace(verdict, p=0.01) for name, verdict in mixed.items()}
    assert too_few_seeds(significant) == ""
