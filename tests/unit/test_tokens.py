# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tokens in headers: tried in order, distinguished, their PINs asked for beside everything else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.lib import Running, digest, handed_in, opened_by, play
from vmcryptd.core.errors import CancelledError, KeyUnavailableError, VmcryptdError, WrongKeyError
from vmcryptd.core.model import VolumeSpec
from vmcryptd.engine import attempt, unlock_with_key
from vmcryptd.engine.tokens import TPM_SHARERS

ALPHA = opened_by("alpha")
PIN = f'pin_sha256 = "{digest("1234")}"'
QUESTION = "PIN of the TPM2 token 0 of volume a:"
WRONG = f"That PIN was wrong. {QUESTION}"


def volume(name: str, keys: str, *tokens: str, sim: str = ALPHA) -> str:
    return (
        f'[volume.{name}]\ndevice = "/dev/{name}"\nkeys = [{keys}]\n'
        f"[sim.volume.{name}]\n{sim}\ntokens = [{', '.join(f'{{{one}}}' for one in tokens)}]\n"
    )


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "AGAIN_S", (0.001, 0.002))


BOTH = '"tpm2", "prompt"'
TPM, STICK = 'kind = "tpm2"', 'kind = "fido2"'
BROKEN = f'{TPM}, fault = "the state of the host is another one"'
WITH_PIN = f"{TPM}, {PIN}"


async def asked(run: Running, number: int = 1) -> None:
    await run.until(lambda: len(run.host.questions) == number)


