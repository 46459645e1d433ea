"""Files made to do harm, or damaged: a clear error, no memory taken, nothing run."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from files.test_foreign_files import gguf_file, module, packed, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import Steering, TrimtabError, load
from trimtab.files.gguf_container import read_container

MEGABYTES = 32


def refused(path: Path, *words: str, **more) -> None:
    """A `TrimtabError` in one line that names the file; little memory taken meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(TrimtabError) as caught:
            load(path, **more)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def harmless(path: Path, data: bytes, **more) -> bool:
    """Whether the bytes are read at all: they may be, or be refused, and nothing else."""
    path.write_bytes(data)
    try:
        steering = load(path, layer_offset=0, **more)
    except TrimtabError:
        return False
    assert isinstance(steering, Steering)
    assert all(torch.isfinite(edit.operation.direction).all() for edit in steering.edits)
    return True


# ---- GGUF ----------------------------------------------------------------------------------------------------


@pytest.fixture
def vector_file(tmp_path: Path) -> Path:
    fields = {"controlvector__model_hint": "llama", "controlvector__key": 0.5}
    return gguf_file(tmp_path / "v.gguf", vectors(1, 2, 3), **fields)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")


def crafted(entries: list[bytes], tensors: list[bytes], rest: bytes = bytes(64), counts=None, version=3) -> bytes:
    count, entry_count = counts or (len(tensors), len(entries) + 1)
    head = b"GGUF" + struct.pack("<IQQ", version, count, entry_count)
    return head + ARCHITECTURE + b"".join(entries) + b"".join(tensors) + rest


