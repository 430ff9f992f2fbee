import random
from pathlib import Path

import pytest

from qlora_exp.sweeps.jobs import default_name
from qlora_exp.tracking import run_key
from qlora_exp.training.lm_eval import fingerprint
from qlora_exp.utils.digests import file_digest, json_digest, text_digest


@pytest.mark.parametrize(
    ("values", "digest"),
    [
        ({"b": [1, 2.5, None], "a": {"path": Path("x")}}, "49899b1f6bc2f696"),
        ([["task", "item"], ["task", "other"]], "882f64b6d247790c"),
    ],
)
def test_digest_of_recorded_values_stays_the_same(values: object, digest: str):
    assert json_digest(values) == digest


def test_order_of_keys_does_not_count():
    keys = [f"key{number}" for number in range(20)]
    digests = {json_digest(dict.fromkeys(random.sample(keys, len(keys)))) for _ in range(10)}
    assert len(digests) == 1


def test_recorded_names_and_fingerprints_stay_the_same(tmp_path: Path):
    """Stores of earlier versions hold these: a sweep is resumed by its name, and data are compared by fingerprint."""
    assert default_name(["method.r"], ["method.r=4,8", "seed=1,2", "sweep.n_jobs=2"]) == "r_1c7c12"
    assert fingerprint([{"task": "a", "item": "1"}, {"task": "b", "item": "2"}]) == "ddc7523b594d0dff"
    assert run_key.combine({"config": "1", "code": "2"}) == "fef42425fb20d7d2"
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert run_key.weights_digest(tmp_path) == "758bed0194f35c14"
    (tmp_path / "model.safetensors").write_bytes(bytes(65 * 1024**2))
    assert run_key.weights_digest(tmp_path) == "914216d7f67c4c36"


def test_digest_of_a_file_is_its_sha256(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert file_digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_digest_of_a_text_has_16_bytes():
    assert len(text_digest("a")) == 16
    assert text_digest("a") != text_digest("b")
