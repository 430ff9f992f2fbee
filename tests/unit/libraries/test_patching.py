import types

import pytest

from qlora_exp.libraries.patching import patched


def test_attributes_are_replaced_inside_and_put_back_after_an_error():
    module = types.ModuleType("module")
    module.a, module.b = 1, 2
    with pytest.raises(RuntimeError), patched(module, a=3, b=4):
        assert (module.a, module.b) == (3, 4)
        raise RuntimeError
    assert (module.a, module.b) == (1, 2)


def test_an_attribute_that_upstream_renamed_is_an_error():
    module = types.ModuleType("module")
    with pytest.raises(AttributeError), patched(module, gone=1):
        pass
    assert not hasattr(module, "gone")


def test_methods_of_classes_are_put_back_as_they_were():
    class Owner:
        @staticmethod
        def name() -> str:
            return "own"

    with patched(Owner, name=staticmethod(lambda: "replaced")):
        assert Owner().name() == "replaced"
    assert Owner().name() == "own"
