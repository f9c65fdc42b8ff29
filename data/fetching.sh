# How the download scripts fetch one large file; sourced by them, never run.
#
# Whoever sources it sets `program` (its name in messages) and defines two functions that set `reason` when they refuse:
#   head_fits FILE     the first bytes are those of such a file (an error page is recognised by this)
#   accept FILE        the whole file is right; it has the expected size or more
#
# Environment: FETCH_TOOL=curl|wget (default: whichever is installed, curl first), FETCH_TIMEOUT=30 (seconds to connect,
# or without data, until an attempt is given up), FETCH_TRIES=3 (attempts in a row that bring no byte, per address),
# FETCH_PAUSE=2 (seconds between attempts). Proxies are set as curl and wget read them (https_proxy, http_proxy).

fetch_timeout=${FETCH_TIMEOUT:-30}
fetch_tries=${FETCH_TRIES:-3}
fetch_pause=${FETCH_PAUSE:-2}
reason=

say() { printf '%s\n' "$*" >&2; }
fail() { say "$program: $*"; exit 1; }

size_of() { if [ -f "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }

# sha256_of FILE prints the digest, or nothing where no program can compute it
sha256_of() {
    if command -v sha256sum >/dev/null; then sha256sum < "$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null; then shasum -a 256 < "$1" | cut -d ' ' -f 1
    elif command -v openssl >/dev/null; then openssl dgst -sha256 < "$1" | sed 's/.* //'
    fi
}

# size_and_digest_fit FILE SIZE SHA256 [LEAST]: SHA256 is - where no public source states one, or its first digits;
# SIZE is - where none is known, then the file has at least LEAST bytes
size_and_digest_fit() {
    actual_size=$(size_of "$1")
    if [ "$2" = - ]; then
        [ "$actual_size" -ge "$4" ] || { reason="$actual_size bytes, at least $4 were expected"; return 1; }
    elif [ "$actual_size" -ne "$2" ]; then
        reason="$actual_size bytes, $2 were expected"
        return 1
    fi
    [ "$3" != - ] || { say "  no digest is known: only size and header are checked"; return 0; }
    actual_digest=$(sha256_of "$1")
    if [ -z "$actual_digest" ]; then
        say "  no program for SHA-256 is installed: only size and header are checked"
        return 0
    fi
    case $actual_digest in
    "$3"*) return 0 ;;
    esac
    reason="SHA-256 is $actual_digest, not $3"
    return 1
}

# expectation_of NAME FILE: sets `size` and `digest` from the line "SIZE SHA256 NAME" of FILE
expectation_of() {
    line=$(awk -v name="$1" '$3 == name { print $1, $2; exit }' "$2") || fail "$2 cannot be read"
    [ -n "$line" ] || fail "$2 has no line 'SIZE SHA256 $1'"
    size=${line% *} digest=${line#* }
}

require_space() {
    free_kib=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge "$2" ] || fail "$1 has $free_kib KiB free, about $2 KiB are needed"
}

choose_tool() {
    case ${FETCH_TOOL:-} in
    curl | wget) tool=$FETCH_TOOL ;;
    '') if command -v curl >/dev/null; then tool=curl; else tool=wget; fi ;;
    *) fail "FETCH_TOOL is $FETCH_TOOL; curl and wget are known" ;;
    esac
    command -v "$tool" >/dev/null || { reason="neither curl nor wget is installed"; return 1; }
}

