import subprocess
import sys

import cloudpickle
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from qlora_exp.config.hydra_compose import conf_dir, register
from qlora_exp.libraries import hydra as private


@pytest.fixture(autouse=True, scope="module")
def schema():
    register()


def parsed(*words: str):
    return OverridesParser.create().parse_overrides([*words])


def test_every_combination_of_lists_and_ranges():
    assert private.every_combination(parsed("a=1,2", "b=x", "c=range(2)")) == [
        ["a=1", "b=x", "c=0"], ["a=1", "b=x", "c=1"], ["a=2", "b=x", "c=0"], ["a=2", "b=x", "c=1"],
    ]  # fmt: skip
    assert private.every_combination(parsed("b=x")) == [["b=x"]]


def test_overrides_are_applied_to_a_composed_config():
    """That this is what Hydra itself would compose: tests/unit/sweeps/test_hydra_sweepers.py."""
    config = OmegaConf.create({"a": {"b": 1, "c": 2}, "d": [1]})
    OmegaConf.set_struct(config, True)
    private.apply_overrides(parsed("a.b=3", "+a.e=x", "~a.c", "d=[2,3]"), config)
    assert config == {"a": {"b": 3, "e": "x"}, "d": [2, 3]}


def test_a_key_is_a_group_if_conf_has_such_a_folder():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert private.is_group(loader, "method")
        assert not private.is_group(loader, "method.r")


def test_flags_may_stand_anywhere_among_overrides():
    arguments = private.parse(["a=1", "-m", "b=2", "--config-dir", "x=y", "c=3"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert (arguments.multirun, arguments.config_dir) == (True, "x=y")


def test_main_prints_a_config(capsys):
    private.main(private.parse(["--cfg", "job", "-p", "seed", "seed=7"]), lambda _: None, conf_dir(), "config")
    assert capsys.readouterr().out.strip() == "7"


def test_own_folder_is_searched_whatever_its_name(tmp_path):
    (tmp_path / "a,b=ü" / "seed").mkdir(parents=True)
    (tmp_path / "a,b=ü" / "seed" / "nine.yaml").write_text("n: 9")
    with private.initialized(conf_dir(), tmp_path / "a,b=ü"):
        assert compose("config", overrides=["+seed@tracking.tags=nine"]).tracking.tags.n == 9


@pytest.mark.parametrize("text", ["[q,v]", "{a:1}", "'a b'", "null", "x"])
def test_a_value_is_written_so_that_it_is_read_again(text: str):
    value = parsed(f"key={text}")[0].value()
    assert parsed(f"key={private.as_written(value)}")[0].value() == value


def test_singletons_are_restored_from_their_pickle():
    setup_globals()  # as in any process that Hydra started
    before = Singleton.get_state()
    try:
        ConfigStore.instance().store(name="marker", node={"a": 1})
        restore = cloudpickle.loads(cloudpickle.dumps(private.singletons()))
        Singleton.set_state({"instances": {}, "omegaconf_resolvers": {}})
        assert "marker.yaml" not in ConfigStore.instance().list("")
        restore()
        assert "marker.yaml" in ConfigStore.instance().list("")
        assert OmegaConf.create({"year": "${now:%Y}"}).year.isdigit()
    finally:
        Singleton.set_state(before)


def test_configs_are_composed_without_torch():
    code = "import qlora_exp.libraries.hydra, qlora_exp.config.hydra_compose, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
