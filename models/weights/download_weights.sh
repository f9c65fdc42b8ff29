#!/bin/sh
# Fetch published weights into models/weights of this repository, wherever it is called from:
#
#   models/weights/download_weights.sh NAME...        names: catalogue.yaml, as a table in docs/weights.md
#
# The public addresses are tried in turn and an interrupted download is resumed (FILE.part). A file gets its name only
# after its size, its first and last bytes and its SHA-256 were checked; one that is already there is checked and kept.
# Where the catalogue knows no SHA-256, or its first digits only, the one of the first download is kept in FILE.sha256
# and compared from then on. Without a network: put the file into models/weights by hand and run the script.
#
# Exit codes: 0 all files are there and right, 1 a file could not be had, 2 a NAME that is not known.
# Environment: WEIGHTS_DIRECTORY (another place for the files), WEIGHTS_URL (mirrors "BASE BASE..." instead of the
# public ones; the file is BASE/FILE), WEIGHTS_DIGESTS (a file with lines "SIZE SHA256 NAME" instead of the values of
# the catalogue, - where no SHA256 is known), WEIGHTS_CATALOGUE (another catalogue), and FETCH_... of data/fetching.sh.
set -eu

program=${WEIGHTS_PROGRAM:-download_weights.sh}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/../../data/fetching.sh"
directory=${WEIGHTS_DIRECTORY:-$here}
catalogue=${WEIGHTS_CATALOGUE:-$here/catalogue.yaml}
[ -r "$catalogue" ] || fail "$catalogue cannot be read"

# fields NAME prints file, size, size_from, sha256, by_hand and the addresses of an entry, one a line, - for null
fields() {
    awk -v wanted="$1" '
        /^- name: / { ours = $3 == wanted }
        ours && /^  [a-z0-9_]+: / { key = $1; sub(/:$/, "", key); sub(/^  [^ ]+ /, ""); gsub(/"/, ""); value[key] = $0 }
        ours && /^    - / { addresses = addresses " " $2 }
        END {
            split("file size size_from sha256 by_hand", keys, " ")
            if ("file" in value) {
                for (number = 1; number <= 5; number++) print (value[keys[number]] == "null" ? "-" : value[keys[number]])
                print addresses
            }
        }' "$catalogue"
}

# describe NAME: sets file, size, least, digest, by_hand and addresses of a file that is known
describe() {
    entry=$(fields "$1")
    [ -n "$entry" ] || return 1
    { read -r file; read -r size; read -r least; read -r digest; read -r by_hand; read -r addresses || :; } <<END
$entry
END
    file=$directory/$file
    [ -z "${WEIGHTS_DIGESTS:-}" ] || expectation_of "$1" "$WEIGHTS_DIGESTS"
    [ "$size" = - ] || least=$size
    if [ -f "$file.sha256" ] && [ "${#digest}" -ne 64 ]; then digest=$(cut -d ' ' -f 1 "$file.sha256"); fi
    if [ -n "${WEIGHTS_URL:-}" ]; then
        addresses=
        for base in $WEIGHTS_URL; do addresses="$addresses ${base%/}/${file##*/}"; done
    fi
}

# bytes_of FILE first|last COUNT prints bytes as numbers, with a space before each
bytes_of() {
    if [ "$2" = first ]; then od -An -v -tu1 -N"$3" -- "$1"; else tail -c "$3" "$1" | od -An -v -tu1; fi | tr '\n' ' ' | tr -s ' '
}

# What a file of this name begins with. Darknet: three int32, lowest byte first: major 0, minor 1 or 2, revision 0
# (Redmon) or 5 (AlexeyAB); save_weights_upto in src/parser.c of pjreddie/darknet. Others: a zip archive, or a pickle.
head_fits() {
    case ${file##*/} in
    *.weights | *.conv.*)
        case $(bytes_of "$1" first 12) in
        ' 0 0 0 0 '[12]' 0 0 0 '[05]' 0 0 0'*) return 0 ;;
        esac
        reason="not the header of a Darknet file (an error page?)" ;;
    *.pdparams)
        case $(bytes_of "$1" first 1) in ' 128'*) return 0 ;; esac
        reason="not the header of a Python pickle (an error page?)" ;;
    *)
        case $(bytes_of "$1" first 4) in ' 80 75 3 4'* | ' 128 '*) return 0 ;; esac
        reason="not the header of a file of torch.save (an error page?)" ;;
    esac
    return 1
}

# What it ends with, where the size says nothing: of an archive its directory, of a pickle its full stop.
end_fits() {
    case ${file##*/}:$(bytes_of "$1" first 2) in
    *.weights:* | *.conv.*:*) return 0 ;;
    *.pdparams:*) case $(bytes_of "$1" last 1) in ' 46'*) return 0 ;; esac ;;
    *:' 80 75'*) case $(bytes_of "$1" last 22) in ' 80 75 5 6 '*) return 0 ;; esac ;;
    *) return 0 ;;
    esac
    reason="its end is missing"
    return 1
}

accept() { head_fits "$1" && size_and_digest_fit "$1" "$size" "$digest" "$least" && end_fits "$1"; }

# pin: keep the digest of a file whose digest is not known in full
pin() {
    [ "${#digest}" -ne 64 ] || return 0
    actual_digest=$(sha256_of "$file")
    [ -n "$actual_digest" ] || return 0
    printf '%s  %s\n' "$actual_digest" "${file##*/}" > "$file.sha256"
    say "  its SHA-256 is kept in ${file##*/}.sha256 and compared from now on"
}

# get NAME: 0 when the file is in place and right
get() {
    describe "$1"
    if [ -e "$file" ]; then
        if accept "$file"; then say "$1: complete"; pin; return 0; fi
        say "$1: $reason; kept as ${file##*/}.damaged"
        mv -f "$file" "$file.damaged"
    fi
    if [ -z "$addresses" ]; then
        say "$1: no address gives this file to a program: $by_hand. Put it into $directory as ${file##*/}"
        return 1
    fi
    require_space "$directory" $(((least - $(size_of "$file.part")) / 1024 + 1))
    if [ "$size" = - ]; then say "$1: fetching about $least bytes"; else say "$1: fetching $size bytes"; fi
    # shellcheck disable=SC2086  # the addresses are words
    if fetch "$file.part" "$size" "$digest" $addresses; then
        mv "$file.part" "$file"
        say "$1: complete"
        pin
        return 0
    fi
    say "$1: no address gave the file. Run the script again to resume, or without a network: fetch it elsewhere,"
    say "  put it into $directory as ${file##*/} and run the script, which checks it"
    return 1
}

known=$(awk '/^- name: / { printf "%s%s", between, $3; between = " " }' "$catalogue")
[ $# -gt 0 ] || { say "$program: give a NAME; known are: $known"; exit 2; }
for name; do
    describe "$name" || { say "$program: $name is not known; known are: $known"; exit 2; }
done
mkdir -p "$directory" || fail "$directory cannot be made"
status=0
for name; do get "$name" || status=1; done
exit "$status"
