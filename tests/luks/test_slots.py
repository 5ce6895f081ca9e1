# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key slots of real LUKS headers on plain files, by the real cryptsetup; no key ever stands in an argument."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import lib
from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.adapters.luks import key_slots as adapter
from vmcryptd.adapters.luks.key_slots import CryptsetupSlots
from vmcryptd.adapters.luks.mappings import Cryptsetup, read_header
from vmcryptd.adapters.sim.host import Simulation
from vmcryptd.core.errors import (
    BusyError,
    KeyUnusableError,
    LastKeyError,
    NoSuchKeySlotError,
    OtherKeysError,
    StorageError,
    WrongKeyError,
)
from vmcryptd.engine.engine import Engine
from vmcryptd.engine.key_management import KeySlots

pytestmark = pytest.mark.skipif(
    not shutil.which("cryptsetup"), reason="cryptsetup is not installed"
)

FIRST, SECOND, THIRD, WRONG = (f"canary-{name}-\n4e0a" for name in ("one", "two", "three", "wrong"))
CHEAP = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]


def cryptsetup(*arguments: str, key: str = "") -> str:
    done = subprocess.run(
        ["cryptsetup", "--batch-mode", *arguments],
        input=key.encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return done.stdout.decode()


def file(place: Path, name: str, content: str = "", size: int = 0) -> str:
    path = place / name
    path.write_text(content)
    if size:
        os.truncate(path, size)
    return str(path)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passphrases each, by slots 0 and 1."""
    place = tmp_path_factory.mktemp("headers")
    second = file(place, "second", SECOND)
    for kind, size in (("luks1", 3), ("luks2", 18)):
        path = file(place, kind, size=size << 20)
        cheap = CHEAP if kind == "luks2" else CHEAP[2:]
        cryptsetup("luksFormat", "--type", kind, *cheap, "--key-file=-", path, key=FIRST)
        cryptsetup("luksAddKey", *cheap, "--key-file=-", path, second, key=FIRST)
    return place


class Real:
    """The engine's key slots on a real header, and what was run for them."""

    def __init__(self, path: Path, more: str = "") -> None:
        self.path = path
        self.runtime = path.with_name("run")
        self.runtime.mkdir()
        simulation = Simulation.parse(f'[volume.mail]\ndevice = "{path}"\n{more}')
        ports = replace(
            simulation.ports(),
            crypt=Cryptsetup(),
            slots=CryptsetupSlots(str(self.runtime), tuple(CHEAP)),
            keys=SystemKeys(credentials=None),
        )
        self._make = lambda: Engine(simulation.settings, ports)
        self.engine = self._make()

    def do(self, action: Callable[[KeySlots], Awaitable[Any]]) -> Any:
        async def scene() -> Any:
            before = lib.descriptors()
            try:
                return await action(self.engine.key_slots)
            finally:
                assert lib.descriptors().keys() == before.keys()

        async def played() -> Any:
            self.engine = self._make()  # one that was closed begins nothing any more
            self.engine.start()
            await self.engine.background_done()
            try:
                return await scene()
            finally:
                self.engine.close()

        return asyncio.run(played())

    @property
    def due(self) -> str:
        return self.engine.key_slots.backup_due_since("mail")

    def slots(self) -> list[int]:
        return [slot["slot"] for slot in self.do(lambda keys: keys.listed("mail"))["slots"]]

    def slot_of(self, passphrase: str) -> int | None:
        try:
            found: int = self.do(lambda keys: keys.test("mail", lib.handed_in(passphrase)))
        except WrongKeyError:
            return None
        return found


@pytest.fixture(params=["luks1", "luks2"])
def real(request: pytest.FixtureRequest, templates: Path, tmp_path: Path) -> Real:
    return Real(Path(shutil.copy(templates / request.param, tmp_path / "disk")))


@pytest.fixture
def luks2(templates: Path, tmp_path: Path) -> Real:
    return Real(Path(shutil.copy(templates / "luks2", tmp_path / "disk")))


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """All that is run; none of it shows a key."""
    ran: list[list[str]] = []
    run = adapter.run

    async def recorded(argv: Any, **more: Any) -> Any:
        ran.append(list(argv))
        done = await run(argv, **more)
        assert "canary" not in done.out + done.err
        return done

    monkeypatch.setattr(adapter, "run", recorded)
    yield ran
    assert "canary" not in str(ran)


def test_which_slot_a_key_opens(real: Real) -> None:
    assert real.slot_of(FIRST) == 0
    assert real.slot_of(SECOND) == 1
    assert real.slot_of(WRONG) is None


def test_what_is_listed(real: Real) -> None:
    listed = real.do(lambda keys: keys.listed("mail"))
    assert [(slot["kdf"], slot["iterations"]) for slot in listed["slots"]] == [("pbkdf2", 1000)] * 2
    assert {slot["opened_by"] for slot in listed["slots"]} == {"random key"}


def test_a_key_that_opens_no_data_is_no_way_in(luks2: Real, tmp_path: Path) -> None:
    third = file(tmp_path, "third", THIRD)
    unbound = ["--unbound", "--key-size=256", *CHEAP]
    cryptsetup("luksAddKey", *unbound, str(luks2.path), third)
    assert "2: luks2 (unbound)" in cryptsetup("luksDump", str(luks2.path))
    assert luks2.slots() == [0, 1]
    assert luks2.slot_of(THIRD) is None


def test_tokens_are_listed(luks2: Real) -> None:
    text = '{"type": "clevis", "keyslots": ["1"]}'
    cryptsetup("token", "import", "--token-id=3", "--json-file=-", str(luks2.path), key=text)
    listed = luks2.do(lambda keys: keys.listed("mail"))
    assert [slot["opened_by"] for slot in listed["slots"]] == ["random key", "clevis"]
    assert listed["tokens"] == [{"token": 3, "kind": "clevis", "slots": [1], "needs_pin": False}]


def add(real: Real, key: str, new_key: str) -> int:
    found: int = real.do(lambda keys: keys.add("mail", lib.handed_in(key), lib.handed_in(new_key)))
    return found


def change(real: Real, key: str, new_key: str) -> int:
    found: int = real.do(
        lambda keys: keys.change("mail", lib.handed_in(key), lib.handed_in(new_key))
    )
    return found


def remove(real: Real, slot: int, key: str) -> None:
    real.do(lambda keys: keys.remove("mail", slot, lib.handed_in(key)))


def test_a_key_is_added(real: Real) -> None:
    with pytest.raises(WrongKeyError):
        add(real, WRONG, THIRD)
    assert not real.due
    assert add(real, SECOND, THIRD) == 2
    assert real.slot_of(THIRD) == 2
    assert real.due


def test_a_key_is_changed(real: Real) -> None:
    with pytest.raises(WrongKeyError):
        change(real, WRONG, THIRD)
    assert not real.due
    assert change(real, FIRST, THIRD) == 2
    assert real.slots() == [1, 2]
    assert real.slot_of(FIRST) is None
    assert real.slot_of(THIRD) == 2
    assert real.slot_of(SECOND) == 1
    assert real.due


def test_a_key_is_removed_by_who_has_another_one(real: Real) -> None:
    before = real.path.read_bytes()
    for proof in (FIRST, WRONG):  # its own, none
        with pytest.raises(
            WrongKeyError, match="volume mail: the key fits no key slot other than 0"
        ):
            remove(real, 0, proof)
    with pytest.raises(NoSuchKeySlotError, match="no key slot 5, but 0, 1"):
        remove(real, 5, FIRST)
    assert real.path.read_bytes() == before
    assert not real.due
    remove(real, 0, SECOND)
    assert real.slots() == [1]
    assert real.slot_of(FIRST) is None
    with pytest.raises(LastKeyError, match="vmcryptctl key add mail"):
        remove(real, 1, SECOND)
    assert real.slot_of(SECOND) == 1


def test_nothing_is_removed_for_an_empty_key(luks2: Real) -> None:
    """From standard input cryptsetup takes an empty key for "no proof is needed"."""
    with pytest.raises(KeyUnusableError):
        remove(luks2, 0, "")
    volume = luks2.engine.settings.volumes["mail"]
    empty = lib.key("")
    with pytest.raises(WrongKeyError):
        luks2.do(lambda keys: CryptsetupSlots().remove(volume, 0, empty))
    empty.close()
    assert luks2.slots() == [0, 1]


def test_a_key_that_opens_no_data_proves_nothing(luks2: Real, tmp_path: Path) -> None:
    third = file(tmp_path, "third", THIRD)
    cryptsetup("luksAddKey", "--unbound", "--key-size=256", *CHEAP, str(luks2.path), third)
    with pytest.raises(WrongKeyError):
        remove(luks2, 0, THIRD)
    with pytest.raises(WrongKeyError):
        change(luks2, THIRD, "canary-four")
    assert luks2.slots() == [0, 1]


def test_the_token_of_a_slot_goes_with_it(luks2: Real) -> None:
    text = '{"type": "clevis", "keyslots": ["1"]}'
    cryptsetup("token", "import", "--token-id=3", "--json-file=-", str(luks2.path), key=text)
    remove(luks2, 1, FIRST)
    assert luks2.do(lambda keys: keys.listed("mail"))["tokens"] == []


def test_a_changed_key_keeps_its_priority(luks2: Real) -> None:
    cryptsetup("config", "--priority=prefer", "--key-slot=0", str(luks2.path))
    assert change(luks2, FIRST, THIRD) == 2
    listed = luks2.do(lambda keys: keys.listed("mail"))["slots"]
    assert [(slot["slot"], slot["priority"]) for slot in listed] == [(1, 1), (2, 2)]


def test_all_slots_in_use(templates: Path, tmp_path: Path) -> None:
    real = Real(Path(shutil.copy(templates / "luks1", tmp_path / "disk")))
    for number in range(2, 8):
        assert add(real, FIRST, f"canary-{number}") == number
    real.do(lambda keys: _backed_up(keys, tmp_path / "backup"))
    with pytest.raises(StorageError, match="All key slots full"):
        change(real, FIRST, "canary-8")
    assert not real.due
    assert real.slot_of(FIRST) == 0


async def _backed_up(keys: KeySlots, path: Path) -> None:
    await keys.back_up(
        "mail", os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    )


def test_a_backup_of_the_header_is_one(real: Real, tmp_path: Path) -> None:
    remove(real, 0, SECOND)
    assert real.due
    real.do(lambda keys: _backed_up(keys, tmp_path / "backup"))
    assert not real.due
    size = (tmp_path / "backup").stat().st_size
    assert (tmp_path / "backup").read_bytes() == real.path.read_bytes()[:size]
    assert list(real.runtime.iterdir()) == []
    # The disk dies, and its header is put back.
    real.path.write_bytes(bytes(real.path.stat().st_size))
    cryptsetup("luksHeaderRestore", f"--header-backup-file={tmp_path / 'backup'}", str(real.path))
    assert real.slot_of(SECOND) == 1


def test_a_backup_that_cannot_be_written_is_due_still(real: Real, tmp_path: Path) -> None:
    remove(real, 0, SECOND)
    (real.runtime / "header-mail").write_text("of a daemon that was killed")

    async def full(keys: KeySlots) -> None:
        await keys.back_up("mail", os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC))

    with pytest.raises(
        StorageError, match="volume mail: the backup of its header cannot be written"
    ):
        real.do(full)
    assert real.due
    assert list(real.runtime.iterdir()) == []


