"""A run -> a GGUF file and the Modelfile with which Ollama renders its prompts, system prompt and stop tokens as training did."""

from pathlib import Path
from typing import Any

from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.exporting import gguf
from intern.exporting.job import Job

FILE = "Modelfile"
_QUOTES = '"""'


def write(job: Job, folder: Path) -> None:
    """Write model.gguf and Modelfile.

    Raises:
        UserError: what `intern.exporting.gguf.write` raises, or a prompt that a Modelfile cannot hold.
    """
    text = modelfile(
        job.prompt, job.tokenizer, int(getattr(job.base.config.get_text_config(), "max_position_embeddings", 0) or 0)
    )
    gguf.write(job, folder)
    (folder / FILE).write_text(text, encoding="utf-8")


def modelfile(prompt: Prompt, tokenizer: Any, positions: int) -> str:
    """Return the Modelfile of a prompt.

    Args:
        prompt: of the run.
        tokenizer: tells whether the beginning of a text gets a token of its own, which Ollama adds too.
        positions: of the model; 0 if it has any number.

    Raises:
        UserError: texts that the Modelfile's own syntax would change.
    """
    first, second, before, end = prompt.template
    alone = prompt.opening_alone if prompt.opening_alone is not None else first + second
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        first, alone = first.removeprefix(bos), alone.removeprefix(bos)
    stops = [tokenizer.convert_ids_to_tokens(token) for token in prompt.stop_ids]
    for text in (first, second, before, end, alone, prompt.system_prompt, *stops):
        if "{{" in text or _QUOTES in text:
            raise UserError(f"format=ollama: a Modelfile cannot hold the text {text[:60]!r}: use format=gguf")
    if prompt.system_in_user:
        head = f"{alone}{{{{ if .System }}}}{{{{ .System }}}}\n\n{{{{ end }}}}"
    else:
        head = f"{{{{ if .System }}}}{first}{{{{ .System }}}}{second}{{{{ else }}}}{alone}{{{{ end }}}}"
    template = f"{head}{{{{ .Prompt }}}}{before}{{{{ .Response }}}}{end}"
    lines = ["FROM ./model.gguf", f"TEMPLATE {_QUOTES}{template}{_QUOTES}"]
    if prompt.system_prompt:
        lines.append(f"SYSTEM {_QUOTES}{prompt.system_prompt}{_QUOTES}")
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    lines += ["PARAMETER temperature 0", *([f"PARAMETER num_ctx {min(positions, 8192)}"] if positions else [])]
    return "\n".join(lines) + "\n"
