"""The peer of benches/generate.rs and benches/train.rs: Hugging Face transformers on the same model and texts.

    pip install torch transformers
    python benches/peer_transformers.py
"""

import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).parent.parent / "assets"
NEW_TOKENS = 128
RUNS = 3


def texts():
    for article in ElementTree.parse(ASSETS / "samples/biomedicine.xml").iter("Article"):
        sections = article.iter("AbstractText")
        named = [(s.get("Label"), "".join(s.itertext())) for s in sections]
        if named:
            title = "".join(article.find("ArticleTitle").itertext())
            body = "\n".join(f"{label}: {text}" if label else text for label, text in named)
            yield re.sub(r"[ \t]+", " ", f"{title}\n\n{body}")


def timed(work):
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(ASSETS / "synthesizer", padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(ASSETS / "synthesizer", dtype=torch.float32)
prompts = [f"<s> <CON> {text} </CON>\n\n" for text in texts()]

for batch in [1, 8, 32]:
    inputs = tokenizer(prompts[:batch], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        run = lambda: model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2
        )
        seconds = timed(run)
    print(f"generate, batch {batch}: {batch * NEW_TOKENS / seconds:.0f} new tokens/s")

ids = tokenizer("".join(prompts), return_tensors="pt", add_special_tokens=False).input_ids[0, : 512 * 8].view(8, 512)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)


def step():
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


step()
print(f"train, 512 x 8, f32: {ids.numel() / timed(step):.0f} tokens/s")
