"""How every op works on DTensors: which dimensions of its arguments are the batch and the heads.

A rule gives each tensor argument a letter for every dimension, then those of the results: `b` is
the batch, `h` the heads of queries, keys or lists of keys; a leading `*` stands for any number of
dimensions that are rows of their own. `tokred.distributed` hands the rules to torch.
"""

from __future__ import annotations

QKV = "q bhld, k bhnd, v bhne"
ATTENTION = f"{QKV}, key_bias bhn, mask bhln"
ATTENTION_GRADS = f"grad_out bhle, grad_lse bhl, {QKV}, key_bias bhn, mask bhln, out bhle, lse bhl"
WRITES = "it writes to its arguments, and torch may hand it copies: call it on local tensors"

RULES: dict[str, str] = {}
REFUSED: dict[str, str] = {}


def sharded(op: str, rule: str) -> None:
    """States an op's rule, as `"x bnc, mask bn -> bn"`."""
    RULES[op] = rule


def not_sharded(op: str, reason: str) -> None:
    """States why an op does not work on DTensors, and what to do instead."""
    REFUSED[op] = reason
