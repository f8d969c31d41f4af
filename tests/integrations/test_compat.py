"""What differs between releases: the names in use here are those of the installed release."""

from __future__ import annotations

import inspect

import pytest

from tokred import compat

pytest.importorskip("transformers")


def test_the_cache_is_called_what_transformers_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    here = compat.cache_keyword()
    assert here in inspect.signature(LlamaForCausalLM.forward).parameters
    for release, name in (("5.17.2", "past_key_values"), ("5.24.0", "cache"), ("6.0.0", "cache")):
        monkeypatch.setattr(compat, "version", lambda package, release=release: release)
        assert compat.cache_keyword() == name
