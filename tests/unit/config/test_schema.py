import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import qlora_exp
from qlora_exp.config.schema import Config

PACKAGE = Path(qlora_exp.__file__).parent


def test_every_key_is_read_by_the_code():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "hydra_plugins").glob("*.py")]
    sections = [file for file in files if file.parent.name == "sections"]
    source = "".join(file.read_text("utf-8") for file in files if file not in sections)
    schema = "".join(file.read_text("utf-8") for file in sections)
    unread = []
    for section, field in Config.model_fields.items():
        kind = field.annotation
        keys = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {section: field}
        for key in keys:
            read = re.search(rf"\.{key}\b|\"{key}\"", source) or re.search(rf"\w\.{key}\b", schema)
            if not read:
                unread.append(f"{section}.{key}")
    assert unread == []


def test_default_config_survives_a_round_trip():
    assert Config() == Config.model_validate(Config().model_dump(mode="json"))


def test_config_is_immutable():
    with pytest.raises(ValidationError):
        Config().seed = 1
