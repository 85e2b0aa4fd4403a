"""Checks that transformers loads an exported model, computes the same logits as from the original, ends its answers at the
same tokens, and reads the same tokens from a text.

    HEADWATER_EXPORT=/tmp/export cargo test --release -p headwater-tests export
    python tests/check_export.py /tmp/export
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

originals = Path(__file__).parent / "data" / "parity"
for export in sorted(Path(sys.argv[1]).iterdir()):
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        expected, found = load(originals / export.name)(ids).logits, load(export)(ids).logits
    assert torch.equal(expected, found), f"{export.name}: {(expected - found).abs().max()}"
    given, written = load(originals / export.name).config, GenerationConfig.from_pretrained(export)
    for name in ["bos_token_id", "eos_token_id"]:
        assert getattr(written, name) == getattr(given, name), f"{export.name}: {name} {getattr(written, name)}"
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "Rates rose by 0.25 points; the ECB's, too.\n\u00e9t\u00e9"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text, export.name
    print(export.name, "equal", tuple(found.shape))
