"""Flags of the TensorFlow EfficientDet: each becomes settings, or one line that says what answers it."""

import shlex
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from detection.config.command_line import DEFAULTS, device_flags
from detection.config.estimator_flags import MODEL_NAMES, NEVER, REFUSED
from detection.config.hparams import NAMES, translate_hparams
from detection.config.loading import load_settings
from detection.errors import SettingsError
from tests.support.paths import REPOSITORY
from tests.support.training_runs import load_main

# Options of the document (flags of its launcher first), word for word.
DOCUMENT = shlex.split(
    """
    use_horovod hls_type kubernetes_run backbone_ckpt ckpt cp_every_n_steps deterministic eval_after_training
    eval_batch_size eval_master eval_samples eval_timeout gcp_project hparams input_partition_dims iterations_per_loop
    log_every_n_steps min_eval_interval mode model_dir model_name no_hpu num_cores num_cores_per_replica num_epochs
    num_examples_per_epoch sbs_test testdev_dir tpu tpu_zone train_batch_size training_file_pattern use_amp
    use_fake_data use_spatial_partition use_tpu use_xla val_json_file validation_file_pattern dataset_dir
    """
)


def parse(monkeypatch: pytest.MonkeyPatch, line: str) -> Any:
    words = ["--experiment", str(REPOSITORY / "efficientdet"), *shlex.split(line)]
    monkeypatch.setattr(sys, "argv", ["efficientdet/main.py", *words])
    return load_main().parse_arguments()


