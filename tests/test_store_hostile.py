"""Metadata that lies: whatever a run says of itself, reading it ends in a plain error, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.run import open_run
from smdbg.cli import run as command_line
from smdbg.errors import DamagedData, NotARun, SmdbgError, StoreError
from smdbg.store import attempt, reader
from smdbg.store import chunks as chunk_reader
from smdbg.store.backend import LocalBackend
from smdbg.store.chunks import Chunk, read_elements, read_rows
from smdbg.store.delete import delete_run, found_runs
from smdbg.store.dtypes import MOST_EMPTY, decode, encode, zarr_dtype
from smdbg.store.format import LOG_ROWS, ArraySpec, canonical, entry_from_json, values_spec
from smdbg.store.keys import read_note
from smdbg.store.shard import crc32c, with_crc
from smdbg.store.worker_group import with_checksum

Json = dict[str, Any]

HUGE = 1 << 40


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "run"
    with smdbg.Hook(path) as hook:
        for step in range(5):
            hook.save_tensor("x", np.arange(4.0) + step)
            hook.save_tensor("text", np.array(["a", "bc"]))
            hook.save_tensor("when", np.array(["2024-01-01"], "M8[s]"))
            hook.save_tensor("grows", np.ones(2 + step))
            hook.save_scalar("number", 1.0)
            hook.end_step()
    read_everything(path)
    return path


def read_everything(path: Path) -> None:
    """Ask all that a reader asks of a run."""
    run = open_run(path)
    assert run.status == "completed" and run.created >= 0 and run.world_size == 1
    assert isinstance((run.hyperparameters, run.versions, run.argv, run.attempts()), tuple)
    for name in run.tensors():
        run.stats("mean", tensors=[name])
        run.tensor(name).values(index=None)
        run.tensor(name).features()
    run.stats("rms")


def refused(path: Path, *errors: type[Exception]) -> str:
    """Read, and return the message it is refused with, which must come soon and take little memory."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(errors or DamagedData) as caught:
            read_everything(path)
        assert time.monotonic() - begun < 3
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) or "workers/00000" in str(caught.value)
    return str(caught.value)


def change(honest: Path, to: Path, lie: Callable[[Json], object]) -> Path:
    """Copy the run and let `lie` change its worker's zarr.json, whose checksum is then made anew."""
    shutil.copytree(honest, to)
    file = to / "workers" / "00000" / "zarr.json"
    group = json.loads(file.read_text())
    lie(group)
    if "arrays" in group["attributes"]["smdbg"]:
        group["attributes"]["smdbg"]["arrays"] = crc32c(canonical(group["consolidated_metadata"]["metadata"]))
    group["attributes"]["smdbg"] = with_checksum(group["attributes"]["smdbg"])
    file.write_text(json.dumps(group))
    return to


def facts_of(group: Json) -> Json:
    facts: Json = group["attributes"]["smdbg"]
    return facts


def entry(group: Json, name: str) -> Json:
    return next(e for e in facts_of(group)["catalogue"] if e["name"] == name)


def array(group: Json, path: str) -> Json:
    found: Json = group["consolidated_metadata"]["metadata"][path]
    return found


def chunk_shape(group: Json, path: str) -> list[int]:
    found: list[int] = array(group, path)["codecs"][0]["configuration"]["chunk_shape"]
    return found


def shard_shape(group: Json, path: str) -> list[int]:
    found: list[int] = array(group, path)["chunk_grid"]["configuration"]["chunk_shape"]
    return found


