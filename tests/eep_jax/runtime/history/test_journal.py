"""The journal keeps every whole line, whatever happened to the process that wrote it."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.runtime.history.journal import Journal, replay


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


@given(cut=st.integers(1, 200))
def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    write(path, "a", "b", "c")
    size = path.stat().st_size
    cut = min(cut, size)
    os.truncate(path, size - cut)
    kept = path.read_bytes().count(b"\n")
    assert kinds(path) == ["a", "b", "c"][:kept]
    write(path, "d")
    assert kinds(path) == [*["a", "b", "c"][:kept], "d"]


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\x80", b"{", b"[]", b"null", b'{"time": 1}', b"", b'"kind"']
)
def test_a_line_that_is_no_record_is_skipped(path, garbage):
    write(path, "a")
    with path.open("ab") as file:
        file.write(garbage + b"\n")
    write(path, "b")
    assert kinds(path) == ["a", "b"]


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
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["text"] == "two\nlines"
