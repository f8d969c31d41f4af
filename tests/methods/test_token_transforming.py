"""Token Transforming against Y = W X with W written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import check_in_a_model, tokens_of
from tokred.methods.token_transforming import TokenTransformingOptions, transform
from tokred.patching import LayerAttention, ReductionCall


@pytest.mark.parametrize("with_sizes", (False, True))
def test_mixtures(with_sizes: bool) -> None:
    x = tokens_of(2, 14)
    chosen = torch.tensor([[0, 3, 9], [13, 2, 5]])
    size = torch.randint(1, 6, (2, 14), generator=torch.Generator().manual_seed(0)).float()
    y = transform(x, chosen, 0.2, size if with_sizes else None)
    for item in range(2):
        unit = functional.normalize(x[item], dim=-1)
        w = torch.exp(unit[chosen[item]] @ unit.T / 0.2) * (size[item] if with_sizes else 1)
        w = w / w.sum(1, keepdim=True)
        torch.testing.assert_close(y[item], w @ x[item], rtol=1e-4, atol=1e-5)


def test_a_cold_mixture_is_the_token() -> None:
    x = tokens_of(1, 14)
    torch.testing.assert_close(transform(x, torch.tensor([[4, 7]]), 1e-4), x[:, [4, 7]])


def test_sizes_and_map() -> None:
    x = tokens_of(1, 15)
    size = torch.arange(1.0, 16)[None]
    q, k = torch.randn(2, 1, 2, 15, 8, generator=torch.Generator().manual_seed(0))
    attention = LayerAttention({"q": (q, lambda h: h), "k": (k, lambda h: h)})
    done = TokenTransformingOptions(r=5).plan(ReductionCall(x, 0, 1, 1, size, attention))
    seen = (q[:, :, :1] @ k.transpose(2, 3) * 8**-0.5).softmax(-1).mean(1)[0, 0, 1:]
    chosen = (seen.argsort(descending=True)[:9].sort().values + 1).tolist()
    unit = functional.normalize(x[0], dim=-1)
    expected = [0] + [
        1 + (chosen.index(t) if t in chosen else int((unit[chosen] @ unit[t]).argmax()))
        for t in range(1, 15)
    ]
    assert done.token_map[0].tolist() == expected
    counted = torch.zeros(10).index_add(0, torch.tensor(expected), size[0])
    assert torch.equal(done.size[0], counted)
    assert torch.equal(done.tokens[:, 0], x[:, 0])
    torch.testing.assert_close(
        done.tokens[:, 1:], transform(x[:, 1:], torch.tensor([chosen]) - 1, 0.01, size[:, 1:])
    )


def test_in_a_model() -> None:
    check_in_a_model("token_transforming", dict(r=0), dict(r=6), (37, 31, 25, 19))
    check_in_a_model(
        "token_transforming", dict(r=0), dict(r=6), (36, 30, 24, 18), class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_refusals() -> None:
    for call in (lambda: TokenTransformingOptions(temperature=0), lambda: transform(None, None, 0)):
        with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
            call()