MISSING = object()


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key, bad in {
            "status": (MISSING, 3, None),
            "catalogue_version": (MISSING, "a", -1, 1.5, True),
            "mesh": (MISSING, 3, [["a", 1]]),
            "dropped_steps": (MISSING, "many", -1),
            "dropped_rows": (MISSING, None, 1e300),
            "collections": (MISSING, [1], {"tensors": 3}, {"tensors": {"bit": True}}, {"../x": {"bit": 0}}),
            "catalogue": (MISSING, {}, [3], ["x"]),
        }.items()
        for value in bad
    ],
)
def test_facts_of_a_worker(honest: Path, tmp_path: Path, key: str, value: Any) -> None:
    def lie(group: Json) -> None:
        facts_of(group).pop(key)
        if value is not MISSING:
            facts_of(group)[key] = value

    message = refused(change(honest, tmp_path / "run", lie))
    assert str(tmp_path / "run") in message and "workers/00000" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("created", "yesterday"),
        ("created", 1e300),
        ("created", None),
        ("world_size", "a"),
        ("world_size", -1),
        ("versions", 5),
        ("versions", [["a", "b"]]),
        ("hyperparameters", 7),
        ("argv", 3),
        ("argv", "train.py"),
        ("argv", [1]),
        ("writers", 0),
        ("writers", ["a"]),
    ],
)
def test_facts_of_the_run(honest: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "run"
    shutil.copytree(honest, path)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["smdbg"][key] = value
    (path / "zarr.json").write_text(json.dumps(root))
    message = refused(path, NotARun if key == "writers" else DamagedData)
    assert key in message or key == "writers"


def names(*statistics: str) -> Callable[[Json], None]:
    def lie(group: Json) -> None:
        stats = array(group, "tensors/stats")
        stats["attributes"]["smdbg"]["statistics"] = list(statistics)
        stats["shape"][2] = shard_shape(group, "tensors/stats")[2] = len(statistics)
        chunk_shape(group, "tensors/stats")[2] = len(statistics)

    return lie


def wide_array(group: Json) -> None:
    entry(group, "x")["slots"][0][2] = HUGE
    entry(group, "x")["shape"] = [HUGE]
    array(group, "tensors/float64")["shape"][1] = shard_shape(group, "tensors/float64")[1] = 2 * HUGE
    chunk_shape(group, "tensors/float64")[:] = [1, 8]


def wide_chunks(group: Json) -> None:
    wide_array(group)
    chunk_shape(group, "tensors/float64")[:] = [1, 2 * HUGE]


def wide_table(group: Json) -> None:
    array(group, "tensors/stats")["shape"][1] = 1 << 30


def wide_table_and_chunks(group: Json) -> None:
    wide_table(group)
    shard_shape(group, "tensors/stats")[1] = chunk_shape(group, "tensors/stats")[1] = 1 << 30


def text_among_numbers(group: Json) -> None:
    names("count")(group)


LIES: dict[str, Callable[[Json], object]] = {
    "a log of 2^32 steps": lambda g: array(g, "steps")["shape"].__setitem__(0, 1 << 32),
    "a log of 2^60 steps": lambda g: array(g, "steps")["shape"].__setitem__(0, 1 << 60),
    "a log of text": lambda g: array(g, "steps").update(shape=["a"]),
    "no texts, many": lambda g: entry(g, "text").update(shape=[HUGE, 0]),
    "texts, many": lambda g: entry(g, "text").update(shape=[HUGE, 1]),
    "an empty shape that no array has": lambda g: entry(g, "x").update(shape=[0, 1 << 61, 1 << 61]),
    "a shape of 99 sizes": lambda g: entry(g, "x").update(shape=[1] * 99),
    "a shape that is no list": lambda g: entry(g, "x").update(shape="4"),
    "a large shape": lambda g: entry(g, "x").update(shape=[HUGE]),
    "a wide array": wide_array,
    "a wide array of large chunks": wide_chunks,
    "a wide table": wide_table,
    "a wide table of large chunks": wide_table_and_chunks,
    "statistics without count": names("nan"),
    "statistics without count first": names("last", "count"),
    "no statistics": names(),
    "an unknown statistic": names("count", "evil"),
    "a statistic twice": names("count", "count"),
    "some statistics": names("count", "min"),
    "more names than statistics": lambda g: array(g, "tensors/stats")["attributes"]["smdbg"]["statistics"].append("l0"),
    "statistics of a wrong type": lambda g: array(g, "tensors/stats").update(data_type="int64"),
    "statistics among values": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "float64"),
    "statistics nowhere": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "zzz"),
    "statistics in another collection": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "../metrics/stats"),
    "statistics outside": lambda g: entry(g, "x")["stats"][0].__setitem__(1, 99),
    "layout among statistics": lambda g: entry(g, "grows")["layout"][0].__setitem__(0, "stats"),
    "features among statistics": lambda g: entry(g, "x").update(features=[["stats", 0, 1]], feature_axis=0),
    "values among statistics": lambda g: entry(g, "x")["slots"][0].__setitem__(0, "stats"),
    "values outside": lambda g: entry(g, "x")["slots"][0].__setitem__(1, HUGE),
    "text among numbers": text_among_numbers,
    "a unit that is none": lambda g: entry(g, "when")["slots"][0].__setitem__(3, "M8[zz]"),
    "a structure": lambda g: entry(g, "when")["slots"][0].__setitem__(3, "M8[s],i4"),
    "a dtype that is none": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "evil"),
    "a narrower dtype": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "float32"),
    "a wider dtype": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "complex128"),
    "rows that begin late": lambda g: array(g, "tensors/stats")["attributes"]["smdbg"].update(first_row=1 << 50),
    "children that are a list": lambda g: g["consolidated_metadata"].update(metadata=[]),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_catalogue(honest: Path, tmp_path: Path, lie: str) -> None:
    refused(change(honest, tmp_path / "run", LIES[lie]))


