"""A wrong setting is refused at the edge, and every setting explains itself."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import config
from cluster.config import ServeConfig
from model import TINY
from model.errors import CheckpointError


def test_the_defaults_are_valid_and_stay_on_this_machine() -> None:
    settings = ServeConfig()
    assert settings.data_plane_host == "127.0.0.1"
    assert not settings.allow_plaintext_network
    assert settings.device == "cpu"


@pytest.mark.parametrize("key", ["nun_workers", "Model", "model_config", "lease"])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        ServeConfig(**{key: 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_workers", 0),
        ("num_heads", 0),
        ("num_ingresses", 0),
        ("worker_threads", 0),
        ("worker_memory_bytes", 0),
        ("worker_cpus", -0.1),
        ("max_model_len", 1),
        ("block_size", 0),
        ("kv_cache_bytes", 0),
        ("max_running_sequences", 0),
        ("max_tokens_per_step", 0),
        ("max_concurrent_requests", 0),
        ("max_body_bytes", 0),
        ("expert_timeout_s", 0),
        ("recovery_timeout_s", 0),
        ("lease_s", 0.5),
        ("expert_timeout_s", float("nan")),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("served_model_name", ""),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        ServeConfig(**{field: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "192.168.0.7", "2001:db8::1"])
def test_a_network_is_only_used_knowingly(host: str) -> None:
    with pytest.raises(ValidationError, match="allow_plaintext_network"):
        ServeConfig(data_plane_host=host)
    assert ServeConfig(data_plane_host=host, allow_plaintext_network=True).data_plane_host == host


@pytest.mark.parametrize(
    "fields",
    [
        {"tls_folder": "certs"},
        {"cluster_token_from": "token"},
        {"cluster_token_from": "environment"},
    ],
)
def test_a_network_may_be_used_where_peers_are_known(fields: dict[str, Any]) -> None:
    network = ServeConfig(data_plane_host="10.1.2.3", **fields).network
    (name,) = fields
    expected = "environment" if "environment" in fields.values() else Path(fields[name])
    assert (network.host, getattr(network, name)) == ("10.1.2.3", expected)


def test_certificates_and_a_token_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        ServeConfig(tls_folder=Path("certs"), cluster_token_from="environment")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert ServeConfig(data_plane_host=host).data_plane_host == host


@pytest.mark.parametrize("host", ["localhost", "", "127.0.0.1:80", "example.org", "127.1"])
def test_a_data_plane_host_is_an_address(host: str) -> None:
    with pytest.raises(ValidationError, match="no IP address"):
        ServeConfig(data_plane_host=host, allow_plaintext_network=True)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"grpc_host": "0.0.0.0"}, "cross the network in the clear"),
        ({"grpc_host": "localhost"}, "no IP address"),
        ({"grpc_certificate": "a.pem"}, "go together"),
        ({"grpc_key": "a.pem"}, "go together"),
        ({"grpc_port": 0}, "grpc_port"),
        ({"grpc_port": 65_536}, "grpc_port"),
    ],
)
def test_users_grpc_is_open_to_a_network_only_encrypted_or_knowingly(
    fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        ServeConfig(**fields)
    ServeConfig(grpc_host="0.0.0.0", grpc_certificate=Path("a.pem"), grpc_key=Path("b.pem"))
    ServeConfig(grpc_host="0.0.0.0", allow_plaintext_network=True)


@pytest.mark.parametrize("gpus", [{}, {"head_gpus": 1}, {"worker_gpus": 0.5}])
def test_cuda_needs_gpus_for_heads_and_workers(gpus: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="head_gpus and worker_gpus"):
        ServeConfig(device="cuda", **gpus)


def test_cuda_with_gpus_is_accepted() -> None:
    assert ServeConfig(device="cuda", head_gpus=1, worker_gpus=0.5).device == "cuda"


def test_a_step_has_a_token_for_every_running_sequence() -> None:
    """Else a prompt could starve behind those that decode."""
    with pytest.raises(ValidationError, match=r"max_tokens_per_step \(63\) must not be below"):
        ServeConfig(max_tokens_per_step=63, max_running_sequences=64)
    ServeConfig(max_tokens_per_step=64, max_running_sequences=64)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServeConfig().num_workers = 3  # type: ignore[misc]


def test_a_lease_is_renewed_three_times_before_it_ends() -> None:
    assert ServeConfig(lease_s=12).lease_renewal_s == 4
    assert ServeConfig(lease_s=600).lease_renewal_s == 5


# --- which model ---


def test_without_a_model_the_embedded_one_is_served() -> None:
    assert ServeConfig().checkpoint_folder() == TINY
    assert ServeConfig().model_id() == "tiny-mixtral"


def test_the_model_id_is_the_folders_name_unless_given(tmp_path: Path) -> None:
    folder = tmp_path / "Mixtral-8x7B"
    folder.mkdir()
    assert ServeConfig(model=folder).model_id() == "Mixtral-8x7B"
    assert ServeConfig(model=Path(f"{folder}/")).model_id() == "Mixtral-8x7B"
    assert ServeConfig(model=folder, served_model_name="mine").model_id() == "mine"
    assert ServeConfig(served_model_name="mine").model_id() == "mine"


def test_a_model_may_be_given_relative_to_here_or_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("mine", "./mine", "~/mine"):
        settings = ServeConfig(model=Path(given))
        assert settings.checkpoint_folder() == tmp_path / "mine"
        assert settings.model_id() == "mine"


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_text("")
    for path in (missing, file):
        with pytest.raises(CheckpointError, match=path.name):
            ServeConfig(model=path).checkpoint_folder()


# --- documentation ---


def test_every_setting_says_what_it_means() -> None:
    """A text stands right under each field, and ends as a sentence does."""
    tree = ast.parse(inspect.getsource(config))
    (body,) = [
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == ServeConfig.__name__
    ]
    documented = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            documented[field.target.id] = (
                text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            )
    assert set(documented) == set(ServeConfig.model_fields)
    lacking = [name for name, text in documented.items() if not text.strip().endswith(".")]
    assert lacking == []


@pytest.mark.parametrize(
    ("suffix", "unit"), [("_s", "second"), ("_bytes", "byte"), ("_tokens_per_step", "token")]
)
def test_a_setting_with_a_unit_in_its_name_is_a_number(suffix: str, unit: str) -> None:
    for name, field in ServeConfig.model_fields.items():
        if name.endswith(suffix):
            kinds = (int, float, int | None, float | None)
            assert field.annotation in kinds, f"{name} is not in {unit}s"


# --- quantisation ---


def test_every_worker_may_hold_its_experts_in_another_form() -> None:
    assert ServeConfig().worker_quantization == (None, None)
    assert ServeConfig(expert_quantization="int4").worker_quantization == ("int4", "int4")
    # as a Serve configuration file gives it
    settings = ServeConfig.model_validate({"expert_quantization": ["nf4", None], "num_workers": 2})
    assert settings.worker_quantization == ("nf4", None)
    with pytest.raises(ValidationError, match="lists 2 workers, num_workers is 3"):
        ServeConfig(expert_quantization=("int4", None), num_workers=3)


def test_rows_are_sent_twice_only_where_copies_are_alike() -> None:
    assert ServeConfig().hedge_budget == 0
    with pytest.raises(ValidationError, match="hedge_budget needs workers that hold"):
        ServeConfig(hedge_budget=0.02, expert_quantization=("int4", None))


def test_scaling_needs_bounds_in_order_and_workers_alike() -> None:
    settings = ServeConfig(num_workers=2, max_workers=4, num_heads=2)
    assert (settings.most_workers, settings.most_heads) == (4, 2)
    assert settings.worker_quantization == (None,) * 4
    with pytest.raises(ValidationError, match=r"max_workers is 1, below num_workers \(2\)"):
        ServeConfig(num_workers=2, max_workers=1)
    with pytest.raises(ValidationError, match=r"max_heads is 1, below num_heads \(2\)"):
        ServeConfig(num_heads=2, max_heads=1)
    with pytest.raises(ValidationError, match="hold their experts alike"):
        ServeConfig(max_workers=3, expert_quantization=("int4", None))
    with pytest.raises(ValidationError, match="max_workers and expert_slices exclude each other"):
        ServeConfig(num_workers=2, expert_slices=2, max_workers=4)


def test_some_settings_change_without_a_restart() -> None:
    given = ServeConfig(num_workers=2, dtype="float32")
    changed = given.with_live({"num_workers": 3, "rebalance_gain": None})
    assert changed == ServeConfig(num_workers=3, dtype="float32", rebalance_gain=None)
    with pytest.raises(ValueError, match="dtype cannot change without a restart; num_workers,"):
        given.with_live({"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="max_workers is 1, below"):
        given.with_live({"max_workers": 1})


def test_slices_and_copies_need_enough_workers() -> None:
    assert ServeConfig(num_workers=4, expert_slices=2, expert_copies=2).expert_slices == 2
    with pytest.raises(ValidationError, match="num_workers is 3, no multiple of the 2"):
        ServeConfig(num_workers=3, expert_slices=2)
    with pytest.raises(ValidationError, match="2, too few for 2 copies of each expert in 2 slices"):
        ServeConfig(num_workers=2, expert_slices=2, expert_copies=2)
