import html
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.secrets import redact, redacted, redacted_tags, secret_in_uri

TOKENS = {
    "hub": "hf_" + "a" * 30,
    "openai": "sk-proj-abcdefgh12345678XYZ",
    "openai_old": "sk-abcdefghijklmnopqrstuvwxyz",
    "stripe": "sk_live_abcdefghij1234",
    "github": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_new": "github_pat_11ABCDEFG0abcdefghij_xyz",
    "gitlab": "glpat-abcdefghij1234567890",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "slack": "xoxb-123456789-abcdefghij",
    "docker": "dckr_pat_abcdefghijklmnop_0123456789",
    "digitalocean": "dop_v1_" + "0123456789abcdef" * 4,
    "shopify": "shpat_" + "0123456789abcdef" * 2,
    "jwt": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc-_def",
    "key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
}
"""Text in the form of a secret."""
NAMES = [
    "HF_TOKEN", "DB_PASS", "SMTP_PWD", "ROOT_PASSWD", "GITHUB_PAT", "GHPAT", "SLACK_WEBHOOK_URL", "PGPASSWORD",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "DBPASS", "OTHER_CRED", "MY_CREDS", "CRED_X", "db_password",
    "OPENAI_API_KEY", "STRIPE_KEY", "REDIS_AUTH", "CONNECTION_STRING",
]  # fmt: skip


@given(st.text(alphabet="abcdefghijkl0123456789", min_size=12, max_size=30), st.text(max_size=50))
def test_values_of_secret_variables_are_redacted(secret: str, around: str):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MY_API_KEY", f"{secret}x9")
        assert secret not in redact(f"{around}{secret}x9{around}").replace(around, "")


@pytest.mark.parametrize(
    "name",
    NAMES,
)
def test_name_says_that_a_variable_is_secret(name: str, monkeypatch):
    monkeypatch.setenv(name, "short7!")
    assert redact("it is short7!") == "it is ***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("USE_TOKEN", "true"),
        ("TOKEN_HOST", "localhost"),
        ("DB_PASS", "abcde"),
        ("MAX_TOKENS", "128000"),
        ("TOKENIZERS_PARALLELISM", "parallel"),
        ("PWD", "/home/me/folder"),
        ("BYPASS_LIST", "example.org"),
        ("PASSWORD_FILE", "/run/secrets/absent"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/hosts"),
        ("COMPASS", "northwest"),
        ("CREDIT", "not-a-secret"),
        ("PATH_PATTERN", "somewhere"),
    ],
)
def test_other_variables_are_visible(name: str, value: str, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}.") == f"it is {value}."


def test_a_secret_that_is_a_word_is_redacted_as_a_word(monkeypatch):
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("LOCK_PIN_KEY", "123456")
    assert redact("postgres at postgresql+psycopg://host: 123456, 91234567.0") == (
        "*** at postgresql+psycopg://host: ***, 91234567.0"
    )


@pytest.mark.parametrize(
    "spelling", [str, repr, json.dumps, html.escape, quote, quote_plus, lambda text: quote(text, "").lower()]
)
def test_spellings_of_a_secret_are_redacted(spelling, monkeypatch):
    secret = "s3/cr'é\"t&+w0rd"
    monkeypatch.setenv("MY_SECRET", secret)
    assert spelling(secret).strip("'\"") not in redact(f"<{spelling(secret)}>")
    assert "w0rd" not in redact(f"<{spelling(secret)}>")


