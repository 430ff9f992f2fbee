import json
import re
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
from filelock import Timeout
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.tracking import journal
from qlora_exp.tracking.journal import FILE, Journal, is_delivered, is_locked, last_message, metrics, read, run_id
from qlora_exp.utils.errors import JournalError

START = {"op": "start", "experiment": "e", "uri": "sqlite:///x", "run_name": "r", "timestamp": 1, "tags": {}}
MESSAGES = st.lists(
    st.fixed_dictionaries({"op": st.sampled_from(["tags", "params"]), "values": st.dictionaries(st.text(), st.text())})
).map(lambda more: [START, *more])


def numbered(number: int) -> dict:
    return {"op": "metrics", "step": number, "timestamp": 1, "values": {}}


@given(MESSAGES, st.integers(min_value=0))
def test_truncated_journal_keeps_whole_messages_in_order(tmp_path_factory, messages, cut):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    for message in messages:
        journal.append(message)
    journal.close()
    whole = journal.file.read_bytes()
    kept = whole[: len(whole) - cut % (len(whole) + 1)]
    journal.file.write_bytes(kept)
    survivors = messages[: kept.count(b"\n")]
    assert last_message(folder) == (survivors[-1] if survivors else None)
    again = Journal(folder)
    assert list(again.messages()) == survivors
    later = numbered(1) if survivors else START
    again.append(later)
    assert list(again.messages()) == [*survivors, later]
    again.close()


def test_delivered_messages_are_not_repeated(tmp_path):
    journal = Journal(tmp_path)
    journal.append(START)
    for number in range(2):
        journal.append(numbered(number))
    journal.use("sqlite:///a")
    first = next(journal.undelivered())
    journal.save_state(offset=first[1], run_id="abc")
    journal.close()
    again = Journal(tmp_path)
    again.use("sqlite:///a")
    assert [message["step"] for message, _ in again.undelivered()] == [0, 1]
    assert again.state["run_id"] == "abc"
    again.use("sqlite:///b")  # another store has nothing
    assert [message["op"] for message, _ in again.undelivered()] == ["start", "metrics", "metrics"]
    assert "run_id" not in again.state
    again.save_state(run_id="def")
    again.use("sqlite:///a")
    assert again.state["run_id"] == "abc"
    again.reset_delivery()
    assert len(list(again.undelivered())) == 3
    again.close()


def test_messages_lost_after_delivery_do_not_shift_the_rest(tmp_path):
    journal = Journal(tmp_path)
    journal.use("sqlite:///a")
    journal.append(START)
    journal.append(numbered(1))
    journal.save_state(offset=journal.file.stat().st_size, run_id="abc")
    journal.close()
    journal.file.write_bytes(journal.file.read_bytes().splitlines(keepends=True)[0])
    again = Journal(tmp_path)
    again.use("sqlite:///a")
    again.append(numbered(2))
    assert [message["step"] for message, _ in again.undelivered()] == [2]
    again.close()


def test_last_message_is_found_after_a_long_one(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"op": "tags", "values": {"text": "x" * 100_000}})
    assert last_message(tmp_path) == {"op": "tags", "values": {"text": "x" * 100_000}}
    journal.append(numbered(1))
    assert last_message(tmp_path) == numbered(1)
    journal.close()


def test_journal_is_locked_by_one_process(tmp_path):
    code = (
        "import sys, pathlib; from qlora_exp.tracking.journal import Journal\n"
        f"j = Journal(pathlib.Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    assert not is_locked(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(Timeout):
            Journal(tmp_path)
        other.kill()
    assert not is_locked(tmp_path)


def test_folder_without_a_journal_has_no_messages(tmp_path):
    assert list(read(tmp_path / FILE)) == []
    assert last_message(tmp_path) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NEARLY = st.builds(  # messages with keys that are missing, too many or of another type
    lambda op, own, more: (json.dumps({**own, **more, "op": op}) + "\n").encode(),
    st.sampled_from(["start", "resume", "tags", "metrics", "file", "dataset", "model", "view", "end", "new", 3, None]),
    st.sampled_from([START, numbered(1), {}]),
    st.dictionaries(st.sampled_from(["tags", "values", "step", "timestamp", "outcome", "status", "path"]), JSON),
)


@given(
    st.binary() | NEARLY | JSON.map(lambda value: (json.dumps(value) + "\n").encode()), st.floats(0, 1), st.booleans()
)
def test_arbitrary_journal_raises_only_journal_error(tmp_path_factory, content, where, over):
    folder = tmp_path_factory.mktemp("journal")
    whole = b"".join((json.dumps(one) + "\n").encode() for one in (START, numbered(1), numbered(2)))
    at = int(where * len(whole))
    (folder / FILE).write_bytes(whole[:at] + content + whole[at + over * len(content) :])
    (folder / "delivered.json").write_bytes(content)
    given_first, said = [], []
    for reader in (
        lambda: given_first.extend(message for message, _ in read(folder / FILE)),
        lambda: last_message(folder),
        lambda: metrics(folder),
        lambda: is_delivered(folder),
        lambda: run_id(folder, "sqlite:///x"),
    ):
        try:
            reader()
        except JournalError as error:
            said.append(str(error))
    assert all(str(folder) in one and "\n" not in one for one in said)
    assert len(given_first) >= whole[:at].count(b"\n")  # what comes before is given


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"3", b"\0" * 9, b"\xff", b'{"op": "met', b"[" * 99999, b'{"op": "end"}']
)
def test_damaged_line_is_named(line: bytes, tmp_path):
    first = json.dumps(START).encode()
    (tmp_path / FILE).write_bytes(b"\n".join([first, line, first, b""]))
    messages = read(tmp_path / FILE)
    assert next(messages)[0] == START
    with pytest.raises(JournalError, match=r"journal\.jsonl, line 2: "):
        next(messages)
    with pytest.raises(JournalError, match=r"journal\.jsonl, line 2: "):
        list(read(tmp_path / FILE, len(first) + 1))
    (tmp_path / FILE).write_bytes(b"\n".join([first, line, b""]))
    with pytest.raises(JournalError, match=r"journal\.jsonl, last line: "):
        last_message(tmp_path)


