import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small

from detection.config.loading import load_settings
from detection.contract import Detector
from detection.errors import CheckpointError, SettingsError
from detection.models import build_detector, check_input_sizes, check_shares
from detection.models.backbones import BACKBONES
from detection.models.backbones.darknet import Darknet53, ResidualBlock, conv_block
from detection.models.backbones.mobilenet import DepthwiseConv2d, MobileNetV3, use_depthwise_class
from detection.models.darknet.export import describe_detector
from detection.models.yolo import CRITERIA
from detection.models.yolo.network import YOLOv3
from tests.support.paths import ARGS
from tests.support.tiny_models import last_of_each_stride

TINY_ANCHORS = [[[10, 14], [23, 27], [37, 58]], [[81, 82], [135, 169], [344, 319]]]  # yolov3-tiny.cfg
SMALL = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[24, 16, 8]"]
TORCHVISION = {"mobilenet_v3_large": mobilenet_v3_large, "mobilenet_v3_small": mobilenet_v3_small}


def build(num_classes: int, *words: str) -> Detector:
    settings, _ = load_settings(ARGS, words=words)
    return build_detector(settings, num_classes)


@pytest.fixture(scope="module")
def darknet() -> Detector:
    """The detector of the paper, for COCO."""
    torch.manual_seed(0)
    return build(80)


@pytest.fixture(scope="module")
def small() -> Detector:
    """A quick one: MobileNetV3-small, narrow neck, 3 classes, batch-norm statistics of a few batches."""
    torch.manual_seed(0)
    detector = build(3, *SMALL)
    with torch.no_grad():
        for seed in range(3):
            detector.model(random_images(4, 64, 96, seed=seed))
    return detector


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Sizes


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 61_949_149),
        (["yolo.spp=true"], 62_998_749),
        (["model.backbone=darknet_tiny", "yolo.neck_channels=[256, 128]", f"yolo.anchors={TINY_ANCHORS}"], 8_852_366),
    ],
)
def test_parameters_of_the_family(words: list[str], count: int) -> None:
    """The published counts for 80 classes."""
    with torch.device("meta"):
        model = build(80, *words).model
    assert count_parameters(model) == count


