"""The service of the integration tests, for clients that are not ours."""

from tests.integration.conftest import service

__all__ = ["service"]