def test_a_detached_header(templates: Path, tmp_path: Path) -> None:
    header = shutil.copy(templates / "luks2", tmp_path / "header")
    data = tmp_path / "data"
    data.write_bytes(bytes(1 << 20))
    real = Real(data, f'header = "{header}"\n')
    assert change(real, FIRST, THIRD) == 2
    remove(real, 1, THIRD)
    real.do(lambda keys: _backed_up(keys, tmp_path / "backup"))
    assert real.slots() == [2]
    assert data.read_bytes() == bytes(1 << 20)


# --- keystores ---


def test_a_key_is_made_by_the_kernel_and_its_slot_is_cheap(luks2: Real, tmp_path: Path) -> None:
    path = str(tmp_path / "mail.key")

    async def enrol(keys: KeySlots) -> None:
        slots = CryptsetupSlots()
        new_key = await slots.make_key(path)
        old_key = lib.key(FIRST)
        try:
            await slots.add(luks2.engine.settings.volumes["mail"], old_key, new_key, is_random=True)
        finally:
            new_key.close()
            old_key.close()

    luks2.do(enrol)
    status = os.stat(path)
    assert (status.st_size, status.st_mode & 0o777, status.st_uid) == (64, 0o600, os.geteuid())
    assert len(set(Path(path).read_bytes())) > 16
    listed = luks2.do(lambda keys: keys.listed("mail"))["slots"][2]
    assert (listed["kdf"], listed["iterations"]) == ("pbkdf2", 1000)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    assert luks2.do(lambda keys: keys.test("mail", os.dup(fd))) == 2
    os.close(fd)


