"""The encoders of transformers and timm that reduce their tokens, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tokred

from .model_families import Family, Section

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
IMAGE = dict(SIZES, image_size=48, patch_size=8)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
TEXT = dict(SIZES, vocab_size=97, max_position_embeddings=64, **SPECIAL)
LENGTHS = (14, 9)  # of the sentences


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _sentences(model: nn.Module) -> Any:
    ids = torch.randint(4, 97, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(14) < torch.tensor(LENGTHS)[:, None]).long()
    return model(input_ids=ids, attention_mask=mask)


def _with_patch_masks(model: nn.Module) -> Any:
    mask = (torch.arange(64) < torch.tensor([64, 48])[:, None]).long()
    shapes = torch.tensor([[8, 8], [6, 8]])
    return model(pixel_values=_random(2, 64, 192), pixel_attention_mask=mask, spatial_shapes=shapes)


def _built(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    return _weighted(model)


def _weighted(model: nn.Module) -> nn.Module:
    """Fresh models attend almost evenly; larger weights make every step matter."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _of(
    name: str, kind: str, run: Callable[[nn.Module], Any], sizes: dict[str, Any], **options: Any
) -> Family:
    """A family of transformers by the beginning of its classes' names and that of its model."""
    config = kind.removesuffix("Model").removesuffix("Transformer").removesuffix("Encoder")
    return Family(name, kind, partial(_built, kind, f"{config}Config", sizes | options), run)


def _image(name: str, kind: str, side: int = 48, **options: Any) -> Family:
    return _of(name, kind, lambda model: model(_random(2, 3, side, side)), IMAGE, **options)


def _text(name: str, kind: str, **options: Any) -> Family:
    return _of(name, kind, _sentences, TEXT, **options)


def _sound(name: str, kind: str, **options: Any) -> Family:
    short: dict[str, Any] = dict(conv_dim=(8, 8), conv_stride=(20, 10), conv_kernel=(20, 10))
    short |= dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    return _of(name, kind, lambda model: model(_random(2, 4000)), SIZES | short, **options)


def _video(name: str, kind: str, **options: Any) -> Family:
    def run(model: nn.Module) -> Any:
        return model(_random(2, 4, 3, 48, 48))

    return _of(name, kind, run, IMAGE, num_frames=4, **options)


def _timm(name: str, architecture: str, side: int = 48, **options: Any) -> Family:
    def build() -> nn.Module:
        import timm

        torch.manual_seed(0)
        return _weighted(timm.create_model(architecture, **options))

    return Family(name, architecture, build, lambda model: model(_random(2, 3, side, side)))


SMALL = dict(img_size=48, embed_dim=32, depth=3, num_heads=2)
DISTIL = dict(dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=97, **SPECIAL)
MEL = dict(patch_size=8, num_mel_bins=32, max_length=64, frequency_stride=8, time_stride=8)
PAIRS = dict(image_size=[48, 48], patch_size=[8, 8])

