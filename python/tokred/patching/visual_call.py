"""The visual tokens of an image in one forward pass, as methods that reduce them get them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokred


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens that a method has made itself, where those it keeps do not stay as they are.

    tokens: [B, K, C], made of `call.features`. indices: i32 [B, K], the token whose place in the
    prompt (and whose position, where positions are kept) each one takes, -1 for none.
    token_map: i32 [B, N], the new token that each one went to, -1 for none. Where a model adds
    features of other layers to its visual tokens (deepstack), these become the means of such
    groups; without a map they are those of `indices`.
    """

    tokens: Tensor
    indices: Tensor
    token_map: Tensor | None = None


# i32 [B, K], the tokens that stay, in the order in which the language model will read them, -1 for
# none; or VisualTokens; or None: all stay.
VisualReduction: TypeAlias = Tensor | VisualTokens | None


@dataclass(frozen=True)
class Layout:
    """Where in the image the N tokens of a call come from; all tensors are on the call's device.

    crop: i32 [N], the number of the crop that each token belongs to. place: i32 [N], its place in
    the grid of that crop, row by row. crop_grid: (rows, columns) of tokens in one crop.
    tiling: (rows, columns) of the crops behind the first, which is then a thumbnail of the whole
    image; None where there is one crop. Of an image whose borders were padded, the tokens of the
    padding are missing.
    """

    crop: Tensor
    place: Tensor
    crop_grid: tuple[int, int]
    tiling: tuple[int, int] | None = None

    @property
    def num_crops(self) -> int:
        return 1 if self.tiling is None else 1 + self.tiling[0] * self.tiling[1]


