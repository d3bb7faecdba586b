"""python -m intern.export run_dir=latest format=merged out=exports/mine"""

import sys

from omegaconf import DictConfig

from intern.cli.command import command
from intern.cli.messages import say
from intern.config.build import plain
from intern.display.text import visible
from intern.runs.find import resolve
from intern.units import MIB


@command("export")
def main(cfg: DictConfig) -> None:
    """Write a finished run for other programs, and prove that it is still the model that was evaluated."""
    from intern.exporting.settings import check_empty, read_settings

    run = resolve(cfg.run_dir)
    settings = read_settings({key: value for key, value in plain(cfg).items() if key != "run_dir"}, run)
    is_written = settings.upload and settings.out is not None and (settings.out / "export.json").is_file()
    if settings.out is not None and not is_written:
        check_empty(settings.out)
    # Heavy from here on: keeps wrong values fast.
    from intern.exporting.export import export, open_export, prove_command, prove_served
    from intern.exporting.hub import check_files, upload

    if settings.prove is not None:
        record = prove_served(run, settings)
        equal, asked = record["served"]["answers_equal"], record["served"]["prompts"]
        say(f"{settings.prove}: the server answers as the evaluated model: {equal} of {asked} greedy answers are equal")
        return
    assert settings.out is not None
    done = open_export(settings.out, run) if is_written else export(run, settings)
    for name, size in done.sizes.items():
        sys.stdout.write(f"{size / MIB:10,.1f} MiB  {visible(name)}\n")
    if (figures := done.record["figures"]) is not None:
        say(
            f"{done.folder}: mean KL divergence {figures['mean_kl']:.2g} nats (limit {done.record['limit_mean_kl']:g}), "
            f"{figures['answers_equal']} of {figures['prompts']} greedy answers equal, by {figures['consumer']}"
        )
    if (later := prove_command(done.record, run, done.folder)) is not None:
        say(f"{done.folder}: not proven in {done.record['program']}, which does it: {later}")
    if settings.format == "hub":
        assert settings.repo is not None
        check_files(done)
        say(
            f"uploaded: {upload(done, settings.repo, settings.private)}"
            if settings.upload
            else f"repo={settings.repo}: nothing was uploaded: the same command with upload=true uploads these files"
        )


if __name__ == "__main__":
    main()