def tensor(name: str, shape=(8,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


BIG = 1 << 62
CRAFTED = {
    "twice": crafted([], [tensor("direction.1"), tensor("direction.1", offset=32)]),
    "entry 'a' twice": crafted([text("a") + struct.pack("<If", 6, 1.0)] * 2, []),
    "too short for the": crafted([], [], counts=(BIG, 1)),
    "too short for the ": crafted([], [], counts=(0, BIG)),
    "reaches past its end": crafted([], [tensor("direction.1", shape=(BIG,))]),
    "reaches past its end ": crafted([], [tensor("direction.1", offset=BIG)]),
    "a key": crafted([struct.pack("<Q", BIG)], []),
    "the entry 'a' has": crafted([text("a") + struct.pack("<IQ", 8, BIG)], []),
    "is an array of": crafted([text("a") + struct.pack("<IIQ", 9, 8, BIG)], []),
    "the entry 'a' reaches": crafted([text("a") + struct.pack("<IIQ", 9, 4, BIG)], []),
    "is an array of 1 of type 9": crafted([text("a") + struct.pack("<IIQ", 9, 9, 1)], []),
    "unknown type 99": crafted([text("a") + struct.pack("<I", 99)], []),
    "isn't UTF-8": crafted([text(b"\xff\xfe") + struct.pack("<If", 6, 1.0)], []),
    "0 dimensions": crafted([], [tensor("direction.1", shape=())]),
    "9 dimensions": crafted([], [tensor("direction.1", shape=(1,) * 9)]),
    "shape [0]": crafted([], [tensor("direction.1", shape=(0,))]),
    "a tensor's name has 65": crafted([], [tensor("direction." + "1" * 55)]),
    "alignment is 0": crafted([text("general.alignment") + struct.pack("<II", 4, 0)], [tensor("direction.1")]),
    "alignment is 3": crafted([text("general.alignment") + struct.pack("<II", 4, 3)], [tensor("direction.1")]),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + bytes(64),
    "version 1": crafted([], [], version=1),
    "version 99": crafted([], [], version=99),
    "GGUF type 2;": crafted([], [tensor("direction.1", kind=2)]),
    "'direction.../../x'": crafted([], [tensor("direction.../../x")]),
    "'direction./etc/passwd'": crafted([], [tensor("direction./etc/passwd")]),
    "'direction.-2'": crafted([], [tensor("direction.-2")]),
    "'direction.1_0'": crafted([], [tensor("direction.1_0")]),
    "'direction.٣'": crafted([], [tensor("direction.٣")]),
    "'direction.9999999'": crafted([], [tensor("direction.9999999")]),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_gguf(tmp_path, case):
    path = tmp_path / "v.gguf"
    path.write_bytes(CRAFTED[case])
    refused(path, case.strip())


def test_tensors_that_share_their_numbers(tmp_path):
    """A megabyte that says of itself a thousand times that it is a vector would take a gigabyte."""
    path = tmp_path / "v.gguf"
    many = [tensor(f"direction.{i}", shape=(1 << 18,)) for i in range(1000)]
    path.write_bytes(crafted([], many, rest=bytes(1 << 20)))
    refused(path, "reaches past its end")


def test_truncated_gguf(vector_file):
    data = vector_file.read_bytes()
    for size in range(len(data)):
        vector_file.write_bytes(data[:size])
        with pytest.raises(TrimtabError):
            load(vector_file)


def test_gguf_agrees_with_the_gguf_package(vector_file):
    import gguf

    container = read_container(vector_file.read_bytes())
    reader = gguf.GGUFReader(vector_file)
    assert {t.name: int(t.data_offset) for t in reader.tensors} == {k: p.start for k, p in container.tensors.items()}
    for name, value in container.metadata.items():
        assert reader.fields[name].contents() == pytest.approx(value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_after_the_beginning(tmp_path_factory, data, start):
    prefixes = [b"GGUF", b"GGUF\3\0\0\0", crafted([], [], rest=b""), crafted([], [], rest=b"", counts=(1, 2))]
    harmless(tmp_path_factory.getbasetemp() / "fuzz.gguf", prefixes[start] + data)


# ---- .pt -----------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def saved(value: object, **more) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def rezipped(change: Callable[[dict[str, bytes]], object], compress: int = zipfile.ZIP_STORED) -> bytes:
    """A good file's archive, changed."""
    with zipfile.ZipFile(io.BytesIO(saved(torch.ones(8)))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_the_crafting_is_sound(tmp_path):
    assert harmless(tmp_path / "layer_1.pt", rezipped(lambda entries: None))


@pytest.mark.parametrize("how", ["zip", "zip, protocol 4", "legacy", "plain pickle", "beside a tensor"])
def test_a_payload_never_runs(tmp_path, how):
    path, sprung = tmp_path / "layer_1.pt", tmp_path / "sprung"
    value: object = [torch.ones(8), Trap(sprung)] if how == "beside a tensor" else Trap(sprung)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        more = {"pickle_protocol": 4} if "4" in how else {"_use_new_zipfile_serialization": how != "legacy"}
        path.write_bytes(saved(value, **more))
    refused(path, "pickle")
    refused(path, source="torch")
    assert not sprung.exists()
    with path.open("rb") as stream:  # and the trap does work
        pickle.load(stream) if how == "plain pickle" else torch.load(stream, weights_only=False)
    assert sprung.exists()


def protocol_0(value: bytes) -> Callable[[dict[str, bytes]], object]:
    return lambda entries: entries.update({name: value for name in entries if name.endswith("data.pkl")})


ARCHIVES = {
    "builtins.bytearray": protocol_0(b"cbuiltins\nbytearray\n(I1000000000000\ntR."),
    "os.system": protocol_0(b"cos\nsystem\n(S'true'\ntR."),
    "an object (STACK_GLOBAL)": protocol_0(b"\x8c\x02os\x8c\x06system\x93."),
    "an object (INST)": protocol_0(b"(S'true'\nios\nsystem\n."),
    "can't be parsed": protocol_0(b"\xff\xff"),
    "'../data.pkl'": lambda e: e.update({"../data.pkl": b""}),
    "'a/../../x'": lambda e: e.update({"a/../../x": b"x"}),
    "'/etc/passwd'": lambda e: e.update({"/etc/passwd": b"x"}),
    "'C:/x'": lambda e: e.update({"C:/x": b"x"}),
    "not one that torch.save writes": lambda e: e.update({"elsewhere/data.pkl": b""}),
    "not one that torch.save writes;": lambda e: [e.pop(name) for name in list(e) if name.endswith("data.pkl")],
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_crafted_archives(tmp_path, case):
    path = tmp_path / "layer_1.pt"
    path.write_bytes(rezipped(ARCHIVES[case]))
    refused(path, case.strip())
    assert [file.name for file in tmp_path.iterdir()] == ["layer_1.pt"]


def test_a_harmless_pickle_before_the_real_one(tmp_path):
    def decoy(entries):
        kept = dict(entries)
        top = next(iter(kept)).split("/")[0]
        entries.clear()
        entries.update({f"{top}/x/data.pkl": b"N.", **kept, f"{top}/data.pkl": b"cos\nsystem\n(S'true'\ntR."})

    path = tmp_path / "layer_1.pt"
    path.write_bytes(rezipped(decoy))
    refused(path, "os.system")


def test_archives_that_are_larger_than_they_are(tmp_path):
    path = tmp_path / "layer_1.pt"

    def bomb(entries):
        entries.update({name: bytes(100 << 20) for name in entries if name.endswith("data/0")})

    path.write_bytes(rezipped(bomb, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20
    refused(path, "more data than the file")
    path.write_bytes(rezipped(lambda e: e.update({"archive/x": b"x" * 10}), zipfile.ZIP_DEFLATED))
    refused(path, "compressed")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"N.")
    path.write_bytes(buffer.getvalue())
    refused(path, "two entries of the same name")


def test_tensors_that_are_larger_than_they_are(tmp_path):
    """A number that says it is a trillion, and a storage that says it is longer than its bytes."""
    path = tmp_path / "layer_1.pt"
    path.write_bytes(saved(torch.ones(1).expand(1 << 40)))
    refused(path, "incomplete tensor")
    path.write_bytes(saved({3: torch.ones(1).expand(1 << 40)}))
    refused(path, "incomplete tensor")
    short = rezipped(lambda entries: entries.update({name: b"\0\0" for name in entries if name.endswith("data/0")}))
    path.write_bytes(short)
    refused(path)
    path.write_bytes(saved(torch.ones(2, 2).to_sparse()))
    refused(path)


def test_truncated_archives(tmp_path):
    path = tmp_path / "layer_1.pt"
    data = saved({"layers.1": {"action": "add", "steering_vector": torch.ones(8)}})
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(TrimtabError):
            load(path)


# ---- JSON ----------------------------------------------------------------------------------------------------


def test_truncated_json(tmp_path):
    data = json.dumps(packed(vectors(1, 2), {1: 1.0, 2: 1.0})).encode()
    for size in range(len(data)):
        assert not harmless(tmp_path / "v.json", data[:size])
    assert harmless(tmp_path / "v.json", data)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["directions", "post_block", "1", "01", "-1", "vector", "scale", "data", "shape", "dtype"])
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=4) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS | st.just("layer_indices"), TREES, max_size=4))
def test_any_json(tmp_path_factory, value):
    harmless(tmp_path_factory.getbasetemp() / "fuzz.json", json.dumps(value).encode(), source="json")


# ---- for a minute --------------------------------------------------------------------------------------------


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out or doubled; now and then a number that means a length."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed) or 1)
        match chance.randrange(5):
            case 0 if changed:
                changed[at] = chance.randrange(256)
            case 1:
                del changed[at : at + chance.choice((1, 4, 8, 64))]
            case 2:
                changed[at:at] = changed[at : at + chance.choice((1, 8, 64))]
            case 3:
                value = chance.choice((0, 1, 0xFF, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1))
                changed[at : at + 8] = struct.pack("<Q", value)
            case _:
                changed[at:at] = chance.choice((b"1e999", b"NaN", b"\\u0000", b"[[[[", b'"', b"-", b"\xff", b"}"))
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.long_unless(lambda seed: seed is not None)
@pytest.mark.parametrize("seed", [0, None], ids=["the same files", "others each time"])
@pytest.mark.parametrize(("kind", "count"), [("gguf", 3000), ("json", 2000), ("torch", 1000)])
def test_damage(tmp_path, vector_file, kind, count, seed):
    """Whatever happens to a good file, it is read or refused, and quickly."""
    good = {
        "gguf": [vector_file.read_bytes(), crafted([], [tensor("direction.1")])],
        "json": [json.dumps(make(vectors(1, 2), {1: 1.0, 2: -1.0})).encode() for make in (module, packed)],
        "torch": [saved(torch.ones(3, 8)), saved({"dir": torch.eye(8)[0], "avg_proj": torch.tensor(1.0)})],
    }[kind]
    if seed is None:
        seed, count = random.randrange(1 << 32), 15 * count
    chance, read = random.Random(seed), 0
    for tried in range(count):
        data = mutated(chance.choice(good), chance)
        started = time.process_time()  # other programs may be running
        try:
            read += harmless(tmp_path / "fuzz", data, source=kind)
        except Exception:
            (Path(tmp_path) / f"failed-{seed}-{tried}").write_bytes(data)
            raise
        assert time.process_time() - started < 5, f"seed {seed}, file {tried}"
    assert 0 < read < count


def test_what_is_left_is_exact(tmp_path):
    """The strictness costs nothing: an ordinary file's numbers arrive to the bit."""
    published = vectors(*range(40))
    for edit in load(gguf_file(tmp_path / "v.gguf", published)).edits:
        assert np.array_equal(edit.operation.direction.numpy(), published[edit.site.layer])
