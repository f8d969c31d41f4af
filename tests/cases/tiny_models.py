"""Tiny models of every supported family, and ToMe on them in plain torch as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import torchvision_stub

torchvision_stub.install()
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

from tokred import compat, methods  # noqa: E402
from tokred.methods import Needs  # noqa: E402

TIMM = dict(img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
HF = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8)


def tiny_timm(**options: Any) -> nn.Module:
    return VisionTransformer(**{**TIMM, **options})


def timm_with_everything() -> nn.Module:
    """Every optional part of timm's attention and block."""
    model = tiny_timm(qk_norm=True, scale_attn_norm=True, init_values=0.5, reg_tokens=2)
    for block in model.blocks:
        block.attn.gate = nn.Linear(32, 32)
    return model


def require_dinov2(name: str) -> None:
    """Skips what needs a DINOv2 that the installed transformers does not have."""
    if "Dinov2" in name and not compat.has_flat_dinov2():
        pytest.skip("merging in DINOv2 needs transformers 5.18 or newer")


def tiny_hf(name: str, **options: Any) -> nn.Module:
    require_dinov2(name)
    config = getattr(transformers, f"{name}Config")
    if "Dinov2" not in name:
        options = {"intermediate_size": 64, **options}
    return getattr(transformers, f"{name}Model")(config(**{**HF, **options}))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    num_prefix: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        for parameter in model.parameters():
            # Fresh models attend almost evenly; larger weights make every step matter.
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        return model.eval()


