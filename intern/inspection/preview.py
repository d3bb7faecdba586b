"""A composed training configuration -> what it would train on, shown and checked: no weights, no GPU, nothing written except caches."""

import sys
from pathlib import Path

from datasets import Dataset
from omegaconf import DictConfig
from rich.console import Console

from intern.data.packing import pack
from intern.data.tokenize import Tokenized
from intern.display.plot import plot_lengths
from intern.display.progress import progress_bars
from intern.display.text import visible
from intern.errors import UserError
from intern.inspection.check import Check, show_checks
from intern.inspection.duplicate_checks import check_duplicates, check_leaks
from intern.inspection.field_checks import check_fields
from intern.inspection.preview_display import Preview, page, plain_rows, show_rows
from intern.inspection.preview_rows import PreviewData, row_index, shown_batch, shown_row
from intern.inspection.token_checks import Lengths, check_fit, check_packing, check_tokens
from intern.runs.directory import Run
from intern.runs.files import write_text
from intern.training.plan import PlanPieces
from intern.upstream import route_messages

_OWN_KEYS = ("rows", "row", "html", "lengths")  # of conf/preview.yaml
_PERCENTS = (50, 90, 99, 100)


def examine(cfg: DictConfig, console: Console) -> list[Check]:
    """Show the rows that conf/preview.yaml selects and statistics of all rows; return the checks.

    Args:
        cfg: the composed conf/preview.yaml.
        console: the terminal; if it is none, standard output gets Markdown.

    Raises:
        UserError: bad input, as training would raise it; a row that is not in the file.
    """
    route_messages()
    count, row = _selected(cfg)
    data = prepare(cfg)
    preview = look(data, count, row, Path(cfg.lengths) if cfg.lengths else None)
    sys.stdout.write(f"{visible(data.data.found)}\n\n")
    if console.is_terminal:
        show_rows(preview, console)
    else:
        sys.stdout.write(plain_rows(preview))
    show_checks(preview.checks, console)
    if cfg.html:
        target = Path(cfg.html).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, target.parent, page(preview, f"Preview of {data.train_file.path.name}"))
    for path in (cfg.lengths, cfg.html):
        if path:
            sys.stderr.write(f"wrote {visible(str(path))}\n")
    return preview.checks


def prepare(cfg: DictConfig) -> PreviewData:
    """Check the whole configuration as training does, and prepare its rows; only the caches that training reads are written.

    What is trained on is the same on every device, so the GPU is not asked: a preview works without one, and beside a training run.

    Args:
        cfg: the composed conf/preview.yaml.

    Raises:
        UserError: bad input, as training would raise it.
    """
    plan = PlanPieces(cfg, Run(Path.cwd()), _OWN_KEYS, asks_gpu=False)
    plan.take_all()
    rows = plan.rows.train_tokens.rows
    with progress_bars(len(rows)):
        packs = pack(rows, plan.args)
    return PreviewData(plan.prompt, plan.tokenizer, plan.args, plan.rows, packs)


def look(data: PreviewData, count: int, row: int | None, picture: Path | None) -> Preview:
    """Collect everything that is shown.

    Args:
        data: of the run.
        count: how many rows to show, from the first one on.
        row: the line of the only row to show instead.
        picture: where the histogram of lengths is drawn; None draws none.
    """
    lengths, checks = check_tokens(data.train, data.prompt, data.tokenizer, data.max_length)
    share, packing = check_packing(data.packs, lengths, data.args)
    shows_context = data.prompt.context != "never"
    checks += [check_fit(data.train, data.max_length), packing]
    checks += check_duplicates(data.train_rows, shows_context)
    checks.append(check_fields(data.train_rows, data.tokenizer.all_special_tokens))
    golden_lengths = None
    if data.golden is not None and data.golden_rows is not None:
        golden_lengths, _ = check_tokens(data.golden, data.prompt, data.tokenizer, data.max_length)
        checks += check_leaks(data.train_rows, data.golden_rows, shows_context)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_lengths(lengths.histogram, data.max_length, picture)
    places = range(min(count, len(data.train_rows))) if row is None else [row_index(data, row)]
    return Preview(
        rows=[shown_row(data, place) for place in places],
        batch=shown_batch(data, places),
        statistics=_statistics(data, lengths, golden_lengths, share),
        checks=checks,
        lengths=picture,
    )


def _selected(cfg: DictConfig) -> tuple[int, int | None]:
    """Return how many rows to show, and the line of the only one."""
    for key, least in (("rows", 0), ("row", 1)):
        value = cfg[key]
        if (value is not None or key == "rows") and (not isinstance(value, int) or value < least):
            raise UserError(f"{key}={value}: must be a whole number, at least {least}")
    return cfg.rows, cfg.row


def _statistics(
    data: PreviewData, lengths: Lengths, golden: Lengths | None, share: float
) -> list[tuple[str, str, str]]:
    """Return (name, training rows, golden rows), ..."""

    def column(rows: Dataset | None, tokens: Tokenized | None, of: Lengths | None) -> list[str]:
        if rows is None or tokens is None or of is None:
            return ["-"] * (5 + len(_PERCENTS))
        return [
            f"{len(rows):,}",
            f"{len(tokens.dropped):,}",
            f"{tokens.shortened:,}",
            *(f"{of.percentile(percent):,}" for percent in _PERCENTS),
            f"{of.tokens:,}",
            f"{of.loss_share:.1%}",
        ]

    percents = [f"tokens per row: {'longest' if percent == 100 else f'p{percent}'}" for percent in _PERCENTS]
    names = ["rows", "dropped", "shortened", *percents, "tokens", "tokens with loss"]
    ours = column(data.train_rows, data.train, lengths)
    theirs = column(data.golden_rows, data.golden, golden)
    return [*zip(names, ours, theirs, strict=True), ("positions used in training", f"{share:.1%}", "-")]
