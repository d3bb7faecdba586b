"""A finished run -> answers: loads base and adapter once, asks with the prompt that was trained."""

import functools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextIteratorStreamer

from intern.data.prompt import Prompt
from intern.data.question_history import read_history
from intern.errors import UserError
from intern.inference.generate import Reply, generate, hold_back, positions_of
from intern.inference.generation_values import check_generation
from intern.model.base import Base
from intern.model.precision import plan_inference
from intern.model.quant import build_quant
from intern.model.sizes import check_fit
from intern.paths import CONF_DIR
from intern.runs.adapter import check_adapter, check_tensors
from intern.runs.directory import Run
from intern.runs.find import resolve
from intern.upstream import route_messages

log = logging.getLogger(__name__)


class Intern:
    """A finished run, loaded: base model, adapter, tokenizer and the prompt of its training."""

    def __init__(self, run: Run, generation: DictConfig | dict[str, Any], model: str | None = None) -> None:
        """Loads the run.

        Args:
            run: the run directory.
            generation: transformers.GenerationConfig's keys, such as max_new_tokens.
            model: the base model's folder or name, where it is not where the run was trained.

        Raises:
            UserError: a file of the run or its base model cannot be read, or a key of `generation` is wrong.
        """
        route_messages()
        asked = check_generation(generation)
        cfg = run.read_config_to_load()
        place = f"{run.config}: " if model is None else ""
        if model is not None:
            OmegaConf.update(cfg, "model.pretrained_model_name_or_path", model)
        self.run = run
        self.cfg = cfg
        self.prompt = Prompt.from_json(run.read_json(run.prompt), str(run.prompt))
        lora = check_adapter(run.adapter, run.path)
        try:
            base = Base(cfg.model)
            quant = build_quant(cfg.quant)
        except UserError as error:
            _tell_where_from(run, cfg)
            raise UserError(f"{place}{error}") from error
        lora = check_tensors(lora, base.skeleton, run.adapter)
        _tell_where_from(run, cfg)
        asked.check_model(positions_of(base.config), base.embeddings)
        self.precision = plan_inference(quant.compute_dtype if quant is not None else None)
        check_fit(base, quant, self.precision)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                run.adapter, trust_remote_code=False, local_files_only=True
            )
            self.generation = asked.config(self.prompt, self.tokenizer)
            base_model = base.load(quant, self.precision)
            self.model = PeftModel.from_pretrained(base_model, str(run.adapter), config=lora).eval()
        except Exception as error:  # of a file that is not as it should be, tokenizers and PEFT raise whatever comes
            if isinstance(error, UserError):
                raise
            raise UserError(f"{run.adapter}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error

    def answer(self, question: str, context: str | None = None, history: Any = None) -> str:
        """The answer to one question.

        Args:
            question: the last question.
            context: its material, if the run was trained with material.
            history: what was said before it, as intern.data.question_history.read_history takes it: a file, or a list of messages or of
                (question, answer) pairs.

        Raises:
            UserError: an empty question, one that is too long for the model, or a history that cannot be read.
        """
        [reply] = self._replies(question, context, history)
        return reply.text

    def stream(self, question: str, context: str | None = None, history: Any = None) -> Iterator[str]:
        """The same answer as `answer`, in parts, as it is made; in one part with beam search, which knows it only at the end."""
        if (self.generation.num_beams or 1) > 1:
            yield self.answer(question, context, history)
            return
        pieces = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._replies(question, context, history, pieces)
            except BaseException as error:  # raised again for the caller, who waits for the answer
                failures.append(error)
                pieces.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from hold_back(pieces, self.generation.stop_strings or [])
        thread.join()
        if failures:
            raise failures[0]

    def _replies(self, question: str, context: str | None, history: Any, streamer: Any = None) -> list[Reply]:
        self.prompt.check_question(question, context)
        before = read_history(history)
        replies = list(
            generate(
                self.model,
                self.tokenizer,
                self.prompt,
                self.generation,
                [question],
                [context],
                streamer=streamer,
                histories=[before.turns],
                systems=[before.system],
            )
        )
        if cut := sum(reply.context_tokens_cut for reply in replies):
            log.warning(
                "context: its last %s tokens were cut, so that the question and an answer of generation.max_new_tokens=%d fit into the "
                "model's positions",
                f"{cut:,}",
                self.generation.max_new_tokens,
            )
        return replies


def _tell_where_from(run: Run, cfg: DictConfig) -> None:
    """A run from elsewhere decides one thing that its reader may not expect: the base model that is loaded."""
    made_at = run.read_json(run.environment).get("run_dir") if run.has(run.environment) else None
    if made_at != str(run.path):
        log.warning(
            "%s was trained elsewhere; the base model that it names is %s (base_model=... takes another)",
            run.path,
            OmegaConf.select(cfg, "model.pretrained_model_name_or_path"),
        )


def query_intern(question: str, run_dir: str | Path = "latest", context: str | None = None, history: Any = None) -> str:
    """Answers a question with a finished run, loaded at the first call and kept for the next ones.

    Args:
        question: as a person would ask it.
        run_dir: a run, "latest", "best", or a sweep (its best job).
        context: material for this question, if the run was trained with data.context=always or mixed.
        history: what was said before it: a list of (question, answer) pairs or of {"role": ..., "content": ...} messages, or the path of a
            JSON or JSON Lines file with such a list.

    Returns:
        The answer alone.

    Raises:
        UserError: there is no such run, or it cannot be asked this way.
    """
    run = resolve(run_dir)
    return _loaded(run, run.metrics.stat().st_mtime_ns).answer(question, context, history)


@functools.lru_cache(maxsize=1)
def _loaded(run: Run, version: int) -> Intern:  # a run that was trained anew is loaded anew
    generation = OmegaConf.load(CONF_DIR / "generation" / "greedy.yaml")
    assert isinstance(generation, DictConfig)
    return Intern(run, generation)
