"""The load generator's arithmetic: workloads, statistics, goodput, reports. No I/O."""

import json
import math
import re
from itertools import islice, pairwise
from statistics import mean
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.page import page, plot, shares, ticks
from cluster.bench.report import Point, Run, as_json, notes, rates, times
from cluster.bench.summary import Limits, Record, distribution, percentile, summarise
from cluster.bench.workload import (
    FIRST_ID,
    Given,
    Lengths,
    Synthetic,
    jobs_from,
    poisson_arrivals,
)
from cluster.errors import ConfigurationError

TIMES = st.lists(st.floats(0, 1e6), min_size=1)


def record(**fields: Any) -> Record:
    """Sent at 10, first token at 11, the last of five at 13, ended at 13.5."""
    sound: dict[str, Any] = {
        "intended_s": 10.0,
        "sent_s": 10.0,
        "chunks_s": (11.0, 11.5, 12.0, 13.0),
        "ended_s": 13.5,
        "input_tokens": 7,
        "output_tokens": 5,
    }
    return Record(**{**sound, **fields})


# --- what is asked for, and when ---


@pytest.mark.parametrize("as_text", [False, True])
def test_a_request_depends_on_its_seed_and_number_alone(as_text: bool) -> None:
    def jobs(seed: int) -> Synthetic:
        return Synthetic(Lengths(3, 9), Lengths(1, 4), 500, seed, as_text=as_text)

    assert list(jobs_from(jobs(1), 5, 3)) == list(islice(jobs_from(jobs(1), 0, None), 5, 8))
    assert jobs(1).job(5) != jobs(1).job(6)
    assert jobs(1).job(5) != jobs(2).job(5)


@given(st.integers(1, 300), st.integers(0, 50), st.integers(0, 1000))
def test_synthetic_prompts_keep_lengths_and_vocabulary(low: int, more: int, number: int) -> None:
    job = Synthetic(Lengths(low, low + more), Lengths(2, 2), 310, seed=0).job(number)
    assert not isinstance(job.prompt, str)
    assert low <= len(job.prompt) <= low + more
    assert all(FIRST_ID <= token_id < 310 for token_id in job.prompt)
    assert job.output_tokens == 2


def test_lengths_are_read_as_they_are_written() -> None:
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("64-512") == Lengths(64, 512)
    assert Lengths.parse("lognormal:100:0.5") == Lengths(100, 800, 0.5)
    for wrong in ("", "0", "9-3", "-5", "lognormal:0:1", "lognormal:5", "many"):
        with pytest.raises(ConfigurationError, match="no length in tokens"):
            Lengths.parse(wrong)


def test_log_normal_lengths_have_their_median_and_a_bound() -> None:
    jobs = Synthetic(Lengths.parse("lognormal:100:1.0"), Lengths(1, 1), 400, seed=3)
    lengths = sorted(len(job.prompt) for job in jobs_from(jobs, 0, 400))
    assert 85 <= lengths[200] <= 118  # the median of 400 draws errs by 6 %
    assert lengths[0] >= 1
    assert lengths[-1] <= 800


def test_a_file_of_prompts_holds_text_and_ids() -> None:
    text = 'once upon\n\n{"prompt": "a\\ntime"}\n{"prompt": [5, 6]}\n'
    jobs = Given.parse(text, Lengths(1, 1), seed=0)
    assert [jobs.job(n).prompt for n in range(4)] == ["once upon", "a\ntime", [5, 6], "once upon"]


@pytest.mark.parametrize("line", ["{", '{"prompt": []}', '{"prompt": [true]}', '{"text": "a"}'])
def test_a_bad_prompt_is_named_by_its_line(line: str) -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        Given.parse(f"fine\n{line}", Lengths(1, 1), seed=0)


def test_poisson_arrivals_have_their_rate_and_its_spread() -> None:
    arrivals = list(islice(poisson_arrivals(50.0, seed=1), 4000))
    gaps = [after - before for before, after in pairwise([0.0, *arrivals])]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.06)  # four standard errors
    late_share = sum(gap > 1 / 50 for gap in gaps) / len(gaps)
    assert late_share == pytest.approx(math.exp(-1), abs=0.03)  # exponential, not regular


# --- statistics ---


@given(TIMES)
def test_percentiles_ascend_between_least_and_greatest(values: list[float]) -> None:
    ascending = sorted(values)
    found = distribution(values)
    assert found is not None
    bounds = [ascending[0], found.p50, found.p90, found.p99, found.max]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(bounds))
    assert found.max == ascending[-1] == percentile(ascending, 100)
    assert ascending[0] * (1 - 1e-9) <= found.mean <= ascending[-1] * (1 + 1e-9)


def test_percentiles_interpolate_between_neighbours() -> None:
    assert percentile([10.0, 20.0, 30.0], 50) == 20.0
    assert percentile([10.0, 20.0], 75) == 17.5
    assert distribution([]) is None


def test_a_record_measures_from_its_intended_time() -> None:
    late = record(intended_s=6.0)
    assert (late.ttft_s, late.tpot_s, late.e2e_s) == (5.0, 0.5, 7.5)
    assert late.gaps_s == [0.5, 0.5, 1.0]
    assert (record(output_tokens=1).tpot_s, record(chunks_s=()).ttft_s) == (None, None)


