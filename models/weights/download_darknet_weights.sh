#!/bin/sh
# Fetch Darknet weights into models/weights of this repository, wherever it is called from:
#
#   models/weights/download_darknet_weights.sh [NAME...]        default: darknet53.conv.74
#
#   darknet53.conv.74     162 MB   the backbone, trained on ImageNet: to start training from
#   yolov3.weights        248 MB   the detector, trained on COCO; also yolov3-tiny.weights (35 MB), yolov3-spp.weights
#                                  (252 MB), yolov4.weights (258 MB), yolov4-tiny.weights (24 MB)
#
# Several public addresses are tried in turn and an interrupted download is resumed (NAME.part). A file gets its name
# only after its size, its header and its SHA-256 were checked; one that is already there is checked and kept.
# Without a network: put the file into models/weights by hand and run the script, which checks it.
#
# Exit codes: 0 all files are there and right, 1 a file could not be had, 2 a NAME that is not known.
# Environment: DARKNET_DIRECTORY (another place for the files), DARKNET_URL (mirrors "BASE BASE..." instead of the
# public ones; the file is BASE/NAME), DARKNET_DIGESTS (a file with lines "SIZE SHA256 NAME" instead of the values
# below, - where no SHA256 is known), and FETCH_... of data/fetching.sh.
set -eu

program=download_darknet_weights.sh
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/../../data/fetching.sh"
directory=${DARKNET_DIRECTORY:-$here}
known="darknet53.conv.74 yolov3.weights yolov3-tiny.weights yolov3-spp.weights yolov4.weights yolov4-tiny.weights"

# Source: the author's page https://pjreddie.com/darknet/yolo/ (_darknet/yolo/yolo.md in pjreddie/pjreddie.github.io)
author=https://data.pjreddie.com/files
# Source: earlier text of the same page; redirects to the above (https://github.com/pjreddie/darknet/issues/971)
author_before=https://pjreddie.com/media/files
# Source: https://github.com/hank-ai/darknet/issues/21, to which the README there links; states MD5s as well
hank_ai=https://github.com/hank-ai/darknet/releases/download/v2.0
# Source: README of the repository shadiakiki1986/yolov3.weights
shadiakiki=https://github.com/shadiakiki1986/yolov3.weights/releases/download/3.0.1
# Source: repository ShogoIwai/yolo_by_cds, yolo_by_kaggle/run.sh; with /download in other public scripts
sourceforge=https://sourceforge.net/projects/yolov3.mirror/files/v8
# Source: listing https://huggingface.co/homohapiens/darknet-yolov4/tree/main
hugging_face=https://huggingface.co/homohapiens/darknet-yolov4/resolve/main
# Source: AlexeyAB in https://github.com/pjreddie/darknet/issues/2135
alexey_v3=https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v3_optimal
# Source: repository PurdueDualityLab/TensorFlowModels, yolo/utils/downloads/file_manager.py
alexey_v4=https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v4_pre

# describe NAME: sets size, digest and addresses of a file that is known. Every size is 20 bytes of header and 4 for
# each number in the file.
describe() {
    case $1 in
    darknet53.conv.74)
        # Source: Git LFS pointer weights/darknet53.conv.74 in VictorLin000/YOLOv3_mask_detect; 40,620,640 numbers
        size=162482580 digest=2495c2690283e4e0bc2050cbd4660b77a8074e14e9c11150c6412fd63db496a7
        addresses="$author/$1 $author_before/$1 $sourceforge/$1/download" ;;
    yolov3.weights)
        # Source: Git LFS pointer in https://huggingface.co/quoc/test-new-model/commit/58aad8e (size and digest), and
        # file_manager.py named above (digest); 62,001,757 numbers
        size=248007048 digest=523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297
        addresses="$author/$1 $hank_ai/$1 $shadiakiki/$1 $hugging_face/$1 $sourceforge/$1/download $author_before/$1" ;;
    yolov3-tiny.weights)
        # Source: file_manager.py named above (digest); 8,858,734 numbers
        size=35434956 digest=dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c
        addresses="$author/$1 $hank_ai/$1 $sourceforge/$1/download $author_before/$1" ;;
    yolov3-spp.weights)
        # Source: file_manager.py named above (digest); 63,052,381 numbers
        size=252209544 digest=87a1e8c85c763316f34e428f2295e1db9ed4abcec59dd9544f8052f50de327b4
        addresses="$author/$1 $author_before/$1" ;;
    yolov4.weights)
        # Source: file_manager.py named above (digest); 64,429,405 numbers
        size=257717640 digest=e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562
        addresses="$alexey_v3/$1 $hank_ai/$1 $hugging_face/$1" ;;
    yolov4-tiny.weights)
        # Source: Arch package zmeventnotification 6.1.23 (digest; file_manager.py states the one of an earlier upload);
        # 6,062,814 numbers
        size=24251276 digest=cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87
        addresses="$alexey_v4/$1 $hank_ai/$1 $hugging_face/$1" ;;
    *) return 1 ;;
    esac
    [ -z "${DARKNET_DIGESTS:-}" ] || expectation_of "$1" "$DARKNET_DIGESTS"
    if [ -n "${DARKNET_URL:-}" ]; then
        addresses=
        for base in $DARKNET_URL; do addresses="$addresses ${base%/}/$1"; done
    fi
}

# The file begins with three int32, lowest byte first: major 0, minor 1 or 2, revision 0 (Redmon) or 5 (AlexeyAB).
# Source: save_weights_upto in src/parser.c of pjreddie/darknet
head_fits() {
    bytes=$(od -An -v -tu1 -N12 -- "$1" | tr '\n' ' ' | tr -s ' ')
    case $bytes in
    ' 0 0 0 0 '[12]' 0 0 0 '[05]' 0 0 0'*) return 0 ;;
    esac
    reason="not the header of a Darknet file (an error page?)"
    return 1
}

accept() { head_fits "$1" && size_and_digest_fit "$1" "$size" "$digest"; }

# get NAME: 0 when the file is in place and right
get() {
    describe "$1"
    file=$directory/$1
    if [ -e "$file" ]; then
        if accept "$file"; then say "$1: complete"; return 0; fi
        say "$1: $reason; kept as $1.damaged"
        mv -f "$file" "$file.damaged"
    fi
    require_space "$directory" $(((size - $(size_of "$file.part")) / 1024 + 1))
    say "$1: fetching $size bytes"
    # shellcheck disable=SC2086  # the addresses are words
    if fetch "$file.part" "$size" "$digest" $addresses; then
        mv "$file.part" "$file"
        say "$1: complete"
        return 0
    fi
    say "$1: no address gave the file. Run the script again to resume, or without a network: fetch it elsewhere,"
    say "  put it into $directory as $1 and run the script, which checks it"
    return 1
}

[ $# -gt 0 ] || set -- darknet53.conv.74
for name; do
    describe "$name" || { say "$program: $name is not known; known are: $known"; exit 2; }
done
mkdir -p "$directory" || fail "$directory cannot be made"
status=0
for name; do get "$name" || status=1; done
exit "$status"
