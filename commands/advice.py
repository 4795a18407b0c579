"""`run_pretraining.py --advise`: the commands that are worth running for these images on this computer, and why."""

import shlex
from collections.abc import Callable
from typing import Any

from commands.arithmetic import Hardware
from commands.encoder_choice import choose_encoder
from commands.pretraining_settings import PretrainingSettings
from commands.settings import SettingsError
from training.callbacks import duration

# Settings that the commands repeat, and all that are not ignored.
_REPEATED = ("dataset", "num_channels", "use_cpu", "time_budget")
_USED = (*_REPEATED, "advise", "max_bad_fraction", "check_images", "validation_fraction", "debug")
_FEW, _MANY = 20_000, 100_000
_DEFAULT_BUDGET = {True: "30m", False: "2h"}  # on a CPU, on a GPU


def check_advisable(settings: PretrainingSettings) -> None:
    """Raise SettingsError if a setting is given that the advice would ignore."""
    ignored = [name for name in settings.values if settings.is_users(name) and name not in _USED]
    if ignored:
        raise SettingsError(
            f"--{ignored[0]} has no effect with --advise, which chooses method, model and length; leave it out. "
            f"It takes {', '.join(f'--{name}' for name in _REPEATED)}"
        )


def advise(
    settings: PretrainingSettings,
    data: str,
    num_images: int,
    side: int,
    hardware: Hardware,
    measure: Callable[[dict[str, Any]], float],
) -> str:
    """Return two or three commands with their reasons and what to expect.

    Args:
        side: Median of the shortest side of the images, in pixels.
        measure: See `choose_encoder`.
    """
    budget = settings.time_budget or _DEFAULT_BUDGET[hardware.is_cpu]
    seconds = settings.seconds or (1800.0 if hardware.is_cpu else 7200.0)
    best = choose_encoder(num_images, side, seconds, hardware.is_cpu, measure)
    own = [word for name, value in best.sizes.items() for word in (f"--{name}", str(value))]
    common = ["--dataset", *settings.dataset, *(["--use_cpu"] if settings.use_cpu else []), "--time_budget", budget]
    common.append("--output_dir")
    channels = [] if settings.num_channels == 3 else ["--num_channels", str(settings.num_channels)]
    python = ["python"] if hardware.world_size == 1 else ["accelerate", "launch"]
    pretrained = "facebook/dinov2-small"
    smaller = ["--image_size", "98"] if hardware.is_cpu else []
    scratch = [*python, "run_pretraining.py", "--method", "mae", *own, *channels, *common, "out"]
    evaluate = ["python", "run_evaluation.py", "--model", pretrained, "--dataset", "./labeled"]
    go_on = [*python, "run_pretraining.py", "--init_from", pretrained, "--method", "dinov2", *smaller]
    go_on += ["--head_warmup_epochs", "1", "--layer_decay", "0.75", "--gram_weight", "2"]
    go_on += [*common, "out-continued"]
    tune = [*python, "run_finetune.py", "--model", "out", "--dataset", "./labeled", "--output_dir", "out-cls"]
    with_pretrained = [
        (
            evaluate,
            "frozen features of an encoder that saw millions of images, on your labeled ones: minutes, no training, "
            "and often better than all that a small data set can teach. On photographs of objects (16 classes, 179 "
            "labeled) a logistic regression on an ImageNet network has an accuracy of 0.665; our best encoder from "
            "scratch, fine-tuned, 0.246",
        ),
        (
            go_on,
            "continue such an encoder on your images, if they look unlike photographs from the web. On the same "
            "photographs, 20 minutes on one core changed the accuracy of kNN from 0.383 to 0.446 and that of logistic "
            "regression from 0.517 to 0.498: compare it by the command above with --model out-continued, and keep it "
            "only if it is better",
        ),
    ]
    from_scratch = (
        scratch,
        f"an encoder of your own, from nothing: the largest that sees enough images in {budget} here (about "
        f"{best.images_per_second:,.3g} images/s, {best.num_seen:,.0f} images, {best.num_seen / num_images:,.0f} "
        "epochs). Expect a gain over training from random weights with few labels (Fashion-MNIST, 20 a class: 0.775 "
        "against 0.707), not over a pretrained encoder. For frozen features try --method simdino as well: after 24 "
        "minutes on one core its accuracy of kNN is 0.699 on Fashion-MNIST, MAE's 0.654, and 0.193 and 0.163 on the "
        f"photographs of objects, where the difference is within the error. Then: {shlex.join(tune)}",
    )
    if num_images < _FEW:
        chosen, why = (
            [*with_pretrained, from_scratch],
            "few: an encoder that somebody trained on many is the better start",
        )
    elif num_images < _MANY:
        chosen, why = [with_pretrained[1], from_scratch, with_pretrained[0]], "enough to continue a pretrained encoder"
    else:
        chosen, why = [from_scratch, with_pretrained[0]], "enough to train an encoder of your own"
    lines = [
        f"data: {data}",
        f"device: {hardware.device_type}, {hardware.num_cpus} CPU cores, {hardware.world_size} process(es); "
        f"time: {duration(seconds)}",
        f"{num_images:,} images are {why}. Worth running, in this order:",
    ]
    for number, (command, reason) in enumerate(chosen, 1):
        lines += ["", f"{number}. {shlex.join(command)}", f"   {reason}."]
    return "\n".join(lines)
