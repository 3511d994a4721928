"""Which parts of the installation are there."""

from importlib.util import find_spec

from cluster.errors import ConfigurationError


def need_server_extra() -> None:
    """Raise ConfigurationError where only the base install is there."""
    missing = [name for name in ("ray", "torch", "grpc") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"this command needs {', '.join(missing)}, which the base install leaves out: "
            "pip install 'maestrale[server]'"
        )
