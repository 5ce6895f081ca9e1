# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments of key sources are for root alone: tokens, and where keys lie."""

from __future__ import annotations

import pytest

from tests.lib import Host, Running, opened_by, play
from vmcryptd.core.model import KeySource, Settings, SourceKind, VolumeSpec
from vmcryptd.core.redaction import Redaction

COMMAND = "/usr/local/bin/fetch --token=s3cr3t imap"
KEYS = (
    KeySource(SourceKind.EXEC, COMMAND),
    KeySource(SourceKind.EXEC, "/usr/local/bin/fetch --token=s3cr3t"),
    KeySource(SourceKind.FILE, "/mnt/stick/the key: of imap."),
    KeySource(SourceKind.FILE, "/etc/keys/imap"),
    KeySource(SourceKind.CREDENTIAL, "imap"),
    KeySource(SourceKind.PROMPT),
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"exec:{COMMAND}: the key command /usr/local/bin/fetch failed: exit status 1; x",
         "exec: the key command … failed: exit status 1; x"),
        ("exec:/usr/local/bin/fetch --token=s3cr3t: no", "exec: no"),
        ("the program /usr/local/bin/fetch is not installed", "the program … is not installed"),
        ("file:/etc/keys/imap: the key file /etc/keys/imap is open to others; run `chmod 600 /etc/keys/imap`",
         "file: the key file … is open to others; run `chmod 600 …`"),
        ("(file:/mnt/stick/the key: of imap.: the key file /mnt/stick/the key: of imap. is not there)",
         "(file: the key file … is not there)"),
        ("credential:imap: there is no credential imap", "credential: there is no credential imap"),
        ("volume imap: /etc/keys/imap2 and /etc/keys stay", "volume imap: /etc/keys/imap2 and /etc/keys stay"),
        ("", ""),
    ],
)  # fmt: skip
def test_texts(text: str, shown: str) -> None:
    redaction = Redaction()
    redaction.learn(Settings(volumes={"imap": VolumeSpec("imap", "/dev/a", keys=KEYS)}))
    redaction.learn(Settings())  # an error outlives the configuration of its source
    assert redaction(text) == shown


def test_a_text_of_an_earlier_daemon() -> None:
    """Its sources are configured no more."""
    before, after = Redaction(), Redaction()
    before.learn(Settings(volumes={"imap": VolumeSpec("imap", "/dev/a", keys=KEYS)}))
    said = f"volume imap: file:/etc/keys/imap: it is away; exec:{COMMAND}: failed"
    kept, shown = before.without_tokens(said), before(said)
    assert kept == (
        "volume imap: file:/etc/keys/imap: it is away; exec:/usr/local/bin/fetch …: failed"
    )
    assert shown == "volume imap: file: it is away; exec: failed"
    assert after(kept) == kept
    after.learn_text(kept, shown)
    after.learn_text("", "")
    assert (after(kept), after(f"degraded: {kept}")) == (shown, f"degraded: {shown}")


def host(key: str) -> str:
    return (
        f'[volume.a]\ndevice = "/dev/a"\nkeys = ["{key}"]\n[sim.volume.a]\n{opened_by("alpha")}\n'
    )


@play(host("exec:/bin/fetch --token=s3cr3t"))
async def test_what_is_kept_for_the_next_daemon(run: Running) -> None:
    """It does not know the sources of before, and shows the text to everybody."""
    run.engine.boot()
    await run.idle()
    assert "s3cr3t" in run.volume("a").error
    run.engine.configure(Host.parse(host("exec:/bin/fetch --token=new")).settings)
    kept = str(run.host.reasons())
    assert "none of its key sources opened it: exec:/bin/fetch …: " in kept
    assert "s3cr3t" not in kept
    assert "s3cr3t" not in run.engine.inventory.redacted(run.volume("a").error)