def test_rates_count_what_went_well_over_the_whole_time() -> None:
    failed = record(intended_s=11.0, ended_s=20.0, error="timeout", chunks_s=())
    found = summarise([record(), record(input_tokens=None, is_counted=True), failed, failed])
    assert found.duration_s == 10.0
    assert (found.requests_per_s, found.output_tokens_per_s) == (0.2, 1.0)
    assert found.input_tokens_per_s == 0.7
    assert found.errors == {"timeout": 2}
    assert (found.num_ok, found.num_failed) == (2, 2)
    assert (found.num_counted, found.num_without_input) == (1, 1)
    assert found.measures["ttft"] is not None
    assert found.measures["ttft"].max == 1.0
    assert found.good_share is None


def test_goodput_counts_requests_within_every_limit() -> None:
    records = [
        record(),
        record(chunks_s=(12.0, 13.0)),  # first token late
        record(output_tokens=2),  # tokens slow
        record(error="HTTP 500"),
        record(chunks_s=(11.0,), output_tokens=1),  # no second token to be slow
    ]
    found = summarise(records, Limits.parse("ttft:1500, tpot:600"))
    assert found.good_share == 2 / 5
    assert found.good_requests_per_s == pytest.approx(2 / 3.5)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1), st.floats(0.1, 9))
def test_goodput_never_grows_when_a_limit_tightens(
    waits: list[tuple[float, float]], limit_s: float
) -> None:
    records = [
        record(intended_s=0.0, chunks_s=(first, first + rest), ended_s=first + rest)
        for first, rest in waits
    ]
    wide = summarise(records, Limits(ttft_s=limit_s)).good_share
    both = summarise(records, Limits(ttft_s=limit_s, e2e_s=limit_s)).good_share
    tight = summarise(records, Limits(ttft_s=limit_s / 2)).good_share
    assert wide is not None
    assert both is not None
    assert tight is not None
    assert wide >= both
    assert wide >= tight


def test_limits_are_read_in_milliseconds() -> None:
    assert Limits.parse("ttft:500 tpot:50,e2e:2.5") == Limits(0.5, 0.05, 0.0025)
    assert Limits.parse(" ") is None
    for wrong in ("ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:5"):
        with pytest.raises(ConfigurationError, match="goodput limit"):
            Limits.parse(wrong)


# --- reports ---


def run(*loads: float, limits: Limits | None = None) -> Run:
    records = [
        record(),
        record(ended_s=14.0, is_counted=True, input_tokens=None),
        record(error="HTTP 429", message="<busy> & angry", sent_s=10.5, chunks_s=()),
    ]
    points = [Point(load, records, summarise(records, limits)) for load in loads]
    return Run({"model": "<script>alert(1)</script>"}, "callers", points)


def test_notes_name_failures_counted_tokens_and_a_slow_generator() -> None:
    text = "\n".join(notes(run(8)))
    assert "1 x HTTP 429" in text
    assert "<busy> & angry" in text
    assert "1 answers came without usage" in text
    assert "input tokens of 1 are unknown" in text
    assert "500 ms after its time" in text


def test_tables_have_a_cell_for_every_heading() -> None:
    for limits in (None, Limits(ttft_s=1.0)):
        for cells in (rates(run(1, 8, limits=limits)), times(run(1, 8, limits=limits))):
            assert {len(row) for row in cells.rows} == {len(cells.heads)}
            assert cells.as_rich().row_count == len(cells.rows)


def test_the_json_holds_every_request_from_the_first_ones_start() -> None:
    (point,) = json.loads(json.dumps(as_json(run(8))))["points"]
    assert point["summary"]["requests_per_s"] == 0.5
    assert [request["ended_s"] for request in point["requests"]] == [3.5, 4.0, 3.5]
    assert point["requests"][2]["error"] == "HTTP 429"


def test_the_page_escapes_what_others_say_and_fetches_nothing() -> None:
    html = page(run(1, 8, limits=Limits(ttft_s=1.0)))
    assert "<script" not in html
    assert "&lt;busy&gt; &amp; angry" in html
    assert not re.search(r"""(src|href|url)\s*[=(]""", html)
    assert html.count("<svg") == 3 + 5  # over the load, and over the requests


def test_plots_are_well_formed_and_stay_within_their_frame() -> None:
    figure = ElementTree.fromstring(plot("a < b", "x", {"one": [(0, 0), (3, 70), (7, 65)]}))
    (line,) = figure.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == 3
    assert all(0 <= x <= 460 and 0 <= y <= 280 for x, y in points)
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[2][1] < points[0][1]  # downwards
    assert plot("nothing", "x", {"one": []}) == ""


@given(st.floats(0, 1e9))
def test_ticks_hold_the_largest_value_in_few_steps(largest: float) -> None:
    step, end = ticks(largest)
    assert end >= largest * (1 - 1e-9)
    assert 1 <= round(end / step) <= 10


@given(TIMES)
def test_shares_climb_to_all_of_the_values(values: list[float]) -> None:
    curve = shares(values)
    assert len(curve) <= 201
    assert curve[-1] == (max(values), 100.0)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(curve))
