"""Options and tensors that methods refuse, each by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cases.dense import heads
from tokred.methods import fasa, importance_bits, landmark, paro_attention
from tokred.methods import razor_attention as razor
from tokred.methods.free_cache import FreeCache
from tokred.methods.rectified_spattn import rectified_attention
from tokred.methods.tidal_decode import TidalDecodeOptions
from tokred.methods.token_select import TokenSelectOptions
from tokred.methods.top_k_attention import TopKAttentionOptions
from tokred.methods.zero_tuning import rescale_first_token

pytestmark = pytest.mark.usefixtures("one_thread")
Q, K, V = heads(queries=9, keys=9, groups=(4, 2))
ONE, SAME = Q[:, :, :1], heads(queries=9, keys=9, groups=(2, 2))
LSE = torch.zeros(2, 4, 9)


def rescale(gamma: torch.Tensor) -> torch.Tensor:
    return rescale_first_token(torch.zeros_like(Q), LSE, Q, K[:, :, 0], V[:, :, 0], gamma)


CASES: dict[str, Callable[[], object]] = {
    "block must be at least 2, got 1": lambda: landmark.landmark_attention(Q, K, V, 1),
    "q must have the 5 tokens of k": lambda: landmark.landmark_attention(Q, K[:, :, :5], V),
    "num_blocks must be at least 0": lambda: landmark.retrieve_blocks(ONE, K, -1),
    "q must have one token, got 9": lambda: landmark.landmark_decode(Q, K, V),
    "block must be at least 1, got 0": lambda: rectified_attention(*SAME, block=0),
    "drop_rate must be in": lambda: rectified_attention(*SAME, 4, drop_rate=1.5),
    "top_p must be in": lambda: rectified_attention(*SAME, 4, top_p=-0.1),
    "block must be at least 1, got -4": lambda: paro_attention.block_sums(*SAME[:2], -4),
    "period must be from 1 to less than 9 tokens, got 9": lambda: razor.head_scores(Q, K, 9),
    "period must be from 1 to less than 9 tokens, got 0": lambda: razor.head_scores(Q, K, 0),
    "echo_share must be in": lambda: razor.retrieval_heads(LSE[0], LSE[0], 3, -0.1),
    "induction_share must be in": lambda: razor.retrieval_heads(LSE[0], LSE[0], 3, 0.1, 2.0),
    "num_sinks must be at least 0, got -1": lambda: razor.compress(K, V, -1),
    "window must be at least 1, got 0": lambda: razor.compress(K, V, window=0),
    "compression must be at least 1, got 0": lambda: razor.compress(K, V, compression=0),
    "num_chunks must be from 1 to 8, got 9": lambda: fasa.dominant_dims(Q, K, 9),
    "num_chunks must be from 1 to 8, got 0": lambda: fasa.dominant_dims(Q, K, 0),
    "top must be at least 1, got 0": lambda: fasa.chunk_agreement(Q, K, 0),
    "share must be in": lambda: importance_bits.mixed_bits(K, V, LSE[:, 0], 1.5),
    "k must be an int, got 2.5": lambda: TokenSelectOptions(k=2.5),
    "n_local must be an int, got 1.5": lambda: TokenSelectOptions(n_local=1.5),
    "k must be an int, got '8'": lambda: TopKAttentionOptions(k="8"),
    "k must be an int, got True": lambda: fasa.FasaOptions([], k=True),
    "sparse_layer_start must be an int, got 0.5": lambda: TidalDecodeOptions(
        sparse_layer_start=0.5
    ),
    r"dims\[0\] must be int32": lambda: fasa.FasaOptions([torch.zeros(4, 8)]).attention([0]),
    r"of dimensions from 0": lambda: fasa.FasaOptions([-torch.ones(4, 8).int()]).attention([0]),
    "gamma must broadcast": lambda: rescale(torch.ones(5)),
    "gamma must broadcast with": lambda: rescale(torch.ones(1, 2, 4, 9)),
}


@pytest.mark.parametrize("message", CASES)
def test_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASES[message]()


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 1), (2, 4, 9), (4, 9)])
def test_shapes_of_gamma(shape: tuple[int, ...]) -> None:
    assert torch.equal(rescale(torch.ones(shape)), torch.zeros_like(Q))


def test_free_cache_refuses_what_would_broadcast() -> None:
    cache = FreeCache(K[:, :, :4], V[:, :, :4], 9)
    block = {"k": K[:, :, 4:], "v": V[:, :, 4:]}
    wrong = {"k": (K[:1, :, 4:], K[:, :1, 4:], K[:, :, 4:].half()), "v": (V[:, :, 4:5], V[..., :8])}
    for name, tensors in wrong.items():
        for x in tensors:
            with pytest.raises(ValueError, match=f"{name} must be"):
                cache.freeze(**block | {name: x})
    assert cache.length == 4
    cache.freeze(**block)
    assert torch.equal(cache.k, K) and torch.equal(cache.v, V)
