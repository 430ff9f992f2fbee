from types import SimpleNamespace

import pytest
import torch
from helpers import plugins as packages
from torch.nn.functional import cross_entropy
from trl.trainer.utils import add_fused_lm_head

from qlora_exp.config.plugins import Plugin
from qlora_exp.models.builtin import folder_of
from qlora_exp.training.plugins import user_losses
from qlora_exp.training.plugins.user_losses import Loss
from qlora_exp.utils.errors import ConfigError


def loss(function, asks_for_entropy: bool = False) -> Loss:
    return Loss(Plugin("loss", "l", "p", "1", "p:l"), function, asks_for_entropy)


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder_of("random:llama"))
    add_fused_lm_head(loaded, outputs=("log_probs", "entropy"))
    return loaded


IDS = torch.arange(3, 27).reshape(2, 12)
LABELS = IDS.masked_fill(torch.arange(12) < 5, -100)
LABELS[1, 9:] = -100


def test_loss_sees_the_learned_tokens_only_and_is_summed_over_them(model):
    """Padding and prompts have no share in it; the sums are those that cross-entropy of the logits has."""
    seen = []

    def nll(log_probs, entropy):
        seen.append((log_probs.shape, entropy.shape))
        return -2 * log_probs

    outputs = loss(nll, asks_for_entropy=True).outputs(model, input_ids=IDS, labels=LABELS, fused_lm_head=True)
    assert seen == [((11,), (11,))]
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    wanted = cross_entropy(logits, LABELS[:, 1:].flatten(), ignore_index=-100, reduction="none").view(2, 11)
    torch.testing.assert_close(-outputs.log_probs, 2 * wanted)
    own, other = (
        torch.autograd.grad(value.sum(), model.lm_head.weight, retain_graph=True)[0]
        for value in (-outputs.log_probs, 2 * wanted)
    )
    torch.testing.assert_close(own, other)


def test_batch_without_learned_tokens_has_no_loss_but_a_gradient(model):
    def never(log_probs):
        raise AssertionError

    outputs = loss(never).outputs(model, input_ids=IDS, labels=torch.full_like(IDS, -100), fused_lm_head=True)
    outputs.log_probs.sum().backward()
    assert not model.lm_head.weight.grad.any()


def test_outputs_with_logits_are_left_alone():
    outputs = SimpleNamespace(logits=1)
    assert loss(None).outputs(lambda **_: outputs) is outputs


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("l = 3", "of the type int, not a function"),
        ("def l(): pass", "must take the arguments log_probs"),
        ("def l(log_probs, labels): pass", "must take the arguments log_probs"),
        ("def l(log_probs): return -log_probs.mean()", r"of the shape of log_probs, \(3,\); it returned \(\)"),
        ("def l(log_probs): return 0.5", "it returned float"),
        ("def l(log_probs): return -log_probs.detach()", "fails on three tokens: RuntimeError"),
        ("def l(log_probs): return 0 * log_probs", "has no gradient"),
        ("def l(log_probs): return -1 / (log_probs + 1)", "not finite"),
        ("def l(log_probs): raise KeyError('x')", "fails on three tokens: KeyError: 'x'"),
    ],
)
def test_loss_that_cannot_work_is_refused_before_it_costs_time(source: str, message: str, monkeypatch, tmp_path):
    package = f"no_loss_{abs(hash(source))}"
    packages.install(monkeypatch, tmp_path / "a", package, source, losses="l")
    with pytest.raises(ConfigError, match=message) as error:
        user_losses.load("l")
    assert str(error.value).startswith(f"training.loss_type: l of {package} 0.1")


@pytest.mark.parametrize("source", [packages.LOSSES, "def focal(log_probs, entropy): return entropy"])
def test_loss_of_a_package_is_loaded(source: str, monkeypatch, tmp_path):
    package = f"a_loss_{abs(hash(source))}"
    packages.install(monkeypatch, tmp_path / "a", package, source, losses="focal")
    found = user_losses.load("focal")
    assert (found.facts.package, found.asks_for_entropy) == (package, "entropy" in source)