def expected_darknet53() -> tuple[int, int]:
    """Convolutions and parameters from table 1 of the paper: filters, kernel size and repetitions of every row."""
    rows = [(32, 3), (64, 3)]  # (filters, kernel size) in the order of the table
    for channels, repetitions, following in [(64, 1, 128), (128, 2, 256), (256, 8, 512), (512, 8, 1024), (1024, 4, 0)]:
        rows += [(channels // 2, 1), (channels, 3)] * repetitions
        rows += [(following, 3)] if following else []
    parameters, channels = 0, 3
    for filters, kernel_size in rows:
        # weights without bias; scale and shift of the batch norm
        parameters += filters * channels * kernel_size**2 + 2 * filters
        channels = filters
    return len(rows), parameters


def test_darknet53_is_that_of_table_1(darknet: Detector) -> None:
    convolutions, parameters = expected_darknet53()
    assert (convolutions, parameters) == (52, 40_584_928)
    backbone = darknet.model.backbone
    assert isinstance(backbone, Darknet53)
    assert sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) == convolutions
    assert count_parameters(backbone) == parameters


@pytest.mark.parametrize("num_classes", [1, 80])
def test_class_count_changes_only_the_last_convolutions(num_classes: int, small: Detector) -> None:
    """Three anchors * (5 + C) filters per level on 2 * width channels, and a bias each."""
    model = build(num_classes, *SMALL).model
    difference = sum(3 * (num_classes - 3) * (2 * width + 1) for width in (24, 16, 8))
    assert count_parameters(model) == count_parameters(small.model) + difference
    assert [output.shape[-1] for output in model(random_images(2, 32, 32))] == [5 + num_classes] * 3


@pytest.mark.parametrize("neck_channels", [[512, 256, 128], [64, 48, 32], [24, 16, 8]])
def test_neck_width_by_hand(neck_channels: list[int]) -> None:
    """Parameters of neck, laterals and heads from the widths alone, on MobileNetV3-small's 24, 48 and 576 channels."""

    def block(channels_in: int, channels_out: int, kernel_size: int) -> int:
        return channels_in * channels_out * kernel_size**2 + 2 * channels_out

    expected, carried = 0, 0
    for level, (width, channels) in enumerate(zip(neck_channels, [576, 48, 24], strict=True)):
        expected += block(carried + channels, width, 1)
        expected += 2 * (block(width, 2 * width, 3) + block(2 * width, width, 1))
        expected += block(width, 2 * width, 3) + 3 * (5 + 4) * (2 * width + 1)
        if level < 2:
            carried = neck_channels[level + 1]
            expected += block(width, carried, 1)
    model = build(4, "model.backbone=mobilenet_v3_small", f"yolo.neck_channels={neck_channels}").model
    assert count_parameters(model) - count_parameters(model.backbone) == expected


# Backbones


def test_conv_block_by_hand() -> None:
    """Convolution, batch norm, leaky ReLU of slope 0.1; halves the size with stride 2."""
    block = conv_block(1, 1, 3, stride=2).eval()
    with torch.no_grad():
        block[0].weight.fill_(1.0)
        block[1].running_mean.fill_(4.0)
        block[1].weight.fill_(10.0)
        # sums of 2 x 2 ones in the corner, 2 x 3 on the sides, 3 x 3 inside, minus 4, times 10
        result = block(torch.ones(1, 1, 4, 4))
        torch.testing.assert_close(result, torch.tensor([[[[0.0, 20], [20, 50]]]]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block(-torch.ones(1, 1, 4, 4))[0, 0, 0, 0].item(), -80 * 0.1, rtol=1e-4, atol=1e-4)


def test_residual_block_adds_its_input() -> None:
    block = ResidualBlock(8).eval()
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x), x + block.expand(block.reduce(x)))
        block.expand[1].weight.zero_()
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_mobilenet_maps_are_torchvisions_last_of_each_stride(name: str) -> None:
    """With torchvision's weights loaded by position, the maps are those of its own network, bit for bit in float32."""
    torch.manual_seed(0)
    features = TORCHVISION[name](weights=None).features.eval()
    backbone = BACKBONES[name]().eval()
    # our keys are stages.<stage>.<key in torchvision's features>
    weights = {key.split(".", 2)[2]: key for key in backbone.state_dict()}
    assert list(weights) == list(features.state_dict())
    backbone.load_state_dict({weights[key]: value for key, value in features.state_dict().items()})
    assert not any("classifier" in key for key in backbone.state_dict())

    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert backbone.strides == (8, 16, 32)
        assert all(map(torch.equal, backbone(images), last_of_each_stride(features, images)))


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_depthwise_class_changes_nothing_in_float32(name: str) -> None:
    features = TORCHVISION[name](weights=None).features
    ours = copy.deepcopy(features)
    use_depthwise_class(ours)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in features.state_dict().items()
    }
    for module, original in zip(ours.modules(), features.modules(), strict=True):
        if isinstance(original, nn.Conv2d):
            depthwise = original.groups == original.in_channels > 1
            assert isinstance(module, DepthwiseConv2d) == depthwise
            assert module.extra_repr() == original.extra_repr()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), features(images))


def test_depthwise_convolution_under_autocast() -> None:
    """Float32 arithmetic on the CPU, output in the input's type, gradients reach the weights."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False))
    ours = copy.deepcopy(plain)
    use_depthwise_class(ours)
    x = torch.randn(2, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, plain(x.float()).bfloat16())
    result.float().square().sum().backward()
    plain(x.float()).square().sum().backward()
    weight, expected = ours[0].weight.grad, plain[0].weight.grad
    assert weight is not None and expected is not None and weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_head_channels(small: Detector) -> None:
    """A 3x3 convolution from the neck's width with scale and shift, then 24 filters of 1x1 with bias."""
    widths = (10, 20, 30)
    model = build(3, *SMALL, f"yolo.head_channels={list(widths)}").model
    expected = [
        neck * 9 * width + 2 * width + 24 * (width + 1) for neck, width in zip((24, 16, 8), widths, strict=True)
    ]
    assert [count_parameters(head) for head in model.heads] == expected
    twice = build(3, *SMALL, "yolo.head_channels=[48, 32, 16]").model
    assert {name: value.shape for name, value in twice.state_dict().items()} == {
        name: value.shape for name, value in small.model.state_dict().items()
    }
    with pytest.raises(SettingsError, match=r"yolo\.head_channels: has 2 values, yolo\.anchors has 3 levels"):
        build(3, *SMALL, "yolo.head_channels=[48, 32]")


