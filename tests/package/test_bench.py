"""The benchmarks' own logic: statistics, sampling order, storage and tables. No timings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.__main__ as command
from bench import ceilings, harness, machine, published, readme_tables, tables
from bench.__main__ import arguments

RUN = machine.Run(
    "cpu",
    "quick",
    "Test CPU AVX2 2-core",
    2,
    {"torch": "2.13.0"},
    "abc1234",
    "2026-01-01",
    0.05,
    cache_bytes=600,
)
ORIGIN = {
    "complete": True,
    "cpu": "Test CPU",
    "threads": 2,
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "python": "3.11",
    "tokred": "0.1.0",
    "revision": "abc1234",
    "date": "2026-01-01",
}


class FakeSampler:
    """Takes the seconds that the callable returns as measured."""

    timer = "perf_counter"

    def __init__(self, call):
        self.call = call
        self.output = self.seconds = call()

    def sample(self) -> float:
        return self.call()


def case(**changes) -> harness.Case:
    return dataclasses.replace(
        harness.Case(
            "match",
            "plan",
            (2, 3, 4),
            "float32",
            lambda: {
                "tokred.x": lambda: 1e-3,
                "torch": lambda: 4e-3,
                "tomesd": lambda: 2e-3,
                "half the work": lambda: 5e-4,
            },
            bytes_moved=1000,
            flops=2000,
            ceiling="gemm_float32",
            floors=("half the work",),
            sampler=FakeSampler,
        ),
        **changes,
    )


def rows(**changes) -> list[harness.Row]:
    return harness.run_case(case(**changes), RUN, {"gemm_float32": 4e6, "copy": 2e6})


def test_percentiles_interpolate():
    assert machine.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert machine.percentiles([7.0, 7.0]) == (7.0, 7.0, 7.0)


def test_turns_are_evenly_spread():
    order = list(harness.turns({"fast": 12, "slow": 3, "also fast": 12}))
    assert Counter(order) == {"fast": 12, "slow": 3, "also fast": 12}
    places = [i for i, name in enumerate(order) if name == "slow"]
    gaps = [b - a for a, b in itertools.pairwise([0, *places])]
    assert max(gaps) <= 2 * min(gaps[1:])
    assert {order[0], order[2], order[4]} >= {"fast", "also fast"}
    assert list(harness.turns({})) == []


def test_compare_alternates_and_takes_medians():
    calls = []
    series = {"a": itertools.cycle([1.0, 2.0, 9.0]), "b": itertools.cycle([3.0])}

    def candidate(name):
        def call() -> float:
            calls.append(name)
            return next(series[name])

        return call

    timings = harness.compare({n: candidate(n) for n in series}, budget_s=0.0, sampler=FakeSampler)
    assert timings["a"].samples == timings["b"].samples == harness.MIN_SLOW_SAMPLES
    assert timings["a"].median_s == 2.0 and timings["b"].median_s == 3.0
    assert timings["a"].p20_s < 2.0 < timings["a"].p80_s
    assert calls[2:] == ["a", "b", "b", "a", "a", "b"]


def test_quotas_fill_the_budget_within_bounds():
    assert harness.quota(1.0, 0.05) == 20
    assert harness.quota(1.0, 1e-6) == harness.MAX_SAMPLES
    assert harness.quota(0.1, 0.2) == harness.MIN_SAMPLES
    assert harness.quota(0.1, 2.0) == harness.MIN_SLOW_SAMPLES


def test_cpu_sampler_repeats_short_calls(monkeypatch):
    """With calls of 10 microseconds, until a sample has 2 milliseconds."""
    calls = []
    clock = SimpleNamespace(perf_counter=lambda: len(calls) * 1e-5)
    monkeypatch.setattr(harness, "time", clock)
    sampler = harness.CpuSampler(lambda: calls.append(None) or len(calls))
    assert sampler.output == 1
    assert sampler.repeats == 300
    before = len(calls)
    assert sampler.sample() == pytest.approx(1e-5)
    assert len(calls) - before == sampler.repeats


def test_rows_relate_to_the_best_peer_and_the_ceiling():
    by_name = {row.candidate: row for row in rows()}
    assert {n: r.role for n, r in by_name.items()} == {
        "tokred.x": "ours",
        "torch": "peer",
        "tomesd": "peer",
        "half the work": "floor",
    }
    ours = by_name["tokred.x"]
    assert ours.ratio_to_best_peer == pytest.approx(2.0)
    assert by_name["tomesd"].ratio_to_best_peer == 1.0
    assert by_name["torch"].ratio_to_best_peer == pytest.approx(0.5)
    assert ours.ceiling_share == pytest.approx(0.5)
    assert rows(ceiling="copy", bytes_moved=1200)[0].ceiling_share == pytest.approx(0.6)
    assert rows(ceiling="unknown")[0].ceiling_share is None


def test_what_fits_the_cache_has_no_share_of_the_memory():
    for moved, residency in (
        (600, "fits L3"),
        (601, "partly in L3"),
        (1199, "partly in L3"),
        (1200, ""),
    ):
        row = rows(ceiling="copy", bytes_moved=moved)[0]
        assert row.residency == residency
        assert (row.ceiling_share is None) == bool(residency)
        assert tables.share(row) == (residency or "60% of copy")
    assert rows(bytes_moved=1)[0].residency == ""  # of arithmetic


def test_no_share_is_above_all():
    row = rows(ceiling="copy", bytes_moved=2001)[0]
    assert row.ceiling_share is None and tables.share(row) == "above copy"
    assert rows(ceiling="copy", bytes_moved=2000)[0].ceiling_share == pytest.approx(1)


def test_the_bound_of_arithmetic_is_the_fastest_way_known():
    for bf16, fma, expected in (
        (1e3, 5e6, "fma_float32"),
        (8e6, 5e6, "gemm_bfloat16"),
        (1e3, 0, "gemm_float32"),
    ):
        rates = {"gemm_float32": 4e6, "gemm_bfloat16": bf16, "fma_float32": fma}
        row = harness.run_case(case(ceiling="gemm_bfloat16"), RUN, rates)[0]
        assert row.ceiling_name == expected
        assert row.ceiling_share == pytest.approx(2e6 / rates[expected])


def test_examine_gives_metrics_and_stops_disagreement():
    measured = rows(examine=lambda outputs: {"torch": {"sum": sum(outputs.values())}})
    assert [r.metrics for r in measured if r.candidate == "torch"] == [{"sum": 7.5e-3}]
    same = {"a": torch.zeros(3), "b": (torch.zeros(3), None)}
    assert harness.agreement(0.0)(same) == {}
    for wrong in (torch.tensor([0.0, 0.2, 0.0]), torch.tensor([0.0, float("nan"), 0.0])):
        with pytest.raises(RuntimeError, match="b differs from a"):
            harness.agreement(0.1)({**same, "b": wrong})


def test_json_lines_round_trip_and_replace(tmp_path):
    path = tmp_path / "machine-quick.jsonl"
    stored = rows()
    harness.store(path, stored)
    assert harness.load(path) == stored
    merge_rows = rows(bench="merge")
    harness.store(path, merge_rows)
    assert harness.load(path) == stored + merge_rows
    renewed = rows(shape=(9, 9, 9))
    harness.store(path, renewed)
    assert harness.load(path) == merge_rows + renewed
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert harness.load(tmp_path / "missing.jsonl") == []


def test_results_are_named_after_machine_and_mode():
    assert RUN.path.name == "test-cpu-avx2-2-core-quick.jsonl"


@pytest.fixture(scope="module")
def measured() -> list[harness.Row]:
    stored = rows() + rows(bench="merge", floors=()) + rows(bench="sparse_attn")
    stored += rows(bench="merge", name="compose", dtype="int32", ceiling="")
    models = [
        dataclasses.replace(
            r, metrics={"r": 8.0, "tokens": 100.0, "cls_cosine": 0.995, "patch_cosine": 0.9}
        )
        for r in rows(bench="models", shape=(4, 3, 224, 224), ceiling="")
    ]
    calls = rows(bench="overhead", name="call", distribution="no_grad", ceiling="")
    steps = rows(bench="cache", name="decode", shape=(1, 8000), ceiling="")
    seconds = [2e-3, 1e-3, 3e-3]
    most = [
        ceilings.row_of(RUN, "read", "tokred._C, avx2", 25_000_000, seconds, 2),
        ceilings.row_of(RUN, "dot_int16", "tokred._C, avx2", 40_000_000, seconds, 2),
    ]
    return stored + models + calls + steps + most


@pytest.fixture
def results(measured, tmp_path) -> Path:
    harness.store(tmp_path / "machine-quick.jsonl", measured)
    return tmp_path


def test_tables_are_filled_once_and_for_all(results, measured):
    measured_here = {row.bench for row in measured}
    names = (*(name for name in tables.TABLES if name in measured_here), "match:full")
    text = "# Title\n" + "".join(
        f"<!-- table:{n} -->\nold\n<!-- /table -->\nprose\n" for n in names
    )
    filled = readme_tables.regenerate(text, results)
    assert readme_tables.regenerate(filled, results) == filled
    assert "old" not in filled and filled.count("prose") == len(names)
    assert filled.count("Not measured yet") == 1
    assert "| 1 ms (1 ms – 1 ms) | tomesd, 2 ms | **2.00×** |" in filled
    assert "50% of gemm float32" in filled and "Test CPU AVX2 2-core, 2 threads" in filled
    # Peers that lose stand in the table of caches, and ceilings are of the best round.
    assert "| torch | 8000 | 4 ms (4 ms – 4 ms) | 0.50× |" in filled
    assert "| read | tokred._C, avx2 | 25 GB/s |" in filled
    assert "| dot int16 | tokred._C, avx2 | 40 Gop/s |" in filled
    for table in filled.split("\n\n"):
        columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(columns) <= 1


def report_of(name: str) -> dict:
    """A demo's report of each kind."""
    speed = [
        {"method": "SDPA, StaticCache", "context": 8000, "milliseconds": 48.0, "speed_up": 1.0,
         "is_peer": True},
        {"method": "SDPA, DynamicCache", "context": 8000, "milliseconds": 480.0, "speed_up": 0.1,
         "is_peer": True},
        {"method": "4 bits", "context": 8000, "milliseconds": 32.0, "speed_up": 1.5,
         "is_peer": False},
    ]  # fmt: skip
    image = {"image_size": 224, "r": 8, "tokens": 161, "ms_unpatched": 50.0, "ms_merged": 40.0,
             "speed_up": 1.25, "cls_cosine": 0.9985, "patch_cosine": 0.99}  # fmt: skip
    return {"origin": ORIGIN} | {
        "demo": {"rows": [image, {**image, "r": 16, "speed_up": 1.5, "cls_cosine": 0.9}]},
        "text": {
            "plan": {"tokens": 1024, "decode_keys": 256},
            "dense_perplexity": 12.0,
            "perplexity": [{"method": "token_select", "keys": 256, "perplexity": 12.12,
                            "to_dense": 1.01}],
            "speed": [*speed[:2], {**speed[2], "method": "token_select, k = 256"}],
        },
        "text_cache": {
            "perplexity": [{"bits": 4, "variant": "default", "to_dense": 1.0123}],
            "memory": [{"bits": 4, "context": 8000, "bytes_per_token": 7000.4,
                        "to_float16": 0.304}],
            "speed": speed,
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize(("table", "name", "lines"), [
    ("demo", "demo", ["| 224 px, r = 8 | 161 | 50 ms | 40 ms | **1.25×** | 0.9985 | 0.9900 |"]),
    ("demo_text", "text", ["| `token_select` | 256 | 12.120 | 1.0100 |",
                           "| SDPA, DynamicCache | 480 ms (0.10×) |",
                           "| token_select, k = 256 (ours) | 32 ms (**1.50×**) |"]),
    ("demo_cache", "text_cache", ["| 4 | 1.0123 |", "| 4 bits | 7000 (0.30×) |",
                                  "| SDPA, StaticCache | 48 ms (1.00×) |",
                                  "| 4 bits (ours) | 32 ms (**1.50×**) |"]),
])  # fmt: skip
def test_demo_tables_hold_what_the_demo_measured(results, table, name, lines):
    text = f"<!-- table:{table} -->\n<!-- /table -->\n"
    assert "Not measured yet: `make demo`" in readme_tables.regenerate(text, results)
    (results / f"{name}.json").write_text(json.dumps(report_of(name)))
    filled = readme_tables.regenerate(text, results)
    for line in (*lines, "Test CPU, 2 threads, torch 2.13.0, transformers 5.24.0, 2026-01-01"):
        assert line in filled


def test_the_headline_is_of_models_and_ops(results, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "Not measured yet" in readme_tables.render("headline", empty)
    for name in ("demo", "text", "text_cache"):
        (results / f"{name}.json").write_text(json.dumps(report_of(name)))
    lost = rows(
        bench="score", name="rows", build=lambda: {"tokred.x": lambda: 4e-3, "torch": lambda: 2e-3}
    )
    harness.store(
        results / "machine-quick.jsonl",
        rows(bench="match", name="match", shape=(64, 577, 64)) + lost,
    )
    filled = readme_tables.render("headline", results)
    for line in (
        "| DINOv2 ViT-S/14, 224 px, ToMe r = 8 | SDPA, 50 ms | 40 ms | **1.25×** "
        "| CLS cosine 0.9985 |",
        "| SmolLM2-135M, a token at 8000: token_select, k = 256 | SDPA, StaticCache, 48 ms | 32 ms "
        "| **1.50×** | perplexity × 1.010 |",
        "| SmolLM2-135M, a token at 8000: 4 bits | SDPA, StaticCache, 48 ms | 32 ms | **1.50×** "
        "| perplexity × 1.012 |",
        "| `match`: 64 × 577 tokens | tomesd, 2 ms | 1 ms | **2.00×** |  |",
        "| `attention_rows` of 32 queries, 8192 keys | torch, 2 ms | 4 ms | **0.50×** |  |",
    ):
        assert line in filled


@pytest.mark.parametrize(("revision", "reason"), [
    ("abc1234-dirty", "with changes that no commit has"), ("unknown", "at an unknown revision"),
])  # fmt: skip
def test_results_of_changed_files_are_not_published(results, revision, reason):
    plot = pytest.importorskip("bench.plot")
    path = results / "machine-quick.jsonl"
    harness.store(path, [dataclasses.replace(r, revision=revision) for r in rows(bench="merge")])
    report = report_of("demo")
    (results / "demo.json").write_text(
        json.dumps({**report, "origin": {**ORIGIN, "revision": revision}})
    )
    for publish in (
        lambda: readme_tables.render("merge", results),
        lambda: readme_tables.render("match", results),  # of the same file
        lambda: readme_tables.render("demo", results),
        lambda: readme_tables.render("headline", results),
        lambda: plot.draw(results),
    ):
        with pytest.raises(SystemExit, match=f"not published.*{reason}"):
            publish()
    assert not list(results.glob("*.png"))


def test_only_whole_demos_are_collected(tmp_path):
    output, results = tmp_path / "output", tmp_path / "results"
    for folder in (output, results):
        folder.mkdir()
    for name in ("text.png", "text_cache.png"):
        (output / name).write_bytes(name.encode())
    quick = {**report_of("text"), "origin": {**ORIGIN, "complete": False}}
    (output / "text.json").write_text(json.dumps(quick))
    (output / "text_cache.json").write_text(json.dumps(report_of("text_cache")))
    published.collect_demo(output, results)
    assert {path.name for path in results.iterdir()} == {"text_cache.json", "text_cache.png"}
    assert published.load_report(results / "text_cache.json") == report_of("text_cache")
    (results / "text.json").write_text(json.dumps(quick))
    with pytest.raises(SystemExit, match="a quick run"):
        readme_tables.render("demo_text", results)
    changed = {**ORIGIN, "revision": "abc1234-dirty"}
    (output / "text.json").write_text(json.dumps({**quick, "origin": changed | {"complete": True}}))
    with pytest.raises(SystemExit, match="not published"):
        published.collect_demo(output, results)


def test_the_pages_are_those_of_the_stored_results():
    for page in readme_tables.pages():
        text = page.read_text()
        assert readme_tables.regenerate(text) == text, f"{page.name}: run make tables"


def test_tables_refuse_an_unknown_name(results):
    with pytest.raises(ValueError, match="table:nothing"):
        readme_tables.regenerate("<!-- table:nothing -->\n<!-- /table -->\n", results)


def test_figures_are_drawn(results):
    pytest.importorskip("matplotlib")
    from bench import plot

    drawn = plot.draw(results)
    assert {p.stem for p in drawn} == {
        f"machine-quick-{bench}" for bench in ("match", "merge", "sparse_attn", "models", "cache")
    }
    assert all(p.stat().st_size > 5000 for p in drawn)


@pytest.mark.parametrize("distribution", ["randn", "correlated", "ties"])
def test_distributions(distribution):
    x = harness.tokens((3, 64, 8), "bfloat16", "cpu", distribution)
    assert x.shape == (3, 64, 8) and x.dtype == torch.bfloat16
    assert torch.equal(x, harness.tokens((3, 64, 8), "bfloat16", "cpu", distribution))
    cosine = torch.nn.functional.cosine_similarity(x[:, ::2].float(), x[:, 1::2].float(), dim=-1)
    assert (cosine.mean() > 0.8) == (distribution == "correlated")
    repeated = len(x[0].float().unique(dim=0)) <= 16
    assert repeated == (distribution == "ties")


def test_unknown_bench_and_distribution_are_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--only", "match,nothing"])
    assert "nothing" in capsys.readouterr().err
    assert arguments([]).mode == "quick" and arguments(["--full"]).mode == "full"
    with pytest.raises(ValueError, match="randn, correlated or ties"):
        harness.tokens((1, 2, 3), "float32", "cpu", "zipf")


def test_a_failed_bench_leaves_the_others(monkeypatch, tmp_path, capsys):
    def run_bench(name, run, rates):
        if name == "merge":
            raise RuntimeError("no such peer")
        return rows(bench=name)

    monkeypatch.setattr(command, "start_run", lambda *options: RUN)
    monkeypatch.setattr(ceilings, "measure", lambda run: ({}, rows(bench="ceilings")))
    monkeypatch.setattr(command, "run_bench", run_bench)
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "match,merge,topk", "--out", str(path)])
    assert command.main() == 1
    assert {row.bench for row in harness.load(path)} == {"ceilings", "match", "topk"}
    printed = capsys.readouterr()
    assert "[2/3] merge" in printed.out and "FAILED: merge" in printed.out
    assert "no such peer" in printed.err


def test_a_busy_machine_is_refused_unless_forced(monkeypatch, capsys):
    monkeypatch.setattr(machine, "busy_share", lambda: 0.5)
    monkeypatch.setattr(machine, "machine_jitter", lambda threads: 2.0)
    with pytest.raises(SystemExit, match="50% of the cores busy, timing jitter 200%"):
        machine.idle_gate(2, patience_s=0)
    assert machine.idle_gate(2, force=True) == 2.0
    assert "WARNING" in capsys.readouterr().out


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows()[0].median_us = 1.0
