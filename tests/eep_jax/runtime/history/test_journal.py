"""A record is in the journal or not, whatever happens to the disk and to the process."""

import json
import os
import re
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.errors import RunDirError
from eep_jax.runtime.history.journal import Journal, replay
from eep_jax.runtime.history.journal_format import encode_record, read_journal
from tests.support.disks import room_for


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def write(path, *kinds: str) -> None:
    journal = Journal(path)
    for number, kind in enumerate(kinds):
        journal.append(kind, {"number": number})
    journal.close()


def kinds(path) -> list[str]:
    return [record["kind"] for record in replay(path)]


def test_what_was_appended_is_read_back_in_order(path):
    write(path, "a", "b")
    write(path, "c")
    assert kinds(path) == ["a", "b", "c"]
    assert replay(path)[1]["number"] == 1 and replay(path)[1]["time"] > 1e9


def test_no_journal_is_an_empty_one(path):
    assert replay(path) == []


def test_an_append_is_on_disk_when_it_returns(path):
    journal = Journal(path)
    record = journal.append("a", {"rank": 1})
    assert replay(path) == [record]  # by another reader, with the writer still open
    journal.close()


def test_a_fact_cannot_replace_the_kind(path):
    journal = Journal(path)
    assert journal.append("commit", {"kind": "repair"})["kind"] == "commit"
    journal.close()


def test_a_file_cut_at_any_byte_has_the_records_before_it_and_takes_new_ones(path):
    """As after a loss of power, or a process killed in the middle of a write."""
    write(path, "a", "b", "c")
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = ["a", "b", "c"][: max(0, whole[:cut].count(b"\n") - 1)]  # the first is the header
        assert kinds(path) == kept, cut
        write(path, "d")
        assert kinds(path) == [*kept, "d"], cut


def test_zeros_behind_the_last_record_are_left_out(path):
    """Some file systems extend a file before its data, and lose power between the two."""
    write(path, "a")
    with path.open("ab") as file:
        file.write(bytes(5_000))
    assert kinds(path) == ["a"]
    write(path, "b")
    assert kinds(path) == ["a", "b"]


def test_a_flipped_bit_is_reported_with_its_line(path):
    """But for the last newline, without which the last record looks as if it was cut off."""
    write(path, "a", "b", "c")
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        line = whole[:at].count(b"\n") + 1
        with pytest.raises(RunDirError, match=rf"damaged in line {line}: .*truncate -s \d+"):
            Journal(path)
        assert path.read_bytes() == flipped, "it is left as it was"


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\x80", b"{", b"[]", b"null", b'{"time": 1}', b"", b'"kind"']
)
def test_a_line_that_is_no_record_is_reported_wherever_it_is(path, garbage):
    write(path, "a")
    with path.open("ab") as file:
        file.write(garbage + b"\n")
    with pytest.raises(RunDirError, match=r"damaged in line 3: it is .*not a record"):
        replay(path)


def test_the_way_out_that_the_error_names_works(path):
    write(path, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"#" + lines[2], *lines[3:]]))
    with pytest.raises(RunDirError) as caught:
        replay(path)
    os.truncate(path, int(re.search(r"truncate -s (\d+)", str(caught.value))[1]))
    assert kinds(path) == ["a"]


def test_a_journal_of_another_version_is_refused_in_a_sentence(path):
    path.write_text('{"rank":1,"time":1.0,"kind":"dead"}\n')
    with pytest.raises(RunDirError, match="is a journal of version 1, this program reads version"):
        replay(path)
    path.write_bytes(encode_record({"kind": "journal", "version": 99, "config": {}}))
    with pytest.raises(RunDirError, match=r"'version': 99.*another version of this program"):
        replay(path)
    path.write_text("my diary")
    with pytest.raises(RunDirError, match="is no journal"):
        replay(path)


def test_the_header_keeps_the_facts_of_the_run_over_openings_and_compactions(path):
    Journal(path, {"ranks": 4}).close()
    journal = Journal(path, {"ranks": 8})
    journal.compact([{"kind": "b"}])
    journal.close()
    assert read_journal(path).config == {"ranks": 4}


def test_others_may_not_read_it(path):
    path.touch(mode=0o644)
    journal = Journal(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.compact([])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.close()


@given(room=st.integers(0, 150))
def test_a_record_that_finds_no_room_is_not_there_and_never_comes_back(tmp_path_factory, room):
    path = tmp_path_factory.mktemp("full") / "journal.jsonl"
    journal = Journal(path)
    journal.append("a", {})
    with room_for(path.stat().st_size + room):
        while not journal.problem:
            before = path.read_bytes()
            refused = journal.append("refused", {})
        assert refused["kind"] == "refused" and "the journal is off" in journal.problem
        assert path.read_bytes() == before, "the part that was written is cut off"
        journal.append("refused", {})
        assert not journal.compact([{"kind": "b", "text": "x" * 500}])
        assert path.read_bytes() == before and journal.problem
    journal.append("refused", {})
    assert path.read_bytes() == before, "the state of that time is not on disk yet"
    assert journal.compact([{"kind": "b"}]) and not journal.problem
    journal.append("c", {})
    journal.close()
    assert kinds(path) == ["b", "c"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_former_owner_that_still_writes_reaches_no_reader(path):
    former = Journal(path)
    former.append("a", {})
    journal = Journal(path)
    former.append("late", {})
    journal.append("b", {})
    assert kinds(path) == ["a", "b"]
    former.close(), journal.close()


def test_it_is_full_beyond_its_limit_and_compaction_makes_room(path):
    journal = Journal(path, bytes_max=200)
    while not journal.is_full:
        journal.append("a", {})
    journal.compact([{"kind": "b"}])
    assert not journal.is_full and kinds(path) == ["b"]
    journal.append("c", {})
    assert kinds(path) == ["b", "c"]
    journal.close()


def test_what_stays_large_when_compacted_is_left_alone_until_it_has_doubled(path):
    """Else a supervisor with many long requests would do nothing but write its journal anew."""
    journal = Journal(path, bytes_max=200)
    kept = [{"kind": "b", "text": "x" * 1_000}]
    journal.compact(kept)
    assert not journal.is_full
    for _ in range(2):
        size = path.stat().st_size
        while not journal.is_full:
            journal.append("a", {})
        assert 2 * size < path.stat().st_size < 2 * size + 200
        journal.compact(kept)
    journal.compact([])
    while not journal.is_full:
        journal.append("a", {})
    assert path.stat().st_size < 400, "the limit is the old one again"
    journal.close()


def test_an_existing_journal_may_be_full_from_the_start(path):
    write(path, *"abcdef")
    journal = Journal(path, bytes_max=50)
    assert journal.is_full
    journal.close()


def test_compaction_that_fails_leaves_everything_as_it_was(path, monkeypatch):
    journal = Journal(path)
    journal.append("a", {})
    with pytest.raises(TypeError):
        journal.compact([{"kind": "b"}, {"kind": object()}])
    assert kinds(path) == ["a"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.compact([{"kind": "b"}])
    journal.append("c", {})
    assert kinds(path) == ["a", "c"]
    journal.close()


def test_one_line_is_one_json_object(path):
    journal = Journal(path)
    journal.append("a", {"text": "two\nlines"})
    journal.close()
    _, line = path.read_text().splitlines()
    assert json.loads(line)["record"]["text"] == "two\nlines"
