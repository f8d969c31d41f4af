"""What methods for vision-language models are given, against attention matrices in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokred.methods._visual import VisualOptions
from tokred.patching import EncoderStates, Layout, PromptCall, VisualCall

pytestmark = pytest.mark.usefixtures("one_thread")


def visual_call(
    crops: int = 1, prefix: int = 1, pool: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[VisualCall, Tensor]:
    """A call of two images of 4 x 6 patches a crop, pooled to tokens; and its attention matrices
    [B, M, H, P', P'] of layer 3."""
    torch.manual_seed(0)
    rows, columns, heads, dim = 4, 6, 3, 16
    patches = rows * columns
    q, k = torch.randn(2, 2, crops, heads, prefix + patches, dim, dtype=dtype)
    place = torch.arange(patches).view(rows, columns)
    cell = place // columns // pool * (columns // pool) + place % columns // pool
    per_crop = patches // pool**2
    slots = torch.stack([cell.flatten() + i * per_crop for i in range(crops)]).int()
    encoder = EncoderStates(
        num_layers=5,
        num_prefix=prefix,
        token_of_patch=slots,
        heads={3: lambda: (q, k)},
        scale={3: 0.2},
        features=lambda: torch.arange(2.0 * crops * patches).view(2, crops, patches, 1),
    )
    layout = Layout(
        torch.arange(crops, dtype=torch.int32).repeat_interleave(per_crop),
        torch.arange(per_crop, dtype=torch.int32).repeat(crops),
        (rows // pool, columns // pool),
        None if crops == 1 else (1, crops - 1),
    )
    call = VisualCall(torch.randn(2, crops * per_crop, 8, dtype=dtype), layout, encoder)
    return call, (q.float() @ k.float().transpose(-1, -2) * 0.2).softmax(-1)


def per_token(x: Tensor, call: VisualCall) -> Tensor:
    """[B, M, H, P] -> [B, H, N]: means by token_of_patch, one after the other."""
    slots = call.encoder.token_of_patch.flatten()
    flat = x.transpose(1, 2).flatten(2)
    return torch.stack([flat[..., slots == n].mean(-1) for n in range(call.tokens.shape[1])], -1)


@pytest.mark.parametrize(("crops", "pool"), [(1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_the_encoder(crops: int, pool: int, dtype: torch.dtype) -> None:
    call, matrix = visual_call(crops, 1, pool, dtype)
    close: dict[str, Any] = dict(rtol=1e-4, atol=1e-5)
    expected = per_token(matrix[..., 0, 1:], call)
    torch.testing.assert_close(call.class_attention(-2), expected, **close)
    torch.testing.assert_close(call.class_attention(3), expected, **close)
    received = per_token(matrix.mean(-2)[..., 1:], call)
    torch.testing.assert_close(call.received_attention(), received, **close)
    largest = per_token(matrix.amax(-2)[..., 1:], call)
    torch.testing.assert_close(call.received_attention(3, "max"), largest, **close)


def test_keys_and_features_are_means_of_the_patches_of_a_token() -> None:
    call, _ = visual_call(crops=2, pool=2)
    k = call.encoder.heads[3]()[1][:, :, :, 1:]
    slots = call.encoder.token_of_patch.flatten()
    keys = k.transpose(1, 2).flatten(2, 3)  # [B, H, M P, D]
    expected = torch.stack([keys[:, :, slots == n].mean(2) for n in range(12)], 2)
    torch.testing.assert_close(call.keys(), expected)
    torch.testing.assert_close(call.mean_keys(), expected.mean(1))
    features = call.encoder.features().flatten(1, 2)
    expected = torch.stack([features[:, slots == n].mean(1) for n in range(12)], 1)
    torch.testing.assert_close(call.encoder_features, expected)


def test_what_is_not_there_is_refused() -> None:
    call, _ = visual_call(prefix=0)
    with pytest.raises(ValueError, match="attention of the class token, and the vision encoder"):
        call.class_attention()
    with pytest.raises(ValueError, match=r"layer -1 .* was not kept: .* has named \[3\]"):
        call.received_attention(-1)
    assert call.grid == (4, 6) and not call.has_class_token and call.num_layers == 5
    with pytest.raises(ValueError, match="are no grid: the image has 3 crops"):
        visual_call(crops=3)[0].grid  # noqa: B018
    bare = VisualCall(torch.zeros(1, 4, 2), why_not="as it is")
    for read in (lambda: bare.grid, bare.received_attention, lambda: bare.encoder_features):
        with pytest.raises(ValueError, match="not known: as it is"):
            read()
    made = bare.made(torch.zeros(1, 2, 2), torch.tensor([[0, 3]]))
    assert made.tokens.shape == (1, 2, 2) and made.token_map is None
    with pytest.raises(ValueError, match="one by one"):
        call.project(torch.zeros(1, 1))


def prompt_call() -> tuple[PromptCall, Tensor]:
    """Two rows, the second padded on the left; the causal attention [B, H, L, L]."""
    torch.manual_seed(0)
    valid = torch.tensor([[1] * 9, [0] * 3 + [1] * 6]).bool()
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0]]).bool()
    slots = torch.tensor([[1, 2, 3, 5], [4, 5, -1, -1]], dtype=torch.int32)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    call = PromptCall(
        torch.randn(2, 9, 6), 2, 4, valid, visual, slots, slots.ge(0).sum(1).int(),
        previous=lambda: (q, k), scale=0.3,
    )  # fmt: skip
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    seen = torch.ones(9, 9).tril().bool() & valid[:, None, None]
    return call, logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


def test_attention_of_a_prompt() -> None:
    call, matrix = prompt_call()
    torch.testing.assert_close(call.last_attention(), matrix[:, :, -1])
    assert call.after_images.tolist() == [[False] * 6 + [True] * 3] * 2
    assert call.last.nonzero().tolist() == [[0, 8], [1, 8]]
    chosen = call.after_images
    expected = (matrix * chosen[:, None, :, None]).sum(2)
    torch.testing.assert_close(call.received_attention(chosen, reduce="sum"), expected)
    torch.testing.assert_close(call.received_attention(chosen), expected / 3)
    weight = torch.rand(2, 4, 9) * call.text[:, None]
    expected = torch.einsum("bhi,bhij->bhj", weight, matrix)
    torch.testing.assert_close(call.received_attention(weight, reduce="sum"), expected)


def test_of_visual_reads_the_slots() -> None:
    call, _ = prompt_call()
    x = torch.arange(18.0).view(2, 9)
    assert call.of_visual(x).tolist() == [[1, 2, 3, 5], [13, 14, 0, 0]]
    tokens = call.of_visual(call.x, dim=1)
    assert torch.equal(tokens[0], call.x[0, [1, 2, 3, 5]])
    assert torch.equal(tokens[1, :2], call.x[1, [4, 5]]) and not tokens[1, 2:].any()
    with pytest.raises(ValueError, match="no queries and keys of the following layer at 2"):
        call.heads("following")
    with pytest.raises(ValueError, match='of must be "previous" or "following"'):
        call.heads("next")


def test_budgets() -> None:
    assert [VisualOptions(keep=5).count(n) for n in (3, 5, 9)] == [3, 5, 5]
    assert [VisualOptions(ratio=r).count(9) for r in (0.01, 0.5, 1)] == [1, 4, 9]
    for options, words in (
        (dict(keep=0), "keep must be at least 1, got 0"),
        (dict(ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (dict(ratio=1.5), r"ratio must be in \(0, 1\], got 1.5"),
        (dict(positions="new"), "positions must be 'auto' or 'kept' or 'renumbered'"),
    ):
        with pytest.raises(ValueError, match=words):
            VisualOptions(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_projector_runs_in_the_precision_of_its_input(dtype: torch.dtype) -> None:
    """Also in a model of half precision, where a step of 0.001 would be lost."""
    call, _ = visual_call()
    projector = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)).to(dtype)
    call.encoder.project = projector
    x = torch.randn(2, 24, 16)
    actual = call.project(x + 1e-3) - call.project(x)
    assert actual.dtype == torch.float32 and projector[0].weight.dtype == dtype
    exact = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    exact.load_state_dict(projector.state_dict())
    torch.testing.assert_close(actual, exact(x + 1e-3) - exact(x), rtol=1e-3, atol=1e-5)
