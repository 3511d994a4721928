"""Which node the model's folder is on, while nodes come."""

import asyncio
from pathlib import Path

import pytest

from cluster import nodes
from cluster.errors import FilesUnavailableError


def test_a_node_that_has_the_folder_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        (FilesUnavailableError("none of 1 nodes"), FilesUnavailableError("none of 2"), 7)
    )

    def run(_model: Path | None, _function: object, argument: int) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer * argument

    monkeypatch.setattr(nodes, "run_where_it_is", run)
    monkeypatch.setattr(nodes, "LOOK_EVERY_S", 0.0)
    told: list[str] = []
    found = asyncio.run(nodes.run_where_it_will_be(Path("~/model"), int, 6, on_missing=told.append))
    assert found == 42
    assert told == ["none of 1 nodes", "none of 2"]


def test_without_ray_a_missing_folder_is_no_other_nodes_matter(tmp_path: Path) -> None:
    def look(path: Path) -> bool:
        return path.exists()

    assert not nodes.run_where_it_is(tmp_path / "nothing", look, tmp_path / "nothing")
