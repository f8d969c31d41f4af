"""Forward passes of patched encoders: run again in backward, in threads, inside one another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokred
from cases.tiny_models import CASES, Case, is_layer, pooled_of
from tokred import compat

NAMES = ("timm-everything", "timm-map", "vit", "dinov2-registers", "siglip")
AMOUNTS = [5, 0, 4]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return named(request.param)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def images(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Gradients of all weights that have one; by backward(), which reentrant checkpoints need."""
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def checkpointed_layers(model: nn.Module, layers: list[nn.Module], reentrant: bool) -> Callable:
    """Makes every layer run inside a checkpoint; returns what takes it back."""
    for layer in layers:
        # A class of its own, as torch looks __call__ up in the class.
        plain = type(layer)

        def call(self: nn.Module, x: Tensor, *args, plain=plain, **kwargs) -> Tensor:
            run = partial(plain.__call__, self, **kwargs)
            return checkpoint(run, x, *args, use_reentrant=reentrant)

        layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})

    def undo() -> None:
        for layer in layers:
            layer.__class__ = type(layer).__mro__[1]

    return undo


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("prop_attn", [True, False])
def test_built_in_checkpointing(case: Case, prop_attn: bool) -> None:
    """The library's own switch gives the gradients of a pass that keeps everything."""
    model, pixels = case.model().train(), images(1)
    options = dict(r=AMOUNTS, prop_attn=prop_attn)
    with tokred.patch(model, "tome", **options) as handle:
        expected = gradients(model, lambda: pooled_of(model, pixels))
        counts = handle.counts
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        else:
            model.gradient_checkpointing_enable()
        close(gradients(model, lambda: pooled_of(model, pixels)), expected)
        assert handle.counts == counts


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["timm", "clip"])
def test_checkpointing_of_two_passes(name: str, reentrant: bool) -> None:
    """Layers run again find their own pass, also where a later one has other sizes and tokens."""
    model = named(name).model()
    layers = [module for module in model.modules() if is_layer(module)]
    batches = images(1).requires_grad_(), images(2, batch=3).requires_grad_()

    def both() -> Tensor:
        return torch.cat([pooled_of(model, pixels) for pixels in batches])

    with tokred.patch(model, "tome", r=AMOUNTS):
        expected = gradients(model, both)
        undo = checkpointed_layers(model, layers, reentrant)
        close(gradients(model, both), expected)
        undo()


def test_the_whole_model_in_a_checkpoint(case: Case) -> None:
    model, pixels = case.model(), images(1)
    with tokred.patch(model, "pitome", ratio=0.8):
        expected = gradients(model, lambda: pooled_of(model, pixels))
        run = partial(checkpoint, partial(pooled_of, model), pixels, use_reentrant=False)
        close(gradients(model, run), expected)


@pytest.mark.parametrize("part", ["attn", "offloaded"])
def test_what_cannot_be_run_again_is_refused(part: str) -> None:
    """An attention apart from its layer; a layer whose input lies elsewhere meanwhile."""
    model, pixels = named("timm").model(), images(1)
    layers = [block.attn for block in model.blocks] if part == "attn" else list(model.blocks)
    with tokred.patch(model, "tome", r=AMOUNTS):
        undo = checkpointed_layers(model, layers, reentrant=False)
        moved = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
        with moved if part == "offloaded" else torch.enable_grad():
            loss = model(pixels).sum()
        with pytest.raises(RuntimeError, match="checkpoint whole layers or the whole"):
            loss.backward()
        undo()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_after_the_patch_was_left_is_refused(reentrant: bool) -> None:
    model = named("vit").model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with tokred.patch(model, "tome", r=AMOUNTS):
        loss = pooled_of(model, images(1).requires_grad_()).sum()
    with pytest.raises(RuntimeError):
        loss.backward()


@torch.no_grad()
def test_threads_share_one_model(case: Case) -> None:
    model = case.model()
    batches = [images(seed, batch=1 + seed % 3) for seed in range(12)]
    with tokred.patch(model, "tome", r=AMOUNTS, trace_source=True) as handle:

        def run(pixels: Tensor) -> tuple[Tensor, Tensor, tuple]:
            output = pooled_of(model, pixels)
            return output, handle.token_map, handle.counts

        alone = [run(pixels) for pixels in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, batches))
        for (output, token_map, counts), theirs in zip(alone, together, strict=True):
            assert torch.equal(output, theirs[0])
            assert torch.equal(token_map, theirs[1])
            assert counts == theirs[2]


