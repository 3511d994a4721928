"""People see what there is, to the letter: paths, addresses and words may look like markup."""

from pathlib import Path

import pytest

from cluster.console import (
    ProgressLines,
    console,
    errors,
    print_certificates,
    print_placement,
)
from cluster.schema import Readiness, WorkerStatus

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
