// Every torch.ops.tokred.* schema: the table of contents of the library.
// B batch, N tokens, C channels, M output slots, H heads, L queries, D head size. Indices are i32,
// scores, sizes and biases f32 (f64 beside f64 inputs). Positional arguments only, so that autocast
// can forward every call.
#pragma once

namespace tokred {

inline constexpr const char* kSchemas[] = {
    // match: bipartite matching ------------------------------------------------------------------
    // a [B,Na,C], b [B,Nb,C], masks bool [B,N*], weights f32 [B,N*] -> score f32 [B,Na],
    // index i32 [B,Na]
    "match(Tensor a, Tensor b, Tensor? mask_a=None, Tensor? mask_b=None, Tensor? weight_a=None, "
    "Tensor? weight_b=None, str metric=\"cosine\", int band=-1) -> (Tensor, Tensor)",
    // metric [B,N,C], mask bool [B,N], sources i32 [B|1,Ns], destinations i32 [B|1,Nd]
    // -> token_map i32 [B,N], slots 0 .. N-min(r, limit)-1
    "bipartite_soft_matching(Tensor metric, SymInt r, int num_prefix=0, Tensor? mask=None, "
    "str order=\"tome\", Tensor? sources=None, Tensor? destinations=None) -> Tensor",
    // as above, every edge above the threshold -> token_map i32 [B,N], num_out i32 [B]
    "threshold_matching(Tensor metric, float threshold, int num_prefix=0, Tensor? mask=None, "
    "str order=\"tome\", Tensor? sources=None, Tensor? destinations=None) -> (Tensor, Tensor)",

    // merge: applying a map ----------------------------------------------------------------------
    // x [B,N,C], token_map i32 [B,N], size and weight f32 [B,N] -> y [B,M,C], size f32 [B,M]
    "merge(Tensor x, Tensor token_map, SymInt num_out, Tensor? size=None, Tensor? weight=None, "
    "str mode=\"mean\") -> (Tensor, Tensor)",
    // the same into caller-owned out [B,M,C] and out_size f32 [B,M]; torch's functionalization of
    // mutating ops has an argument of its own called `mode`
    "merge_out(Tensor x, Tensor token_map, Tensor? size, Tensor? weight, str merge_mode, "
    "Tensor(a!) out, Tensor(b!) out_size) -> ()",
    // grad_y [B,M,C], grad_size f32 [B,M] -> grad_x [B,N,C], grad_size f32 [B,N],
    // grad_weight f32 [B,N]
    "merge_backward(Tensor grad_y, Tensor grad_size, Tensor x, Tensor token_map, Tensor? size, "
    "Tensor? weight, str mode) -> (Tensor, Tensor, Tensor)",
    // y [B,M,C], token_map i32 [B,N] -> [B,N,C]; tokens mapped to no slot are 0
    "unmerge(Tensor y, Tensor token_map) -> Tensor",
    // second i32 [B,M], first i32 [B,N] -> i32 [B,N]: second[first], -1 where either drops
    "compose(Tensor second, Tensor first) -> Tensor",

    // sparse_attn: attention over a chosen part --------------------------------------------------
    // q [B,Hq,L,D], k [B,Hkv,N,D], v [B,Hkv,N,Dv], key_bias f32 [B|1,Hkv|1,N],
    // mask bool [B|1,Hq|1,L|1,N] -> out [B,Hq,L,Dv], lse f32 [B,Hq,L]
    "biased_attention(Tensor q, Tensor k, Tensor v, Tensor? key_bias=None, bool causal=False, "
    "float? scale=None, Tensor? mask=None) -> (Tensor, Tensor)",
    // grad_out [B,Hq,L,Dv], grad_lse f32 [B,Hq,L] -> grad of q, k, v and key_bias (full shape
    // f32 [B,Hkv,N]; empty where key_bias is absent)
    "biased_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? key_bias, Tensor out, Tensor lse, bool causal, float? scale, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
};

}  // namespace tokred
