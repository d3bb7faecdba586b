"""The doctor's checks of what must be reached: the model hub, the weights, W&B."""

import os

from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.doctor_pieces import DoctorPieces
from intern.inspection.installation import answers
from intern.units import GIB


def check_hub(pieces: DoctorPieces) -> Check:
    """Check whether the model hub answers, unless the model is a local folder."""
    if pieces.is_folder:
        return Check("hub", GREEN, "not needed: the model is a local folder")
    if pieces.offline_by_choice:
        return Check("hub", AMBER, "HF_HUB_OFFLINE is set: only cached files are used", "unset it to download")
    from huggingface_hub import constants

    if pieces.online:
        return Check("hub", GREEN, f"{constants.ENDPOINT} answers")
    return Check("hub", AMBER, f"{constants.ENDPOINT} does not answer: only cached files are used", "check the network")


def check_weights(pieces: DoctorPieces) -> Check:
    """Check that the weights are in the folder or in the cache, or can be downloaded."""
    pieces.known("base", "model")
    size = pieces.download
    return Check("weights", GREEN, f"{size / GIB:.1f} GiB to download" if size else "present")


def check_tracker(pieces: DoctorPieces) -> Check:
    """Check W&B: its mode, whether there is an API key, and whether it answers."""
    settings = pieces.known("logger", "configuration").get("wandb")
    mode = (settings is not None and settings.mode) or os.environ.get("WANDB_MODE")
    if settings is None or mode in ("offline", "disabled"):
        return Check("W&B", GREEN, mode or "off (logger=none)")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        if mode == "online":
            return Check(
                "W&B",
                RED,
                "logger.mode=online, but there is no API key",
                "run `wandb login`, or set logger.mode=offline",
            )
        return Check("W&B", GREEN, "no API key: the run is logged offline, `wandb sync` uploads it later")
    url = wandb.Settings().base_url
    if answers(url):
        return Check("W&B", GREEN, f"found an API key, and {url} answers")
    status = RED if mode == "online" else AMBER
    return Check(
        "W&B", status, f"found an API key, but {url} does not answer", "check the network, or set logger.mode=offline"
    )
