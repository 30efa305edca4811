"""Writes gguf_blocks.inc: random blocks of every GGUF type that is decoded, with the values that the PyPI package
`gguf` decodes them to.

  make_gguf_vectors.py > gguf_blocks.inc        (needs numpy and gguf; run with gguf 0.19.0)

Scales are drawn among ordinary f16 values, everything else is random bytes, so that every bit of a block counts.
"""
import importlib.metadata
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

SCALES = {  # byte offsets of the f16 fields
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0], "BF16": [0]}
rng = np.random.default_rng(20230812)

def literal(data):
    h = data.hex()
    return "\n".join(f'     "{h[i:i + 88]}"' for i in range(0, len(h), 88))

print(f"// Written by make_gguf_vectors.py with gguf {importlib.metadata.version('gguf')}: type, blocks, values (f32).")
for name, offsets in SCALES.items():
    values, size = GGML_QUANT_SIZES[T[name]]
    blocks = 1 if values == 256 else 3 if values == 32 else 16
    data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    for o in offsets:
        d = rng.uniform(0.001, 0.1, blocks) * rng.choice([-1, 1], blocks)
        raw = d.astype(np.float32).view(np.uint32) >> 16 if name == "BF16" else d.astype(np.float16).view(np.uint16)
        data[:, o:o + 2] = raw.astype(np.uint16).view(np.uint8).reshape(blocks, 2)
    out = np.asarray(dequantize(data.reshape(-1), T[name]), dtype="<f4")
    assert out.size == blocks * values and np.isfinite(out).all()
    print(f'{{"{name}",\n{literal(data.tobytes())},\n{literal(out.tobytes())}}},')
