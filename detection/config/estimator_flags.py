"""Flags of Habana's EfficientDet example for TensorFlow, each mapped to settings or refused with what answers it.

`docs/efficientdet_commands.md` has the table. Imports no torch.

Source: `main.py` of TensorFlow/computer_vision/efficientdet in github HabanaAI/Model-References, branches 1.1 to 1.9,
    and of github google/automl, which it comes from
"""

import argparse
import functools
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.config.hparams import translate_hparams
from detection.config.loading import Flag
from detection.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_NAMES = (*(f"efficientdet-{variant}" for variant in (*(f"d{n}" for n in range(8)), "d7x")), "retinanet")
TFRECORD_SHARD = re.compile(r".+-\d{5}-of-\d{5}(\.tfrecords?)?|.+\.tfrecords?")
PACK = "TFRecords are packed once by pack.py --from-tfrecord PATTERN --output SHARDS; then say data.root=SHARDS"
NO_TPU = "there are no TPUs here; --device takes cpu, cuda, mps and hpu"
NO_PARTITION = (
    "an image is not divided among devices; train.activation_checkpointing=true and train.subdivisions save memory"
)
COUNT_PROCESSES = "torchrun --nproc_per_node=N starts one process per device"
# Flag -> what answers it.
REFUSED = {
    "hls_type": f"the kind of machine need not be said; {COUNT_PROCESSES}",
    "kubernetes_run": "every pod starts torchrun itself, with --nnodes and --rdzv_endpoint: docs/several_gpus.md",
    "eval_master": "validation.py --follow RUN evaluates on any machine that sees the run directory",
    "gcp_project": NO_TPU,
    "tpu": NO_TPU,
    "tpu_zone": NO_TPU,
    "num_cores": f"there are no TPUs here; {COUNT_PROCESSES}",
    "num_cores_per_replica": NO_PARTITION,
    "input_partition_dims": NO_PARTITION,
    "iterations_per_loop": "there is no loop on the device; run.log_frequency says how often numbers are read back",
}
TESTDEV = "data.validation_annotations=annotations/image_info_test-dev2017.json data.validation_images=test2017"
TESTDEV_PLACES = (("model_dir", "RUN"), ("dataset_dir", "data/coco"))  # flags, and what stands for them if absent
# Boolean flags that may be false, as it is so, and not true.
NEVER = {
    "use_tpu": NO_TPU,
    "use_spatial_partition": NO_PARTITION,
    "sbs_test": "tensors are not dumped to compare devices; --dry-run takes a step on one, tests compare their numbers",
}
SWITCHES = ("eval_after_training", "no_hpu", "use_amp", "use_fake_data", "use_xla", *NEVER)
TRUE, FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")
FAKE_CLASSES = 80  # COCO's, for --use_fake_data


