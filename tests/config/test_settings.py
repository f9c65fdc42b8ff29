"""Settings: precedence of sources, one-line errors, and the round trip of the resolved file."""

import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from detection.config.loading import (
    Flag,
    changed_settings,
    complete_settings,
    dump_settings,
    leaf_paths,
    load_settings,
    validate,
)
from detection.config.setting_names import FLAT_NAMES, MOVED_NAMES
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file
from detection.errors import SettingsError
from tests.support.paths import REPOSITORY

ARGS = REPOSITORY / "yolo-v3" / "args.yaml"


def load(*words: str, overlays: tuple[Path, ...] = (), flags: tuple[Flag, ...] = ()) -> Settings:
    return load_settings(ARGS, overlays, words, flags)[0]


def refusal(*words: str, overlays: tuple[Path, ...] = (), defaults: Path = ARGS) -> str:
    """Return the message of the expected error, which must be a single line with exit code 2."""
    with pytest.raises(SettingsError) as caught:
        load_settings(defaults, overlays, words)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message and "\n" not in message
    return message


@pytest.fixture
def overlay(tmp_path: Path):
    """Factory of overlay files: `overlay(text)` writes a new one."""
    made: list[Path] = []

    def write(text: str | bytes) -> Path:
        path = tmp_path / f"overlay_{len(made)}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        made.append(path)
        return path

    return write


# --- precedence ---


def test_each_source_wins_over_the_ones_before_it(overlay) -> None:
    first, second = overlay("run: {seed: 1, log_frequency: 21}"), overlay("run: {seed: 2}")
    assert load().run.seed == 0  # args.yaml
    assert load(overlays=(first,)).run.seed == 1
    assert load(overlays=(first, second)).run.seed == 2
    assert load(overlays=(second, first)).run.seed == 1
    assert load("run.seed=3", overlays=(first, second)).run.seed == 3
    assert load("run.seed=3", "run.seed=4", overlays=(first, second)).run.seed == 4
    assert load(overlays=(first, second), flags=(Flag("--seed", "run.seed", 5),)).run.seed == 5
    # what the later sources do not name stays as the earlier ones left it
    assert load("run.seed=3", overlays=(first, second)).run.log_frequency == 21


@pytest.mark.parametrize(
    ("words", "flags", "spellings"),
    [
        (["train.batch_size=3"], [Flag("--batch-size", "train.batch_size", 4)], "train.batch_size and --batch-size"),
        (["train={batch_size: 3}", "batch_size=4"], [], "train.batch_size and batch_size"),
        ([], [Flag("--gpu", "run.device", "cuda:0"), Flag("--hpu", "run.device", "hpu")], "--gpu and --hpu"),
    ],
)
def test_two_spellings_of_one_setting_must_agree(words: list[str], flags: list[Flag], spellings: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{spellings} contradict each other: (train\.batch_size = 3 or 4|run)"):
        load_settings(ARGS, words=words, flags=flags)
    agreeing = [flag._replace(path="train.batch_size", value=3) for flag in flags]
    assert load("batch_size=3", "train.batch_size=3", flags=tuple(agreeing)).train.batch_size == 3


def test_an_overlay_or_a_word_changes_only_the_keys_it_names(overlay) -> None:
    scaled = load(overlays=(overlay("data: {augmentation: {affine: {scale: [0.75, 1.25]}}}"),))
    assert changed_settings(load(), scaled) == {"data.augmentation.affine.scale": ([0.5, 1.5], [0.75, 1.25])}
    old, new = load("train.steps=5"), load("train={batch_size: 3, steps: 12ep}", "model.fill=[1, 2, 3]")
    size = load().train.batch_size
    assert changed_settings(old, new) == {
        "train.batch_size": (size, 3), "train.steps": (5, "12ep"), "model.fill": (None, [1, 2, 3])
    }  # fmt: skip
    assert changed_settings(new, old)["model.fill"] == ([1, 2, 3], None) and changed_settings(old, old) == {}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.device=cuda:1", "cuda:1"),
        ("model.placement=squash", "squash"),
        ("yolo.neck_channels=[96, 64, 32]", (96, 64, 32)),
        ("train.optimizer=sgd", "sgd"),
        ("scheduler.strategy=WarmupMultiStepLR", "WarmupMultiStepLR"),
        ("evaluation.iou_threshold=0.6", 0.6),
        ("data.augmentation.posterize.num_bits=[3, 5]", (3, 5)),
        ("data.root=a=b", "a=b"),  # only the first = separates
        ("train.ema_decay=0.999", 0.999),
        ("train.clip_norm=null", None),
        ("train.unfreeze_step=0", 0),
        ("scheduler.warmup=0ep", "0ep"),
        *((f"train.steps={text}", text) for text in ("12ep", "0.5ep", "1.25ep")),
        # numbers as people write them; 1e-3 is a string under YAML 1.1
        *((f"train.weight_decay={text}", 0.001) for text in ("1e-3", "1E-3", ".001", "1.0e-3")),
        ("train.weight_decay=1.", 1.0),
        ("train.weight_decay=3", 3),
        ("train.batch_size=010", 10),  # YAML 1.2, section 10.3.2; the octal eight under YAML 1.1
        # off, no, yes and on are booleans, and 2024-01-01 a date, under YAML 1.1
        ("run.precision=off", "off"),
        ("data.class_names=[on, off, yes, no, y, n]", ("on", "off", "yes", "no", "y", "n")),
        ("data.root=2024-01-01", "2024-01-01"),
        ("data.root=2024-13-45", "2024-13-45"),  # and no such date is no error
    ],
)
def test_a_word_sets_its_value_in_every_section(word: str, value: Any) -> None:
    assert attrgetter(word.partition("=")[0])(load(word)) == value


