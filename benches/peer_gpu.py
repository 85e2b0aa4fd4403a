"""The peers of `headwater bench synth` and `headwater bench train` on a GPU: transformers and PyTorch.

    pip install torch transformers
    python benches/peer_gpu.py generate --shape 7b --requests 1024 --prompt-tokens 512 --output-tokens 256
    python benches/peer_gpu.py train --shape 500m --batch 8 --steps 10 --mode compile --peak 989e12

`generate` answers random prompts, greedily and to the full length, by continuous batching: with flash
attention where flash-attn is installed, otherwise with sdpa and one mask over all requests. Its cache takes
most of a GPU's memory, and `memory_bytes` shows that. `--static` is plain `generate`, which loses nothing
where all lengths are equal. One request warms up before the time is taken.

`train` takes steps on one batch of random tokens: sdpa attention, weights and fused AdamW in f32, products in
bf16 by autocast unless `--dtype f32`, gradients clipped to norm 1. Two steps warm up. As in `headwater bench
train`, `tokens_per_s` and `mfu` are of all steps that count, and `step_ms` is their median. Operations of a
token are those of `training_flops_per_token` in src/model/config.rs: six for each weight of a matrix product
(the head is one, looking up embeddings is none) and 12 x layers x hidden x length / 2 for attention; `--peak`
is what the device does a second.

Both run on `--device cpu`, with small counts. One line of JSON is printed.
"""

import argparse
import json
import os
import resource
import time
from statistics import median_high

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # flash attention is not looked for on a network
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

# src/model/shape.rs: vocabulary, hidden, middle, layers, heads, key and value heads, context; none is tied
SHAPES = {
    "10m": (8192, 256, 1024, 6, 8, 4, 2048),
    "110m": (32_000, 768, 2048, 12, 12, 4, 2048),
    "500m": (32_000, 1536, 4320, 16, 24, 24, 2048),
    "1.3b": (32_000, 2048, 8192, 20, 32, 8, 2048),
    "7b": (32_000, 4096, 14_336, 32, 32, 8, 4096),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SEED = 9
WARM_UP_STEPS = 2
PAGE_TOKENS = 256
CPU_BATCH_TOKENS = 1024


def random_model(shape, dtype, device):
    vocabulary, hidden, middle, layers, heads, key_value, context = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value, max_position_embeddings=context,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def random_tokens(shape, count, length):
    return torch.randint(SHAPES[shape][0], (count, length), generator=torch.Generator().manual_seed(SEED))


def seconds_now(device):
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_bytes(device):
    """The most memory of tensors on a GPU, or the most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def continuous(model, prompts, settings, given):
    """The answers by continuous batching. The manager with its cache is kept from call to call."""
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, max_requests_per_batch=min(given.requests, given.sequences or 1024),
        allow_block_sharing=False,
    )
    if given.device.type == "cpu":  # by default the cache takes 60 % of all memory
        pages = (given.prompt_tokens + given.output_tokens) // PAGE_TOKENS + 1
        config.num_blocks, config.max_batch_tokens = given.requests * pages, CPU_BATCH_TOKENS
    answers = model.generate_batch(
        prompts.tolist(), settings, continuous_batching_config=config, persistent_manager=True
    ).values()
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors or len(answers) < len(prompts):
        raise SystemExit(f"{len(answers)} of {len(prompts)} requests answered, errors {errors[:1]}")
    return [answer.generated_tokens for answer in answers]


def static(model, prompts, settings, given):
    """The answers by plain generate, a batch after the other."""
    answers = []
    for batch in prompts.split(given.sequences or given.requests):
        batch = batch.to(given.device)
        ids = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=settings)
        answers += ids[:, batch.shape[1] :].tolist()
    return answers


def generate(given):
    model = random_model(given.shape, DTYPES[given.dtype], given.device).eval()
    prompts = random_tokens(given.shape, given.requests, given.prompt_tokens)
    settings = GenerationConfig(max_new_tokens=given.output_tokens, do_sample=False, pad_token_id=0)  # no EOS
    answer = static if given.static else continuous
    answer(model, prompts[:1], settings, given)
    start = seconds_now(given.device)
    answers = answer(model, prompts, settings, given)
    seconds = seconds_now(given.device) - start
    assert {len(tokens) for tokens in answers} == {given.output_tokens}, "answers have other lengths"
    output = given.requests * given.output_tokens
    return {
        "batching": answer.__name__, "sequences": given.sequences, "requests": given.requests,
        "prompt_tokens": given.requests * given.prompt_tokens, "output_tokens": output, "seconds": seconds,
        "tokens_per_s": output / seconds, "requests_per_s": given.requests / seconds,
    }


def operations_per_token(model, length):
    """As `training_flops_per_token` in src/model/config.rs."""
    config = model.config
    products = model.num_parameters() - config.vocab_size * config.hidden_size
    return 6 * products + 12 * config.num_hidden_layers * config.hidden_size * length / 2


def train(given):
    model = random_model(given.shape, torch.float32, given.device).train()
    ids = random_tokens(given.shape, given.batch, given.length).to(given.device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if given.mode == "compile" else model
    seconds = []
    for _ in range(WARM_UP_STEPS + given.steps):
        start = seconds_now(given.device)
        with torch.autocast(given.device.type, torch.bfloat16, enabled=given.dtype == "bf16"):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(seconds_now(given.device) - start)
    seconds = seconds[WARM_UP_STEPS:]
    tokens_per_s = ids.numel() * len(seconds) / sum(seconds)
    figures = {
        "mode": given.mode, "length": given.length, "batch": given.batch, "steps": given.steps,
        "tokens_per_s": tokens_per_s, "step_ms": 1e3 * median_high(seconds), "loss": loss.item(),
    }
    if given.peak:
        figures["mfu"] = operations_per_token(model, given.length) * tokens_per_s / given.peak
    return figures


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, dest="bench")
    command = commands.add_parser("generate")
    for name, count in [("--requests", 1024), ("--prompt-tokens", 512), ("--output-tokens", 256)]:
        command.add_argument(name, type=int, default=count)
    command.add_argument("--sequences", type=int, help="requests at once [default: 1024, static: all]")
    command.add_argument("--static", action="store_true", help="plain generate, not continuous batching")
    command.set_defaults(run=generate)
    command = commands.add_parser("train")
    for name, count in [("--length", 2048), ("--batch", 8), ("--steps", 10)]:
        command.add_argument(name, type=int, default=count)
    command.add_argument("--mode", choices=["eager", "compile"], default="eager")
    command.add_argument("--peak", type=float, metavar="FLOPS", help="operations a second at best, for mfu")
    command.set_defaults(run=train)
    for command in commands.choices.values():
        command.add_argument("--shape", choices=SHAPES, required=True)
        command.add_argument("--device", type=torch.device, default="cuda:0")
        command.add_argument("--dtype", choices=DTYPES, default="bf16")
    return parser.parse_args()


given = arguments()
if given.device.type == "cuda":
    torch.cuda.set_device(given.device)
figures = {"bench": given.bench, "shape": given.shape, "device": str(given.device), "dtype": given.dtype}
figures |= given.run(given)
figures |= {"memory_bytes": memory_bytes(given.device), "torch": torch.__version__}
print(json.dumps(figures | {"transformers": transformers.__version__}))
