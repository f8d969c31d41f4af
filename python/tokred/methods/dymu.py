"""DyMU: merge what is more similar than a calibrated threshold, so images differ in their tokens.

DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs (arXiv 2504.17040).

Calibration finds a threshold for every layer, such that r tokens of an image merge on average over
a batch; at inference every link above it merges. As published for one image at a time. Images of a
batch would differ in their tokens and be padded; inside tokred.patch as many merge in each as in
the one with the fewest links above the threshold, so that no token is padding. The authors' code
adds 1e-4 to the sizes it divides by in batches, and adds the log of the sizes after the softmax in
one of its branches; neither is followed.

Virtual unmerging is attention in a language model as if nothing had merged. From pictures to a
prompt that a language model reads so:

    thresholds = calibrate(encoder, loader, r=20)                # once, over a stream of batches
    with tokred.patch(encoder, "dymu", threshold=thresholds, trace_source=True) as handle:
        x = encoder(pixels).last_hidden_state                    # [B, 1 + V, C]: V patches are left
    prompt = unmerged_prompt(project(x), handle.token_map, before, after, num_prefix=1)
    out = tokred.unmerged_attention(q, k, v, prompt.token_map, cos, sin)            # every layer

with q, k and v of the prompt's M unique tokens, not rotated, and the angles of its N positions. The
cache holds M keys and values; grown_map has the map for those of tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import tokred
from tokred.schedule import Schedule, parse_r, reducing_layers, resolve

from ._arguments import check_features
from ._lists import check_count, check_minimum
from ._maps import identity, map_of_links
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def batch_plan(
    metric: Tensor, total: int, num_prefix: int = 0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the `total` most similar links of a whole batch: what calibration does in a layer.

    Args:
        metric: [B, N, C], the keys averaged over the heads.
        total: links that merge, over all items; ties go to the earlier item and token.
        num_prefix: the first tokens that must not take part.
        mask: bool [B, N]; tokens that are False are padding, and dropped.

    Returns:
        (token_map i32 [B, N], num_out i32 [B], threshold f32 []): the cosine of the best link that
        did not merge, at least 0, which is also what it is where none is left.

    O(B N^2 C) time, O(B N) memory.
    """
    tokens = metric.shape[1]
    position = torch.arange(tokens, dtype=torch.int32, device=metric.device)
    masks = []
    for side in (0, 1):
        after = (position[side::2] >= num_prefix).expand(metric.shape[0], -1)
        masks.append((after if mask is None else after & mask[:, side::2]).contiguous())
    a, b = metric[:, 0::2].contiguous(), metric[:, 1::2].contiguous()
    score, partner = tokred.match(a, b, *masks)
    ranked, order = score.flatten().sort(descending=True, stable=True)
    threshold = ranked[total : total + 1].amax() if total < ranked.numel() else ranked.new_zeros(())
    best = torch.zeros_like(order, dtype=torch.bool).scatter(0, order[:total], True)
    chosen = best.view_as(score) & (partner >= 0)
    links = identity(metric)
    links[:, 0::2] = torch.where(chosen, 2 * partner + 1, links[:, 0::2])
    if mask is not None:
        links = torch.where(mask, links, -1)
    return *map_of_links(links), threshold.clamp(min=0)


@dataclass
class Calibration:
    """Collects the thresholds of the layers at which r tokens of an image merge on average.

    r is a schedule (tokred.schedule.parse_r); seen has the thresholds of every layer, one a batch.
    For one thread.
    """

    r: Schedule
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return reducing_layers(num_layers, self.r)

    def plan(self, call: ReductionCall) -> Reduction:
        """batch_plan; images that have merged more are padded with tokens of size 0.

        Raises:
            ValueError: attention that does not leave tokens of size 0 out.
        """
        if not call.attends_by_size:
            raise ValueError("calibration pads its batches: patch with prop_attn=True")
        batch, tokens, _ = call.tokens.shape
        live = None if call.size is None else call.size > 0
        r = resolve(parse_r(call.num_layers, self.r)[call.layer], tokens, call.num_prefix)
        token_map, counts, threshold = batch_plan(call.mean_keys, r * batch, call.num_prefix, live)
        self.seen.setdefault(call.layer, []).append(threshold)
        return token_map, int(counts.max())

    def thresholds(self, num_layers: int) -> list[float]:
        """The mean of every layer over the batches; 2, above every cosine, where it has none."""
        means = {layer: torch.stack(seen).mean().item() for layer, seen in self.seen.items()}
        return [means.get(layer, 2.0) for layer in range(num_layers)]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    r: Schedule,
    run: Callable[[nn.Module, Any], Any] | None = None,
    num_prefix: int | None = None,
) -> list[float]:
    """The thresholds at which r tokens of an image merge in each layer, on average.

    Args:
        model: a vision encoder that tokred.patch merges in, in eval mode.
        batches: inputs of the model, such as the batches of a loader; more images, better means.
        r: a schedule (tokred.schedule.parse_r).
        run: runs the model on a batch; model(batch) where None.
        num_prefix: as in tokred.patch.

    Returns:
        One threshold a layer, the mean over the batches, for the option `threshold`; 2, above every
        cosine, in layers that merge nothing.

    Raises:
        ValueError: no batch, or a model with several encoders, which need one call each.
    """
    calibration = Calibration(r)
    with tokred.patch(model, "dymu", calibration=calibration, num_prefix=num_prefix) as handle:
        if len(handle.states) != 1:
            count = len(handle.states)
            raise ValueError(f"the model has {count} encoders: calibrate one at a time")
        for batch in batches:
            model(batch) if run is None else run(model, batch)
        num_layers = handle.states[0].num_layers
    if not calibration.seen and calibration.layers(num_layers):
        raise ValueError("batches must hold at least one batch")
    return calibration.thresholds(num_layers)


