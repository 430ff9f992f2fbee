import os
import socket

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.hub import go_offline_if_unreachable, is_needed


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that it is restored
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("qlora_exp.environment.hub.getproxies", dict)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], False),
        (["model=tiny_opt", "dataset=reasoning_gym"], False),
        (["model.model_name_or_path=.", "dataset.path=."], False),
        (["model=opt_125m"], True),
        (["dataset=alpaca"], True),
        (["unrelated=wikitext"], True),
        (["evaluation.lm_eval_tasks=[mmlu]"], True),
        (["evaluation.lm_eval_tasks=[own]", "evaluation.lm_eval_include_path=."], False),
    ],
)
def test_hub_is_needed_only_for_hub_models_data_and_tasks(overrides: list[str], needed: bool):
    assert is_needed(compose(overrides)) is needed


def test_reachable_hub_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        go_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_unreachable_hub_switches_to_offline(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_proxy_skips_the_reachability_check(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("qlora_exp.environment.hub.getproxies", lambda: {"https": "http://proxy"})
    go_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_users_offline_setting_is_kept(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
