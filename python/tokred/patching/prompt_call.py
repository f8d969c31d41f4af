"""The prompt of a vision-language model between two layers of its language model, as methods that
prune visual tokens there are given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tokred


@dataclass(frozen=True)
class PromptTokens:
    """Visual slots that stay, where a method has made new tokens for some of them.

    slots: i32 [B, K], those whose tokens stay as they are, -1 for none. made: i32 [B, R], other
    slots that stay, for tokens [B, R, C], which are made of `call.hidden`; -1 for none.
    """

    slots: Tensor
    made: Tensor
    tokens: Tensor


Heads = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class PromptCall:
    """The prompt's tokens as `layer` is about to get them.

    Everything but the fields is computed when it is asked for. Nothing carries a gradient but
    `hidden`: it serves to choose.

    hidden: [B, L, C], of which new tokens are made; read it as `x` to choose. layer: of num_layers,
        from 0, that will be the first to run without the tokens pruned here.
    valid: bool [B, L], False for padding. visual: bool [B, L], the visual tokens that are left;
    tokens at the ends of rows (image_newline) that the method must keep are not among them.
    slots: i32 [B, V], the positions in the row of its visual tokens, ascending, -1 behind the last;
        what is scored and pruned are these V slots.
    original: i32 [B], how many visual tokens each row had before any was pruned in these layers.
    carried: tensors [B, L, ...] by name, which the method's earlier calls in the same forward pass
        have left here for later ones; pruned as the tokens are.
    previous, following: functions that return q [B, Hq, L, D] and k [B, Hkv, L, D] of the layer
        before and of this one, rotated; scale: of their logits.
    """

    hidden: Tensor
    layer: int
    num_layers: int
    valid: Tensor
    visual: Tensor
    slots: Tensor
    original: Tensor
    carried: dict[str, Tensor] = field(default_factory=dict)
    previous: Heads | None = None
    following: Heads | None = None
    scale: float | None = None

    @property
    def x(self) -> Tensor:
        """[B, L, C]: the tokens."""
        return self.hidden.detach()

    def made(self, slots: Tensor, made: Tensor, tokens: Tensor) -> PromptTokens:
        """What `prune` returns where the method has made new tokens, see PromptTokens."""
        return PromptTokens(slots, made, tokens)

    @property
    def text(self) -> Tensor:
        """bool [B, L]: tokens that are neither visual nor padding."""
        return self.valid & ~self.visual

    @property
    def after_images(self) -> Tensor:
        """bool [B, L]: the text behind the last visual token of each row."""
        seen = self.visual.flip(1).cumsum(1).flip(1)
        return self.text & (seen == 0)

    @property
    def last(self) -> Tensor:
        """bool [B, L]: the last token of each row."""
        place = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (place == (self.valid * place).amax(1, keepdim=True))

    @property
    def is_slot(self) -> Tensor:
        """bool [B, V]: the slots that have a token."""
        return self.slots >= 0

    def of_visual(self, x: Tensor, dim: int = -1) -> Tensor:
        """x [B, ..., L, ...] -> [B, ..., V, ...]: what it holds at the visual tokens, 0 elsewhere.

        Args:
            dim: the dimension of the L tokens.
        """
        dim = dim % x.dim()
        shape = [1] * x.dim()
        shape[0], shape[dim] = self.slots.shape
        there = self.is_slot.view(shape)
        places = self.slots.clamp(min=0).long().view(shape)
        size = [*x.shape[:dim], self.slots.shape[1], *x.shape[dim + 1 :]]
        return x.gather(dim, places.expand(size)).masked_fill(~there, 0)

    def heads(self, of: str = "previous") -> tuple[Tensor, Tensor]:
        """(q [B, Hq, L, D], k [B, Hkv, L, D]) of the layer before ("previous") or of this one
        ("following"), rotated.

        Raises:
            ValueError: another word; "previous" before the first layer.
        """
        if of not in ("previous", "following"):
            raise ValueError(f'of must be "previous" or "following", got {of!r}')
        heads = getattr(self, of)
        if heads is None:
            raise ValueError(f"there are no queries and keys of the {of} layer at {self.layer}")
        q, k = (x.detach() for x in heads())
        return (q.float(), k.float()) if q.dtype == torch.float64 else (q, k)

    def last_attention(self, of: str = "previous", softmax: bool = True) -> Tensor:
        """The attention of the last token of each row over all keys: f32 [B, Hq, L].

        Args:
            of: see heads. softmax: False for the scaled logits, -inf where hidden.
        """
        q, k = self.heads(of)
        place = self.last.int().argmax(1).view(-1, 1, 1, 1).expand(-1, q.shape[1], 1, q.shape[3])
        mask = self.valid[:, None, None]
        row = q.gather(2, place)
        return tokred.attention_rows(row, k, softmax, scale=self.scale, mask=mask)[:, :, 0]

    def received_attention(
        self, queries: Tensor, of: str = "previous", reduce: str = "mean"
    ) -> Tensor:
        """What every token receives, causally, from chosen queries: f32 [B, Hq, L].

        Args:
            queries: bool [B, L], or their weights f32 [B, L] or [B, Hq, L]. of: see heads.
            reduce: "sum", or "mean": divided by the sum of the weights.

        O(B Hq L^2 D) time, memory linear in L: no attention matrix is stored.
        """
        if reduce not in ("sum", "mean"):
            raise ValueError(f'reduce must be "sum" or "mean", got {reduce!r}')
        q, k = self.heads(of)
        weight = queries.float()
        weight = weight if weight.dim() == 3 else weight[:, None]
        mask = self.valid[:, None, None]
        columns = tokred.attention_columns(
            q, k, weight=weight.contiguous(), causal=True, scale=self.scale, mask=mask
        )
        if reduce == "sum":
            return columns
        return columns / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LayerStates:
    """Inputs and outputs of the attention and the MLP of one layer of the language model.

    [B, L, C] each, without gradients; outputs before they are added to the residual stream. See
    PromptCall for the rest.

    neurons: [B, L, F], what the MLP's last projection was given, for a method that has
        `reads_neurons`, which is True.
    """

    layer: int
    num_layers: int
    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    valid: Tensor
    visual: Tensor
    carried: dict[str, Tensor]
    neurons: Tensor | None = None
