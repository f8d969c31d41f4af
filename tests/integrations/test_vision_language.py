"""Vision-language models with fewer visual tokens, against their language model on those tokens."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import attributes
from cases.tiny_vlms import FAMILIES, IMAGES, Family
from cases.vlm_oracle import Row, greedy, kept_places, logits_of, rows_of
from tokred.methods import METHODS
from tokred.methods._visual import VisualOptions
from tokred.patching import (
    LayerStates,
    Patch,
    PromptCall,
    Settings,
    VisualCall,
    VisualTokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}
WINDOWED = ("gemma3",)
FEW = ("llava_next", "qwen3_vl", "paligemma", "gemma3")
few = pytest.mark.parametrize("family", [BY_NAME[name] for name in FEW], ids=FEW)
SWEPT = [(family, "auto") for family in FAMILIES] + [
    (BY_NAME[name], positions) for name in FEW for positions in ("kept", "renumbered")
]


def sweep(windowed: bool = True) -> Any:
    """All families, some of them with every choice of positions."""
    cases = [case for case in SWEPT if windowed or case[0].name not in WINDOWED]
    return pytest.mark.parametrize(
        ("family", "positions"), cases, ids=[f"{family.name}-{how}" for family, how in cases]
    )


def evenly(tokens: int, keep: int) -> Tensor:
    keep = min(tokens, keep)
    return torch.arange(keep) * tokens // max(keep, 1)


@dataclass(frozen=True)
class Evenly(VisualOptions):
    """Keeps evenly spaced tokens; backwards where reverse is set. Reads the encoder if read is."""

    reverse: bool = False
    read: int | None = None

    def encoder_layers(self, num_layers: int) -> list[int]:
        return [] if self.read is None else [self.read]

    def reduce_visual(self, call: VisualCall) -> Any:
        if self.read is not None:
            call.received_attention(self.read), call.keys(self.read)
        chosen = evenly(call.tokens.shape[1], self.keep)
        return (chosen.flip(0) if self.reverse else chosen).int()[None]


@dataclass(frozen=True)
class Layers(VisualOptions):
    """Before layer 1 keeps `keep` evenly spaced tokens of each row, before layer 3 half of them."""

    def prune_layers(self, num_layers: int) -> list[int]:
        return [1, 3]

    def prune(self, call: PromptCall) -> Tensor:
        keep = self.keep if call.layer == 1 else self.keep // 2
        rows = []
        for row in call.is_slot:
            chosen = evenly(int(row.sum()), keep)
            rows.append(torch.cat([chosen, torch.full((keep - len(chosen),), -1)]))
        return torch.stack(rows).int()


def patched(model: nn.Module, method: Any) -> Patch:
    return Patch(model, method, Settings())


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def generated(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list(IMAGES), **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_keeping_all_changes_nothing(family: Family) -> None:
    model, inputs = family.model(), family.prompt((1, 2, 0))
    expected, tokens = model(**inputs).logits, generated(model, inputs)
    before = attributes(model)
    methods: list[Any] = [Evenly(keep=36 * 9, read=-1)]
    if family.name not in WINDOWED:
        methods.append(Layers(keep=10**3))
    for method in methods:
        with patched(model, method) as handle:
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(generated(model, inputs), tokens)
            counts = handle.counts
            assert len(counts) == 3 and all(n == kept for n, kept in counts)
    assert attributes(model) == before
    assert torch.equal(model(**inputs).logits, expected)


@sweep()
@torch.no_grad()
def test_keeping_some_is_the_language_model_on_these(family: Family, positions: str) -> None:
    """In batches with different numbers of images, padded on the left, with and without a cache."""
    model, inputs = family.model(), family.prompt((1, 2, 0))
    rows = rows_of(model, family.name, inputs)
    planes = rows[0].positions.dim() == 2
    renumber = positions == "renumbered" or (positions == "auto" and not planes)
    keep = 4
    method = Evenly(keep=keep, positions=positions, newlines="drop")
    with patched(model, method) as handle:
        output = model(**inputs)
        tokens = generated(model, inputs)
        counts = handle.counts
        uncached = generated(model, inputs, use_cache=False)
    assert torch.equal(tokens, uncached)
    assert all(kept == keep for _, kept in counts)
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, keep), renumber)
        expected = logits_of(model, short)
        actual = output.logits[number, -len(short.x) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, short, 3)
    assert output.logits.shape[1] == max(len(_kept(family, row, keep)) for row in rows)


def _kept(family: Family, row: Row, keep: int, reverse: bool = False) -> Tensor:
    """The places of a row that Evenly keeps: in models of any resolution, of what is no newline."""

    def choose(tokens: int) -> Tensor:
        picture = torch.arange(tokens)
        if family.kind == "anyres":
            picture = picture[~newlines(tokens)]
        chosen = picture[evenly(len(picture), keep)]
        return chosen.flip(0) if reverse else chosen

    return kept_places(row, choose)


def newlines(tokens: int) -> Tensor:
    """bool [tokens]: the ends of the rows of patches behind a thumbnail of 36 tokens."""
    place = torch.arange(tokens) - 36
    return (place >= 0) & (place % 13 == 12)


@sweep(windowed=False)
@torch.no_grad()
def test_pruning_between_layers(family: Family, positions: str) -> None:
    model, inputs = family.model(), family.prompt((1, 2, 0))
    rows = rows_of(model, family.name, inputs)
    planes = rows[0].positions.dim() == 2
    renumber = positions == "renumbered" or (positions == "auto" and not planes)
    keep = 4
    with patched(model, Layers(keep=keep, positions=positions, newlines="drop")):
        output = model(**inputs)
        tokens = generated(model, inputs)
        uncached = generated(model, inputs, use_cache=False)
    assert torch.equal(tokens, uncached)
    for number, row in enumerate(rows):
        drops = _dropped(family, row, keep)
        expected = logits_of(model, row, drops, renumber)
        actual = output.logits[number, -len(expected) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, row, 3, drops, renumber)


def _dropped(family: Family, row: Row, keep: int) -> dict[int, Tensor]:
    """The places of a row that Layers drops, by layer."""
    visual = (row.image >= 0).nonzero()[:, 0]
    if not len(visual):
        return {}
    picture = visual
    if family.kind == "anyres":
        parts = [visual[row.image[visual] == i] for i in range(int(row.image.max()) + 1)]
        picture = torch.cat([part[~newlines(len(part))] for part in parts])
    first = picture[evenly(len(picture), keep)]
    second = first[evenly(len(first), keep // 2)]
    return {1: visual[~torch.isin(visual, first)], 3: visual[~torch.isin(visual, second)]}


@few
@torch.no_grad()
def test_rows_padded_on_the_right(family: Family) -> None:
    model, inputs = family.model(), family.prompt((2, 1), padding="right")
    rows = rows_of(model, family.name, inputs)
    with patched(model, Evenly(keep=3, newlines="drop", positions="renumbered")):
        logits = model(**inputs).logits
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, 3), True)
        expected = logits_of(model, short)
        actual = logits[number, : len(short.x)]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@few
@torch.no_grad()
def test_tokens_stay_in_the_order_returned(family: Family) -> None:
    model, inputs = family.model(), family.prompt((1, 2))
    rows = rows_of(model, family.name, inputs)
    with patched(model, Evenly(keep=4, reverse=True, newlines="drop", positions="kept")):
        output = model(**inputs)
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, 4, reverse=True), False)
        expected = logits_of(model, short)
        actual = output.logits[number, -len(short.x) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# What methods are given.


def test_tokens_are_told_from_the_patches_they_are_made_of(family: Family) -> None:
    """Known by each token's gradient with respect to what the last attention gave every patch."""
    model, inputs = family.model(), family.prompt((1, 2, 0))
    calls: list[VisualCall] = []

    class Keep(Evenly):
        def reduce_visual(self, call: VisualCall) -> None:
            calls.append(call)

    outputs: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = x.detach().requires_grad_()
        outputs.append(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    with patched(model, Keep(read=-1)) as handle:
        modules = handle.states[0].modules
        # LLaVA's tokens come from the layer before the last.
        used = modules[-2 if getattr(model.config, "vision_feature_layer", -1) == -2 else -1]
        hook = used.register_forward_hook(watch)
        model(**inputs)
        hook.remove()
    (given,) = outputs
    assert len(calls) == 3
    first = 0
    for call in calls:
        states = call.encoder
        crops, patches = states.token_of_patch.shape
        for token in {0, 1, call.tokens.shape[1] // 2, call.tokens.shape[1] - 1}:
            (gradient,) = torch.autograd.grad(call.tokens[0, token].sum(), given, retain_graph=True)
            if gradient.dim() == 2:  # the patches of all images in a row
                touched = gradient[first : first + patches].abs().sum(-1)[None] > 0
            else:
                part = gradient[first : first + crops, states.num_prefix :]
                touched = part.abs().sum(-1) > 0
            assert torch.equal(touched, states.token_of_patch == token)
        first += patches if given.dim() == 2 else crops
        assert states.num_prefix == int(family.has_class_token)
        assert sorted(states.heads) == [2] and call.num_layers == 3


@torch.no_grad()
def test_attention_of_the_encoder_is_that_of_the_model(family: Family) -> None:
    """Against the weights of eager attention, and the keys' grid."""
    model, inputs = family.model(), family.prompt((1, 1))
    calls: list[VisualCall] = []

    class Keep(Evenly):
        def reduce_visual(self, call: VisualCall) -> None:
            calls.append(call)

    weights: list[Tensor] = []
    model.set_attn_implementation("eager")
    with patched(model, Keep(read=-1)) as handle:
        used = handle.states[0].modules[-1]
        hook = used.register_forward_hook(
            lambda module, args, output: (
                weights.append(output[1]) if isinstance(output, tuple) else None
            )
        )
        model(**inputs)
        hook.remove()
    if not weights:
        return  # Qwen's encoders give none
    first = 0
    for call in calls:
        crops = len(call.encoder.token_of_patch)
        matrix = weights[0][first : first + crops]  # [M, H, P', P']
        first += crops
        received = matrix.mean(2)[..., call.encoder.num_prefix :].transpose(0, 1).flatten(1)
        slots = call.encoder.token_of_patch.flatten()
        expected = torch.stack(
            [received[:, slots == n].mean(1) for n in range(call.tokens.shape[1])], 1
        )
        torch.testing.assert_close(call.received_attention(-1)[0], expected, rtol=1e-4, atol=1e-5)
        if family.has_class_token:
            row = matrix[:, :, 0, 1:].transpose(0, 1).flatten(1)
            expected = torch.stack(
                [row[:, slots == n].mean(1) for n in range(call.tokens.shape[1])], 1
            )
            torch.testing.assert_close(call.class_attention(-1)[0], expected, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="attention of the class token"):
                call.class_attention(-1)


def test_layouts_of_images_of_any_resolution() -> None:
    family = BY_NAME["llava_next"]
    model, inputs = family.model(), family.prompt((3,))
    calls: list[VisualCall] = []

    class Keep(Evenly):
        def reduce_visual(self, call: VisualCall) -> None:
            calls.append(call)

    with torch.no_grad(), patched(model, Keep()):
        model(**inputs)
    assert [call.layout.tiling for call in calls] == [(2, 2), (1, 2), (1, 2)]
    # The last one has two of six rows behind its thumbnail: the others were padding.
    assert [call.tokens.shape[1] for call in calls] == [36 + 12 * 12, 36 + 6 * 12, 36 + 2 * 12]
    assert calls[2].layout.place[36:48].tolist() == [*range(12, 18)] * 2
    assert (calls[2].encoder.token_of_patch >= 0).sum(1).tolist() == [36, 12, 12]
    layout = calls[0].layout
    assert layout.crop_grid == (6, 6) and layout.num_crops == 5
    assert layout.crop[:36].tolist() == [0] * 36 and layout.place[:36].tolist() == [*range(36)]
    # The first row of the stitched crops: six of the upper left one, six of the upper right one.
    assert layout.crop[36:48].tolist() == [1] * 6 + [2] * 6
    assert layout.place[36:48].tolist() == [*range(6)] * 2
    assert calls[0].pixels.shape == (1, 5, 3, 48, 48)


# Batches, beams, threads.


@torch.no_grad()
def test_newlines_stay_behind_the_tokens_before_them() -> None:
    family = BY_NAME["llava_next"]
    model, inputs = family.model(), family.prompt((1, 1))
    rows = rows_of(model, family.name, inputs)
    for reverse in (False, True):
        with patched(model, Evenly(keep=5, reverse=reverse)) as handle:
            output = model(**inputs)
        assert [kept for _, kept in handle.counts] == [5 + 12, 5 + 6]
        for number, row in enumerate(rows):

            def choose(tokens: int, reverse: bool = reverse) -> Tensor:
                ends = newlines(tokens).nonzero()[:, 0].tolist()
                picture = (~newlines(tokens)).nonzero()[:, 0]
                chosen = picture[evenly(len(picture), 5)].tolist()
                if not reverse:
                    return torch.tensor(sorted(chosen + ends))
                # Backwards: each stands before the first token from which on all lie behind it.
                left, found = chosen[::-1], []
                for place in left:
                    after = left[left.index(place) :]
                    found += [end for end in ends if end < min(after) and end not in found]
                    found.append(place)
                return torch.tensor(found + [end for end in ends if end not in found])

            short = row.take(kept_places(row, choose), True)
            expected = logits_of(model, short)
            actual = output.logits[number, -len(short.x) :]
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Halves(VisualOptions):
    """Every token becomes the mean of itself and its neighbour, in the place of the second."""

    mapped: bool = True

    def reduce_visual(self, call: VisualCall) -> VisualTokens:
        count = call.tokens.shape[1] // 2
        pairs = call.tokens[:, : 2 * count].unflatten(1, (count, 2))
        place = torch.arange(count).int()
        token_map = torch.full((1, call.tokens.shape[1]), -1, dtype=torch.int32)
        token_map[:, : 2 * count] = place.repeat_interleave(2)
        indices = (2 * place + 1)[None]
        return VisualTokens(pairs.mean(2), indices, token_map if self.mapped else None)


@few
@pytest.mark.parametrize("mapped", [True, False])
@torch.no_grad()
def test_tokens_that_a_method_makes(family: Family, mapped: bool) -> None:
    """Features of other layers (deepstack) become means of the same groups."""
    model, inputs = family.model(), family.prompt((1, 2))
    with patched(model, Halves(mapped=mapped, newlines="drop")):
        logits = model(**inputs).logits
    for number, row in enumerate(rows_of(model, family.name, inputs)):
        kept, x, deep = [], row.x.clone(), None if row.deep is None else row.deep.clone()
        for image in range(int(row.image.max()) + 1):
            there = (row.image == image).nonzero()[:, 0]
            if family.kind == "anyres":
                there = there[~newlines(len(there))]
            pairs = there[: len(there) // 2 * 2].view(-1, 2)
            x[pairs[:, 1]] = row.x[pairs].mean(1)
            if deep is not None and mapped:
                deep[:, pairs[:, 1]] = row.deep[:, pairs].mean(2)
            kept.append(pairs[:, 1])
        row.x, row.deep = x, deep
        text = (row.image < 0).nonzero()[:, 0]
        places = torch.cat([text, *kept]).sort().values
        short = row.take(places, row.positions.dim() == 1)
        actual = logits[number, -len(places) :]
        torch.testing.assert_close(actual, logits_of(model, short), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "idefics3", "gemma3"])
@torch.no_grad()
def test_beams(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.model(), family.prompt((1, 2))
    methods: list[Any] = [Evenly(keep=4)] + ([] if name in WINDOWED else [Layers(keep=4)])
    for method in methods:
        with patched(model, method):
            beams = generated(model, inputs, num_beams=3)
            uncached = generated(model, inputs, num_beams=3, use_cache=False)
            several = generated(model, inputs, num_beams=3, num_return_sequences=2)
        assert torch.equal(beams, uncached) and torch.equal(several[::2], beams)


@few
@torch.no_grad()
def test_text_alone_is_left_as_it_is(family: Family) -> None:
    model, inputs = family.model(), family.prompt((0, 0))
    expected, tokens = model(**inputs).logits, generated(model, inputs)
    method = Evenly(keep=2) if family.name in WINDOWED else Layers(keep=2)
    with patched(model, method) as handle:
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(generated(model, inputs), tokens)
        with pytest.raises(RuntimeError, match="no prompt with images has run"):
            handle.counts  # noqa: B018


@torch.no_grad()
def test_threads_do_not_mix() -> None:
    """Different prompts and lengths in one patched model at once."""
    family = BY_NAME["llava_next"]
    model = family.model()
    prompts = [family.prompt(images) for images in ((1,), (2, 1), (1, 0, 1), (0, 2))]
    found: dict[int, list[Tensor]] = {n: [] for n in range(len(prompts))}
    with patched(model, Layers(keep=6, newlines="drop")):
        expected = [generated(model, prompt) for prompt in prompts]

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    found[number].append(generated(model, prompts[number]))

        threads = [threading.Thread(target=work, args=(n,)) for n in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, tokens in found.items():
        assert len(tokens) == 3 and all(torch.equal(x, expected[number]) for x in tokens)


@torch.no_grad()
def test_a_conversation_goes_on() -> None:
    """Several tokens at once behind a prompt, without positions, and from a copy of the cache."""
    for name in ("llava", "qwen2_5_vl", "paligemma"):
        family = BY_NAME[name]
        model, inputs = family.model(), family.prompt((1, 2))
        methods: list[Any] = [Evenly(keep=4)]
        if family.kind != "grid":  # there the model itself needs positions, where nothing is new
            methods.append(Layers(keep=4))
        for method in methods:
            more = torch.randint(3, 80, (2, 4))
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
            whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
            whole["attention_mask"] = mask
            for types in ("token_type_ids", "mm_token_type_ids"):
                if types in whole:
                    zeros = torch.zeros(2, 4, dtype=torch.long)
                    whole[types] = torch.cat([whole[types], zeros], 1)
            whole.pop("token_type_ids", None)
            first = {key: x for key, x in inputs.items() if key != "token_type_ids"}
            with patched(model, method):
                expected = model(**whole).logits[:, -4:]
                cache = model(**first).cache
                other = copy.deepcopy(cache)
                for past in (cache, other):
                    logits = [
                        model(
                            input_ids=more[:, :3], attention_mask=mask[:, :-1], cache=past
                        ).logits,
                        model(input_ids=more[:, 3:], attention_mask=mask, cache=past).logits,
                    ]
                    actual = torch.cat(logits, 1)
                    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# Refusals.


def refused(model: nn.Module, method: Any, words: str, **inputs: Any) -> None:
    with torch.no_grad(), patched(model, method), pytest.raises(ValueError, match=words):
        model(**inputs)


def test_inputs_that_are_refused() -> None:
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1,))
    method = Evenly(keep=3)
    refused(model, method, "labels belong to all tokens", **inputs, labels=inputs["input_ids"])
    refused(model, method, "logits_to_keep must be an int", **inputs,
            logits_to_keep=torch.tensor([1]))  # fmt: skip
    embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    refused(model, method, "pass input_ids, not inputs_embeds", **embedded,
            inputs_embeds=embeddings)  # fmt: skip
    square = inputs | {"attention_mask": torch.ones(1, 1, 45, 45).bool()}
    refused(model, method, r"attention_mask must be \[1, 45\]", **square)
    refused(model, method, "Image features and image tokens do not match",
            **inputs | {"input_ids": inputs["input_ids"][:, 4:]})  # fmt: skip
    with torch.no_grad(), patched(model, method):
        cache = model(**inputs).cache
        with pytest.raises(ValueError, match="images can only be read into an empty cache"):
            model(**inputs, cache=cache)
        token = torch.tensor([[5]])
        with pytest.raises(ValueError, match=r"attention_mask must have the prompt's 45 .* got 9"):
            model(input_ids=token, attention_mask=torch.ones(1, 9), cache=cache)
        with pytest.raises(ValueError, match="the cache holds prompts of 1 rows, got 2"):
            model(input_ids=token.repeat(2, 1), cache=cache)
        cache.crop(-2)
        with pytest.raises(ValueError, match="cannot be cut"):
            model(input_ids=token, cache=cache)
        with pytest.raises(ValueError, match="StaticCache has places for the whole prompt"):
            generated(model, inputs, cache_implementation="static")
    video = BY_NAME["qwen2_vl"]
    frames = {"pixel_values_videos": torch.zeros(4, 384)}
    refused(video.model(), method, "videos are not served", input_ids=torch.tensor([[3]]), **frames)


@dataclass(frozen=True)
class Twice(VisualOptions):
    def reduce_visual(self, call: VisualCall) -> Tensor:
        return torch.tensor([[1, 2, 1]]).int()


def test_methods_that_are_refused() -> None:
    family = BY_NAME["llava_siglip"]
    model, inputs = family.model(), family.prompt((1,))
    refused(model, Twice(), r"Twice keeps a token twice: \[1, 2, 1\]", **inputs)
    with pytest.raises(ValueError, match="reads layer 3 of the vision encoder, which has 3 layers"):
        patched(model, Evenly(read=3))
    with pytest.raises(ValueError, match="this one chooses visual tokens"):
        Patch(model, Evenly(), Settings(prop_attn=False))
    with pytest.raises(
        ValueError, match=r"no layer that this method can be put into.*nothing in it"
    ):
        patched(nn.Linear(2, 2), Evenly())
    with pytest.raises(ValueError, match="see only a window of the tokens"):
        patched(BY_NAME["gemma3"].model(), Layers())

    class Late(Layers):
        def prune_layers(self, num_layers: int) -> list[int]:
            return [num_layers]

    with pytest.raises(ValueError, match=r"prunes at layers \[4\], and .* has layers 0 to 3"):
        patched(model, Late())


@torch.no_grad()
def test_images_encoded_outside_of_the_patch() -> None:
    """Their tokens are known, and how the encoder made them is not."""
    family = BY_NAME["llava_next"]
    model, inputs = family.model(), family.prompt((1, 1))
    encoded = model.get_image_features(inputs.pop("pixel_values"), inputs["image_sizes"])
    inputs = {**inputs, "mm_encoder_outputs": {"image": encoded}}
    with patched(model, Evenly(keep=3)) as handle:
        model(**inputs)
        assert [kept for _, kept in handle.counts] == [3, 3]
    refused(model, Evenly(read=0), "were encoded outside of the patch", **inputs)
    assert isinstance(encoded.pooler_output, list) and len(encoded.pooler_output) == 2


# Every method.

SERVED = {
    name: method
    for name, method in METHODS.items()
    if method.options is not None and "vision_language" in method.options.adapters
}


def small_options(name: str, **wanted: Any) -> dict[str, Any]:
    """The wanted options that the method has."""
    return {option: value for option, value in wanted.items() if option in SERVED[name].defaults()}


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_every_method_runs_in_models(name: str) -> None:
    """Each row of a batch, with as many images as it has, is what it is by itself.

    What a model lacks is said in words.
    """
    served, reasons, images = [], [], (2, 1)
    for family in (BY_NAME[kind] for kind in ("llava_next", "qwen2_5_vl")):
        model, inputs = family.model(), family.prompt(images)
        try:
            with tokred.patch(model, name, **small_options(name, keep=6)):
                tokens = generated(model, inputs, max_new_tokens=2)
                alone = family.alone(inputs, images, 1)
                output = model(**alone).logits
                assert output.isfinite().all()
                assert output.shape[1] <= alone["input_ids"].shape[1]
                assert torch.equal(generated(model, alone, max_new_tokens=2)[0], tokens[1])
        except ValueError as error:
            reasons.append(str(error))
            continue
        served.append(family.name)
    assert served, f"{name} runs in none of the models: {reasons}"


@dataclass(frozen=True)
class FromTheStart(VisualOptions):
    """Before layer 0 keeps every second token of each row, before layer 2 every fourth."""

    def prune_layers(self, num_layers: int) -> list[int]:
        return [0, 2]

    def prune(self, call: PromptCall) -> Tensor:
        call.last_attention("following")
        return torch.arange(0, call.slots.shape[1], 2).int().repeat(len(call.slots), 1)


@pytest.mark.parametrize("positions", ["kept", "renumbered"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma"])
@torch.no_grad()
def test_pruning_before_the_first_layer(name: str, positions: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.model(), family.prompt((1, 2, 0))
    with patched(model, FromTheStart(positions=positions)):
        logits, tokens = model(**inputs).logits, generated(model, inputs)
    for number, row in enumerate(rows_of(model, name, inputs)):
        visual = (row.image >= 0).nonzero()[:, 0]
        stays = {0: visual[::2], 2: visual[::2][::2]}
        drops = {layer: visual[~torch.isin(visual, left)] for layer, left in stays.items()}
        renumber = positions == "renumbered"
        expected = logits_of(model, row, drops, renumber)
        actual = logits[number, -len(expected) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, row, 3, drops, renumber)


@dataclass(frozen=True)
class Nothing(VisualOptions):
    """Keeps no token of any image."""

    def reduce_visual(self, call: VisualCall) -> Tensor:
        return torch.full((1, 3), -1).int()


@few
@torch.no_grad()
def test_images_of_which_nothing_stays(family: Family) -> None:
    model, inputs = family.model(), family.prompt((1, 2))
    with patched(model, Nothing(newlines="drop")) as handle:
        logits, tokens = model(**inputs).logits, generated(model, inputs)
    assert handle.counts[0][1] == 0
    for number, row in enumerate(rows_of(model, family.name, inputs)):
        text = (row.image < 0).nonzero()[:, 0]
        short = row.take(text, row.positions.dim() == 1)
        actual = logits[number, -len(text) :]
        torch.testing.assert_close(actual, logits_of(model, short), rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, short, 3)


@pytest.mark.parametrize("name", ["visionzip", "fastv"])
@few
def test_half_precision_and_gradients(family: Family, name: str) -> None:
    if name == "fastv" and family.name in WINDOWED:
        name = "divprune"
    inputs = family.prompt((1, 1))
    model = family.model(torch.bfloat16)
    small = {"keep": 6, "newlines": "drop"}
    with torch.no_grad(), tokred.patch(model, name, **small):
        half = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
        assert model(**half).logits.isfinite().all()
        assert generated(model, half).shape == (2, 3)
    model = family.model()
    with tokred.patch(model, name, **small):
        model(**inputs).logits[:, -1].float().logsumexp(-1).sum().backward()
    weights = dict(model.named_parameters())
    projector = [w.grad for n, w in weights.items() if "projector" in n or "merger" in n]
    assert projector and all(grad is not None for grad in projector[:1])
    assert sum(float(grad.abs().sum()) for grad in projector if grad is not None) > 0


@torch.no_grad()
def test_prompts_in_chunks_are_refused() -> None:
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1,))
    with (
        patched(model, Evenly(keep=3)),
        pytest.raises(ValueError, match=r"read at once|empty cache"),
    ):
        generated(model, inputs, prefill_chunk_size=16)


def test_layers_that_are_recomputed_do_not_prune() -> None:
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1,))
    language = model.model.language_model
    newest = getattr(language, "activation_checkpointing_enable", None)
    (newest or language.gradient_checkpointing_enable)()
    model.train()
    with (
        patched(model, Layers(keep=3)),
        pytest.raises(ValueError, match="recomputed in the backward"),
    ):
        model(**inputs)
    with patched(model, Evenly(keep=3)):
        model(**inputs).logits.sum().backward()


@torch.no_grad()
def test_a_choice_of_keys_on_top() -> None:
    """Methods for the keys of the language model work on the tokens that are left."""
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1, 2))
    with tokred.patch(model, "visionzip", keep=5):
        expected = model(**inputs).logits
        with tokred.patch(model.model.language_model, "top_k_attention", k=10**4):
            logits = model(**inputs).logits
            assert generated(model, inputs).shape == (2, 3)
    there = logits.isfinite()
    torch.testing.assert_close(logits[there], expected[there], rtol=1e-3, atol=1e-4)
    inner = tokred.patch(model.model.language_model, "top_k_attention", k=10**4)
    outer, refused = tokred.patch(model, "fastv"), pytest.raises(RuntimeError, match="put into")
    with outer, inner, refused:
        model(**inputs)


