"""python scripts/torture_cache.py --kills 20: kills processes while they write caches, then looks at what the next one reads from them.

Each process is forked from this one, which has the libraries loaded, reads and tokenizes rows into an empty datasets cache and loads
the toy through an empty cache of quantized bases, and is ended by SIGKILL at a random moment. The next process does the same with what
was left there, and must get the rows and the model of one that was left alone. Exit code 1 where it does not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # a fork takes no threads along

import datasets
import torch
from omegaconf import OmegaConf
from transformers import BitsAndBytesConfig

from intern.data.files import DataFile, read_rows
from intern.data.prompt import Prompt
from intern.data.tokenize import tokenize
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import FourBit
from intern.paths import PROJECT

ROWS = 6000


def work(rows: Path, folder: Path) -> str:
    """Fills both caches in `folder`; a hash of all tokens and of the model's answer to some of them."""
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    datasets.disable_progress_bars()
    base = Base(
        OmegaConf.create(
            {
                "pretrained_model_name_or_path": str(PROJECT / "data/tiny_llama3"),
                "quantized_cache": str(folder / "quantized"),
                "quantized_cache_gib": 1,
            }
        )
    )
    tokenizer = base.tokenizer()
    prompt = Prompt.from_tokenizer(tokenizer, "You answer.", "never")
    read = read_rows(DataFile.find(str(rows), "data.train_file"), needs_material=False)
    tokens = tokenize(read, tokenizer, prompt, 512, None).rows
    told = hashlib.sha256(json.dumps(tokens.to_list()).encode())
    quant = FourBit(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    model = base.load(quant, Precision("cpu", torch.float32, False, False)).eval()
    with torch.no_grad():
        told.update(model(input_ids=torch.arange(32).reshape(1, 32)).logits.numpy().tobytes())
    return told.hexdigest()


def forked(rows: Path, folder: Path, after: float | None) -> tuple[str | None, float]:
    """What a process of its own got, None where it was killed `after` so many seconds or failed; and how long it took."""
    start, result = time.monotonic(), folder / "result"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        result.write_text(work(rows, folder))
        os._exit(0)
    if after is not None:
        time.sleep(after)  # the moment of the kill, in seconds
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return (result.read_text() if status == 0 else None), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, wrong, landed = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        lines = [
            json.dumps({"question": f"How much is {n} and {n}?", "answer": f"It is {2 * n}."}) for n in range(ROWS)
        ]
        rows.write_text("\n".join(lines), encoding="utf-8")

        def empty() -> Path:
            return Path(tempfile.mkdtemp(dir=place))

        expected, seconds = forked(rows, empty(), None)
        for number in range(args.kills):
            folder = empty()
            killed, _ = forked(rows, folder, draw.uniform(0.02, 0.85) * seconds)
            landed += killed is None
            found, _ = forked(rows, folder, None)
            wrong += found != expected
            print(f"kill {number + 1}: {'the same as ever' if found == expected else 'SOMETHING ELSE'}", flush=True)
    print(f"{landed} of {args.kills} kills came before the end; {wrong} times the next process got something else")
    return int(bool(wrong) or expected is None)


if __name__ == "__main__":
    sys.exit(main())
