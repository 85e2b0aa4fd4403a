"""Records what Hugging Face transformers and PyTorch compute, for tests/outside/parity.rs.

    pip install torch transformers safetensors
    python tests/record_parity.py

Writes small random models of the family to tests/data/parity, with logits, greedy continuations and gradients.
All is computed in f32, whatever type the weights are stored in.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

FOLDER = Path(__file__).parent / "data" / "parity"
LENGTHS = [1, 4, 17, 50]
NEW_TOKENS = 12
SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    initializer_range=0.3, rms_norm_eps=1e-5, tie_word_embeddings=False,
)
ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
MODELS = {
    "llama-grouped-f32": (LlamaForCausalLM, LlamaConfig(**SHAPE), torch.float32, "5GB"),
    "llama-tied-f32": (
        LlamaForCausalLM, LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 4}),
        torch.float32, "5GB",
    ),
    "llama3-rope-sharded-bf16": (
        LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=ROPE), torch.bfloat16, "20KB",
    ),
    "mistral-window-f16": (
        MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=8, attn_implementation="eager"),
        torch.float16, "5GB",
    ),
    "mistral-tied-window-f32": (
        MistralForCausalLM,
        MistralConfig(**{**SHAPE, "tie_word_embeddings": True}, sliding_window=5, attn_implementation="eager"),
        torch.float32, "5GB",
    ),
}


def record(name, kind, config, dtype, shard_size):
    torch.manual_seed(len(name))
    folder = FOLDER / name
    model = kind(config).to(dtype)
    with torch.no_grad():  # normalisations that do something
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    out = {}
    with torch.no_grad():
        for index, length in enumerate(LENGTHS):
            ids = torch.randint(3, config.vocab_size, (1, length))
            out[f"ids.{index}"] = ids[0].to(torch.uint32)
            out[f"logits.{index}"] = model(ids).logits[0].contiguous()
            greedy = []
            for _ in range(NEW_TOKENS):
                best = model(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], 1)
                greedy.append(best)
            out[f"greedy.{index}"] = torch.stack(greedy).to(torch.uint32)
    # Mean loss over all tokens that have a token before them in their own item, and its gradients.
    total = sum(length - 1 for length in LENGTHS)
    loss = 0
    for index in range(len(LENGTHS)):
        ids = out[f"ids.{index}"].to(torch.int64)
        if len(ids) > 1:
            logits = model(ids[None]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum") / total
    loss.backward()
    out["loss"] = loss.detach().reshape(1)
    for key, parameter in model.named_parameters():
        out[f"gradient.{key}"] = parameter.grad.contiguous()
    save_file(out, folder / "recorded.safetensors")
    record_packed(model, [out[f"ids.{index}"].to(torch.int64) for index in range(len(LENGTHS))], folder)


def record_packed(model, items, folder):
    """Loss and gradients of two rows that hold all items, as a trainer sees them: padded, with a mask that keeps
    items (and windows) apart, positions from the start of each item, and a part of the tokens not learned."""
    rows = [items[:-1], items[-1:]]
    width = max(sum(map(len, row)) for row in rows)
    ids, positions = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    targets = torch.full((len(rows), width), -100)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    window = getattr(model.config, "sliding_window", None) or width
    out = {}
    for index, row in enumerate(rows):
        learned = torch.rand(sum(map(len, row))) < 0.7
        start = 0
        for item in row:
            end = start + len(item)
            ids[index, start:end], positions[index, start:end] = item, torch.arange(len(item))
            targets[index, start : end - 1] = item[1:].masked_fill(~learned[start + 1 : end], -100)
            ones = torch.ones(len(item), len(item), dtype=torch.bool)
            seen[index, start:end, start:end] = ones.tril() & ones.triu(1 - window)
            start = end
        out[f"tokens.{index}"] = ids[index, :start].to(torch.uint32)
        out[f"lengths.{index}"] = torch.tensor([len(item) for item in row], dtype=torch.uint32)
        out[f"learned.{index}"] = learned.to(torch.uint32)
    mask = torch.zeros(len(rows), 1, width, width).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    out["loss"] = loss.detach().reshape(1)
    for key, parameter in model.named_parameters():
        out[f"gradient.{key}"] = parameter.grad.contiguous()
    save_file(out, folder / "packed.safetensors")


for name, (kind, config, dtype, shard_size) in MODELS.items():
    record(name, kind, config, dtype, shard_size)
    print(name, sorted(path.name for path in (FOLDER / name).iterdir()))
    json.loads((FOLDER / name / "config.json").read_text())