@torch.no_grad()
def test_layers_that_are_watched() -> None:
    """What their blocks were given and gave, and what is carried is pruned with the tokens."""
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1, 2))
    blocks = {
        "attention": model.model.language_model.layers[0].self_attn,
        "mlp": model.model.language_model.layers[0].mlp,
    }
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, block in blocks.items():

        def keep(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            seen[f"{name}_in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"{name}_out"] = output[0] if isinstance(output, tuple) else output

        hooks.append(block.register_forward_hook(keep, with_kwargs=True))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    states: list[LayerStates] = []
    carried: list[Tensor] = []

    class Watching(Layers):
        def watch(self, num_layers: int) -> list[int]:
            return [0, 2]

        def observe(self, found: LayerStates) -> None:
            states.append(found)
            place = torch.arange(found.valid.shape[1]).expand_as(found.valid)
            found.carried.setdefault("place", place)

        def prune(self, call: PromptCall) -> Tensor:
            carried.append(call.carried["place"])
            return super().prune(call)

    with patched(model, Watching(keep=6)):
        model(**inputs)
    assert [found.layer for found in states] == [0, 2] and states[0].num_layers == 4
    for name, expected in seen.items():
        torch.testing.assert_close(getattr(states[0], name), expected)
    # Before layer 3 the places carried from layer 0 are those of the tokens that are left.
    text = 2 + 4 + 7  # of the second row: those before, around and behind its images
    assert states[1].valid.sum(1).tolist() == [2 + 2 + 5 + 6, text + 6]
    visual = inputs["input_ids"] == IMAGES[0]
    for row in range(2):
        slots = visual[row].nonzero()[:, 0]
        wanted = slots[evenly(len(slots), 6)]
        left = carried[1][row][states[1].visual[row]]
        assert torch.equal(left, wanted)
