"""The rule that no test vanishes silently in CI."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import support


@pytest.mark.parametrize(
    ("in_ci", "outcome"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)]
)
def test_without_vllm_its_tests_fail_in_ci_and_are_skipped_elsewhere(
    in_ci: bool, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "IN_CI", in_ci)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda _: None)
    wants_vllm = SimpleNamespace(get_closest_marker=lambda name: name == "vllm")
    with pytest.raises(outcome, match="vLLM is not installed"):
        support.require_markers(wants_vllm)
    support.require_markers(SimpleNamespace(get_closest_marker=lambda _: None))
