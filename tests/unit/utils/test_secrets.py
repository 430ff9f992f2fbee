import logging

from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.secrets import RedactingFormatter, load_env_file, redact


@given(st.text(alphabet="abcdefghijkl0123456789", min_size=8, max_size=30), st.text(max_size=50))
def test_values_of_secret_variables_are_redacted(secret: str, around: str):
    import os

    os.environ["MY_API_KEY"] = secret
    try:
        assert secret not in redact(f"{around}{secret}{around}").replace(around, "")
    finally:
        del os.environ["MY_API_KEY"]


def test_hub_tokens_and_uri_credentials_are_redacted():
    assert redact("hf_" + "a" * 30) == "***"
    assert redact("see http://user:pass@host:1/x") == "see http://***@host:1/x"


def test_other_text_is_not_redacted():
    assert redact("loss 3.2 at http://host:5000/x") == "loss 3.2 at http://host:5000/x"


def test_log_lines_are_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    record = logging.LogRecord("a", logging.INFO, "f", 1, "got %s", ("verysecretvalue",), None)
    assert RedactingFormatter("%(message)s").format(record) == "got ***"


def test_env_file_is_read_and_does_not_override(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_A", raising=False)
    monkeypatch.setenv("QLORA_B", "mine")
    (tmp_path / ".env").write_text("QLORA_A=file\nQLORA_B=file\n")
    load_env_file()
    import os

    assert (os.environ.pop("QLORA_A"), os.environ["QLORA_B"]) == ("file", "mine")