# --- flat names of the research repository ---


FLAT = [  # the names in its args.yaml, and a value that is not the default
    ("batch_size", "train.batch_size", 7),
    ("subdivisions", "train.subdivisions", 3),
    ("steps", "train.steps", 11),
    ("ignore_threshold", "yolo.ignore_threshold", 0.55),
    ("confidence_threshold", "evaluation.confidence_threshold", 0.25),
    ("iou_threshold", "evaluation.iou_threshold", 0.65),
    ("evaluate_frequency", "evaluation.evaluate_frequency", 13),
    ("resize_frequency", "train.resize_frequency", 10),
    ("scheduler.strategy", "scheduler.strategy", "constant"),
    ("model.backbone", "model.backbone", "mobilenet_v3_small"),
]


@pytest.mark.parametrize(("flat", "path", "value"), FLAT)
@pytest.mark.parametrize("source", ["word", "overlay"])
def test_flat_names_are_accepted_and_reported_with_their_full_path(overlay, source, flat, path, value) -> None:
    if source == "word":
        settings, notices = load_settings(ARGS, words=[f"{flat}={value}"])
    else:
        file = overlay(f"{flat}: {value}" if "." not in flat else "{}: {{{}: {}}}".format(*flat.split("."), value))
        settings, notices = load_settings(ARGS, [file])
    assert attrgetter(path)(settings) == value
    if flat == path:
        assert notices == []
    else:
        assert len(notices) == 1 and flat in notices[0] and path in notices[0]


def test_every_flat_name_leads_to_a_setting_and_hides_none() -> None:
    for flat, path in FLAT_NAMES.items():
        assert not isinstance(attrgetter(path)(load()), BaseModel)
        assert "." not in flat and flat not in Settings.model_fields


def test_a_path_may_begin_with_the_home_directory(monkeypatch) -> None:
    """No shell expands the ~ of data.root=~/mine."""
    monkeypatch.setenv("HOME", "/home/me")
    assert load("data.root=~/mine").data.root == "/home/me/mine"