def test_facts_that_only_describe_do_no_harm(honest: Path, tmp_path: Path) -> None:
    """An own hook may have written them; the run is readable all the same."""

    def lie(group: Json) -> None:
        entry(group, "x").update(role={"a": 1}, forward_order="x", aliases="x", tags=None, requires_grad=3)

    path = change(honest, tmp_path / "run", lie)
    read_everything(path)
    info = open_run(path).tensor("x").info
    assert (info.role, info.forward_order, info.aliases, info.tags, info.requires_grad) == ("", None, (), (), None)
    with pytest.raises(TypeError):
        entry_from_json({"name": 3, "collection": "a"})


@pytest.mark.parametrize("status", ["completed", "running"])
def test_a_long_log_is_looked_at_before_it_is_asked_for(
    honest: Path, tmp_path: Path, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few objects, and among them the last: no request is made for the million that the metadata tell of."""

    def lie(group: Json) -> None:
        array(group, "steps")["shape"][0] = 1 << 32
        facts_of(group)["status"] = status

    path = change(honest, tmp_path / "run", lie)
    log = path / "workers" / "00000" / "steps" / "c"
    shutil.copytree(log / "0", log / str((1 << 32) // LOG_ROWS - 1))
    monkeypatch.setattr(reader, "log_spec", lambda: pytest.fail("a chunk of the log was asked for"))
    assert "chunk 1 of 1048576" in refused(path)


def test_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing finds what a long run wrote, closed or not."""
    monkeypatch.setattr(reader, "FEW_CHUNKS", 1)
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(2 * LOG_ROWS + 10):
            if step % 2048 == 0:
                hook.save_scalar("number", step)
            else:
                hook.set_step(step + 1)
            hook.end_step()
        hook.flush()
        assert open_run(tmp_path / "run").tensor("number").steps()[-1] >= 2 * LOG_ROWS - 2048
    assert open_run(tmp_path / "run").status == "completed"


class Empty:
    """A store that has nothing, and counts what it is asked for."""

    url = "nowhere"
    copies = 0

    def __init__(self) -> None:
        self.asked = 0

    def ranges(self, wanted: Any) -> list[None]:
        self.asked += len(wanted)
        return [None] * len(wanted)


def test_rows_are_believed_only_when_they_come() -> None:
    """Neither the memory of the answer nor the list of its chunks is made before the first chunk is there."""
    store: Any = Empty()
    table = ArraySpec("a/stats", "stats", "float64", (1 << 16, 8), (1, 1 << 16, 8), (1, 1 << 16, 8), ("r", "t", "s"))
    values = ArraySpec("a/x", "values", "uint8", (HUGE,), (1, HUGE), (1, 8), ("row", "element"))
    rows = np.arange(100_000)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedData, match="missing"):
            read_rows(store, "w", table, rows)
        with pytest.raises(DamagedData, match="missing"):
            read_elements(store, "w", values, rows, [(0, HUGE)])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert store.asked <= 33  # a batch each
    asked = store.asked
    for run in ((0, HUGE + 1), (-1, 3), (5, 4)):
        with pytest.raises(DamagedData, match="outside"):
            read_elements(store, "w", values, rows, [run])
    with pytest.raises(DamagedData, match="whole rows"):
        read_rows(store, "w", values, rows)
    assert store.asked == asked


