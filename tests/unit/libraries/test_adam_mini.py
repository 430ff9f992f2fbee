import pytest
import torch

package = pytest.importorskip("adam_mini")


@pytest.mark.parametrize("fake", [True, False])
def test_states_are_counted_without_a_gpu(fake: bool, monkeypatch):
    from torch._subclasses import FakeTensorMode

    from qlora_exp.libraries.adam_mini import optimizer_class

    monkeypatch.setattr(package.adam_mini, "device", "cuda")  # as its module chooses where there is one
    with FakeTensorMode() if fake else torch.device("cpu"):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        optimizer = optimizer_class()([("norm", parameter)], verbose=False)
        optimizer.world_size = 1
        optimizer.step()
    assert optimizer.state[parameter]["block_numel"] == 3