def test_passwords_in_uris_of_variables_are_redacted(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:pa%2Fss9@host/db")
    monkeypatch.setenv("API_URL", "https://host/?access_token=abc123xyz")
    assert redact("pa/ss9 pa%2Fss9 abc123xyz") == "*** *** ***"


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_token_of_a_service_is_redacted(token: str):
    assert redact(f"see {token}, x={token}") == "see ***, x=***"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://user:pass@host:1/x", "http://***@host:1/x"),
        ("http://token@host/x", "http://***@host/x"),
        ("https://u:p@w@host/x", "https://***@host/x"),
        ("postgresql://u:a/b?c@host/db", "postgresql://***@host/db"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("http://host/?a=1&token=x&sslkey=/f", "http://host/?a=1&token=***&sslkey=/f"),
        ("s3://b/k?X-Amz-Signature=abc&X-Amz-Date=1", "s3://b/k?X-Amz-Signature=***&X-Amz-Date=1"),
        ("AccountKey=abc==;EndpointSuffix=x", "AccountKey=***;EndpointSuffix=x"),
        ("http://host/%3Fpassword%3Dx", "http://host/%3Fpassword%3D***"),
        ("host=h password=x dbname=d", "host=h password=*** dbname=d"),
        ("--token=x tracking.tags.password=y", "--token=*** tracking.tags.password=***"),
        ("aws_secret_access_key=x db_password=y", "aws_secret_access_key=*** db_password=***"),
        ("{'password': 'x', \"api_key\": \"y\"}", "{'password': '***', \"api_key\": \"***\"}"),
        ("Bearer abcdefghijklmnopqrstuvwxyzabcdef", "Bearer ***"),
        ("DB_PASS=abcdef1 N=2", "DB_PASS=*** N=2"),
        ("Authorization: Basic YWxpY2U6d29uZA==", "Authorization: Basic ***"),
        ("{'authorization': 'Bearer abc'}", "{'authorization': 'Bearer ***'}"),
        ("Basic YWxpY2U6d29uZA==", "Basic ***"),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://***"),
    ],
)
def test_credentials_in_text_are_redacted(text: str, clean: str):
    assert redact(f"see {text} there") == f"see {clean} there"


@pytest.mark.parametrize(
    "text",
    [
        "loss 3.2 at http://host:5000/x",
        "http://host:5000/a/@b",
        "Basic training; a bearer understanding-everything",
        "risk-averse-1234567890123456 eos_token=</s> method.num_virtual_tokens=16 training.max_length=512",
        "sk-learn-has-many-estimators",
        "the token = x, password: none, {'eos_token': '</s>'}",
    ],
)
def test_other_text_is_not_redacted(text: str):
    assert redact(text) == text


def test_nested_values_and_tags_are_redacted(monkeypatch):
    monkeypatch.setenv("LOCK_PIN_KEY", "12345678")
    assert redacted({"a": ["12345678", 12345678], "12345678": None}) == {"a": ["***", 12345678], "***": None}
    tags = {"password": "hunter2", "max_tokens": "128000", "owner": "me"}
    assert redacted_tags(tags) == tags | {"password": "***"}


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("postgresql://u:p@h/db", "a password"),
        ("postgresql://u:%70@h/db", "a password"),
        ("postgresql://u:a/b?c@h/db", "a password"),
        ("postgresql+psycopg2://127.0.0.1:5599/mlf?user=u&password=SECRET", "'password'"),
        ("postgresql://h/db?Pass%57ord=1", "'PassWord'"),
        ("postgresql://h/db?sslpassword=x", "'sslpassword'"),
        ("postgresql://h/db?passfile=/x", "'passfile'"),
        ("mysql+pymysql://h/db?passwd=x", "'passwd'"),
        (" postgresql://u:p@h/db", "a password"),
        ("https://h/c?sig=abc", "'sig'"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Dx", "a token or password"),
        ("http://me:p@host", "a user or password"),
        ("https://a-token@host", "a user or password"),
        ("https://host/?token=", "'token'"),
        ("https://host/#access_token=1", "'access_token'"),
        ("https://host/%3Ftoken=1", "a token or password"),
        (f"https://host/{TOKENS['github']}", "a token or password"),
        ("https://host/my%2Dtoken%2D1", "a token or password"),
        ("postgresql://u@h/db", None),
        ("postgresql://postgres@postgres/postgres", None),
        ("postgresql://h/db?sslkey=/x&sslcert=/y&application_name=a", None),
        ("sqlite:////home/me/mlruns/mlflow.db", None),
        ("http://host:5000/prefix", None),
        ("databricks://profile", None),
        ("http://[::1", None),
        ("mlruns", None),
    ],
)
def test_secret_in_a_uri_is_found(uri: str, secret: str | None, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "my-token-1")
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    assert secret_in_uri(uri) == secret


def test_a_shared_view_of_mlflows_page_is_no_secret():
    link = "http://localhost:5000/#/experiments/1?viewStateShareKey=qlora_exp_all_runs&api_key=abc123"
    assert redact(link) == link.replace("abc123", "***")
