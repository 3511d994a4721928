"""`bench engine` in one process, and the stopwatch that says where a step's time goes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.engine import EnginePlan, EngineReport, measure
from cluster.bench.engine_report import as_json, profile_tables, rates_table
from cluster.bench.profile import StepRecorder, mean_parts
from cluster.errors import BenchError, ConfigurationError, HeadFailedError
from cluster.head.stopwatch import Stopwatch
from cluster.step_stats import PARTS, StepStats
from model import Mixtral
from model.batch import Span, build_batch
from model.decoder import Decoder
from model.experts import LocalExperts
from model.phases import Phase


def plan(**fields: Any) -> EnginePlan:
    sound: dict[str, Any] = {
        "folder": Path(),
        "dtype": "float32",
        "quantization": None,
        "num_threads": 1,
        "worker_threads": 1,
        "workers": [0],
        "num_slices": 1,
        "sequences": [1, 3],
        "prefill": [20],
        "prompt_tokens": 5,
        "new_tokens": 4,
        "rounds": 2,
        "is_profiled": True,
    }
    return EnginePlan(**{**sound, **fields})


@pytest.fixture(scope="module")
def report(tiny_folder: Path) -> EngineReport:
    return measure(plan(folder=tiny_folder), lambda _: None)


def test_every_case_has_a_rate_for_each_round(report: EngineReport) -> None:
    assert [str(row.case) for row in report.rows] == ["decode 1", "decode 3", "prefill 20"]
    for row in report.rows:
        assert len(row.tokens_per_s) == 2
        assert min(row.tokens_per_s) > 0


def test_only_the_measured_phase_is_in_a_rows_steps(report: EngineReport) -> None:
    alone, three, prefill = ([s.num_tokens for s in row.steps] for row in report.rows)
    assert alone == [1] * 3 * 2  # the first of four tokens is the prompt's, in two rounds
    assert three == [3] * 3 * 2
    assert prefill == [20] * 2


def test_the_parts_of_a_step_sum_to_its_time(report: EngineReport) -> None:
    for row in report.rows:
        for step in row.steps:
            wall_s = step.forward_s + step.sampling_s + step.host_s
            assert sum(step.parts.values()) == pytest.approx(wall_s)
            assert min(step.parts.values()) > 0
        assert {"attention", "routing", "experts", "logits", "sampling", "host"} == set(row.parts)
        assert sum(row.parts.values()) == pytest.approx(
            sum(sum(step.parts.values()) for step in row.steps) / len(row.steps)
        )


def test_the_json_is_what_other_scripts_read(report: EngineReport) -> None:
    found = as_json(report, is_profiled=False)
    one, three, prefill = found["rows"]
    assert (one["phase"], one["sequences"], three["sequences"]) == ("decode", 1, 3)
    assert (prefill["phase"], prefill["prompt_tokens"]) == ("prefill", 20)
    assert "sequences" not in prefill
    assert "prompt_tokens" not in one
    for row in found["rows"]:
        assert (row["workers"], row["slices"]) == (0, 1)
        assert (row["experts"], row["dtype"]) == (None, "float32")
        assert len(row["tokens_per_s"]) == 2
    memory = found["memory"]
    assert memory["worker_pss_bytes"] == []
    assert memory["head_pss_bytes"] is not None
    assert "step_s" in as_json(report, is_profiled=True)["rows"][0]


def test_the_tables_have_every_case(report: EngineReport) -> None:
    assert rates_table(report).row_count == 3
    tables = profile_tables(report)
    assert len(tables) == 3
    for table in tables:
        assert len(table.columns) == 1 + 2
        assert table.row_count == 6 + 1  # the parts, and their sum


def test_memory_is_only_told_of_one_setting_alone(tiny_folder: Path) -> None:
    small = {"sequences": [1], "prefill": [1], "new_tokens": 2, "rounds": 1}
    found = measure(plan(folder=tiny_folder, workers=[0, 0], **small), lambda _: None)
    assert found.head_bytes is None
    assert len(found.rows) == 4


def test_what_does_not_fit_the_context_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="prefill 513 needs a context of 513"):
        measure(plan(folder=tiny_folder, prefill=[513]), lambda _: None)


def test_a_failing_step_ends_the_benchmark(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise HeadFailedError("out of luck")

    monkeypatch.setattr(LocalExperts, "dispatch", fail)
    with pytest.raises(BenchError, match=r"decode 1 with 0 workers.*out of luck"):
        measure(plan(folder=tiny_folder), lambda _: None)


# --- the stopwatch ---

MODEL_PHASES: list[Phase] = ["inputs", "attention", "routing", "experts", "logits", "outside"]


@given(st.lists(st.tuples(st.sampled_from(MODEL_PHASES), st.floats(0, 9))))
def test_a_stopwatch_loses_no_time(told: list[tuple[Phase, float]]) -> None:
    now = 0.0
    stopwatch = Stopwatch(lambda: now)
    expected = dict.fromkeys(MODEL_PHASES, 0.0)
    for phase, seconds in told:
        stopwatch.enter(phase)
        now += seconds
        expected[phase] += seconds
    taken = stopwatch.take()
    for phase in MODEL_PHASES:
        assert taken.get(phase, 0.0) == pytest.approx(expected[phase])
    assert sum(stopwatch.take().values()) == 0


@given(st.floats(0, 9), st.floats(0, 20))
def test_time_that_is_revealed_only_moves(waited: float, computed: float) -> None:
    clock: Iterator[float] = iter([0.0, 0.0, waited, waited])
    stopwatch = Stopwatch(lambda: next(clock))
    stopwatch.enter("transfer")
    stopwatch.enter("unpacking")
    stopwatch.reveal(computed, was="transfer", really="experts")
    taken = stopwatch.take()
    assert taken["experts"] == min(computed, waited)
    assert taken["transfer"] + taken["experts"] == pytest.approx(waited)


def test_a_decoder_tells_its_phases_layer_by_layer(mixtral: Mixtral) -> None:
    told: list[Phase] = []

    class Listener(Stopwatch):
        def enter(self, phase: Phase) -> None:
            told.append(phase)

    decoder = Decoder(mixtral.config, mixtral.decoder.weights, phases=Listener())
    batch = build_batch([Span([1, 2], 0, [0])], block_size=4, device=torch.device("cpu"))
    decoder.forward(batch, decoder.new_cache(num_blocks=1, block_size=4), mixtral.experts)
    layer: list[Phase] = ["attention", "routing", "experts"]
    assert told == ["inputs", *layer * mixtral.config.num_hidden_layers, "logits", "outside"]


def test_parts_that_never_occur_are_left_out() -> None:
    stats = StepStats(
        num_tokens=1,
        num_sequences=1,
        num_micro_batches=1,
        fill=0.5,
        num_emitted=1,
        num_reused=0,
        num_preempted=0,
        num_drafted=0,
        num_accepted=0,
        num_waiting=0,
        num_free_blocks=0,
        num_blocks=1,
        forward_s=5.0,
        sampling_s=1.0,
        host_s=0.5,
        phases={"attention": 3.0, "inputs": 0.5, "logits": 1.0, "outside": 9.0},
    )
    assert mean_parts([stats]) == {"attention": 3, "logits": 1, "sampling": 1, "host": 1.5}
    assert list(mean_parts([stats])) == [part for part in PARTS if part in mean_parts([stats])]
    recorder = StepRecorder()
    recorder.observe(stats)
    assert recorder.steps == [stats]
    assert "maestrale_step_tokens_total 1.0" in recorder.exposition()
