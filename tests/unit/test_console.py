"""People see what there is, to the letter: paths, addresses and words may look like markup."""

from pathlib import Path

import pytest

from cluster.console import (
    ProgressLines,
    console,
    errors,
    print_certificates,
    print_placement,
    print_status,
)
from cluster.schema import LoadStatus, Readiness, WorkerStatus

LOOKS_LIKE_MARKUP = "models/[bold]new[/bold] [/x] :smile: [fd00::1]"


def test_a_text_is_shown_to_the_letter() -> None:
    for shown_on in (console, errors):
        with shown_on.capture() as told:
            shown_on.print(LOOKS_LIKE_MARKUP)
        assert told.get() == f"{LOOKS_LIKE_MARKUP}\n"


def test_paths_are_shown_to_the_letter() -> None:
    with console.capture() as told:
        print_certificates(Path("tls [old]"), [Path("tls [old]/ca.pem")])
    assert "wrote tls [old]/ca.pem" in told.get()


@pytest.mark.parametrize(("percent", "end"), [(0, ""), (40, ", 40 %")])
def test_a_phase_is_shown_to_the_letter(percent: int, end: str) -> None:
    with console.capture() as told:
        ProgressLines().show(LOOKS_LIKE_MARKUP, percent)
    assert told.get().endswith(f" s  {LOOKS_LIKE_MARKUP}{end}\n")


def test_addresses_in_a_table_are_shown_to_the_letter() -> None:
    worker = WorkerStatus(name="worker-0", address="[fd00::1]:50051", num_experts=8, num_bytes=0)
    readiness = Readiness(
        ready=True,
        phase="ready",
        percent=100,
        epoch=1,
        heads_ready=1,
        heads_expected=1,
        workers=[worker],
    )
    with console.capture() as told:
        print_placement(readiness)
    assert "[fd00::1]:50051" in told.get()


def test_a_status_says_what_is_missing_and_how_far_each_load_is() -> None:
    readiness = Readiness(
        ready=False,
        phase="loading experts",
        percent=40,
        error="worker-1: no disk",
        epoch=0,
        heads_ready=0,
        heads_expected=2,
        workers=[],
        loading=[
            LoadStatus(
                worker="worker-0",
                source="lender",
                loaded_bytes=1_500_000_000,
                total_bytes=6_000_000_000,
                bytes_per_s=5e8,
                left_s=9.0,
            )
        ],
    )
    with console.capture() as told:
        print_status(readiness)
    assert told.get().splitlines() == [
        "loading experts, 40 %; 0 of 2 heads, 0 workers",
        "worker-1: no disk",
        "worker-0 loads from lender: 1.5 of 6.0 GB, 500 MB/s, 9 s left",
    ]
