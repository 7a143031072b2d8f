#!/bin/bash
# A pipeline that numbers lines until the file DIR/stop appears, and checks at its end that none was lost, doubled or
# changed on the way. Usage: pipeline.sh DIR
set -u
dir=$1

produce() {
    local n=0
    while [[ ! -e $dir/stop ]]; do
        printf 'line %d\n' "$n"
        n=$((n + 1))
        if ((n % 10 == 0)); then sleep 0.02; fi
    done
    printf 'last %d\n' "$n"
}

consume() {
    local word number sum expected=0 wrong=0 first=
    while read -r word number sum; do
        case $word in
        LINE)
            if [[ $number != "$expected" || $sum != "$((expected * 7 % 1009))" ]]; then
                wrong=$((wrong + 1))
                first=${first:-"line $number ($sum) where $expected was due"}
            fi
            expected=$((expected + 1))
            if ((expected % 10 == 0)); then
                printf '%d\n' "$expected" >"$dir/progress.new"
                mv "$dir/progress.new" "$dir/progress"
            fi
            ;;
        LAST)
            if [[ $number != "$expected" ]]; then
                wrong=$((wrong + 1))
                first=${first:-"$expected lines of $number"}
            fi
            verdict "$expected" "$wrong" "$first"
            return
            ;;
        esac
    done
    verdict "$expected" 1 "the pipeline ended without its last line"
}

verdict() {
    local ok=true failures=
    if (($2 > 0)); then
        ok=false
        failures="\"$2 wrong, first: $3\""
    fi
    printf '{"workload": "pipeline", "pid": %d, "seq": 1, "ok": %s, "checks": %d, "failures": [%s]}\n' \
        "$$" "$ok" "$1" "$failures" >"$dir/verdict.new"
    mv "$dir/verdict.new" "$dir/verdict.root.json"
}

echo READY
produce | tr a-z A-Z | awk '{ print $1, $2, $2 * 7 % 1009; fflush() }' | consume
[[ $(<"$dir/verdict.root.json") == *'"ok": true'* ]]
