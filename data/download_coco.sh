#!/bin/sh
# Fetch COCO 2017 (train, val, annotations) into DIRECTORY: 20.4 GB to download, a little over twice that of free space:
#
#   data/download_coco.sh [DIRECTORY]        default: data/coco beside this script
#
# Two addresses are tried in turn, interrupted downloads are resumed and what is complete is skipped: the script can
# simply be run again. An archive is unpacked only after its size, its SHA-256 and the names in it were checked: all
# must lie in the one directory that belongs to it, none may be a link. Then it is deleted.
# Without a network: put the three .zip files into DIRECTORY and run the script there.
#
# Exit codes: 0 all is there, 1 something could not be had.
# Environment: COCO_URL (mirrors "BASE BASE..." instead of the two addresses), COCO_DIGESTS (a file with lines
# "SIZE SHA256 ARCHIVE" instead of the values below, - where no SHA256 is known), COCO_TRAIN, COCO_VAL, COCO_ANNOTATIONS
# (expected numbers of files), COCO_NEEDED_KIB (free space), and FETCH_... of data/fetching.sh.
set -eu

program=download_coco.sh
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/fetching.sh"
directory=${1:-"$here/coco"}
case $directory in -*) say "$program: usage: data/download_coco.sh [DIRECTORY]"; exit 2 ;; esac

# Source: https://github.com/mlcommons/inference/pull/2572 (same bytes as below; the certificate fits this host only)
bucket=https://s3.amazonaws.com/images.cocodataset.org
# Source: https://cocodataset.org/#download
official=http://images.cocodataset.org
bases=${COCO_URL:-"$bucket $official"}

command -v unzip >/dev/null || fail "unzip is not installed"
mkdir -p "$directory" || fail "$directory cannot be made"

# describe ARCHIVE: sets path (on the host), top (the directory in it), files (their number), size and digest
# Source of the digests: torchvision/prototype/datasets/_builtin/coco.py in pytorch/vision; of the sizes: listing of
# s3://fast-ai-coco (train) and many public manifests that state the same digests
describe() {
    case $1 in
    annotations_trainval2017.zip)
        path=annotations/$1 top=annotations files=${COCO_ANNOTATIONS:-6}
        size=252907541 digest=113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268 ;;
    val2017.zip)
        path=zips/$1 top=val2017 files=${COCO_VAL:-5000}
        size=815585330 digest=4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05 ;;
    train2017.zip)
        path=zips/$1 top=train2017 files=${COCO_TRAIN:-118287}
        size=19336861798 digest=69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929 ;;
    esac
    [ -z "${COCO_DIGESTS:-}" ] || expectation_of "$1" "$COCO_DIGESTS"
}

is_complete() { [ -e "$directory/.complete_$1" ] && [ -d "$directory/$top" ]; }

# needed_kib ARCHIVE...: for what is missing of each archive and for its files. JPEG files are as large as their
# archive, with what the file system adds; the JSON files are about four times as large (both estimated).
needed_kib() {
    sum=0
    for archive; do
        describe "$archive"
        is_complete "$archive" && continue
        if [ "$top" = annotations ]; then tenths=40; else tenths=11; fi
        have=$(size_of "$directory/$archive")
        [ "$have" -gt 0 ] || have=$(size_of "$directory/$archive.part")
        sum=$((sum + (size - have + size * tenths / 10) / 1024))
    done
    echo "$sum"
}

head_fits() {
    [ "$(od -An -v -tx1 -N4 -- "$1" | tr -d ' \n')" = 504b0304 ] && return 0
    reason="not a zip archive (an error page?)"
    return 1
}

# names_fit FILE: COUNT files, all below the directory `top`, no links. unzip would write through a link.
names_fit() {
    unzip -Z1 "$1" > "$1.names" 2>/dev/null || { rm -f "$1.names"; reason="a damaged zip archive"; return 1; }
    stray=$(grep -v "^$top/" "$1.names" | head -n 1) || true
    [ -n "$stray" ] || stray=$(grep -E '(^|/)\.\.(/|$)' "$1.names" | head -n 1) || true
    count=$(grep -c -v '/$' "$1.names") || true
    rm -f "$1.names"
    [ -z "$stray" ] || { reason="holds $stray, which does not lie in $top/"; return 1; }
    ! unzip -Zs "$1" | grep -q '^l' || { reason="holds a symbolic link"; return 1; }
    [ "$count" -eq "$files" ] || { reason="holds $count files, $files were expected"; return 1; }
}

accept() {
    head_fits "$1" && size_and_digest_fit "$1" "$size" "$digest" || return 1
    if [ "$digest" = - ] && ! unzip -tq "$1" >/dev/null 2>&1; then
        reason="a damaged zip archive"
        return 1
    fi
    names_fit "$1"
}

get() {
    describe "$1"
    if is_complete "$1"; then say "$1: complete"; return; fi
    archive=$directory/$1
    if [ -e "$archive" ] && ! accept "$archive"; then
        say "$1: $reason; kept as $1.damaged"
        mv -f "$archive" "$archive.damaged"
    fi
    if [ ! -e "$archive" ]; then
        say "$1: fetching $size bytes"
        addresses=
        for base in $bases; do addresses="$addresses ${base%/}/$path"; done
        # shellcheck disable=SC2086  # the addresses are words
        fetch "$archive.part" "$size" "$digest" $addresses || fail "$1: no address gave the archive. Run the script \
again to resume, or without a network: fetch it elsewhere, put it into $directory and run the script, which checks it"
        mv "$archive.part" "$archive"
    fi
    say "$1: unpacking"
    unzip -qo "$archive" -d "$directory" || fail "$1 could not be unpacked into $directory (unzip exit $?)"
    : > "$directory/.complete_$1"
    rm "$archive"
}

set -- annotations_trainval2017.zip val2017.zip train2017.zip
needed=${COCO_NEEDED_KIB:-$(needed_kib "$@")}
require_space "$directory" "$needed"
for name; do get "$name"; done
say "COCO 2017 is in $directory; train with: python3 yolo-v3/main.py data.root=$directory"
