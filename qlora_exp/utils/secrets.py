"""Decide what is a secret, and replace secrets by `***` in everything that is written, shown or sent.

Secrets are: values of environment variables with a name like `DB_PASSWORD`, passwords in the URIs of other variables,
and text in the form of a credential: tokens of known services, headers, users in URIs, `password=...`.
"""

import base64
import html
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"""
    TOKEN(?!IZ) | PASSW | PASSPHRASE | PASSCODE | SECRET | CREDENTIAL | WEBHOOK | (?:API|ACCESS|PRIVATE)[_-]?KEY
    | (?<!BY)(?<!COM)PASS(?![A-Z]) | PWD(?![A-Z]) | (?<!COM)PAT(?![A-Z])
    | (?<!SA)CREDS?(?![A-Z]) | (?<![A-Z])CRED(?!IT|IB) | (?<![A-Z])PW(?![A-Z])
    | CONN(?:ECTION)?_?STR | KEYS?(?:_ID|_?\d+)?$ | (?:AUTH|COOKIE|JWT)$
    """,
    re.IGNORECASE | re.VERBOSE,
)
_NOT_SECRET_NAME = re.compile(
    r"^(?:OLD)?PWD$|^KEYS?$|(?:FILE|PATH|DIR|HOME|SOCK|HOST|PORT|TYPE|LIMIT|LENGTH|TTL)$", re.IGNORECASE
)
"""Working folders of the shell, KEY as in KEY=VALUE, and names that end in what the variable holds about a secret."""
_SHORTEST = 6
"""Fewest characters of a value that is searched for: shorter ones occur in ordinary text."""
_LONGEST_WORD = 11
"""Most letters of a value without any other character that may be a word, and is searched for as a whole word only."""
_NO_SECRETS = {"localhost", "default", "disabled", "enabled", "required", "optional", "unknown"}
_SHORTEST_LINE = 16
"""Fewest characters of a line that is searched for, of a secret with several lines."""
_SECRET_QUERY_KEY = re.compile(r"^(?:passfile|sig|.*signature)$", re.IGNORECASE)
"""Keys in URIs that concern secrets although their names do not say so."""
_NO_SECRETS_IN_QUERY = {"sslkey", "ssl_key", "viewstatesharekey"}
"""Keys in URIs that look like secrets, whose values are files, or a view of MLflow's page that anybody may open."""

