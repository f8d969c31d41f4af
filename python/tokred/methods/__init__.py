"""Published token-reduction methods, one a file, each a few lines over the ops."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

__all__ = ["METHODS", "Method", "get"]


@dataclass(frozen=True)
class Method:
    """What a method is and where it lives.

    status is "exact" where the published algorithm is followed to the letter, "approximate" where
    the result differs in a way the module's docstring states.
    """

    name: str
    title: str
    arxiv: str
    status: str
    summary: str

    def load(self) -> ModuleType:
        """The module tokred.methods.<name>; its OPTIONS is the class that tokred.patch fills."""
        return importlib.import_module(f"tokred.methods.{self.name}")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "tome",
            "Token Merging: Your ViT But Faster",
            "2210.09461",
            "exact",
            "between attention and MLP, merge the r most similar pairs of an even/odd split",
        ),
        Method(
            "tomesd",
            "Token Merging for Fast Stable Diffusion",
            "2303.17604",
            "exact",
            "merge into one token per grid cell before attention, copy back after it",
        ),
        Method(
            "pitome",
            "Accelerating Transformers with Spectrum-Preserving Token Merging",
            "2405.16148",
            "exact",
            "merge only inside dense clusters, which an energy score finds; keep lone tokens",
        ),
        Method(
            "token_select",
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs "
            "via Dynamic Token-Level KV Cache Selection",
            "2411.02886",
            "exact",
            "at every step attend to the cached tokens that all heads of a layer vote for",
        ),
        Method(
            "top_k_attention",
            "Memory-efficient Transformers via Top-k Attention",
            "2106.06899",
            "exact",
            "every query of every head attends to the k keys of greatest logit",
        ),
        Method(
            "tidal_decode",
            "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
            "2410.05076",
            "exact",
            "one layer chooses each head's keys, the layers after it attend to its choice",
        ),
        Method(
            "fasa",
            "FASA: Frequency-Aware Sparse Attention",
            "2602.03152",
            "exact",
            "score keys on the few rotary frequencies that agree with the whole head",
        ),
        Method(
            "kinetics",
            "Kinetics: Rethinking Test-Time Scaling Laws",
            "2506.05333",
            "exact",
            "keep the tokens or blocks of greatest mean logit in a group of query heads",
        ),
        Method(
            "quest",
            "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
            "2406.10774",
            "exact",
            "keep the newest page of keys and those with the greatest upper bound of their logits",
        ),
        Method(
            "dhsa",
            "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
            "2510.24606",
            "exact",
            "score chunks of keys per block of queries, keep a budget of tokens",
        ),
        Method(
            "rectified_spattn",
            "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
            "2511.19835",
            "exact",
            "attend to critical blocks, rescale, add what the skipped blocks pool to",
        ),
        Method(
            "paro_attention",
            "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized "
            "Attention in Visual Generation Models",
            "2506.16054",
            "exact",
            "reorder a video's tokens so that attention becomes blocks, keep fixed ones",
        ),
        Method(
            "razor_attention",
            "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
            "2407.15891",
            "exact",
            "non-retrieval heads keep sinks, recent tokens and one weighted mean token",
        ),
        Method(
            "landmark",
            "Landmark Attention: Random-Access Infinite Context Length for Transformers",
            "2305.16300",
            "exact",
            "see earlier blocks through their landmark token, in a two-level softmax",
        ),
        Method(
            "prompt_distill",
            "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for "
            "Efficient Large Language Model Inference",
            "2503.23274",
            "exact",
            "from one layer on keep the prompt tokens that the last one attends to most",
        ),
        Method(
            "zero_tuning",
            "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models "
            "Without Training",
            "2505.11739",
            "exact",
            "scale each head's attention to the first token, from the lse alone",
        ),
        Method(
            "gated_attention",
            "Gated Attention for Large Language Models: Non-linearity, Sparsity, and "
            "Attention-Sink-Free",
            "2505.06708",
            "exact",
            "a sigmoid gate on the attention output, per head or per element",
        ),
        Method(
            "token_recycling",
            "Turning Trash into Treasure: Accelerating Inference of Large Language Models "
            "with Token Recycling",
            "2408.08696",
            "exact",
            "draft a tree from an adjacency table, verify it in one forward pass",
        ),
        Method(
            "tah",
            "Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models",
            "2511.08577",
            "exact",
            "a token sees earlier positions of no later iteration",
        ),
        Method(
            "free_cache",
            "FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV "
            "Caching and Guided Diffusion",
            "2505.21467",
            "exact",
            "diffusion language models keep the keys of finished blocks",
        ),
        Method(
            "cartridges",
            "Cartridges: Lightweight and General-Purpose Long Context Representations via "
            "Self-Study",
            "2506.06266",
            "exact",
            "one trained KV prefix, read once for all sequences of a batch",
        ),
        Method(
            "kivi",
            "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
            "2402.02750",
            "exact",
            "keys in 2 bits per channel, values in 2 bits per token, recent ones as they are",
        ),
        Method(
            "tca_attention",
            "Training-free Context-adaptive Attention for Efficient Long Context Modeling",
            "2512.09238",
            "approximate",
            "each head keeps the least redundant tokens of every block",
        ),
        Method(
            "act_qkv",
            "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context "
            "LLMs Inference",
            "2502.13542",
            "approximate",
            "a probe query that stresses unusual queries retrieves blocks of keys",
        ),
        Method(
            "kv_share",
            "KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV "
            "Cache Reuse",
            "2503.16525",
            "approximate",
            "reuse another request's cache, recompute the tokens that deviate most",
        ),
        Method(
            "arkv",
            "ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory "
            "Budget for Long-Context Inference in LLMs",
            "2603.08727",
            "approximate",
            "one cache of tokens in full precision, tokens in fp8 and evicted ones",
        ),
        Method(
            "kv_merger",
            "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on "
            "Long-Context Tasks",
            "2407.08454",
            "approximate",
            "runs of neighbouring keys that are alike become one, weighted around a pivot",
        ),
        Method(
            "ems",
            "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based "
            "on Global-Local Importance",
            "2412.08521",
            "approximate",
            "each head evicts its least important tokens, merges the middle ones into kept ones",
        ),
        Method(
            "importance_bits",
            "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
            "2503.01820",
            "approximate",
            "tokens that receive more attention are packed in more bits",
        ),
    )
}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(sorted(METHODS))}")
    return METHODS[name]
