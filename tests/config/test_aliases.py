"""Flags of other programs: each is translated to a setting, and contradictions are refused."""

import argparse
import shlex
from operator import attrgetter
from typing import Any

import pytest

from detection.config.aliases import add_evaluation_flags, add_training_flags, separate_values
from detection.config.command_line import DEFAULTS, Parser, device_flags
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.errors import SettingsError
from tests.support.paths import REPOSITORY

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


def parse(line: str) -> argparse.Namespace:
    parser = Parser("main.py", "")
    parser.add_settings()
    add_training_flags(parser)
    return parser.parse_intermixed_args(shlex.split(line))


def load(line: str) -> tuple[Settings, list[str]]:
    arguments = parse(line)
    return load_settings(DEFAULTS, arguments.config, arguments.settings, device_flags(arguments))


@pytest.mark.parametrize(
    ("line", "path", "expected"),
    [
        ("--gpu 1", "run.device", "cuda:1"),
        ("--device mps", "run.device", "mps"),
        ("--hpu", "run.device", "hpu"),
        ("--hpu=1", "run.device", "hpu"),
        ("--hpus 1", "run.device", "hpu"),
        ("--hpu train.steps=7", "run.device", "hpu"),  # does not take the word for its value
        ("--hpu --device hpu", "run.device", "hpu"),
        ("--hpu --lazy", "run.lazy", True),
        ("--autocast", "run.precision", "bf16"),
        ("--deterministic", "run.deterministic", True),
        ("--log-interval 400", "run.log_frequency", 400),
        ("--log-interval=48", "run.log_frequency", 48),
        ("--batch-size 16", "train.batch_size", 16),
        ("--eval-batch-size=64", "evaluation.batch_size", 64),
        ("--epoch 2", "train.steps", "2ep"),
        ("--epochs 2.5", "train.steps", "2.5ep"),
        ("--epochs 2 --epoch 2", "train.steps", "2ep"),
        ("--eval bbox --batch-size 3", "train.batch_size", 3),
        ("--cfg-options data_root=/data/pytorch/coco2017/", "data.root", "/data/pytorch/coco2017/"),
        ("--cfg-options data.samples_per_gpu=9 --lazy", "train.batch_size", 9),
        ("--cfg-options data.workers_per_gpu=2", "data.num_workers", 2),
        ("--cfg-options optimizer.type=SGD optimizer.momentum=0.8", "train.optimizer", "sgd"),
        ("--cfg-options optimizer.type=SGD optimizer.momentum=0.8", "train.momentum", 0.8),
        ("--cfg-options optimizer.weight_decay=1e-3", "train.weight_decay", 1e-3),
        ("--cfg-options optimizer_config.grad_clip.max_norm=10", "train.clip_norm", 10),
        ("--cfg-options lr_config.warmup_iters=1000", "scheduler.warmup", 1000),
        ("--cfg-options lr_config.warmup_ratio=0.5", "scheduler.warmup_start_factor", 0.5),
        ("--cfg-options lr_config.step=[228,256]", "scheduler.milestones", ("228ep", "256ep")),
        ("--cfg-options lr_config.step=228,256", "scheduler.milestones", ("228ep", "256ep")),
        ("--cfg-options lr_config.step=228", "scheduler.milestones", ("228ep",)),
        ("--cfg-options lr_config.step=[228]", "scheduler.strategy", "WarmupMultiStepLR"),
        ("--cfg-options lr_config.gamma=0.3", "scheduler.gamma", 0.3),
        ("--cfg-options runner.max_epochs=273", "train.steps", "273ep"),
        ("--cfg-options checkpoint_config.interval=30", "train.save_frequency", "30ep"),
        ("--cfg-options checkpoint_config.max_keep_ckpts=3", "train.keep_checkpoints", 3),
        ("--cfg-options evaluation.interval=7", "evaluation.evaluate_frequency", "7ep"),
        ("--cfg-options log_config.interval=50", "run.log_frequency", 50),
        ("--cfg-options model.bbox_head.num_classes=3", "model.num_classes", 3),
        ("--cfg-options load_from=a.weights", "model.pretrained", "a.weights"),
        ("--cfg-options seed=4", "run.seed", 4),
        ("--cfg-options train.subdivisions=2", "train.subdivisions", 2),  # our own names too
        ("--cfg-options subdivisions=3", "train.subdivisions", 3),
    ],
)
def test_a_flag_means_a_setting_and_says_so(line: str, path: str, expected: Any) -> None:
    settings, notices = load(line)
    assert attrgetter(path)(settings) == expected
    assert [notice for notice in notices if f" means {path} = " in notice]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpu 0 --hpu", "^--gpu and --hpu contradict each other: run.device = 'cuda:0' or 'hpu'$"),
        ("--gpu 0 --device cpu", "^--gpu and --device contradict"),
        ("--device cpu --hpus 1", "^--device and --hpus contradict"),
        ("run.device=cpu --hpu", "^run.device and --hpu contradict"),
        ("--epoch 2 --epochs 3", "^--epoch and --epochs contradict each other: train.steps = '2ep' or '3ep'$"),
        ("--batch-size 4 batch_size=5", "^batch_size and --batch-size contradict"),
        ("--autocast run.precision=off", "^run.precision and --autocast contradict"),
        ("--batch-size 4 --cfg-options data.samples_per_gpu=5", "--cfg-options data.samples_per_gpu contradict"),
        ("--cfg-options lr_config.step=[3] scheduler.strategy=LambdaLR", "scheduler.strategy contradict"),
        (
            "--cfg-options lr_config.policy=step",
            "^--cfg-options: unknown key 'lr_config.policy'.* data_root, .*args.yaml",
        ),
        ("--cfg-options lr_config", "^--cfg-options 'lr_config': expected key=value$"),
        ("--cfg-options optimizer.type=Lion", "^train.optimizer = 'lion': should be 'adam', 'adamw' or 'sgd'"),
        ("--cfg-options lr_config.step=[a]", "^scheduler.milestones.0 = 'aep': must be a number"),
        ("--epoch 0", "^train.steps: must be greater than 0"),
        ("--epoch nan", "^train.steps = 'nanep': must be a number of steps"),
        ("--log-interval 0", "^run.log_frequency = 0: should be greater than or equal to 1"),
        (
            "yolov3/yolov3_d53_320_273e_coco.py --hpu=1",
            r"^yolov3/yolov3_d53_320_273e_coco.py: .* take --config recipes/d53_320_273e.yaml; on HPUs ",
        ),
        ("configs/other.py", "^configs/other.py: .* take --config a file of recipes/$"),
        (
            "--launcher pytorch",
            "^--launcher pytorch: the environment has no RANK, LOCAL_RANK, .*; start with torchrun --",
        ),
        ("--local-rank=1", "^--local-rank 1: torchrun's LOCAL_RANK decides"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, line: str, message: str) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=message) as raised:
        load(line)
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize("line", ["--hpu 0", "--hpus=8", "--launcher slurm", "--eval segm", "--lazy=2", "--batch 3"])
def test_other_values_are_refused_by_the_parser(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(line)
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_bare_hpu_leaves_the_next_word_alone() -> None:
    assert separate_values([]) == []
    words = separate_values(shlex.split("--hpu photo.jpg --hpus 1 --hpu"))
    assert words == shlex.split("--hpu=1 photo.jpg --hpus 1 --hpu=1")


# Commands of Habana's MMDetection example behind `train.py CONFIG`, word for word, on its recipe.
SINGLE = "--config recipes/d53_320_273e.yaml run.precision=off"
SEED = {
    "1x32": f"{SINGLE} --hpu=1  --batch-size=32 --eval-batch-size=64 --deterministic --log-interval 400 --epoch 2",
    "1x32_bf16": "--config recipes/d53_320_273e.yaml --hpu=1 --autocast  --deterministic --batch-size 32 "
    "--eval-batch-size 64 --log-interval 400 --epoch 2",
    "1x16": f"{SINGLE} --hpu=1 --lazy --batch-size=16 --eval-batch-size=64 --deterministic --log-interval 800 "
    "--epoch 2",
    "8x16": f"{SINGLE} --launcher pytorch  --hpu=1 --cfg-options checkpoint_config.interval=30 optimizer.lr=0.0015 "
    'lr_config.warmup_iters=1000 lr_config.step="[228,256]" --lazy --batch-size=16 --eval-batch-size=64 '
    "--deterministic --log-interval=96",
    "8x32_bf16": "--config recipes/d53_320_273e.yaml --launcher pytorch  --hpu=1 --autocast  --cfg-options "
    'checkpoint_config.interval=30 optimizer.lr=0.002 lr_config.warmup_iters=400 lr_config.step="[228,256]" --lazy '
    "--batch-size=32 --eval-batch-size=64 --deterministic --log-interval=48",
}


@pytest.mark.parametrize("name", list(SEED))
def test_commands_of_the_seed_mean_the_hpu_recipes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    for variable, text in TORCHRUN.items():
        monkeypatch.setenv(variable, text)
    # The recipe accumulates over 8 micro-batches what the processes do side by side.
    settings, _ = load(f"{SEED[name]} train.subdivisions=1 run.name=d53_320_273e_{name}")
    assert settings == load(f"--config recipes/d53_320_273e_{name}.yaml")[0]


def test_the_evaluation_command_of_the_seed() -> None:
    parser = Parser("validation.py", "")
    parser.add_settings()
    add_evaluation_flags(parser)
    arguments = parser.parse_intermixed_args(["--eval", "bbox", "--hpu", "--eval-batch-size", "8"])
    flags = device_flags(arguments)
    assert [(flag.path, flag.value) for flag in flags] == [("run.device", "hpu"), ("evaluation.batch_size", 8)]
