"""The formats of an export: what each one writes, which program proves it, and how it is asked.

To add one, write a `Format` here with a function that writes its files; everything else reads the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intern.errors import UserError
from intern.exporting import gguf, how_to_ask, ollama
from intern.exporting.adapter_folder import adapter_consumer, write_adapter
from intern.exporting.job import Job, write_model
from intern.exporting.proof import Consumer
from intern.exporting.settings import Settings
from intern.exporting.transformers_consumer import TransformersConsumer

_CLOSE = 0.001  # nats; rounding once to 16 bits stays below (docs/export.md has measurements)
_GGUF = {"f16": _CLOSE, "q8_0": 0.02, "q4_k_m": 0.3}


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        summary: what the files are.
        relation: to the base model, as the model hub calls it.
        write: writes the files into an empty folder, with the run's model loaded.
        consumer: loads them in a program that gives probabilities; None where that is not installed.
        limit: of the mean KL divergence from the evaluated model, in nats.
        ask: how to ask the export, as Markdown for the card.
        program: what the files are for.
        is_consumer: whether `consumer` is that program. If it is not, the program itself can be proven later, through its server.
        serve: the command that starts the program's server with a folder; None if it has none.
        url: where that server listens then.
    """

    summary: str
    relation: Literal["adapter", "finetune", "quantized"]
    write: Callable[[Job, Path], None]
    consumer: Callable[[Job, Path], Consumer | None]
    limit: Callable[[Settings], float]
    ask: Callable[[Job], str]
    program: str
    is_consumer: bool = True
    serve: Callable[[Path | str], str] | None = None
    url: str = "http://localhost:8000/v1"

    def is_close(self, settings: Settings) -> bool:
        """Return whether the format keeps so much precision that most greedy answers stay equal."""
        return self.limit(settings) < _GGUF["q4_k_m"]


def _merged_consumer(job: Job, folder: Path) -> Consumer:
    return TransformersConsumer.merged(folder)


def _close(settings: Settings) -> float:
    return _CLOSE


def _of_gguf(settings: Settings) -> float:
    return _GGUF[settings.gguf]


def _merged(
    summary: str, ask: Callable[[Job], str], program: str, serve: Callable[[Path | str], str] | None = None
) -> Format:
    """A format whose files are the merged model, which transformers loads too."""
    return Format(
        summary, "finetune", write_model, _merged_consumer, _close, ask, program, is_consumer=serve is None, serve=serve
    )


FORMATS: dict[str, Format] = {
    "merged": _merged("one plain model in safetensors", how_to_ask.merged, "transformers"),
    "adapter": Format(
        "a PEFT adapter for the quantized base",
        "adapter",
        write_adapter,
        adapter_consumer,
        _close,
        how_to_ask.adapter,
        "PEFT",
    ),
    "gguf": Format(
        "one GGUF file for llama.cpp",
        "quantized",
        gguf.write,
        gguf.consumer,
        _of_gguf,
        how_to_ask.gguf,
        "llama.cpp",
        serve=how_to_ask.llama_command,
    ),
    "ollama": Format(
        "a GGUF file with the Modelfile of Ollama",
        "quantized",
        ollama.write,
        gguf.consumer,
        _of_gguf,
        how_to_ask.ollama,
        "Ollama",
        is_consumer=False,
        serve=how_to_ask.ollama_command,
        url="http://localhost:11434/v1",
    ),
    "vllm": _merged("one plain model in safetensors, for vLLM", how_to_ask.vllm, "vLLM", how_to_ask.vllm_command),
    "mlx": _merged(
        "one plain model in safetensors, for mlx-lm on a Mac", how_to_ask.mlx, "mlx-lm", how_to_ask.mlx_command
    ),
}


def find_format(settings: Settings) -> tuple[str, Format]:
    """Return the name and the format of the files to write; for the hub those of its content.

    Raises:
        UserError: there is no format of this name.
    """
    name = settings.content if settings.format == "hub" else settings.format
    if name not in FORMATS:
        raise UserError(f"format={name}: must be one of {', '.join([*FORMATS, 'hub'])}")
    return name, FORMATS[name]
