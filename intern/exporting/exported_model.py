"""The folder of a merged export -> answers, with the prompt that it was trained on: what was shipped can be asked like the run."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.inference.generate import positions_of
from intern.inference.generation_values import check_generation
from intern.model.base import Base
from intern.model.precision import plan_inference
from intern.model.sizes import check_fit
from intern.runs.directory import Run
from intern.runs.files import exists
from intern.runs.untrusted import json_object
from intern.upstream import route_messages


class ExportedModel(Intern):
    """A merged export, loaded: it is asked as a run is, without its adapter and its base."""

    def __init__(self, folder: Path, generation: DictConfig | dict[str, Any]) -> None:
        """Loads the folder.

        Args:
            folder: with export.json.
            generation: transformers.GenerationConfig's keys, such as max_new_tokens.

        Raises:
            UserError: the export is of another format, or a file of it cannot be read.
        """
        route_messages()
        asked = check_generation(generation)
        record = json_object(folder / "export.json", folder)
        if not exists(folder / "config.json", folder):
            raise UserError(f"run_dir={folder}: is an export as {record.get('format')}: only merged ones can be asked")
        self.run = Run(folder)
        self.cfg = OmegaConf.create({"model": {"pretrained_model_name_or_path": str(folder)}})
        self.prompt = Prompt.from_json(json_object(folder / "prompt.json", folder), str(folder / "prompt.json"))
        base = Base(self.cfg.model)
        asked.check_model(positions_of(base.config), base.embeddings)
        self.precision = plan_inference(None)
        check_fit(base, None, self.precision)
        self.tokenizer = base.tokenizer()
        self.generation = asked.config(self.prompt, self.tokenizer)
        self.model: Any = base.load(None, self.precision).eval()