def load(monkeypatch: pytest.MonkeyPatch, line: str) -> Any:
    arguments = parse(monkeypatch, line)
    return load_settings(DEFAULTS, arguments.config, arguments.settings, device_flags(arguments))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--train_batch_size 8 --eval_batch_size=2", {"train.batch_size": 8, "evaluation.batch_size": 2}),
        ("--cp_every_n_steps 600", {"train.save_frequency": 600}),
        ("--keep_checkpoint_max=300", {"train.keep_checkpoints": 300}),
        ("--log_every_n_steps=100 --eval_samples 5000", {"run.log_frequency": 100, "evaluation.max_images": 5000}),
        ("--num_epochs 300", {"train.steps": "300ep"}),
        # 300 epochs of 120,000 examples on 2 processes of 8: 2,250,000 steps
        ("--num_epochs 300 --num_examples_per_epoch 120000 --train_batch_size 8", {"train.steps": 2_250_000}),
        ("--use_amp --use_xla", {"run.precision": "bf16", "run.compile": True}),
        ("--use_amp=False --nouse_xla", {"run.precision": "off", "run.compile": False}),
        ("--use_fake_data train.steps=7", {"data.fake": True, "model.num_classes": 80, "train.steps": 7}),
        ("--use_fake_data model.num_classes=3", {"data.fake": True, "model.num_classes": 3}),
        ("--no_hpu", {"run.device": "auto"}),
        ("--no_hpu --device cpu", {"run.device": "cpu"}),
        ("--deterministic", {"run.deterministic": True}),
        ("--mode train", {"evaluation.evaluate_frequency": None}),
        ("--ckpt a.pth --dataset_dir here", {"model.pretrained": "a.pth", "data.root": "here"}),
        ("--backbone_ckpt b.safetensors", {"model.pretrained": "b.safetensors"}),
        ("--val_json_file /a/val.json", {"data.validation_annotations": "/a/val.json"}),
        (
            "--hparams num_classes=91,use_bfloat16=false --hparams=learning_rate=1e-2,lr_warmup_epoch=1.5,momentum=.8",
            {"run.precision": "off", "train.learning_rate": 0.01, "scheduler.warmup": "1.5ep", "train.momentum": 0.8},
        ),
        (
            "--hparams image_size=640x640,input_rand_hflip=false,moving_average_decay=0,clip_gradients_norm=5",
            {"train.image_size": 640, "evaluation.image_size": 640, "data.augmentation.horizontal_flip.p": 0.0,
             "train.ema_decay": None, "train.clip_norm": 5.0},
        ),
        (
            "--hparams alpha=0.5,gamma=2,box_loss_weight=10,aspect_ratios=[1.0,2.0,0.5]",
            {"efficientdet.alpha": 0.5, "efficientdet.gamma": 2.0, "efficientdet.box_weight": 10.0,
             "efficientdet.aspects": (1.0, 2.0, 0.5)},
        ),
        ("--eval_after_training --use_tpu=false", {}),
    ],
)  # fmt: skip
def test_a_flag_is_a_setting(monkeypatch: pytest.MonkeyPatch, line: str, expected: dict[str, Any]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings, notices = load(monkeypatch, line)
    assert {path: attrgetter(path)(settings) for path in expected} == expected
    flags = [word.split("=")[0].replace("--no", "--", 1) for word in shlex.split(line) if word.startswith("--use")]
    assert all(any(flag in notice for notice in notices) for flag in flags if flag != "--use_tpu")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--use_horovod 8 --train_batch_size 8 'data.root=my data'",
            "--use_horovod: start the processes with: torchrun --nproc_per_node=8 efficientdet/main.py "
            "--train_batch_size 8 'data.root=my data'",
        ),
        ("--mode=train --use_horovod", "torchrun --nproc_per_node=N efficientdet/main.py --mode=train"),
        ("--training_file_pattern /a/train-1 /a/train-2", "--training_file_pattern /a/train-1: TFRecords are packed"),
        ("--validation_file_pattern=v-*", "pack.py --from-tfrecord PATTERN --output SHARDS; then say data.root=SHARDS"),
        ("--eval_after_training=false", "the end of a run is always evaluated"),
        ("--mode eval", "--mode eval: needs --model_dir"),
        ("--eval_timeout 60", "--eval_timeout: belongs to --mode eval, or to validation.py --follow RUN"),
        ("--mode eval --model_dir x --min_eval_interval -1", "--min_eval_interval -1: must be a number"),
        ("--num_epochs 3 --num_examples_per_epoch 100", "needs --train_batch_size and no subdivisions"),
        ("--num_examples_per_epoch 100 --train_batch_size 8", "needs --num_epochs"),
        (
            "--testdev_dir 'an output' --model_dir m --dataset_dir d",
            "by: validation.py --weights m --no-ground-truth --output 'an output' data.root=d data.validation_annot",
        ),
        ("--testdev_dir t", "validation.py --weights RUN --no-ground-truth --output t data.root=data/coco data.valid"),
        ("--ckpt old.h5", "--ckpt old.h5: checkpoints of TensorFlow are not read"),
        ("--ckpt a.pth --backbone_ckpt b.pth", "--backbone_ckpt and --ckpt contradict each other"),
        ("--train_batch_size 4 train.batch_size=5", "train.batch_size and --train_batch_size contradict"),
        ("--hparams learning_rat=0.1", "unknown name 'learning_rat'; the nearest is learning_rate"),
        ("--hparams momentum=fast", "train.momentum = 'fast'"),
        ("--hparams image_size=512x640", "must be one side or two equal ones"),
        ("--hparams num_classes=20", "--hparams num_classes=20: is 90 or 91 for COCO"),
        ("--hparams fpn_num_filters=64", "follows from the variant"),
        ("--hparams skip_crowd_during_training=false", "crowd regions are never learned here"),
        ("--hparams momentum", "expected name=value"),
        *(
            (f"--hparams aspect_ratios={value}", f"--hparams aspect_ratios={value}: must be three ratios of width to")
            for value in ("[1,2]", "1", "[1,2,true]", "[1,2,0]", "[1,2,-.inf]", "[[1,1],[2,1],3]", "[[1,1],[2],[3,1]]")
        ),
        *((f"--{flag}=1", f"--{flag}: {answer}") for flag, answer in {**REFUSED, **NEVER}.items()),
    ],
)  # fmt: skip
def test_what_has_no_setting_is_answered_in_one_line(monkeypatch: pytest.MonkeyPatch, line: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(monkeypatch, line)
    assert message in str(raised.value) and "\n" not in str(raised.value) and raised.value.exit_code == 2


def test_every_option_of_the_document_is_known_and_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "efficientdet_commands.md").read_text()
    parser = load_main().Parser("main.py", "")
    parser.add_settings()
    parser.add_training_flags()
    assert [flag for flag in DOCUMENT if f"--{flag}" not in parser._option_string_actions] == []
    assert [flag for flag in DOCUMENT if f"| `--{flag}" not in page] == []
    assert [name for name in NAMES if f"`{name}`" not in page] == []


