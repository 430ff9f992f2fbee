"""Which run is meant by an id, a run key or a name."""

import pytest
from mlflow import MlflowClient

from qlora_exp.tracking.logged_models import locate
from qlora_exp.utils.errors import ModelError


@pytest.fixture
def made(make_store):
    """A function that makes a run without a model."""
    client = MlflowClient(make_store("named.db"))
    experiment = client.create_experiment("named")

    def made(name: str, key: str, outcome: str = "ok") -> str:
        run = client.create_run(experiment, run_name=name, tags={"run_key": key, "outcome": outcome})
        return run.info.run_id

    made.uri = client.tracking_uri
    return made


@pytest.mark.parametrize("name", ["lora, r=8.5", "it's", "a%b", "0123456789"])
def test_run_is_found_by_its_id_key_or_name(name: str, made):
    ids = [made(name, "a" * 16), made(name, "a" * 16), made(name, "b" * 16, "oom"), made(f"{name}0", "c" * 16)]
    for source in (ids[1], "a" * 16, name):  # the newest that succeeded
        with pytest.raises(ModelError, match=f"run {ids[1]} logged no model"):
            locate(source, made.uri)


def test_name_of_no_run_or_of_different_runs_is_refused(made):
    first, second = made("same", "a" * 16), made("same", "b" * 16)
    with pytest.raises(ModelError, match=f"2 different runs have this name; give an id: {first}, {second}"):
        locate("same", made.uri)
    for source, message in (("other", "has this id or name"), ("0" * 16, "run key"), ("a\"'b", "both kinds of quotes")):
        with pytest.raises(ModelError, match=f"{source}: .*{message}"):
            locate(source, made.uri)
