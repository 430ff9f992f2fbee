import pytest

from qlora_exp.utils.errors import ConfigError


def test_search_keys_that_contradict_each_other_are_rejected(make_config):
    with pytest.raises(ConfigError, match="one direction per metric"):
        make_config("search.directions=[minimize,maximize]")
    for metrics in (["after/loss", "memory/rss_peak_mib"], ["after/rougeL"]):
        with pytest.raises(ConfigError, match="compares the held-out loss"):
            make_config("search.prune=true", f"search.metrics=[{','.join(metrics)}]")
    with pytest.raises(ConfigError, match="minimized"):
        make_config("search.prune=true", "search.directions=[maximize]")