# Outputs


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 160), (96, 32)])
def test_output_shapes(small: Detector, height: int, width: int) -> None:
    outputs = small.model.eval()(random_images(2, height, width))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 3, height // stride, width // stride, 8) for stride in (8, 16, 32)
    ]
    assert small.model.strides == (8, 16, 32)


def test_anchors_per_level_may_differ() -> None:
    """2 anchors at stride 8, 4 at 16, 1 at 32."""
    anchors = "[[[10, 13], [16, 30]], [[30, 61], [62, 45], [59, 119], [40, 40]], [[116, 90]]]"
    detector = build(2, *SMALL, f"yolo.anchors={anchors}")
    outputs = detector.model(random_images(2, 64, 96))
    assert [tuple(output.shape[:4]) for output in outputs] == [(2, 2, 8, 12), (2, 4, 4, 6), (2, 1, 2, 3)]
    losses = detector.criterion(outputs, {"boxes": torch.zeros(2, 1, 4), "labels": torch.full((2, 1), -1)})
    assert all(loss.isfinite() for loss in losses.values())
    assert len(detector.postprocess(outputs)) == 2


def test_head_channels_are_anchor_major(small: Detector) -> None:
    """The last convolution has the channel anchor * (5 + C) + value, as in Darknet's files; shown by its bias."""
    head = copy.deepcopy(small.model.heads[0])
    with torch.no_grad():
        head[1].weight.zero_()
        head[1].bias.copy_(torch.arange(24.0))
        output = head(torch.rand(1, 24, 2, 3))
    assert output.shape == (1, 3, 2, 3, 8)
    for anchor in range(3):
        for value in range(8):
            assert (output[0, anchor, :, :, value] == anchor * 8 + value).all()


def test_bytes_single_images_and_channels_last_give_the_same_outputs(small: Detector) -> None:
    """0..255 as bytes is 0..1 as floats."""
    images, model = random_images(3, 64, 96), small.model.eval()
    detector = copy.deepcopy(small).to(torch.device("cpu"), channels_last=True)
    weights = [parameter for parameter in detector.model.parameters() if parameter.dim() == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with torch.no_grad():
        expected = model(images)
        assert all(map(torch.equal, expected, model(images.float() / 255)))
        found = detector.model(images.to(memory_format=torch.channels_last))
        singles = zip(*(model(images[index : index + 1]) for index in range(3)), strict=True)
    for output, other, alone in zip(expected, found, singles, strict=True):
        torch.testing.assert_close(other, output, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat(alone), output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(31, 32), (32, 48), (416, 400), (0 + 8, 8)])
def test_size_must_be_a_multiple_of_32(small: Detector, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]}, {size[1]}.*multiple of 32"):
        small.model(random_images(1, *size))


