# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shells' completion of vmcryptctl, from its table of verbs."""

from __future__ import annotations

from vmcryptd.cli.verbs import GOALS, GROUPS, VISIBLE, Argument, Verb

HEAD = """\
# SPDX-License-Identifier: LGPL-2.1-or-later
# Written by packaging/docs.py from vmcryptd/cli/verbs.py: change it there.
"""
NAMED = {"volumes": "volumes", "guests": "guests", "names": "all"}


def _options(verb: Verb) -> list[Argument]:
    return [argument for argument in verb.arguments if argument.name.startswith("-")]


def _words(verb: Verb) -> list[Argument]:
    return [argument for argument in verb.arguments if not argument.name.startswith("-")]


def _completes(verb: Verb) -> str:
    """The candidates for the first word that is no option."""
    return next((one.completes for one in _words(verb)), "")


def _takes_file(verb: Verb) -> bool:
    return any(one.completes == "files" for one in _words(verb))


def _first_words() -> list[str]:
    """The words that may follow vmcryptctl: verbs, and each group of verbs once."""
    return list(dict.fromkeys(verb.name.split()[0] for verb in VISIBLE))


def _members(group: str) -> list[Verb]:
    return [verb for verb in VISIBLE if verb.name.startswith(f"{group} ")]


def _second_word(verb: Verb) -> str:
    return verb.name.split()[1]


def _options_that_take(*kinds: str) -> list[str]:
    """The options of all verbs whose value is completed in this way."""
    options = [option for verb in VISIBLE for option in _options(verb) if option.value]
    return list(dict.fromkeys(option.name for option in options if option.completes in kinds))


def bash() -> str:
    cases = []
    for verb in VISIBLE:
        options = " ".join(["--help", *(option.name for option in _options(verb))])
        what = _completes(verb)
        live = f"names={NAMED[what]}" if what in NAMED else "goals=yes" if what == "goals" else ""
        files = " files=yes" if _takes_file(verb) else ""
        pattern = f"'{verb.name}'" if " " in verb.name else verb.name
        cases.append(f"        {pattern}) options='{options}' {live}{files}".rstrip() + " ;;")
    groups = [
        f"        {group}) actions=({' '.join(map(_second_word, _members(group)))} --help) ;;"
        for group in GROUPS
    ]
    names = " ".join(_first_words())
    goals = " ".join(GOALS)
    lines, grouped = "\n".join(cases), "\n".join(groups)
    files, nothing = " | ".join(_options_that_take("files")), " | ".join(_options_that_take(""))
    volumes = _options_that_take("volumes")
    live_value = (
        f"    [[ $previous == {volumes[0]} ]] && verb='' names=volumes\n" if volumes else ""
    )
    return f"""{HEAD}# shellcheck shell=bash

_vmcryptctl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local verb=${{COMP_WORDS[1]}} options='' names='' goals='' files='' actions=() IFS=$'\\n'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "$(printf '%s\\n' {names} --help --version)" -- "$current")
        return
    fi
    case $verb in
{grouped}
    esac
    if ((${{#actions[@]}})); then
        if ((COMP_CWORD == 2)); then
            mapfile -t COMPREPLY < <(compgen -W "${{actions[*]}}" -- "$current")
            return
        fi
        verb="$verb ${{COMP_WORDS[2]}}"
    fi
    case $previous in
        {files})
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        {nothing}) return ;;
    esac
{live_value}    case $verb in
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
    if [[ -n $files && $current != -* ]]; then
        compopt -o filenames
        mapfile -t -O ${{#COMPREPLY[@]}} COMPREPLY < <(compgen -f -- "$current")
    fi
}}
complete -F _vmcryptctl vmcryptctl
"""


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''")


def _about(word: str) -> str:
    """The description of a first word."""
    verb = next((verb for verb in VISIBLE if verb.name == word), None)
    if verb is not None:
        return verb.help
    return ", ".join(map(_second_word, _members(word)))


def _zsh_action(argument: Argument) -> str:
    if not argument.completes:
        return " "
    return "_files" if argument.completes == "files" else f"_vmcryptctl_{argument.completes}"


def _zsh_text(text: str) -> str:
    return _quoted(text).replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def zsh() -> str:
    listed = "\n".join(f"        '{word}:{_quoted(_about(word))}'" for word in _first_words())
    groups = []
    for group in GROUPS:
        verbs = " ".join(f"'{_second_word(one)}:{_quoted(one.help)}'" for one in _members(group))
        groups.append(f"        {group}) verbs=({verbs}) ;;")
    cases = []
    for verb in VISIBLE:
        words = ["'--help[show help]'"]
        for option in _options(verb):
            value = f":{option.value.lower()}:{_zsh_action(option)}" if option.value else ""
            words.append(f"'{option.name}[{_zsh_text(option.help)}]{value}'")
        for argument in _words(verb):
            many = "*" if argument.nargs else ""
            words.append(f"'{many}:{argument.name.lower()}:{_zsh_action(argument)}'")
        pattern = f"'{verb.name}'" if " " in verb.name else verb.name
        cases.append(f"        {pattern}) _arguments {' '.join(words)} ;;")
    lines, grouped = "\n".join(cases), "\n".join(groups)
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
    verbs=()
    case $verb in
{grouped}
    esac
    if (($#verbs)); then
        if ((CURRENT == 2)); then
            _describe verb verbs
            _arguments '--help'
            return
        fi
        verb="$verb $words[2]"
        shift words
        ((CURRENT--))
    fi
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
    for word in _first_words():
        about = _fish_text(_about(word))
        lines.append(f"complete -c vmcryptctl -n __fish_use_subcommand -a {word} -d '{about}'")
    for group in GROUPS:
        words = " ".join(map(_second_word, _members(group)))
        begun = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {words}"
        lines += [
            f"complete -c vmcryptctl -n '{begun}' -a {_second_word(one)} -d '{_fish_text(one.help)}'"
            for one in _members(group)
        ]
    for verb in VISIBLE:
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.name.split())
        seen = f"-n '{seen}'"
        lines.append(f"complete -c vmcryptctl {seen} -l help -d 'show help'")
        for option in _options(verb):
            takes = "" if not option.value else " -x"
            if option.completes == "files":
                takes = " -r -F"
            elif option.completes in NAMED:
                takes += f" -a '(vmcryptctl _names {NAMED[option.completes]} 2>/dev/null)'"
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
        if _takes_file(verb):
            lines.append(f"complete -c vmcryptctl {seen} -F")
    return "\n".join(lines) + "\n"


def _fish_goal(seen: str, goal: str) -> str:
    names = "volumes" if "lock" in goal else "guests"
    return f"complete -c vmcryptctl {seen} -a '{goal}(vmcryptctl _names {names} 2>/dev/null)'"


def _fish_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
