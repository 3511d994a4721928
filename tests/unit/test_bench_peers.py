"""The comparison's pure parts: what a limit allows, what is kept over restarts, what is printed."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from model.config import MixtralConfig
from model.weights import Checkpoint
from tests.bench import make_checkpoint
from tests.bench.peers.engines.engine import WeightBytes
from tests.bench.peers.engines.llamacpp import LlamaCpp, batches_in
from tests.bench.peers.engines.maestrale import Maestrale
from tests.bench.peers.errors import PeerError
from tests.bench.peers.http import row_of
from tests.bench.peers.plan import Plan, Row
from tests.bench.peers.results import Result, Results, Task
from tests.bench.peers.roofline import Limits, experts_touched, share_of_limit, step_work
from tests.bench.peers.table import Report, spread
from tests.fakes import small_config

CONFIG = MixtralConfig.from_dict(small_config())
BF16 = WeightBytes(2, 2, 2)
MIXTRAL = MixtralConfig.from_dict(make_checkpoint.config_content("mixtral-8x7b", 2))


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape whose checkpoints are quickly made; they have no tokenizer."""
    shape = {"hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(make_checkpoint.SHAPES, "small", shape)
    monkeypatch.setattr(make_checkpoint, "write_tokenizer", lambda folder: None)
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 200_000)
    return "small"


def result(round_number: int = 0, **changes: object) -> Result:
    """A decode of one sequence, by `Maestrale`."""
    row = Row(phase="decode", size=1, tokens_per_s=4.0)
    given = Result(
        task=Task("engine", "Maestrale", "bf16"),
        round=round_number,
        rows=[row],
        figures=[],
        peak_bytes=2**30,
        above_idle_bytes=None,
        busy_percent=0.0,
        version="abc",
    )
    return replace(given, **changes)  # type: ignore[arg-type]


# --- the checkpoint ---


def test_checkpoint_loads_and_is_finite(tmp_path: Path, small_shape: str) -> None:
    folder = make_checkpoint.make_checkpoint(small_shape, 2, tmp_path / "made")
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    assert (config.num_hidden_layers, config.vocab_size, config.rope_theta) == (2, 32000, 1e6)
    assert checkpoint.load_experts(config.expert_units).keys() == set(config.expert_units)
    assert torch.isfinite(checkpoint.load_decoder().lm_head_VD).all()