# attempt ADDRESS FILE continues FILE. 0: the server says that it is done; 1: broken off, may be continued; 2: refused;
# 3: the server cannot continue a file; 4: the disk refuses
attempt() {
    code=0
    if [ "$tool" = curl ]; then
        if [ -t 2 ]; then meter=--progress-bar; else meter=--silent; fi
        # --fail: an error page is not a file; redirects stay on the web; slower than 1000 bytes/s is given up as well
        http=$(curl --fail --location --max-redirs 10 --proto-redir '=http,https' "$meter" \
            --connect-timeout "$fetch_timeout" --speed-limit 1000 --speed-time "$fetch_timeout" \
            --continue-at - --output "$2" --write-out '%{http_code}' "$1") || code=$?
        case $code in
        0) return 0 ;;
        6) reason="host not found"; return 2 ;;
        7) reason="no connection"; return 2 ;;
        22) reason="HTTP status $http"
            case $http in
            416) return 3 ;;
            408 | 429 | 5*) return 1 ;;
            *) return 2 ;;
            esac ;;
        23) reason="the file cannot be written"; return 4 ;;
        28) reason="no data for $fetch_timeout s"; return 1 ;;
        33) reason="the server cannot continue a file"; return 3 ;;
        35 | 51 | 60) reason="no trustworthy TLS connection (curl exit $code)"; return 2 ;;
        16 | 18 | 52 | 55 | 56 | 92) reason="connection cut"; return 1 ;;
        *) reason="curl exit $code"; return 2 ;;
        esac
    fi
    if [ -t 2 ]; then quiet=; else quiet=-q; fi
    # short options: BusyBox has no others
    wget ${quiet:+"$quiet"} -c -t 1 -T "$fetch_timeout" -O "$2" "$1" || code=$?
    case $code in
    0) return 0 ;;
    3) reason="the file cannot be written"; return 4 ;;
    1 | 4) reason="no connection, connection cut, or no data for $fetch_timeout s"; return 1 ;;
    5) reason="no trustworthy TLS connection"; return 2 ;;
    8) reason="the server answers with an error"; return 2 ;;
    *) reason="wget exit $code"; return 2 ;;
    esac
}

# has_all SIZE BYTES; SIZE is - where it is not known
has_all() { [ "$1" != - ] && [ "$2" -ge "$1" ]; }

# fetch_from ADDRESS PART SIZE: 0 when PART is complete and accepted. What was there is continued; if the whole is then
# refused, or the server cannot continue, it is fetched once more from zero.
fetch_from() {
    restarts=1 fruitless=0
    while :; do
        before=$(size_of "$2")
        outcome=0
        has_all "$3" "$before" || attempt "$1" "$2" || outcome=$?
        after=$(size_of "$2")
        [ "$after" -gt 0 ] || rm -f "$2"  # wget leaves an empty file
        if [ "$outcome" -eq 4 ]; then
            fail "$2: $reason"
        elif has_all "$3" "$after" || { [ "$3" = - ] && [ "$outcome" -eq 0 ] && [ "$after" -gt 0 ]; }; then
            accept "$2" && return 0
            rm -f "$2"
            [ "$before" -gt 0 ] && [ "$restarts" -gt 0 ] || return 1
            say "  the continued file is refused ($reason); once more from zero"
            restarts=0
        elif [ "$outcome" -eq 3 ] && [ "$before" -gt 0 ] && [ "$restarts" -gt 0 ]; then
            rm -f "$2"
            restarts=0
        elif [ "$outcome" -ge 2 ]; then
            return 1
        elif [ "$after" -gt 0 ] && ! head_fits "$2"; then
            rm -f "$2"
            return 1
        else
            # Some servers end without saying how long the file is: an end before SIZE is a cut connection.
            [ "$outcome" -eq 1 ] || reason="ends after $after of $3 bytes"
            if [ "$after" -gt "$before" ]; then fruitless=0; else fruitless=$((fruitless + 1)); fi
            [ "$fruitless" -lt "$fetch_tries" ] || return 1
            sleep "$fetch_pause"
        fi
    done
}

# fetch PART SIZE SHA256 ADDRESS...: each address in turn; a part of unknown origin is only continued where a digest can
# prove the whole
fetch() {
    part=$1 part_size=$2 part_digest=$3
    shift 3
    choose_tool || { say "  $reason"; return 1; }
    if [ -e "$part" ] && { [ "$part_digest" = - ] || ! head_fits "$part"; }; then rm -f "$part"; fi
    for address; do
        say "  from $address"
        if fetch_from "$address" "$part" "$part_size"; then return 0; fi
        say "  $address: $reason"
    done
    return 1
}
