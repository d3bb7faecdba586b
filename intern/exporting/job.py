"""What every format needs of a run: its loaded model, its prompt, its base, and the files that all exports have in common."""

import gc
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.exporting.merge import write_merged
from intern.exporting.original import OriginalWeights
from intern.exporting.settings import Settings
from intern.inference.answer import Intern
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import build_quant
from intern.runs.directory import Run

_NAME = re.compile(r"[A-Za-z_]\w*")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Job:
    """One export.

    Attributes:
        base_name: the base's name on the hub, or its folder's name; the card shows it.
        on_hub: whether base_name is a name on the hub.
    """

    run: Run
    settings: Settings
    base: Base
    prompt: Prompt
    cfg: Any
    base_name: str
    on_hub: bool
    tokenizer: Any
    precision: Precision
    intern: Intern | None = field(repr=False)

    @property
    def loaded(self) -> Intern:
        """The loaded run, before `release`."""
        assert self.intern is not None
        return self.intern

    def release(self) -> None:
        """Give back the memory of the run's model: the export itself is loaded next."""
        self.intern = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def quantization(self) -> Any:
        """The base's quantization in training, as transformers takes it; None if there was none, or the base was published with one."""
        quant = build_quant(self.cfg.quant)
        published = getattr(self.base.config, "quantization_config", None) is not None
        return None if quant is None or published else quant.config


def build_job(run: Run, settings: Settings) -> Job:
    """Load a run to export it.

    Raises:
        UserError: a file of the run or its base model cannot be read.
    """
    intern = Intern(run, {"max_new_tokens": settings.max_new_tokens}, settings.base_model)
    base = Base(intern.cfg.model)
    is_folder = Path(base.name).is_dir()
    name = settings.base_name or (Path(base.name).name if is_folder else base.name)
    on_hub = settings.base_name is not None or not is_folder
    return Job(run, settings, base, intern.prompt, intern.cfg, name, on_hub, intern.tokenizer, intern.precision, intern)


def write_model(job: Job, folder: Path) -> None:
    """Write the merged model: weights, config.json, generation_config.json with the tokens that end an answer, tokenizer.

    Raises:
        UserError: an adapter that cannot be merged, or weights=original without the base's own files.
    """
    dtype = DTYPES[job.settings.dtype]
    original = None
    if job.settings.weights == "original":
        original = OriginalWeights(job.base.name, job.cfg.model.get("revision"))
    tied = write_merged(job.loaded.model, job.base.skeleton, folder, dtype, original)
    config = type(job.base.config).from_dict(job.base.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    config.save_pretrained(folder)
    stops = list(job.prompt.stop_ids)
    GenerationConfig(
        do_sample=False,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        bos_token_id=job.tokenizer.bos_token_id,
        pad_token_id=job.tokenizer.pad_token_id,
    ).save_pretrained(folder)
    write_tokenizer(job, folder)


def write_tokenizer(job: Job, folder: Path) -> None:
    """Write the tokenizer as other programs use it: it ends answers where training did, and its template needs no arguments."""
    tokenizer, stops = job.tokenizer, job.prompt.stop_ids
    former = tokenizer.eos_token, tokenizer.chat_template
    try:
        if tokenizer.eos_token_id not in stops:  # llama.cpp and others end an answer at this token
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
        tokenizer.chat_template = with_arguments(tokenizer.chat_template, job.prompt.template_kwargs)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.eos_token, tokenizer.chat_template = former


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Return a chat template that renders as it did in training without being given data.template_kwargs.

    Args:
        template: of the tokenizer.
        arguments: names and values.

    Raises:
        UserError: a name that no template can have.
    """
    for name in arguments:
        if not _NAME.fullmatch(name):
            raise UserError(f"prompt.json: template_kwargs holds {name[:80]!r}: must be names of variables")
    return "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in arguments.items()) + template


def write_prompt(job: Job, folder: Path) -> None:
    """Write prompt.json, with which this project's own commands ask an export."""
    (folder / "prompt.json").write_text(json.dumps(job.prompt.to_json(), indent=2) + "\n", encoding="utf-8")


def _literal(value: Any) -> str:
    """Return a value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)