@given(MESSAGES, st.integers(min_value=0), st.integers(0, 7))
def test_changed_bit_is_named_or_changes_nothing(tmp_path_factory, messages, position, bit):
    folder = tmp_path_factory.mktemp("journal")
    with closing(Journal(folder)) as journal:
        for message in messages:
            journal.append(message)
    content = bytearray(journal.file.read_bytes())
    position %= len(content) - 1  # the end of the last line is what tells a whole line from a torn one
    content[position] ^= 1 << bit
    journal.file.write_bytes(content)
    got, named = [], ""
    try:
        got.extend(message for message, _ in read(journal.file))
    except JournalError as error:
        named = str(error)
    # The name of the checksum may be what changed.
    assert [{key: one.get(key) for key in right} for one, right in zip(got, messages, strict=False)] == messages[
        : len(got)
    ]
    line = content[:position].count(b"\n") + 1
    assert len(got) == len(messages) or f"line {line}: " in named or f"line {line + 1}: " in named


def test_changed_line_is_used_without_its_checksum(tmp_path):
    with closing(Journal(tmp_path)) as journal:
        journal.append(START)
        journal.append({"op": "tags", "values": {"loss": "1.25"}})
    changed = journal.file.read_text().replace("1.25", "1.35")
    journal.file.write_text(changed)
    with pytest.raises(JournalError, match=r'line 2: it was changed after it was written; .* remove "crc32"'):
        list(read(journal.file))
    journal.file.write_text(re.sub(r', "crc32": "\w+"', "", changed))
    assert [message for message, _ in read(journal.file)][1]["values"] == {"loss": "1.35"}


def test_unknown_message_kind_is_accepted(tmp_path):
    (tmp_path / FILE).write_text(f'{json.dumps(START)}\n{{"op": "of tomorrow"}}\n')
    assert len(list(read(tmp_path / FILE))) == 2


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{",
        '{"sqlite:///a": 3}',
        '{"sqlite:///a": {}}',
        '{"sqlite:///a": {"offset": -1}}',
        '{"sqlite:///a": {"offset": 9, "run_ic": "a"}}',
        '{"sqlite:///a": {"offset": 9}}',
        "\0\0",
    ],
)
def test_damaged_delivery_state_is_named(state: str, tmp_path):
    (tmp_path / "delivered.json").write_text(state)
    with pytest.raises(JournalError, match=r"delivered\.json: "):
        run_id(tmp_path, "sqlite:///a")


@pytest.mark.parametrize("name", [FILE, "."])
def test_journal_path_of_the_wrong_kind_is_named(name: str, tmp_path):
    if name == FILE:
        (tmp_path / "run" / FILE).mkdir(parents=True)
        with pytest.raises(JournalError, match="not a file"):
            last_message(tmp_path / "run")
    else:
        (tmp_path / "run").write_text("a file")
        with pytest.raises(JournalError, match="run"):
            Journal(tmp_path / "run")


def test_deleted_folder_is_not_recreated(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder)
    journal.append(START)
    shutil.rmtree(folder)
    with pytest.raises(JournalError, match="was deleted or replaced"):
        journal.append(numbered(1))
    assert not folder.exists()
    other = Journal(folder)  # a run that began in its place is not written into
    other.append(START)
    with pytest.raises(JournalError, match="was deleted or replaced"):
        journal.append(numbered(1))
    assert list(other.messages()) == [START]
    other.close()
    journal.close()


def test_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b'{"op": "a"}\n')
    with file.open("rb+") as lines:
        lines.truncate(1 << 40)  # a TiB that takes no space on the disk
    monkeypatch.setattr("qlora_exp.tracking.messages.LONGEST_LINE", 1 << 20)
    for reads in (journal.last_message, lambda folder: [*journal.read(folder / "journal.jsonl", 12)]):
        with pytest.raises(JournalError, match="longer than 1 MiB"):
            reads(tmp_path)
    with pytest.raises(JournalError, match="line is too long"):
        Journal(tmp_path)
    (tmp_path / "delivered.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(JournalError, match="delivered.json"):
        journal.run_id(tmp_path, "uri")
