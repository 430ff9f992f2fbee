"""The library that multiplies float32 matrices is chosen by speed alone, never at the cost of precision."""

import pytest
import torch

from qlora_exp.environment import products
from qlora_exp.environment.products import fast_products


def state() -> tuple[str, str, str]:
    backends = torch.backends
    own = (backend.matmul.fp32_precision for backend in (backends.mkldnn, backends.cuda))
    return (torch.get_float32_matmul_precision(), *own)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """OneDNN was measured to be faster."""
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "_is_faster", lambda: True)


@pytest.mark.usefixtures("faster")
def test_the_setting_is_restored_also_after_an_error():
    before = state()
    with pytest.raises(ZeroDivisionError), fast_products("cpu") as by_onednn:
        assert by_onednn
        assert state() != before
        with fast_products("cpu") as again:  # inside, it is set already
            assert not again
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.usefixtures("faster")
def test_gpus_and_processes_with_a_precision_of_their_own_are_left_alone():
    with fast_products("cuda") as by_onednn:
        assert not by_onednn
    torch.set_float32_matmul_precision("high")
    try:
        with fast_products("cpu") as by_onednn:
            assert not by_onednn
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(products, "_is_faster", lambda: bool(measured.append(1)))
    for _ in range(2):
        with fast_products("cpu") as by_onednn:
            assert not by_onednn
    assert measured == [1]


def test_products_that_are_rounded_more_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_FASTER", 0.0)
    monkeypatch.setattr(products, "_EXACT", 1e-12)
    assert not products._is_faster()


def test_products_of_either_library_differ_by_rounding_alone():
    a, b = torch.randn(130, 576), torch.randn(576, 1536)
    exact = a.double() @ b.double()
    with products._onednn():
        error = ((a @ b).double() - exact).abs().max() / exact.abs().max()
    if error < products._EXACT:  # no AMX here
        assert error < 1e-5
    else:
        assert not products._is_faster()
