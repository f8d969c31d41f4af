"""Methods in decoders however a forward pass runs: what one leaves behind, no other reads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import generated, left_padded, selectors, tiny_lm, transformers
from tokred.compat import cache_keyword

pytestmark = pytest.mark.usefixtures("one_thread")

CACHE = cache_keyword()
LAYERS = 4
METHODS: dict[str, dict[str, Any]] = selectors(LAYERS, 9, 3)
METHODS["tidal_decode"] |= dict(sparse_layer_start=1, correction_layer=3)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model = tiny_lm("Llama", num_hidden_layers=LAYERS)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def patch(name: str, llama: nn.Module) -> Callable[[], Any]:
    return lambda: tokred.patch(llama, name, **METHODS[name])


def prompt(length: int = 13, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def steps(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    """The logits of a prompt and of three tokens behind it."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    parts = [model(ids[:, :-3], **{CACHE: cache}).logits]
    parts += [model(ids[:, i, None], **{CACHE: cache}).logits for i in range(-3, 0)]
    return torch.cat(parts, 1)


def test_threads_share_a_model(llama: nn.Module, patch: Callable[[], Any]) -> None:
    prompts = [prompt(20 + 3 * i, i) for i in range(4)]

    def text(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return generated(llama, ids, None, max_new_tokens=8, min_new_tokens=8)

    with patch(), ThreadPoolExecutor(4) as pool:
        alone = [text(ids) for ids in prompts]
        for expected, actual in zip(alone, pool.map(text, prompts), strict=True):
            assert torch.equal(actual, expected)


def test_a_pass_inside_a_pass(llama: nn.Module, patch: Callable[[], Any]) -> None:
    """A hook in the middle of the layers runs the same model on something else."""
    other, depth = prompt(9, seed=7), []

    def inner(*_: Any) -> None:
        if not depth:
            depth.append(1)
            steps(llama, other)
            depth.clear()

    with patch(), torch.no_grad():
        expected = steps(llama, prompt())
        handle = llama.model.layers[2].register_forward_pre_hook(inner)
        try:
            assert torch.equal(steps(llama, prompt()), expected)
        finally:
            handle.remove()


def test_a_pass_that_fails_leaves_nothing(llama: nn.Module, patch: Callable[[], Any]) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    with patch(), torch.no_grad():
        expected = steps(llama, prompt())
        handle = llama.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            steps(llama, prompt(seed=3))
        handle.remove()
        assert torch.equal(steps(llama, prompt()), expected)


def test_layers_called_by_hand_carry_nothing(llama: nn.Module) -> None:
    with tokred.patch(llama, "tidal_decode", **METHODS["tidal_decode"]), torch.no_grad():
        cache = transformers.DynamicCache(config=llama.config)
        llama(prompt(), **{CACHE: cache})
        x = torch.randn(1, 1, 72)
        angles = llama.model.rotary_emb(x, torch.tensor([[13]]))
        with pytest.raises(ValueError, match="has not run yet in this forward pass"):
            llama.model.layers[2](x, position_embeddings=angles, **{CACHE: cache})


def test_grad_mode_changes_nothing(llama: nn.Module, patch: Callable[[], Any]) -> None:
    with patch():
        with torch.no_grad():
            expected = steps(llama, prompt())
        actual = steps(llama, prompt())
        assert actual.requires_grad and torch.equal(actual.detach(), expected)
        actual.sum().backward()
        weight = llama.model.layers[0].self_attn.k_proj.weight
        assert weight.grad.abs().sum() > 0
        llama.zero_grad()


@pytest.mark.parametrize("family", ["Llama", "DeepseekV3"])
def test_autocast(family: str, name: str) -> None:
    """DeepSeek's keys stay in float32, beside values in bfloat16."""
    sizes = dict(num_key_value_heads=9, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                 qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=LAYERS)  # fmt: skip
    sizes = sizes if family == "DeepseekV3" else {}
    model = tiny_lm(family, num_hidden_layers=LAYERS, **sizes)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = steps(model, prompt())
        with tokred.patch(model, name, **selectors(LAYERS, 9, 99)[name]):
            everything = steps(model, prompt())
        torch.testing.assert_close(everything, expected, rtol=0.1, atol=0.5)
        if "k" in METHODS[name]:
            with tokred.patch(model, name, **METHODS[name]):
                assert not torch.allclose(steps(model, prompt()), expected, rtol=0.1, atol=0.5)


def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = tiny_lm("Llama", num_hidden_layers=LAYERS).train()
    ids, mask = left_padded()
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        with tokred.patch(model, name, **METHODS[name]):
            model.zero_grad()
            model(ids, attention_mask=mask).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("after", ["left", "replaced"])
def test_a_checkpoint_is_recomputed_under_its_patch_alone(llama: nn.Module, after: str) -> None:
    """Without the method a reentrant checkpoint would give other gradients, unnoticed."""
    model, ids = tiny_lm("Llama", num_hidden_layers=LAYERS).train(), prompt()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    handle = tokred.apply(model, "top_k_attention", k=2)
    loss = model(ids).logits.square().mean()
    if after == "left":
        handle.remove()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside"):
        if after == "left":
            loss.backward()
        else:
            with tokred.patch(model, "top_k_attention", k=3):
                loss.backward()
    assert all(layer.self_attn.q_proj.weight.grad is None for layer in model.model.layers)
    handle.remove()
    model.gradient_checkpointing_disable()
    with tokred.patch(model, "top_k_attention", k=2):
        loss = model(ids).logits.square().mean()
    loss.backward()


@pytest.mark.parametrize("dims", [torch.full((9, 4), 8), torch.zeros(3, 4)], ids=["8", "heads"])
def test_dims_of_other_models_are_refused(llama: nn.Module, dims: Tensor) -> None:
    options = dict(k=3, dims=[dims.to(torch.int32)] * LAYERS)
    with tokred.patch(llama, "fasa", **options), pytest.raises(ValueError, match=r"dims\[0\] must"):
        llama(prompt())


@torch.no_grad()
def test_compact_rotation_of_sequences_in_one_row(llama: nn.Module) -> None:
    """Positions that begin anew say where one ends: each attends to its own keys."""
    ids, first = prompt(16), 6
    apart = [llama(part).logits for part in (ids[:, :first], ids[:, first:])]
    positions = torch.cat([torch.arange(first), torch.arange(16 - first)])[None]
    with tokred.patch(llama, "token_select", k=99, rotation="compact"):
        together = llama(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


def test_compact_rotation_has_gradients(llama: nn.Module) -> None:
    options = dict(k=2, n_init=1, n_local=2, rotation="compact")
    with tokred.patch(llama, "token_select", **options):
        with torch.inference_mode():
            expected = steps(llama, prompt())
        actual = steps(llama, prompt())
    torch.testing.assert_close(actual.detach(), expected.clone(), rtol=1e-4, atol=1e-4)
    actual[:, -1].sum().backward()
    assert llama.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    llama.zero_grad()


@pytest.mark.parametrize("name", ["token_select", "tidal_decode"])
def test_a_static_decode_step_compiles_once(llama: nn.Module, patch: Callable[[], Any]) -> None:
    ids, graphs = prompt(16), []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(1)
        return module.forward

    def run(step: Callable[..., Any]) -> Tensor:
        cache = transformers.StaticCache(config=llama.config, max_cache_len=32)
        llama(ids[:, :8], **{CACHE: cache})
        out = [
            step(ids[:, i, None], position_ids=torch.tensor([[i]]), **{CACHE: cache}).logits
            for i in range(8, 16)
        ]
        return torch.cat(out, 1)

    with patch(), torch.no_grad():
        torch._dynamo.reset()
        expected = run(llama)
        actual = run(torch.compile(llama.forward, backend=backend, fullgraph=True))
    torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
