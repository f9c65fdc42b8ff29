#!/bin/sh
# Fetch COCO 2017 (train, val, annotations; 25 GB to download, 52 GB free space needed) into this directory:
#
#   data/download_coco.sh [DIRECTORY]        default: data/coco beside this script
#
# Interrupted downloads are resumed, an archive counts only after it was tested, and what is complete is skipped, so the
# script can simply be run again. Without a network: put the three .zip files into DIRECTORY and run it there.
# The addresses are those of https://cocodataset.org/#download; the project publishes no digests, so each archive is
# checked by its own CRCs (unzip -t) and the number of unpacked images. COCO_URL overrides the host (a mirror, a test).
set -eu

directory=${1:-"$(dirname "$0")/coco"}
url=${COCO_URL:-http://images.cocodataset.org}
needed_kib=${COCO_NEEDED_KIB:-52000000}

say() { printf '%s\n' "$*" >&2; }
fail() { say "download_coco.sh: $*"; exit 1; }

command -v unzip >/dev/null || fail "unzip is not installed"
if command -v curl >/dev/null; then
    # --fail: an error page is no archive; -C -: continue where the last try ended
    fetch() { curl --fail --location --retry 5 --retry-delay 2 -C - --output "$2" "$1"; }
elif command -v wget >/dev/null; then
    fetch() { wget --continue --tries=5 --output-document="$2" "$1"; }
else
    fail "neither curl nor wget is installed"
fi

mkdir -p "$directory" || fail "$directory cannot be made"

# get PATH_ON_HOST ARCHIVE PROOF COUNT: PROOF is what the archive unpacks to, COUNT its number of files
get() {
    if [ -e "$directory/.complete_$2" ] && [ -e "$directory/$3" ]; then
        say "$2: complete"
        return
    fi
    free_kib=$(df -Pk "$directory" | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge "$needed_kib" ] || fail "$directory has $free_kib KiB free, about $needed_kib KiB are needed"
    if [ ! -e "$directory/$2" ]; then
        say "$2: downloading from $url/$1"
        fetch "$url/$1" "$directory/$2.part" \
            || fail "$url/$1 could not be fetched; run the script again to resume, or put $2 into $directory by hand"
        mv "$directory/$2.part" "$directory/$2"
    fi
    if ! unzip -tq "$directory/$2" >/dev/null; then
        mv "$directory/$2" "$directory/$2.damaged"
        fail "$2 is no intact zip archive (kept as $2.damaged); run the script again to fetch it anew"
    fi
    # unzip strips a leading / and refuses ../ by itself
    unzip -qo "$directory/$2" -d "$directory"
    found=$(find "$directory/$3" -type f | wc -l)
    [ "$found" -eq "$4" ] || fail "$3 holds $found files, $4 were expected"
    : > "$directory/.complete_$2"
    rm "$directory/$2"
}

get annotations/annotations_trainval2017.zip annotations_trainval2017.zip annotations "${COCO_ANNOTATIONS:-6}"
get zips/val2017.zip val2017.zip val2017 "${COCO_VAL:-5000}"
get zips/train2017.zip train2017.zip train2017 "${COCO_TRAIN:-118287}"
say "COCO 2017 is in $directory; train with: python3 yolo-v3/main.py data.root=$directory"
