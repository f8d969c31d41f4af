"""How every op works on DTensors: which dimensions of its arguments are the batch and the heads.

A rule gives a letter to every dimension of each tensor argument and then of each result: `b` is the
batch, `h` the heads of queries, keys or lists of keys, any other letter a dimension that is not
sharded; a leading `*` stands for any number of dimensions of independent rows. `tokred.distributed`
registers the rules with torch.
"""

from __future__ import annotations

QKV = "q bhld, k bhnd, v bhne"
ATTENTION = f"{QKV}, key_bias bhn, mask bhln"
ATTENTION_GRADS = f"grad_out bhle, grad_lse bhl, {QKV}, key_bias bhn, mask bhln, out bhle, lse bhl"
WRITES = "it writes to its arguments, and torch may pass it copies: call it on local tensors"

RULES: dict[str, str] = {}
REFUSED: dict[str, str] = {}


def sharded(op: str, rule: str) -> None:
    """Adds an op's rule, such as "x bnc, mask bn -> bn"."""
    RULES[op] = rule


def not_sharded(op: str, reason: str) -> None:
    """Adds the reason why an op does not work on DTensors, and what to do instead."""
    REFUSED[op] = reason
