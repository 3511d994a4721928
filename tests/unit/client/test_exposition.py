"""Prometheus' text format, read as prometheus_client reads it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.client.exposition import read_exposition

values = st.floats(allow_nan=False)
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(told=st.lists(st.tuples(labels, labels, values), max_size=5))
def test_samples_are_those_that_prometheus_reads(told: list[tuple[str, str, float]]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("load", "of\nwhat", ["process", "kind"], registry=registry)
    for process, kind, value in told:
        gauge.labels(process, kind).set(value)
    wait = Histogram("wait_seconds", "bare", registry=registry)
    wait.observe(0.3)
    text = generate_latest(registry).decode()
    expected = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert [(one.name, dict(one.labels), one.value) for one in read_exposition(text)] == expected


@pytest.mark.parametrize(
    ("line", "name", "labels", "value"),
    [
        ("a 1", "a", {}, 1.0),
        ("a{} 1", "a", {}, 1.0),
        ('a{b="c",} 1 1700000000000', "a", {"b": "c"}, 1.0),
        (r'a{b="\"}\\n\n, d=\"", c = "" } +Inf', "a", {"b": '"}\\n\n, d="', "c": ""}, float("inf")),
    ],
)
def test_every_form_of_a_line(line: str, name: str, labels: dict[str, str], value: float) -> None:
    (sample,) = read_exposition(f"# TYPE a gauge\n\n  {line}  \n")
    assert (sample.name, sample.labels, sample.value) == (name, labels, value)


@pytest.mark.parametrize(
    "line", ["<html>", "a", "a5", "banan", "a one", 'a{b="c} 1', 'a{b="c" d="e"} 1', "a{b} 1"]
)
def test_a_line_that_is_no_sample_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="no sample of a metric"):
        read_exposition(line)
