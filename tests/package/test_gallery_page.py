"""The gallery's page: what it holds; in headless Chromium its slider, boxes and pictures."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cases import torchvision_stub

torchvision_stub.install()
for needed in ("transformers", "skimage", "matplotlib", "rich"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402

from tokred.demo.gallery import Entry  # noqa: E402
from tokred.demo.images import Photograph, photograph_of  # noqa: E402
from tokred.demo.page import DROPPED, Budget, write_page  # noqa: E402

GRID = 4
NAMES = ("tome", "evad")
CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=2000", "--window-size=900,900",
)  # fmt: skip
in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)"
)


def photograph() -> Photograph:
    """The left half red, the right half blue."""
    image = np.zeros((56, 56, 3), np.uint8)
    image[:, :28, 0] = image[:, 28:, 2] = 200
    return photograph_of("a <b>&</b> </script>", image, 56)


def groups(joined: int, dropped: int) -> np.ndarray:
    """The first `joined` patches are one group, and the last `dropped` ones are no longer there."""
    numbers = np.arange(GRID * GRID)
    numbers[:joined] = 0
    numbers[numbers.size - dropped :] = -1
    return numbers.reshape(GRID, GRID)


def budgets() -> list[Budget]:
    def entry(name: str, tokens: int) -> Entry:
        return Entry(name, {}, tokens, 20.0, 10.0, 2.0, 0.9876, 0.8765)

    return [
        Budget(0.25, [(entry("tome", 4), groups(16, 0)), (entry("evad", 5), groups(0, 12))]),
        Budget(0.75, [(entry("tome", 12), groups(5, 0)), (entry("evad", 13), groups(0, 4))]),
    ]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "page.html"
    write_page(path, photograph(), "a model", GRID, budgets(), {"cpu": "some CPU"})
    return path


def test_the_page_holds_every_map_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?:|src=|@import|fetch\(", text)
    assert text.count("</script>") == 2  # that of the data, and that of the code
    (written,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    data = json.loads(written)
    assert data["name"] == photograph().name and data["grid"] == GRID
    colours = np.frombuffer(base64.b64decode(data["colours"]), np.uint8).reshape(GRID, GRID, 3)
    assert colours[0].tolist() == [[200, 0, 0]] * 2 + [[0, 0, 200]] * 2
    for budget, expected in zip(data["budgets"], budgets(), strict=True):
        assert budget["keep"] == expected.keep
        for entry, (facts, drawn) in zip(budget["entries"], expected.drawn, strict=True):
            assert (entry["method"], entry["tokens"]) == (facts.method, facts.tokens)
            shown = np.frombuffer(base64.b64decode(entry["groups"]), "<u2").astype(int)
            assert (np.where(shown == DROPPED, -1, shown) == drawn.ravel()).all()


def test_too_many_patches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 255 x 255 patches, got 256 x 256"):
        write_page(tmp_path / "page.html", photograph(), "a model", 256, budgets(), {})


def run_chromium(profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout


def captions(document: str) -> list[str]:
    found = re.findall(r"<figcaption>(.*?)</figcaption>", document)
    return [re.sub(r"<.*?>", "", caption) for caption in found]


@in_chromium
def test_the_address_chooses_the_budget_and_the_methods(page: Path, tmp_path: Path) -> None:
    address = f"{page.as_uri()}#keep=0.75&methods=evad"
    document = run_chromium(tmp_path / "profile", "--dump-dom", address)
    assert "75 % of the tokens</output>" in document
    whole, evad = captions(document)
    assert whole == "unpatched 16 patches"
    assert evad.startswith("evad 13 tokens, 10 ms, 2.00×") and "0.9876" in evad
    assert "a &lt;b&gt;&amp;&lt;/b&gt; &lt;/script&gt;: what is left" in document
    assert "some CPU</footer>" in document


@in_chromium
def test_slider_and_boxes_change_what_is_shown(page: Path, tmp_path: Path) -> None:
    use = """<script>
    document.getElementById("budget").value = 0;
    document.querySelector("input[value=evad]").checked = false;
    document.dispatchEvent(new Event("input"));
    </script>"""
    page.write_text(page.read_text().replace("</body>", f"{use}</body>"))
    address = f"{page.as_uri()}#keep=0.75"
    document = run_chromium(tmp_path / "profile", "--dump-dom", address)
    assert "25 % of the tokens</output>" in document
    assert [caption.split()[0] for caption in captions(document)] == ["unpatched", "tome"]


@in_chromium
def test_groups_have_their_mean_colour_and_dropped_patches_are_dark(
    page: Path, tmp_path: Path
) -> None:
    from skimage.io import imread

    def pixels(hash: str) -> set[tuple[int, ...]]:
        target = tmp_path / "shot.png"
        address = f"{page.as_uri()}#{hash}"
        run_chromium(tmp_path / "profile", f"--screenshot={target}", address)
        picture = imread(target)[..., :3].reshape(-1, 3)
        colours, count = np.unique(picture, axis=0, return_counts=True)
        return {tuple(map(int, colour)) for colour in colours[count > 500]}

    red, blue, purple, dark = (200, 0, 0), (0, 0, 200), (100, 0, 100), (10, 10, 10)
    joined = pixels("keep=0.25&methods=tome")
    assert {red, blue, purple} <= joined and dark not in joined
    dropped = pixels("keep=0.25&methods=evad")
    assert {red, blue, dark} <= dropped and purple not in dropped
