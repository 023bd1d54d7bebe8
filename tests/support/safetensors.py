"""Reading and writing of whole safetensors files, for tests that damage them."""

import json
import pathlib

import numpy as np

from eep_jax.storage.safetensors_files import DTYPES, SafetensorsFile


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    data, file, found = path.read_bytes(), SafetensorsFile(path), {}
    for key in file.tensors:
        span = file.span(key)
        flat = np.frombuffer(data, span.dtype, span.count, span.start)
        found[key] = flat.reshape(span.shape).copy()
    return found


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at, data = {}, 0, []
    for key, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[key] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(raw)],
        }
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    path.unlink(missing_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
