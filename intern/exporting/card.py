"""An export -> its model card: README.md with the metadata of the model hub."""

from typing import Any

from huggingface_hub import ModelCardData

from intern.config.secrets import masked
from intern.display.text import in_lines
from intern.exporting.facts import Facts
from intern.exporting.licenses import UNKNOWN, demands

_NOT_SAID = (
    "The scores are of golden rows that the trainer of this model chose. They do not say that an answer is true, how the model answers "
    "other questions, or what it forgot. An interval is what 95 of 100 samples of such rows would give."
)


def card(
    facts: Facts, record: dict[str, Any], base: dict[str, Any], prompt: dict[str, Any], summary: str, ask: str
) -> str:
    """Return the text of README.md.

    Args:
        facts: of the run.
        record: export.json.
        base: its name, whether that is a name `on_hub`, `license`, `license_name` and `relation` to it.
        prompt: the system prompt, `context` and `template_sha256`, as prompt.json has them.
        summary: what the files are.
        ask: how to ask the model, as Markdown.
    """
    parts = [
        f"# {facts.name}",
        f"{_first_upper(summary)}: [{base['name']}](https://huggingface.co/{base['name']}) fine-tuned with QLoRA."
        if base["on_hub"]
        else f"{_first_upper(summary)}: {base['name']} fine-tuned with QLoRA.",
        "## What it is for",
        _purpose(prompt),
        "## How to ask it",
        ask,
        "## Proof",
        _proof(record),
        "## Scores",
        _scores(facts),
        "## Training",
        _training(facts),
        "## Licence",
        _license(base),
    ]
    return f"---\n{_metadata(base)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(base: dict[str, Any]) -> str:
    """Return the metadata of the hub, as YAML."""
    library = {"adapter": "peft", "quantized": "gguf"}.get(base["relation"], "transformers")
    more: dict[str, Any] = (
        {"license_name": base["license_name"] or "see-base-model"} if base["license"] == UNKNOWN else {}
    )
    if base["on_hub"]:
        more |= {"base_model": base["name"], "base_model_relation": base["relation"]}
    data = ModelCardData(
        license=base["license"], library_name=library, pipeline_tag="text-generation", tags=["qlora", "lora"], **more
    )
    return data.to_yaml().strip()


def _purpose(prompt: dict[str, Any]) -> str:
    how = {
        "never": "It was trained on questions alone.",
        "always": "It was trained with a text to answer from before every question (`Material:` ..., then `Question:` ...).",
        "mixed": "It was trained on questions with a text to answer from (`Material:` ..., then `Question:` ...) and without one.",
    }[prompt["context"]]
    if not prompt["system_prompt"]:
        return f"{how} It has no system prompt."
    return f"{how} Its system prompt, without which it answers otherwise than it was measured:\n\n{_block(prompt['system_prompt'])}"


def _proof(record: dict[str, Any]) -> str:
    lines = []
    figures = record["figures"]
    if figures is None:
        lines.append("**Not proven**: the program that these files are for was not installed where they were written.")
    else:
        lines += [
            f"Loaded with {figures['consumer']} and compared with base and adapter as they were evaluated, on {figures['prompts']} golden "
            f"prompts and the {figures['positions']} tokens of their answers:",
            _table(
                ("", ""),
                [
                    ("mean KL divergence (nats)", f"{figures['mean_kl']:.2g} (limit {record['limit_mean_kl']:g})"),
                    ("99th percentile", f"{figures['p99_kl']:.2g}"),
                    ("same most likely token", f"{figures['top1_agreement']:.1%}"),
                    ("equal greedy answers", f"{figures['answers_equal']} of {figures['prompts']}"),
                    (
                        "answers that end by themselves",
                        f"{figures['stops']}, of the evaluated model {figures['reference_stops']}",
                    ),
                    ("prompts with the same tokens", f"{figures['templates_equal']} of {figures['prompts']}"),
                ],
            ),
        ]
    if (served := record["served"]) is not None:
        lines.append(
            f"Asked through a server started for {record['program']} (which program answered is not checked): {served['answers_equal']} of {served['prompts']} greedy answers are equal, "
            f"{served['stops']} end by themselves (of the evaluated model {served['reference_stops']})."
        )
    elif record["prove"] is not None:
        lines.append(
            f"**Not proven in {record['program']} itself.** These two commands do it:\n\n```bash\n{record['prove']}\n```"
        )
    return "\n\n".join(lines)


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "None were measured."
    rows = [(one.name, "" if one.rows is None else f"{one.rows}", one.before, one.after) for one in facts.scores]
    return f"{_table(('', 'rows', 'base', 'fine-tuned'), rows)}\n\n{_NOT_SAID}"


def _training(facts: Facts) -> str:
    count = f"{facts.rows:,} training rows" if facts.rows is not None else "Training rows"
    data = _table(("file", "SHA-256"), [(f"`{name}`", f"`{digest}`") for name, digest in facts.data])
    parts = [f"{count}. Files, not included here:\n\n{data}", _table(("", ""), facts.cost)]
    parts += [f"Configuration:\n\n{_block(facts.configuration, 'yaml')}", f"Made with {facts.versions}."]
    return "\n\n".join(parts)


def _license(base: dict[str, Any]) -> str:
    if base["license"] == UNKNOWN:
        name = base["license_name"] or "not named by the base's own files"
        return f"That of the base model, {base['name']}: {name}. {demands(UNKNOWN)}"
    return f"That of the base model, {base['name']}: `{base['license']}`. {demands(base['license'])}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).split()) for cell in line) + " |" for line in lines)


def _block(text: str, kind: str = "text") -> str:
    """Return text between fences that it cannot close."""
    shown = masked(in_lines(text)).strip()
    fence = "```"
    while fence in shown:
        fence += "`"
    return f"{fence}{kind}\n{shown}\n{fence}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
