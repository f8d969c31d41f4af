// Every torch.ops.tokred.* schema: the table of contents of the library.
// B batch, N tokens, C channels, M output slots, H heads, L queries, D head size. Indices are i32,
// scores, sizes and biases f32 (f64 beside f64 inputs). Positional arguments only, so that autocast
// can forward every call.
#pragma once

namespace tokred {

inline constexpr const char* kSchemas[] = {
    // topk: choosing entries of a row -------------------------------------------------------------
    // scores [..,N], lengths and row_k i32 [..], must_keep bool [..,N] -> values f32 [..,k],
    // indices i32 [..,k], counts i32 [..]; [..,ceil(N/block_size),k] with block_size > 0
    "topk(Tensor scores, SymInt k, Tensor? lengths=None, str order=\"score\", Tensor? row_k=None, "
    "int num_sinks=0, int num_locals=0, Tensor? must_keep=None, float? top_p=None, int min_k=1, "
    "float? threshold=None, SymInt block_size=0) -> (Tensor, Tensor, Tensor)",
    // selected bool or float [..,N], lengths i32 [..] -> indices i32 [..,capacity or N], counts
    "compact(Tensor selected, float? threshold=None, SymInt? capacity=None, "
    "Tensor? lengths=None) -> (Tensor, Tensor)",
    // tensors [B,N,..] (token_dim 1) or [B,H,N,..] (2), indices i32 [B,K] or [B,H,K] -> the same
    // with K tokens
    "gather_tokens(Tensor[] tensors, Tensor indices, int[] token_dims) -> Tensor[]",
    // scores [..,N], mask bool [..,N] -> indices i32 [..,num_samples], counts i32 [..]
    "inverse_transform_sample(Tensor scores, SymInt num_samples, Tensor? mask=None) "
    "-> (Tensor, Tensor)",

    // score: importance and similarity, never N x N --------------------------------------------
    // q [B,Hq,L,D], k [B,Hkv,N,D], dims i32 [Hq,F], lengths i32 [B], mask bool [B|1,N],
    // slots i32 [B,N] -> f32 [B,Hq|Hkv|1,N]
    "qk_score(Tensor q, Tensor k, str reduce=\"none\", Tensor? dims=None, float? scale=None, "
    "Tensor? lengths=None, Tensor? mask=None, Tensor? slots=None) -> Tensor",
    // x [B,H,N,D], boundaries i32 [B|1,M+1] -> pooled f32 [B,H,M,1|2,D], counts i32 [B,M]
    "block_pool(Tensor x, SymInt block_size=0, str statistic=\"mean\", Tensor? boundaries=None, "
    "Tensor? lengths=None, Tensor? mask=None) -> (Tensor, Tensor)",
    // q [B,Hq,L,D] (deviation: f32 [B,Hq,L,2,D]), pooled [B,Hkv,M,1|2,D], counts i32 [B|1,M]
    // -> f32 [B,Hq|Hkv|1,L,M]
    "block_score(Tensor q, Tensor pooled, Tensor? counts=None, str rule=\"dot\", "
    "str reduce=\"none\", float? scale=None) -> Tensor",
    // q [B,Hq,L,D], k [B,Hkv,N,D], mask bool [B|1,Hq|1,L|1,N] -> f32 [B,Hq,L,N]
    "attention_rows(Tensor q, Tensor k, bool softmax=True, SymInt first=0, SymInt? last=None, "
    "bool causal=False, float? scale=None, Tensor? mask=None) -> Tensor",
    // lse f32 [B,Hq,L], weight f32 [B|1,Hq|1,L] -> f32 [B,Hq,N]
    "attention_columns(Tensor q, Tensor k, Tensor lse, str reduce=\"sum\", Tensor? weight=None, "
    "bool causal=False, float? scale=None, Tensor? mask=None) -> Tensor",
    // lse f32 [B,Hq,N], start f32 [B|1,Hq|1,N] -> f32 [B,Hq,N]
    "pagerank(Tensor q, Tensor k, Tensor lse, int iterations, float damping=0.0, "
    "Tensor? start=None, bool causal=False, float? scale=None, Tensor? mask=None) -> Tensor",
    // a [B,Na,C], b [B,Nb,C], masks bool [B,N*] -> mean, variance, greatest f32 [B,Na],
    // index, count i32 [B,Na], energy f32 [B,Na]
    "similarity_stats(Tensor a, Tensor b, str metric=\"cosine\", float threshold=0.0, "
    "str energy=\"none\", float margin=0.0, bool exclude_self=False, SymInt block_size=0, "
    "Tensor? mask_a=None, Tensor? mask_b=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    // before, after [B,N,C] -> ratio and cosine f32 [B,N]
    "transition_stats(Tensor before, Tensor after) -> (Tensor, Tensor)",

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
    // mask bool [B|1,Hq|1,L|1,N], positions i32 [B|1,L|N,1|2] -> out [B,Hq,L,Dv], lse f32 [B,Hq,L]
    "biased_attention(Tensor q, Tensor k, Tensor v, Tensor? key_bias=None, bool causal=False, "
    "float? scale=None, Tensor? mask=None, Tensor? query_position=None, "
    "Tensor? key_position=None) -> (Tensor, Tensor)",
    // grad_out [B,Hq,L,Dv], grad_lse f32 [B,Hq,L] -> grad of q, k, v and key_bias (full shape
    // f32 [B,Hkv,N]; empty where key_bias is absent)
    "biased_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? key_bias, Tensor out, Tensor lse, bool causal, float? scale, Tensor? mask, "
    "Tensor? query_position, Tensor? key_position) -> (Tensor, Tensor, Tensor, Tensor)",
    // indices i32 [B,Hq|Hkv|1,ceil(L/block_q),K], rope_* f32 [>=K,D/2], the rest and the results
    // as in biased_attention
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, float? scale=None, "
    "Tensor? key_bias=None, bool causal=False, Tensor? mask=None, SymInt block_q=1, "
    "Tensor? rope_cos=None, Tensor? rope_sin=None) -> (Tensor, Tensor)",
    "sparse_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor indices, Tensor out, Tensor lse, float? scale, Tensor? key_bias, bool causal, "
    "Tensor? mask, SymInt block_q) -> (Tensor, Tensor, Tensor, Tensor)",
    // block_mask bool [B|1,Hq|1,ceil(L/block_q),ceil(N/block_k)]
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask, SymInt block_q, "
    "SymInt block_k, bool causal=False, float? scale=None, Tensor? key_bias=None, "
    "Tensor? mask=None) -> (Tensor, Tensor)",
    "block_sparse_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, "
    "Tensor v, Tensor block_mask, SymInt block_q, SymInt block_k, Tensor out, Tensor lse, "
    "bool causal, float? scale, Tensor? key_bias, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    // out_* [B,H,L,D], lse_* f32 [B,H,L] -> out, lse
    "combine_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",

    // kv_pack: low-bit storage; the bytes are in kv_pack/layout.h ----------------------------------
    // x [B,H,N,D] -> codes u8 [B,H,N,D*bits/8], params f16 [B,H,N | N/group_size,P]
    "kv_pack(Tensor x, int bits, SymInt group_size, str axis, str scheme, bool rotate) "
    "-> (Tensor, Tensor)",
    // -> [B,H,N,D] in the dtype named
    "kv_unpack(Tensor codes, Tensor params, int bits, SymInt group_size, str axis, str scheme, "
    "bool rotated, str dtype) -> Tensor",
    // out [B,H,N,D], the tokens of a head without gaps
    "kv_unpack_into(Tensor codes, Tensor params, int bits, SymInt group_size, str axis, "
    "str scheme, bool rotated, Tensor(a!) out) -> ()",
    // x [B,H,L,D], codes and params of capacity S, window [B,H,W,D], lengths i32 [B],
    // slots i32 [B,capacity]
    "kv_append(Tensor x, Tensor(a!) codes, Tensor(b!) params, Tensor(c!)? window, SymInt length, "
    "int bits, SymInt group_size, str axis, str scheme, bool rotated, Tensor? lengths=None, "
    "Tensor? slots=None) -> ()",

    // packed_attn: attention on packed keys and values ---------------------------------------------
    // q [B,Hq,L,D], codes and params of k and v, residual_* [B,Hkv,W,D|Dv], lengths i32 [B],
    // slots i32 [B,capacity], indices i32 [B,Hq|Hkv|1,L|1,K], mask bool [B|1,Hq|1,L|1,T],
    // key_bias f32 [B|1,Hkv|1,T] -> out [B,Hq,L,Dv], lse f32 [B,Hq,L]
    "packed_attention(Tensor q, Tensor k_codes, Tensor k_params, int k_bits, SymInt k_group_size, "
    "str k_axis, str k_scheme, bool k_rotated, Tensor v_codes, Tensor v_params, int v_bits, "
    "SymInt v_group_size, str v_axis, str v_scheme, bool v_rotated, Tensor? residual_k=None, "
    "Tensor? residual_v=None, float? scale=None, Tensor? indices=None, Tensor? mask=None, "
    "Tensor? key_bias=None, bool causal=False, SymInt? length=None, Tensor? lengths=None, "
    "Tensor? slots=None) -> (Tensor, Tensor)",
    // mask bool [B|1,T] -> f32 [B,Hq|Hkv|1,T]
    "packed_qk_score(Tensor q, Tensor codes, Tensor params, int bits, SymInt group_size, "
    "str axis, str scheme, bool rotated, Tensor? residual=None, str reduce=\"none\", "
    "float? scale=None, SymInt? length=None, Tensor? lengths=None, Tensor? mask=None, "
    "Tensor? slots=None) -> Tensor",
};

}  // namespace tokred
