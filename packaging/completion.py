# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shells' completion of vmcryptctl, from its table of verbs."""

from __future__ import annotations

from vmcryptd.verbs import GOALS, VISIBLE, Argument, Verb

HEAD = """\
# SPDX-License-Identifier: LGPL-2.1-or-later
# Written by packaging/docs.py from vmcryptd/verbs.py: change it there.
"""
NAMED = {"volumes": "volumes", "guests": "guests", "names": "all"}


def _options(verb: Verb) -> list[Argument]:
    return [argument for argument in verb.arguments if argument.name.startswith("-")]


def _completes(verb: Verb) -> str:
    """What a word that is no option may be."""
    return next((one.completes for one in verb.arguments if not one.name.startswith("-")), "")


def bash() -> str:
    names = " ".join(verb.name for verb in VISIBLE)
    cases = []
    for verb in VISIBLE:
        options = " ".join(["--help", *(option.name for option in _options(verb))])
        what = _completes(verb)
        live = f"names={NAMED[what]}" if what in NAMED else "goals=yes" if what == "goals" else ""
        cases.append(f"        {verb.name}) options='{options}' {live}".rstrip() + " ;;")
    goals = " ".join(GOALS)
    lines = "\n".join(cases)
    return f"""{HEAD}# shellcheck shell=bash

_vmcryptctl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local verb=${{COMP_WORDS[1]}} options='' names='' goals='' IFS=$'\\n'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "$(printf '%s\\n' {names} --help --version)" -- "$current")
        return
    fi
    if [[ $previous == --key-file ]]; then
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
        return
    fi
    [[ $previous == --timeout ]] && return
    case $verb in
{lines}
    esac
    local words=''
    if [[ $current == -* ]]; then
        words=${{options// /$'\\n'}}
    elif [[ -n $names ]]; then
        words=$(vmcryptctl _names "$names" 2>/dev/null)
    elif [[ -n $goals ]]; then
        # A colon ends a word for bash: what was typed before it is not typed again.
        local before=''
        [[ $previous == : ]] && before=${{COMP_WORDS[COMP_CWORD - 2]}}
        [[ $current == : ]] && before=$previous current=''
        case $before in
            unlock | lock) words=$(vmcryptctl _names volumes 2>/dev/null) ;;
            start | stop) words=$(vmcryptctl _names guests 2>/dev/null) ;;
            *)
                compopt -o nospace
                words=$(printf '%s\\n' {goals})
                ;;
        esac
    fi
    # Not compgen -W, which expands its words: a guest can be called $(reboot).
    local word
    while read -r word; do
        [[ -n $word && $word == "$current"* ]] && COMPREPLY+=("$(printf %q "$word")")
    done <<<"$words"
}}
complete -F _vmcryptctl vmcryptctl
"""


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''")


def _zsh_text(text: str) -> str:
    return _quoted(text).replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def zsh() -> str:
    listed = "\n".join(f"        '{verb.name}:{_quoted(verb.help)}'" for verb in VISIBLE)
    cases = []
    for verb in VISIBLE:
        words = ["'--help[tell more about it]'"]
        for option in _options(verb):
            value = {"FILE": ":file:_files", "TIME": ":time:"}.get(option.value, "")
            words.append(f"'{option.name}[{_zsh_text(option.help)}]{value}'")
        for argument in verb.arguments:
            if not argument.name.startswith("-"):
                many = "*" if argument.nargs else ""
                words.append(f"'{many}:{argument.name.lower()}:_vmcryptctl_{argument.completes}'")
        cases.append(f"        {verb.name}) _arguments {' '.join(words)} ;;")
    lines = "\n".join(cases)
    goals = " ".join(GOALS)
    return f"""#compdef vmcryptctl
{HEAD}
_vmcryptctl_live() {{
    local -a found
    found=("${{(@f)$(vmcryptctl _names $1 2>/dev/null)}}")
    compadd -- ${{found:#}}
}}

_vmcryptctl_volumes() {{ _vmcryptctl_live volumes }}
_vmcryptctl_guests() {{ _vmcryptctl_live guests }}
_vmcryptctl_names() {{ _vmcryptctl_live all }}

_vmcryptctl_goals() {{
    if compset -P '(un|)lock:'; then
        _vmcryptctl_live volumes
    elif compset -P '(start|stop):'; then
        _vmcryptctl_live guests
    else
        compadd -S '' -- {goals}
    fi
}}

_vmcryptctl() {{
    local -a verbs
    verbs=(
{listed}
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        _arguments '--help' '--version'
        return
    fi
    local verb=$words[2]
    shift words
    ((CURRENT--))
    case $verb in
{lines}
    esac
}}

_vmcryptctl "$@"
"""


def fish() -> str:
    lines = [
        f"{HEAD}",
        "complete -c vmcryptctl -f",
        "complete -c vmcryptctl -n __fish_use_subcommand -l help -d 'show all verbs'",
        "complete -c vmcryptctl -n __fish_use_subcommand -l version -d 'show the version'",
    ]
    for verb in VISIBLE:
        lines.append(
            f"complete -c vmcryptctl -n __fish_use_subcommand -a {verb.name} -d '{_fish_text(verb.help)}'"
        )
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        lines.append(f"complete -c vmcryptctl {seen} -l help -d 'tell more about it'")
        for option in _options(verb):
            takes = {"FILE": " -r -F", "TIME": " -x"}.get(option.value, "")
            name = option.name.removeprefix("--")
            lines.append(
                f"complete -c vmcryptctl {seen} -l {name}{takes} -d '{_fish_text(option.help)}'"
            )
        what = _completes(verb)
        if what in NAMED:
            lines.append(
                f"complete -c vmcryptctl {seen} -a '(vmcryptctl _names {NAMED[what]} 2>/dev/null)'"
            )
        elif what == "goals":
            lines += [
                f"complete -c vmcryptctl {seen} -a '{' '.join(goal for goal in GOALS if goal[-1] != ':')}'",
                *(_fish_goal(seen, goal) for goal in GOALS if goal[-1] == ":"),
            ]
    return "\n".join(lines) + "\n"


def _fish_goal(seen: str, goal: str) -> str:
    names = "volumes" if "lock" in goal else "guests"
    return f"complete -c vmcryptctl {seen} -a '{goal}(vmcryptctl _names {names} 2>/dev/null)'"


def _fish_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