def test_checkpoint_is_finished_not_written_again(tmp_path: Path, small_shape: str) -> None:
    folder = make_checkpoint.make_checkpoint(small_shape, 1, tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    contents = [shard.read_bytes() for shard in shards]
    written = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    make_checkpoint.make_checkpoint(small_shape, 1, tmp_path)
    assert [shard.read_bytes() for shard in shards] == contents
    now = [shard.stat().st_mtime_ns for shard in shards]
    assert [a == b for a, b in zip(written, now, strict=True)] == [
        index != 1 for index in range(len(shards))
    ]


def test_folder_of_another_checkpoint_is_refused(tmp_path: Path, small_shape: str) -> None:
    make_checkpoint.make_checkpoint(small_shape, 1, tmp_path)
    with pytest.raises(ValueError, match="another checkpoint"):
        make_checkpoint.make_checkpoint(small_shape, 2, tmp_path)


# --- the limits ---


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_experts_touched_is_the_mean_over_all_choices(num_rows: int) -> None:
    pairs = [{a, b} for a in range(4) for b in range(a)]  # top 2 of 4
    counts = [len(set().union(*chosen)) for chosen in product(pairs, repeat=num_rows)]
    assert experts_touched(CONFIG, num_rows) == pytest.approx(sum(counts) / len(counts))


def test_one_step_of_mixtral_reads_what_its_shapes_say() -> None:
    attention, expert, head = 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336, 4096 * 32000
    work = step_work(MIXTRAL, 1, 1, BF16)
    assert work.num_bytes == 2 * (2 * (attention + 2 * expert) + head)
    assert work.num_operations == work.num_bytes  # two per weight, each of two bytes
    many = step_work(MIXTRAL, 512, 1, BF16)
    assert many.num_bytes == pytest.approx(2 * (2 * (attention + 8 * expert) + head))
    assert many.num_operations == 2 * (512 * 2 * (attention + 2 * expert) + head)


def test_share_is_of_the_limit_that_binds() -> None:
    work = step_work(CONFIG, 4, 4, BF16)
    reading = Limits(bytes_per_s=work.num_bytes, operations_per_s=1e15)  # a step a second
    computing = Limits(bytes_per_s=1e15, operations_per_s=2 * work.num_operations)
    assert share_of_limit(CONFIG, "decode", 4, 2.0, BF16, reading) == pytest.approx(0.5)
    assert share_of_limit(CONFIG, "decode", 4, 2.0, BF16, computing) == pytest.approx(0.25)


def test_fewer_bits_read_fewer_bytes(tiny_folder: Path) -> None:
    engine = Maestrale("Maestrale", num_workers=0)
    engine.prepare(Plan(checkpoint=tiny_folder))
    for made in (engine.weight_bytes, LlamaCpp().weight_bytes):
        sizes = [made(precision).expert for precision in ("bf16", "8 bit", "4 bit")]
        assert sizes[0] == 2
        assert 1 < sizes[1] < 1.1
        assert 0.5 < sizes[2] < 0.65


# --- what is kept ---


def test_finished_measurements_survive_a_restart(tmp_path: Path) -> None:
    file, key = tmp_path / "cache" / "results.jsonl", {"commit": "a", "sizes": (1, 8)}
    Results(file, key).add(result(0))
    with file.open("a", encoding="utf-8") as cut:
        cut.write('{"key": {"com')
    Results(file, key).add(result(1))
    again = Results(file, key)
    assert again.all == [result(0), result(1)]
    task = result().task
    assert [again.has(task, number) for number in range(3)] == [True, True, False]
    assert not again.has(replace(task, precision="4 bit"), 0)
    assert Results(file, key | {"commit": "b"}).all == []


def test_failed_requests_are_no_result() -> None:
    summary = {"errors": {"timeout": 2}, "output_tokens_per_s": 5.0, "measures": {}}
    with pytest.raises(PeerError, match="timeout"):
        row_of({"points": [{"summary": summary}]}, Plan(checkpoint=Path()))


def test_batches_are_found_among_other_messages() -> None:
    log = 'load: done\nmain: n_kv_max{"n_kv_max": 64, "pl": 1, "speed_tg": 2.5}.\n{"n_kv_max": 9}'
    assert batches_in(log) == [{"n_kv_max": 64, "pl": 1, "speed_tg": 2.5}, {"n_kv_max": 9}]


# --- what is printed ---


def test_spread_is_median_least_and_greatest() -> None:
    assert spread([12.34, 1234.5, 0.5678]) == "12.3 (0.568-1234)"
    assert spread([2.0]) == "2"
    assert spread([]) == ""


def test_report_shows_rates_shares_and_failures(tiny_folder: Path) -> None:
    plan = Plan(checkpoint=tiny_folder, sequences=(1,), prefill=())
    engine = Maestrale("Maestrale", num_workers=0)
    engine.prepare(plan)
    work = step_work(CONFIG, 1, 1, BF16)
    figures = [
        {"what": "memory", "kind": "plain pages", "threads": 1, "per_s": 8 * work.num_bytes},
        {"what": "matrix", "kind": "bfloat16", "threads": 1, "per_s": 1e15},
    ]
    limits = result(task=Task("limits"), rows=[], figures=figures)
    faster = [Row(phase="decode", size=1, tokens_per_s=6.0)]
    text = Report(
        plan,
        CONFIG,
        [engine],
        [limits, result(0), result(1, rows=faster)],
        {"vLLM": "cannot be prepared: no such package"},
        ("Maestrale", "Maestrale"),
    ).markdown()
    assert "| Maestrale, dense | 5 (4-6), 62 % |" in text
    assert "| decode 1 | 1.000 | 1.000 (1.000-1.000) |" in text
    assert "- vLLM: cannot be prepared: no such package" in text


def test_result_is_on_disk_as_one_line(tmp_path: Path) -> None:
    Results(tmp_path / "r", {"commit": "a"}).add(result())
    (line,) = (tmp_path / "r").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["rows"][0]["tokens_per_s"] == 4.0