@torch.no_grad()
def test_what_the_handle_shows() -> None:
    """The thread's own latest complete pass, or the latest of all."""
    model = named("timm").model()
    with tokred.patch(model, "tome", r=4) as handle, ThreadPoolExecutor(1) as other:
        other.submit(model, images(1, batch=3)).result()
        assert handle.size.shape == (3, 25)
        model(images(1, batch=1))
        other.submit(model, images(1, batch=2)).result()
        assert handle.size.shape == (1, 25)
        stop = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(2, batch=5))
        stop.remove()
        assert handle.size.shape == (1, 25)
        assert torch.equal(model(images(1, batch=1)), model(images(1, batch=1)))


@torch.no_grad()
def test_a_pass_inside_a_pass(case: Case) -> None:
    model, pixels = case.model(), images(1)
    second = [module for module in model.modules() if is_layer(module)][1]
    inner, running = [], []

    def run_inside(*_) -> None:
        if not running:
            running.append(True)
            inner.append(pooled_of(model, images(2, batch=1)))

    with tokred.patch(model, "tome", r=AMOUNTS):
        expected = pooled_of(model, pixels), pooled_of(model, images(2, batch=1))
        hook = second.register_forward_hook(run_inside)
        assert torch.equal(pooled_of(model, pixels), expected[0])
        assert torch.equal(inner[0], expected[1])
        hook.remove()


def test_layers_out_of_turn() -> None:
    model = named("timm").model()
    tokens = torch.randn(1, 37, 32)
    with tokred.patch(model, "tome", r=4):
        with pytest.raises(RuntimeError, match="layer 1 was run out of order"):
            model.blocks[1](tokens)
        model.blocks[0](tokens)
        with pytest.raises(RuntimeError, match="layer 2 was run out of order"):
            model.blocks[2](tokens)
        model(images(1))


@torch.no_grad()
@pytest.mark.parametrize("by_layer", [False, True])
def test_compiled_once(by_layer: bool) -> None:
    """The whole model, or every layer by itself; the handle shows compiled passes as well."""
    if compat.release("transformers") < (5, 18) and not by_layer:
        pytest.skip("this ViT makes an attention mask while it is traced, which is refused")
    model, graphs = named("vit").model(), []
    torch._dynamo.reset()

    def backend(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module)
        return module.forward

    with tokred.patch(model, "tome", r=4) as handle:
        expected = [(pooled_of(model, images(seed)), handle.size) for seed in range(3)]
        pooled_of(model, images(3, batch=1))
        layers = [module for module in model.modules() if is_layer(module)] if by_layer else [model]
        for layer in layers:
            layer.compile(fullgraph=True, backend=backend)
        for seed, (pooled, size) in enumerate(expected):
            assert torch.equal(pooled_of(model, images(seed)), pooled)
            assert torch.equal(handle.size, size)
    assert len(graphs) <= 4 if by_layer else len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    model, pixels = case.model(), images(1)
    with torch.autocast("cpu", dtype):
        plain = pooled_of(model, pixels)
        with tokred.patch(model, "tome", r=4) as handle:
            merged = pooled_of(model, pixels)
        assert merged.dtype == plain.dtype
        assert merged.isfinite().all()
        assert (handle.size.sum(1) == handle.counts[0]).all()


def test_inference_mode_then_training(case: Case) -> None:
    model, pixels = case.model(), images(1)
    with tokred.patch(model, "tome", r=4):
        with torch.inference_mode():
            expected = pooled_of(model, pixels)
        actual = pooled_of(model, pixels)
        actual.sum().backward()
    torch.testing.assert_close(actual.detach(), expected)


def test_copies_of_a_patched_model_are_refused() -> None:
    model = named("timm").model()
    with tokred.patch(model, "tome", r=4):
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="leave the patch first"):
                make(model)
    assert torch.equal(copy.deepcopy(model)(images(1)), model(images(1)))
