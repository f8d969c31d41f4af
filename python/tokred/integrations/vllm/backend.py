"""vLLM's interface: the pages' size, what a step's metadata say, and the attention of a layer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from .options import Options
from .pages import Batch, append, attend, pool, sort_requests


def _options() -> Options:
    options = Options.from_environment(os.environ)
    if options is None:
        raise ValueError("TOKRED_VLLM_BITS must be 4 or 8, and it was unset after vLLM had started")
    return options


class PackedAttentionBackend(AttentionBackend):
    """Stands in for CPU_ATTN, whose name vLLM looks it up by."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[PackedAttention]:
        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages of records, of which a token and head has one."""
        nbytes = _options().records(spec.head_size).nbytes
        return replace(spec, dtype=torch.uint8, state_content_bytes=nbytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Slots must be one step apart in all pages; a head's tokens next to each other is best."""
        return KVCacheLayout.LHBNC, KVCacheLayout.LBNHC


@dataclass
class Metadata(AttentionMetadata):
    """One step of the requests of a group of layers."""

    batch: Batch


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Reads the tables of a step once for all layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.options = _options()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        step = common_attn_metadata
        if step.causal is not True:
            raise ValueError(
                "TOKRED_VLLM_BITS serves causal attention, and this model's tokens see later ones: "
                "unset it"
            )
        starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
        block_size = self.kv_cache_spec.block_size
        return Metadata(
            sort_requests(starts, lengths, step.block_table_tensor, block_size, self.options)
        )


class PackedAttention(AttentionImpl[Metadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        others |= {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "kv_cache_dtype": None if kv_cache_dtype == "auto" else kv_cache_dtype,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        if unserved := {name: value for name, value in others.items() if value is not None}:
            raise ValueError(
                "TOKRED_VLLM_BITS packs the keys and values of full causal attention, and a layer "
                f"has {', '.join(sorted(unserved))}: unset it for this model and these arguments"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.options = _options()
        self.records = self.options.records(head_size)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Packs a step's tokens into their pages."""
        tokens = slot_mapping.shape[0]
        pages = pool(kv_cache, self.records)
        append(key[:tokens], value[:tokens], pages, slot_mapping.int())

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes output [T, Hq, D]: 0 for rows of no request, and where vLLM only measures."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("TOKRED_VLLM_BITS leaves the output as it is, and it is to be scaled")
        if attn_metadata is None:
            return output.zero_()
        pages = pool(kv_cache, self.records)
        batch = attn_metadata.batch
        attend(query, key, value, pages, batch, self.options, output, self.scale, self.softcap)
        return output