def test_batches_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks come in the order asked for, wherever batches are cut, each once."""
    monkeypatch.setattr(chunk_reader, "BATCH_CHUNKS", 3)
    spec = values_spec("a", "x", "float64", 8)
    batches: list[int] = []

    def fetched(backend: Any, given: ArraySpec, parts: Any) -> Any:
        batches.append(len(parts))
        yield from ((part.chunk, None) for part in parts)

    monkeypatch.setattr(chunk_reader, "_fetch_batch", fetched)
    wanted = [Chunk(n) for n in range(8)]
    store: Any = Empty()
    assert [chunk for chunk, _ in chunk_reader.fetch(store, "w", spec, iter(wanted))] == wanted
    assert batches == [3, 3, 2]


@pytest.mark.parametrize("dtype", ["U1", "S1"])
@pytest.mark.parametrize("count", [0, 3, MOST_EMPTY, MOST_EMPTY + 1])
def test_empty_texts_come_back(dtype: str, count: int) -> None:
    elements, name, shape = encode(np.zeros(count, dtype))
    found = decode(elements, name, shape)
    assert found.shape == (count,) and not found.astype(bool).any()


@pytest.mark.parametrize(
    "name, shape", [("str", (HUGE, 0)), ("bytes", (3, 2)), ("str", ()), ("float64", (3,)), ("uint8", (-1, 2, -1))]
)
def test_shapes_that_the_elements_do_not_have(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DamagedData, match="stored elements"):
        decode(np.zeros(4, "uint8"), name, shape)


@pytest.mark.parametrize("name", ["M8[zz]", "M8[s],i4", "m8x", "M8[s", "evil", "object", ""])
def test_dtypes_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="unknown dtype"):
        zarr_dtype(name)
    assert zarr_dtype("M8[25us]") == zarr_dtype("m8[D]") == zarr_dtype("M8") == "int64"


# --- who lies in more places than the catalogue ---


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("where", ["zarr.json", "workers/00000/zarr.json"])
@pytest.mark.parametrize("depth", [500, 100_000])
def test_deeply_nested_metadata(honest: Path, tmp_path: Path, where: str, depth: int) -> None:
    path = shutil.copytree(honest, tmp_path / "run")
    file = path / where
    deep = file.read_bytes().replace(b'"smdbg":', b'"smdbg": {"deep": ' + nested(depth) + b', "x":', 1) + b"}"
    file.write_bytes(deep)
    refused(path, NotARun, DamagedData)
    assert said(["verify", str(path)])[0] in (1, 2)


def test_deeply_nested_facts_with_a_checksum(honest: Path, tmp_path: Path) -> None:
    """As deep as JSON can be read here, which checks must bear too."""
    path = shutil.copytree(honest, tmp_path / "run")
    root = json.loads((path / "zarr.json").read_text())
    for depth in range(100, 1000, 50):
        root["attributes"]["smdbg"]["hyperparameters"] = {"deep": json.loads(nested(depth)) if depth < 900 else 0}
        (path / "zarr.json").write_text(json.dumps(root))
        refused(path)


@pytest.mark.parametrize("key", ["zarr.json", "workers/00000/zarr.json", "unfinished.json", "control/stop.json"])
def test_enormous_json(honest: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 4 GB, sparse; nothing is read of them but as much as there may be, or nothing is parsed."""
    path = shutil.copytree(honest, tmp_path / "run")
    monkeypatch.setattr(attempt, "LARGEST_JSON", 1 << 20)  # a worker's, of 2 MB here, is read whole
    (path / key).parent.mkdir(exist_ok=True)
    with open(path / key, "r+b" if (path / key).exists() else "wb") as file:
        file.truncate(2 << 20 if key.startswith("workers") else 4 << 30)
    if key.endswith("zarr.json"):
        refused(path, NotARun, DamagedData)
    else:
        read_everything(path)
    assert read_note(LocalBackend(str(path))) == ({} if key == "unfinished.json" else None)
    tracemalloc.start()
    try:
        assert said(["verify", str(path)])[0] == (0 if key == "unfinished.json" else 1)
        assert said(["cp", str(path), str(tmp_path / "copy")])[0] == (0 if key == "unfinished.json" else 2)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", [b"", b"\0", b"[1]", b'"x"', nested(5000), b'{"doing": ["delete"]}', b'{"run_id": {}}']
)
def test_hostile_notes(honest: Path, tmp_path: Path, text: bytes) -> None:
    """No note makes a reader stumble, or a copy or a deletion take the run for something else."""
    path = shutil.copytree(honest, tmp_path / "run")
    for key in ("unfinished.json", "control/stop.json", "checks/a.json"):
        (path / key).parent.mkdir(exist_ok=True)
        (path / key).write_bytes(text)
    read_everything(path)
    assert said(["verify", str(path)])[0] in (0, 1)
    assert said(["prune", "--older-than", "1d", str(path)])[0] == 0 and (path / "zarr.json").exists()
    target = tmp_path / "target"
    target.mkdir()
    (target / "unfinished.json").write_bytes(text)
    assert said(["cp", str(path), str(target)])[0] == 2 and len(list(target.rglob("*"))) == 1


