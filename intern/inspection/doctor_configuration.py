"""The doctor's checks of what is trained: configuration, model, tokenizer, adapter, rows."""

from intern.display.progress import LONG_DATA
from intern.inspection.check import AMBER, GREEN, Check
from intern.inspection.doctor_pieces import DoctorPieces, SkippedError
from intern.inspection.installation import short_path


def check_configuration(pieces: DoctorPieces) -> Check:
    """Check and build the groups exactly as training does."""
    pieces.take_configuration()
    args, rules = pieces.configured_args, pieces.rules
    batch = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
    return Check(
        "configuration", GREEN, f"batches of {batch}, at least {rules.min_steps} steps, seed {pieces.cfg.seed}"
    )


def check_model(pieces: DoctorPieces) -> Check:
    """Check the base model's configuration and whether the values suit it: positions, embeddings, packing."""
    base = pieces.base
    parameters = base.parameters()
    pieces.known("configured_args", "configuration")
    pieces.known("tokenizer", "tokenizer")
    _ = pieces.model_rules
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    known = f"{positions:,} positions" if positions is not None else "positions without a limit"
    return Check("model", GREEN, f"{short_path(base.name)}: {parameters / 1e6:,.1f} million parameters, {known}")


def check_tokenizer(pieces: DoctorPieces) -> Check:
    """Check the tokenizer and what the prompt contract requires of its chat template."""
    pieces.known("base", "model")
    tokenizer, prompt = pieces.tokenizer, pieces.prompt
    found = f"{len(tokenizer):,} tokens; an answer ends with {prompt.template[3]}"
    if tokenizer.pad_token == tokenizer.eos_token:
        return Check(
            "tokenizer", AMBER, f"{found}, which is also the padding token", "harmless here: masks are explicit"
        )
    return Check("tokenizer", GREEN, found)


def check_adapter(pieces: DoctorPieces) -> Check:
    """Put the adapter on the model without weights, with PEFT itself."""
    base = pieces.known("base", "model")
    _ = pieces.lora
    pieces.known("tokenizer", "tokenizer")
    _ = pieces.adapter_rules
    trainable, every = pieces.adapted.get_nb_trainable_parameters()
    share = trainable / max(every - trainable, 1)
    modules = sorted({name.rsplit(".", 1)[-1] for name in pieces.adapted.targeted_module_names})
    found = f"{trainable / 1e6:,.1f} million trainable parameters ({share:.1%} of the base's) on {', '.join(modules)}"
    if share > 0.25 and base.parameters() > 100_000_000:
        return Check("adapter", AMBER, found, "a rank this high is close to full fine-tuning: lower lora.r")
    return Check("adapter", GREEN, found)


def check_training_rows(pieces: DoctorPieces) -> Check:
    """Check data.train_file row by row."""
    pieces.known("data", "configuration")
    return _rows("training rows", pieces, scoring=False)


def check_golden_rows(pieces: DoctorPieces) -> Check:
    """Check data.eval_file row by row."""
    data = pieces.known("data", "configuration")
    if data.eval_share:
        return Check("golden rows", GREEN, f"held out: {data.eval_share:.0%} of the training rows, by document")
    if not data.eval_files:
        return Check(
            "golden rows", AMBER, "none: nothing will measure the adapter", "set data.eval_file, or data.eval_share=0.1"
        )
    return _rows("golden rows", pieces, scoring=True)


def _rows(name: str, pieces: DoctorPieces, scoring: bool) -> Check:
    from intern.data.sources import locate, read_sources
    from intern.data.tokenize import tokenize

    data = pieces.data
    names, key = (data.eval_files, "data.eval_file") if scoring else (data.train_files, "data.train_file")
    table = read_sources(locate(names, key), data, training=not scoring)
    rows = table.rows
    found = f"{table.name}: {len(rows):,} valid rows"
    if len(rows) > LONG_DATA:  # tokenizing them takes longer than anyone waits for the doctor
        return Check(name, GREEN, f"{found}; their tokens are not counted here", "python -m intern.preview counts them")
    try:
        prompt = pieces.known("prompt", "tokenizer")
        length = pieces.known("configured_args", "configuration").max_length
    except SkippedError as missing:
        return Check(name, AMBER, f"{found}; their tokens were not counted", f"fix {missing} first")
    tokens = tokenize(rows, pieces.tokenizer, prompt, length, data.num_proc, table.name, scoring, data.loss_on)
    if tokens.dropped or tokens.shortened:
        found += f", {len(tokens.dropped):,} dropped, {tokens.shortened:,} shortened to {length:,} tokens"
        return Check(name, AMBER, found, "raise trainer.max_length; python -m intern.preview shows them")
    return Check(name, GREEN, f"{found}, all fit into {length:,} tokens")
