"""Settings that depend on others, or on the length of the run, for messages about them."""

from collections.abc import Sequence

from detection.config.settings import Settings

RESTARTS = "CosineAnnealingWarmRestartsWithWarmup"
# Settings that only some strategies read.
LIMITED = {
    "scheduler.index": ("LambdaLR",),
    "scheduler.scale": ("LambdaLR",),
    **{f"scheduler.{name}": (RESTARTS,) for name in ("T_0", "T_mult")},
    **{f"scheduler.{name}": (RESTARTS, "FlatCosine", "UnshiftedCosine") for name in ("eta_min", "eta_min_factor")},
    **{f"scheduler.{name}": ("FlatCosine",) for name in ("flat", "constant_finish")},
    **{f"scheduler.{name}": ("WarmupMultiStepLR",) for name in ("milestones", "warmup_bias_lr")},
    "scheduler.warmup_start_factor": ("WarmupMultiStepLR", "FlatCosine", "UnshiftedCosine"),
    "scheduler.gamma": ("WarmupMultiStepLR", "StepLR"),
}


def no_effect(given: Sequence[str], settings: Settings) -> list[str]:
    """Return a notice for the given settings that schedule or detector does not read, for each reason."""
    strategy, detector, sections = settings.scheduler.strategy, settings.model.detector, settings.detector_sections()
    unread = sections[detector].without_effect() if detector in sections else {}
    foreign: dict[str, list[str]] = {}
    for path in given:
        section = path.partition(".")[0]
        if section == "scheduler" and strategy not in LIMITED.get(path, (strategy,)):
            foreign.setdefault(f"scheduler.strategy = {strategy}", []).append(path)
        elif section in sections and section != detector:
            foreign.setdefault(f"model.detector = {detector}", []).append(path)
        elif path in unread:
            foreign.setdefault(unread[path], []).append(path)
    return [
        f"warning: {', '.join(paths)} {'has' if len(paths) == 1 else 'have'} no effect with {value}"
        for value, paths in foreign.items()
    ]


def follows_length(settings: Settings) -> list[str]:
    """Name the settings whose effect in every step depends on the number of steps of the whole run."""
    scheduler, names = settings.scheduler, []
    if scheduler.strategy == "CosineAnnealingWarmRestartsWithWarmup" and scheduler.T_0 is None:
        names.append("the cosine schedule (scheduler.T_0: null)")
    if scheduler.strategy in ("FlatCosine", "UnshiftedCosine"):
        names.append(f"the cosine schedule (scheduler.strategy: {scheduler.strategy})")
    names += ["train.swa_cycles"] * (settings.train.swa_cycles > 0)
    names += ["scheduler.warmup=auto"] * (scheduler.warmup == "auto")
    names += ["train.ema_decay=auto"] * (settings.train.ema_decay == "auto")
    if (own := settings.detector_sections().get(settings.model.detector)) is not None:
        names += own.bound_to_length()
    return names + ["train.clean_finish"] * (settings.train.clean_finish > 0)
