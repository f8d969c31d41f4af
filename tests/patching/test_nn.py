"""The attention modules: what they choose, by loops in plain torch, and how they attend to it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from tokred.nn import BlockSparseCore, TopKCore

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def heads(batch: int = 2, queries: int = 1, keys: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    q = tokens(batch, 6, queries, 16)
    return q, tokens(batch, 2, keys, 16, seed=1), tokens(batch, 2, keys, 12, seed=2)


def padding(batch: int, keys: int) -> Tensor:
    """Left padding in the first row, right padding in the last."""
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[0, : keys // 4] = False
    mask[-1, keys - keys // 5 :] = False
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention with an [B, Hq, L, N] mask; 0 where nothing is visible."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1).nan_to_num(0) @ v


def reduced(scores: Tensor, heads_kv: int, reduce: str) -> Tensor:
    """[B, Hq, R, N] scores over the heads, as `qk_score` documents it."""
    groups = scores.unflatten(1, (heads_kv, -1))
    return {
        "none": lambda: scores,
        "group_mean": lambda: groups.mean(2),
        "group_max": lambda: groups.amax(2),
        "head_mean": lambda: scores.mean(1, keepdim=True),
        "softmax_vote": lambda: scores.softmax(-1).sum(1, keepdim=True),
    }[reduce]()


def chosen(scores: Tensor, visible: Tensor, k: int, sinks: int, locals_: int) -> Tensor:
    """bool of the shape of scores: the sinks, the locals, and the k best between them."""
    visible = visible.expand(scores.shape)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).tolist():
        row = tuple(row)
        real = visible[row].nonzero().flatten().tolist()
        forced = {*real[:sinks], *real[max(len(real) - locals_, 0) :]}
        free = sorted(set(real) - forced, key=lambda j: (-scores[row][j].item(), j))
        keep[row][[*forced, *free[:k]]] = True
    return keep


def repeat_heads(keep: Tensor, count: int) -> Tensor:
    return keep.repeat_interleave(count // keep.shape[1], 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reduce", ["none", "group_mean", "group_max", "head_mean", "softmax_vote"])
def test_token_scores_in_decoding(reduce: str, padded: bool) -> None:
    q, k, v = heads()
    mask = padding(2, 40) if padded else None
    visible = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask
    module = TopKCore(7, reduce=reduce, num_sinks=3, num_locals=4)
    logits = q @ k.repeat_interleave(3, 1).transpose(2, 3) / 4
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    keep = chosen(reduced(logits, 2, reduce), visible[:, None, None], 7, 3, 4)
    expected = attend(q, k, v, repeat_heads(keep, 6))
    torch.testing.assert_close(module(q, k, v, mask), expected, rtol=1e-5, atol=1e-5)


def test_dimension_scores() -> None:
    q, k, v = heads()
    dims = torch.stack([torch.randperm(16, generator=generator(h))[:6] for h in range(6)])
    module = TopKCore(9, scoring=dims.int(), reduce="none", num_locals=1)
    part = [q[:, h, :, dims[h]] @ k[:, h // 3, :, dims[h]].transpose(1, 2) for h in range(6)]
    keep = chosen(torch.stack(part, 1), torch.ones(40, dtype=torch.bool), 9, 0, 1)
    torch.testing.assert_close(module(q, k, v), attend(q, k, v, keep), rtol=1e-5, atol=1e-5)
    assert not module.state_dict()  # they are an option, as k is
    with pytest.raises(ValueError, match="block_q"):
        TopKCore(9, scoring=dims.int(), block_q=2)(*heads(queries=6))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [22, 40])
def test_causal_lists_for_blocks_of_queries(queries: int, padded: bool) -> None:
    q, k, v = heads(queries=queries)
    mask = padding(2, 40) if padded else None
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask
    module = TopKCore(5, num_sinks=2, num_locals=8, block_q=8, causal=True)
    position = torch.arange(40 - queries, 40)
    causal = torch.arange(40) <= position[:, None]
    lists = []
    for start in range(0, queries, 8):
        part = slice(start, min(start + 8, queries))
        own = real[:, part] if queries == 40 else torch.ones(2, part.stop - start).bool()
        weight = own / own.sum(1, keepdim=True).clamp(min=1)
        mean = (q[:, :, part] * weight[:, None, :, None]).sum(2, keepdim=True)
        logits = mean @ k.repeat_interleave(3, 1).transpose(2, 3) / 4
        visible = (real & causal[part.stop - 1])[:, None, None]
        keep = chosen(reduced(logits, 2, "group_mean"), visible, 5, 2, 8)
        lists.append(repeat_heads(keep, 6).expand(-1, -1, part.stop - start, -1))
    keep = torch.cat(lists, 2) & causal & real[:, None, None]
    torch.testing.assert_close(module(q, k, v, mask), attend(q, k, v, keep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", ["mean", "min_max"])
@pytest.mark.parametrize("padded", [False, True])
def test_block_scores(statistic: str, padded: bool) -> None:
    q, k, v = heads(keys=45)
    mask = padding(2, 45) if padded else None
    real = torch.ones(2, 45, dtype=torch.bool) if mask is None else mask
    module = TopKCore(
        16, scoring="block", reduce="none", num_locals=4, block_size=8, statistic=statistic
    )
    keep = torch.zeros(2, 6, 1, 45, dtype=torch.bool)
    for b in range(2):
        inside = [[j for j in range(m * 8, min(m * 8 + 8, 45)) if real[b, j]] for m in range(6)]
        last = real[b].nonzero().flatten()[-4:].tolist()
        forced = {m for m in range(6) if set(inside[m]) & set(last)}
        for h in range(6):
            query, score = q[b, h, 0], {}
            for m in range(6):
                part = k[b, h // 3, inside[m]]
                if not inside[m]:
                    continue
                if statistic == "mean":
                    score[m] = (part.mean(0) @ query).item()
                else:
                    low, high = part.amin(0), part.amax(0)
                    score[m] = torch.maximum(query * low, query * high).sum().item()
            free = sorted(set(score) - forced, key=lambda m: (-score[m], m))
            # Places: two for k, and two for locals that may begin inside a block.
            for m in [*forced, *free[: 4 - len(forced)]]:
                keep[b, h, 0, inside[m]] = True
    torch.testing.assert_close(module(q, k, v, mask), attend(q, k, v, keep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_everything_chosen_is_dense_attention_bit_for_bit(causal: bool) -> None:
    q, k, v = heads(queries=40)
    mask = padding(2, 40)
    expected = tokred.biased_attention(q, k, v, causal=causal, mask=mask)[0]
    for options in ({"k": 40}, {"k": 30, "num_sinks": 4, "num_locals": 6}, {"k": 99}):
        module = TopKCore(**options, causal=causal, block_q=8)
        assert_bitwise_equal(module(q, k, v, mask), expected)


BLOCK_CASES = {
    "k": {"k": 2},
    "density": {"density": 0.4, "reduce": "group_mean"},
    "top_p": {"top_p": 0.55, "min_k": 2, "reduce": "head_mean"},
    "bounds": {"k": 1, "statistic": "min_max", "num_sinks": 3, "num_locals": 9},
}


def kept_blocks(
    q: Tensor, k: Tensor, real: Tensor, options: dict[str, Any], causal: bool
) -> Tensor:
    """bool [B, Hq, nQ, nK] by loops, for blocks of 8 queries and 6 keys."""
    batch, count, queries, _ = q.shape
    keys = k.shape[2]
    rows, columns = -(-queries // 8), -(-keys // 6)
    sinks, locals_ = options.get("num_sinks", 0), options.get("num_locals", 0)
    keep = torch.zeros(batch, count, rows, columns, dtype=torch.bool)
    for b, r in torch.cartesian_prod(torch.arange(batch), torch.arange(rows)).tolist():
        part = range(r * 8, min(r * 8 + 8, queries))
        end = part.stop + keys - queries if causal else keys
        seen = [j for j in range(end) if real[b, j]]
        if causal:
            forced = {j for j in seen if j >= r * 8 + keys - queries - locals_}
        else:
            forced = set(seen[max(len(seen) - locals_, 0) :])
        forced = {j // 6 for j in forced | set(seen[:sinks])}
        blocks = {m: [j for j in range(m * 6, m * 6 + 6) if j < keys and real[b, j]]
                  for m in {j // 6 for j in seen}}  # fmt: skip
        own = [i for i in part if queries != keys or real[b, i]]
        scores = torch.full((count, columns), -torch.inf)
        for h in range(count):
            query = q[b, h, own].sum(0) / max(len(own), 1)
            for m, members in blocks.items():
                keys_of = k[b, h // 3, members]
                if options.get("statistic") == "min_max":
                    low, high = keys_of.amin(0), keys_of.amax(0)
                    scores[h, m] = torch.maximum(query * low, query * high).sum() / 4
                else:
                    scores[h, m] = query @ keys_of.mean(0) / 4
        reduce = options.get("reduce", "none")
        scores = reduced(scores[None, :, None], 2, reduce)[0, :, 0]
        for h in range(count):
            row = scores[h * scores.shape[0] // count]
            best = sorted(blocks, key=lambda m: (-row[m].item(), m))
            if "top_p" in options:
                shares = row.softmax(-1)[best].cumsum(0)
                number = max(int((shares <= options["top_p"]).sum()) + 1, options["min_k"])
                picked = best[:number]
            else:
                number = options.get("k", round(options.get("density", 0) * columns))
                picked = [m for m in best if m not in forced][:number]
            keep[b, h, r, [*forced, *picked]] = True
    return keep


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_block_sparse_attention(case: str, padded: bool, causal: bool) -> None:
    options = BLOCK_CASES[case]
    q, k, v = heads(queries=40 if padded else 21)
    mask = padding(2, 40) if padded else None
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask
    module = BlockSparseCore(**options, block_q=8, block_k=6, causal=causal)
    keep = kept_blocks(q, k, real, options, causal)
    actual = module.block_mask(q, k, mask)
    assert actual.shape[1] in (1, 6)
    assert torch.equal(actual.expand_as(keep), keep)
    visible = keep.repeat_interleave(8, 2)[:, :, : q.shape[2]].repeat_interleave(6, 3)[..., :40]
    visible = visible & real[:, None, None]
    if causal:
        visible = visible & torch.ones(q.shape[2], 40).tril(40 - q.shape[2]).bool()
    torch.testing.assert_close(
        module(q, k, v, mask), attend(q, k, v, visible), rtol=1e-5, atol=1e-5
    )


def test_gradients_flow_through_the_attention_alone() -> None:
    q, k, v = (t.requires_grad_() for t in heads(queries=16))
    for module in (
        TopKCore(5, num_locals=8, block_q=8, causal=True),
        BlockSparseCore(k=1, block_q=8, block_k=8, causal=True),
    ):
        grads = torch.autograd.grad(module(q, k, v).square().sum(), (q, k, v))
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
    everything = BlockSparseCore(density=1.0, block_q=8, block_k=8)
    dense = attend(q, k, v, torch.ones(1, dtype=torch.bool))
    expected = torch.autograd.grad(dense.square().sum(), (q, k, v))
    actual = torch.autograd.grad(everything(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_modules_compile_without_breaks() -> None:
    q, k, v = heads(queries=16)
    for module in (
        TopKCore(5, num_locals=8, block_q=8, causal=True),
        TopKCore(8, scoring="block", block_size=8),
        BlockSparseCore(top_p=0.5, block_q=8, block_k=8, causal=True),
    ):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v), module(q, k, v))


MODULES = [
    TopKCore(5, num_locals=8, block_q=8, causal=True),
    TopKCore(5, scoring=torch.arange(12, dtype=torch.int32).view(6, 2)),
    TopKCore(8, scoring="block", block_size=8, statistic="min_max"),
    BlockSparseCore(top_p=0.5, block_q=8, block_k=8, causal=True),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_copies_and_threads_compute_the_same(module: nn.Module) -> None:
    inputs = [tuple(t[:, :, :length] for t in heads(queries=40)) for length in (40, 33, 24, 40)]
    with torch.no_grad():
        expected = [module(*x) for x in inputs]
        before = dict(vars(module))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            for x, wanted in zip(inputs, expected, strict=True):
                assert_bitwise_equal(other(*x), wanted)
    # Nothing of a pass stays on the module, so that threads may share it.
    assert dict(vars(module)) == before

    def run(x: tuple) -> list[Tensor]:
        with torch.no_grad():
            return [module(*x) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(run, inputs), expected, strict=True):
            for result in results:
                assert_bitwise_equal(result, wanted)


def test_empty_and_hidden() -> None:
    q, k, v = heads()
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    for module in (TopKCore(5), TopKCore(8, scoring="block", block_size=8)):
        assert (module(q, k, v, nothing) == 0).all()
    assert (BlockSparseCore(k=2, block_q=8, block_k=8)(q, k, v, nothing) == 0).all()
    assert TopKCore(5)(q[:, :, :0], k, v).shape == (2, 6, 0, 12)
    assert (TopKCore(0)(q, k, v) == 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopKCore(-1), "at least 0"),
        (lambda: TopKCore(1, scoring="page"), "scoring must be"),
        (lambda: TopKCore(1, reduce="sum"), "reduce must be"),
        (lambda: TopKCore(1, statistic="median"), "statistic must be"),
        (lambda: TopKCore(1, block_size=0), "block_size"),
        (lambda: BlockSparseCore(), "one of k, density and top_p"),
        (lambda: BlockSparseCore(k=1, top_p=0.5), "one of k, density and top_p"),
        (lambda: BlockSparseCore(k=1, reduce="softmax_vote"), "reduce must be"),
        (lambda: BlockSparseCore(k=1, block_k=0), "block sizes"),
    ],
)
def test_bad_options(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
