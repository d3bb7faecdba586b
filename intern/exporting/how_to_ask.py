"""An export -> how to ask it in the program that it is for, as Markdown."""

import json
from pathlib import Path
from typing import Any

from intern.exporting.adapter_folder import code
from intern.exporting.job import Job
from intern.exporting.reference import messages_of

_QUESTION = "..."


def merged(job: Job) -> str:
    """How transformers, vLLM and OpenAI's client ask a merged model."""
    loading = "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        ]
    )
    return f"In transformers:\n\n{_python(loading, job)}\n\n{_served(job, vllm_command('.'))}"


def adapter(job: Job) -> str:
    """How PEFT and vLLM ask an adapter."""
    rank = max([job.cfg.lora.r, *(job.cfg.lora.get("rank_pattern") or {}).values()])
    quantized = "" if job.quantization is None else "--quantization bitsandbytes "
    served = f"vllm serve {job.base_name} {quantized}--enable-lora --lora-modules intern=. --max-lora-rank {_lora_rank(rank)}"
    stop = f'"stop_token_ids": {list(job.prompt.stop_ids)}'
    python = _python(code(job), job, f", eos_token_id={list(job.prompt.stop_ids)}")
    return (
        f"In transformers and PEFT:\n\n{python}\n\n"
        f"{_served(job, served)}\n\nvLLM ends answers as the base does; `{stop}` in a request ends them as in training."
    )


def gguf(job: Job) -> str:
    """How llama.cpp asks a GGUF file."""
    return _served(job, llama_command("."), "llama.cpp")


def ollama(job: Job) -> str:
    """How Ollama asks."""
    return f"In Ollama:\n\n```bash\nollama create intern -f Modelfile\nollama run intern\n```\n\n{_request(job, 11434)}"


def vllm(job: Job) -> str:
    """How vLLM asks."""
    return _served(job, vllm_command("."))


def mlx(job: Job) -> str:
    """How MLX asks; it converts nothing: merged safetensors are its own format."""
    return _served(job, mlx_command("."), "mlx-lm, on the Mac")


def vllm_command(folder: Path | str) -> str:
    """Return the command that serves a merged folder with vLLM."""
    return f"vllm serve {folder} --served-model-name intern"


def mlx_command(folder: Path | str) -> str:
    """Return the command that serves a merged folder on a Mac."""
    return f"mlx_lm.server --model {folder} --port 8000"


def llama_command(folder: Path | str) -> str:
    """Return the command that serves a GGUF file with llama.cpp."""
    return f"llama-server -m {folder}/model.gguf --jinja --alias intern --port 8000"


def ollama_command(folder: Path | str) -> str:
    """Return the command that gives a GGUF file to a running Ollama."""
    return f"ollama create intern -f {folder}/Modelfile"


def _python(loading: str, job: Job, more: str = "") -> str:
    asked = json.dumps(_messages(job), ensure_ascii=False)
    return "\n".join(
        [
            "```python",
            loading,
            f"messages = {asked}",
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
            f"output = model.generate(**inputs.to(model.device), max_new_tokens=256{more})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
            "```",
        ]
    )


def _served(job: Job, command: str, name: str = "vLLM") -> str:
    return f"In {name}:\n\n```bash\n{command}\n```\n\n{_request(job)}"


def _request(job: Job, port: int = 8000) -> str:
    body = json.dumps({"model": "intern", "temperature": 0, "messages": _messages(job)}, ensure_ascii=False).replace(
        "'", "'\\''"
    )
    return (
        "Any client of OpenAI's chat completions API:\n\n"
        f"```bash\ncurl http://localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n```"
    )


def _messages(job: Job) -> list[dict[str, Any]]:
    return messages_of(job.prompt, _QUESTION)


def _lora_rank(rank: int) -> int:
    """The smallest rank that vLLM takes for an adapter of this rank."""
    return next((one for one in (8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), rank)
