# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clevis: which bindings are tried, and what happens while their server is away."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.lib import Running, descriptors, handed_in, opened_by, play
from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.core.errors import KeyUnavailableError, NotYetError, StillWaitingError, WrongKeyError
from vmcryptd.core.model import Header, KeySlot, Token, VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.engine import attempt, unlock_with_key
from vmcryptd.posix import run as processes

A, B = opened_by("alpha"), opened_by("beta")
BOUND = 'slots = [{sources = ["clevis"], memory_kib = 0}]'
AWAY = f"{A}\n{BOUND}\naway = true"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "AGAIN_S", (0.001, 0.002))


def volume(name: str, sim: str, keys: str = '"clevis", "prompt"') -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\nkeys = [{keys}]\n[sim.volume.{name}]\n{sim}\n'


@play(volume("a", f"{A}\n{BOUND}"))
async def test_a_binding_opens_by_its_own_slot(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "clevis")
    assert (run.host.questions, run.host.done("try")) == ([], ["try a 1"])


@play(volume("a", AWAY))
async def test_a_server_that_comes_back_withdraws_the_question(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    assert run.volumes() == {"a": "waiting"}
    assert "clevis: key slot 1: its server does not answer" in run.volume("a").error
    run.host.volume("a", away=False)
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "clevis")
    await run.until(lambda: not run.host.open_questions)
    assert run.volume("a").error == ""


@play(volume("a", AWAY))
async def test_a_person_who_comes_first_ends_the_trying(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "prompt")
    assert run.host.done("try") == ["try a 0"]  # the slot that is bound is no person's


@play(volume("a", f"{A}\nsources = ['exec:/bin/x']\naway = true", '"exec:/bin/x", "prompt"'))
async def test_a_program_that_gave_no_key_is_run_again(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    run.host.volume("a", away=False)
    await run.idle()
    assert run.volume("a").key_source == "exec:/bin/x"


@play(volume("a", AWAY, '"clevis"'))
async def test_the_network_comes_up_later_than_we_do(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.volume("a").error)
    assert (run.volumes(), run.state) == ({"a": "unlocking"}, "unlocking")
    run.host.volume("a", away=False)
    await run.idle()
    assert (run.state, run.host.questions) == ("ready", [])


@play(volume("a", AWAY, '"clevis"'))
async def test_a_key_that_is_handed_in_while_the_server_is_away(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.volume("a").error)
    with pytest.raises(WrongKeyError):
        await unlock_with_key.unlock(run.engine, "a", handed_in("x"))
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    await run.idle()
    assert run.state == "ready"


@play(volume("a", AWAY, '"clevis"') + volume("b", A))
async def test_a_key_for_all_that_wait_for_a_person(run: Running) -> None:
    """No person is asked for the other: its server is not waited for."""
    run.engine.boot()
    await run.until(lambda: run.volume("a").error and run.host.questions)
    with pytest.raises(StillWaitingError, match="opened: b; still locked: a"):
        await unlock_with_key.unlock_all(run.engine, handed_in("alpha"))
    assert run.volumes() == {"a": "unlocking", "b": "unlocked"}


@play(volume("a", AWAY, '"clevis"'))
async def test_not_for_ever_where_nobody_can_be_asked(run: Running) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempt, "ALONE_S", 0.01)
        run.engine.boot()
        await run.idle()
    assert run.volumes() == {"a": "failed"}
    assert "its server does not answer" in run.volume("a").error


@play(volume("a", AWAY, '"clevis"'))
async def test_who_hands_in_a_key_does_not_wait_for_a_server(run: Running) -> None:
    with pytest.raises(KeyUnavailableError):
        await unlock_with_key.unlock_all(run.engine, handed_in("x"))


@play(volume("a", A, '"clevis"'))
async def test_without_a_binding_nothing_is_waited_for(run: Running) -> None:
    with pytest.raises(KeyUnavailableError, match="no Clevis binding"):
        await run.engine.unlock("a")


@play(volume("a", AWAY))
async def test_a_shutdown_while_the_server_is_away(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    await run.engine.shutdown()
    await run.until(lambda: not run.host.open_questions)
    assert run.volumes() == {"a": "locked"}


@play(volume("a", f"{A}\n{BOUND}") + volume("b", AWAY))
async def test_one_server_that_is_away_holds_up_no_other_volume(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.volumes() == {"a": "unlocked", "b": "waiting"})
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", f"{A}\nslots = [{{{B}, memory_kib = 0}}]"))
async def test_a_binding_whose_slot_was_changed(run: Running) -> None:
    """Its key is tried once, and a person is asked."""
    read = run.host.header

    async def bound(spec: VolumeSpec) -> Header:
        return (await read(spec))._replace(tokens=(Token(0, "clevis", (1,)),))

    run.host.header = bound  # type: ignore[method-assign]
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    assert "clevis: key slot 1: volume a: the key fits no key slot" in run.volume("a").error
    assert run.host.done("try") == ["try a 1"]
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.host.done("try")) == ("ready", ["try a 1", "try a 0"])


