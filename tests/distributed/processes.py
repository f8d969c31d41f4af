"""What test_processes.py runs: checks of tokred.distributed in 2 and in 4 Gloo processes.

Prints a line for every check that fails. The processes are forked from one that has imported
everything, which takes longer than all that they do.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokred
import tokred.distributed
import tokred.integrations.transformers
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.op_calls import CALLS
from cases.sizes import Sizes
from tokred.compat import cache_keyword
from tokred.distributed.sharding import Rule
from tokred.ops.placements import REFUSED, RULES

SIZES = Sizes(b=4, hq=8, hk=4)


def mesh(*shape: int) -> DeviceMesh:
    ranks = torch.arange(dist.get_world_size()).view(shape or (-1,))
    return DeviceMesh("cpu", ranks)


def part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def sharded(x: Tensor, letters: str, letter: str) -> DTensor:
    """x with the dimension of that letter sharded; a star is the batch of the calls here."""
    dim = letters.replace("*", "b").find(letter)
    if dim < 0 or x.shape[dim] == 1:
        return DTensor.from_local(x, mesh(), [Replicate()], run_check=False)
    return DTensor.from_local(part(x, dim), mesh(), [Shard(dim)], run_check=False)


def op_over(op: str, letter: str) -> None:
    """The op on sharded arguments has the bits of the op on one device, without communication."""
    overload, rule = getattr(torch.ops.tokred, op).default, Rule.of(op)
    names = [argument.name for argument in overload._schema.arguments]
    args = CALLS[op](SIZES)
    expected = overload(*args)
    placed = [
        sharded(x, rule.arguments[name], letter) if isinstance(x, Tensor) else x
        for name, x in zip(names, args, strict=False)
    ]
    with CommDebugMode() as communication:
        actual = overload(*placed)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    single = isinstance(expected, Tensor)
    results = zip(*((x,) if single else x for x in (actual, expected)), rule.results, strict=True)
    for number, (found, wanted, letters) in enumerate(results):
        (placement,) = found.placements
        assert found.shape == wanted.shape, (number, found.shape, wanted.shape)
        if placement.is_partial():
            torch.testing.assert_close(found.full_tensor(), wanted)
            continue
        dim = letters.replace("*", "b").find(letter) if wanted.numel() else -1
        assert placement == (Shard(dim) if dim >= 0 else Replicate()), (number, placement)
        local = wanted if dim < 0 else part(wanted, dim)
        assert_bitwise_equal(found.to_local(), local, f"result {number}")


def refusals_say_why() -> None:
    for op in REFUSED:
        args = [
            DTensor.from_local(x, mesh(), [Replicate()], run_check=False)
            if isinstance(x, Tensor)
            else x
            for x in CALLS[op](SIZES)
        ]
        if op == "gather_tokens":
            args[0] = [sharded(x, "b", "b") for x in args[0]]
        try:
            getattr(torch.ops.tokred, op).default(*args)
        except RuntimeError as error:
            assert f"{op} does not work on DTensors" in str(error), error
        else:
            raise AssertionError(f"{op} ran on DTensors")


def gradients(key_heads: int) -> None:
    """Through the wrapper, with sharded heads; one head of keys serves every shard."""
    q, k, v = (
        torch.randn(2, heads, 6, 16, generator=generator(seed))
        for seed, heads in enumerate((8, key_heads, key_heads))
    )
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    placed = [sharded(x, "bhnd", "h").requires_grad_() for x in (q, k, v)]
    outs = [tokred.biased_attention(*each, causal=True)[0] for each in (plain, placed)]
    wanted = torch.autograd.grad(outs[0].square().sum(), plain)
    found = torch.autograd.grad(outs[1].square().sum(), placed)
    torch.testing.assert_close(outs[1].full_tensor(), outs[0])
    torch.testing.assert_close([x.full_tensor() for x in found], [*wanted])


def other_placements() -> None:
    """Keys sharded by their tokens, and heads that cannot be cut evenly, are brought together."""
    q, k, v = (torch.randn(3, 6, 8, 16, generator=generator(seed)) for seed in range(3))
    wanted = tokred.biased_attention(q, k, v)[0]
    placed = [distribute_tensor(x, mesh(), [Shard(dim)]) for x, dim in ((q, 1), (k, 2), (v, 3))]
    torch.testing.assert_close(tokred.biased_attention(*placed)[0].full_tensor(), wanted)


def two_dimensions() -> None:
    """Batch and heads over a mesh of two dimensions."""
    grid, (row, column) = mesh(2, 2), divmod(dist.get_rank(), 2)
    inputs = [
        torch.randn(4, heads, 6, 16, generator=generator(seed))
        for seed, heads in enumerate((8, 4, 4))
    ]
    placed = [
        DTensor.from_local(
            x.chunk(2, 0)[row].chunk(2, 1)[column].contiguous(),
            grid,
            [Shard(0), Shard(1)],
            run_check=False,
        )
        for x in inputs
    ]
    out = tokred.biased_attention(*placed)[0]
    assert out.placements == (Shard(0), Shard(1))
    assert_bitwise_equal(out.full_tensor(), tokred.biased_attention(*inputs)[0])


def context_parallel() -> None:
    """Keys over the ranks: attention, votes and choices are those of one device."""
    rank, world = dist.get_rank(), dist.get_world_size()
    q = torch.randn(2, 6, 1, 16, generator=generator(0))
    k, v = (torch.randn(2, 2, 50, 16, generator=generator(seed)) for seed in (1, 2))
    k[:, :, 30] = k[:, :, 3]  # a tie
    bounds = [0, *(5 + 9 * r for r in range(1, world)), 50]
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, : bounds[1]] = False  # the first rank has nothing to see in this row
    own = slice(bounds[rank], bounds[rank + 1])
    wanted, lse = tokred.biased_attention(q, k, v, mask=mask)
    state = tokred.biased_attention(q, k[:, :, own], v[:, :, own], mask=mask[:, own])
    found = tokred.distributed.combine_over_ranks(*state)
    torch.testing.assert_close(found, (wanted, lse))
    assert_bitwise_equal(tokred.distributed.combine_over_ranks(*state), found)
    everyone = [torch.empty_like(found[0]) for _ in range(world)]
    dist.all_gather(everyone, found[0])
    assert_bitwise_equal(everyone, [found[0]] * world)

    votes = tokred.qk_score(q, k, "softmax_vote", mask=mask)
    logits = tokred.qk_score(q, k[:, :, own], mask=mask[:, own])
    own_votes = tokred.distributed.votes_over_ranks(logits, logits.logsumexp(-1))
    torch.testing.assert_close(own_votes, votes[..., own])

    for scores in (tokred.qk_score(q, k, mask=mask), votes):
        for count in (7, 45):
            indices = tokred.topk(scores, count)[1]
            chosen, counts = tokred.distributed.topk_over_ranks(scores[..., own], count)
            for row, mine, number in zip(
                indices.flatten(0, 1), chosen.flatten(0, 1), counts.flatten(), strict=True
            ):
                inside = (row >= own.start) & (row < own.stop)
                wanted_row = (row[inside] - own.start).sort().values
                assert torch.equal(mine[:number], wanted_row), (mine, wanted_row)
                assert (mine[number:] == -1).all()
    mine, everyones = chosen[:, :, None], indices[:, :, None]  # of the votes
    state = tokred.sparse_attention(q, k[:, :, own], v[:, :, own], mine, mask=mask[:, own])
    torch.testing.assert_close(
        tokred.distributed.combine_over_ranks(*state),
        tokred.sparse_attention(q, k, v, everyones, mask=mask),
    )


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip


def tensor_parallel(method: str | None, options: dict, bits: int | None) -> None:
    """A Llama whose heads and MLPs are split, patched: the logits of the whole one."""
    torch.manual_seed(0)
    models = [LlamaForCausalLM(config()).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: styles[kind]() for name, kind in config().base_model_tp_plan.items()}
    parallelize_module(models[1].model, mesh(), plan)
    try:
        tokred.patch(models[1], "snap_kv")
    except ValueError as error:
        assert "use top_k_attention or token_select" in str(error), error
    else:
        raise AssertionError("a method that needs all heads took some of them")
    tokens = torch.randint(64, (2, 24), generator=generator(1))
    unpatched = models[0](tokens).logits
    logits = []
    for model in models:
        model.set_attn_implementation("tokred")
        cache = DynamicCache() if bits is None else tokred.PackedCache(model, bits=bits, window=4)
        if method is not None:
            tokred.apply(model, method, **options)
        held = {cache_keyword(): cache}
        steps = [model(tokens[:, :20], **held).logits]
        steps += [model(tokens[:, i : i + 1], **held).logits for i in range(20, 24)]
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[0] - unpatched).abs().max() > 1e-3 or method is bits


def fully_sharded() -> None:
    """Weights that are gathered while a layer runs leave all heads in one process: as without."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    tokens = torch.randint(64, (2, 24), generator=generator(1))
    options = {"k": 6, "n_init": 2, "n_local": 3, "prefill": "select", "chunk": 3}
    logits = []
    for shard in (False, True):
        if shard:
            fully_shard(model, mesh=mesh())
        with tokred.patch(model, "snap_kv"):
            pass  # which needs all heads in one process
        with tokred.patch(model, "token_select", **options):
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0])