# --- unknown keys ---


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.batchsize", "train.batch_size"),
        ("train.learning_rat", "train.learning_rate"),
        ("trian.steps", "train.steps"),
        ("schedular.T_0", "scheduler.T_0"),
        ("yolo.encodr", "model.backbone"),
        ("bach_size", "batch_size"),
        ("train.keep_aspect", "model.placement"),  # the right name in the wrong section
        ("data.augmentation.affine.scales", "data.augmentation.affine.scale"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(overlay, wrong: str, right: str) -> None:
    message = refusal(f"{wrong}=1")
    assert repr(wrong) in message and right in message
    *sections, last = wrong.split(".")
    file = overlay("".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + f"{'  ' * 9}{last}: 1")
    message = refusal(overlays=(file,))
    assert repr(wrong) in message and right in message and file.name in message


@pytest.mark.parametrize("word", ["abc", "=3", "train.batch_size", "--unknown", "a\nb=1", "train.steps=[1,\n2"])
def test_words_that_are_no_setting(word: str) -> None:
    refusal(word)


# --- wrong types and impossible values ---


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("train.batch_size=many", "'many'"),
        ("train.batch_size='16'", "'16'"),
        ("train.batch_size=16.0", "16.0"),
        ("train.batch_size=1e3", "1000.0"),  # a number, but not a whole one
        ("train.batch_size=true", "True"),
        ("train.batch_size=", "None"),
        ("train.learning_rate=fast", "'fast'"),
        ("run.channels_last=1", "1"),
        ("run.channels_last=yes", "'yes'"),
        ("run.name=7", "7"),
        ("run.name=08", "8"),
        ("train.steps=12 ep", "12 ep"),
        *((word, "is a section") for word in ("train=3", "train=null", "data.augmentation.affine=0.5")),
        ("data.root=null", "None"),
        ("data.class_names=cat", "'cat'"),
        ("data.class_names=[cat, 8]", "8"),
        ("scheduler.index=5", "5"),
        ("scheduler.T_mult=true", "True"),
    ],
)
def test_a_wrong_type_names_key_and_value(word: str, shown: str) -> None:
    message = refusal(word)
    assert word.partition("=")[0] in message and shown in message


IMPOSSIBLE = {
    "run": "device=gpu seed=-1 name=a/b precision=fp64 log_frequency=0",
    "model": "num_classes=0 backbone=resnet fill=[1,2] fill=[256,0,0]",
    "train": """
        batch_size=0 batch_size=-4 subdivisions=0 image_size=0 image_size=-32 multiscale_sizes=[608,320]
        multiscale_sizes=[320] resize_frequency=-1 learning_rate=-1e-3 learning_rate=.nan learning_rate=.inf momentum=1
        clean_finish=1.1 clean_finish=.nan clean_finish=5ep
        nesterov=true learning_rate_batch=0 swa_cycles=-1 swa_cycle=-1 backbone_layer_decay=0 backbone_layer_decay=1.1
        clip_norm=0 ema_decay=1 patience=0 steps=0 steps=0.0ep save_frequency=0ep steps=-1 steps=1.5 steps=ep
        steps=12epochs steps=-2ep steps=1e3ep steps=.5ep steps=[5] steps=true""",
    "scheduler": """
        milestones=[5,3] milestones=[5,5] milestones=[9ep,10ep,9.5ep] index=[3,2,1] scale=[1.0,0.5]
        scale=[1.0,0.5,-0.1,0.05] T_mult=3 strategy=Step
        warmup_power=0 eta_min_factor=2 flat=-0.1 flat=1.5 constant_finish=1""",
    "yolo": """
        anchors=[] anchors=[[[1,2]],[[1,2]],[]] anchors=[[[1,2]],[[1,2]],[[1,0]]] anchors=[[[1,2]],[[1,2]],[[1]]]
        neck_channels=[512,256] ignore_threshold=1.5 ignore_threshold=.nan objectness_prior=0 objectness_prior=1""",
    "yolox": """
        neck=bifpn neck_channels=[] neck_channels=[8,0] head_channels=0 pixels=rgb batch_norm_epsilon=0 prior=1 loss=iou
        assigner=otto box_weight=-1 l1_weight=.nan class_loss=bce bins=17 bins=1 atss_share=1.1 one_to_one=true
        size_prior=0 size_prior=1e9 balance=images""",
    "evaluation": "confidence_threshold=1 max_detections=0 evaluate_frequency=0 best_metric=AP75",
    "data": """
        class_names=[a,b,a] class_names=[] validation_fraction=0 validation_fraction=1 balance=oversample
        balance_threshold=0 num_workers=-1 fake=true""",
    # strengths that the augmentation library would refuse with a traceback, or that mean nothing
    "data.augmentation": """
        affine.p=1.5 affine.p=.nan affine.scale=[0,1] affine.rotate=[5,-5] affine.rotate=[-.inf,.inf]
        affine.shear=[.nan,1] clahe.clip_limit=[0.5,4] clahe.tile_grid_size=[0,8] posterize.num_bits=[0,4]
        posterize.num_bits=[6,4] multiplicative_noise.multiplier=[-1,1] color_jitter.brightness=[-1,1]
        color_jitter.contrast=[-1,1] color_jitter.saturation=[-1,1] color_jitter.hue=[-0.6,0.1]
        gauss_noise.std_range=[0.1,2] rgb_shift.r_shift_limit=256 expand.ratio=[0.5,2] expand.ratio=[2,1.5]
        iou_crop.min_ious=[0.4,1.1] iou_crop.min_crop_size=0 darknet_jitter.jitter=1 darknet_hsv.hue=0.6
        darknet_hsv.saturation=0.9 darknet_hsv.exposure=.inf photometric_distortion.hue=[-0.6,0]
        photometric_distortion.contrast=[-1,1] min_visibility=-0.1
        mosaic.p=2 mosaic.centre=[1.5,0.5] mosaic.centre=[0,3] mixup.beta=0 mixup.scale=[0,1] hsv.hue=91
        random_interpolation.p=-1""",
}