CASES = (
    Case("timm", tiny_timm, 1),
    Case("timm-everything", timm_with_everything, 3),
    Case(
        "timm-avg",
        lambda: tiny_timm(class_token=False, global_pool="avg", fc_norm=True),
        0,
    ),
    Case("timm-map", lambda: tiny_timm(class_token=False, global_pool="map"), 0),
    Case("vit", lambda: tiny_hf("ViT"), 1),
    Case("deit", lambda: tiny_hf("DeiT"), 2),
    Case("dinov2", lambda: tiny_hf("Dinov2", layerscale_value=0.5), 1),
    Case("dinov2-registers", lambda: tiny_hf("Dinov2WithRegisters", num_register_tokens=4), 5),
    Case("siglip", lambda: tiny_hf("SiglipVision"), 0),
    Case("clip", lambda: tiny_hf("CLIPVision"), 1),
)
PATCHES = (48 // 8) ** 2


# Every method that tokred.patch puts into such models, a new one by its own defaults.


def _patched(
    need: Needs, small: dict[str, dict[str, Any]], adapter: str | None = None, **common: Any
) -> dict[str, dict]:
    """name -> options: those of `small`, and what the method has of `common`."""
    found = {}
    for name, method in methods.METHODS.items():
        if method.options is None or need not in method.needs:
            continue
        if adapter is not None and adapter not in method.options.adapters:
            continue
        defaults = method.defaults()
        chosen = {option: value for option, value in common.items() if option in defaults}
        found[name] = chosen | small.get(name, {})
        missing = [o for o, d in defaults.items() if d is MISSING and o not in found[name]]
        assert not missing, f"{name} is not swept: its options {missing} have no default"
    return found


def reducers() -> dict[str, dict[str, Any]]:
    """For vision encoders of 37 tokens; each must merge some of them."""
    small = {
        "tome": dict(r=3),
        "pitome": dict(ratio=0.75),
        "mctf": dict(r=3, min_tokens=1),
        "dymu": dict(threshold=-1.0),
        "tca_condensation": dict(ratio=0.7),
        "faster_vlm": dict(ratio=0.7),
        "hiprune": dict(ratio=0.7),
    }
    return _patched(Needs.VISION_ENCODER, small)


def selectors(layers: int, heads: int, k: int) -> dict[str, dict[str, Any]]:
    """For decoders with so many full-attention layers and query heads, with a budget of k keys."""
    dims = [torch.arange(4, dtype=torch.int32).repeat(heads, 1)] * layers
    small = {
        "token_select": dict(n_init=1, n_local=2),
        "tidal_decode": dict(sparse_layer_start=0),
        "fasa": dict(dims=dims),
    }
    return _patched(Needs.LANGUAGE_MODEL, small, "causal_lm", k=k)


def evictors(budget: int) -> dict[str, dict[str, Any]]:
    """For decoders: the methods that keep fewer keys, with a budget of at least 3 tokens."""
    small = {
        "expected_attention": dict(sinks=1),
        "knorm": dict(skipped=0),
        "streaming_llm": dict(sinks=1),
    }
    windows = dict(window=2, kernel=1)
    found = _patched(Needs.LANGUAGE_MODEL, small, "causal_lm_cache", budget=budget, **windows)
    return {name: options for name, options in found.items() if "budget" in options}


def tokens_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """The tokens after the last norm that the model applies to all of them."""
    if isinstance(model, VisionTransformer):
        return model.forward_features(pixels)
    return model(pixels).last_hidden_state


def pooled_of(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.pooler_output


def attributes(model: nn.Module) -> list[tuple]:
    """Everything that a patch could leave behind."""
    return [
        (
            sorted(module.__dict__),
            module.forward,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            type(module),
        )
        for module in model.modules()
    ]


# ToMe in plain torch, with a scatter per layer, on the parts of the model.


def tome_layer(x: Tensor, keys: Tensor, size: Tensor, r: int, num_prefix: int) -> tuple:
    """(x, size, map) after merging r tokens by keys [B, H, N, D]; every loop spelt out."""
    metric = nn.functional.normalize(keys.mean(1), dim=-1)
    outputs = []
    for item in range(x.shape[0]):
        count = x.shape[1]
        even = [i for i in range(num_prefix, count) if i % 2 == 0]
        odd = [i for i in range(num_prefix, count) if i % 2 == 1]
        best, partner = (metric[item, even] @ metric[item, odd].T).max(1)
        ranked = sorted(range(len(even)), key=lambda i: -best[i].item())
        leaving, staying = ranked[:r], ranked[r:]
        if num_prefix:
            staying = sorted(staying)
        slots = list(range(num_prefix)) + [even[i] for i in staying] + odd
        where = {token: slot for slot, token in enumerate(slots)}
        for i in leaving:
            where[even[i]] = where[odd[partner[i]]]
        token_map = torch.tensor([where[token] for token in range(count)])
        total = torch.zeros(len(slots)).index_add(0, token_map, size[item])
        weighted = torch.zeros(len(slots), x.shape[2])
        weighted = weighted.index_add(0, token_map, x[item] * size[item, :, None])
        outputs.append((weighted / total[:, None], total, token_map))
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor, prop_attn: bool) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if prop_attn:
        logits = logits + size.log()[:, None, None]
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(projected: Tensor, count: int) -> Tensor:
    return projected.unflatten(-1, (count, -1)).transpose(1, 2)


def timm_attention(block: Block, x: Tensor, size: Tensor, prop_attn: bool) -> tuple:
    attn = block.attn
    normed = block.norm1(x)
    q, k, v = (heads(part, attn.num_heads) for part in attn.qkv(normed).chunk(3, -1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = attn.norm(attend(q, k, v, size, prop_attn))
    if attn.gate is not None:
        out = out * attn.gate(normed).sigmoid()
    return x + block.ls1(attn.proj(out)), k


def hf_attention(layer: nn.Module, x: Tensor, size: Tensor, prop_attn: bool) -> tuple:
    attn = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    norm = next(
        getattr(layer, n) for n in ("layernorm_before", "norm1", "layer_norm1") if hasattr(layer, n)
    )
    normed = norm(x)
    q, k, v = (heads(getattr(attn, f"{n}_proj")(normed), 2) for n in "qkv")
    project = attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj
    scale = getattr(layer, "layer_scale1", nn.Identity())
    return x + scale(project(attend(q, k, v, size, prop_attn))), k


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    norm = next(
        getattr(layer, n) for n in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, n)
    )
    scale = getattr(layer, "ls2", getattr(layer, "layer_scale2", nn.Identity()))
    return x + scale(layer.mlp(norm(x)))


def transcribed(
    model: nn.Module, pixels: Tensor, amounts: list[int], num_prefix: int, prop_attn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens before the final norm, sizes, composed map) of ToMe on the model's layers."""
    captured = {}
    layers = [m for m in model.modules() if is_layer(m)]
    handle = layers[0].register_forward_pre_hook(lambda module, args: captured.update(x=args[0]))
    tokens_of(model, pixels)
    handle.remove()
    x = captured["x"]
    size = torch.ones(x.shape[:2])
    source = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    attention = timm_attention if isinstance(model, VisionTransformer) else hf_attention
    for layer, r in zip(layers, amounts, strict=True):
        x, keys = attention(layer, x, size, prop_attn)
        if r:
            x, size, token_map = tome_layer(x, keys, size, r, num_prefix)
            source = token_map.gather(1, source)
        x = feed_forward(layer, x)
    return x, size, source


def is_layer(module: nn.Module) -> bool:
    named = type(module).__name__.endswith("Layer") and hasattr(module, "mlp")
    return named or isinstance(module, Block)


def final_norm(model: nn.Module, x: Tensor) -> Tensor:
    names = ("norm", "layernorm", "post_layernorm")
    norm = next(getattr(model, n) for n in names if hasattr(model, n))
    return x if isinstance(model, transformers.CLIPVisionModel) else norm(x)


# Language models.

LM = dict(vocab_size=97, hidden_size=72, intermediate_size=96, num_hidden_layers=2)
LM_HEADS = dict(num_attention_heads=9, num_key_value_heads=3, head_dim=8)
DSA = dict(
    moe_intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    index_topk=4,
    index_n_heads=2,
    index_head_dim=16,
)


def tiny_lm(name: str, **options: Any) -> nn.Module:
    """A random language model of transformers, whose weights make every step matter."""
    config = getattr(transformers, f"{name}Config")
    heads_of = DSA if name in ("DeepseekV32", "GlmMoeDsa") else LM_HEADS
    torch.manual_seed(0)
    kind = name.removesuffix("Text")
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**{**LM, **heads_of, **options}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_bart() -> nn.Module:
    """An encoder-decoder of two layers each, with weights that tell tokens apart."""
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    config = transformers.BartConfig(vocab_size=97, d_model=64, max_position_embeddings=64, **sizes)
    model = transformers.BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def left_padded(batch: int = 2, length: int = 13, padding: int = 4) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [batch, length]; the last row starts with padding."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return ids, mask


def generated(model: nn.Module, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Five tokens of greedy decoding."""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)
