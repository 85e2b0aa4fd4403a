"""Checks that transformers loads an exported model and computes the same logits as from the original.

    HEADWATER_EXPORT=/tmp/export cargo test --release -p headwater-tests export
    python tests/check_export.py /tmp/export
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

originals = Path(__file__).parent / "data" / "parity"
for export in sorted(Path(sys.argv[1]).iterdir()):
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        expected, found = load(originals / export.name)(ids).logits, load(export)(ids).logits
    assert torch.equal(expected, found), f"{export.name}: {(expected - found).abs().max()}"
    print(export.name, "equal", tuple(found.shape))