@pytest.mark.parametrize("word", [f"{section}.{word}" for section, text in IMPOSSIBLE.items() for word in text.split()])
def test_an_impossible_value_is_one_line(word: str) -> None:
    """The key, the value unless it is the whole section's fault, and what is allowed."""
    assert re.match(rf"{re.escape(word.partition('=')[0])}[\d.]*( = .+)?: .+", refusal(word))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.batch_size=0"], ["0", "1"]),
        (["train.image_size=0"], ["positive"]),
        (["scheduler.milestones=[5, 3]"], ["ascending", "[5, 3]"]),
        (["scheduler.index=[3, 2, 1]"], ["ascending"]),
        (["scheduler.scale=[1.0, 0.5]"], ["index"]),
        (["scheduler.strategy=Step"], ["Step", "LambdaLR"]),
        (["scheduler.strategy=StepLR"], ["needs a step_size above 0"]),
        (["scheduler.constant_finish=true", "scheduler.strategy=FlatCosine"], ["train.clean_finish is 0"]),
        (["lr0=0.01"], ["train.learning_rate"]),
        (["imgsz=640"], ["train.image_size"]),
        (["train.lr0=0.01"], ["train.learning_rate"]),
        (["fraction=0.5"], ["data.max_train_images"]),
        (["close_mosaic=10"], ["train.clean_finish"]),
        (["mixup=0.1"], ["data.augmentation.mixup.p"]),
        (["run.device=0"], ["cuda:N"]),
        (["data.class_names=[010, b]"], ["in quotes"]),
        # a section in common is no likeness
        (["colour=1"], ["args.yaml lists all"]),
        (["data.val=1"], ["args.yaml lists all"]),
        (["train.mixup=1"], ["args.yaml lists all"]),
        (["data.class_names=[a, b]", "model.num_classes=3"], ["2", "model.num_classes", "3"]),
        (["data.class_names=[a, b, a]"], ["twice"]),
        (["model.backbone=resnet"], ["resnet", "darknet"]),
        (["run.device=gpu"], ["gpu", "cuda"]),
        (["run.precision=fp64"], ["fp64", "bf16"]),
        (["model.fill=[256, 0, 0]"], ["256", "255"]),
        (["data.balance=oversample"], ["oversample", "repeat_factor"]),
        (["data.fake=true"], ["model.num_classes"]),
        # all mistakes at once, and names of other programs
        (["train.batch_size=0", "model.backbone=resnet"], ["model.backbone"]),
        (["epochs=1"], ["train.steps"]),
        (["continue_training=1"], ["--resume"]),
        (["train_ratio=1"], ["data.validation_fraction"]),
        # choices that only some losses have
        (["yolo.box_loss=siou"], ["iou or multi", "darknet"]),
        (["yolo.iou_aware=true", "yolo.loss=mmdetection"], ["freebies", "not mmdetection"]),
        (["yolo.objectness_target=iou", "yolo.loss=mmdetection"], ["multi", "not mmdetection"]),
        (["yolo.objectness_balance=[4, 1, 0.4]", "yolo.loss=iou"], ["needs yolo.loss multi, not iou"]),
        (["yolo.anchor_match=iou"], ["needs yolo.loss multi, not darknet"]),
        (["yolo.neighbour_cells=true", "yolo.loss=ciou"], ["needs yolo.loss multi, not ciou"]),
        (["yolo.new_coords=true", "yolo.loss=iou"], ["giou or ciou or multi, not iou"]),
        (["yolo.label_smoothing=0.5"], ["auto"]),
        (["yolo.label_smoothing=0.1", "yolo.class_loss=cross_entropy"], ["bce"]),
        (["yolo.scale_xy=0.9"], ["1"]),
        (["yolox.one_to_one=true"], ["needs yolox.loss aligned, not yolox"]),
        (["yolo.anchor_ratio=1"], ["1"]),
    ],
)
def test_a_refused_value_is_told_what_is_allowed(words: list[str], parts: list[str]) -> None:
    message = refusal(*words)
    assert [part for part in (words[0].partition("=")[0], *parts) if part not in message] == []


