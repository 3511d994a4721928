"""What `maestrale bench` refuses before it measures anything."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import extras
from cluster.bench.commands import app
from cluster.errors import ConfigurationError


def refusal(*flags: str) -> str:
    """Of a command that must refuse its flags."""
    error = CliRunner().invoke(app, flags).exception
    assert isinstance(error, ConfigurationError), repr(error)
    return str(error)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("http --concurrency 8 --rate 2", "--concurrency and --rate exclude each other"),
        ("http --requests 8 --duration 2", "--requests and --duration exclude each other"),
        ("http --duration 0", "--duration"),
        ("http --concurrency 1.5", "whole numbers of at least 1"),
        ("http --concurrency 0", "whole numbers of at least 1"),
        ("http --concurrency 1,8 --requests 7", "7 requests cannot keep 8 callers busy"),
        ("http --concurrency 128", "100 requests cannot keep 128 callers busy"),
        ("http --rate nan", "numbers above 0"),
        ("http --rate 1,,2", "numbers above 0"),
        ("http --input-tokens few", "no length in tokens"),
        ("http --goodput ttft", "goodput limit"),
        ("http --vocab-size 300", "too small"),
        ("http --prompts /nowhere", "cannot read /nowhere"),
        ("engine --sequences 0", "whole numbers of at least 1"),
        ("engine --workers -1", "whole numbers of at least 0"),
        ("dispatch --transport carrier-pigeon", "tcp,unix"),
        ("dispatch --rows 1,x", "whole numbers of at least 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: str, reason: str) -> None:
    assert reason in refusal(*flags.split())


def test_the_base_install_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "torch" else name)
    for verb in ("engine", "dispatch"):
        assert "this command needs torch" in refusal(verb)


def test_a_report_that_cannot_be_written_is_refused_before_the_load(tmp_path: Path) -> None:
    for flag in ("--json", "--html"):
        assert "cannot write" in refusal("http", flag, str(tmp_path / "nowhere" / "report"))
        assert "it is a folder" in refusal("http", flag, str(tmp_path))