# The lengths are limited, so that no text takes long.
_START = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2}))"
_TOKENS = re.compile(
    _START
    + r"""(?:
    hf_[A-Za-z0-9]{16,} | api_org_\w{16,}
    | sk-(?:[A-Za-z0-9]{20,}|(?=[\w-]{0,200}\d)[\w-]{16,}) | [spr]k_(?:live|test)_\w{10,}
    | gh[opsur]_\w{16,} | github_pat_\w{16,} | gl(?:pat|ptt|rt|dt|ft|cbt|soat|agent)-[\w.-]{16,}
    | A(?:KIA|SIA|GPA|IDA|ROA)[A-Z0-9]{12,}
    | xox[a-z]-[\w-]{8,} | xapp-[\w-]{10,}
    | AIza[\w-]{30,} | ya29\.[\w.-]{20,} | SG\.[\w-]{16,99}\.[\w-]{16,}
    | dckr_[a-z]{3}_[\w-]{16,} | do[opr]_v1_[0-9a-f]{16,} | shp(?:at|ca|pa|ss|ua)_[0-9a-fA-F]{16,}
    | npm_\w{30,} | pypi-[\w-]{30,} | dapi[0-9a-f]{32} | nvapi-[\w-]{20,} | gsk_\w{20,} | r8_\w{30,}
    | eyJ[\w-]{8,2000}\.eyJ[\w-]{8,}(?:\.[\w-]*)?
    )""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)", re.DOTALL
)
_WEBHOOK = re.compile(
    r"(?<=://)(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|[\w.-]{1,99}\.webhook\.office\.com)/\S+"
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-api-key|x-auth-token)(['\"]?\s*[:=]\s*['\"]?)((?:basic|bearer|token|digest)\s+)?"
    r"[^\s'\",;]+",
    re.IGNORECASE,
)
_BASIC = re.compile(r"\b(basic\s+)([A-Za-z0-9+/]{4,}={0,2})", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)(?:[\w.~+/=-]{30,}|(?=\S{0,200}\d)[\w.~+/=-]{12,})", re.IGNORECASE)
_SECRET_FIELD = (
    r"(?:(?<![A-Za-z0-9])(?:(?:ssl)?password|passwd|passphrase|pwd|secret|(?:secret|access|api|account)[_-]?key"
    r"|(?:access|auth)[_-]?token)|(?<!\w)token)"
)
_PAIR = re.compile(rf"({_SECRET_FIELD})(=|%3D)([^\s&;,]+)", re.IGNORECASE)
_JSON_PAIR = re.compile(rf"({_SECRET_FIELD}(['\"])\s*:\s*)(['\"])[^'\"\n]+\3", re.IGNORECASE)
_VARIABLE = re.compile(r"\b([A-Z][A-Z0-9_]*)(=)['\"]?([^\s'\"]+)")
_QUERY = re.compile(r"((?:[?&]|%3F|%26))([\w.-]+)(=|%3D)([^&\s'\"<>#]+)", re.IGNORECASE)
_USER_IN_URI = re.compile(r"((?:https?|wss?)://)[^/\s?#'\"<>]{0,999}@|(://)[^/\s?#'\"<>:@]{20,999}@")
"""Servers of HTTP need no user in a URI, databases do; a long one is a token."""
_PASSWORD_IN_URI = re.compile(r"(?<![A-Za-z])((?!https?:)[A-Za-z][\w+.-]{0,30}://)[^\s:/@]{0,99}:[^\s'\"<>]{0,999}@")
"""Databases accept a password with a slash or a question mark in it; servers of HTTP do not."""


HOW_TO_GIVE = (
    "instead set, in the environment or in .env, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN) for a server, PGPASSWORD (or a file ~/.pgpass) for PostgreSQL; for MySQL write "
    "?read_default_file=FILE"
)
"""How to give MLflow's client a secret that must not be in a URI."""


def is_secret_name(name: str) -> bool:
    """Return whether the value of an environment variable or of a URI's query key with this name is a secret."""
    webhook = "WEBHOOK" in name.upper()
    return bool(_SECRET_NAME.search(name)) and (webhook or not _NOT_SECRET_NAME.search(name))


def is_secret(name: str, value: str) -> bool:
    """Return whether `value`, of an environment variable or a tag called `name`, is a secret."""
    return (
        len(value) >= _SHORTEST
        and value.casefold() not in _NO_SECRETS
        and is_secret_name(name)
        and not (value.isdigit() and "TOKEN" in name.upper())  # a number of tokens
        and not _is_path(value)
    )


def redact(text: str) -> str:
    """Replace every secret in `text` by `***`."""
    clean: str = _without(_of_environment(tuple(os.environ.items())), text)
    return clean


def redacted(value: Any) -> Any:
    """Replace every secret in the strings of nested lists and dictionaries."""
    return _without(_of_environment(tuple(os.environ.items())), value)  # read once: this takes longer than the rest


def _without(secrets: re.Pattern[str], value: Any) -> Any:
    if isinstance(value, str):
        return _without_credentials(secrets.sub(HIDDEN, value))
    if isinstance(value, dict):
        return {_without(secrets, key): _without(secrets, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(secrets, item) for item in value]
    return value


def redacted_tags(tags: dict[str, str]) -> dict[str, str]:
    """Replace every secret in a user's tags; a tag with the name of a secret is one."""
    return {redact(key): HIDDEN if is_secret(key, value) else redact(value) for key, value in tags.items()}


def secret_in_uri(uri: str) -> str | None:
    """Return what in a URI is a secret, for a message that refuses it; None if nothing is.

    The URI is parsed as by what will read it: SQLAlchemy for a database, else as in `requests`.
    """
    try:
        parts = urlsplit(uri)
        is_server = parts.scheme in ("http", "https")
        if is_server and "@" in parts.netloc:
            return "a user or password"
        if not is_server and _password_of_database(uri):
            return "a password"
        fields = [field for text in (parts.query, parts.fragment) for field in parse_qsl(text, keep_blank_values=True)]
    except ValueError:  # not a URI, which MLflow will say
        fields = []
    for key, _ in fields:
        if _is_secret_field(key):
            return f"'{key}'"
    plain = unquote(uri)
    strong = [value for value in _values(tuple(os.environ.items())) if not _is_word(value)]
    if _without_tokens(plain) != plain or any(value in plain for value in strong):
        return "a token or password"
    return None


def _password_of_database(uri: str) -> str | None:
    if "://" not in uri:
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri).password
    except ArgumentError:  # not the URI of a database
        match = _PASSWORD_IN_URI.search(uri)
        return match and match[0]


def _is_path(value: str) -> bool:
    """Return whether a value is the path of something that exists, such as a file of credentials."""
    try:
        return value.startswith(("/", "~")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, or an unknown user
        return False


def _is_word(value: str) -> bool:
    """Return whether a value may be an ordinary word or number, so that its letters may occur in longer words."""
    return value.isdigit() or (value.isalpha() and len(value) <= _LONGEST_WORD)


@lru_cache(maxsize=8)
def _values(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """List the secrets in environment variables."""
    values: set[str] = set()
    for name, value in environment:
        clean = value.strip()
        if is_secret(name, clean):
            values.add(clean)
            if "\n" in clean:  # a key of several lines
                values |= {line for line in clean.split() if len(line) >= _SHORTEST_LINE}
        if "://" in clean:
            values |= {secret for secret in _secrets_of_uri(clean) if len(secret) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)  # a secret may contain another one


def _secrets_of_uri(uri: str) -> Iterator[str]:
    """Yield passwords in a URI, as they are written and decoded."""
    if match := re.search(r"([A-Za-z][\w+.-]*)://[^\s:/@]*:(\S*)@", uri):
        scheme, password = match.groups()
        if not (scheme.startswith("http") and re.search("[/?#]", password)):  # such an `@` is in the path
            yield from (password, unquote(password))
    for _, key, _, value in _QUERY.findall(uri):
        if is_secret_name(key) and not _is_path(unquote(value)):
            yield from (value, unquote(value))


@lru_cache(maxsize=8)
def _of_environment(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    """Return a pattern that finds the secrets in environment variables, also as URIs, JSON and HTML spell them."""
    patterns = []
    for value in _values(environment):
        if _is_word(value):
            patterns.append(rf"(?<![A-Za-z0-9]){value}(?![A-Za-z0-9])")
            continue
        spellings = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
        patterns += [re.escape(spelling) for spelling in spellings | {html.escape(value)}]
        patterns += [f"(?i:{re.escape(quoted)})" for quoted in {quote(value, ""), quote(value), quote_plus(value)}]
    return re.compile("|".join(patterns) or r"(?!)")


def _without_credentials(text: str) -> str:
    """Replace what has the form of a credential by `***`."""
    if "://" in text:
        text = _USER_IN_URI.sub(rf"\1\2{HIDDEN}@", _PASSWORD_IN_URI.sub(rf"\1{HIDDEN}@", text))
    return _without_tokens(text)


def _without_tokens(text: str) -> str:
    text = _TOKENS.sub(HIDDEN, _WEBHOOK.sub(HIDDEN, _PRIVATE_KEY.sub(HIDDEN, text)))
    text = _BASIC.sub(_basic_hidden, _BEARER.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1\2\3{HIDDEN}", text)))
    text = _JSON_PAIR.sub(rf"\1\3{HIDDEN}\3", text)
    if "=" not in text and "%3" not in text:
        return text
    text = _VARIABLE.sub(_variable_hidden, _PAIR.sub(rf"\1\2{HIDDEN}", text))
    return _QUERY.sub(_field_hidden, text)


def _basic_hidden(match: re.Match[str]) -> str:
    """Hide user and password in base64, but not an ordinary word after `basic`."""
    try:
        is_login = b":" in base64.b64decode(match[2], validate=True)
    except ValueError:
        is_login = False
    return f"{match[1]}{HIDDEN}" if is_login else match[0]


def _variable_hidden(match: re.Match[str]) -> str:
    name, equals, value = match.groups()
    return f"{name}{equals}{HIDDEN}" if is_secret(name, value) else match[0]


def _field_hidden(match: re.Match[str]) -> str:
    mark, key, equals, _ = match.groups()
    return f"{mark}{key}{equals}{HIDDEN}" if _is_secret_field(key) else match[0]


def _is_secret_field(key: str) -> bool:
    return bool(_SECRET_QUERY_KEY.search(key)) or (is_secret_name(key) and key.lower() not in _NO_SECRETS_IN_QUERY)
