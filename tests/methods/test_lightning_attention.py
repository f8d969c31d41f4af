"""Lightning attention against its quadratic form, and its slopes."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.lightning_attention import lightning_attention, slopes


def test_slopes() -> None:
    torch.testing.assert_close(
        slopes(4), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * 1.00001
    )
    six = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    torch.testing.assert_close(slopes(6), torch.tensor(six) * 1.00001)
    torch.testing.assert_close(slopes(2, 1, 3), torch.tensor([2.0**-4, 2.0**-8]) * 0.50001)
    torch.testing.assert_close(slopes(1, 2, 3), torch.tensor([2.0**-8]) * 1e-5)


def test_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 150, 16, generator=generator)
    decay = slopes(4)
    age = torch.arange(150)[:, None] - torch.arange(150)
    weights = torch.exp(-decay.double()[:, None, None] * age).tril()
    expected = (q.double() @ k.double().transpose(2, 3) * weights) @ v.double()
    out, _ = lightning_attention(q, k, v, decay)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-3)
    first, state = lightning_attention(q[:, :, :70], k[:, :, :70], v[:, :, :70], decay)
    rest, _ = lightning_attention(q[:, :, 70:], k[:, :, 70:], v[:, :, 70:], decay, state)
    both = torch.cat([first, rest], 2)
    torch.testing.assert_close(both, expected.float(), rtol=1e-4, atol=1e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
        slopes(4, 3, 3)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        slopes(0)
