"""Requests made up from the OpenAPI document, valid and not: each is answered, and as the document says."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra: dev)")
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from lipnext.serving.app import create_app
from lipnext.serving.limits import Limits
from lipnext.serving.service import open_service

pytestmark = pytest.mark.slow
PATHS = ["/v1/predict", "/v1/model", "/healthz", "/metrics", "/v1/attack"]


@pytest.mark.parametrize("path", PATHS)
def test_made_up_requests_are_answered_as_documented(bundle: Path, path: str) -> None:
    service = open_service(bundle, limits=Limits(attack_seconds=0.05))
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    has_body = path in ("/v1/predict", "/v1/attack")
    operation = schema[path]["POST" if has_body else "GET"]
    statuses = set()
    # Without body and parameters there is nothing to get wrong.
    for mode in schemathesis.GenerationMode if has_body else [schemathesis.GenerationMode.POSITIVE]:

        @settings(
            max_examples=40,
            phases=[Phase.generate],
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            # "eps" is text to the document; which numbers are allowed is beyond a pattern.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        check()
    service.close()
    assert 200 in statuses
    assert 500 not in statuses
    assert (400 in statuses) == has_body
