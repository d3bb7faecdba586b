"""The columns of values in a comparison: what training measures, and the metrics that METRICS shows there."""

from intern.display.table import Column
from intern.evaluation.metrics import Place, metrics_at


def columns() -> dict[str, Column]:
    """Return the columns of values that a run can have, in the order of the table."""
    return {
        "trainable_parameters": Column("trainable", None, ",.0f"),
        "train_loss": Column("train loss", False, ".3f"),
        "eval_loss": Column("eval loss", False, ".3f"),
        **{
            name: Column(metric.short_label, metric.higher_is_better, metric.format)
            for name, metric in metrics_at(Place.COMPARE).items()
        },
        "tokens_per_second": Column("tokens/s", True, ",.0f"),
        "peak_memory_gib": Column("peak GiB", False, ".2f"),
        "train_seconds": Column("seconds", False, ",.0f"),
        "score": Column("score", False, ".3f"),
    }
