"""Methods that select tokens beside the rules as they are published, in plain torch.

Each picks 64 of 2880 visual tokens of 4096 channels. SCOPE, VisPruner and FlashVLM, whose rounds
compare the rest anew, pick of 576 tokens of 1024 channels, one image of LLaVA-1.5: of 2880 tokens
torch takes minutes. What a method is given (attention maps, scores, activations) is ready before
the clock starts; the nearest of EmbedLens's 32000 words are not: a third of its tokens lie near one
of the three words that mark what to drop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .harness import Case, tokens
from .machine import Run

KEEP, SHAPE, SMALL = 64, (1, 2880, 4096), (1, 576, 1024)
Candidates = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def method(name: str) -> ModuleType:
    return import_module(f"tokred.methods.{name}")


def maps(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Attention of heads that agree on what matters, as those of an encoder do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
    return (2 * common + torch.randn(shape, generator=generator)).softmax(-1).to(device)


def clustered(shape: tuple[int, int, int], device: str) -> Tensor:
    """Tokens around a hundred centres, so that some are alike and others are not."""
    generator = torch.Generator().manual_seed(2)
    batch, count, channels = shape
    centres = torch.randn(100, channels, generator=generator)
    chosen = torch.randint(100, (batch, count), generator=generator)
    x = centres[chosen] + 0.7 * torch.randn(shape, generator=generator)
    return (x * (0.5 + torch.rand(batch, count, 1, generator=generator))).to(device)


def best(scores: Tensor, k: int = KEEP) -> Tensor:
    return scores.topk(k, dim=-1).indices.sort(-1).values


def ranged(x: Tensor, eps: float = 1e-6) -> Tensor:
    minimum, maximum = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - minimum) / (maximum - minimum + eps)


def cosines(x: Tensor) -> Tensor:
    unit = functional.normalize(x, dim=-1)
    return unit @ unit.mT


def greedy(
    value: Callable[[Tensor, Tensor], Tensor], first: Tensor, similarity: Tensor, k: int = KEEP
) -> Tensor:
    """Picks by value(largest similarity to a pick, sum of the distances to all picks)."""
    picks, items = [first], torch.arange(len(first), device=first.device)
    nearest, total = torch.full_like(similarity[:, 0], -2), torch.zeros_like(similarity[:, 0])
    for _ in range(k - 1):
        row = similarity[items, picks[-1]]
        nearest, total = torch.maximum(nearest, row), total + 1 - row
        scores = value(nearest, total).scatter(1, torch.stack(picks, 1), -torch.inf)
        picks.append(scores.argmax(1))
    return torch.stack(picks, 1).sort(1).values


def faster_vlm(device: str) -> Candidates:
    attention = maps(1, 16, SHAPE[1], device=device)
    ours = partial(method("faster_vlm").select_tokens, attention, KEEP)
    return ours, lambda: best(attention.mean(1))


def vtc_cls(device: str) -> Candidates:
    layers = [maps(1, 16, SHAPE[1], device=device, seed=i) for i in range(11)]
    module = method("vtc_cls")
    ours = lambda: module.select_tokens(module.ensemble(layers), KEEP)  # noqa: E731
    return ours, lambda: best(sum(layer.mean(1) for layer in layers))


def hiprune(device: str) -> Candidates:
    middle, deep = (maps(1, 16, SHAPE[1], device=device, seed=i) for i in range(2))
    ours = partial(method("hiprune").select_tokens, middle, deep, KEEP, (48, 60))

    def published() -> Tensor:
        scores, anchors = deep.mean(1), middle.mean(1).topk(round(KEEP * 0.1 / 5), dim=1).indices[0]
        near = torch.cat([anchors + step for step in (0, -1, 1, -60, 60)])
        near = near.clamp(0, SHAPE[1] - 1).unique()
        scores[:, near] -= 1
        return torch.cat([near, scores.topk(KEEP - len(near), dim=1).indices[0]])[None]

    return ours, published


def hired(device: str) -> Candidates:
    early = maps(1, 1, 576, device=device)[:, 0]
    deep = maps(1, 5, 576, device=device, seed=1)
    ours = partial(method("hired").select_tokens, early, deep, KEEP, (24, 24), (2, 2))

    def published() -> Tensor:
        full = int(KEEP * 0.5)
        picks = [best(deep[0, 0], full)]
        strong = torch.zeros(576, device=device)
        strong[early[0].topk(288).indices] = 1
        counts = strong.view(2, 12, 2, 12).sum((1, 3)).flatten()
        for crop, share in enumerate((counts / counts.sum() * (KEEP - full)).int().tolist(), 1):
            picks.append(best(deep[0, crop], share) + crop * 576)
        return torch.cat(picks)[None]

    return ours, published


def globalcom2(device: str) -> Candidates:
    logits = maps(1, 5, 576, device=device).log()
    ratio = KEEP / SHAPE[1]
    ours = partial(method("globalcom2").select_tokens, logits, ratio, (24, 24), (2, 2))

    def published() -> Tensor:
        picks = [logits[0, 0].argsort(descending=True)[: int(576 * ratio)]]
        image = logits[:, :1].view(1, 1, 24, 24)
        sums = image.view(2, 12, 2, 12).sum((1, 3)).flatten()
        weight = ((sums - sums.max()) / 10).softmax(0)
        ratios = (ratio * (1 + weight - weight.mean())).clamp(max=1).tolist()
        wide = functional.interpolate(image, (48, 48), mode="bilinear").view(2, 24, 2, 24)
        parts = wide.transpose(1, 2).reshape(4, 576)
        for crop in range(4):
            scores = functional.normalize(logits[0, crop + 1], dim=0)
            scores = scores + functional.normalize(parts[crop], dim=0)
            picks.append(best(scores, int(576 * ratios[crop])) + (crop + 1) * 576)
        return torch.cat(picks)[None]

    return ours, published


def holov(device: str) -> Candidates:
    x, attention = clustered(SHAPE, device), maps(1, 16, SHAPE[1], device=device)
    ours = partial(method("holov").select_tokens, x, attention, KEEP)

    def published() -> Tensor:
        a, size = attention.mean(1)[0], SHAPE[1] // 16
        scores = []
        for run in range(16):
            part = slice(run * size, (run + 1) * size)
            unit = x[0, part] / (x[0, part].norm(dim=-1, keepdim=True) + 1e-6)
            similarity = unit @ unit.T * (1 - torch.eye(size, device=device))
            mean = similarity.sum(1) / (size - 1)
            variety = (similarity - mean[:, None]).square().sum(1) / (size - 1)
            strong = a[part] * 1e3
            scale = strong.abs().mean() / (variety.abs().mean() + 1e-6)
            scores.append((strong + 0.09 * scale * variety).mean())
        weight = torch.stack(scores)
        shares = (weight / (weight.sum() + 1e-6) * KEEP).int()
        shares[weight.topk(int(KEEP - shares.sum())).indices] += 1
        picks = [
            a[run * size : (run + 1) * size].topk(min(share, size)).indices + run * size
            for run, share in enumerate(shares.tolist())
        ]
        return torch.cat(picks)[None]

    return ours, published


def flash_scores(device: str) -> Candidates:
    x, text = clustered(SHAPE, device), tokens((1, 32, SHAPE[2]), "float32", device, seed=3)
    attention, module = maps(1, 16, SHAPE[1], device=device), method("flash_vlm")

    def ours() -> Tensor:
        return module.fused_scores(attention, module.text_similarity(x, text))

    def published() -> Tensor:
        similar = functional.normalize(x, dim=-1) @ functional.normalize(text, dim=-1).mT
        sharp = ((similar * (similar / 0.05).softmax(-1)).sum(-1) / 0.01).softmax(-1).pow(2.5)
        sharp = ranged(sharp)
        sharp = ranged(torch.where(sharp < sharp.quantile(0.995, dim=1), sharp * 0.1, sharp))
        salient = ranged(attention.mean(1)).clamp(min=1e-6)
        return ranged((0.5 * salient.log() + 0.5 * sharp.clamp(min=1e-6).log()).exp())

    return lambda: method("faster_vlm").select_tokens(ours(), KEEP), lambda: best(published())


def attention_debiasing(device: str) -> Candidates:
    attention = maps(1, 32, SHAPE[1], device=device)
    module = method("attention_debiasing")
    trend = module.position_trend(SHAPE[1]).to(device)
    ours = partial(module.select_tokens, attention, KEEP, trend=trend)
    return ours, lambda: best(attention.mean(1) / trend)


def core_matching(device: str) -> Candidates:
    generator = torch.Generator().manual_seed(5)
    rate = 0.1 + 0.8 * torch.rand(1, SHAPE[1] + 1, 1, generator=generator).pow(6)
    rate[:, 0] = 0.5
    active = (torch.rand(1, SHAPE[1] + 1, 11008, generator=generator) < rate).to(device)
    word, image = active[:, 0], active[:, 1:]
    module = method("core_matching")

    def published() -> Tensor:
        """The published code, except for products of rows that it does not read."""
        scores = (image.float() @ word.float()[..., None])[0, :, 0]
        descending = scores.sort(descending=True).values
        rank, drop = torch.arange(len(descending), device=device), descending - descending[0]
        away = (drop[-1] * rank - rank[-1] * drop).abs()
        return (scores > descending[away.argmax()]).nonzero()[:, 0][None]

    return lambda: module.select_tokens(module.coactivation(word, image)), published


def embed_lens(device: str) -> Candidates:
    x, module = clustered(SMALL, device), method("embed_lens")
    vocabulary = tokens((1, 32000, SMALL[2]), "float32", device)[0]
    useless = [module.VIT_SINK, module.LLM_SINK, module.DEAD]
    x[:, ::9], x[:, 1::9], x[:, 2::9] = (
        x[:, place::9] + vocabulary[word] for place, word in enumerate(useless)
    )
    ours = partial(module.select_tokens, x, vocabulary)

    def published() -> Tensor:
        words = functional.normalize(x, dim=-1) @ functional.normalize(vocabulary, dim=-1).T
        nearest = words.topk(3, dim=-1).indices
        keep = ~torch.isin(nearest, torch.tensor(useless, device=device)).any(-1)
        return keep[0].nonzero()[:, 0][None]

    return ours, published


def token_correlation(device: str) -> Candidates:
    keys = clustered((5, 576, 1024), device)
    late, early = (maps(5, 16, 576, device=device, seed=i) for i in range(2))
    module = method("token_correlation")
    ours = partial(module.select_tokens, keys, late, early, KEEP, 5)

    def published() -> Tensor:
        similarity = cosines(keys)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2)
        density = ((similarity > 0.8).sum(2) < 4).float().mean(1).double()
        part = density / density.sum() * KEEP
        shares = part.int()
        shares[(part - shares).topk(int(KEEP - shares.sum())).indices] += 1
        picks = []
        for crop, share in enumerate(shares.tolist()):
            first = late[crop].mean(0).topk(share // 2).indices
            rest = early[crop].mean(0)
            rest[first] = -1
            both = torch.cat([first, rest.topk(share - share // 2).indices])
            picks.append(both + crop * 576)
        return torch.cat(picks)[None]

    return ours, published


def vflowopt(device: str) -> Candidates:
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 1, 16, 2880, 64, generator=generator).to(device)
    module = method("vflowopt")

    def ours() -> Tensor:
        return method("faster_vlm").select_tokens(module.importance(q, k, threshold=1.0), KEEP)

    def published() -> Tensor:
        matrix = (q @ k.mT / 8).softmax(-1).mean(1)
        received = matrix.mean(1)
        strong = received > received.mean()
        return best(matrix[:, strong[0]].mean(1))

    return ours, published


def todre(device: str) -> Candidates:
    x = clustered(SHAPE, device)
    ours = partial(method("todre").select_tokens, x, KEEP)
    start = x.norm(dim=-1).argmax(1)
    return ours, lambda: greedy(lambda _, total: total, start, cosines(x))


def zoo_prune(device: str) -> Candidates:
    x, scores = clustered(SHAPE, device), maps(1, 1, SHAPE[1], device=device)[:, 0]
    ours = partial(method("zoo_prune").select_tokens, x, scores, KEEP)
    weight = ranged(scores, 1e-8)
    return ours, lambda: greedy(
        lambda nearest, _: (1 - nearest) * weight, weight.argmax(1), cosines(x)
    )


def idpruner(device: str) -> Candidates:
    x, scores = clustered(SHAPE, device), maps(1, 1, SHAPE[1], device=device)[:, 0]
    ours = partial(method("idpruner").select_tokens, x, scores, KEEP)
    weight = ranged(scores)
    return ours, lambda: greedy(
        lambda nearest, _: 0.5 * weight - 0.5 * nearest, weight.argmax(1), cosines(x)
    )


def catp(device: str) -> Candidates:
    x, text = clustered(SHAPE, device), clustered((1, 32, SHAPE[2]), device)
    module = method("catp")

    def ours() -> Tensor:
        return module.select_tokens(x, module.text_relevance(x, text), KEEP)

    def plain() -> Tensor:
        cosine = functional.normalize(x, dim=-1) @ functional.normalize(text, dim=-1).mT
        weight = ranged(cosine.amax(-1), 1e-12)
        return greedy(lambda nearest, _: 0.5 * weight - 0.5 * nearest, weight.argmax(1), cosines(x))

    return ours, plain


def divprune(device: str) -> Candidates:
    x = clustered(SHAPE, device)
    ours = partial(method("divprune").select_tokens, x, KEEP)

    def published() -> Tensor:
        similarity = cosines(x)
        apart = similarity.clone()
        apart.diagonal(dim1=1, dim2=2).fill_(-2)
        start = apart.amax(2).argmin(1)
        return greedy(lambda nearest, _: 1 - nearest, start, similarity)

    return ours, published


def scope(device: str) -> Candidates:
    x, attention = clustered(SMALL, device), maps(1, 16, SMALL[1], device=device)
    ours = partial(method("scope").select_tokens, x, attention, KEEP)

    def published() -> Tensor:
        similarity, weight = cosines(x), attention.mean(1)
        covered, picks = torch.zeros_like(weight), []
        for _ in range(KEEP):
            gain = (similarity - covered[:, None]).clamp(min=0).sum(2) * weight
            gain[:, picks] = -1
            picks.append(int(gain.argmax()))
            covered = torch.maximum(covered, similarity[:, picks[-1]])
        return torch.tensor([sorted(picks)])

    return ours, published


def dart(device: str) -> Candidates:
    x, norms = clustered(SHAPE, device), maps(1, 1, SHAPE[1], device=device)[:, 0]
    text, text_norms = clustered((1, 64, SHAPE[2]), device), maps(1, 1, 64, device=device)[:, 0]
    ours = partial(method("dart").select_tokens, x, norms, KEEP, text, text_norms)

    def published() -> Tensor:
        chosen = norms[0].topk(4).indices
        rows = torch.cat([x[0, chosen], text[0, text_norms[0].topk(4).indices]])
        free = torch.ones(SHAPE[1], dtype=torch.bool, device=device)
        free[chosen] = False
        picks, part = [chosen], -(-(KEEP - 4) // 8)
        for row in rows:
            likeness = functional.cosine_similarity(x[0], row[None])
            likeness[~free] = 2
            more = likeness.topk(min(part, KEEP - sum(map(len, picks))), largest=False).indices
            free[more] = False
            picks.append(more)
        return torch.cat(picks).sort().values[None]

    return ours, published


def rounds(device: str, name: str) -> Candidates:
    x, attention = clustered(SMALL, device), maps(1, 16, SMALL[1], device=device)
    scores = attention.mean(1)
    ours = partial(method(name).select_tokens, x, scores, KEEP)

    def published() -> Tensor:
        ranked = scores[0].argsort(descending=True)
        first, rest = ranked[: KEEP // 2], ranked[KEEP // 2 :]
        unit = functional.normalize(x[0], dim=-1)
        while (drop := min(8, len(rest) - (KEEP - KEEP // 2))) > 0:
            even, odd = rest[::2], rest[1::2]
            order = (unit[even] @ unit[odd].T).amax(1).argsort(descending=True)
            rest = torch.cat([even[order[drop:]], odd])
        return torch.cat([first, rest]).sort().values[None]

    return ours, published


# By how a method picks: those of scores pick the same, of greedy ones rounding may part the later
# picks, and of rounds, in which one swap moves all tokens behind it, all but the half by attention.
SCORES = {
    "faster_vlm": faster_vlm,
    "vtc_cls": vtc_cls,
    "hiprune": hiprune,
    "hired": hired,
    "globalcom2": globalcom2,
    "holov": holov,
    "flash_vlm scores": flash_scores,
    "attention_debiasing": attention_debiasing,
    "core_matching": core_matching,
    "embed_lens": embed_lens,
    "token_correlation": token_correlation,
    "vflowopt": vflowopt,
}
GREEDY = {
    "todre": todre,
    "zoo_prune": zoo_prune,
    "idpruner": idpruner,
    "catp": catp,
    "divprune": divprune,
    "scope": scope,
    "dart": dart,
}
ROUNDS = {
    "vispruner": partial(rounds, name="vispruner"),
    "flash_vlm": partial(rounds, name="flash_vlm"),
}
OTHER_SHAPES = {
    "hired": (1, 5, 576),
    "globalcom2": (1, 5, 576),
    "embed_lens": SMALL,
    "scope": SMALL,
    "token_correlation": (5, 576, 1024),
    "vflowopt": (1, 16, 2880, 64),
    "vispruner": SMALL,
    "flash_vlm": SMALL,
    "core_matching": (1, 2880, 11008),
}


def same_picks(minimum: float, outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The share of the first candidate's picks that each has."""
    expected = {i for i in next(iter(outputs.values()))[0].tolist() if i >= 0}
    agree = {}
    for name, picks in outputs.items():
        found = {i for i in picks[0].tolist() if i >= 0}
        agree[name] = len(expected & found) / max(len(expected | found), 1)
    if min(agree.values()) < minimum:
        raise RuntimeError(f"the picks differ: {agree}")
    return {name: {"agreeing": share} for name, share in agree.items()}


def case(name: str, candidates: Callable[[str], Candidates], minimum: float, device: str) -> Case:
    def build() -> dict[str, Callable]:
        ours, published = candidates(device)
        return {f"tokred {name}": ours, "torch": published}

    return Case(
        "selection",
        name,
        (*OTHER_SHAPES.get(name, SHAPE), KEEP),
        "float32",
        build,
        "clustered",
        examine=partial(same_picks, minimum),
    )


def cases(run: Run) -> Iterator[Case]:
    for methods, minimum in ((SCORES, 0.95), (GREEDY, 0.6), (ROUNDS, 0.33)):
        for name, candidates in methods.items():
            yield case(name, candidates, minimum, run.device)
