"""ONNX Runtime's GroupQueryAttention on its int8 and int4 caches: one scale a tensor."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from torch import Tensor

_CACHE_TYPES = {4: (TensorProto.UINT8, np.uint8, 2), 8: (TensorProto.INT8, np.int8, 1)}


def _model(heads_q: int, heads_kv: int, head_dim: int, capacity: int, bits: int) -> onnx.ModelProto:
    kind, _, codes_per_byte = _CACHE_TYPES[bits]
    cache = [1, heads_kv, capacity, head_dim // codes_per_byte]

    def value(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    float_, int_ = TensorProto.FLOAT, TensorProto.INT32
    inputs = [
        value("query", float_, [1, 1, heads_q * head_dim]),
        value("key", float_, [1, 1, heads_kv * head_dim]),
        value("value", float_, [1, 1, heads_kv * head_dim]),
        value("past_key", kind, cache),
        value("past_value", kind, cache),
        value("seqlens_k", int_, [1]),
        value("total_sequence_length", int_, [1]),
        value("k_scale", float_, [1]),
        value("v_scale", float_, [1]),
    ]
    outputs = [
        value("output", float_, [1, 1, heads_q * head_dim]),
        value("present_key", kind, cache),
        value("present_value", kind, cache),
    ]
    names = [i.name for i in inputs]
    node = helper.make_node(
        "GroupQueryAttention",
        [*names[:7], "", "", "", "", "", "k_scale", "v_scale"],
        [o.name for o in outputs],
        domain="com.microsoft",
        num_heads=heads_q,
        kv_num_heads=heads_kv,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        kv_cache_bit_width=bits,
    )
    graph = helper.make_graph([node], "decode", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Attention:
    """One decode step: a new token is appended to N - 1 cached ones, in place, and attends to N."""

    def __init__(
        self, q: Tensor, heads_kv: int, tokens: int, bits: int, threads: int, seed: int = 0
    ):
        heads_q, head_dim = q.shape
        _, dtype, codes_per_byte = _CACHE_TYPES[bits]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = _model(heads_q, heads_kv, head_dim, tokens, bits)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        random = np.random.default_rng(seed)
        shape = (1, heads_kv, tokens, head_dim // codes_per_byte)
        info = np.iinfo(dtype)
        self.values = {
            "query": q.float().reshape(1, 1, -1).numpy(),
            "key": random.standard_normal((1, 1, heads_kv * head_dim), np.float32),
            "value": random.standard_normal((1, 1, heads_kv * head_dim), np.float32),
            "past_key": random.integers(info.min, info.max, shape, dtype, endpoint=True),
            "past_value": random.integers(info.min, info.max, shape, dtype, endpoint=True),
            "seqlens_k": np.array([tokens - 1], np.int32),
            "total_sequence_length": np.array([tokens], np.int32),
            "k_scale": np.array([0.02], np.float32),
            "v_scale": np.array([0.02], np.float32),
        }
        self.binding = self.session.io_binding()
        held = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in self.values.items()
        }
        for name, array in held.items():
            self.binding.bind_ortvalue_input(name, array)
        self.binding.bind_ortvalue_output("present_key", held["past_key"])
        self.binding.bind_ortvalue_output("present_value", held["past_value"])
        self.binding.bind_output("output", "cpu")

    def __call__(self) -> np.ndarray:
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0]
