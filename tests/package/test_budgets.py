"""The budgets at which the gallery and the comparison run their methods."""

from __future__ import annotations

from typing import Any

import pytest

from cases import torchvision_stub

torchvision_stub.install()
for needed in ("transformers", "skimage", "rich"):
    pytest.importorskip(needed)

from tokred.evaluation import budgets  # noqa: E402
from tokred.methods import get  # noqa: E402


def test_every_reducer_leaves_the_same_share() -> None:
    """All that DINOv2 can run: as many tokens go, or the same share in each layer that reduces."""
    found = {method.name: method for method in budgets.reducers((), "")}
    assert {"tome", "pitome", "evad", "ats", "zero_tprune"} <= {*found}
    assert not {"dymu", "dtem", "pyra", "tomesd"} & {*found}
    r = budgets.options_at(found["tome"], 12, 100, 0.25)["r"]
    assert len(r) == 12 and sum(r) == 75 and max(r) - min(r) <= 1
    for name in ("pitome", "evad", "faster_vlm"):
        options = found[name].options(**budgets.options_at(found[name], 12, 100, 0.25))
        assert options.ratio ** len(options.layers(12)) == pytest.approx(0.25)
    assert budgets.options_at(found["evad"], 12, 100, 1.0) == {"ratio": 1.0}
    assert budgets.options_at(found["hiprune"], 12, 1369, 0.5) == {"ratio": 0.5}  # one layer drops


def test_some_reducers() -> None:
    assert [m.name for m in budgets.reducers(["evad", "tome"], "")] == ["tome", "evad"]
    with pytest.raises(ValueError, match=r"--methods must be some of .*got nonsense"):
        budgets.reducers(["nonsense"], "--methods")


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_a_ratio_is_fitted_to_the_tokens_left(power: float) -> None:
    """The ratio of a method that leaves more or fewer tokens than its ratio says."""
    calls = []

    def tokens_left(options: dict[str, Any]) -> int:
        calls.append(options["ratio"])
        return round(1000 * options["ratio"] ** power)

    options = budgets.fitted(get("evad"), 12, {"ratio": 0.7}, 343, tokens_left)
    assert abs(tokens_left(options) - 343) <= 11
    assert len(calls) <= 9


def test_an_amount_of_tokens_is_not_fitted() -> None:
    for options in ({"r": [1, 2]}, {"ratio": 1.0}):
        assert budgets.fitted(get("evad"), 12, options, 5, pytest.fail) is options
