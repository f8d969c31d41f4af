"""One layer's tokens in one forward pass, as methods that reduce them are given them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

import tokred


@dataclass(frozen=True)
class Reduced:
    """Tokens that a method has reduced itself, where they are no size-weighted means.

    tokens: [B, M, C], made of `call.tokens` with their gradient. size: f32 [B, M], how many
    original tokens each stands for. token_map: i32 [B, N], the token that each one went to (the
    one it went to most), -1 for none.
    """

    tokens: Tensor
    size: Tensor
    token_map: Tensor


# (token_map i32 [B, N], num_out), whose groups become their size-weighted means; or i32 [B, K], the
# tokens that stay, in their new order, the first num_prefix among them; or Reduced, the new tokens;
# or None: all stay.
Reduction: TypeAlias = tuple[Tensor, int] | Tensor | Reduced | None


@dataclass
class LayerAttention:
    """What the attention of a layer has computed, in references that cost nothing to keep.

    projections: for "q", "k" and "v", the output of a module of the model, and the function that
        makes heads [B, H, N, D] of it.
    lse: f32 [B, H, N] of attention in proportion to the tokens' sizes, which adds log(size) to the
        logits; None of attention without.
    """

    projections: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    lse: Tensor | None = None


@dataclass
class ReductionCall:
    """One layer's tokens between its attention and its MLP, and what that attention computed.

    Everything but the fields is computed when it is asked for, so a method pays only for what it
    reads. Nothing here carries a gradient: it serves to choose.

    tokens: [B, N, C], what the method will reduce; read it as `x`.
    layer: of num_layers, from 0. num_prefix: the first tokens, which must stay.
    size: f32 [B, N], how many original tokens each stands for; None as long as nothing has merged.
    scale: of the attention's logits.
    carried: what the method's earlier layers in the same forward pass have left here by name, such
        as their tokens or attention, and where it leaves what later ones need. A method keeps
        nothing else from call to call: its object is shared by threads, and a layer may run again
        in the backward pass.
    """

    tokens: Tensor
    layer: int
    num_layers: int
    num_prefix: int = 0
    size: Tensor | None = None
    attention: LayerAttention | None = None
    scale: float | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    _mean_keys: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def x(self) -> Tensor:
        """[B, N, C]: the tokens."""
        return self.tokens.detach()

    @property
    def q(self) -> Tensor:
        """[B, H, N, D]: the queries as the attention used them."""
        return self._heads("q")

    @property
    def k(self) -> Tensor:
        """[B, H, N, D]: the keys as the attention used them."""
        return self._heads("k")

    @property
    def v(self) -> Tensor:
        """[B, H, N, D]: the values."""
        return self._heads("v")

    @property
    def features(self) -> Tensor:
        """[B, N, C]: the tokens, for similarity: rows in memory; float32 of a model in float64."""
        return _single(self.x).contiguous()

    @property
    def attends_by_size(self) -> bool:
        """Whether this layer's attention was in proportion to the tokens' sizes, where they differ.

        False with prop_attn=False after something has merged.
        """
        return self.size is None or self._lse is not None

    @property
    def mean_keys(self) -> Tensor:
        """[B, N, D]: the keys averaged over the heads, on which ToMe measures similarity.

        float32 of a model in float64.
        """
        if self._mean_keys is None:  # torch.compile cannot trace a functools.cached_property
            self._mean_keys = _single(self.k.mean(1))
        return self._mean_keys

    def attention_rows(self, rows: Sequence[int] | slice | Tensor) -> Tensor:
        """The attention weights of chosen queries: f32 [B, H, R, N], each row's sum 1.

        Args:
            rows: R queries, or a slice of them.

        O(B H R N D) time, O(B H R N) memory.
        """
        q, k = _single(self.q[:, :, rows]), _single(self.k)
        weights = tokred.attention_rows(q, k, scale=self.scale)
        if self._lse is None:
            return weights
        weights = weights * self._proportion[:, None, None]
        return weights / weights.sum(-1, keepdim=True)

    def class_attention(self) -> Tensor:
        """The attention weights of the class token, which is the first: f32 [B, H, N].

        Raises:
            ValueError: the model has no class token.
        """
        if self.num_prefix == 0:
            raise ValueError(
                "the method reads the attention of the class token, and the model has none: "
                "num_prefix is 0"
            )
        return self.attention_rows(slice(0, 1))[:, :, 0]

    def received_attention(self, reduce: str = "mean", weight: Tensor | None = None) -> Tensor:
        """How much attention every token receives from all of them: f32 [B, H, N].

        Args:
            reduce: "sum", "mean" or "max" over the queries.
            weight: f32 [B | 1, H | 1, N], what the attention of each query counts; 1 where None.

        O(B H N^2 D) time, memory linear in N: no attention matrix is stored.
        """
        if reduce not in ("sum", "mean", "max"):
            raise ValueError(f'reduce must be "sum", "mean" or "max", got {reduce!r}')
        q, k, lse = _single(self.q), _single(self.k), self._lse
        lse = None if lse is None else _single(lse.detach())
        columns = tokred.attention_columns(q, k, lse, reduce, weight, scale=self.scale)
        return columns if lse is None else columns * self._proportion[:, None]

    @property
    def _lse(self) -> Tensor | None:
        return None if self.attention is None else self.attention.lse

    @property
    def _proportion(self) -> Tensor:
        """The sizes, of attention that has an lse."""
        assert self.size is not None
        return _single(self.size)

    def reduced(self, tokens: Tensor, size: Tensor, token_map: Tensor) -> Reduced:
        """What `plan` returns where the method has made the new tokens itself, see Reduced."""
        return Reduced(tokens, size, token_map)

    def _heads(self, name: str) -> Tensor:
        if self.attention is None or name not in self.attention.projections:
            raise ValueError(f"these layers do not offer {name}: only their tokens are known here")
        output, in_heads = self.attention.projections[name]
        return in_heads(output.detach())


@dataclass
class LatentCall(ReductionCall):
    """The tokens of one block of a denoiser before its attention, which offers no q, k and v yet.

    latent_size: (height, width) of the latent, of which the tokens are a grid (tokred.grid).
    finest: the downsampling of the finest block of the pass so far.
    seed: of the patch, for methods that draw at random and are given none.
    """

    latent_size: tuple[int, int] = (0, 0)
    finest: int = 1
    seed: int = 0


def as_token_map(
    reduction: tuple[Tensor, int] | Tensor | Reduced, tokens: int
) -> tuple[Tensor, int]:
    """A reduction of `tokens` tokens as (token_map i32 [B, N], num_out).

    Raises:
        TypeError: the method has reduced the tokens itself, which not every integration can undo.
    """
    if isinstance(reduction, Reduced):
        raise TypeError(
            "the method reduces its tokens itself, and these blocks merge and unmerge by a map: "
            "plan() must return (token_map, num_out), the tokens that stay, or None"
        )
    if not isinstance(reduction, Tensor):
        return reduction
    batch, num_out = reduction.shape
    slots = torch.arange(num_out, dtype=torch.int32, device=reduction.device).expand(batch, -1)
    dropped = torch.full((batch, tokens), -1, dtype=torch.int32, device=reduction.device)
    return dropped.scatter(1, reduction.long(), slots), num_out


def _single(x: Tensor) -> Tensor:
    """x in float32 where it is float64, which no op that scores or matches takes."""
    return x.float() if x.dtype == torch.float64 else x
