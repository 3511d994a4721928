"""Every file in deploy/ is what its reader takes it for, and says only what is so."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster import app
from cluster.config import ServeConfig
from cluster.metrics import HeadMetrics, IngressMetrics, WorkerMetrics
from cluster.planning import plan
from model.config import MixtralConfig
from model.inspect import inspect
from model.quantized_copy import expert_bytes

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNBOOK = (DEPLOY / "README.md").read_text()
GIB = 2**30

MODELS = {
    "Mixtral-8x7B": MixtralConfig(max_position_embeddings=32_768),
    "Mixtral-8x22B": MixtralConfig(
        vocab_size=32_768,
        hidden_size=6_144,
        intermediate_size=16_384,
        num_hidden_layers=56,
        num_attention_heads=48,
        max_position_embeddings=65_536,
    ),
}


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def serve_documents() -> dict[str, Any]:
    files = {path.name: loaded(path.name) for path in sorted(DEPLOY.glob("serve*.yaml"))}
    return files | {"kuberay.yaml": yaml.safe_load(loaded("kuberay.yaml")["spec"]["serveConfigV2"])}


def settings_of(document: Any) -> ServeConfig:
    (application,) = document["applications"]
    return ServeConfig.model_validate(application["args"])


SERVE = serve_documents()
CLUSTERS = [path.name for path in sorted(DEPLOY.glob("ray-*.yaml"))]


# --- clusters ---


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_passes_rays_own_validation(name: str) -> None:
    validate_config(prepare_config(loaded(name)))


def test_there_is_a_cluster_for_each_provider() -> None:
    assert {loaded(name)["provider"]["type"] for name in CLUSTERS} == {
        "local",
        "aws",
        "gcp",
        "azure",
    }


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_start_of_ray_asks_for_the_token(name: str) -> None:
    cluster = loaded(name)
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [command for command in commands if " start " in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert all(f"{app.PROXY_BY_GRPC}=1" in command for command in starts)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "ca-key.pem" in cluster["rsync_exclude"]  # who has it makes identities
    assert "--dashboard-host" not in " ".join(commands)  # so it stays on loopback


OF_NODES = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "150",
    "RAY_grpc_keepalive_timeout_ms": "150000",
}
OF_HEAD_NODE = OF_NODES | {
    "RAY_health_check_failure_threshold": "30",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "40",
}


def test_every_cluster_waits_as_long_for_rays_head_node() -> None:
    """`make test-cluster` shows that a minute without it costs nothing, with one of these files."""
    for name in CLUSTERS:
        for kind, wanted in (
            ("head", OF_HEAD_NODE | {"AUTOSCALER_HEARTBEAT_TIMEOUT_S": "150"}),
            ("worker", OF_NODES),
        ):
            (start,) = [c for c in loaded(name)[f"{kind}_start_ray_commands"] if " start " in c]
            variables = dict(word.split("=") for word in start.split("~/")[0].split())
            assert wanted.items() <= variables.items()
    cluster = loaded("kuberay.yaml")["spec"]["rayClusterConfig"]
    for group, wanted in (
        (cluster["headGroupSpec"], OF_HEAD_NODE),
        *((group, OF_NODES) for group in cluster["workerGroupSpecs"]),
    ):
        (container,) = group["template"]["spec"]["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == wanted


@pytest.mark.parametrize("name", CLUSTERS)
def test_nodes_install_the_version_that_this_is(name: str) -> None:
    wheel = f"maestrale-{PROJECT['version']}-py3-none-any.whl["
    cluster = loaded(name)
    assert sum(wheel in command for command in cluster["setup_commands"]) == 1


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_serve_files_read_is_copied_to_nodes(name: str) -> None:
    mounted = loaded(name)["file_mounts"]
    for document in ("serve-8x7b-bf16.yaml", "serve-8x22b.yaml"):
        settings = settings_of(SERVE[document])
        for path in (settings.tls_folder, settings.api_keys_file):
            assert path is not None
            assert mounted[str(path.parent)] == "deploy/secrets"


@pytest.mark.parametrize("name", [name for name in CLUSTERS if "onpremise" not in name])
def test_heads_and_experts_have_pools_of_their_own(name: str) -> None:
    types = loaded(name)["available_node_types"]
    experts, heads = types["experts"], types["heads"]
    assert experts["node_config"] != heads["node_config"]
    served = settings_of(SERVE["serve-8x7b-bf16.yaml"])
    for pool, wanted, num_gpus, count in (
        (heads, served.head_resources, served.head_gpus, served.num_heads),
        (experts, served.worker_resources, served.worker_gpus, served.num_workers),
    ):
        assert wanted
        per_node = min(pool["resources"][each] // amount for each, amount in wanted.items())
        per_node = min(per_node, pool["resources"]["GPU"] // num_gpus)
        assert pool["min_workers"] * per_node >= count
    assert served.head_resources.keys().isdisjoint(experts["resources"])
    assert served.worker_resources.keys().isdisjoint(heads["resources"])


def test_pinned_packages_are_within_what_the_project_asks_for() -> None:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, PROJECT["optional-dependencies"]["server"])
    }
    assert "ray" in pins
    assert [name for name, version in pins.items() if version not in ranges[name]] == []


# --- what is served ---


@pytest.mark.parametrize("name", SERVE)
def test_a_serve_file_passes_serves_validation_and_ours(name: str) -> None:
    ServeDeploySchema.model_validate(SERVE[name])
    settings_of(SERVE[name])
    assert SERVE[name]["applications"][0]["import_path"] == "cluster.app:build"


@pytest.mark.parametrize("name", SERVE)
def test_what_spans_hosts_listens_on_each_hosts_own_address(name: str) -> None:
    """Those with pools of their own span hosts; the others stay on loopback."""
    settings = settings_of(SERVE[name])
    spans_hosts = bool(settings.worker_resources)
    assert settings.data_plane_host == ("node" if spans_hosts else "127.0.0.1")
    assert not settings.allow_plaintext_network
    assert not settings.allow_open_http
    if spans_hosts:
        assert settings.tls_folder is not None
        assert settings.api_keys_file is not None
    host = SERVE[name]["http_options"]["host"]
    assert host == ("0.0.0.0" if spans_hosts else "127.0.0.1")


@pytest.mark.parametrize(
    ("name", "model", "gpu_gb"),
    [
        ("serve-8x7b-bf16.yaml", "Mixtral-8x7B", 80),
        ("serve-8x7b-nf4.yaml", "Mixtral-8x7B", 40),
        ("serve-8x22b.yaml", "Mixtral-8x22B", 80),
        ("kuberay.yaml", "Mixtral-8x7B", 80),
    ],
)
def test_the_experts_fit_on_the_gpus(name: str, model: str, gpu_gb: int) -> None:
    """Nine tenths of each GPU at most, with whatever else shares it."""
    settings, config = settings_of(SERVE[name]), MODELS[model]
    assert (
        settings.max_model_len is None or settings.max_model_len <= config.max_position_embeddings
    )
    each = bytes_of_an_expert(config, settings.worker_quantization[0])
    gpu = int(0.9 * gpu_gb * 1e9)
    if settings.worker_gpus < 1:
        assert settings.worker_gpus + settings.head_gpus <= 1
        assert settings.kv_cache_bytes is not None
        gpu -= head_bytes(config) + settings.kv_cache_bytes
    budget = min(settings.worker_memory_bytes or gpu, gpu)
    plan(
        num_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
        expert_bytes=[each] * settings.num_workers,
        budgets=[budget] * settings.num_workers,
    )


@pytest.mark.parametrize("name", [name for name in SERVE if name.startswith("serve-")])
def test_the_sizes_in_comments_are_computed(name: str) -> None:
    text, settings = (DEPLOY / name).read_text(), settings_of(SERVE[name])
    config = MODELS["Mixtral-8x22B" if "8x22b" in name else "Mixtral-8x7B"]
    units = config.num_hidden_layers * config.num_local_experts
    experts = units * bytes_of_an_expert(config, settings.worker_quantization[0]) / GIB
    said = re.search(r"xperts take (\d+) GiB(?:, (?:half|a quarter) of them (\d+))?", text)
    assert said is not None
    assert int(said[1]) == round(experts)
    assert int(said[2] or said[1]) == round(experts / settings.num_workers)
    rest = re.search(r"ll else(?: takes)? (\d+)", text)
    assert rest is not None
    assert int(rest[1]) == round(head_bytes(config) / GIB)
    of_token = config.kv_bytes_per_token(2)
    assert f"{of_token // 1024} KiB" in text
    if settings.kv_cache_bytes:
        assert f"cache {settings.kv_cache_bytes // GIB}: " in text
        assert f" {settings.kv_cache_bytes // of_token:,} tokens" in text


def bytes_of_an_expert(config: MixtralConfig, mode: str | None) -> int:
    return config.num_expert_parameters * 2 if mode is None else expert_bytes(config, mode)


def head_bytes(config: MixtralConfig) -> int:
    """In 16 bit, of everything but the experts."""
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    q_size = config.num_attention_heads * config.head_dim
    of_layer = 2 * hidden * (q_size + kv_size) + 2 * hidden + config.num_local_experts * hidden
    return 2 * (config.num_hidden_layers * of_layer + (2 * config.vocab_size + 1) * hidden)


def test_the_sum_of_a_head_is_what_an_inspection_finds(tiny_folder: Path) -> None:
    found = inspect(tiny_folder)
    memory = {each.form: each.head_bytes for each in found.memory}
    assert head_bytes(found.config) == memory["bfloat16"]


@pytest.mark.parametrize("model", MODELS)
def test_the_runbooks_table_of_memory_is_computed(model: str) -> None:
    config = MODELS[model]
    units = config.num_hidden_layers * config.num_local_experts
    modes = (None, "int8", "nf4", "int4")
    sizes = [units * bytes_of_an_expert(config, mode) / GIB for mode in modes]
    numbers = [f"{size:.1f}" for size in (*sizes, head_bytes(config) / GIB)]
    row = [model, *numbers, f"{config.kv_bytes_per_token(2) // 1024} KiB"]
    assert f"| {' | '.join(row)} |" in RUNBOOK


def test_kubernetes_offers_what_is_asked_for() -> None:
    spec = loaded("kuberay.yaml")["spec"]["rayClusterConfig"]
    served = settings_of(SERVE["kuberay.yaml"])
    assert spec["authOptions"] == {"mode": "token"}
    pools = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for name, wanted, count in (
        ("heads", served.head_resources, served.num_heads),
        ("experts", served.worker_resources, served.num_workers),
    ):
        group = pools[name]
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == wanted
        assert group["minReplicas"] >= count
    pins = (DEPLOY / "constraints.txt").read_text()
    assert f"ray=={spec['rayVersion']}" in pins
    assert json.dumps(spec).count(f'"maestrale:{PROJECT["version"]}"') == 1 + len(pools)


# --- watching ---


def existing_metrics() -> dict[str, set[str]]:
    """Of every sample that a query may name: its labels."""
    found: dict[str, set[str]] = {}
    for metrics in (HeadMetrics(), WorkerMetrics(), IngressMetrics()):
        for collector in metrics.registry._collector_to_names:
            labels = {*collector._labelnames, "process", "instance", "job"}  # type: ignore[attr-defined]
            name, kind = collector._name, collector._type  # type: ignore[attr-defined]
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            for suffix in suffixes.get(kind, [""]):
                found[name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def queries() -> Iterator[str]:
    for group in loaded("alerts.yaml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((DEPLOY / "grafana.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    existing = existing_metrics()
    names = set(re.findall(r"\bmaestrale_\w+", query))
    assert names - existing.keys() == set()
    known = set().union(*(existing[name] for name in names)) if names else {"job"}
    matched = re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", query)
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    labels = {*matched, *(label.strip() for group in grouped for label in group.split(","))}
    assert labels - known == set()
    assert query.count("(") == query.count(")")


def test_the_runbook_explains_every_metric_it_names_and_every_alert() -> None:
    names = set(re.findall(r"\bmaestrale_\w+", RUNBOOK))
    resources = {"maestrale_head", "maestrale_expert"}
    assert names - existing_metrics().keys() - resources == set()
    rules = [rule for group in loaded("alerts.yaml")["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"^### (\w+)$", RUNBOOK, re.M))
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_every_panel_has_a_place_of_its_own() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)


# --- the rest ---


def test_every_file_is_in_the_runbook_and_the_other_way_round() -> None:
    table = RUNBOOK.partition("\n\n`make check`")[0]
    named = set(re.findall(r"`([\w.-]+\.\w+|Dockerfile)`", table))
    there = {path.name for path in DEPLOY.iterdir() if path.is_file()} - {"README.md"}
    assert named == there


def test_settings_and_options_that_the_texts_name_exist() -> None:
    unit = (DEPLOY / "maestrale.service").read_text()
    for variable in re.findall(r"MAESTRALE_(\w+)=", unit):
        assert variable.lower() in ServeConfig.model_fields
    for setting in re.findall(r"`((?:num|max|kv|head|worker|recovery|allow)_\w+)`", RUNBOOK):
        assert setting in ServeConfig.model_fields