FAMILIES = (
    _timm("ViT of timm", "vit_tiny_patch16_224", **SMALL),
    _timm("DeiT of timm", "deit_tiny_distilled_patch16_224", **SMALL),
    _timm("NaFlexViT of timm", "naflexvit_base_patch16_gap", **SMALL),
    _timm("EVA-02 of timm", "eva02_tiny_patch14_224", 56, **(SMALL | {"img_size": 56})),
    _timm("DINOv3 of timm", "vit_small_patch16_dinov3", **SMALL),
    _image("ViT", "ViTModel"),
    _image("DeiT", "DeiTModel"),
    _image("ViT-MSN", "ViTMSNModel"),
    _image("I-JEPA", "IJepaModel"),
    _of(
        "ViT-MAE",
        "ViTMAEModel",
        lambda model: model(_random(2, 3, 48, 48), noise=_random(2, 36)),
        IMAGE,
    ),
    _of("AST", "ASTModel", lambda model: model(_random(2, 64, 32)), SIZES, **MEL),
    _of("DINOv2", "Dinov2Model", lambda model: model(_random(2, 3, 48, 48)),
        {k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
    _of("DINOv2 with registers", "Dinov2WithRegistersModel",
        lambda model: model(_random(2, 3, 48, 48)),
        {k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
    _image("DINOv3", "DINOv3ViTModel"),
    _image("SigLIP", "SiglipVisionModel"),
    _of("SigLIP 2", "Siglip2VisionModel", _with_patch_masks, SIZES, patch_size=8, num_patches=64),
    _image("CLIP", "CLIPVisionModel"),
    _image("MetaCLIP 2", "MetaClip2VisionModel"),
    _image("AltCLIP", "AltCLIPVisionModel"),
    _image("Chinese CLIP", "ChineseCLIPVisionModel"),
    _image("CLIPSeg", "CLIPSegVisionModel"),
    _image("OWL-ViT", "OwlViTVisionModel"),
    _image("OWLv2", "Owlv2VisionModel"),
    _image("BLIP", "BlipVisionModel"),
    _image("BLIP-2", "Blip2VisionModel"),
    _image("InstructBLIP", "InstructBlipVisionModel"),
    _image("GIT", "GitVisionModel"),
    _image("Janus", "JanusVisionModel"),
    _image("Idefics3", "Idefics3VisionTransformer"),
    _image("SmolVLM", "SmolVLMVisionTransformer"),
    _image("InternVL", "InternVLVisionModel", **PAIRS),
    _image("AIMv2", "Aimv2VisionModel"),
    _image("BEiT", "BeitModel"),
    _image("BEiT with relative positions", "BeitModel", use_relative_position_bias=True),
    _image("BEiT with shared positions", "BeitModel", use_shared_relative_position_bias=True),
    _image("Data2Vec, images", "Data2VecVisionModel"),
    _image("Pixtral", "PixtralVisionModel", head_dim=16),
    _image("YOLOS", "YolosModel", image_size=[48, 48]),
    _image("DPT", "DPTModel"),
    _video("VideoMAE", "VideoMAEModel"),
    _video("ViViT", "VivitModel"),
    _video("TimeSformer", "TimesformerModel"),
    _sound("wav2vec 2.0", "Wav2Vec2Model"),
    _sound("HuBERT", "HubertModel"),
    _sound("UniSpeech", "UniSpeechModel"),
    _sound("WavLM", "WavLMModel"),
    _text("BERT", "BertModel"),
    _text("RoBERTa", "RobertaModel"),
    _text("XLM-RoBERTa", "XLMRobertaModel"),
    _text("RoBERTa with norms first", "RobertaPreLayerNormModel"),
    _text("CamemBERT", "CamembertModel"),
    _text("ELECTRA", "ElectraModel"),
    _text("ERNIE", "ErnieModel"),
    _text("Data2Vec, text", "Data2VecTextModel"),
    _of("DistilBERT", "DistilBertModel", _sentences, DISTIL),
    _text("ModernBERT", "ModernBertModel", local_attention=8, global_attn_every_n_layers=2),
    _text("NomicBERT", "NomicBertModel"),
    _text("Jina embeddings v3", "JinaEmbeddingsV3Model"),
    _text("EuroBERT", "EuroBertModel", num_key_value_heads=2, mask_token_id=3),
    _text("ESM-2", "EsmModel", position_embedding_type="rotary", mask_token_id=3),
    _text("LayoutLM", "LayoutLMModel"),
    _text("MarkupLM", "MarkupLMModel"),
    _text("Splinter", "SplinterModel", question_token_id=3),
    _text("ALBERT", "AlbertModel", embedding_size=16),
    _text("MPNet", "MPNetModel"),
    _text("DeBERTa-v2", "DebertaV2Model"),
    _text("RoFormer", "RoFormerModel"),
    _text("FNet", "FNetModel"),
    _of("T5", "T5EncoderModel", _sentences,
        dict(vocab_size=97, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)),
)  # fmt: skip


def output(family: Family, model: nn.Module) -> Tensor:
    """What the model computes from all of its tokens."""
    made = family.run(model)
    return made if isinstance(made, Tensor) else made[0]


def examine(family: Family) -> tuple[str, ...]:
    """What comes of ToMe in a family: (result, first tokens that never merge, positions)."""
    model = family.build()
    with torch.no_grad():
        plain = output(family, model)
        try:
            patch = tokred.patch(model, "tome", r=3, trace_source=True)
        except ValueError as error:
            return _reason(str(error)), "", ""
        with tokred.patch(model, "tome", r=0):
            same = torch.equal(output(family, model), plain)
        with patch as handle:
            reduced = output(family, model)
            prefix, follows = handle.num_prefix, handle.states[0].follows_positions
            shrinks = handle.counts[-1] < handle.counts[0]
        with suppress(KeyError), tokred.patch(model, "tome", r=3, restore_tokens=True):
            restored = output(family, model)
            raise KeyError
        if reduced.dim() == 3 and reduced.shape[1] < plain.shape[1]:
            reduced = handle.unmerge(reduced)
        there = handle.token_map >= 0
        kept = torch.equal(reduced[there], restored[there]) if reduced.dim() == 3 else True
        again = torch.equal(output(family, model), plain)
    if not (same and shrinks and kept and again and restored.shape == plain.shape):
        raise AssertionError(
            f"{family.name}: no-op equal {same}, merges {shrinks}, restored alike {kept} "
            f"{list(restored.shape)}, the model as before {again}"
        )
    return "exact", str(prefix), "go with the tokens" if follows else "in the tokens"


def _reason(error: str) -> str:
    """The part of a refusal that says why."""
    why = error.split(": its tokens cannot merge")[0].split("; supported are")[0]
    return why.replace("|", "or").split(": pass ")[0]


SECTION = Section(
    title="Encoders",
    text=(
        'With `tokred.patch(model, "tome", ...)`, as with every other method that merges or drops\n'
        "tokens between the layers of an encoder. `restore_tokens=True` gives what is outside of\n"
        "the layers all tokens, and is the default for text, where rows of a batch may be padded\n"
        "on either side. Positions are in the tokens (absolute ones), or go with them (rotations\n"
        "and windows)."
    ),
    columns=("result", "first tokens that stay", "positions"),
    families=FAMILIES,
    examine=examine,
)
