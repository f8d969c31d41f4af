"""What environment variables say of packed pages in vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from tokred.ops.kv_pack import PackFormat, Records

_PREFIX = "TOKRED_VLLM_"
_MINIMUM = {"BITS": 4, "TOP_K": 1, "N_INIT": 0, "N_LOCAL": 1}


@dataclass(frozen=True)
class Options:
    """How pages are packed, and which tokens a decoding query reads.

    bits: 4 or 8, of keys and values.
    top_k: tokens that the heads vote for at a decoding step, None for all; n_init, n_local: first
        and last tokens, read in any case. As `tokred.patch(model, "token_select", k=top_k)`.
    """

    bits: int
    top_k: int | None = None
    n_init: int = 128
    n_local: int = 512

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Options | None:
        """TOKRED_VLLM_BITS, _TOP_K, _N_INIT and _N_LOCAL; None where none of them is set.

        Raises:
            ValueError: naming the variable that is unknown, no number or out of range.
        """
        given = {
            name.removeprefix(_PREFIX): text
            for name, text in environment.items()
            if name.startswith(_PREFIX)
        }
        for name in given:
            if name not in _MINIMUM:
                close = get_close_matches(name, _MINIMUM, 1)
                known = [_PREFIX + each for each in close or _MINIMUM]
                raise ValueError(f"unknown variable {_PREFIX}{name}: did you mean one of {known}?")
        numbers = {name.lower(): _number(name, text) for name, text in given.items()}
        if not numbers:
            return None
        if "bits" not in numbers:
            raise ValueError(f"{_PREFIX}{min(given)} needs {_PREFIX}BITS, 4 or 8, which is not set")
        if "top_k" not in numbers and len(numbers) > 1:
            alone = max(name for name in given if name != "BITS")
            raise ValueError(f"{_PREFIX}{alone} needs {_PREFIX}TOP_K, which is not set")
        return cls(**numbers)

    def records(self, head_dim: int) -> Records:
        """The bytes of a token and head: packed as PackedCache packs them, with no window.

        Raises:
            ValueError: a head_dim that cannot be packed.
        """
        if head_dim % 16 != 0 or not 0 < head_dim <= 256:
            raise ValueError(
                "TOKRED_VLLM_BITS packs heads whose dimension is a multiple of 16 up to 256, got "
                f"{head_dim}: unset it for this model"
            )
        form = PackFormat(self.bits, math.gcd(head_dim, 64), rotated=True)
        return Records(form, form, head_dim, head_dim)


def _number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{_PREFIX}{name} must be a whole number, got {text!r}") from None
    if name == "BITS" and number not in (4, 8):
        raise ValueError(f"{_PREFIX}BITS must be 4 or 8, got {number}")
    if number < _MINIMUM[name]:
        raise ValueError(f"{_PREFIX}{name} must be at least {_MINIMUM[name]}, got {number}")
    return number
