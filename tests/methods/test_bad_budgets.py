"""Every function that chooses or merges to so many tokens refuses other budgets by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch

import tokred.methods
from tokred.methods.expediting_vit import Clustered

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("k", "keep", "count", "budget", "num_chosen")
X, SCORES, MAPS = torch.rand(2, 16, 8), torch.rand(2, 16), torch.rand(2, 3, 16)
HEADS, MASK = torch.rand(2, 3, 16, 8), torch.ones(2, 16, dtype=torch.bool)
CROPS, LABELS = torch.rand(2, 5, 16), torch.zeros(2, 16, dtype=torch.int32)
GRIDS = (4, 4), (2, 2)

# What each is called with beside its budget.
CALLS: dict[str, dict[str, Any]] = {
    "ada_kv.head_budgets": {"scores": MAPS},
    "adapt_infer.adapt_infer": {"scores": SCORES},
    "aim.merge_to": {"x": X},
    "aot.choose_anchors": {
        "local_attention": SCORES,
        "global_attention": SCORES,
        "grid": (4, 4),
        "window": 2,
    },
    "asap.prune_steps": {"surprisal": SCORES, "lengths": LABELS + 1},
    "atp_llava.atp_llava": {
        "redundancy": SCORES,
        "spatial": SCORES,
        "attention_threshold": 0.5,
        "spatial_threshold": 0.5,
    },
    "ats.ats_keep": {"scores": SCORES},
    "attention_debiasing.select_tokens": {"attention": MAPS},
    "catp.select_tokens": {"x": X, "relevance": SCORES},
    "core_matching.select_tokens": {"scores": SCORES},
    "covipal.attention_target": {"q": HEADS, "k": HEADS, "text": MASK, "visual": MASK},
    "covipal.covipal": {"scores": SCORES},
    "dart.select_tokens": {"x": X, "norms": SCORES},
    "dhsa.dhsa_indices": {"q": HEADS, "k": HEADS},
    "divprune.select_tokens": {"x": X},
    "dtem.soft_choice": {"score": torch.rand(2, 8, 8)},
    "efficient_vla.layers_to_drop": {"importance": SCORES[0]},
    "efficient_vla.select": {"x": X, "scores": SCORES, "num_key": 1},
    "ems.ems": {"k": HEADS, "v": HEADS, "scores": MAPS, "num_merged": 2, "window": 2},
    "evit.evit_map": {"scores": SCORES},
    "expediting_vit.reconstruct": {
        "deep": X[:, :4],
        "clustered": Clustered(X[:, :4], X, LABELS),
    },
    "explain_compressor.explain_compressor": {"scores": SCORES},
    "faster_vlm.select_tokens": {"attention": MAPS},
    "flash_vlm.select_tokens": {"x": X, "scores": SCORES},
    "flashvid.diverse_tokens": {"x": X, "attention": SCORES},
    "hiprune.select_tokens": {"middle": MAPS, "deep": MAPS, "grid": GRIDS[0]},
    "hired.crop_budgets": {"early": SCORES, "grid": GRIDS[0], "tiling": GRIDS[1]},
    "hired.select_tokens": {
        "early": SCORES,
        "deep": CROPS,
        "grid": GRIDS[0],
        "tiling": GRIDS[1],
    },
    "holov.select_tokens": {"x": X, "attention": SCORES},
    "idpruner.select_tokens": {"x": X, "scores": SCORES},
    "ktv.keyframes": {"features": X},
    "lvlm_csp.by_class_attention": {"attention": SCORES},
    "lvlm_csp.by_instances": {"instance": LABELS},
    "lvlm_csp.prune": {"scores": SCORES},
    "lvlm_csp.uniform": {"batch": 2, "tokens": 16},
    "ppe.compress": {"x": X, "positions": torch.zeros(2, 3, 16), "ratio": 0.5},
    "ppe.last_members": {"assignment": LABELS, "clusters": 4},
    "pyramid_drop.pyramid_drop": {"scores": SCORES},
    "pyramid_kv.layer_budget": {"layer": 0, "num_layers": 2, "window": 1, "tokens": 16},
    "quota.frame_grid": {},
    "quota.resize_frame": {"x": X, "grid": GRIDS[0]},
    "scope.select_tokens": {"x": X, "attention": SCORES},
    "sparse_vlm.sparse_vlm": {"scores": SCORES},
    "still.hybrid_attention": {
        "q": HEADS,
        "k": HEADS,
        "v": HEADS,
        "features_q": HEADS,
        "features_k": HEADS,
        "chunk": 4,
    },
    "still.salient_tokens": {"scores": MAPS, "chunk": 4},
    "todre.select_tokens": {"x": X},
    "token_correlation.select_tokens": {"keys": X, "late": MAPS, "early": MAPS},
    "trans_prune.trans_prune": {"variation": SCORES, "attention": SCORES},
    "ts_llava.even_positions": {"total": 16},
    "ts_llava.sample_tokens": {"x": torch.rand(2, 3, 16, 8)},
    "ttf_vla.recompute": {"difference": SCORES},
    "vispruner.select_tokens": {"x": X, "attention": SCORES},
    "vtc_cls.select_tokens": {"scores": SCORES},
    "xtr.retrieve": {"query": X, "tokens": X[0]},
    "zero_tprune.zero_tprune_plan": {"ranks": SCORES, "keys": X},
    "zoo_prune.select_tokens": {"x": X, "sensitive": SCORES},
}


def functions() -> Iterator[tuple[str, FunctionType, str]]:
    """(file.function, itself, its argument) of the public ones that take a number of tokens."""
    for info in pkgutil.iter_modules(tokred.methods.__path__):
        module = importlib.import_module(f"tokred.methods.{info.name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if not own or "_" in (info.name[0], name[0]):
                continue
            for argument, parameter in inspect.signature(function).parameters.items():
                if argument in NAMES and str(parameter.annotation).startswith("int"):
                    yield f"{info.name}.{name}", function, argument


FOUND = {name: (function, argument) for name, function, argument in functions()}


def test_all_are_here() -> None:
    assert sorted(CALLS) == sorted(FOUND)


@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str) -> None:
    function, argument = FOUND[name]
    call: Callable[[Any], Any] = lambda budget: function(**CALLS[name], **{argument: budget})  # noqa: E731
    call(2)
    annotation = str(inspect.signature(function).parameters[argument].annotation)
    for budget in (2.5, True, "3", -1) + (() if "None" in annotation else (None,)):
        with pytest.raises((ValueError, TypeError), match=rf"^{argument} must be .*, got"):
            call(budget)
    if "Tensor" in annotation:
        with pytest.raises(ValueError, match=rf"^{argument} must be .*, got"):
            call(torch.tensor([2.5, 1.5]))
