"""schemathesis over the served OpenAPI document: no 5xx, and every reply is as it says.

Against the whole HTTP side over a scripted engine: what is asked here is the API's to answer.
"""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api_fakes import Api

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
EXAMPLES = 100
"""Per operation."""


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def test_no_request_breaks_the_server_or_its_document(api: Api) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.app)
    num_operations = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:  # without parameters there is nothing to get wrong
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS)

            ask()
        num_operations += 1
    assert num_operations > 10
    assert len(api.engine.closed) == len(api.engine.journals)
    assert api.num_in_progress == 0