def checks(world: int) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for op in RULES if world == 2 else ("qk_score", "topk", "kv_pack", "merge"):
        letters = "".join(Rule.of(op).arguments.values())
        for letter in "bh":
            if letter in letters.replace("*", "b"):
                found[f"{op} over {letter}"] = partial(op_over, op, letter)
    votes = {"k": 6, "n_init": 2, "n_local": 3}
    found |= {
        "gradients": partial(gradients, 4),
        "gradients, one head of keys": partial(gradients, 1),
        "other placements": other_placements,
        "context parallel": context_parallel,
        "tensor parallel, token_select": partial(tensor_parallel, "token_select", votes, None),
    }
    if world == 4:
        return found | {"two dimensions": two_dimensions}
    return found | {
        "refusals": refusals_say_why,
        "fully sharded": fully_sharded,
        "tensor parallel": partial(tensor_parallel, None, {}, None),
        "tensor parallel, packed": partial(tensor_parallel, None, {}, 4),
        "tensor parallel, top_k_attention": partial(
            tensor_parallel, "top_k_attention", {"k": 6}, None
        ),
    }


def run(rank: int, world: int, store: str) -> None:
    """One rank: every check, in the same order on all."""
    # A rank that hangs says where, and ends: after ten times what a busy machine needs.
    faulthandler.dump_traceback_later(100, exit=True)
    wait = timedelta(seconds=60)
    where = f"file://{store}"
    dist.init_process_group("gloo", where, timeout=wait, rank=rank, world_size=world)
    failed = False
    with torch.inference_mode(False):
        for name, check in checks(world).items():
            try:
                with torch.set_grad_enabled(name.startswith("gradients")):
                    check()
            except Exception:
                failed = True
                print(f"{name}, {world} processes, rank {rank}:\n{traceback.format_exc()}")
                break  # the others may be waiting for this one: they end with it
    sys.stdout.flush()
    os._exit(failed)


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(world):
                child = os.fork()
                if child == 0:
                    run(rank, world, f"{folder}/store")
                children.append(child)
            for child in children:
                failed |= os.waitpid(child, 0)[1]
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