# --- YAML ---


@pytest.mark.parametrize(
    "text",
    [
        *(
            "train: [",
            "train:\n\tbatch_size: 3",
            "a: 1\n--- \nb: 2",
            "? [a, b]\n: 1",
            "train: {batch_size: !!int five}",
        ),
        *(b"\xff\xfe\x00", "\x00", "[" * 5000, "train: {steps: *unknown}"),
        *("[1, 2]", "3", "word", "- train: {steps: 3}"),  # no mapping
    ],
    ids=range(13),
)
def test_a_file_that_is_no_yaml_mapping_is_named(overlay, text) -> None:
    file = overlay(text)
    assert file.name in refusal(overlays=(file,))


def test_a_key_that_occurs_twice_is_refused(overlay) -> None:
    for text, key in (("run: {seed: 1}\nrun: {seed: 2}", "run"), ("run:\n  seed: 1\n  name: a\n  seed: 2", "seed")):
        file = overlay(text)
        assert re.search(f"{file.name}.*'{key}' occurs twice", refusal(overlays=(file,)))
    assert "'steps'" in refusal("train={steps: 1, steps: 2}")  # in a word too


def test_empty_and_unreadable_files(overlay, tmp_path: Path) -> None:
    assert load(overlays=(overlay(""), overlay("# only a comment\n"))) == load()
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert path.name in refusal(overlays=(path,)) and path.name in refusal(defaults=path)


def test_yaml_never_runs_code(overlay, tmp_path: Path) -> None:
    made = tmp_path / "made_by_yaml"
    refusal(overlays=(overlay(f"run: {{name: !!python/object/apply:os.mkdir ['{made}']}}"),))
    refusal(f"run.name=!!python/object/apply:os.mkdir ['{made}']")
    assert not made.exists()


# --- the model and args.yaml ---


def test_args_yaml_holds_every_setting_and_nothing_else() -> None:
    content = read_settings_file(ARGS)
    assert set(leaf_paths(content)) == set(leaf_paths(validate(content).model_dump()))
    assert content == read_settings_file(ARGS)  # validation leaves it alone
    assert list(content) == [
        "run",
        "data",
        "model",
        "yolo",
        "yolox",
        "efficientdet",
        "train",
        "scheduler",
        "evaluation",
    ]


def test_defaults_that_were_published() -> None:
    settings = load()
    # YOLOv3, section 2.3: the nine COCO clusters
    clusters = "10x13 16x30 33x23 30x61 62x45 59x119 116x90 156x198 373x326"
    anchors = [tuple(anchor) for level in settings.yolo.anchors for anchor in level]
    assert anchors == [tuple(float(side) for side in cluster.split("x")) for cluster in clusters.split()]
    assert settings.yolo.ignore_threshold == 0.7  # Darknet, cfg/yolov3.cfg
    assert settings.train.multiscale_sizes == (320, 608)


# --- the resolved file ---


TRICKY = '["08", "1e5", "off", "007", "null", "true", "a: b", "1_0", "2024-01-01", "ä", "#x", " y", ".5", "+3", "~"]'


@pytest.mark.parametrize(
    "words",
    [
        *([], [f"data.class_names={TRICKY}"], ["run.name='1e-3'", "data.root='010'", "run.logs_path='off'"]),
        ["train.steps=12ep", "train.learning_rate=1e-6", "train.weight_decay=0.30000000000000004", "run.name=a.b+c"],
        ["train.ema_decay=0.9999999999999999", "run.seed=9223372036854775807"],
        ["data.class_names=[a, b]", "model.num_classes=2", "scheduler.milestones=[1ep, 2ep]"],
    ],
    ids=["defaults", "class names", "strings", "values", "limits", "lists"],
)
def test_the_resolved_file_alone_gives_the_same_settings(tmp_path: Path, words: list[str]) -> None:
    settings = load(*words)
    file = tmp_path / "args.yaml"
    file.write_text(dump_settings(settings), encoding="utf-8")
    again, notices = load_settings(file)
    assert again == settings and notices == []
    assert dump_settings(again) == dump_settings(settings)
    # and so does the copy in a checkpoint, of plain lists and numbers
    assert validate(settings.model_dump(mode="json")) == validate(settings.model_dump()) == settings


