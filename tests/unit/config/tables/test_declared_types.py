import math

import pytest
from helpers.scripts import script

from qlora_exp.config.tables import declared_types


@pytest.mark.parametrize("described", ["torch.dtype", {"set": "int"}, 3, None])
def test_a_word_that_is_not_in_the_vocabulary_is_refused(described):
    with pytest.raises(ValueError, match="no such type"):
        declared_types.python_type(described)


def test_a_type_that_the_vocabulary_cannot_say_is_not_written():
    with pytest.raises(TypeError, match="cannot express"):
        script("library_settings").described(set[int])


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", True])
def test_what_is_no_finite_number_is_no_number(value):
    assert declared_types.misfit(declared_types.validator(float), value)
    assert declared_types.misfit(declared_types.validator(float), 1) is None
