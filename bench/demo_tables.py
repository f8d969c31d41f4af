"""The tables of what `make demo` reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tables import table

Report = dict[str, Any]


def caption(report: Report) -> str:
    origin = report["origin"]
    return (
        f"*{origin['cpu']}, {origin['threads']} threads, torch {origin['torch']}, "
        f"transformers {origin['transformers']}, {origin['date']}, {origin['revision']}*"
    )


def images(report: Report) -> list[str]:
    header = ["size, tokens merged a layer", "tokens left", "SDPA", "tokred", "speed-up",
              "CLS cosine", "patch cosine"]  # fmt: skip
    lines = [
        [
            f"{row['image_size']} px, r = {row['r']}",
            str(row["tokens"]),
            f"{row['ms_unpatched']:.0f} ms",
            f"{row['ms_merged']:.0f} ms",
            f"**{row['speed_up']:.2f}×**",
            f"{row['cls_cosine']:.4f}",
            f"{row['patch_cosine']:.4f}",
        ]
        for row in report["rows"]
    ]
    return [table(header, lines)]


def speeds(what: str, rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds a token at each context, and beside them the ratio to the fastest peer's."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        ratio = f"{row['speed_up']:.2f}×"
        ratio = ratio if row["is_peer"] else f"**{ratio}**"
        name = row["method"] if row["is_peer"] else f"{row['method']} (ours)"
        cells.setdefault(name, []).append(f"{row['milliseconds']:.0f} ms ({ratio})")
    header = [f"{what}: a token (to the best dense) at", *(str(context) for context in contexts)]
    return table(header, [[name, *values] for name, values in cells.items()])


def text(report: Report) -> list[str]:
    count = report["plan"]["tokens"]
    quality = [
        ["every key", str(count), f"{report['dense_perplexity']:.3f}", "1"],
        *(
            [f"`{row['method']}`", str(row["keys"]), f"{row['perplexity']:.3f}",
             f"{row['to_dense']:.4f}"]
            for row in report["perplexity"]
        ),
    ]  # fmt: skip
    return [
        table([f"perplexity of {count} tokens", "keys", "perplexity", "to dense"], quality),
        speeds("decoding", report["speed"]),
    ]


def cache(report: Report) -> list[str]:
    ratio = {(row["bits"], row["variant"]): row["to_dense"] for row in report["perplexity"]}
    variants = list(dict.fromkeys(variant for _, variant in ratio))
    quality = [
        [str(bits), *(f"{ratio[bits, variant]:.4f}" for variant in variants)]
        for bits in dict.fromkeys(bits for bits, _ in ratio)
    ]
    contexts = list(dict.fromkeys(str(row["context"]) for row in report["memory"]))
    sizes: dict[str, list[str]] = {}
    for row in report["memory"]:
        cells = sizes.setdefault(f"{row['bits']} bits", [])
        cells.append(f"{row['bytes_per_token']:.0f} ({row['to_float16']:.2f}×)")
    return [
        table(["perplexity to dense, bits", *variants], quality),
        table(["bytes per token (to float16) at", *contexts], [[n, *c] for n, c in sizes.items()]),
        speeds("caches", report["speed"]),
    ]
