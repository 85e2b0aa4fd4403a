"""The rate of PyTorch's bf16 products in the shapes of model M: 512 rows, twelve layers with weights of their own.

The ceiling that prompts of `headwater bench synth --model 110m --dtype bf16` are compared to in RESULTS.md.
Needs torch; prints the rate of three turns of a second, on two threads.
"""

import time

import torch

ROWS, LAYERS, THREADS = 512, 12, 2
# inputs, outputs: q, k and v together; o; gate and up together; down
SHAPES = [(768, 1280), (768, 768), (768, 4096), (2048, 768)]

torch.set_num_threads(THREADS)
rows = [torch.randn(ROWS, inputs).bfloat16() for inputs, _ in SHAPES]
layers = [[torch.randn(outputs, inputs).bfloat16() for inputs, outputs in SHAPES] for _ in range(LAYERS)]
operations = LAYERS * sum(2 * ROWS * inputs * outputs for inputs, outputs in SHAPES)
for _ in range(3):
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        for weights in layers:
            for x, weight in zip(rows, weights):
                torch.nn.functional.linear(x, weight)
        done += operations
    print(f"{done / (time.perf_counter() - start) / 1e9:.0f} GFLOP/s", flush=True)
