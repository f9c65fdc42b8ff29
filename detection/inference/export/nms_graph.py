"""NMS as nodes of an ONNX graph, behind its decoded boxes and scores."""

from typing import Any

from detection.errors import SettingsError
from detection.models.postprocess import EVERYTHING, MAX_UNSUPPRESSED, DensePostprocess, Selection

NMS_INPUTS = ["all_boxes", "all_scores"]  # (B, P, 4) and (B, P, C)
# NonMaxSuppression expects y before x; xyxy boxes need no reordering, because IoU is symmetric in x and y. The result
# is sorted by score over all images.
NMS_TEMPLATE = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
NMS (float[batch, predictions, 4] all_boxes, float[batch, predictions, classes] all_scores)
    => (float[found, 4] boxes, float[found] scores, int64[found] labels, int64[found] image_index)
    <float[1] confidence = {{{confidence}}}, float[1] iou = {{{iou}}}, int64[1] most = {{{most}}},
     int64 column_image = {{0}}, int64 column_class = {{1}}, int64[2] columns_box = {{0, 2}}{constants}>
{{{before}
    class_scores = Transpose <perm = [0, 2, 1]> ({scores_in})
    kept = NonMaxSuppression (all_boxes, class_scores, most, iou, confidence)
    kept_scores = GatherND (class_scores, kept)
    count = Shape (kept_scores)
    scores{s}, order = TopK (kept_scores, count)
    image_class_box = Gather (kept, order)
    image_index{s} = Gather <axis = 1> (image_class_box, column_image)
    labels{s} = Gather <axis = 1> (image_class_box, column_class)
    image_box = Gather <axis = 1> (image_class_box, columns_box)
    boxes{s} = GatherND (all_boxes, image_box){after}
}}
"""
# Of `Selection.max_candidates`: scores below that of an image's last candidate become 0. Of the candidates with exactly
# that score all stay, in PyTorch the first ones.
CANDIDATE_CONSTANTS = """,
     int64[1] candidates = {{{max_candidates}}}, int64[2] flat = {{0, -1}}, int64[1] last_axis = {{-1}},
     int64[3] per_image = {{-1, 1, 1}}, float none = {{0}}"""
CANDIDATES = """
    scores_of_image = Reshape (all_scores, flat)
    shape = Shape (scores_of_image)
    number = Gather (shape, last_axis)
    wanted = Min (number, candidates)
    best_scores, best_places = TopK (scores_of_image, wanted)
    smallest = ReduceMin (best_scores, last_axis)
    limit = Reshape (smallest, per_image)
    enough = GreaterOrEqual (all_scores, limit)
    scores_in = Where (enough, all_scores, none)"""
# Of `Selection.max_per_image`: the rank of each detection among those of its image, counted from 1, decides.
BEST_CONSTANTS = """,
     int64 of_image = {{{max_per_image}}}, int64 zero = {{0}}, int64 one = {{1}}, int64[1] last = {{-1}}"""
BEST_OF_IMAGE = """
    shape_of_scores = Shape (all_scores)
    batch_size = Gather (shape_of_scores, zero)
    numbers = Range (zero, batch_size, one)
    image_of_detection = Unsqueeze (image_index_out, last)
    belongs = Equal (image_of_detection, numbers)
    ones = Cast <to = 7> (belongs)
    running = CumSum (ones, zero)
    own = Mul (running, ones)
    rank = ReduceSum <keepdims = 0> (own, last)
    stays = LessOrEqual (rank, of_image)
    boxes = Compress <axis = 0> (boxes_out, stays)
    scores = Compress <axis = 0> (scores_out, stays)
    labels = Compress <axis = 0> (labels_out, stays)
    image_index = Compress <axis = 0> (image_index_out, stays)"""

# The same outputs for a detector that needs no NMS: the best of each image, all classes together.
BEST_TEMPLATE = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
Best (float[batch, predictions, 4] all_boxes, float[batch, predictions, classes] all_scores)
    => (float[found, 4] boxes, float[found] scores, int64[found] labels, int64[found] image_index)
    <float confidence = {{{confidence}}}, int64[1] most = {{{most}}}, int64[2] flat = {{0, -1}}, int64[1] last = {{-1}},
     int64 row_image = {{0}}>
{{
    scores_of_image = Reshape (all_scores, flat)
    shape = Shape (scores_of_image)
    number = Gather (shape, last)
    wanted = Min (number, most)
    best_scores, best_places = TopK (scores_of_image, wanted)
    confident = Greater (best_scores, confidence)
    image_place = NonZero (confident)
    places = Transpose <perm = [1, 0]> (image_place)
    found_scores = GatherND (best_scores, places)
    count = Shape (found_scores)
    scores, order = TopK (found_scores, count)
    sorted_places = Gather (places, order)
    flat_place = GatherND (best_places, sorted_places)
    image_index = Gather <axis = 1> (sorted_places, row_image)
    shape_of_scores = Shape (all_scores)
    classes = Gather (shape_of_scores, last)
    labels = Mod (flat_place, classes)
    prediction = Div (flat_place, classes)
    image_column = Unsqueeze (image_index, last)
    prediction_column = Unsqueeze (prediction, last)
    image_prediction = Concat <axis = 1> (image_column, prediction_column)
    boxes = GatherND (all_boxes, image_prediction)
}}
"""


def nms_text(
    ir_version: int, opset: int, confidence: float, iou: float, most: int, selection: Selection = EVERYTHING
) -> str:
    """Text of a graph with NMS.

    Args:
        ir_version, opset: of the graph it is appended to.
        confidence, iou, most: thresholds, and the number of detections per image and class.
        selection: without soft-NMS.
    """
    parts = {"constants": "", "before": "", "scores_in": "all_scores", "s": "", "after": ""}
    if selection.max_candidates is not None:
        parts["constants"] += CANDIDATE_CONSTANTS.format(max_candidates=selection.max_candidates)
        parts |= {"before": CANDIDATES, "scores_in": "scores_in"}
    if selection.max_per_image is not None:
        parts["constants"] += BEST_CONSTANTS.format(max_per_image=selection.max_per_image)
        parts |= {"s": "_out", "after": BEST_OF_IMAGE}
    return NMS_TEMPLATE.format(ir_version=ir_version, opset=opset, confidence=confidence, iou=iou, most=most, **parts)


def add_nms(model: Any, postprocess: DensePostprocess) -> Any:
    """Append the standard operator NonMaxSuppression, with the thresholds of the postprocess as constants.

    For a detector that needs none the best detections of each image are taken instead.

    Raises:
        SettingsError: soft-NMS, for which ONNX has no operator.
    """
    import onnx

    if postprocess.selection.soft_sigma is not None:
        raise SettingsError(
            "--nms: ONNX has no operator for soft-NMS; export without --nms (validation.py then applies it), or with "
            "the setting of hard NMS"
        )
    if postprocess.suppress:
        text = nms_text(
            model.ir_version,
            read_opset(model),
            postprocess.confidence_threshold,
            postprocess.iou_threshold,
            postprocess.max_detections or 2**31 - 1,
            postprocess.selection,
        )
    else:
        text = BEST_TEMPLATE.format(
            ir_version=model.ir_version,
            opset=read_opset(model),
            confidence=postprocess.confidence_threshold,
            most=MAX_UNSUPPRESSED,
        )
    names = [(name, name) for name in NMS_INPUTS]
    return onnx.compose.merge_models(model, onnx.parser.parse_model(text), io_map=names)


def read_opset(model: Any) -> int:
    """Version of ONNX's own operators in a model."""
    return next(entry.version for entry in model.opset_import if not entry.domain)
