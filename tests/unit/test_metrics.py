"""Metrics of all processes read as one text, with nothing lost and nothing twice."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

from cluster.merging import merge
from cluster.metrics import HeadMetrics, IngressMetrics, WorkerMetrics
from cluster.step_stats import StepStats
from model.units import Unit


def samples(text: str) -> list[Sample]:
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def facts(found: list[Sample], **labels: str) -> list[tuple[str, dict[str, str], float]]:
    return sorted(
        ((s.name, {**s.labels, **labels}, s.value) for s in found), key=lambda fact: repr(fact)
    )


def head_text(*, num_tokens: int = 5) -> str:
    metrics = HeadMetrics()
    metrics.observe(
        StepStats(
            num_tokens=num_tokens,
            num_sequences=2,
            num_micro_batches=1,
            fill=0.5,
            num_emitted=1,
            num_reused=5,
            num_preempted=1,
            num_drafted=4,
            num_accepted=2,
            num_waiting=3,
            num_free_blocks=6,
            num_blocks=9,
            forward_s=0.02,
            sampling_s=0.001,
            host_s=0.002,
            phases={"attention": 0.004, "experts": 0.01, "outside": 1.0},
        )
    )
    return metrics.exposition()


def worker_text() -> str:
    metrics = WorkerMetrics()
    metrics.observe_pass([(Unit(0, 1), 4), (Unit(0, 2), 3)], 0.5, [0.1, 0.2])
    metrics.observe_pass([(Unit(1, 1), 2)], 0.25, [0.0])
    metrics.observe_call("ok")
    return metrics.exposition()


def ingress_text() -> str:
    metrics = IngressMetrics()
    metrics.observe_request("/v1/completions", 200, 0.3)
    metrics.observe_request("other", 404, 0.001)
    metrics.observe_prompt(7)
    return metrics.exposition()


def test_merging_keeps_every_sample_and_says_whose_it_is() -> None:
    texts = {
        "head-1": head_text(),
        "head-2": head_text(num_tokens=8),
        "worker-1": worker_text(),
        "ingress-1": ingress_text(),
    }
    expected = [
        fact for process, text in texts.items() for fact in facts(samples(text), process=process)
    ]
    assert facts(samples(merge(texts))) == sorted(expected, key=repr)


def test_a_metric_is_described_once_however_many_processes_have_it() -> None:
    text = merge({f"head-{i}": head_text() for i in range(3)})
    lines = text.splitlines()
    described = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    (tokens,) = [line for line in lines if line.startswith("# TYPE maestrale_step_tokens")]
    assert tokens.endswith(" counter")


@pytest.mark.parametrize(
    "text", [head_text(), worker_text(), ingress_text()], ids=["head", "worker", "ingress"]
)
def test_counters_end_in_total_once_and_nothing_in_created(text: str) -> None:
    for each in (text, merge({"process": text})):
        names = {sample.name for sample in samples(each)}
        assert not [name for name in names if name.endswith("_created")]
        assert not [name for name in names if "_total_total" in name]
        counters = [f for f in text_string_to_metric_families(each) if f.type == "counter"]
        assert counters
        assert all(s.name == f"{f.name}_total" for f in counters for s in f.samples)


@pytest.mark.parametrize(
    "text", [head_text(), worker_text(), ingress_text()], ids=["head", "worker", "ingress"]
)
def test_every_metric_is_named_after_us_and_described(text: str) -> None:
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("maestrale_")
        assert family.documentation


def test_merging_what_was_merged_changes_only_the_process() -> None:
    once = merge({"a": worker_text()})
    assert facts(samples(merge({"a": once}))) == facts(samples(once))


@pytest.mark.parametrize(
    "broken",
    [
        "no number here",
        'maestrale_x{a="b" 1',
        "maestrale_x{} abc",
        "# TYPE maestrale_x nonsense\nmaestrale_x 1",
        "{} 1",
        "<html>Bad gateway</html>",
        "\x00\xff",
    ],
)
def test_a_text_that_does_not_parse_is_left_out_whole_and_named(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text = merge({"worker-1": worker_text(), "worker-2": worker_text() + broken})
    assert facts(samples(text)) == facts(samples(worker_text()), process="worker-1")
    assert "metrics of worker-2 do not parse" in caplog.text


@given(text=st.text(max_size=60) | st.text(alphabet='ab{}="# \n1,TYPE', max_size=60))
def test_no_text_of_a_peer_can_break_the_merge(text: str) -> None:
    merged = merge({"good": worker_text(), "strange": text})
    good = [s for s in samples(merged) if s.labels["process"] == "good"]
    assert facts(good) == facts(samples(worker_text()), process="good")


def test_a_process_that_does_not_answer_is_no_error() -> None:
    assert merge({}) == ""
    assert facts(samples(merge({"a": worker_text(), "b": ""}))) == facts(
        samples(worker_text()), process="a"
    )


def test_names_of_processes_may_hold_any_character() -> None:
    name = 'head "1"\\\n'
    assert {s.labels["process"] for s in samples(merge({name: worker_text()}))} == {name}


def test_an_idle_head_shows_no_sequences() -> None:
    metrics = HeadMetrics()
    metrics.observe_idle(num_free_blocks=12)
    text = metrics.exposition()
    assert "maestrale_sequences_running 0.0" in text
    assert "maestrale_kv_blocks_free 12.0" in text
