import json

from qlora_exp.cli import inference
from qlora_exp.cli.main import _parse


def test_answers_cannot_control_the_terminal(tmp_path, monkeypatch, capsys):
    """What a model generates is shown with its line breaks and tabs, but without other control characters."""

    class Talker:
        def answer(self, _request, _sampling, on_text=lambda _: None) -> str:
            answer = "a\n\tb\x1b[2J\u202ec"
            on_text(answer)
            return answer

        def encoded(self, *_) -> None: ...

    monkeypatch.setattr(inference, "_talker", lambda _: (Talker(), None))
    inference.generate(_parse(["generate", "RUN", "--prompt", "x"]))
    assert capsys.readouterr().out == "a\n\tb\\x1b[2J\\u202ec\n"
    (tmp_path / "prompts.txt").write_text("x\n")
    inference.generate(_parse(["generate", "RUN", "--file", "prompts.txt"]))
    line = capsys.readouterr().out
    assert "\u202e" not in line
    assert json.loads(line)["answer"] == "a\n\tb\x1b[2J\u202ec"