@play(volume("a", BOTH, TPM))
async def test_a_token_opens_without_a_question(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    assert (run.state, run.volume("a").key_source, run.host.questions) == ("ready", "tpm2", [])
    assert run.host.done("try", "token") == ["token a 0"]


@play(volume("a", BOTH, TPM))
async def test_a_token_resumes_what_is_suspended(run: Running) -> None:
    run.host.volume("a", open=True, suspended=True)
    await run.until(lambda: run.volumes() == {"a": "suspended"})
    await run.engine.unlock("a")
    assert run.host.done("token") == ["token a 0"]


@play(volume("a", '"tpm2", "fido2", "prompt"', BROKEN, STICK, f'{TPM}, fault = "worn out"'))
async def test_each_is_tried_and_the_next_source_after_them(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    assert run.host.done("token") == ["token a 0", "token a 2", "token a 1"]
    assert run.volume("a").key_source == "fido2"
    assert run.volume("a").error == ""


@play(volume("a", '"tpm2", "pkcs11", "prompt"', BROKEN) + volume("b", '"prompt"'))
async def test_failed_tokens_are_reported_while_a_person_is_asked(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    error = run.volume("a").error
    assert "tpm2: the TPM2 token 0 does not open it: the state of the host is another one" in error
    assert "pkcs11: the header has no systemd-pkcs11 token" in error
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.volume("a").error) == ("ready", "")


@play(volume("a", '"tpm2"', BROKEN))
async def test_nobody_is_asked_where_nobody_is_to_be(run: Running) -> None:
    with pytest.raises(KeyUnavailableError, match="the state of the host"):
        await run.engine.unlock("a")
    assert (run.volumes(), run.host.questions) == ({"a": "failed"}, [])


# --- PINs ---


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_a_pin_is_asked_for_by_its_own_question(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    assert run.host.questions == [QUESTION]
    assert (run.engine.waiting, run.volumes(), run.state) == (["a"], {"a": "waiting"}, "waiting")
    assert run.engine.is_console_needed
    run.host.answer("1234")
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "tpm2")
    assert run.host.done("try", "token") == ["token a 0 with a PIN"]
    assert not run.engine.is_console_needed


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_a_wrong_pin_is_asked_for_again_but_not_until_the_chip_locks_itself(
    run: Running,
) -> None:
    run.engine.boot()
    for pin in ("1", "2", "3"):
        run.host.answer(pin)
    await run.idle()
    assert run.host.questions == [QUESTION, WRONG, WRONG]
    assert run.volumes() == {"a": "failed"}
    assert "tpm2: the TPM2 token 0 does not take this PIN" in run.volume("a").error
    assert run.host.done("try", "hook") == []  # no PIN is tried as a passphrase


@play(volume("a", BOTH, WITH_PIN))
async def test_after_three_wrong_pins_the_passphrase_is_still_asked_for(run: Running) -> None:
    run.engine.boot()
    await asked(run, 2)
    assert sorted(run.host.questions) == [QUESTION, "Passphrase for volume a (/dev/a):"]
    for wrong in ("1", "2", "3"):
        run.host.answer(wrong, to="PIN")
    await run.until(lambda: "does not take this PIN" in run.volume("a").error)
    assert (run.volumes(), run.host.done("try")) == ({"a": "waiting"}, [])
    run.host.answer("alpha", to="Passphrase")
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "prompt")


@play(volume("a", BOTH, WITH_PIN))
async def test_a_pin_that_comes_first_withdraws_the_question_for_the_passphrase(
    run: Running,
) -> None:
    run.engine.boot()
    await asked(run, 2)
    run.host.answer("1234", to="PIN")
    await run.idle()
    await run.until(lambda: not run.host.open_questions)
    assert run.volume("a").key_source == "tpm2"


@play(volume("a", BOTH, WITH_PIN) + volume("b", '"prompt"'))
async def test_a_passphrase_that_comes_first_withdraws_the_question_for_the_pin(
    run: Running,
) -> None:
    """And other volumes do not wait for anybody's PIN."""
    run.engine.boot()
    await asked(run, 2)
    assert "Passphrase for volumes a, b:" in run.host.questions
    run.host.answer("alpha", to="Passphrase")
    await run.idle()
    await run.until(lambda: not run.host.open_questions)
    assert run.state == "ready"


@play(volume("a", BOTH, WITH_PIN))
async def test_a_pin_that_nobody_wants_to_give(run: Running) -> None:
    run.engine.boot()
    await asked(run, 2)
    run.host.answer(CancelledError("declined"), to="PIN")
    await run.until(lambda: "the PIN of the TPM2 token 0 was not given" in run.volume("a").error)
    assert run.volumes() == {"a": "waiting"}
    run.host.answer("alpha", to="Passphrase")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", '"fido2", "prompt"', STICK, sim=f"{ALPHA}\naway = true"))
async def test_a_stick_that_is_connected_later(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    assert (
        "fido2: the FIDO2 token 0 does not open it: its device is not there"
        in run.volume("a").error
    )
    run.host.volume("a", away=False)
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "fido2")


@play(volume("a", '"fido2"', f"{STICK}, {PIN}", sim="away = true"))
async def test_a_pin_before_the_stick(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    run.host.answer("1234")
    await asked(run, 2)
    assert run.host.questions[1] == run.host.questions[0]
    assert "its device is not there" in run.volume("a").error
    run.host.volume("a", away=False)
    run.host.answer("1234")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_a_key_that_is_handed_in_while_a_pin_is_asked_for(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    with pytest.raises(WrongKeyError):
        await unlock_with_key.unlock(run.engine, "a", handed_in("x"))
    assert run.volumes() == {"a": "waiting"}
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "key")
    await run.until(lambda: not run.host.open_questions)


@play(volume("a", '"tpm2"', WITH_PIN) + volume("b", '"prompt"'))
async def test_a_key_for_all_that_wait_is_for_who_waits_for_a_pin_too(run: Running) -> None:
    run.engine.boot()
    await asked(run, 2)
    await unlock_with_key.unlock_all(run.engine, handed_in("alpha"))
    await run.idle()
    await run.until(lambda: not run.host.open_questions)
    assert run.state == "ready"


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_who_hands_in_a_key_is_asked_for_no_pin(run: Running) -> None:
    with pytest.raises(VmcryptdError):
        await unlock_with_key.unlock(run.engine, "a", handed_in("x"))
    assert run.host.questions == []


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_opened_by_hand_while_a_pin_is_asked_for(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    run.host.volume("a", open=True)
    await run.idle()
    await run.until(lambda: not run.host.open_questions)
    assert run.state == "ready"


@play(volume("a", '"tpm2"', WITH_PIN))
async def test_a_shutdown_withdraws_the_question_for_a_pin(run: Running) -> None:
    run.engine.boot()
    await asked(run)
    await run.engine.shutdown()
    await run.until(lambda: not run.host.open_questions)
    assert run.engine.waiting == []


LATE_STICK = volume("c", '"pkcs11", "prompt"', 'kind = "pkcs11"', sim=f"{ALPHA}\naway = true")


@play(
    volume("a", '"tpm2"', WITH_PIN)
    + volume("b", '"fido2", "prompt"', f"{STICK}, {PIN}")
    + LATE_STICK
)
async def test_a_mapping_that_is_seen_before_its_maker_has_ended(run: Running) -> None:
    """cryptsetup still waits for udev then; it must not be killed, nor taken for another program."""
    opened, ended = run.host.open_by_token, asyncio.Event()

    async def slow(spec: VolumeSpec, *arguments: Any) -> None:
        await opened(spec, *arguments)
        await ended.wait()
        run.host.calls.append(f"ended {spec.name}")

    run.host.open_by_token = slow  # type: ignore[method-assign]
    run.engine.boot()
    await asked(run, 3)
    run.host.volume("c", away=False)
    run.host.answer("1234", to="volume a")
    run.host.answer("1234", to="volume b:")
    volumes = run.engine.graph.volumes
    await run.until(lambda: all(run.engine.graph.volumes[name].is_usable for name in volumes))
    for _ in range(50):  # turns of the loop, in which it must not be cancelled
        run.engine.prompt.changes.notify()
        await asyncio.sleep(0)
    ended.set()
    await run.idle()
    assert sorted(run.host.done("ended")) == ["ended a", "ended b", "ended c"]
    assert [run.volume(name).key_source for name in "abc"] == ["tpm2", "fido2", "pkcs11"]


# --- side by side ---


async def turns() -> None:
    """Turns of the loop, in which nothing more may begin."""
    for _ in range(50):
        await asyncio.sleep(0)


NAMES = "abcdefghij"


@play("".join(volume(name, BOTH, TPM) for name in NAMES))
async def test_a_tpm_opens_volumes_side_by_side_but_not_any_number(run: Running) -> None:
    for name in NAMES:
        run.host.hold(f"token {name} 0")
    run.engine.boot()
    await run.until(lambda: len(run.host.done("token")) == TPM_SHARERS)
    await turns()
    assert len(run.host.done("token")) == TPM_SHARERS == 8
    run.host.release(run.host.done("token")[3])
    await run.until(lambda: len(run.host.done("token")) == TPM_SHARERS + 1)
    assert len(run.host.done("open")) == 1
    for call in {f"token {name} 0" for name in NAMES} - {run.host.done("token")[3]}:
        run.host.release(call)
    await run.idle()
    assert run.state == "ready"


@play("".join(volume(name, '"tpm2"', WITH_PIN) for name in "ab") + volume("c", BOTH, TPM))
async def test_pins_are_tried_on_a_tpm_one_after_the_other(run: Running) -> None:
    """Wrong ones side by side would lock it before the first is seen to be wrong."""
    for name in "ab":
        run.host.hold(f"token {name} 0 with a PIN")
    run.engine.boot()
    await asked(run, 2)
    await run.until(lambda: run.volume("c").key_source == "tpm2")
    run.host.answer("1234", to="volume a")
    run.host.answer("1234", to="volume b")
    await run.until(lambda: len(run.host.done("token")) == 2)
    await turns()
    [first] = [call for call in run.host.done("token") if call.endswith("with a PIN")]
    run.host.release(first)
    await run.until(lambda: len(run.host.done("token")) == 3)
    [second] = {f"token {name} 0 with a PIN" for name in "ab"} - {first}
    assert run.host.done("token")[-1] == second
    run.host.release(second)
    await run.idle()
    assert run.state == "ready"


@play("".join(volume(name, '"fido2", "prompt"', STICK) for name in "ab") + volume("c", BOTH, TPM))
async def test_sticks_are_used_one_at_a_time(run: Running) -> None:
    for name in "ab":
        run.host.hold(f"token {name} 0")
    run.engine.boot()
    await run.until(lambda: run.volume("c").key_source == "tpm2")
    await run.until(lambda: len(run.host.done("token")) == 2)
    await turns()
    [first] = set(run.host.done("token")) - {"token c 0"}
    run.host.release(first)
    await run.until(lambda: len(run.host.done("token")) == 3)
    run.host.release(run.host.done("token")[-1])
    await run.idle()
    assert run.state == "ready"


@play(volume("a", BOTH, TPM) + volume("b", '"prompt"'))
async def test_a_passphrase_is_derived_while_a_token_works(run: Running) -> None:
    run.engine.derivations._budget._cores = 1
    run.host.hold("token a 0")
    run.engine.boot()
    await run.until(lambda: run.host.done("token"))
    await unlock_with_key.unlock(run.engine, "b", handed_in("alpha"))
    assert run.volumes() == {"a": "unlocking", "b": "unlocked"}
    run.host.release("token a 0")
    await run.idle()
    assert run.volume("a").key_source == "tpm2"