EVIL = "\x1b[2J\x1b]0;pwned\x07[bold red]x[/bold red]\u202egnp.exe\u200b\r\n\t../../../etc/passwd\ud800" + "n" * 100_000


def said(args: list[str]) -> tuple[int, str]:
    """Run a command line; whatever it says is safe to show."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = int(command_line(args))
    text = out.getvalue() + err.getvalue()
    assert "internal error" not in text and "Traceback" not in text, text[:2000]
    # JSON may hold marks of direction and the like as they are, but nothing that moves a terminal.
    assert all(c.isprintable() or c in "\n\t" or ("jsonl" in args and c > "\x9f") for c in text)
    return status, text


def test_evil_names_are_shown_as_escapes(honest: Path, tmp_path: Path) -> None:
    """Names of tensors, tags, statuses and facts of the run; markup stays what it is, and no name becomes a path."""

    def lie(group: Json) -> None:
        entry(group, "x").update(name=EVIL, module=EVIL, tags=[EVIL], role=EVIL)
        facts_of(group).update(status=f"failed: {EVIL}", mesh={EVIL: EVIL})

    path = change(honest, tmp_path / "run", lie)
    root = json.loads((path / "zarr.json").read_text())
    facts = root["attributes"]["smdbg"]
    facts.update(framework=EVIL, argv=[EVIL], hyperparameters={EVIL: EVIL}, git_commit=EVIL, versions={EVIL: EVIL})
    root["attributes"]["smdbg"] = with_checksum(facts)
    (path / "zarr.json").write_text(json.dumps(root))
    before = sorted(tmp_path.rglob("*"))
    for form in ("table", "tsv", "jsonl"):
        for args in (["ls"], ["inspect", "*pwned*"], ["check"], ["inspect", "nothing"]):
            status, text = said([*args, "--run", str(path), "--format", form])
            assert status in (0, 1, 2) and (args[0] != "ls" or "[bold red]" in text)
        for args in (["runs", str(path)], ["runs", str(tmp_path)], ["verify", str(path)]):
            said([*args, "--format", form])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_in_every_error(honest: Path, tmp_path: Path) -> None:
    for number, lie in enumerate((lambda e: e.update(shape=[1] * 99), lambda e: e["slots"][0].__setitem__(0, EVIL))):
        path = change(
            honest, tmp_path / str(number), lambda g, lie=lie: (lie(entry(g, "x")), entry(g, "x").update(name=EVIL))
        )
        status, text = said(["ls", "--run", str(path)])
        assert status == 2 and "damaged" in text


@pytest.mark.parametrize("name", ["../../evil", "a/../../evil", "/etc/evil", "..", "a\\..\\b", "a\0b"])
def test_arrays_that_lie_outside(honest: Path, tmp_path: Path, name: str) -> None:
    """A path of an array never leads out of the run, neither for reading nor for a copy."""

    def lie(group: Json) -> None:
        children = group["consolidated_metadata"]["metadata"]
        children[f"tensors/{name}"] = children["tensors/float64"]
        entry(group, "x")["slots"][0][0] = name

    path = change(honest, tmp_path / "run", lie)
    target = tmp_path / "target"
    assert said(["cp", str(path), str(target / "run")])[0] == 2 and not target.exists()
    refused(path)
    assert said(["prune", "--run", str(path), "--collection", "tensors", "--all", "--yes"])[0] == 2


def test_a_million_tensors(honest: Path, tmp_path: Path) -> None:
    """They cost what their text costs; nothing is asked of the store for each."""

    def lie(group: Json) -> None:
        one = entry(group, "x")
        facts_of(group)["catalogue"] += [{**one, "name": f"x{i}"} for i in range(20_000)]

    path = change(honest, tmp_path / "run", lie)
    size = (path / "workers/00000/zarr.json").stat().st_size
    tracemalloc.start()
    try:
        run = open_run(path)
        assert len(run.tensors()) > 20_000
        assert tracemalloc.get_traced_memory()[1] < 20 * size
    finally:
        tracemalloc.stop()
    assert run.tensor("x777").value(3).tolist() == run.tensor("x").value(3).tolist()


@pytest.mark.parametrize("column", range(10))
@pytest.mark.parametrize("value", [-1, 0, 1, 1 << 62, -(1 << 63), "repeat"])
def test_a_log_that_lies(honest: Path, tmp_path: Path, column: int, value: int | str) -> None:
    """Steps that repeat, go back or are absurd, masks of nothing: answers or errors, no more."""
    path = shutil.copytree(honest, tmp_path / "run")
    file = path / "workers/00000/steps/c/0/0"
    rows = np.frombuffer(file.read_bytes()[:-4], "<i8").reshape(LOG_ROWS, 10).copy()
    rows[1:5, column] = rows[0, column] if value == "repeat" else value
    file.write_bytes(with_crc(rows.tobytes()))
    tracemalloc.start()
    try:
        with contextlib.suppress(SmdbgError):
            run = open_run(path)
            run.step_table()
            run.modes()
            for name in run.tensors():
                tensor = run.tensor(name)
                for step in tensor.value_steps().tolist():
                    tensor.value(step)
                tensor.stat("count")
        for args in (["ls", "--run"], ["check", "--run"], ["verify"], ["runs"]):
            said([*args, str(path)])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


# --- links out of the run ---


@pytest.mark.parametrize("link", ["workers", "workers/00000", "workers/00000/tensors", "workers/00000/tensors/float64"])
def test_nothing_is_deleted_or_put_behind_a_link(honest: Path, tmp_path: Path, link: str) -> None:
    """A run of a stranger whose folders are links into a run of one's own: that one stays as it is."""
    own, path = shutil.copytree(honest, tmp_path / "own"), tmp_path / "run"
    shutil.copytree(honest, path)
    shutil.rmtree(path / link)
    (path / link).symlink_to(own / link, target_is_directory=True)
    (own / "workers/00000/tensors/float64/c/99").mkdir()
    (own / "workers/00000/tensors/float64/c/99/0").write_bytes(b"no commit refers to it")
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}
    for args in (
        ["prune", "--run", str(path), "--values", "--yes"],
        ["prune", "--run", str(path), "--collection", "tensors", "--all", "--yes"],
        ["verify", str(path), "--repair"],
    ):
        status, text = said(args)
        assert before == {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}, args
    for found, store in found_runs(path):
        with pytest.raises(StoreError, match="is a link"):
            delete_run(store, found)
    assert before == {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}


