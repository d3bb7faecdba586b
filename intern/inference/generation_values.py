"""conf/generation -> checked values, before any model is loaded, and from them transformers.GenerationConfig."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field

from intern.config.build import build, plain
from intern.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from intern.data.prompt import Prompt

_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_PartOf = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Beyond these bounds logits overflow.
_Penalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
_Exponent = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
_Bias = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[list[_Token], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]

_COLDEST = 1e-3  # temperature below which drawing takes the most likely token anyway, and logits would overflow
# Keys that have an effect only if tokens are drawn, and the values with which they have none.
_OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0),
    "top_k": (None, 50),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
_OF_BEAMS: dict[str, tuple[Any, ...]] = {"early_stopping": (None, False), "length_penalty": (None, 1.0)}
# Keys of transformers.GenerationConfig that conf/generation must not set, and why. All others that are missing in `Generation` do not
# change an answer (output_scores), or need another model (assistant_early_exit).
_SET_ELSEWHERE = {
    "max_length": "set generation.max_new_tokens, which does not count the question",
    "min_length": "set generation.min_new_tokens, which does not count the question",
    "eos_token_id": "an answer ends where the chat template ends it; generation.stop_strings ends it earlier",
    "bos_token_id": "set by the chat template",
    "pad_token_id": "set by the tokenizer",
    "forced_bos_token_id": "set by the chat template",
    "forced_eos_token_id": "set by the chat template",
}


@dataclass(frozen=True)
class Generation:
    """The keys of transformers.GenerationConfig that apply to answers of a chat model."""

    max_new_tokens: _Count
    min_new_tokens: _Token | None = None
    max_time: _Positive | None = None
    stop_strings: _Text | Annotated[list[_Text], Field(min_length=1)] | None = None
    do_sample: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=100)] | None = None
    num_return_sequences: _Count | None = None
    early_stopping: bool | Literal["never"] | None = None
    length_penalty: _Exponent | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_k: _Token | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    top_h: _PartOf | None = None
    typical_p: _PartOf | None = None
    epsilon_cutoff: _BelowOne | None = None
    eta_cutoff: _BelowOne | None = None
    repetition_penalty: _Penalty | None = None
    no_repeat_ngram_size: _Token | None = None
    bad_words_ids: Annotated[list[_Tokens], Field(min_length=1)] | None = None
    suppress_tokens: _Tokens | None = None
    begin_suppress_tokens: _Tokens | None = None
    sequence_bias: Annotated[list[tuple[_Tokens, _Bias]], Field(min_length=1)] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    use_cache: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings or []

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. At temperature 0 they are not: the most likely token is the limit of drawing."""
        return bool(self.do_sample) and (self.temperature is None or self.temperature >= _COLDEST)

    def check_model(self, positions: int | None, tokens: int) -> None:
        """Check what depends on the model.

        Args:
            positions: how many the model has; None for any number.
            tokens: the size of its vocabulary.

        Raises:
            UserError: the answer alone takes all positions, or there is no such token.
        """
        if positions is not None and self.max_new_tokens >= positions:
            raise UserError(
                f"generation.max_new_tokens={self.max_new_tokens}: the model has {positions:,} positions, for the question and the "
                "answer together: lower it"
            )
        for key in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"):
            largest = max(_token_ids(getattr(self, key)), default=0)
            if largest >= tokens:
                raise UserError(f"generation.{key}: there is no token {largest}: the model has {tokens:,} tokens")

    def config(self, prompt: "Prompt", tokenizer: "PreTrainedTokenizerBase") -> "GenerationConfig":
        """transformers' configuration, which ends an answer at the end of a turn.

        Raises:
            UserError: the end of a turn is a bad word.
        """
        from transformers import GenerationConfig

        if any(len(word) == 1 and word[0] in prompt.stop_ids for word in self.bad_words_ids or ()):
            raise UserError("generation.bad_words_ids: has the token that ends an answer: leave it out")
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if not self.samples:
            values = {key: value for key, value in values.items() if key not in _OF_SAMPLING} | {"do_sample": False}
        values["stop_strings"] = self.stops or None
        if self.sequence_bias:
            values["sequence_bias"] = [[tokens, bias] for tokens, bias in self.sequence_bias]
        return GenerationConfig(**values, eos_token_id=list(prompt.stop_ids), pad_token_id=tokenizer.pad_token_id)


def check_generation(node: DictConfig | Mapping[str, Any] | None) -> Generation:
    """conf/generation -> its checked values. Needs neither a model nor a heavy library.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, or values that contradict each other.
    """
    if node is not None and not isinstance(node, DictConfig | Mapping):
        raise UserError(f"generation={node}: must name one of the options in conf/generation/")
    values = plain(node) if isinstance(node, DictConfig) else dict[str, Any](node or {})
    _check_supported(values)
    if values.get("max_new_tokens") is None:
        raise UserError("generation.max_new_tokens: give the maximum number of tokens of an answer")
    generation = build(Generation, values, "generation")
    for rule in _RULES:
        if (complaint := rule(generation)) is not None:
            raise UserError(complaint)
    return generation


def _check_supported(values: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(Generation)}
    if set(values) <= known:
        return
    from transformers import GenerationConfig

    of_library = GenerationConfig().to_dict()
    for key in values:
        if key not in known and key in of_library:
            reason = _SET_ELSEWHERE.get(key, "it does not change an answer, or needs another model")
            raise UserError(f"generation.{key}: cannot be set here; {reason}")


def _token_ids(value: Any) -> list[int]:
    """All token ids in a value of lists, tuples and numbers; a float is a bias, not a token."""
    if isinstance(value, list | tuple):
        return [token for one in value for token in _token_ids(one)]
    return [value] if isinstance(value, int) else []


# --- Values that belong together ---


def keys_of_sampling_need_sampling(generation: Generation) -> str | None:
    """Without sampling temperature and its like would have no effect."""
    if generation.do_sample or generation.temperature == 0:
        return None
    return _without_effect(generation, _OF_SAMPLING, "generation.do_sample=true (generation=sample sets it)")


def keys_of_beams_need_beams(generation: Generation) -> str | None:
    """Without beam search its keys would have no effect."""
    if (generation.num_beams or 1) > 1:
        return None
    return _without_effect(generation, _OF_BEAMS, "generation.num_beams of at least 2")


def one_answer_to_a_question(generation: Generation) -> str | None:
    """A question has one answer everywhere: on standard output, in Python and in an evaluation."""
    count = generation.num_return_sequences or 1
    if count == 1:
        return None
    return (
        f"generation.num_return_sequences={count}: a question gets one answer: ask {count} times with generation=sample"
    )


def the_shortest_answer_is_not_longer_than_the_longest(generation: Generation) -> str | None:
    """min_new_tokens is at most max_new_tokens."""
    least, most = generation.min_new_tokens or 0, generation.max_new_tokens
    return f"generation.min_new_tokens={least} is above generation.max_new_tokens={most}" if least > most else None


def _without_effect(generation: Generation, keys: Mapping[str, tuple[Any, ...]], remedy: str) -> str | None:
    for key, neutral in keys.items():
        value = getattr(generation, key)
        if value not in neutral:
            return f"generation.{key}={value}: has no effect without {remedy}"
    return None


_RULES: tuple[Callable[[Generation], str | None], ...] = (
    one_answer_to_a_question,
    keys_of_sampling_need_sampling,
    keys_of_beams_need_beams,
    the_shortest_answer_is_not_longer_than_the_longest,
)
