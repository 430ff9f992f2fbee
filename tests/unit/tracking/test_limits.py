import sqlite3

from helpers.tracking import start_run
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.tracking.limits import fit, fit_message
from qlora_exp.tracking.mlflow_store import client

LONG = st.text(max_size=20) | st.builds(lambda text, times: text * times, st.text(max_size=10), st.integers(0, 900))


@given(LONG, LONG, st.sampled_from([250, 500, 6000]))
def test_different_texts_stay_different(one, other, limit):
    assert len(fit(one, limit)) <= limit
    assert fit(fit(one, limit), limit) == fit(one, limit)
    assert (fit(one, limit) == fit(other, limit)) == (one.replace("\0", "�") == other.replace("\0", "�"))


@given(st.dictionaries(LONG, LONG, max_size=4), LONG)
def test_fitting_message_is_not_changed_again(values, name):
    start = {"op": "start", "tags": values, "run_name": name}
    for message in (start, {"op": "params", "values": values}, {"op": "tags", "values": values}):
        fitting = fit_message(message)
        assert fit_message(fitting) == fitting
    assert len(fit_message(start)["tags"]) == len(values)


# Columns of MLflow's tables in PostgreSQL; SQLite does not enforce their lengths.
COLUMNS = {"runs": {"name": 250}, "tags": {"key": 250, "value": 8000}, "params": {"key": 250, "value": 8000},
           "datasets": {"name": 500}, "logged_models": {"name": 500}}  # fmt: skip


def test_database_with_limits_gets_runs_with_long_texts(make_store, tmp_path):
    uri = make_store("strict.db")
    with sqlite3.connect(tmp_path / "strict.db") as database:
        for table, columns in COLUMNS.items():
            for column, length in columns.items():
                database.execute(
                    f"CREATE TRIGGER {table}_{column} BEFORE INSERT ON {table} "
                    f"WHEN length(NEW.{column}) > {length} OR instr(NEW.{column}, char(0)) "
                    f"BEGIN SELECT RAISE(ABORT, 'value too long for type character varying({length})'); END"
                )
    database.close()
    name = "n" * 600
    with start_run(uri, tmp_path / "run", f"tracking.run_name={name}", f"tracking.tags.note={'t' * 9000}") as tracked:
        tracked.tags({"text": "ü" * 9000, "zero": "a\0b"})
        tracked.params({"long": "p" * 7000})
        tracked.dataset("d" * 600, "digest", "s" * 20_000, "training", 3)
        (tmp_path / "run" / "model").mkdir()
        (tmp_path / "run" / "model" / "config.json").write_text("{}")
        tracked.model("model", "m" * 600, {"r": 1}, 1)
    run = client(uri).get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("n" * 200)
    assert {key: len(run.data.tags[key]) for key in ("note", "text", "zero")} == {"note": 8000, "text": 8000, "zero": 3}
    assert len(run.data.params["long"]) == 6000
    assert len(run.inputs.dataset_inputs) == len(run.outputs.model_outputs) == 1
