"""Every method that reduces the tokens of a vision encoder, in a tiny one: what all must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import reducers, tiny_timm

REDUCERS = list(reducers().items())
DYNAMIC = ("dymu",)  # their number of tokens follows from the images


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def model_and_pixels() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return tiny_timm().eval(), torch.randn(2, 3, 48, 48)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), REDUCERS, ids=name_of)
def test_compiles(method: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()  # all methods compile the forward of one class
    model, pixels = model_and_pixels()
    with tokred.patch(model, method, **options):
        expected = model(pixels)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if method in DYNAMIC:
            with pytest.raises(Exception, match="cannot be compiled"):
                compiled(pixels)
        else:
            torch.testing.assert_close(compiled(pixels), expected)


@pytest.mark.parametrize(("method", "options"), REDUCERS, ids=name_of)
def test_gradients(method: str, options: dict[str, Any]) -> None:
    model, pixels = model_and_pixels()
    pixels.requires_grad_()
    with tokred.patch(model, method, **options):
        model(pixels).square().sum().backward()
    for tensor in (pixels, *model.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert pixels.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize(("method", "options"), REDUCERS, ids=name_of)
def test_dtypes(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, pixels = model_and_pixels()
    with tokred.patch(model.to(dtype), method, **options) as handle:
        features = model.forward_features(pixels.to(dtype))
        assert features.dtype == dtype and features.isfinite().all()
        assert handle.size.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), REDUCERS, ids=name_of)
def test_no_images_and_no_proportion(method: str, options: dict[str, Any]) -> None:
    model, pixels = model_and_pixels()
    with tokred.patch(model, method, prop_attn=False, **options) as handle:
        assert model(pixels).isfinite().all() and handle.counts[-1] < 37
        assert model(pixels[:0]).shape == (0, 5)