@pytest.mark.parametrize("key", ["control/zarr.json", "checks/a.json", "workers/00000/tensors/step/c/0"])
def test_a_link_to_a_file_is_not_copied(honest: Path, tmp_path: Path, key: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"password": "x"}')
    path = shutil.copytree(honest, tmp_path / "run")
    (path / key).parent.mkdir(exist_ok=True)
    (path / key).unlink(missing_ok=True)
    (path / key).symlink_to(secret)
    assert said(["cp", str(path), str(tmp_path / "copy")])[0] == 2
    copied = [p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()]
    assert secret.read_bytes() not in copied and secret.exists()


# --- damage that only a checksum, or the place, tells ---


def test_a_root_that_does_not_match_its_checksum(honest: Path, tmp_path: Path) -> None:
    path = shutil.copytree(honest, tmp_path / "run")
    text = (path / "zarr.json").read_text()
    run_id = json.loads(text)["attributes"]["smdbg"]["run_id"]
    for changed in (text.replace(run_id, "x" + run_id[1:]), text.replace('"crc32c"', '"crc32b"')):
        (path / "zarr.json").write_text(changed)
        assert "checksum" in refused(path)
    old = json.loads(text)
    del old["attributes"]["smdbg"]["crc32c"]  # a run of an earlier version
    (path / "zarr.json").write_text(json.dumps(old))
    read_everything(path)


