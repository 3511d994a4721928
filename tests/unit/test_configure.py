"""Flags win over the environment, that over the file, that over the defaults."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import ServeConfig
from cluster.configure import Settings, as_file, assignments, gather
from cluster.errors import ConfigurationError
from cluster.network import listen_host


def gathered(
    tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **flags: Any
) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    given = {name: value for name, value in flags.items() if value is not None}
    return gather(file=file, environ=environ or {}, flags=given)


# --- precedence ---


@pytest.mark.parametrize(
    ("in_file", "environ", "flag", "expected", "source"),
    [
        ("", {}, None, 1, None),
        ("num_heads: 2", {}, None, 2, "config.yaml"),
        ("num_heads: 2", {"MAESTRALE_NUM_HEADS": "3"}, None, 3, "MAESTRALE_NUM_HEADS"),
        ("num_heads: 2", {"MAESTRALE_NUM_HEADS": "3"}, 4, 4, "command line"),
        ("num_heads: 2", {}, 4, 4, "command line"),
        ("", {"MAESTRALE_NUM_HEADS": "3"}, None, 3, "MAESTRALE_NUM_HEADS"),
    ],
)
def test_the_nearest_source_wins(
    tmp_path: Path,
    in_file: str,
    environ: dict[str, str],
    flag: int | None,
    expected: int,
    source: str | None,
) -> None:
    settings = gathered(tmp_path, in_file, environ, num_heads=flag)
    assert settings.config == ServeConfig(num_heads=expected)
    given_by = settings.given_by.get("num_heads")
    assert (given_by and Path(given_by).name) == source


def test_sources_are_joined_setting_by_setting(tmp_path: Path) -> None:
    settings = gathered(
        tmp_path, "num_heads: 2\nnum_workers: 3", {"MAESTRALE_LEASE_S": "7.5"}, dtype="float32"
    )
    assert settings.config == ServeConfig(num_heads=2, num_workers=3, lease_s=7.5, dtype="float32")


def test_no_file_is_needed() -> None:
    assert gather(file=None, environ={}, flags={}) == Settings(ServeConfig(), {})


# --- values out of text ---


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("served_model_name", "7", "7"),
        ("served_model_name", "true", "true"),
        ("served_model_name", "a: {", "a: {"),
        ("kv_cache_bytes", "1073741824", 2**30),
        ("kv_cache_bytes", "null", None),
        ("worker_gpus", "0.5", 0.5),
        ("allow_plaintext_network", "true", True),
        ("expert_quantization", "int4", "int4"),
        ("expert_quantization", "[nf4, null]", ("nf4", None)),
        ("worker_resources", "{maestrale_expert: 1}", {"maestrale_expert": 1.0}),
        ("model", "/models/8x7B", Path("/models/8x7B")),
    ],
)
def test_variables_and_set_read_values_alike(name: str, text: str, expected: Any) -> None:
    by_variable = gather(file=None, environ={f"MAESTRALE_{name.upper()}": text}, flags={})
    by_flag = gather(file=None, environ={}, flags=assignments([f"{name}={text}"]))
    assert getattr(by_variable.config, name) == getattr(by_flag.config, name) == expected


def test_an_empty_variable_is_not_taken_for_null() -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_bytes"):
        gather(file=None, environ={"MAESTRALE_KV_CACHE_BYTES": ""}, flags={})


# --- what is refused, and how ---


def test_an_unknown_key_of_a_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.yaml: .*num_worker: .*num_workers\?"):
        gathered(tmp_path, "num_worker: 2")


def test_an_unknown_variable_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"mean MAESTRALE_NUM_WORKERS\?"):
        gather(file=None, environ={"MAESTRALE_NUM_WORKER": "2"}, flags={})


def test_variables_of_the_sdk_and_of_others_are_none_of_ours() -> None:
    environ = {"MAESTRALE_BASE_URL": "http://x", "MAESTRALE_API_KEY": "k", "HOME": "/", "MAEST": ""}
    assert gather(file=None, environ=environ, flags={}).config == ServeConfig()


@pytest.mark.parametrize("given", ["num_worker=2", "num_workers"])
def test_an_assignment_is_refused_unless_it_names_a_setting(given: str) -> None:
    with pytest.raises(ConfigurationError, match="num_worker"):
        assignments([given])


def test_serve_deploy_hears_of_the_nearest_name_too() -> None:
    """Serve hands `args` to the model directly."""
    with pytest.raises(ValidationError, match="did you mean num_heads"):
        ServeConfig.model_validate({"num_head": 2})


def test_a_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(ConfigurationError, match="maestrale config"):
        assignments(["zzz=1"])


def test_a_wrong_value_is_refused_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"num_heads \(MAESTRALE_NUM_HEADS\): .*integer"):
        gathered(tmp_path, "num_heads: 2", {"MAESTRALE_NUM_HEADS": "two"})


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_tokens_per_step"):
        gathered(tmp_path, "max_tokens_per_step: 8")


@pytest.mark.parametrize("text", ["- a", "7", "a: [", "\x07"])
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.yaml"):
        gathered(tmp_path, text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: No such file"):
        gather(file=tmp_path / "nowhere.yaml", environ={}, flags={})


# --- written down ---


def test_the_file_that_is_written_gives_the_same_settings(tmp_path: Path) -> None:
    config = ServeConfig(
        model=Path("/models/8x7B"),
        expert_quantization=("nf4", None),
        worker_resources={"maestrale_expert": 1},
        kv_cache_bytes=None,
    )
    assert gathered(tmp_path, as_file(Settings(config, {}))).config == config


def test_the_file_explains_every_setting() -> None:
    text = as_file(Settings(ServeConfig(num_heads=2), {"num_heads": "here"}))
    assert yaml.safe_load(text).keys() == ServeConfig.model_fields.keys()
    by_name = {
        name: comment.replace("\n# ", " ")
        for comment, name in re.findall(r"((?:^# .*\n)+)^(\w+):", text, re.M)
    }
    assert by_name.keys() == ServeConfig.model_fields.keys()
    for name, comment in by_name.items():
        assert f"MAESTRALE_{name.upper()}" in comment
        assert "default " in comment
    assert "from 1 to 256" in by_name["num_heads"]
    assert "above 0 below 1" in by_name["rebalance_gain"]
    assert " or environment or null;" in by_name["cluster_token_from"]
    assert "given by here" in by_name["num_heads"]


def test_the_command_line_shows_what_is_in_force(tmp_path: Path) -> None:
    (file := tmp_path / "config.yaml").write_text("num_heads: 2\nnum_workers: 2\nlease_s: 20")
    arguments = ["config", "--config", str(file), "--set", "num_heads=4"]
    shown = CliRunner().invoke(app, arguments, env={"MAESTRALE_NUM_WORKERS": "3"})
    assert shown.exit_code == 0
    values = yaml.safe_load(shown.stdout)
    assert (values["num_heads"], values["num_workers"], values["lease_s"]) == (4, 3, 20)


@pytest.mark.parametrize("verb", ["serve", "demo"])
@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_cannot_be_is_refused_as_a_wrong_flag(verb: str, port: str) -> None:
    assert CliRunner().invoke(app, [verb, "--port", port]).exit_code == 2


# --- the network ---


def test_processes_listen_on_their_nodes_own_address_where_told_to() -> None:
    config = ServeConfig(data_plane_host="node", allow_plaintext_network=True)
    assert listen_host(config.data_plane_host, "10.0.0.7") == "10.0.0.7"
    assert listen_host("127.0.0.1", "10.0.0.7") == "127.0.0.1"
    with pytest.raises(ValidationError, match="allow_plaintext_network"):
        ServeConfig(data_plane_host="node")
