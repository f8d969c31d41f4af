"""The README's one table: what whole models gain, and what the ops do, beside the best peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .demo_tables import Report
from .harness import Row
from .published import load_report, load_rows
from .tables import caption, duration, fastest, groups, table

GOOD_COSINE = 0.99
# Cases of the quick run, each with the candidate of ours that stands for it.
OPS: dict[tuple[str, str, str], str] = {
    ("decode", "dense", "bfloat16"): "one token against 131072 bf16 keys, all of them",
    ("decode", "step", "bfloat16"): "the same, the best 2048 by token scores",
    ("packed", "step", "bfloat16"): "the same, chosen and read in 4 bits",
    ("topk", "topk", "float32"): "`topk`: 2048 of 8 × 131072",
    ("match", "match", "float32"): "`match`: 64 × 577 tokens",
    ("merge", "merge_wavg", "float32"): "`merge`: 64 × 577 tokens of 768 channels",
    ("block_sparse", "causal 128x128 at 25%", "float32"): "a quarter of the blocks, 8192 tokens",
    ("sparse_attn", "backward", "float32"): "gradient of attention with a bias, 1370 tokens",
    ("score", "rows", "float32"): "`attention_rows` of 32 queries, 8192 keys",
}
CHOSEN = {
    ("decode", "step"): "tokred step, token scores",
    ("packed", "step"): "tokred step, 4 bits, apart",
    ("merge", "merge_wavg"): "tokred.merge",
}


def image_lines(report: Report) -> Iterator[list[str]]:
    """The fastest r of each size that keeps the class token."""
    rows = [row for row in report["rows"] if row["cls_cosine"] >= GOOD_COSINE]
    for size in sorted({row["image_size"] for row in rows}, reverse=True):
        best = max((row for row in rows if row["image_size"] == size), key=lambda r: r["speed_up"])
        yield [
            f"DINOv2 ViT-S/14, {size} px, ToMe r = {best['r']}",
            f"SDPA, {best['ms_unpatched']:.0f} ms",
            f"{best['ms_merged']:.0f} ms",
            f"**{best['speed_up']:.2f}×**",
            f"CLS cosine {best['cls_cosine']:.4f}",
        ]


def decode_lines(report: Report, quality: dict[str, str]) -> Iterator[list[str]]:
    """Ours at the longest context; `quality` by method."""
    longest = max(row["context"] for row in report["speed"])
    here = [row for row in report["speed"] if row["context"] == longest]
    peer = min((row for row in here if row["is_peer"]), key=lambda row: row["milliseconds"])
    for row in here:
        if row["method"] in quality:
            yield [
                f"SmolLM2-135M, a token at {longest}: {row['method']}",
                f"{peer['method']}, {peer['milliseconds']:.0f} ms",
                f"{row['milliseconds']:.0f} ms",
                f"**{row['speed_up']:.2f}×**",
                quality[row["method"]],
            ]


def text_quality(report: Report) -> dict[str, str]:
    keys = report["plan"]["decode_keys"]
    known = {f"{row['method']}, k = {keys}": f"perplexity × {row['to_dense']:.3f}"
             for row in report["perplexity"] if row["keys"] == keys}  # fmt: skip
    return {row["method"]: known.get(row["method"], "")
            for row in report["speed"] if not row["is_peer"]}  # fmt: skip


def cache_quality(report: Report) -> dict[str, str]:
    return {f"{row['bits']} bits": f"perplexity × {row['to_dense']:.3f}"
            for row in report["perplexity"] if row["variant"] == "default"}  # fmt: skip


def op_lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    first = {}
    for group in groups(rows):
        first.setdefault((group[0].bench, group[0].case, group[0].dtype), group)
    for key, text in OPS.items():
        group = first.get(key, [])
        peer, ours = fastest(group, "peer"), fastest(group, "ours")
        if name := CHOSEN.get(key[:2]):
            ours = next((row for row in group if row.candidate == name), None)
        if peer and ours:
            yield [text, f"{peer.candidate}, {duration(peer.median_us)}", duration(ours.median_us),
                   f"**{ours.ratio_to_best_peer:.2f}×**", ""]  # fmt: skip


def newest(results: Path) -> list[Row]:
    """The rows of the machine that was measured last, on its CPU; of a day's, the last by name."""
    files = [[row for row in load_rows(path) if row.device == "cpu"]
             for path in sorted(results.glob("*-quick.jsonl"), reverse=True)]  # fmt: skip
    return max(files, key=lambda rows: max((row.date for row in rows), default=""), default=[])


def headline(results: Path) -> str:
    lines: list[list[str]] = []
    for name, of in (
        ("demo", image_lines),
        ("text", lambda report: decode_lines(report, text_quality(report))),
        ("text_cache", lambda report: decode_lines(report, cache_quality(report))),
    ):
        report = load_report(results / f"{name}.json")
        lines += of(report) if report else []
    rows = newest(results)
    lines += op_lines(rows)
    if not lines:
        return "*Not measured yet: `make demo` and `make bench`.*\n"
    header = ["what", "best peer", "tokred", "speed-up", "fidelity"]
    under = f"\n\n{caption(rows[0])}" if rows else ""
    return f"{table(header, lines)}{under}\n"