def sealed(group: Json) -> None:
    arrays = group["consolidated_metadata"]["metadata"]
    facts_of(group)["arrays"] = crc32c(canonical(arrays))


def test_metadata_of_arrays_that_do_not_match_their_checksum(honest: Path, tmp_path: Path) -> None:
    """One bit makes rows of three of shards of one; each chunk is then intact, and of another row."""
    path = change(honest, tmp_path / "run", sealed)
    read_everything(path)
    assert said(["verify", str(path)])[0] == 0
    file = path / "workers/00000/zarr.json"
    text = file.read_text()
    file.write_text(text.replace('"first_row"', '"last_row"').replace('"fill_value": 0', '"fill_value": 1', 1))
    assert file.read_text() != text and "checksum" in refused(path)
    file.write_text(text)
    assert said(["prune", "--run", str(path), "--collection", "metrics", "--all", "--yes"])[0] == 0
    run = open_run(path)
    assert run.collections() == ["tensors"] and run.tensor("x").value(2).tolist() == [2, 3, 4, 5]


def test_metadata_of_another_worker(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for rank in range(2):
        with smdbg.Hook(path, rank=rank, world_size=2) as hook:
            hook.save_scalar("x", rank)
    file = path / "workers/00001/zarr.json"
    shutil.copy(path / "workers/00000/zarr.json", file)
    run = open_run(path)
    assert run.workers() == [0] and "another worker" in run.damaged[0]
    assert said(["verify", str(path)])[0] == 1


def test_a_log_of_another_length(honest: Path, tmp_path: Path) -> None:
    """An older state of the log is whole in itself; the worker's zarr.json says how long it became."""
    path = shutil.copytree(honest, tmp_path / "run")
    file = path / "workers/00000/steps/c/0/0"
    rows = np.frombuffer(file.read_bytes()[:-4], "<i8").reshape(LOG_ROWS, 10).copy()
    rows[4:] = 0
    file.write_bytes(with_crc(rows.tobytes()))
    assert "lists 4 steps, and the worker's zarr.json 5" in refused(path)
