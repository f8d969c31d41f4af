"""Tiny models of the families of decoders that the installed transformers can build.

A config gets every size of SIZES that it has, and its parts (the text of a vision-language model)
likewise; SPECIAL has what the checks of a family ask for beyond that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    # the same by other names
    d_model=64, n_embd=64, dim=64, emb_dim=64, embedding_size=64, word_embed_proj_dim=64,
    lru_width=64, encoder_hidden_dim=64, encoder_layers=2, decoder_layers=2, n_layer=2, n_layers=2,
    num_layers=2, depth=2, encoder_attention_heads=4, decoder_attention_heads=4,
    attention_heads=4, n_head=4, n_heads=4, num_heads=4, num_attention_groups=2, dim_head=16,
    d_kv=16, kv_channels=16, global_head_dim=16, swa_head_dim=16, swa_num_attention_heads=4,
    swa_num_key_value_heads=2, num_global_key_value_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ffn_dim=48, ff_dim=48, dim_ff=48, dff=48, d_ff=48, n_inner=48, ffn_hidden_size=48,
    intermediate_size_mlp=48, n_positions=64, n_ctx=64, max_source_positions=32,
    max_target_positions=64, rotary_dim=8, query_pre_attn_scalar=16, rms_norm_eps=1e-5,
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, is_decoder=True,
    # attention of other kinds
    sliding_window=None, attention_window=4, attention_chunk_size=6, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, index_topk=4,
    index_n_heads=2, index_head_dim=16, adapter_rank=4, use_mem_rank=4, num_mem_blocks=1,
    laurel_rank=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, num_experts_per_token=2, moe_k=2, moe_topk=2, n_group=1, topk_group=1,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    expert_ffn_hidden_size=32, first_k_dense_replace=1, zero_expert_num=1, expert_layer_period=2,
    # recurrent layers
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_conv_kernel_dim=4, mamba_d_state=4, mamba_d_conv=2,
    mamba_expand=2, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_num_heads=8,
    mamba_head_dim=16, mamba_dt_rank=4, time_step_rank=4, ssm_state_size=4, state_size=4,
    conv_kernel=2, expand=2, n_groups=1, chunk_size=4, attn_layer_period=2, attn_layer_offset=1,
    # images and sound
    image_size=16, patch_size=8, num_channels=3, in_channels=3, embed_dim=64, out_hidden_size=64,
    projection_dim=64, mm_hidden_size=64, spatial_merge_size=2, temporal_patch_size=2,
    fullatt_block_indexes=[1], deepstack_visual_indexes=[1], num_position_embeddings=16,
    image_token_index=96, image_token_id=96, video_token_id=95, audio_token_id=94,
    audio_token_index=94, num_mel_bins=8, num_codebooks=2,
)  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"sliding_window": 6},
    "dots3_note_text": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gemma3n_text": {"sliding_window": 6, "num_kv_shared_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "laguna": {"sliding_window": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "moshi": {"sliding_window": 6},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "xlm": {"n_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# What takes more than sizes to be small, or does not run on text alone, or takes minutes.
LEFT_OUT = {
    "Apertus1p5ForConditionalGeneration", "BailingHybridForCausalLM",
    "Blip2ForConditionalGeneration", "BlipForConditionalGeneration", "BltForCausalLM",
    "ChameleonForConditionalGeneration", "CohereCompassForCausalLM",
    "CohereCompassForConditionalGeneration", "Cosmos3EdgeForConditionalGeneration",
    "DbrxForCausalLM", "DeepseekOcr2ForConditionalGeneration",
    "DiffusionGemmaForBlockDiffusion", "DoryForCausalLM", "Dots3NoteForCausalLM",
    "Dots3NoteForConditionalGeneration", "Emu3ForCausalLM", "Emu3ForConditionalGeneration",
    "EncoderDecoderModel", "Ernie4_5_VLMoeForConditionalGeneration",
    "EvollaForProteinText2Text", "FastVlmForConditionalGeneration",
    "Florence2ForConditionalGeneration", "Gemma3nForConditionalGeneration",
    "Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM",
    "Glm46VForConditionalGeneration", "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration", "Glm5NextForConditionalGeneration",
    "GlmOcrForConditionalGeneration", "Granite4VisionForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration",
    "HunYuanVLForConditionalGeneration", "HYV4VLForConditionalGeneration",
    "IdeficsForVisionText2Text", "Inkling2ForCausalLM", "Inkling2ForConditionalGeneration",
    "Inkling2LoopForCausalLM", "Inkling2LoopForConditionalGeneration",
    "InstructBlipForConditionalGeneration", "InstructBlipVideoForConditionalGeneration",
    "JanusForConditionalGeneration", "KimiLinearForCausalLM", "Kosmos2ForConditionalGeneration",
    "Llama4ForConditionalGeneration", "LongcatFlashForCausalLM",
    "Molmo2ForConditionalGeneration", "MoshiForCausalLM", "MuseGlimmerForConditionalGeneration",
    "MuseSparkForConditionalGeneration", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM",
    "Nemotron3_5TranscribeForConditionalGeneration", "NemotronH_Omni_Reasoning_V3",
    "OmniASRForConditionalGeneration", "PaddleOCRVLForConditionalGeneration",
    "PerceptionLMForConditionalGeneration", "Phi4MultimodalForCausalLM",
    "PI0ForConditionalGeneration", "Pix2StructForConditionalGeneration",
    "PPFormulaNetForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration", "Step3p7ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration", "T5ForConditionalGeneration",
    "UdopForConditionalGeneration", "UnlimitedOcrForConditionalGeneration",
    "VibeVoiceAsrForConditionalGeneration", "VisionEncoderDecoderModel",
    "VoxtralRealtimeForConditionalGeneration", "xLSTMForCausalLM", "Zamba2ForCausalLM",
    "ZambaForCausalLM",
}  # fmt: skip
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)


def families() -> dict[str, str]:
    """The model classes that generate text: by name, the model type of their config."""
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for kind, classes in getattr(modeling_auto, mapping).items():
            for name in classes if isinstance(classes, tuple | list) else [classes]:
                if name not in LEFT_OUT and (name not in found or kind.endswith("_text")):
                    found[name] = kind
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def tiny_decoder(name: str, kind: str) -> nn.Module:
    """A model of the class, with random weights that make every step matter."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(_small(transformers.CONFIG_MAPPING[kind])).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def _small(made: type) -> Any:
    """A config of the class with the sizes above, and with parts that have them."""
    whole = made()
    parts = {
        name: _small(type(part))
        for name, part in vars(whole).items()
        if isinstance(part, transformers.PreTrainedConfig)
    }
    fields = set(getattr(made, "__dataclass_fields__", ())) | set(vars(whole))
    fields |= set(inspect.signature(made.__init__).parameters)
    fields -= set(getattr(made, "attribute_map", ()))
    chosen = {name: size for name, size in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latents: every head has keys of its own
        chosen |= {"num_key_value_heads": 4, "kv_lora_rank": 24, "qk_rope_head_dim": 8}
        chosen.pop("head_dim", None)
    if parts:
        chosen.pop("vocab_size", None)
    kinds = list(dict.fromkeys(getattr(whole, "layer_types", None) or ()))
    if (
        kinds
        and "layer_types" in fields
        and not isinstance(getattr(made, "layer_types", None), property)
    ):
        count = chosen.get("num_hidden_layers", 4)
        chosen["layer_types"] = [kinds[layer % len(kinds)] for layer in range(count)]
        if any("sliding" in each for each in kinds):
            chosen["sliding_window"] = 6
    return made(**{**chosen, **SPECIAL.get(made.model_type, {}), **parts})