def test_the_defaults_are_the_recipe_of_the_smallest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = load_settings(DEFAULTS, [REPOSITORY / "recipes" / "efficientdet_d0.yaml"])
    assert load(monkeypatch, "")[0] == recipe
    for name in MODEL_NAMES:  # every name has a recipe of its own variant
        assert load(monkeypatch, f"--model_name {name}")[0].efficientdet.variant == name.removeprefix("efficientdet-")


def test_a_typing_error_names_the_nearest_flag(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, "--train_batchsize 8")
    line = "unrecognized arguments: --train_batchsize; the nearest is --train_batch_size; see --help"
    assert left.value.code == 2 and capsys.readouterr().err == f"efficientdet/main.py: {line}\n"


def test_commas_within_a_list_do_not_end_it() -> None:
    ratios = [("aspect_ratios", "efficientdet.aspects", [1.0, 2, 0.5]), ("gamma", "efficientdet.gamma", 2)]
    assert translate_hparams("aspect_ratios=[1.0,2,.5], gamma=2") == ratios


def test_files_of_tensorflow_are_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "efficientnet-b0").mkdir()
    (tmp_path / "efficientnet-b0" / "model.ckpt.index").touch()
    (tmp_path / "train-00000-of-00032.tfrecord").touch()
    for words, answer in (
        (f"--backbone_ckpt {tmp_path / 'efficientnet-b0'}", "checkpoints of TensorFlow are not read"),
        (f"--ckpt {tmp_path / 'efficientnet-b0' / 'model.ckpt'}", "checkpoints of TensorFlow are not read"),
        (f"--dataset_dir {tmp_path}", "pack.py --from-tfrecord"),
    ):
        with pytest.raises(SettingsError, match=answer):
            load(monkeypatch, words)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train-00000-of-00003.tar").touch()  # of pack.py, numbered as TFRecords are
    packed = load(monkeypatch, f"--dataset_dir {tmp_path / 'packed'}")[0]
    assert packed.data.root == str(tmp_path / "packed")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train-00000-of-00032").touch()  # the converter's own names have no suffix
    with pytest.raises(SettingsError, match="TFRecords are packed once"):
        load(monkeypatch, f"--dataset_dir {tmp_path / 'plain'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").touch()
    assert load(monkeypatch, f"--ckpt {tmp_path / 'run'}")[0].model.pretrained == str(tmp_path / "run" / "best.pt")


def test_the_directory_of_a_run_begins_or_continues_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = f"--model_dir {tmp_path} --config mine.yaml"
    fresh = parse(monkeypatch, line)
    assert (fresh.output, fresh.resume) == (tmp_path, None)
    assert fresh.config == [REPOSITORY / "efficientdet" / "args.yaml", Path("mine.yaml")]
    (tmp_path / "last.pt").touch()
    continued = parse(monkeypatch, line)
    assert (continued.output, continued.resume, continued.config) == (None, str(tmp_path), [])
    assert continued.notices == [f"--model_dir {tmp_path}: holds a run, which is continued; not read again: mine.yaml"]
    followed = parse(monkeypatch, f"--mode eval --model_dir {tmp_path}")
    assert (followed.output, followed.resume, followed.model_dir) == (None, None, tmp_path)
    with pytest.raises(SettingsError, match="--model_dir and --output are both given"):
        parse(monkeypatch, f"--model_dir {tmp_path} --output elsewhere")


def test_a_named_model_takes_its_recipe_below_the_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parse(monkeypatch, "--model_name efficientdet-d7x --config mine.yaml")
    defaults, recipe, own = arguments.config
    assert defaults == REPOSITORY / "efficientdet" / "args.yaml" and own == Path("mine.yaml")
    assert recipe == REPOSITORY / "recipes" / "efficientdet_d7x.yaml"
    flags = [(flag.path, flag.value) for flag in device_flags(arguments)]
    assert flags == [("model.detector", "efficientdet"), ("efficientdet.variant", "d7x")]
