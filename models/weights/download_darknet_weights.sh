#!/bin/sh
# Fetch Darknet weights into models/weights of this repository, wherever it is called from:
#
#   models/weights/download_darknet_weights.sh [NAME...]        default: darknet53.conv.74
#
#   darknet53.conv.74     162 MB   the backbone, trained on ImageNet: to start training from
#   yolov3.weights        248 MB   the detector, trained on COCO; also yolov3-tiny.weights (35 MB), yolov3-spp.weights
#                                  (252 MB), yolov4.weights (258 MB), yolov4-tiny.weights (24 MB)
#
# An earlier name of download_weights.sh, which says how files are checked; both know every NAME of catalogue.yaml.
# Environment: DARKNET_DIRECTORY, DARKNET_URL and DARKNET_DIGESTS are read as its WEIGHTS_...
set -eu
WEIGHTS_DIRECTORY=${DARKNET_DIRECTORY:-${WEIGHTS_DIRECTORY:-}}
WEIGHTS_URL=${DARKNET_URL:-${WEIGHTS_URL:-}}
WEIGHTS_DIGESTS=${DARKNET_DIGESTS:-${WEIGHTS_DIGESTS:-}}
WEIGHTS_PROGRAM=download_darknet_weights.sh
export WEIGHTS_DIRECTORY WEIGHTS_URL WEIGHTS_DIGESTS WEIGHTS_PROGRAM
[ $# -gt 0 ] || set -- darknet53.conv.74
exec sh "$(dirname -- "$0")/download_weights.sh" "$@"
