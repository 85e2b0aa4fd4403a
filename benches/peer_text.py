"""The peer of `headwater bench text`: datasets and tokenizers read JSON Lines, tokenise and pack.

    pip install datasets tokenizers zstandard
    python benches/peer_text.py assets/synthesizer/tokenizer.json corpus.jsonl.zst …

One process and one thread, as the figure beside it. It reads, tokenises, concatenates and cuts into
sequences, and writes Parquet: no pairs, no templates, no mix and no account.
"""

import itertools
import os
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from datasets import disable_progress_bars, load_dataset
from tokenizers import Tokenizer

LENGTH = 2048


def main(tokenizer_file, *files):
    disable_progress_bars()
    tokenizer = Tokenizer.from_file(tokenizer_file)

    def tokenise(rows):
        return {"input_ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(rows["text"])]}

    def pack(rows):
        ids = list(itertools.chain.from_iterable(rows["input_ids"]))
        end = len(ids) // LENGTH * LENGTH
        return {"input_ids": [ids[at : at + LENGTH] for at in range(0, end, LENGTH)]}

    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        rows = load_dataset("json", data_files=list(files), split="train", cache_dir=place)
        rows = rows.select_columns(["text"])
        tokenised = rows.map(tokenise, batched=True, remove_columns=["text"])
        packed = tokenised.map(pack, batched=True)
        packed.to_parquet(f"{place}/packed.parquet")
        seconds = time.perf_counter() - start
        size = sum(len(text.encode()) for text in rows["text"])
    print(f"{size / 1e6:.1f} MB of text, {len(packed)} sequences in {seconds:.2f} s: {size / 1e6 / seconds:.2f} MB/s")


main(*sys.argv[1:])
