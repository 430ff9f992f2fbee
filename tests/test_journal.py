import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.journal import FILE, Journal, is_held, last_message, read, write_atomically

MESSAGES = st.lists(st.fixed_dictionaries({"op": st.sampled_from(["metrics", "tags"]), "text": st.text()}), min_size=1)


@given(MESSAGES, st.integers(min_value=0))
def test_whatever_a_kill_cuts_off_whole_messages_stay_in_order(tmp_path_factory, messages, cut):
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
    again.append({"op": "tags", "text": "later"})
    assert list(again.messages()) == [*survivors, {"op": "tags", "text": "later"}]
    again.close()


def test_what_was_delivered_is_not_given_again(tmp_path):
    journal = Journal(tmp_path)
    for number in range(3):
        journal.append({"op": "metrics", "number": number})
    journal.use("sqlite:///a")
    first = next(journal.undelivered())
    journal.note(offset=first[1], run_id="abc")
    journal.close()
    again = Journal(tmp_path)
    again.use("sqlite:///a")
    assert [message["number"] for message, _ in again.undelivered()] == [1, 2]
    assert again.state["run_id"] == "abc"
    again.use("sqlite:///b")  # another store has nothing
    assert [message["number"] for message, _ in again.undelivered()] == [0, 1, 2]
    assert "run_id" not in again.state
    again.note(run_id="def")
    again.use("sqlite:///a")
    assert again.state["run_id"] == "abc"
    again.forget()
    assert len(list(again.undelivered())) == 3
    again.close()


def test_messages_that_the_power_took_after_they_were_sent_do_not_confuse(tmp_path):
    journal = Journal(tmp_path)
    journal.use("sqlite:///a")
    journal.append({"op": "metrics", "number": 0})
    journal.append({"op": "metrics", "number": 1})
    journal.note(offset=journal.file.stat().st_size)
    journal.close()
    journal.file.write_bytes(journal.file.read_bytes().splitlines(keepends=True)[0])
    again = Journal(tmp_path)
    again.use("sqlite:///a")
    again.append({"op": "metrics", "number": 2})
    assert [message["number"] for message, _ in again.undelivered()] == [2]
    again.close()


def test_the_last_message_is_found_behind_a_long_one(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"op": "tags", "text": "x" * 100_000})
    assert last_message(tmp_path) == {"op": "tags", "text": "x" * 100_000}
    journal.append({"op": "end"})
    assert last_message(tmp_path) == {"op": "end"}
    journal.close()


def test_only_one_process_holds_a_journal(tmp_path):
    code = (
        "import sys, pathlib; from qlora_exp.journal import Journal\n"
        f"j = Journal(pathlib.Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    assert not is_held(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        with pytest.raises(Timeout):
            Journal(tmp_path)
        other.kill()
    assert not is_held(tmp_path)


def test_a_folder_without_a_journal_has_no_messages(tmp_path):
    assert list(read(tmp_path / FILE)) == []
    assert last_message(tmp_path) is None


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    write_atomically(file, json.dumps({"new": True}))
    assert json.loads(file.read_text()) == {"new": True}
    assert [path.name for path in Path(tmp_path).iterdir()] == ["state.json"]
