"""Hours and money follow from steps, rows, prices and cards, and from nothing else."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning import cost
from qlora_exp.planning.cost import Amount, bill
from qlora_exp.planning.gpus import GPUS

SECONDS, PRICES = st.floats(1e-3, 1e3), st.floats(0, 1e3)
AMOUNTS = st.builds(Amount, st.integers(1, 10**6), st.integers(1, 10**7).map(float), st.just(""))
EPOCH = ["method=lora", "training.max_steps=-1"]
CONFIG = compose(EPOCH)


@given(SECONDS, AMOUNTS, PRICES, st.integers(1, 64))
def test_cost_is_hours_times_price_for_each_card(seconds, amount, price, cards):
    found = bill(seconds, amount, price, cards)
    assert found.hours == pytest.approx(seconds * amount.steps / 3600)
    assert found.cost == pytest.approx(cards * price * found.hours)
    assert found.per_thousand * amount.examples / 1000 == pytest.approx(found.cost)
    assert bill(seconds, amount, 2 * price, cards).cost == pytest.approx(2 * found.cost)


@given(st.lists(st.tuples(SECONDS, AMOUNTS), min_size=1, max_size=5), PRICES)
def test_total_is_the_sum_and_unknown_if_a_part_is(runs, price):
    bills = [bill(seconds, amount, price) for seconds, amount in runs]
    hours, all_costs = cost.total(bills)
    assert hours == pytest.approx(sum(each.hours for each in bills))
    assert all_costs == pytest.approx(sum(each.cost for each in bills))
    assert cost.total([*bills, bill(1.0, runs[0][1], None)])[1] is None


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 16), st.floats(0.1, 10), st.integers(1, 8))
def test_steps_cover_all_rows_and_no_more(rows, size, accumulated, epochs, ranks):
    training = CONFIG.training.model_copy(
        update={
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "num_train_epochs": epochs,
        }
    )
    shared = CONFIG.distributed.model_copy(update={"engine": "ddp", "num_processes": ranks})
    config = CONFIG.model_copy(update={"training": training, "distributed": shared})
    steps, of_step = cost.steps_of(config, rows), cost.rows_of_step(config)
    assert of_step == size * accumulated * ranks
    assert steps >= math.floor(epochs * rows / of_step)
    assert steps <= math.ceil(epochs * (rows / of_step + 2))
    assert cost.steps_of(config, rows + 1) >= steps


@given(st.dictionaries(st.sampled_from(sorted(GPUS)), PRICES, min_size=1, max_size=4))
def test_prices_are_read_back(prices):
    cards = [GPUS[name] for name in prices]
    assert cost.prices(",".join(f"{name}={price!r}" for name, price in prices.items()), cards) == prices
    assert cost.prices("1.5", cards) == dict.fromkeys(prices, 1.5)


def test_length_of_a_run_is_from_steps_rows_or_the_file(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(50)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[0]]))
    words = ["method=lora", "dataset=own", f"dataset.path={file}", "training.per_device_train_batch_size=4"]
    words.append("training.max_steps=-1")
    found = cost.Lengths().of(compose(words))
    assert isinstance(found, Amount)
    assert (found.steps, found.examples) == (12, 45)  # one row is repeated, five are held out
    assert found.source == "45 rows (counted: read, cleaned and split as a run does)"
    assert cost.Lengths(100).of(compose([*words, "training.num_train_epochs=2"])).steps == 50
    assert cost.Lengths().of(compose([*words[:-1], "training.max_steps=7"])) == Amount(7, 28.0, "training.max_steps")


def test_rows_that_are_elsewhere_are_asked_for(tmp_path):
    hub = compose([*EPOCH, "dataset=dolly_15k"])
    assert "give --rows N" in cost.Lengths().of(hub)
    assert cost.Lengths().of(compose([*EPOCH, "dataset=dolly_15k", "dataset.max_train_rows=80"])).examples == 80
    missing = compose([*EPOCH, "dataset=own", f"dataset.path={tmp_path}/none.jsonl"])
    assert "cannot be counted" in cost.Lengths().of(missing)