@dataclass
class EncoderStates:
    """What the vision encoder has computed for B images, in references that cost nothing to keep.

    Every image has M crops of P tokens behind num_prefix others, such as a class token; the N
    tokens of a call are made of these, each of one or several.

    num_layers: of the encoder. heads: by layer, a function that returns (q, k), each
    [B, M, H, num_prefix + P, D], as the attention used them. scale: of its logits.
    token_of_patch: i32 [M, P], the token of the call that each one became a part of, -1 for none.
    features: a function that returns [B, M, P, Ce], what the projector was given.
    project: the projector, where it takes each of these tokens by itself: [..., Ce] -> [..., C].
    """

    num_layers: int
    num_prefix: int
    token_of_patch: Tensor
    heads: dict[int, Callable[[], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)
    features: Callable[[], Tensor] | None = None
    project: Callable[[Tensor], Tensor] | None = None


def _in_dtype_of(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x); of a module, with its parameters and buffers in the dtype of x."""
    if not isinstance(function, nn.Module):
        return function(x)
    tensors = itertools.chain(function.named_parameters(), function.named_buffers())
    cast = {name: y.to(x.dtype) if y.is_floating_point() else y for name, y in tensors}
    return torch.func.functional_call(function, cast, (x,))


@dataclass
class VisualCall:
    """The visual tokens of an image before the language model reads them.

    A call is one image, or several of one size as a batch. Tokens that say something other than
    what is in the image, such as those at the ends of rows (image_newline), are not among them.
    Everything but the fields is computed when it is asked for. Nothing carries a gradient but
    `tokens`: it serves to choose.

    tokens: [B, N, C], as the language model will get them; read them as `features` to choose.
    layout: where in the image they come from; None where the adapter does not know.
    encoder: see EncoderStates; None where the adapter does not know how the tokens came out of it.
    text: [B, T, C], the embeddings of the other tokens of the prompt that the image is a part of,
        and text_mask: bool [B, T], which of these are there.
    pixels: [B, M, 3, height, width], the crops as the encoder was given them, or None.
    vocabulary: [V, C], the input embeddings of the language model, or None.
    why_not: what the adapter says where layout, encoder or pixels are None.
    """

    tokens: Tensor
    layout: Layout | None = None
    encoder: EncoderStates | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pixels: Tensor | None = None
    why_not: str = "only the features are known here"
    vocabulary: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """[B, N, C]: the tokens, for similarity; float32 of a model in float64."""
        x = self.tokens.detach()
        return (x.float() if x.dtype == torch.float64 else x).contiguous()

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the image's tokens, which are in order row by row.

        Raises:
            ValueError: they are no grid, as those of several crops.
        """
        layout = self._layout()
        if layout.num_crops != 1 or layout.crop_grid[0] * layout.crop_grid[1] != self._count:
            raise ValueError(
                f"the {self._count} visual tokens are no grid: the image has {layout.num_crops} "
                f"crops of {layout.crop_grid}; read call.layout"
            )
        return layout.crop_grid

    @property
    def num_layers(self) -> int:
        """The number of layers of the vision encoder."""
        return self._states().num_layers

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder has one, so that `class_attention` works."""
        return self.encoder is not None and self.encoder.num_prefix > 0

    @property
    def encoder_features(self) -> Tensor:
        """[B, N, Ce]: what the projector was given, means where several tokens became one."""
        states = self._states()
        if states.features is None:
            raise ValueError(f"the features before the projector are not known: {self.why_not}")
        return self._means(states.features().detach().unsqueeze(2))[:, 0]

    def project(self, encoder_features: Tensor) -> Tensor:
        """The model's projector on [..., Ce], for methods that perturb its input: [..., C].

        It runs in the dtype of what it is given: in half precision small changes would be lost.

        Raises:
            ValueError: the projector does not take each token by itself.
        """
        states = self._states()
        if states.project is None:
            raise ValueError(f"the projector does not take tokens one by one: {self.why_not}")
        with torch.no_grad():
            return _in_dtype_of(encoder_features, states.project)

    def made(
        self, tokens: Tensor, indices: Tensor, token_map: Tensor | None = None
    ) -> VisualTokens:
        """What `reduce_visual` returns where the method has made new tokens, see VisualTokens."""
        return VisualTokens(tokens, indices, token_map)

    def class_attention(self, layer: int = -2, softmax: bool = True) -> Tensor:
        """The attention of the class token in a layer of the encoder: f32 [B, H, N].

        Weights are normalised over all keys of a crop, the class token's included; of several
        patches that became one token the mean is taken.

        Args:
            layer: negative ones count from the last; one of those that the method has named in
                `encoder_layers`.
            softmax: False for the scaled logits.

        Raises:
            ValueError: the encoder has no class token, or the layer was not asked for.
        """
        if not self.has_class_token:
            raise ValueError(
                "the method reads the attention of the class token, and the vision encoder has "
                "none (or it is not known to the adapter): use received_attention, or a method "
                "that needs none"
            )
        q, k, scale = self._heads(layer)
        rows = tokred.attention_rows(q[:, :, :1].contiguous(), k, softmax, scale=scale)[:, :, 0]
        return self._per_token(rows)

    def received_attention(
        self, layer: int = -2, reduce: str = "mean", queries: Tensor | None = None
    ) -> Tensor:
        """How much attention each token receives from all those of its crop: f32 [B, H, N].

        Prefix tokens count among the queries. Of several patches that became one token the mean is
        taken. In layers that attend within windows, attention is that over the whole crop.

        Args:
            layer: see class_attention. reduce: "sum", "mean" or "max" over the queries.
            queries: bool [B, N], the tokens whose queries count, those of prefix tokens then do
                not; "sum" or "mean" over these of each crop.

        O(B H P^2 D) time, memory linear in P: no attention matrix is stored.
        """
        q, k, scale = self._heads(layer)
        if queries is None:
            return self._per_token(tokred.attention_columns(q, k, None, reduce, scale=scale))
        if reduce == "max":
            raise ValueError('reduce must be "sum" or "mean" beside queries, got "max"')
        states = self._states()
        there = states.token_of_patch >= 0
        weight = queries[:, states.token_of_patch.clamp(min=0).long()] & there
        weight = functional.pad(weight.flatten(0, 1).float(), (states.num_prefix, 0))[:, None]
        columns = tokred.attention_columns(q, k, weight=weight.contiguous(), scale=scale)
        if reduce == "mean":
            columns = columns / weight.sum(-1, keepdim=True).clamp(min=1)
        return self._per_token(columns)

    def patch_means(self, values: Tensor) -> Tensor:
        """f32 [B, N]: what the encoder's patches [B, M, P] have, means where several became one."""
        return self._means(values[:, :, None, :, None])[:, 0, :, 0]

    def mean_keys(self, layer: int = -2) -> Tensor:
        """The keys averaged over the heads: f32 [B, N, D]; see keys."""
        return self._means(self._patch_keys(layer).float().mean(2, keepdim=True))[:, 0]

    def keys(self, layer: int = -2) -> Tensor:
        """The keys of a layer of the encoder: f32 [B, H, N, D], as its attention used them."""
        k = self._patch_keys(layer)
        batch, crops, heads, patches, dim = k.shape
        flat = k.transpose(2, 3).reshape(batch, crops, patches, heads * dim)
        return self._means(flat.unsqueeze(2))[:, 0].unflatten(-1, (heads, dim)).transpose(1, 2)

    def _patch_keys(self, layer: int) -> Tensor:
        """[B, M, H, P, D]."""
        states, number = self._states(), self._layer(layer)
        return states.heads[number]()[1].detach()[:, :, :, states.num_prefix :]

    def _layout(self) -> Layout:
        if self.layout is None:
            raise ValueError(f"the layout of the visual tokens is not known: {self.why_not}")
        return self.layout

    def _states(self) -> EncoderStates:
        if self.encoder is None:
            raise ValueError(f"the states of the vision encoder are not known: {self.why_not}")
        return self.encoder

    @property
    def _count(self) -> int:
        return self.tokens.shape[1]

    def _layer(self, layer: int) -> int:
        states = self._states()
        number = layer + states.num_layers if layer < 0 else layer
        if number not in states.heads:
            raise ValueError(
                f"layer {layer} of the {states.num_layers} of the vision encoder was not kept: the "
                f"method's encoder_layers() must name it, and has named {sorted(states.heads)}"
            )
        return number

    def _heads(self, layer: int) -> tuple[Tensor, Tensor, float]:
        """q and k of every crop by itself, [B M, H, num_prefix + P, D], and the scale."""
        number = self._layer(layer)
        q, k = (x.detach().flatten(0, 1) for x in self._states().heads[number]())
        if q.dtype == torch.float64:
            q, k = q.float(), k.float()
        return q, k, self._states().scale[number]

    def _per_token(self, per_patch: Tensor) -> Tensor:
        """f32 [B M, H, num_prefix + P] -> [B, H, N]."""
        states = self._states()
        crops = states.token_of_patch.shape[0]
        x = per_patch[..., states.num_prefix :].unflatten(0, (-1, crops))
        return self._means(x.unsqueeze(-1))[..., 0]

    def _means(self, x: Tensor) -> Tensor:
        """[B, M, H, P, F] -> f32 [B, H, N, F], the mean over the patches of each token."""
        slots = self._states().token_of_patch
        batch, crops, heads, patches, width = x.shape
        rows = x.float().transpose(1, 2).reshape(batch * heads, crops * patches, width)
        rows = rows.contiguous()  # encoders may leave them transposed
        token_map = slots.reshape(1, -1).expand(batch * heads, -1)
        means, _ = tokred.merge(rows, token_map, self._count)
        return means.unflatten(0, (batch, heads))
