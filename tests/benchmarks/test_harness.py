"""A record keeps what it says, and the table shows the newest of each."""

import importlib.metadata
import json

import pytest

from benchmarks.harness import (
    Record,
    append,
    commit,
    compared,
    cpu_device,
    gpu_device,
    percentile,
    read,
)
from benchmarks.table import insert, newest, render, render_headlines, split_metric

COMMON = {
    "device": "cpu, 2 cores, X",
    "ranks": 4,
    "shape": {"samples": 8},
    "jax": "1",
    "commit": "c",
}


def a_record(metric: str = "pause p50", value: float = 0.5, day: int = 1, **changes) -> Record:
    values = {"bench": "recovery", "metric": metric, "value": value, "unit": "s", **COMMON}
    return Record(**values | {"time": f"2026-01-{day:02d}T00:00:00+00:00"} | changes)


class TestRecords:
    def test_are_read_as_they_were_written_and_never_overwritten(self, tmp_path):
        path = tmp_path / "new" / "r.jsonl"
        first, second = a_record(), a_record(value=0.25, **compared(10.0, 0.25))
        append(path, [first])
        append(path, [second])
        assert read([path]) == [first, second]
        assert second.ratio == 0.025

    def test_have_the_keys_of_the_design(self, tmp_path):
        append(tmp_path / "r.jsonl", [a_record()])
        keys = "bench metric value unit bound baseline ratio device ranks shape jax commit time"
        assert set(json.loads((tmp_path / "r.jsonl").read_text())) == set(keys.split())

    def test_know_their_versions(self):
        found = Record(bench="b", metric="m", value=1.0, unit="s", device="d", ranks=1, shape={})
        assert found.jax == importlib.metadata.version("jax")
        assert found.time.endswith("+00:00")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_that_say_nothing_are_refused(self, value):
        with pytest.raises(ValueError, match="must be finite"):
            a_record(value=value)

    def test_a_line_that_is_none_is_named(self, tmp_path):
        append(tmp_path / "r.jsonl", [a_record()])
        with (tmp_path / "r.jsonl").open("a") as file:
            file.write('{"bench": "x"}\n')
        with pytest.raises(ValueError, match=r"r\.jsonl:2 is not a record"):
            read([tmp_path / "r.jsonl"])

    def test_the_device_names_cores_and_processor(self):
        kind, cores, _ = cpu_device().split(", ", 2)
        assert kind == "cpu" and "core" in cores


class TestPercentile:
    def test_is_always_a_measured_value(self):
        values = [3.0, 1.0, 2.0, 4.0]
        assert [percentile(values, p) for p in (1, 25, 50, 75, 76, 100)] == [1, 1, 2, 3, 4, 4]

    @pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
    def test_of_nothing_is_refused(self, values, percent):
        with pytest.raises(ValueError):
            percentile(values, percent)


class TestTable:
    def test_shows_the_newest_of_each_metric_and_device(self):
        old, new = a_record(value=9.0, day=1), a_record(value=1.0, day=2)
        other = a_record(value=5.0, device="gpu")
        assert newest([new, old, other]) == [new, other]
        assert newest([old, a_record(day=3, shape={"samples": 20})])[0].shape == {"samples": 20}
        assert len(newest([old, a_record(shape={"tokens": 3, "samples": 8})])) == 2

    def test_statistics_are_columns_and_the_device_is_named(self):
        lines = render(
            [
                a_record(baseline=20.0, ratio=0.025),
                a_record("pause max", 1234.4),
                a_record("bytes", 7.0),
            ]
        ).splitlines()
        assert lines[0] == "Device: cpu, 2 cores, X"
        head = (
            "| bench | metric | value | p50 | max | unit | baseline | ratio | ranks | n | commit |"
        )
        assert lines[2] == head
        assert lines[4] == "| recovery | pause |  | 0.500 | 1,234 | s | 20.0 | 0.0250 | 4 | 8 | c |"
        assert lines[5] == "| recovery | bytes | 7.00 |  |  | s |  |  | 4 | 8 | c |"
        assert {line.count("|") for line in lines[2:]} == {12}

    def test_goes_between_the_markers_and_changes_nothing_else(self):
        text = "a\n<!-- results -->\nold\n<!-- /results -->\nz\n"
        assert insert(text, "new") == "a\n<!-- results -->\nnew\n<!-- /results -->\nz\n"
        assert insert(insert(text, "b"), "c") == insert(text, "c")

    @pytest.mark.parametrize("text", ["", "<!-- results -->", "<!-- /results --><!-- results -->"])
    def test_needs_both_markers_in_order(self, text):
        with pytest.raises(ValueError, match="needs a line"):
            insert(text, "new")

    def test_the_last_word_of_a_metric_may_be_its_statistic(self):
        assert split_metric("offered_loading_s p90") == ("offered_loading_s", "p90")
        assert split_metric("tokens_per_s") == ("tokens_per_s", "")


class TestCommit:
    def test_is_told_where_there_is_no_checkout(self, monkeypatch):
        monkeypatch.setenv("EEP_COMMIT", "abc")
        assert commit() == "abc"

    def test_is_empty_where_there_is_no_git(self, monkeypatch):
        monkeypatch.delenv("EEP_COMMIT", raising=False)
        monkeypatch.setenv("PATH", "")
        assert commit() == ""


@pytest.mark.parametrize("says, name", [("NVIDIA H9", "NVIDIA H9"), (None, "unknown GPU")])
def test_a_gpu_has_the_name_of_the_driver(says, name, tmp_path, monkeypatch):
    if says is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho {says}\necho other\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if says else str(tmp_path))
    assert gpu_device() == name


def test_a_headline_is_the_newest_record_that_fits_beside_its_bound_or_baseline():
    shape = {"tokens": 128, "hidden": 7168, "dtype": "bfloat16"}
    made = {"bench": "dispatch", "metric": "time p50", "unit": "us", "bound": 8.0}
    new, old = (a_record(value=v, day=d, shape=shape, **made) for v, d in ((10.0, 2), (12.0, 1)))
    narrow = a_record(value=1.0, day=3, shape=shape | {"hidden": 2048}, **made)
    table = render_headlines([new, old, narrow])
    row = next(line for line in table.splitlines() if line.startswith("| Dispatch"))
    assert "| 10.0 us | a copy of the same bytes: 8.00 us, x 1.25 |" in row
    assert table.count("\n") == 4, "a line for what was measured, none for the rest"
