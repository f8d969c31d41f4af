"""The methods that prune in stages, in tiny vision-language models: all kept is the model itself,
and a few kept is what the options say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from cases.tiny_vlms import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}
STAGED: dict[str, dict[str, Any]] = {
    "pyramid_drop": {},
    "trans_prune": {},
    "adapt_infer": {},
    "adsc": {},
    "sparse_vlm": {},
    "g_search": {},
    "aim": {"last": 1.0},
}


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", STAGED)
@torch.no_grad()
def test_all_kept_is_the_model(name: str, kind: str) -> None:
    family = BY_NAME[kind]
    model, inputs = family.model(), family.prompt((1, 2, 0))
    expected = model(**inputs).logits
    with tokred.patch(model, name, ratio=1.0, **STAGED[name]):
        logits = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STAGED)
@torch.no_grad()
def test_fewer_are_left_behind_the_last_stage(name: str) -> None:
    """Measured by the number of tokens that the MLP of the last layer is given."""
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1,))
    lengths = []
    last = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")][-1]
    hook = last.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for options in ({"ratio": 1.0, **STAGED[name]}, {"keep": 2}):
        with tokred.patch(model, name, **options):
            model(**inputs)
    hook.remove()
    whole, few = lengths
    assert few < whole == inputs["input_ids"].shape[1]
    if name in ("pyramid_drop", "trans_prune", "adsc", "g_search"):
        visual = (inputs["input_ids"] == model.config.image_token_id).sum().item()
        assert few == whole - visual + 2
