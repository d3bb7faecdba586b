"""A run's adapter -> a folder that plain PEFT, vLLM and others load, without a path of this machine in it."""

import json
import shutil
from pathlib import Path

from peft import LoraConfig

from intern.exporting.job import DTYPES, Job, write_tokenizer
from intern.exporting.proof import Consumer
from intern.exporting.transformers_consumer import TransformersConsumer
from intern.runs.files import open_file
from intern.runs.untrusted import json_object

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(job: Job, folder: Path) -> None:
    """Write the adapter as it was trained, its configuration with the base's name, and the tokenizer."""
    run = job.run
    with open_file(run.adapter / _WEIGHTS, run.path) as source, (folder / _WEIGHTS).open("wb") as target:
        shutil.copyfileobj(source, target)
    # Keys of a newer PEFT stay; what names a place or a file of this machine does not.
    values = json_object(run.adapter / _CONFIG, run.path) | {
        "base_model_name_or_path": job.base_name,
        "inference_mode": True,
    }
    values["revision"] = job.cfg.model.get("revision") if job.on_hub else None
    known = {
        key: value for key, value in values.items() if key in LoraConfig.__dataclass_fields__ or key == "peft_version"
    }
    (folder / _CONFIG).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(job, folder)


def adapter_consumer(job: Job, folder: Path) -> Consumer:
    """Load the folder as the card says: the base quantized as in training, and PEFT's adapter on it."""
    dtype = job.precision.dtype
    return TransformersConsumer.adapter(folder, job.base.name, job.quantization, dtype, job.prompt.stop_ids)


def code(job: Job) -> str:
    """Return Python that asks the adapter with transformers and PEFT alone."""
    quantization = job.quantization
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if quantization is not None else ""),
        "",
    ]
    loading = (
        f'AutoModelForCausalLM.from_pretrained("{job.base_name}", dtype=torch.{job.settings.dtype}, device_map="auto"'
    )
    assert job.settings.dtype in DTYPES
    if quantization is not None:
        keys = {
            key: value
            for key, value in quantization.to_diff_dict().items()
            if key.startswith(("load_in_", "bnb_4bit_"))
        }
        keys["bnb_4bit_compute_dtype"] = job.settings.dtype
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(keys.items()))
        lines.append(f"quantized = BitsAndBytesConfig({shown})")
        loading += ", quantization_config=quantized"
    return "\n".join(
        [
            *lines,
            f"base = {loading})",
            'model, tokenizer = PeftModel.from_pretrained(base, "."), AutoTokenizer.from_pretrained(".")',
        ]
    )
