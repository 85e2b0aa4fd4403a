"""The loss curve of `headwater train` beside that of PyTorch: same initial weights, same batches, f32.

    pip install torch transformers pyarrow
    python benches/peer_curve.py start MODEL
    headwater train --shards RUN --model MODEL --batch 4 --rate 1e-3 --out TRAINED
    python benches/peer_curve.py compare MODEL RUN TRAINED

`start` writes a random model of the shape 2m as a Hugging Face directory. `compare` trains transformers' Llama from
it on the packed sequences of RUN: attention within items, positions from the start of each, AdamW that decays
matrices only. Batch size and constants are those in TRAINED/run.json; the rate of each step and the losses to
compare with are those in TRAINED/metrics.jsonl. It prints the largest relative difference of the losses.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parent.parent / "assets" / "synthesizer"
SHAPE = dict(
    vocab_size=6144, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2,
)
SEED = 1
SAY_EVERY = 100


def start(directory):
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(TOKENIZER / name, directory)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sequences(shards, passes):
    """The sequences of a run in the order of its manifest, one after the other."""
    for _ in range(passes):
        for epoch in json_lines(shards / "manifest.jsonl"):
            for file in epoch["files"]:
                if file["name"].startswith("packed/"):
                    yield from parquet.read_table(shards / file["name"]).to_pylist()


def batches(items, size):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def inputs(batch):
    """Ids, positions, the mask (true: is seen) and the targets (-100: not learned) of a batch."""
    length = max(len(sequence["input_ids"]) for sequence in batch)
    ids, positions = (torch.zeros(len(batch), length, dtype=torch.long) for _ in range(2))
    targets = torch.full((len(batch), length), -100)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)
    for row, sequence in enumerate(batch):
        tokens = torch.tensor(sequence["input_ids"])
        learned = torch.tensor(sequence["loss_mask"])
        ids[row, : len(tokens)] = tokens
        positions[row, : len(tokens)] = torch.tensor(sequence["position_ids"])
        begin = 0
        for segment in sequence["segments"]:
            end = begin + segment["length"]
            mask[row, begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
            following = tokens[begin + 1 : end].masked_fill(~learned[begin + 1 : end], -100)
            targets[row, begin : end - 1] = following
            begin = end
    return ids, positions, mask[:, None], targets


def compare(directory, shards, trained):
    run = json.loads((trained / "run.json").read_text())
    settings, constants = run["training"], run["training"]["optimizer"]
    ours = json_lines(trained / "metrics.jsonl")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": constants["weight_decay"]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (constants["beta1"], constants["beta2"])
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=constants["epsilon"])
    theirs, began = [], time.perf_counter()
    for line, batch in zip(ours, batches(sequences(shards, run["passes"]), settings["batch_sequences"])):
        ids, positions, mask, targets = inputs(batch)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, constants["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        learned = int((targets >= 0).sum())
        assert learned == line["learned"], f"step {line['step']}: {learned} learned, not {line['learned']}"
        theirs.append({"step": line["step"], "loss": loss.item(), "grad_norm": norm.item()})
        if line["step"] % SAY_EVERY == 0:
            say(ours, theirs, time.perf_counter() - began)
    (trained / "pytorch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in theirs))
    say(ours, theirs, time.perf_counter() - began)


def say(ours, theirs, seconds):
    """Largest relative differences so far."""
    def worst(field):
        return max((abs(b[field] / a[field] - 1), a["step"]) for a, b in zip(ours, theirs))

    (loss, at), (norm, norm_at) = worst("loss"), worst("grad_norm")
    a, b = ours[len(theirs) - 1], theirs[-1]
    print(
        f"step {b['step']}: loss {a['loss']:.6f}, PyTorch {b['loss']:.6f}; largest relative difference of losses "
        f"{loss:.2e} (step {at}), of gradient norms {norm:.2e} (step {norm_at}); {seconds:.0f} s",
        flush=True,
    )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(required=True)
command = commands.add_parser("start")
command.add_argument("model", type=Path)
command.set_defaults(run=lambda given: start(given.model))
command = commands.add_parser("compare")
for name in ["model", "shards", "trained"]:
    command.add_argument(name, type=Path)
command.set_defaults(run=lambda given: compare(given.model, given.shards, given.trained))
given = parser.parse_args()
given.run(given)
