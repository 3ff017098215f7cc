"""The newcomer's side of enrolment, as far as it goes without a network."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mesh import enrol
from mesh.config import NodeConfig
from mesh.enrol import Admitted, keep_renewed, known_bootstraps, open_identity, remember_bootstraps
from mesh.errors import ConfigError, EnrolError, EnrolRefused, WrongMesh
from mesh.identity import CERTIFICATE_LIFETIME_S, Identity, IdentityStore
from mesh.invite import Invite, seal_invite
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh
from tests.support.clocks import StoppedClock

NOW = 1_800_000_000.0
MESH, OTHER = make_mesh(now=NOW), make_mesh(now=NOW)


@dataclass(frozen=True, kw_only=True)
class Config(NodeConfig):
    role: ClassVar[Role] = Role.WORKER


def token(mesh: TestMesh = MESH, role: Role = Role.WORKER) -> str:
    claims = Invite(id=b"0123456789abcdef", role=role, uses=1, issued=NOW, expires=NOW + 600.0)
    return seal_invite(mesh.keys_issuer, "keys-1", claims, mesh_id=mesh.mesh_id, bootstraps=("b.example:7600",))


def enrolled(config: Config, mesh: TestMesh = MESH, role: Role = Role.WORKER) -> Identity:
    """As if enrolment had happened."""
    store = IdentityStore(config.state_dir)
    key = store.key()
    store.save(mesh.admission.admit(key.public_key(), role, now=NOW), mesh.mesh_id)
    return store.load(now=NOW)


async def test_enrolled_node_starts_without_asking_anybody(tmp_path: Path) -> None:
    config = Config(home=tmp_path)
    identity = enrolled(config)
    assert (await open_identity(config, Role.WORKER, StoppedClock(NOW))).node_id == identity.node_id


async def test_enrolled_node_does_not_mind_its_old_token(tmp_path: Path) -> None:
    config = Config(home=tmp_path, join=token())
    enrolled(config)
    await open_identity(config, Role.WORKER, StoppedClock(NOW + 3600.0))


async def test_node_without_identity_and_token_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mesh invite worker"):
        await open_identity(Config(home=tmp_path), Role.WORKER, StoppedClock(NOW))


async def test_node_whose_certificate_ran_out_is_told_what_to_do(tmp_path: Path) -> None:
    config = Config(home=tmp_path)
    enrolled(config)
    with pytest.raises(EnrolError, match="mesh invite worker"):
        await open_identity(config, Role.WORKER, StoppedClock(NOW + CERTIFICATE_LIFETIME_S))


async def test_token_for_another_role_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    config = Config(home=tmp_path, join=token(role=Role.PROXY))
    with pytest.raises(ConfigError, match="admits a proxy, not a worker"):
        await open_identity(config, Role.WORKER, StoppedClock(NOW))


async def test_mistyped_token_is_named_and_not_shown(tmp_path: Path) -> None:
    config = Config(home=tmp_path, join=token()[:-3] + "xyz")
    with pytest.raises(ConfigError, match=r"--join: .*checksum") as caught:
        await open_identity(config, Role.WORKER, StoppedClock(NOW))
    assert config.join[20:60] not in str(caught.value)


async def test_state_of_another_mesh_or_role_is_never_taken_over(tmp_path: Path) -> None:
    config = Config(home=tmp_path, join=token(OTHER))
    enrolled(config)
    with pytest.raises(ConfigError, match="another mesh"):
        await open_identity(config, Role.WORKER, StoppedClock(NOW))
    proxys = Config(home=tmp_path, name="p")
    enrolled(proxys, role=Role.PROXY)
    with pytest.raises(ConfigError, match="belongs to a proxy"):
        await open_identity(proxys, Role.WORKER, StoppedClock(NOW))


def test_bootstraps_come_from_settings_then_memory_then_token(tmp_path: Path) -> None:
    assert known_bootstraps(Config(home=tmp_path)) == ()
    config = Config(home=tmp_path, join=token())
    assert known_bootstraps(config) == ("b.example:7600",)
    config.state_dir.mkdir(parents=True)
    remember_bootstraps(config.state_dir, ["d.example:2", "c.example:1", "d.example:2"])
    assert known_bootstraps(config) == ("c.example:1", "d.example:2")
    assert known_bootstraps(Config(home=tmp_path, bootstrap=("e.example:3",))) == ("e.example:3",)


@pytest.mark.parametrize("content", ["", "{}", "5", '["nonsense"]', "[1]", "\x00"])
def test_broken_memory_of_bootstraps_is_no_obstacle(tmp_path: Path, content: str) -> None:
    config = Config(home=tmp_path, join=token())
    config.state_dir.mkdir(parents=True)
    (config.state_dir / "bootstraps.json").write_text(content)
    assert known_bootstraps(config) == ("b.example:7600",)


async def test_renewal_comes_at_half_life_with_jitter_and_is_kept(tmp_path: Path) -> None:
    config, clock = Config(home=tmp_path), StoppedClock(NOW)
    identity = enrolled(config)
    due: list[float] = []
    done = asyncio.Event()

    async def renewed(current: Identity, *_args: object, **_more: object) -> Admitted:
        due.append((clock.now - current.membership.issued) / CERTIFICATE_LIFETIME_S)
        if len(due) == 20:
            done.set()
            await asyncio.Event().wait()
        credentials = MESH.admission.admit(current.key.public_key(), Role.WORKER, now=clock.now)
        current.renew(credentials, now=clock.now)
        return Admitted(credentials=credentials, bootstraps=("c.example:1",))

    task = asyncio.create_task(
        keep_renewed(identity, IdentityStore(config.state_dir), ("b.example:1",), clock, random.Random(7), renewed=renewed)
    )
    await done.wait()
    task.cancel()
    assert all(0.4 - 1e-3 <= part <= 0.6 + 1e-3 for part in due)
    assert max(due) - min(due) > 0.1
    assert known_bootstraps(config) == ("c.example:1",)
    assert IdentityStore(config.state_dir).load(now=clock.now).membership.expires == identity.membership.expires


async def test_node_late_for_its_renewal_renews_at_once(tmp_path: Path) -> None:
    config, clock = Config(home=tmp_path), StoppedClock(NOW + 0.9 * CERTIFICATE_LIFETIME_S)
    asked = asyncio.Event()

    async def renewed(*_args: object, **_more: object) -> Admitted:
        asked.set()
        raise EnrolError("enough")

    with pytest.raises(EnrolError):
        await keep_renewed(enrolled(config), IdentityStore(config.state_dir), (), clock, random.Random(7), renewed=renewed)
    assert asked.is_set()
    assert clock.slept == []


async def test_machine_that_slept_past_the_time_renews_when_it_wakes(tmp_path: Path) -> None:
    class Laptop(StoppedClock):
        async def sleep(self, delay_s: float) -> None:
            await super().sleep(delay_s)
            self.now += 0.8 * CERTIFICATE_LIFETIME_S  # the lid was closed

    clock = Laptop(NOW)
    await enrol.until_half_life(enrolled(Config(home=tmp_path)).membership, clock, random.Random(7))
    assert len(clock.slept) == 1


class Attempts:
    """Addresses that are asked, and what each says."""

    def __init__(self, answers: dict[str, Exception | Admitted]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, address: str) -> Admitted:
        self.asked.append(address)
        answer = self.answers[address]
        if isinstance(answer, Exception):
            raise answer
        return answer


ADMITTED = Admitted(credentials=MESH.identity(Role.WORKER, now=NOW).credentials, bootstraps=())


async def ask(attempts: Attempts, clock: StoppedClock, *, for_s: float = 60.0, refusals: bool = True) -> Admitted:
    end = clock.now + for_s
    return await enrol.any_bootstrap(
        attempts,
        tuple(attempts.answers),
        clock=clock,
        rng=random.Random(7),
        stop=lambda _state: clock.now >= end,
        pauses_s=(1.0, 10.0),
        refusals=refusals,
    )


async def test_one_bootstrap_node_that_answers_is_enough() -> None:
    attempts = Attempts({"a:1": EnrolError("down"), "b:1": EnrolRefused("no"), "c:1": ADMITTED, "d:1": WrongMesh("no")})
    assert await ask(attempts, clock := StoppedClock()) is ADMITTED
    assert clock.slept == []


async def test_rounds_go_on_with_growing_pauses_until_time_is_up() -> None:
    attempts = Attempts({"a:1": EnrolError("down"), "b:1": EnrolRefused("no")})
    with pytest.raises(EnrolError, match="a:1: down; b:1: no"):
        await ask(attempts, clock := StoppedClock())
    assert all(later > earlier * 0.5 for earlier, later in zip(clock.slept, clock.slept[1:], strict=False))
    assert max(clock.slept) <= 10.0
    assert sum(clock.slept) >= 60.0
    assert set(attempts.asked) == {"a:1", "b:1"}


async def test_refusal_by_all_ends_it_at_once() -> None:
    attempts = Attempts({"a:1": EnrolRefused("spent"), "b:1": WrongMesh("other")})
    with pytest.raises(EnrolRefused, match="spent"):
        await ask(attempts, clock := StoppedClock())
    assert clock.slept == []


async def test_renewal_goes_on_even_if_all_refuse() -> None:
    attempts = Attempts({"a:1": EnrolRefused("no")})
    with pytest.raises(EnrolError):
        await ask(attempts, clock := StoppedClock(), refusals=False)
    assert len(clock.slept) > 3


async def test_nobody_to_ask_is_a_matter_of_settings() -> None:
    with pytest.raises(ConfigError, match="--bootstrap"):
        await ask(Attempts({}), StoppedClock())