def add_estimator_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags, hidden: `docs/efficientdet_commands.md` lists them."""
    add = functools.partial(group.add_argument, help=argparse.SUPPRESS)
    for name in ("train_batch_size", "cp_every_n_steps", "keep_checkpoint_max", "log_every_n_steps", "eval_samples"):
        add(f"--{name}", type=int)
    add("--num_examples_per_epoch", type=int)
    add("--num_epochs", type=float)
    add("--mode", choices=["train", "eval", "train_and_eval"])
    add("--model_name", choices=MODEL_NAMES, metavar="NAME")
    add("--model_dir", type=Path)
    for name in ("eval_timeout", "min_eval_interval"):
        add(f"--{name}", type=float)
    for name in ("backbone_ckpt", "ckpt", "dataset_dir", "val_json_file", "testdev_dir"):
        add(f"--{name}")
    for name in ("training_file_pattern", "validation_file_pattern"):
        add(f"--{name}", nargs="+")  # a shell may have expanded the pattern
    add("--hparams", action="append")
    for name in SWITCHES:
        add(f"--{name}", type=boolean)
    for name in ("use_horovod", *REFUSED):
        add(f"--{name}", nargs="?", const="")


def boolean(text: str) -> bool:
    """Parse the value of a switch."""
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"must be true or false, is {text!r}")
    return text.lower() in TRUE


def separate_switches(words: Sequence[str]) -> list[str]:
    """Give bare switches their value, --use_amp=true and for --nouse_amp false; argparse would take the next word."""
    spelled = {f"--{name}": f"--{name}=true" for name in SWITCHES} | {
        f"--no{name}": f"--{name}=false" for name in SWITCHES
    }
    return [spelled.get(word, word) for word in words]


def place_run(arguments: argparse.Namespace) -> None:
    """Turn --model_dir into --resume, where it holds a run, or --output; a new run gets the overlays that flags name.

    These are of --experiment its args.yaml, of --model_name its recipe, below those of --config.

    Raises:
        SettingsError: another place is given too, or flags of --mode eval without it.
    """
    directory, following = arguments.model_dir, arguments.mode == "eval"
    if following and directory is None:
        raise SettingsError("--mode eval: needs --model_dir, the directory of the run to follow")
    for name in ("eval_timeout", "min_eval_interval"):
        value = getattr(arguments, name)
        if value is not None and not following:
            raise SettingsError(f"--{name}: belongs to --mode eval, or to validation.py --follow RUN")
        if value is not None and not 0 <= value < math.inf:
            raise SettingsError(f"--{name} {value:g}: must be a number of seconds from 0")
    if directory is not None and not following:
        for name in ("output", "resume"):
            if getattr(arguments, name) is not None:
                raise SettingsError(f"--model_dir and --{name} are both given; each names the run directory")
        if (directory / "last.pt").exists():
            arguments.resume = str(directory)
            dropped = f"; not read again: {', '.join(map(str, arguments.config))}" if arguments.config else ""
            arguments.notices = [f"--model_dir {directory}: holds a run, which is continued{dropped}"]
            arguments.config = []
        else:
            arguments.output = directory
    if arguments.resume is None and not following:  # a run that exists keeps its own settings
        named = [] if arguments.experiment is None else [arguments.experiment / "args.yaml"]
        if arguments.model_name is not None:
            named.append(REPOSITORY / "recipes" / f"{arguments.model_name.replace('-', '_')}.yaml")
        arguments.config = [*named, *arguments.config]


def translate_flags(given: Mapping[str, Any]) -> list[Flag]:
    """Translate the flags of a command line to settings.

    Args:
        given: parsed command line by name, without flags that are absent.

    Raises:
        SettingsError: a flag is refused; the message says what answers it.
    """
    refuse(given)
    simple: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "train_batch_size": ("train.batch_size", int),
        "eval_samples": ("evaluation.max_images", int),
        "cp_every_n_steps": ("train.save_frequency", int),
        "keep_checkpoint_max": ("train.keep_checkpoints", int),
        "log_every_n_steps": ("run.log_frequency", int),
        "backbone_ckpt": ("model.pretrained", functools.partial(torch_file, "--backbone_ckpt")),
        "ckpt": ("model.pretrained", functools.partial(torch_file, "--ckpt")),
        "dataset_dir": ("data.root", dataset_folder),
        "val_json_file": ("data.validation_annotations", lambda name: str(Path(name).expanduser().absolute())),
        "use_amp": ("run.precision", lambda wanted: "bf16" if wanted else "off"),
        "use_xla": ("run.compile", bool),
        "use_fake_data": ("data.fake", bool),
    }
    settings = [Flag(f"--{name}", path, read(given[name])) for name, (path, read) in simple.items() if name in given]
    typed = [word.partition("=")[0] for word in given.get("settings", ())]
    if given.get("use_fake_data") and not any(name.endswith(("num_classes", "class_names")) for name in typed):
        settings.append(Flag("--use_fake_data", "model.num_classes", FAKE_CLASSES))
    if given.get("no_hpu") and given.get("device") is None and given.get("gpu") is None:
        settings.append(Flag("--no_hpu", "run.device", "cpu" if habana_is_installed() else "auto"))
    if given.get("mode") == "train":
        settings.append(Flag("--mode train", "evaluation.evaluate_frequency", None))
    if "num_examples_per_epoch" in given and "num_epochs" not in given:
        raise SettingsError("--num_examples_per_epoch: needs --num_epochs; together they are a number of steps")
    if "num_epochs" in given:
        settings.append(Flag("--num_epochs", "train.steps", duration_of(given)))
    if "model_name" in given:
        variant = given["model_name"].removeprefix("efficientdet-")
        settings.append(Flag("--model_name", "model.detector", "efficientdet"))
        settings.append(Flag("--model_name", "efficientdet.variant", variant))
    for text in given.get("hparams", ()):
        settings += [Flag(f"--hparams {name}", path, value) for name, path, value in translate_hparams(text)]
    return settings


def refuse(given: Mapping[str, Any]) -> None:
    """Refuse flags without a counterpart, and those of a use that another script has.

    Raises:
        SettingsError: with what answers the flag.
    """
    if (count := given.get("use_horovod")) is not None:
        command = f"torchrun --nproc_per_node={count or 'N'} {typed_without_horovod()}"
        raise SettingsError(f"--use_horovod: start the processes with: {command}")
    for name, answer in REFUSED.items():
        if name in given:
            raise SettingsError(f"--{name}: {answer}")
    for name, answer in NEVER.items():
        if given.get(name):
            raise SettingsError(f"--{name}: {answer}")
    if given.get("eval_after_training") is False:
        raise SettingsError("--eval_after_training=false: the end of a run is always evaluated")
    for name in ("training_file_pattern", "validation_file_pattern"):
        if name in given:
            raise SettingsError(f"--{name} {given[name][0]}: {PACK}")
    if (output := given.get("testdev_dir")) is not None:
        run, root = (shlex.quote(str(given.get(name) or other)) for name, other in TESTDEV_PLACES)
        raise SettingsError(
            f"--testdev_dir {output}: the COCO results of images without ground truth are written there by: "
            f"validation.py --weights {run} --no-ground-truth --output {shlex.quote(output)} data.root={root} {TESTDEV}"
        )


def typed_without_horovod() -> str:
    """Return the command line of this process as it would be typed, without --use_horovod."""
    words, script = sys.argv[1:], "yolo-v3/main.py"
    if words[:1] == ["--experiment"]:
        words, script = words[2:], f"{Path(words[1]).name}/main.py"
    kept: list[str] = []
    for number, word in enumerate(words):
        value = number and words[number - 1] == "--use_horovod" and word.isdecimal()
        if not value and word.split("=")[0] != "--use_horovod":
            kept.append(word)
    return shlex.join([script, *kept])


def duration_of(given: Mapping[str, Any]) -> int | str:
    """Return `train.steps` of --num_epochs: epochs of the data, or steps where --num_examples_per_epoch says how many.

    Raises:
        SettingsError: --num_examples_per_epoch without --train_batch_size, or with subdivisions.
    """
    epochs = given["num_epochs"]
    if (examples := given.get("num_examples_per_epoch")) is None:
        return f"{epochs:g}ep"
    batch_size, words = given.get("train_batch_size"), given.get("settings", ())
    if not batch_size or batch_size < 1 or any(word.split("=")[0].endswith("subdivisions") for word in words):
        raise SettingsError(
            "--num_examples_per_epoch: needs --train_batch_size and no subdivisions to become a number of steps; or "
            "leave it out, an epoch then is one pass over the images"
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    return max(round(epochs * examples / (batch_size * (int(processes) if processes.isdecimal() else 1))), 1)


def torch_file(flag: str, name: str) -> str:
    """Return the file of initial weights; of a run directory its best.pt.

    Raises:
        SettingsError: it is a checkpoint of TensorFlow.
    """
    path = Path(name).expanduser()
    if (path / "best.pt").is_file():
        return str(path / "best.pt")
    if path.is_dir() or path.suffix in (".h5", ".index", ".ckpt") or path.with_name(f"{path.name}.index").exists():
        raise SettingsError(
            f"{flag} {name}: checkpoints of TensorFlow are not read; take the same weights as a .pth or .safetensors "
            "file of timm or effdet, or model.pretrained=true"
        )
    return str(path)


def dataset_folder(name: str) -> str:
    """Return `data.root`.

    Raises:
        SettingsError: the folder holds TFRecords.
    """
    path = Path(name).expanduser()
    if path.is_dir() and any(TFRECORD_SHARD.fullmatch(file.name) for file in path.iterdir()):
        raise SettingsError(f"--dataset_dir {name}: {PACK}")
    return name


def habana_is_installed() -> bool:
    """Return whether `auto` could choose an HPU."""
    import importlib.util

    return importlib.util.find_spec("habana_frameworks") is not None
