"""A whole service behind mutual TLS and API keys: every process finds its identity and peers."""

from pathlib import Path

import pytest

from cluster.certs import write_certificates
from cluster.client import Client
from cluster.errors import AuthenticationError
from tests.integration.conftest import Service

KEY = "sk-of-the-test"


def test_a_service_with_certificates_and_keys_serves_those_who_have_one(tmp_path: Path) -> None:
    write_certificates(tmp_path / "tls")
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}  # mine\n")
    flags = ["--set", f"tls_folder={tmp_path / 'tls'}", "--api-keys-file", str(keys)]
    service = Service.start("--dtype", "float32", *flags)
    try:
        with Client(service.url, api_key=KEY) as client:
            reply = client.completions.create(
                prompt="Once upon a time", max_tokens=8, temperature=0
            )
            assert reply.choices[0].text
            samples = client.cluster.metrics()  # of heads and workers, over TLS as well
        kinds = {sample.labels["process"].split("-")[0] for sample in samples}
        assert kinds == {"ingress", "head", "maestrale"}, kinds
        with Client(service.url, api_key="") as stranger:
            assert stranger.cluster.status().ready
            with pytest.raises(AuthenticationError, match="no API key was given"):
                stranger.models.list()
        assert KEY not in "".join(service.lines)
    finally:
        assert service.stop() == 0
