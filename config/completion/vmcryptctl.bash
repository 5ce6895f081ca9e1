# SPDX-License-Identifier: LGPL-2.1-or-later
# Written by packaging/docs.py from vmcryptd/cli/verbs.py: change it there.
# shellcheck shell=bash

_vmcryptctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local verb=${COMP_WORDS[1]} options='' names='' goals='' files='' actions=() IFS=$'\n'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "$(printf '%s\n' status unlock lock start stop restart boot shutdown panic plan check wait monitor reload key keystore header --help --version)" -- "$current")
        return
    fi
    case $verb in
        key) actions=(list test add change remove rotate --help) ;;
        keystore) actions=(init --help) ;;
        header) actions=(backup --help) ;;
    esac
    if ((${#actions[@]})); then
        if ((COMP_CWORD == 2)); then
            mapfile -t COMPREPLY < <(compgen -W "${actions[*]}" -- "$current")
            return
        fi
        verb="$verb ${COMP_WORDS[2]}"
    fi
    case $previous in
        --key-file | --config | --new-key-file | --file | --device | --mount)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --timeout | --size) return ;;
    esac
    [[ $previous == --keystore ]] && verb='' names=volumes
    case $verb in
        status) options='--help --failed --all --json' names=all ;;
        unlock) options='--help --key-file --no-ask --timeout' names=volumes ;;
        lock) options='--help' names=volumes ;;
        start) options='--help' names=guests ;;
        stop) options='--help' names=guests ;;
        restart) options='--help' names=guests ;;
        boot) options='--help' ;;
        shutdown) options='--help' ;;
        panic) options='--help' ;;
        plan) options='--help --json' goals=yes ;;
        check) options='--help --config --json' ;;
        wait) options='--help --all --timeout --json' ;;
        monitor) options='--help --json' ;;
        reload) options='--help' ;;
        'key list') options='--help --json' names=volumes ;;
        'key test') options='--help --key-file --json' names=volumes ;;
        'key add') options='--help --key-file --new-key-file --keystore' names=volumes ;;
        'key change') options='--help --key-file --new-key-file' names=volumes ;;
        'key remove') options='--help --key-file' names=volumes ;;
        'key rotate') options='--help --key-file --drop-others --stop' names=volumes ;;
        'keystore init') options='--help --file --device --size --mount --key-file' ;;
        'header backup') options='--help' names=volumes files=yes ;;
    esac
    local words=''
    if [[ $current == -* ]]; then
        words=${options// /$'\n'}
    elif [[ -n $names ]]; then
        words=$(vmcryptctl _names "$names" 2>/dev/null)
    elif [[ -n $goals ]]; then
        # A colon ends a word for bash: what was typed before it is not typed again.
        local before=''
        [[ $previous == : ]] && before=${COMP_WORDS[COMP_CWORD - 2]}
        [[ $current == : ]] && before=$previous current=''
        case $before in
            unlock | lock) words=$(vmcryptctl _names volumes 2>/dev/null) ;;
            start | stop) words=$(vmcryptctl _names guests 2>/dev/null) ;;
            *)
                compopt -o nospace
                words=$(printf '%s\n' boot shutdown lock-all unlock: lock: start: stop:)
                ;;
        esac
    fi
    # Not compgen -W, which expands its words: a guest can be called $(reboot).
    local word
    while read -r word; do
        [[ -n $word && $word == "$current"* ]] && COMPREPLY+=("$(printf %q "$word")")
    done <<<"$words"
    if [[ -n $files && $current != -* ]]; then
        compopt -o filenames
        mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$current")
    fi
}
complete -F _vmcryptctl vmcryptctl