@pytest.mark.parametrize("name", ["darknet", "mobilenet_v3_small"])
def test_pixel_scaling_is_the_backbones(name: str) -> None:
    """What the backbone receives: (image / 255 - mean) / std; nothing but / 255 for Darknet-53."""
    received: list[Tensor] = []

    class Probe(nn.Module):
        out_channels, strides = (4, 4, 4), (8, 16, 32)
        pixel_mean, pixel_std = Darknet53.pixel_mean, Darknet53.pixel_std

        def forward(self, images: Tensor) -> list[Tensor]:
            received.append(images)
            return [images.new_zeros(len(images), 4, images.shape[2] // s, images.shape[3] // s) for s in self.strides]

    if name != "darknet":
        Probe.pixel_mean, Probe.pixel_std = MobileNetV3.pixel_mean, MobileNetV3.pixel_std
    model = YOLOv3(Probe(), [8, 8, 8], [1, 1, 1], num_classes=1).eval()
    model(torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    imagenet = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]  # mean and deviation of RGB
    expected = [1.0, 0.0, 0.2] if name == "darknet" else imagenet
    assert received[0][0, :, 7, 9].tolist() == pytest.approx(expected, abs=1e-5)


def test_pixel_scaling_of_imagenet_for_darknet(tmp_path: Path) -> None:
    words = ["model.backbone=darknet_tiny", "yolo.neck_channels=[8, 8]", f"yolo.anchors={TINY_ANCHORS}"]
    plain, scaled = build(1, *words), build(1, *words, "model.pixel_scaling=imagenet")
    assert plain.geometry.pixel_mean == (0, 0, 0) and plain.geometry.pixel_std == (1, 1, 1)
    mean, std = scaled.geometry.pixel_mean, scaled.geometry.pixel_std
    assert (mean, std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(value - m) / s for value, m, s in zip((1, 0, 0.2), mean, std, strict=True)]
    assert scaled.model.normalize(grey).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(CheckpointError, match="pixel_scaling=imagenet"):
        describe_detector(scaled, 64)
    (tmp_path / "net.cfg").write_text("[net]")
    with pytest.raises(SettingsError, match="must be backbone"):
        build(1, "model.backbone=darknet_cfg", f"model.cfg={tmp_path}/net.cfg", "model.pixel_scaling=imagenet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["yolo.objectness_balance=[4, 1]"], "objectness_balance: has 2 values, but there are 3 levels"),
        (["yolo.neighbour_cells=true"], "neighbour_cells: a centre in the next cell is out of reach with scale_xy = 1"),
        (["yolo.neighbour_cells=true", "yolo.scale_xy=1.9"], "yolo.scale_xy must be at least 2"),
    ],
)
def test_choices_that_do_not_fit_the_levels(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(2, *SMALL, "yolo.loss=multi", *words)


@pytest.mark.parametrize("name", ["scale_xy=1.05", "new_coords=true", "iou_aware=true"])
def test_a_cfg_brings_its_own_head(name: str, tmp_path: Path) -> None:
    (tmp_path / "net.cfg").write_text("[net]")
    with pytest.raises(SettingsError, match=f"yolo.{name.partition('=')[0]}: a network from a cfg brings its own head"):
        build(1, "model.backbone=darknet_cfg", f"model.cfg={tmp_path}/net.cfg", "yolo.loss=multi", f"yolo.{name}")


def test_neck_by_hand(small: Detector) -> None:
    """Each level gets the coarser level's features, upsampled by 2, concatenated before its own."""
    model = small.model.eval()
    images = random_images(1, 64, 96)
    with torch.no_grad():
        features_8, features_16, features_32 = model.backbone(
            (images / 255 - torch.tensor(MobileNetV3.pixel_mean).view(1, 3, 1, 1))
            / torch.tensor(MobileNetV3.pixel_std).view(1, 3, 1, 1)
        )
        carried = model.neck[0](features_32)
        expected = [model.heads[0](carried)]
        for level, features in ((1, features_16), (2, features_8)):
            upsampled = model.laterals[level - 1](carried).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            carried = model.neck[level](torch.cat([upsampled, features], dim=1))
            expected.insert(0, model.heads[level](carried))
        for output, other in zip(model(images), expected, strict=True):
            torch.testing.assert_close(output, other, atol=1e-4, rtol=1e-4)


# Initial state and training


@pytest.mark.parametrize("prior", [0.01, 0.1])
def test_initial_objectness_is_the_prior(prior: float) -> None:
    """At every cell of every level, up to the small random weights of the last convolution."""
    torch.manual_seed(1)
    detector = build(3, *SMALL, f"yolo.objectness_prior={prior}")
    with torch.no_grad():
        outputs = detector.model(random_images(2, 64, 96))
    for output in outputs:
        assert (output[..., 4] - math.log(prior / (1 - prior))).abs().max() < 0.5
        assert output[..., 4].sigmoid().mean().item() == pytest.approx(prior, rel=0.1)
        # any of 3 classes alike: probability 1 / 3; boxes are the anchors in the middle of the cells
        assert output[..., 5:].sigmoid().mean().item() == pytest.approx(1 / 3, rel=0.1)
        assert output[..., :4].abs().max() < 0.5


@pytest.mark.parametrize(
    ("backbone", "num_classes"), [("mobilenet_v3_large", 1), ("mobilenet_v3_small", 3), ("darknet", 80)]
)
def test_every_parameter_gets_a_gradient(backbone: str, num_classes: int) -> None:
    """No unused parameters, which a distributed run would wait for."""
    torch.manual_seed(2)
    detector = build(num_classes, f"model.backbone={backbone}", "yolo.neck_channels=[24, 16, 8]")
    outputs = detector.model(random_images(1, 96, 128))
    # shapes of anchors of the three strides: (16, 30), (62, 45) and (116, 90)
    boxes = torch.tensor([[[0.0, 0, 16, 30], [10, 10, 72, 55], [0, 0, 116, 90]]])
    losses = detector.criterion(outputs, {"boxes": boxes, "labels": torch.zeros(1, 3, dtype=torch.int64)})
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    # box, objectness and class values of each level have a gradient
    for head in detector.model.heads:
        assert head[1].bias.grad.unflatten(0, (3, -1)).ne(0).any(dim=0).all()


@pytest.mark.parametrize("loss", CRITERIA)
def test_settings_reach_the_parts(loss: str) -> None:
    words = [f"yolo.loss={loss}", "yolo.class_loss=cross_entropy", "yolo.ignore_threshold=0.4", "yolo.box_weight=2.0"]
    words += ["yolo.objectness_weight=3.0", "yolo.class_weight=4.0", "evaluation.confidence_threshold=0.2"]
    words += ["evaluation.iou_threshold=0.3", "evaluation.max_detections=7", "model.batch_norm_momentum=0.03"]
    detector = build(2, *SMALL, *words)
    criterion, postprocess = detector.criterion, detector.postprocess
    assert type(criterion) is CRITERIA[loss]
    assert (criterion.class_loss, criterion.ignore_threshold, criterion.weights) == ("cross_entropy", 0.4, (2, 3, 4))
    assert (postprocess.confidence_threshold, postprocess.iou_threshold, postprocess.max_detections) == (0.2, 0.3, 7)
    assert postprocess.softmax
    assert torch.equal(postprocess.layout.anchors[2], torch.tensor([[116.0, 90], [156, 198], [373, 326]]))
    assert torch.equal(criterion.layout.anchors[0], torch.tensor([[10.0, 13], [16, 30], [33, 23]]))
    momenta = [module.momentum for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(momenta) > 40 and set(momenta) == {0.03}


@pytest.mark.parametrize(
    ("word", "path", "size"),
    [
        ("train.image_size=300", "train.image_size", 300),
        ("train.image_size=336", "train.image_size", 336),  # a multiple of 16
        ("train.multiscale_sizes=[320, 600]", "train.multiscale_sizes", 600),
        ("evaluation.image_size=417", "evaluation.image_size", 417),
    ],
)
def test_sizes_that_the_grids_do_not_divide_are_one_line(word: str, path: str, size: int) -> None:
    settings, _ = load_settings(ARGS, words=[word, "train.resize_frequency=1"])
    with torch.device("meta"):
        detector = build_detector(settings, 2)
    with pytest.raises(SettingsError, match=rf"^{path} = {size}: must be a multiple of 32"):
        check_input_sizes(detector, settings)


@pytest.mark.parametrize(
    ("words", "weighs"),
    [
        *((["model.detector=yolo", f"yolo.loss={name}"], True) for name in CRITERIA),
        (["model.detector=yolox"], False),
        (["model.detector=yolox", "yolox.loss=aligned"], False),
        (["model.detector=efficientdet", "model.backbone=tf_efficientnet_b0"], False),
    ],
)
def test_a_criterion_says_whether_it_weighs_boxes(words: list[str], weighs: bool) -> None:
    """Its losses change with the shares of the boxes, or else a weighted mixup is refused."""
    mixed, _ = load_settings(ARGS, words=[*words, "data.augmentation.mixup={p: 1, beta: 1.5}"])
    detector = build_detector(mixed, 2)
    outputs = [output.detach() for output in detector.model(torch.rand(1, 3, 256, 256))]
    boxes, labels = torch.tensor([[[20.0, 30.0, 90.0, 150.0], [100.0, 20.0, 250.0, 200.0]]]), torch.tensor([[0, 1]])
    whole, half = (
        detector.criterion(outputs, {"boxes": boxes, "labels": labels, "weights": torch.full((1, 2), share)})
        for share in (1.0, 0.5)
    )
    assert any(not torch.equal(whole[name], half[name]) for name in whole) == weighs
    for beta in ("1.5", "null"):
        settings, _ = load_settings(ARGS, words=[*words, f"data.augmentation.mixup={{p: 1, beta: {beta}}}"])
        if weighs or beta == "null":
            check_shares(detector, settings)
        else:
            with pytest.raises(
                SettingsError, match=r"^data\.augmentation\.mixup\.beta: the losses of .* must be null$"
            ):
                check_shares(detector, settings)
