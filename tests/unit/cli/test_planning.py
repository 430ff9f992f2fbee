import pytest
from support import exit_code


@pytest.mark.parametrize("command", ["plan", "advise"])
@pytest.mark.parametrize(("word", "option"), [("vram=24", "--vram 24"), ("gpu=t4", "--gpu t4")])
def test_an_option_written_as_a_key_is_refused_with_the_option(command: str, word: str, option: str, capsys):
    assert exit_code(command, "model=tiny_llama", word) == 1
    assert f"no such key or group; did you mean {option}?" in capsys.readouterr().err