def test_a_key_is_made_where_nothing_is(luks2: Real, tmp_path: Path) -> None:
    path = tmp_path / "mail.key"
    path.write_text("precious")
    link = tmp_path / "link.key"
    link.symlink_to(tmp_path / "target")

    async def make(path: Path) -> None:
        (await CryptsetupSlots().make_key(str(path))).close()

    for there in (path, link):
        with pytest.raises(StorageError, match="is there already"):
            luks2.do(lambda keys, there=there: make(there))
    assert path.read_text() == "precious"
    assert not (tmp_path / "target").exists()
    with pytest.raises(StorageError, match="cannot be made"):
        luks2.do(lambda keys: make(tmp_path / "nowhere/mail.key"))


def test_a_key_that_cannot_be_written_is_none(
    luks2: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "KEY_SIZE", 0)  # dd refuses to write nothing
    with pytest.raises(StorageError, match="cannot be written"):
        luks2.do(lambda keys: CryptsetupSlots().make_key(str(tmp_path / "mail.key")))
    assert not (tmp_path / "mail.key").exists()


# --- a volume key that is half rotated ---

OPEN = "[sim.volume.mail]\nopen = true\n"
AREA = 16 << 20  # of the header with its key slots


def begin_rotation(path: Path, slot: int = 0) -> None:
    cryptsetup(
        "reencrypt", "--init-only", "--force-offline-reencrypt", f"--key-slot={slot}", "--key-file=-", str(path),
        key=FIRST,
    )  # fmt: skip


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the metadata, in both copies."""
    data = bytearray(path.read_bytes())
    for at in (0, 16384):
        metadata = json.loads(data[at + 4096 : at + 16384].split(b"\0", 1)[0])
        change(metadata)
        data[at + 4096 : at + 16384] = json.dumps(metadata).encode().ljust(12288, b"\0")
        data[at + 448 : at + 512] = bytes(64)
        digest = hashlib.sha256(data[at : at + 16384]).digest()
        data[at + 448 : at + 480] = digest
    path.write_bytes(data)


def move(metadata: dict[str, Any]) -> None:
    """As the metadata is when all data has been moved."""
    segments, digests = metadata["segments"], metadata["digests"]
    [final] = [n for n, one in segments.items() if "backup-final" in one.get("flags", ())]
    segments["0"] = {key: value for key, value in segments[final].items() if key != "flags"}
    for digest in digests.values():
        if "0" in digest["segments"]:
            digest["segments"].remove("0")
        elif final in digest["segments"]:
            digest["segments"].append("0")


def forget_old_slots(metadata: dict[str, Any]) -> None:
    for digest in metadata["digests"].values():
        digest["keyslots"] = [n for n in digest["keyslots"] if n not in ("0", "1")]
    for token in metadata["tokens"].values():
        token["keyslots"] = [n for n in token["keyslots"] if n not in ("0", "1")]
    for number in ("0", "1"):
        del metadata["keyslots"][number]


def opens(path: Path, key: str) -> bool:
    done = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(path)],
        input=key.encode(), stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return done.returncode == 0


@pytest.mark.parametrize(
    ("are_listed", "is_detached"),
    [(True, False), (False, False), (True, True)],
    ids=["wiped", "wiped and forgotten", "detached"],
)
def test_a_rotation_that_was_cut_off_at_its_very_end(
    templates: Path, tmp_path: Path, are_listed: bool, is_detached: bool
) -> None:
    """cryptsetup wipes the old key slots before it writes that all is done, and opens such a header no more."""
    path = Path(shutil.copy(templates / "luks2", tmp_path / "disk"))
    for token, slot in ((5, 0), (6, 1)):
        note = file(tmp_path, "note", f'{{"type":"note","keyslots":["{slot}"]}}')
        cryptsetup("token", "import", f"--token-id={token}", f"--json-file={note}", str(path))
    begin_rotation(path)
    rewrite(path, move)
    with path.open("r+b") as disk:
        for start in (32768, 290816):  # the key slots 0 and 1
            disk.seek(start)
            disk.write(os.urandom(258048))
    if not are_listed:
        rewrite(path, forget_old_slots)
    before = read_header(str(path))
    assert (before.is_reencrypting, before.data_reencrypted) == (True, True)
    assert not opens(path, FIRST)
    data = path.read_bytes()[AREA:]

    real = Real(path)
    volume = real.engine.settings.volumes["mail"]
    if is_detached:
        volume = replace(volume, device="/dev/null", header=str(path))
    asyncio.run(CryptsetupSlots(str(real.runtime)).finish_rotation(volume))
    assert list(real.runtime.iterdir()) == []
    assert (opens(path, FIRST), opens(path, SECOND)) == (True, False)
    after = read_header(str(path))
    assert (after.is_reencrypting, after.data_reencrypted) == (False, False)
    assert [slot.number for slot in after.slots] == [2]
    # As cryptsetup does it, the new slot has the token of the slot that it stands for. Whether a token that
    # cryptsetup had released before was always without a slot cannot be seen.
    left = [] if are_listed else [(6, ())]
    assert [(token.number, token.slots) for token in after.tokens] == [(5, (2,)), *left]
    metadata = json.loads(cryptsetup("luksDump", "--dump-json-metadata", str(path)))
    assert (len(metadata["segments"]), len(metadata["digests"])) == (1, 1)
    assert "requirements" not in metadata["config"]
    whole = path.read_bytes()
    assert whole[AREA:] == data
    if are_listed:
        assert whole[32768:290816] == bytes(258048)
    # It is as any other header again.
    assert real.do(lambda keys: keys.add("mail", lib.handed_in(FIRST), lib.handed_in(THIRD))) == 0
    assert opens(path, THIRD)


def test_a_rotation_that_is_not_at_its_end_is_not_brought_to_it(
    templates: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(templates / "luks2", tmp_path / "disk"))
    begin_rotation(path)
    real = Real(path)
    before = path.read_bytes()
    assert not read_header(str(path)).data_reencrypted
    volume = real.engine.settings.volumes["mail"]
    with pytest.raises(StorageError, match="volume mail: .*: its data is not all under the new"):
        asyncio.run(CryptsetupSlots(str(real.runtime)).finish_rotation(volume))
    assert path.read_bytes() == before
    assert list(real.runtime.iterdir()) == []


def test_a_half_rotated_header_is_left_alone(templates: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(templates / "luks2", tmp_path / "disk"))
    begin_rotation(path)
    real = Real(path)
    before = path.read_bytes()
    listed = real.do(lambda keys: keys.listed("mail"))
    assert listed["is_half_rotated"] is True
    assert [slot["slot"] for slot in listed["slots"]] == [0, 1, 2]
    assert real.engine.volume_views()[0].rotation == "unfinished"

    def handed(passphrase: str) -> int:
        return lib.handed_in(passphrase)

    attempts: list[Callable[[KeySlots], Awaitable[Any]]] = [
        lambda keys: keys.test("mail", handed(FIRST)),
        lambda keys: keys.add("mail", handed(FIRST), handed(THIRD)),
        lambda keys: keys.change("mail", handed(FIRST), handed(THIRD)),
        lambda keys: keys.remove("mail", 1, handed(FIRST)),
        lambda keys: keys.back_up("mail", os.open(os.devnull, os.O_WRONLY)),
    ]
    for attempt in attempts:
        with pytest.raises(BusyError, match="finish that first: `vmcryptctl key rotate mail`"):
            real.do(attempt)
    assert path.read_bytes() == before
    assert not real.due


@pytest.mark.parametrize(
    ("kind", "error", "what"),
    [
        ("luks1", StorageError, "is of LUKS1.*`cryptsetup convert --type luks2"),
        ("luks2", OtherKeysError, r"opens key slot 0, .* key slot 1 \(random key\);"),
    ],
)
def test_what_cannot_be_rotated(
    templates: Path, tmp_path: Path, kind: str, error: type[Exception], what: str
) -> None:
    path = Path(shutil.copy(templates / kind, tmp_path / "disk"))
    real = Real(path, OPEN)
    before = path.read_bytes()

    async def rotate(keys: KeySlots) -> None:
        key = lib.handed_in(FIRST)
        await real.engine.rotations.rotate("mail", key, drop_others=False)

    with pytest.raises(error, match=what):
        real.do(rotate)
    assert path.read_bytes() == before
    assert not real.due