def test_an_incomplete_file_names_the_missing_setting(tmp_path: Path) -> None:
    tree = read_settings_file(ARGS)
    del tree["train"]["batch_size"], tree["data"]["augmentation"]["affine"]["p"], tree["scheduler"]
    tree["yolo"]["heads"] = {"number": 3}
    file = tmp_path / "args.yaml"
    file.write_text(yaml.safe_dump(tree))
    parts = [part.strip() for part in refusal(defaults=file).split(";")]
    for key in ("train.batch_size", "data.augmentation.affine.p", "scheduler", "yolo.heads"):
        assert any(part.startswith((f"{key}:", f"{key} =")) for part in parts)


def test_settings_are_frozen() -> None:
    settings = load()
    sections = settings, settings.train, settings.data.augmentation.affine, settings.run
    for section, name, value in zip(sections, ("train", "batch_size", "p", "new_name"), (None, 1, 0.0, 1), strict=True):
        with pytest.raises(ValidationError):
            setattr(section, name, value)
    assert hash(settings) == hash(load())  # every value is hashable, so no list or dict is left to change


# Earlier paths of settings

EARLIER: dict[str, tuple[Any, str, Any]] = {  # value under the earlier path -> path and value today
    "yolo.encoder": ("mobilenet_v3_small", "model.backbone", "mobilenet_v3_small"),
    "yolo.pretrained": (True, "model.pretrained", True),
    "yolo.num_classes": (7, "model.num_classes", 7),
    "yolo.batch_norm": ("darknet", "model.batch_norm", "darknet"),
    "yolo.batch_norm_momentum": (0.2, "model.batch_norm_momentum", 0.2),
    "data.keep_aspect": (False, "model.placement", "squash"),
    "data.letterbox_rounding": ("down", "model.rounding", "down"),
    "data.interpolation": ("area", "model.interpolation", "area"),
    "data.fill": ([1, 2, 3], "model.fill", (1, 2, 3)),
    "data.most_unreadable": (0.5, "data.max_unreadable_fraction", 0.5),
    "train.encoder_learning_rate_factor": (0.5, "train.backbone_learning_rate_factor", 0.5),
    "train.encoder_batch_norm": ("frozen", "train.backbone_batch_norm", "frozen"),
    "train.most_skipped_steps": (3, "train.max_skipped_steps", 3),
    "evaluation.score": ("objectness", "yolo.score", "objectness"),
    "evaluation.objectness_threshold": (0.1, "yolo.objectness_threshold", 0.1),
}


def test_every_earlier_path_is_tried() -> None:
    assert {*EARLIER, "yolo.cfg"} == set(MOVED_NAMES)  # a cfg needs its file: tests of Darknet networks


@pytest.mark.parametrize("path", EARLIER)
def test_an_earlier_path_works_everywhere_and_is_one_line(path: str, tmp_path: Path) -> None:
    value, today, expected = EARLIER[path]
    section, key = path.split(".")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({section: {key: value}}))
    for arguments in ({"overlays": [overlay]}, {"words": [f"{path}={json.dumps(value)}"]}):
        settings, notices = load_settings(ARGS, **arguments)  # type: ignore[arg-type]
        assert attrgetter(today)(settings) == expected
        assert len(notices) == 1 and f"{path} is now {today}" in notices[0]
    assert attrgetter(today)(complete_settings({section: {key: value}}, ARGS, stored := [])) == expected
    assert len(stored) == 1 and stored[0].startswith(f"stored settings: {path} is now {today}")


def test_the_settings_of_a_checkpoint_before_the_section_model() -> None:
    tree = {"yolo": {"encoder": "darknet_cfg", "cfg": "[net]\n"}, "data": {"keep_aspect": True}}
    settings = complete_settings(tree, ARGS, notices := [])
    assert len(notices) == 1 and notices[0].count(" is now ") == 3
    assert (settings.model.backbone, settings.model.cfg, settings.model.placement) == (
        "darknet_cfg", "[net]\n", "letterbox",
    )  # fmt: skip