@dataclass(frozen=True)
class UnmergedPrompt:
    """A prompt of M unique tokens, to be attended to as the N tokens that it was.

    embeddings: [B, M, C]. token_map: i32 [B, N], the unique token at every position.
    """

    embeddings: Tensor
    token_map: Tensor


def unmerged_prompt(
    visual: Tensor,
    token_map: Tensor,
    before: Tensor | None = None,
    after: Tensor | None = None,
    num_prefix: int = 0,
) -> UnmergedPrompt:
    """The text before an image, its merged tokens, and the text after it.

    Args:
        visual: [B, num_prefix + V, C], merged and projected. token_map: i32 [B, num_prefix + P],
            the merged token of every patch, as the handle of a patch with trace_source=True has it.
        before, after: [B, T, C], embeddings of text, of which every token is its own.
        num_prefix: the first tokens, such as the class token, which the language model does not
            get.

    Returns:
        UnmergedPrompt, with the P positions of the patches between those of the text.

    Raises:
        ValueError: another shape.
    """
    check_features("visual", visual)
    batch, channels = visual.shape[0], visual.shape[2]
    check_count("num_prefix", num_prefix)
    if token_map.dim() != 2 or token_map.shape[0] != batch or token_map.dtype != torch.int32:
        got = f"{token_map.dtype} {list(token_map.shape)}"
        raise ValueError(f"token_map must be int32 [{batch}, N], got {got}")
    parts, places, first = [], [], 0
    for name, x in (("before", before), ("visual", visual[:, num_prefix:]), ("after", after)):
        if x is None:
            continue
        check_features(name, x, batch)
        if x.shape[2] != channels:
            raise ValueError(f"{name} must have {channels} channels, got {x.shape[2]}")
        slots = token_map[:, num_prefix:] - num_prefix if name == "visual" else identity(x)
        parts.append(x)
        places.append(torch.where(slots >= 0, slots + first, -1))
        first += x.shape[1]
    return UnmergedPrompt(torch.cat(parts, 1), torch.cat(places, 1))


def grown_map(token_map: Tensor, tokens: int, new: int) -> Tensor:
    """The map of a prompt and `new` tokens behind it, each its own: i32 [B, N + new].

    Args:
        token_map: i32 [B, N], of a prompt. tokens: M, its unique tokens, and what has followed.
        new: how many follow now, whose queries have query_map = 0 .. new - 1.
    """
    check_minimum(0, tokens=tokens, new=new)
    place = torch.arange(tokens, tokens + new, dtype=torch.int32, device=token_map.device)
    return torch.cat([token_map, place.expand(token_map.shape[0], -1)], 1)


@dataclass(frozen=True)
class DymuOptions(Options):
    """Options of tokred.patch(model, "dymu", ...).

    threshold: links of a greater cosine merge; a number for every layer, or a list with one for
    each, as calibrate returns. max_r: a schedule (tokred.schedule.parse_r) of how many may merge at
    most, half of the tokens where None. calibration: a Calibration, as calibrate makes it, which
    then says what merges, and collects. The number of tokens is read from the device once a layer,
    so that the model cannot run under torch.compile or in a CUDA graph.
    """

    threshold: float | Sequence[float] = 0.9
    max_r: Schedule | None = None
    calibration: Calibration | None = None

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.threshold
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"threshold must be a number or a list of numbers, got {given!r}")

    def layers(self, num_layers: int) -> list[int]:
        """The layers with a threshold that a cosine can exceed.

        Raises:
            ValueError: a list with another number of thresholds.
        """
        if self.calibration is not None:
            return self.calibration.layers(num_layers)
        if not isinstance(self.threshold, int | float) and len(self.threshold) != num_layers:
            raise ValueError(
                f"threshold must have one number for each of {num_layers} layers, got "
                f"{len(self.threshold)}"
            )
        most = parse_r(num_layers, num_layers if self.max_r is None else self.max_r)
        return [layer for layer in range(num_layers) if most[layer] and self._at(layer) < 1]

    def plan(self, call: ReductionCall) -> Reduction:
        """Merges every link above the layer's threshold.

        Raises:
            RuntimeError: under torch.compile.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("dymu merges by content, and cannot be compiled: its shapes differ")
        if self.calibration is not None:
            return self.calibration.plan(call)
        batch, tokens, _ = call.tokens.shape
        if batch == 0:
            return None
        metric, threshold = call.mean_keys, self._at(call.layer)
        token_map, counts = tokred.threshold_matching(metric, threshold, call.num_prefix)
        fewest, most_left = torch.stack(counts.aminmax()).tolist()
        r = tokens - most_left
        most = r if self.max_r is None else parse_r(call.num_layers, self.max_r)[call.layer]
        r = min(r, resolve(most, tokens, call.num_prefix))
        if r == 0:
            return None
        if tokens - r == fewest:  # every image merges as many, so these are the links
            return token_map, fewest
        return tokred.bipartite_soft_matching(metric, r, call.num_prefix), tokens - r

    def _at(self, layer: int) -> float:
        return self.threshold if isinstance(self.threshold, int | float) else self.threshold[layer]


METHOD = Method(
    title="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs",
    arxiv="2504.17040",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.CALIBRATION),
    status="exact",
    summary="merge every link above a calibrated threshold: simple images keep fewer tokens",
    options=DymuOptions,
)
