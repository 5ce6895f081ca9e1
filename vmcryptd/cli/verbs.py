# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of vmcryptctl as data, for the parser, the help and the shells' completion."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from vmcryptd.core.errors import nearest


class Argument(NamedTuple):
    """One argument of a verb; an option if its name begins with "-"."""

    name: str
    help: str
    nargs: str | None = None  # as in argparse
    value: str = ""  # an option's value: FILE, TIME; none for a switch
    completes: str = ""  # volumes, guests, names, goals, files: for the shells' completion


class Verb(NamedTuple):
    """One verb, with its help and examples."""

    name: str  # one word, or two: the first is a group of verbs
    help: str
    text: str
    arguments: tuple[Argument, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()  # command, explanation
    hidden: bool = False
    changes: bool = False  # polkit decides whether the caller may
    ends: bool = False  # stops, closes or destroys something: never suggested for a mistyped verb


JSON = Argument("--json", "print JSON, for programs")
KEY_FILE = Argument(
    "--key-file",
    'read the key from FILE instead of asking, to its end, newlines included; "-" is standard input',
    value="FILE",
    completes="files",
)
NEW_KEY_FILE = Argument(
    "--new-key-file",
    'read the new key from FILE instead of asking for it twice; "-" is standard input',
    value="FILE",
    completes="files",
)
ONE_VOLUME = Argument("VOLUME", "a volume", completes="volumes")

VERBS: tuple[Verb, ...] = (
    Verb(
        "status",
        "show the state of volumes and guests",
        "Shows the state of the host and what to do next, then the volumes, then the guests "
        "that use volumes, start at boot or have failed; failures first. With names, only these.",
        (
            Argument("NAME", "a volume or a guest", nargs="*", completes="names"),
            Argument("--failed", "show only what has failed"),
            Argument("--all", "show every guest that libvirt knows"),
            JSON,
        ),
        (
            ("vmcryptctl status", "everything that matters"),
            ("vmcryptctl status cr_imap", "one volume"),
            ("vmcryptctl status --json | jq .waiting", "for a script"),
        ),
    ),
    Verb(
        "unlock",
        "open volumes",
        "Opens the named volumes and all that they need; without a name all that wait for a key, or all "
        "that boot would open. On a terminal it asks for a passphrase once and tries the answer on all "
        "of them. Without a terminal the system's password agents ask. A volume may also be named "
        "by its device or its path in /dev/mapper.",
        (
            Argument("VOLUME", "a volume", nargs="*", completes="volumes"),
            KEY_FILE,
            Argument("--no-ask", "do not ask; exit status 6 if a person is needed"),
            Argument("--timeout", "how long at most, such as 90s or 5min", value="TIME"),
        ),
        (
            ("vmcryptctl unlock", "asks once, opens all that wait"),
            ("vmcryptctl unlock cr_imap", "opens one volume"),
            ("fetch-key | vmcryptctl unlock --key-file -", "the key comes from a program"),
        ),
        changes=True,
    ),
    Verb(
        "lock",
        "close volumes",
        "Closes the named volumes; without a name all. Refused while anything uses them; the message names the users.",
        (Argument("VOLUME", "a volume", nargs="*", completes="volumes"),),
        (("vmcryptctl lock cr_imap", ""), ("vmcryptctl lock", "closes every volume")),
        changes=True,
        ends=True,
    ),
    Verb(
        "start",
        "open a guest's volumes, then start it",
        "Opens the volumes that the guest needs, asking for a passphrase as `unlock` does, then starts it in libvirt.",
        (Argument("GUEST", "a guest, by its libvirt name", nargs="+", completes="guests"),),
        (("vmcryptctl start imap", ""),),
        changes=True,
    ),
    Verb(
        "stop",
        "stop a guest, then close its volumes",
        'Asks the guest to stop and waits for it. Volumes with lock = "guest" that nothing else uses are closed then.',
        (Argument("GUEST", "a guest, by its libvirt name", nargs="+", completes="guests"),),
        (("vmcryptctl stop imap", ""),),
        changes=True,
        ends=True,
    ),
    Verb(
        "restart",
        "stop guests and start them again",
        'Stops each guest as `stop` does, then starts it as `start` does. Volumes with lock = "guest" are closed in '
        "between, and need their keys again.",
        (Argument("GUEST", "a guest, by its libvirt name", nargs="+", completes="guests"),),
        (("vmcryptctl restart imap", ""),),
        changes=True,
        ends=True,
    ),
    Verb(
        "boot",
        "bring up everything, as at boot",
        "Opens the volumes of the boot set and starts the guests that start at boot. Returns at once; "
        "`vmcryptctl wait` waits for the end.",
        examples=(("vmcryptctl boot && vmcryptctl wait", "bring up everything and wait for it"),),
        changes=True,
    ),
    Verb(
        "shutdown",
        "stop the guests and close the volumes",
        "Stops the guests, closes the volumes, and returns when that is done. The host stays up. "
        "Without the daemon or without D-Bus it does the same work itself, as root.",
        examples=(("vmcryptctl shutdown", ""),),
        changes=True,
        ends=True,
    ),
    Verb(
        "panic",
        "kill the guests, wipe the keys, close the volumes: now",
        "For an emergency. Guests are killed as by pulling the plug, keys are wiped "
        "from memory. It asks no question, and goes on past every error.",
        examples=(("vmcryptctl panic", ""),),
        changes=True,
        ends=True,
    ),
    Verb(
        "plan",
        "show what would be done, and why",
        "Shows the steps, in order and with reasons, that a goal would take now. Does nothing. "
        "Goals: boot, shutdown, lock-all, unlock:NAME, lock:NAME, start:NAME, stop:NAME.",
        (Argument("GOAL", "the goal", completes="goals"), JSON),
        (
            ("vmcryptctl plan boot", "what boot would do now"),
            ("vmcryptctl plan start:imap", "what the guest imap needs"),
        ),
    ),
    Verb(
        "check",
        "check the configuration and the host: will boot work?",
        "Reads the configuration as the daemon does, and examines the host: devices, headers, key files, "
        "units, guests. Reports what is wrong and what to do. Run it as root.",
        (
            Argument(
                "--config",
                "check this directory instead of /etc/vmcryptd",
                value="DIR",
                completes="files",
            ),
            JSON,
        ),
        (
            ("vmcryptctl check", "after each change of the configuration"),
            ("vmcryptctl check --config /root/new", "before a change: a copy of /etc/vmcryptd"),
        ),
    ),
    Verb(
        "wait",
        "wait until everything is up",
        "Returns with exit status 0 when the volumes of the boot set are open and their guests were started, "
        "1 when any of them failed or a guest died, 6 when the time is over. A guest that was shut down since does "
        "not count, unless --all is given.",
        (
            Argument("--all", "also fail while a guest of the boot set is off"),
            Argument(
                "--timeout",
                'how long at most, such as 90s or 5min; default "infinity"',
                value="TIME",
            ),
            JSON,
        ),
        (("vmcryptctl wait --timeout 5min", ""),),
    ),
    Verb(
        "monitor",
        "show changes as they happen",
        "Prints a line for each change until it is interrupted. With --json each line is one JSON object.",
        (JSON,),
        (("vmcryptctl monitor", ""),),
    ),
    Verb(
        "reload",
        "read the configuration again",
        "A configuration with a mistake is refused, and the running one stays.",
        examples=(("vmcryptctl check && vmcryptctl reload", ""),),
        changes=True,
    ),
    Verb(
        "key list",
        "show the key slots, tokens and key sources of a volume",
        "Shows the key slots of the volume's header, with what opens each and what one try costs, the tokens "
        "that open slots without a passphrase, and the key sources in the configuration.",
        (ONE_VOLUME, JSON),
        (("vmcryptctl key list cr_imap", ""),),
    ),
    Verb(
        "key test",
        "find out which key slot a key opens",
        "Tries a key on the key slots of a volume and prints the number of the one that it opens. The volume "
        "itself stays as it is, open or locked.",
        (ONE_VOLUME, KEY_FILE, JSON),
        (
            ("vmcryptctl key test cr_imap", "do I still know the passphrase?"),
            ("vmcryptctl key test cr_imap --key-file /root/imap.key", "does this file fit?"),
        ),
        changes=True,
    ),
    Verb(
        "key add",
        "add a key to a volume",
        "Asks for a passphrase that opens the volume and twice for the new one. The new key is tested before the "
        "command reports success. Afterwards a new backup of the header is due. With --keystore the new key is a "
        "random one in a keystore; the command prints the line for the configuration.",
        (
            ONE_VOLUME,
            KEY_FILE,
            NEW_KEY_FILE,
            Argument(
                "--keystore",
                "make the new key in this open keystore",
                value="NAME",
                completes="volumes",
            ),
        ),
        (
            ("vmcryptctl key add cr_imap", "a second passphrase"),
            ("vmcryptctl key add cr_imap --keystore keys", "a key of a keystore"),
            ("vmcryptctl key add cr_imap --new-key-file /root/imap.key", "a key file"),
        ),
        changes=True,
    ),
    Verb(
        "key change",
        "replace a key by a new one",
        "Asks for the old passphrase and twice for the new one. The old one is removed after the new one "
        "was tested. Afterwards make a new backup of the header and destroy the old ones: with these, the "
        "old passphrase opens the volume for ever.",
        (ONE_VOLUME, KEY_FILE, NEW_KEY_FILE),
        (("vmcryptctl key change cr_imap", ""),),
        changes=True,
        ends=True,
    ),
    Verb(
        "key remove",
        "wipe a key slot of a volume",
        "Asks for a passphrase of another key slot, so that the volume can still be opened afterwards. The last key "
        "slot cannot be removed. Afterwards make a new backup of the header and destroy the old ones.",
        (
            ONE_VOLUME,
            Argument("SLOT", "the number of the key slot in `key list`"),
            KEY_FILE,
        ),
        (("vmcryptctl key list cr_imap", ""), ("vmcryptctl key remove cr_imap 1", "")),
        changes=True,
        ends=True,
    ),
    Verb(
        "key rotate",
        "re-encrypt an open volume with a new volume key",
        "Re-encrypts all data of the volume under a new volume key, while guests go on using "
        "it. Asks for the passphrase that is to stay. Other key slots cannot be kept: while there are any, the command "
        "is refused unless --drop-others is given. A large volume takes hours. The rotation goes on when this command "
        "is interrupted or vmcryptd restarted. It pauses when the volume is locked or the host shut down; the same "
        "command resumes it. Older backups of the header are useless afterwards, and none can be made "
        "meanwhile: have a backup of the data, and make one of the header at the end.",
        (
            ONE_VOLUME,
            KEY_FILE,
            Argument("--drop-others", "remove the other key slots, and the tokens that open these"),
            Argument("--stop", "pause the rotation"),
        ),
        (
            ("vmcryptctl key rotate cr_imap", "begin, or resume"),
            ("vmcryptctl key rotate --stop cr_imap", "the disk is needed for something else"),
        ),
        changes=True,
        ends=True,
    ),
    Verb(
        "keystore init",
        "make a volume that holds the keys of others",
        "Makes a small LUKS volume with one passphrase, for random keys of other volumes: one slow key derivation then "
        "opens them all. It is made in a new file or on an empty device, never on a used one, and configured in "
        "its own file, conf.d/NAME.toml. If a step fails, nothing is left behind. Run it as root.",
        (
            Argument("NAME", "the name of the keystore"),
            Argument("--file", "make it in this new file", value="FILE", completes="files"),
            Argument("--device", "make it on this empty device", value="DEVICE", completes="files"),
            Argument("--size", "the size of the file; default 32M", value="SIZE"),
            Argument(
                "--mount",
                "the mount point while it is open; default /run/vmcryptd-keystore/NAME",
                value="DIR",
                completes="files",
            ),
            KEY_FILE,
        ),
        (
            ("vmcryptctl keystore init keys --file /var/lib/keys.luks", ""),
            ("vmcryptctl keystore init keys --device /dev/vg0/keys", ""),
        ),
        changes=True,
    ),
    Verb(
        "header backup",
        "back up the LUKS header of a volume",
        "Writes the header, without which no key opens the volume, into a new file for root only. Keep "
        "it offline or encrypted: with it, every present passphrase opens the volume for ever, also after it was "
        "changed or removed. Run it as root.",
        (
            ONE_VOLUME,
            Argument("FILE", "the new file, an absolute path", completes="files"),
        ),
        (
            (
                "vmcryptctl header backup cr_imap /media/usb/cr_imap.header",
                "after each change of its keys",
            ),
        ),
        changes=True,
    ),
    Verb(
        "console",
        "keep the console for the question at boot",
        "For vmcryptd-console.service.",
        hidden=True,
    ),
    Verb(
        "_names",
        "print names, for completion",
        "For the shells' completion.",
        (Argument("WHAT", "volumes, guests or all"),),
        hidden=True,
    ),
)

BY_NAME = {verb.name: verb for verb in VERBS}
VISIBLE = tuple(verb for verb in VERBS if not verb.hidden)
GROUPS = tuple(dict.fromkeys(verb.name.split()[0] for verb in VISIBLE if " " in verb.name))
GOALS = ("boot", "shutdown", "lock-all", "unlock:", "lock:", "start:", "stop:")

# Other programs' words (cryptsetup, mount, virsh, systemctl) for our verbs.
SYNONYMS = {
    **dict.fromkeys(("open", "luksopen", "decrypt", "mount", "attach"), "unlock"),
    **dict.fromkeys(("close", "luksclose", "umount", "unmount", "detach"), "lock"),
    **dict.fromkeys(("list", "ls", "show", "info", "ps", "dump"), "status"),
    **dict.fromkeys(("up", "start-all", "default"), "boot"),
    **dict.fromkeys(("down", "halt", "poweroff", "stop-all"), "shutdown"),
    **dict.fromkeys(("watch", "events", "follow"), "monitor"),
    **dict.fromkeys(("verify", "validate", "test", "doctor"), "check"),
    **dict.fromkeys(("refresh", "daemon-reload"), "reload"),
    "run": "start",
    "reboot": "restart",
    "passwd": "key change",
    "rekey": "key rotate",
    **dict.fromkeys(("key ls", "key show", "key status"), "key list"),
    **dict.fromkeys(("key rm", "key del", "key delete", "key kill", "key wipe"), "key remove"),
    **dict.fromkeys(("key passwd", "key replace"), "key change"),
    **dict.fromkeys(("key new", "key enroll", "key enrol"), "key add"),
    **dict.fromkeys(("keystore create", "keystore new", "keystore make"), "keystore init"),
    **dict.fromkeys(("header save", "header dump"), "header backup"),
}

_EXIT_STATUS = """\
Exit status: 0 done, 1 failed, 2 usage or configuration, 3 wrong key, 4 not authorised,
5 vmcryptd not reachable, 6 still waiting or timed out."""


class UsageError(Exception):
    """The command line is no valid command; the text names the valid form."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        """argparse's own hides that the output cannot be written."""
        (file or sys.stdout).write(self.format_help())
        sys.stdout.flush()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        # argparse would import shutil for the terminal's width, for each added argument.
        super().__init__(prog, width=79)


def overview() -> str:
    """The output of `vmcryptctl --help`."""
    lines = [
        "usage: vmcryptctl VERB [ARGUMENT...]",
        "",
        "Encrypted volumes and the guests that live on them.",
        "",
    ]
    lines += _listed(VISIBLE)
    lines += ["", "Examples:"]
    lines += _examples([BY_NAME[name].examples[0] for name in ("status", "unlock", "check")])
    lines += [
        "",
        "`vmcryptctl VERB --help` tells more about each, `man vmcryptctl` all.",
        "",
        _EXIT_STATUS,
    ]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb and its arguments. Raises UsageError; SystemExit(0) for --help of a verb."""
    before = argv.index(next((word for word in argv if word != "--json"), "--json"))
    if before == len(argv) or argv[before] == "--json":
        raise UsageError("which verb? See `vmcryptctl --help`")
    name, rest = argv[before], argv[before + 1 :]
    if name in GROUPS:
        name, rest = _in_group(name, rest)
    verb = BY_NAME.get(name)
    if verb is None:
        raise UsageError(_unknown(name))
    rest = [*argv[:before], *rest]
    try:
        return verb, parser(verb).parse_args(rest)
    except UsageError:
        # It also accepts "unlock cr_a --key-file F cr_b", and takes twice the time.
        return verb, parser(verb).parse_intermixed_args(rest)


def _unknown(name: str) -> str:
    """The error for an unknown verb, with a suggestion if that is safe."""
    group, _, member = name.rpartition(" ")
    known = [verb.name for verb in VISIBLE if verb.name.rpartition(" ")[0] == group]
    known += [] if group else GROUPS
    if name.startswith("-"):
        return f'there is no option "{name}"; see `vmcryptctl --help`'
    if meant := SYNONYMS.get(name.lower()):
        return f'there is no verb "{name}"; use `vmcryptctl {meant}`: {BY_NAME[meant].help}'
    close = nearest(name, known)
    begun = [verb for verb in known if len(member) > 2 and verb.startswith(name)]
    if len(begun) == 1 and not (close and name.startswith(close)):
        [close] = begun
    verb = BY_NAME.get(close)
    if not close or (verb is not None and verb.ends):
        return f'there is no verb "{name}"; see `{f"vmcryptctl {group}".rstrip()} --help`'
    return f'there is no verb "{name}"; did you mean "{close}"?'


def _in_group(group: str, rest: list[str]) -> tuple[str, list[str]]:
    """Parse a verb of two words, and its arguments. Raises UsageError; SystemExit(0) for --help."""
    members = [verb for verb in VISIBLE if verb.name.startswith(f"{group} ")]
    if rest[:1] in (["-h"], ["--help"]):
        lines = [f"usage: vmcryptctl {group} VERB [ARGUMENT...]", "", *_listed(members)]
        sys.stdout.write("\n".join(lines) + "\n")
        raise SystemExit(0)
    if not rest:
        words = ", ".join(verb.name.removeprefix(f"{group} ") for verb in members)
        raise UsageError(f'"{group}" what? One of: {words}; see `vmcryptctl {group} --help`')
    return f"{group} {rest[0]}", rest[1:]


def _listed(some: Sequence[Verb]) -> list[str]:
    wide = max(len(verb.name) for verb in VISIBLE) + 3
    return [f"  {verb.name:<{wide}}{verb.help}" for verb in some]


def _examples(examples: Sequence[tuple[str, str]]) -> list[str]:
    wide = max((len(command) for command, _ in examples), default=0) + 2
    return [f"  {command:<{wide}}{what}".rstrip() for command, what in examples]


def parser(verb: Verb) -> argparse.ArgumentParser:
    epilog = "\n".join(["examples:", *_examples(verb.examples)])
    found = _Parser(
        prog=f"vmcryptctl {verb.name}",
        description=_filled(verb.text),
        epilog=epilog if verb.examples else None,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    for argument in verb.arguments:
        if not argument.name.startswith("-"):
            found.add_argument(argument.name, help=argument.help, nargs=argument.nargs)
        elif argument.value:
            found.add_argument(argument.name, help=argument.help, metavar=argument.value)
        else:
            found.add_argument(argument.name, help=argument.help, action="store_true")
    return found


def near(word: str, known: list[str]) -> str:
    """ "; did you mean …?", or nothing."""
    close = nearest(word, known)
    return f'; did you mean "{close}"?' if close else ""


def _filled(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 79)


def timeout(text: str) -> float | None:
    """Seconds; None for "infinity". Raises UsageError."""
    from vmcryptd.core.durations import duration

    try:
        seconds = duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    return None if math.isinf(seconds) else seconds
