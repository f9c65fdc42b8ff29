"""Write published weights of another program as a checkpoint of this one.

python convert_weights.py yolox_darknet53                       a name of docs/weights.md; writes yolox_darknet.pt
python convert_weights.py yolov3_d53_320_273e_coco-421362b6.pth --output mmdetection.pt
python convert_weights.py checkpoint.pth.tar --keep-classes     of 91 outputs all, not the 80 that COCO has
python convert_weights.py my.pdparams --names my.names          the names of the classes, one per line

Every script reads such files directly (--weights, model.pretrained); the checkpoint carries classes, geometry, pixel
range, settings and source too, is checked by its digest, and opens without a search for what it is.
"""

import argparse
from pathlib import Path

from detection.checkpoints import is_checkpoint, save_checkpoint
from detection.config.command_line import Parser
from detection.errors import CheckpointError, SettingsError, exit_with_message, name_list, say
from detection.inference.weights import read_names
from detection.models.catalogue import find_weights, input_of
from detection.models.importers import checkpoint_of, find_format, import_weights, read_weights


def main() -> None:
    arguments = parse_arguments()
    path = find_weights(arguments.weights)
    output = arguments.output or path.with_name(f"{path.name.removesuffix('.tar').rpartition('.')[0]}.pt")
    if output.exists():
        raise SettingsError(f"{output} exists already; name another file with --output")
    content = read_weights(path)
    if is_checkpoint(content):
        raise CheckpointError(f"{path} is a checkpoint of this program already")
    if find_format(content) is None:
        raise CheckpointError(f"{path} is in no format that docs/weights.md lists")
    imported = import_weights(content, str(path), arguments.keep_classes)
    if not imported.whole:
        raise CheckpointError(
            f"{path} holds a backbone only ({imported.source}); start a training with model.pretrained={path}"
        )
    if arguments.names is not None:
        names = read_names(arguments.names)
        if len(names) != imported.num_classes:
            raise SettingsError(
                f"--names {arguments.names}: has {len(names)} names, the weights {imported.num_classes} classes"
            )
        imported = imported.named(names)
    save_checkpoint(output, checkpoint_of(imported, input_of(path)))
    lines = [f"{output}: {imported.source}, {imported.num_classes} classes", *imported.lines]
    if imported.names is not None:
        lines.append(f"classes: {name_list(imported.names)}")
    say(*lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser("convert_weights.py", __doc__)
    add = parser.add_argument
    add("weights", metavar="FILE|NAME", help="weights of another program, or a name of docs/weights.md")
    add("--output", type=Path, metavar="FILE.pt", help="file to write (default: beside the weights, as .pt)")
    add("--keep-classes", action="store_true", help="keep classes without objects (the research repository has 91)")
    add("--names", type=Path, metavar="FILE", help="class names, one per line, for weights that name none")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_message(main)