@play(volume("a", f"{A}\nslots = [{{{B}, memory_kib = 0}}, {{{B}, memory_kib = 0}}]"))
async def test_a_key_that_did_not_fit_is_not_derived_again_while_a_server_is_away(
    run: Running,
) -> None:
    read, fetched = run.host.header, run.host.fetch_bound
    asked = 0

    async def bound(spec: VolumeSpec) -> Header:
        return (await read(spec))._replace(tokens=(Token(0, "clevis", (1, 2)),))

    async def one_is_away(spec: VolumeSpec, header: Header, slot: int) -> Key:
        nonlocal asked
        asked += 1
        if slot == 2:
            raise NotYetError("its server does not answer")
        return await fetched(spec, header, slot)

    run.host.header = bound  # type: ignore[method-assign]
    run.host.fetch_bound = one_is_away  # type: ignore[method-assign]
    run.engine.boot()
    await run.until(lambda: asked > 6)
    assert run.host.done("try") == ["try a 1"]
    error = run.volume("a").error
    assert "key slot 1: volume a: the key was tried" in error
    assert "key slot 2: its server does not answer" in error
    run.host.answer("alpha")
    await run.idle()


# --- the real thing, but for Clevis itself ---

JWE = {"protected": "eyJ", "encrypted_key": "", "iv": "aa", "ciphertext": "cc", "tag": "tt"}
SPEC = VolumeSpec("a", "/dev/a", header="/etc/a.header")
BINDING = Header(2, "u", (KeySlot(1, "pbkdf2"),), (Token(3, "clevis", (1,)),))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`clevis` and `cryptsetup` that tell how they were called."""
    monkeypatch.setattr(processes, "DIRECTORIES", (str(tmp_path), *processes.DIRECTORIES))
    path = os.pathsep.join(processes.DIRECTORIES)
    monkeypatch.setattr(processes, "ENVIRONMENT", {**processes.ENVIRONMENT, "PATH": path})
    program(tmp_path, "cryptsetup", f"""print('{json.dumps({"type": "clevis", "jwe": JWE})}')""")
    program(tmp_path, "clevis", "sys.stdout.write('key for ' + sys.stdin.read())")
    return tmp_path


def program(place: Path, name: str, code: str) -> None:
    path = place / name
    log = (
        f"open({str(place / 'calls')!r}, 'a').write(' '.join([{name!r}, *sys.argv[1:]]) + chr(10))"
    )
    path.write_text(f"#!{sys.executable}\nimport sys\n{log}\n{code}\n")
    path.chmod(0o755)


def fetch(header: Header, slot: int = 1, timeout_s: float = 30.0) -> bytes:
    async def go() -> bytes:
        key: Key = await SystemKeys(timeout_s=timeout_s).fetch_bound(SPEC, header, slot)
        reader = key.reader()
        try:
            return os.read(reader, 1000)
        finally:
            os.close(reader)
            key.close()

    before = descriptors()
    try:
        return asyncio.run(go())
    finally:
        assert descriptors() == before


def bindings(header: Header) -> tuple[int, ...]:
    return asyncio.run(SystemKeys().bindings(SPEC, header))


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines()


def test_the_token_of_a_luks2_header(programs: Path) -> None:
    assert bindings(BINDING) == (1,)
    assert fetch(BINDING) == b"key for eyJ..aa.cc.tt"
    assert calls(programs) == [
        "cryptsetup token export --token-id=3 -- /etc/a.header",
        "clevis decrypt",
    ]


def test_a_luks1_header(programs: Path) -> None:
    program(programs, "clevis", """print("1: tang '{}'\\n5: sss '{}'")""")
    assert bindings(Header(1, "u")) == (1, 5)
    program(programs, "clevis", "sys.stdout.write('k')")
    assert fetch(Header(1, "u"), 5) == b"k"
    assert calls(programs) == [
        "clevis luks list -d /etc/a.header",
        "clevis luks pass -d /etc/a.header -s 5",
    ]


def test_no_binding(programs: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="clevis luks bind -d /etc/a.header"):
        bindings(Header(2, "u"))
    program(programs, "clevis", "sys.exit(1)")
    with pytest.raises(KeyUnavailableError, match="no Clevis binding"):
        bindings(Header(1, "u"))


def test_the_server_is_away(programs: Path) -> None:
    program(programs, "clevis", "sys.exit('Error communicating with server http://tang')")
    with pytest.raises(NotYetError, match="no key: Error communicating with server http://tang"):
        fetch(BINDING)


def test_the_server_does_not_answer(programs: Path) -> None:
    program(programs, "clevis", "import time; time.sleep(1000)")
    with pytest.raises(NotYetError, match="did not end within"):
        fetch(BINDING, timeout_s=0.5)


def test_clevis_gives_nothing(programs: Path) -> None:
    program(programs, "clevis", "")
    with pytest.raises(KeyUnavailableError, match="the output of clevis decrypt is empty"):
        fetch(BINDING)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jwe": []}', '{"jwe": {"iv": 5}}'])
def test_a_token_that_is_malformed(programs: Path, text: str) -> None:
    program(programs, "cryptsetup", f"print({text!r})")
    with pytest.raises(KeyUnavailableError, match="token 3 cannot be read: it is malformed"):
        fetch(BINDING)


def test_clevis_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DIRECTORIES", (str(tmp_path),))
    with pytest.raises(KeyUnavailableError, match="program clevis is not installed"):
        bindings(Header(1, "u"))
