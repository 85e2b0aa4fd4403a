"""The rate of PyTorch's products in the shapes of model M: twelve layers with weights of their own, two threads.

    python benches/products.py [bf16|f32] [ROWS]

The ceilings that `headwater bench synth --model 110m --dtype bf16` (512 rows, as by default) and `headwater bench train
--model 110m --dtype f32` (1,024 rows, a micro-batch) are compared to in RESULTS.md. Needs torch; prints the rate of three
turns of two seconds.
"""

import sys
import time

import torch

LAYERS, THREADS, SECONDS = 12, 2, 2.0
# inputs, outputs: q, k and v together; o; gate and up together; down
SHAPES = [(768, 1280), (768, 768), (768, 4096), (2048, 768)]

dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[sys.argv[1] if len(sys.argv) > 1 else "bf16"]
count = int(sys.argv[2]) if len(sys.argv) > 2 else 512
torch.set_num_threads(THREADS)
rows = [torch.randn(count, inputs).to(dtype) for inputs, _ in SHAPES]
layers = [[torch.randn(outputs, inputs).to(dtype) for inputs, outputs in SHAPES] for _ in range(LAYERS)]
operations = LAYERS * sum(2 * count * inputs * outputs for inputs, outputs in SHAPES)
for _ in range(3):
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for weights in layers:
            for x, weight in zip(rows, weights):
                torch.nn.functional.linear(x, weight)
        done += operations
    print(f"{done / (time.perf_counter() - start) / 1e9:.0f} GFLOP/s", flush=True)
