"""`smdbg blame` on runs written through the hook: who made the first NaN, whom it reached, where, and how large before.

The training is real: two linear layers with a ReLU in between, in NumPy, whose numbers go on as they would; only one of
them is spoilt by hand, in one place and at one step.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig, open_run
from smdbg.analysis.blame import Chain, chain_of, view_of
from smdbg.analysis.evidence import depends_on, inputs_of, scale_before
from smdbg.analysis.place import places_of
from smdbg.analysis.whereabouts import whereabouts
from smdbg.cli import run

COLLECTIONS = ("inputs", "outputs", "losses", "gradients", "updates", "weights")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@dataclass
class Net:
    """Two layers; `spoil` says where the first NaN is made: x, h, y, g2, u1, or nowhere."""

    weights: dict[str, Any]
    spoil: str = ""

    def step(self, rng: Any, now: bool) -> dict[str, Any]:
        """Return all values of one step, and update the weights."""
        spoil = self.spoil if now else ""
        value: dict[str, Any] = {f"w{n}": self.weights[f"w{n}"].copy() for n in (1, 2)}
        x = value["x"] = spoilt(rng.normal(size=(8, 4)), spoil == "x")
        h = value["h"] = spoilt(np.maximum(x @ value["w1"], 0), spoil == "h")
        y = value["y"] = spoilt(h @ value["w2"], spoil == "y")
        value["loss"] = np.mean(y**2)
        dy = 2 * y / y.size
        value["g2"] = spoilt(h.T @ dy, spoil == "g2")
        dh = dy @ value["w2"].T * (h > 0)
        value["g1"] = x.T @ dh
        for n in (2, 1):
            value[f"u{n}"] = spoilt(-0.1 * value[f"g{n}"], spoil == f"u{n}")
            self.weights[f"w{n}"] += value[f"u{n}"]
        return value


def spoilt(value: Any, now: bool) -> Any:
    if now:
        value = value.copy()
        value[1, 2] = np.nan
    return value


def facts() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "x": ("inputs", {"role": "input", "module": "1", "forward_order": 0}),
        "h": ("outputs", {"role": "output", "module": "1", "forward_order": 0, "feature_axis": 1}),
        "y": ("outputs", {"role": "output", "module": "2", "forward_order": 1, "feature_axis": 1}),
        "loss": ("losses", {"role": "loss"}),
    }
    for n in (1, 2):
        module: dict[str, Any] = {"module": str(n), "forward_order": n - 1}
        own = {**module, "of": f"w{n}"}
        found[f"w{n}"] = ("weights", {"role": "weight", "optimizer_group": 0, **module})
        found[f"g{n}"] = ("gradients", {"role": "gradient", "backward_order": 2 - n, **own})
        found[f"u{n}"] = ("updates", {"role": "update", **own})
    return found


def write(
    url: str,
    spoil: str = "",
    at: int = 5,
    steps: int = 12,
    every: dict[str, int] | None = None,
    leave_out: Sequence[str] = (),
    raw: bool = True,
    **hook: Any,
) -> str:
    """Train and save; `every` gives the save interval of collections, 1 unless named."""
    reduction = ReductionConfig(save_raw_tensor=raw)
    intervals = {name: (every or {}).get(name, 1) for name in COLLECTIONS}
    collections = [
        CollectionConfig(name, save_config=SaveConfig(save_interval=n), reduction_config=reduction)
        for name, n in intervals.items()
    ]
    rng = np.random.default_rng(0)
    net = Net({"w1": rng.normal(size=(4, 6)) * 0.3, "w2": rng.normal(size=(6, 3)) * 0.3}, spoil)
    with np.errstate(invalid="ignore"), Hook(url, collections=collections, **hook) as saver:
        saver.set_mode("train")
        for number in range(steps):
            for name, value in net.step(rng, number == at).items():
                collection, info = facts()[name]
                if name not in leave_out:
                    saver.save_tensor(name, value, collection, **info)
            saver.end_step()
    return url


def opened(raw: bool = False, **every: int) -> Hook:
    """Open a hook that saves every collection at every step, or as `every` says."""
    reduction = ReductionConfig(save_raw_tensor=raw)
    homes = [*COLLECTIONS, "metrics"]
    return Hook("run", collections=[
        CollectionConfig(name, save_config=SaveConfig(save_interval=every.get(name, 1)), reduction_config=reduction)
        for name in homes
    ])  # fmt: skip


def chain(url: str) -> Chain:
    return chain_of(view_of(open_run(url)))


def verdicts(found: Chain) -> dict[str, str]:
    """Return what each tensor of worker 0 came after, '' for a producer."""
    return {one.sick.name: "" if one.after is None else one.after.name for one in found.links if not one.sick.worker}


def blame(capsys: pytest.CaptureFixture[str], url: str, *args: str) -> list[dict[str, Any]]:
    assert run(["blame", "--run", url, *args, "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ------------------------------------------------------------------------------------------ producers


@pytest.mark.parametrize(
    ("spoil", "first", "step", "reached"),
    [
        ("x", "x", 5, {"h": "x", "y": "h", "loss": "y", "g2": "loss", "g1": "g2", "u2": "g2", "u1": "g1", "w1": "u1"}),
        ("h", "h", 5, {"y": "h", "loss": "y", "g2": "loss", "w2": "u2"}),
        ("y", "y", 5, {"loss": "y", "g2": "loss", "g1": "g2", "w1": "u1", "w2": "u2", "h": "w1"}),
        ("g2", "g2", 5, {"u2": "g2", "w2": "u2", "y": "w2", "loss": "y", "g1": "loss"}),
        ("u1", "u1", 5, {"w1": "u1", "h": "w1", "y": "h", "loss": "y"}),
    ],
)
def test_the_producer_and_whom_it_reached(
    tmp_path: Path, spoil: str, first: str, step: int, reached: dict[str, str]
) -> None:
    found = chain(write("run", spoil))
    assert found.first is not None and (found.first.sick.name, found.first.sick.onset) == (first, (step - 1, step))
    after = verdicts(found)
    assert [name for name, what in after.items() if not what] == [first]
    assert {name: after[name] for name in reached} == reached
    assert found.undecided == () and found.window is None


def test_the_optimizer_where_no_update_was_saved() -> None:
    found = chain(write("run", "u1", leave_out=["u1", "u2"]))
    assert found.first is not None and found.first.sick.name == "w1"
    assert (found.first.sick.onset, found.first.sick.interval) == ((5, 6), (4, 5))
    view = view_of(open_run("run"))
    (made_from,) = inputs_of(view, found.first.sick, found.places)
    assert (made_from.name, made_from.step, made_from.bad) == ("g1", 5, False)


def test_initial_weights_are_a_producer_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with opened() as hook:
        for _ in range(2):
            hook.save_tensor("w", np.array([1, np.nan]), "weights", role="weight")
            hook.save_tensor("loss", np.nan, "losses", role="loss")
            hook.end_step()
    found = chain("run")
    assert verdicts(found) == {"w": "", "loss": "w"}
    run(["blame", "--run", "run", "--format", "table"])
    text = capsys.readouterr().out
    assert "w, nan at step 0; it began that way." in text and "it was never saved finite" in text


def test_an_infinity_that_did_no_harm_is_not_blamed() -> None:
    with opened() as hook:
        for step in range(9):
            masked = np.array([1, -np.inf, -np.inf if step % 2 else 0])
            hook.save_tensor("scores", masked, "outputs", role="output", forward_order=0)
            hook.save_tensor("mask", np.array([-np.inf]), "inputs", role="mask")
            hook.save_tensor("shift", np.array([-np.inf, 1]), "inputs", role="input", forward_order=1)
            hook.save_tensor("loss", np.nan if step > 6 else 1.0, "losses", role="loss")
            hook.end_step()
    found = chain("run")
    assert found.first is not None and found.first.sick.name == "loss"
    assert verdicts(found) == {"scores": "", "loss": ""}
    assert len(found.remarks) == 1 and "shift" in found.remarks[0] and "mask" in found.remarks[0]


def test_gradients_of_skipped_steps_are_left_out_and_this_is_said() -> None:
    from smdbg.store.format import FLAG_SKIPPED

    with opened() as hook:
        for step in range(6):
            hook.save_tensor("g", np.array([np.inf if step == 2 else 1.0]), "gradients", role="gradient")
            hook.end_step()
    whole = chain("run")
    assert len(whole.links) == 1
    view = view_of(open_run("run"))
    view.log(0).flags[2] |= FLAG_SKIPPED
    found = chain_of(view)
    assert found.links == () and found.first is None and "skipped" in found.remarks[0]


# ------------------------------------------------------------------------------------------ workers, intervals


def two_workers(spoilt_worker: int, **more: Any) -> None:
    for rank in (0, 1):
        write("run", "y" if rank == spoilt_worker else "g2", at=4 if rank == spoilt_worker else 5, rank=rank,
              world_size=2, **more)  # fmt: skip


def test_the_worker_that_was_first_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    two_workers(1)
    found = chain("run")
    assert found.first is not None and (found.first.sick.name, found.first.sick.worker) == ("y", 1)
    # The gradient of worker 0 that went bad one step later is not a producer: gradients are averaged over workers.
    late = next(one for one in found.links if one.sick.name == "g2" and one.sick.worker == 0)
    assert late.after is not None and late.after.worker == 1
    assert run(["blame", "--run", "run", "--format", "table"]) == 0
    text = capsys.readouterr().out
    assert "First cause: y of worker 1, nan at step 4 (train)" in text and "--worker 1" in text
    only = blame(capsys, "run", "--worker", "0")
    assert {record["worker"] for record in only} == {0} and only[0]["after_worker"] == 1
    assert run(["blame", "--run", "run", "--worker", "2"]) == 2


def test_forward_passes_of_two_workers_do_not_blame_each_other() -> None:
    for rank in (0, 1):
        write("run", "x" if rank else "y", rank=rank, world_size=2)
    producers = {(one.sick.name, one.sick.worker) for one in chain("run").links if one.after is None}
    assert producers == {("x", 1), ("y", 0)}


def test_a_coarse_save_interval_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    coarse = dict.fromkeys(COLLECTIONS, 10)
    write("run", "g2", at=23, steps=45, every=coarse)
    found = chain("run")
    assert found.first is not None and found.first.sick.onset == (20, 30)
    assert len(found.undecided) == len(found.links) - 1 and found.window is not None
    assert found.window[1] == 30 and found.window[0] in (19, 20)
    run(["blame", "--run", "run", "--format", "table"])
    text = capsys.readouterr().out
    assert "The saved steps cannot tell whether" in text and "were saved 10 steps apart: within (" in text
    assert "save every step between" in text and "producer (?)" in text and "as far as the saved steps tell" in text


def test_a_norm_that_is_saved_at_every_step_narrows_the_gradients_down() -> None:
    with opened(gradients=10) as hook:
        hook.set_mode("train")
        for step in range(21):
            gradient = np.array([np.nan if step >= 14 else 1.0])
            hook.save_tensor("w", np.ones(1), "weights", role="weight", optimizer_group=0)
            hook.save_tensor("g", gradient, "gradients", role="gradient", of="w")
            hook.save_scalar("loss", np.nan if step >= 14 else 1.0, "losses", role="loss")
            hook.save_scalar("optimizer/grad_norm", float(np.abs(gradient).sum()), role="metric")
            hook.end_step()
    found = chain("run")
    intervals = {one.sick.name: one.sick.interval for one in found.links}
    assert intervals == {"loss": (13, 14), "g": (13, 20), "optimizer/grad_norm": (13, 14)}
    assert verdicts(found)["g"] == "loss" and found.undecided == ()


# ------------------------------------------------------------------------------------------ evidence


def test_the_finite_scale_before_it() -> None:
    with opened() as hook:
        for step in range(6):
            hook.save_tensor("g", np.array([10.0**step if step < 5 else np.inf, 1]), "gradients", role="gradient")
            hook.end_step()
    view = view_of(open_run("run"))
    (link,) = chain_of(view).links
    scale = scale_before(view, link.sick)
    assert scale.steps == (0, 1, 2, 3, 4) and scale.abs_max[-1] == 1e4 and scale.growth == pytest.approx(10)
    assert (link.sick.posinf, link.sick.nan, link.sick.count) == (1, 0, 2)


@pytest.mark.parametrize(
    ("shape", "bad", "pattern", "first"),
    [
        ((4, 6), (slice(None), slice(None)), "all elements", (0, 0)),
        ((4, 6), (2, slice(None)), "whole row 2 (of 4)", (2, 0)),
        ((4, 6), (slice(None), [1, 4]), "whole columns 1, 4 (of 6)", (0, 1)),
        ((4, 6), (slice(0, 2), 5), "within column 5 (of 6)", (0, 5)),
        ((4, 6), (3, 3), "one element", (3, 3)),
        ((4, 6), ([0, 1, 2, 3], [0, 2, 3, 5]), "scattered", (0, 0)),
        ((2, 3, 5), (slice(None), 1, slice(None)), "whole index of axis 1 1 (of 3)", (0, 1, 0)),
        ((7,), ([2, 5],), "scattered", (2,)),
        ((7,), ([2],), "one element", (2,)),
        ((), (), "the number itself", ()),
    ],
)
def test_the_pattern_of_what_is_bad(
    shape: tuple[int, ...], bad: Any, pattern: str, first: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = np.ones(shape)
    value[bad] = np.nan
    with opened(raw=True) as hook:
        hook.save_tensor("t", value, "outputs")
    tensor = open_run("run").tensor("t")
    whole = whereabouts(tensor, "global", 0, 0)
    assert whole is not None and (whole.pattern, whole.positions[0]) == (pattern, first)
    assert whole.bad == np.isnan(value).sum() and len(whole.positions) == min(whole.bad, 5)
    monkeypatch.setattr("smdbg.analysis.whereabouts.PART_BYTES", 8)  # read row by row
    assert whereabouts(tensor, "global", 0, 0) == whole


def test_what_a_tensor_is_made_from() -> None:
    from smdbg.store.format import TensorInfo

    places = places_of({name: TensorInfo(name, home, **info) for name, (home, info) in facts().items()})

    def made_from(name: str) -> list[str]:
        return depends_on(places.info(name), places)

    assert made_from("x") == [] and made_from("h") == ["x", "w1"] and made_from("y") == ["h", "w2"]
    assert made_from("loss") == ["y"] and made_from("g2") == ["loss"] and made_from("g1") == ["loss", "g2", "x"]
    assert made_from("u1") == ["g1"] and made_from("w2") == ["u2", "g2"]


# ------------------------------------------------------------------------------------------ the command


def test_records_have_the_fields_that_the_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    records = blame(capsys, write("run", "y"))
    run(["blame", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert set(records[0]) - {"version"} <= set(words)
    first = records[0]
    assert (first["verdict"], first["tensor"], first["step"], first["onset"]) == ("producer", "y", 5, [4, 5])
    assert (first["nan"], first["count"], first["positions"], first["pattern"]) == (1, 24, [[1, 2]], "one element")
    assert [(item["tensor"], item["finite"]) for item in first["inputs"]] == [("h", True), ("w2", True)]
    assert first["before_step"] == 4 and first["abs_max"] > 0 and first["growth"] > 0
    assert [record["order"] for record in records] == list(range(1, len(records) + 1))
    run(["blame", "--run", "run", "--format", "tsv"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(records) and {len(line.split("\t")) for line in lines} == {len(first) - 1}


def test_the_chain_back_from_one_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    write("run", "y")
    assert [one["tensor"] for one in blame(capsys, "run", "--tensor", "w2")] == ["y", "loss", "g2", "u2", "w2"]
    assert [one["tensor"] for one in blame(capsys, "run", "--tensor", "*os?")] == ["y", "loss"]
    assert blame(capsys, "run", "--tensor", "x") == []
    run(["blame", "--run", "run", "--tensor", "x", "--format", "table"])
    assert "x was finite at every saved step" in capsys.readouterr().out
    for name, word in (("los", "loss"), ("g?", "g1")):
        assert run(["blame", "--run", "run", "--tensor", name]) == 2
        assert word in capsys.readouterr().err


def test_statistics_alone_tell_no_positions(capsys: pytest.CaptureFixture[str]) -> None:
    first = blame(capsys, write("run", "y", raw=False))[0]
    assert (first["positions"], first["value_step"], first["nan"]) == (None, None, 1)
    run(["blame", "--run", "run", "--format", "table"])
    assert "1 of 24 elements; no full value was kept from then on" in capsys.readouterr().out


def test_without_anything_bad_the_findings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    write("good")
    assert run(["blame", "--run", "good", "--format", "table"]) == 0
    with Hook("zero", save_config=SaveConfig()) as hook:
        for _ in range(12):
            hook.save_tensor("w", np.ones(3), "weights", role="weight")
            hook.save_tensor("g", np.zeros(3), "gradients", role="gradient", of="w")
            hook.end_step()
    capsys.readouterr()
    records = blame(capsys, "zero")
    assert [(one["verdict"], one["tensor"]) for one in records if one["verdict"] == "first cause"]
    assert records[0]["rule"] and records[0]["message"] and records[0]["nan"] is None
    assert run(["blame", "--run", "zero", "--format", "table"]) == 0
    text = capsys.readouterr().out
    assert "All that was saved is finite" in text and "First cause: " in text


def test_no_run_and_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["blame", "--run", "nowhere"]) == 2
    Hook("empty").close()
    assert run(["blame", "--run", "empty", "--format", "table"]) == 0
    assert "Nothing to blame" in capsys.readouterr().out


def test_names_are_not_trusted_and_forty_columns_are_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    name = "a[red]b\x1b[31m/" + "long" * 20
    with opened() as hook:
        for step in range(3):
            hook.save_tensor(name, np.array([np.nan if step else 1.0]), "outputs", role="output")
            hook.save_tensor("loss", np.nan if step else 1.0, "losses", role="loss")
            hook.end_step()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for command in ("blame", "check"):
        stream = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            for key, value in (("COLUMNS", "40"), ("TERM", "xterm"), ("NO_COLOR", "1")):
                patch.setenv(key, value)
            assert run([command, "--run", "run", *(["--rules", "exploding_tensor"] if command == "check" else [])]) < 2
        text = stream.getvalue()
        assert "[red]" in text.replace("\n", "") and "\x1b[31m" not in text and "\\x1b" in text
        bare = re.sub(r"\x1b\[[01]m|\s", "", text)
        assert "Firstcause:a[red]b\\x1b[31m" in bare and bare.count("a[red]b") >= 3
        folded = [line for line in text.splitlines() if line.endswith("\\") or line.startswith("  smdbg")]
        assert folded and max(map(len, folded)) <= 40


def test_the_broken_run_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    from smdbg.cli.demo_training import GRADIENT, LOSS, WEIGHT

    assert run(["demo", "--scale", "1e11", "--steps", "20", "--run", "broken", "--no-show"]) == 0
    capsys.readouterr()
    records = blame(capsys, "broken")
    assert [(one["tensor"], one["verdict"]) for one in records] == [
        (WEIGHT, "producer"), (LOSS, "propagator"), (GRADIENT, "propagator"),
    ]  # fmt: skip
    assert records[0]["made"] == [0, 1] and records[0]["inputs"][0]["abs_max"] > 1e23
    run(["blame", "--run", "broken", "--format", "table"])
    assert "its square is more than float32 can hold" in capsys.readouterr().out
    assert run(["check", "--run", "broken", "--rules", "exploding_tensor", "--format", "table"]) == 1
    text = capsys.readouterr().out
    assert f"First cause: {WEIGHT}, exploding_tensor (error) from step 2 on, made by the update of step 1." in text
    assert f"Then: {LOSS} at step 2 (exploding_tensor); {GRADIENT} at step 2" in text
    run(["runs", "broken", "--format", "jsonl"])
    assert json.loads(capsys.readouterr().out)["hyperparameters"]["scale"] == 1e11
