"""Placement: rules, budgets and statistics, without any executor; what explain prints; what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.engine import _kernels
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.limits import Limits
from ktransformers.engine.load import Facts, open_model
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.placement.place import (
    Placement,
    dense_bytes,
    experts_name,
    experts_ops,
    place,
    swaps,
)
from ktransformers.engine.placement.predict import DeviceLimits, PlacedRow, chances, predict
from ktransformers.engine.placement.rules import PlacementError, Rule, Rules, read_rules
from ktransformers.engine.placement.statistics import ExpertStatistics
from ktransformers.engine.plan import CannotFit, plan, usable
from ktransformers.engine.program import CacheShape, Experts, Linear, LinearPart, Program, Tensor
from ktransformers.kvcache.config import CacheConfig

KERNELS = tuple(_kernels.isas())
HOST = Limits(isa=KERNELS[0], threads=2, reads={2: 20e9}, peaks={"int8": 2e11, "bf16": 1e11, "f32": 5e10})
DEVICE = DeviceLimits("cuda", 1e12, {"f32": 5e13, "bf16": 2e14})


def tensor(name: str, rows: int, cols: int, experts: int = 1) -> Tensor:
    return Tensor(name, 0, rows, cols, np.zeros(rows * cols * 4, np.uint8), experts)


def moe(*layers: tuple[int, int]) -> Program:
    """A program of layers of (experts, rows of an expert): a projection, then experts; never run."""
    weights: list[Tensor] = []
    ops: list[Any] = []
    for n, (count, hidden) in enumerate(layers):
        weights.append(tensor(f"blk.{n}.attn_q.weight", 32, 32))
        weights += [tensor(f"blk.{n}.ffn_{m}_exps.weight", count * hidden, 32, count) for m in ("gate", "up")]
        weights.append(tensor(f"blk.{n}.ffn_down_exps.weight", count * 32, hidden, count))
        at = 5 * n
        ops.append(Linear(0, (LinearPart(at, None, 1),)))
        weights.append(tensor(f"blk.{n}.attn_norm.weight", 1, 32))
        ids: tuple[Any, ...] = (at + 1, at + 2, at + 3, None, None, None)
        ops.append(Experts(1, 2, 3, *ids, count, min(2, count), "silu", 1.0, 1.0, False))
    return Program(tuple(ops), (32, 32, 4, 32), tuple(weights), CacheShape(1, 1, 16), 32)


def names(program: Program) -> dict[str, int]:
    return {experts_name(program, op): op.experts for _, op in experts_ops(program)}


def counted(program: Program, **counts: list[int]) -> ExpertStatistics:
    statistics = ExpertStatistics(names(program))
    for layer, values in counts.items():
        statistics.add(layer.replace("_", ".") + ".experts", np.array(values, np.int64))
    return statistics


def on_device(placement: Placement) -> list[tuple[int, ...]]:
    return [p.on_device for p in placement.experts]


def placed(program: Program, room: int, *rules: Rule, statistics: Any = None, **said: Any) -> Placement:
    return place(program, Rules("p.toml", rules=rules, **said), room, statistics or counted(program))


EXPERT = 3 * 32 * 32 * 4
"""Bytes of an expert of 32 rows on the device."""


# ---- by itself


def test_the_hottest_come_first() -> None:
    program = moe((4, 32), (4, 32))
    hot = counted(program, blk_0=[1, 9, 0, 2], blk_1=[30, 5, 7, 20])
    assert on_device(placed(program, 3 * EXPERT, statistics=hot)) == [(1,), (0, 3)]
    assert on_device(placed(program, 3 * EXPERT, statistics=hot, policy="uniform")) == [(0, 1), (0,)]
    assert on_device(placed(program, 3 * EXPERT)) == [(0, 1), (0,)]
    assert on_device(placed(program, EXPERT - 1, statistics=hot)) == [(), ()]
    assert on_device(placed(program, 1 << 40)) == [(0, 1, 2, 3)] * 2


def test_a_small_expert_does_not_pass_a_hot_large_one() -> None:
    """It would be on the device with room for one, and not with room for three."""
    program = moe((1, 96), (1, 32))
    hot = counted(program, blk_0=[9], blk_1=[1])
    rooms = [on_device(placed(program, n * EXPERT, statistics=hot)) for n in (1, 3, 4)]
    assert rooms == [[(), ()], [(0,), ()], [(0,), (0,)]]


shapes = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96])), min_size=1, max_size=4)

policies = st.sampled_from(["uniform", "frequency", "adaptive"])


@settings(deadline=None, max_examples=150)
@given(shapes, st.data(), policies, st.sampled_from(["f32", "bf16"]))
def test_it_fits_any_budget_and_grows_with_it(shape: Any, data: Any, policy: Any, kind: str) -> None:
    program = moe(*shape)
    statistics = ExpertStatistics(names(program))
    for name, n in names(program).items():
        counts = data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
        statistics.add(name, np.array(counts, np.int64))
    rooms = sorted(data.draw(st.lists(st.integers(0, 20 * EXPERT), min_size=2, max_size=5)))
    kept = Rule(match="blk.*.experts", device="cpu", experts=(0,))
    rules = (Rule(match="blk.0.experts", format=kind), kept)
    before: set[tuple[int, int]] = set()
    for room in rooms:
        made = placed(program, room, *rules, statistics=statistics, policy=policy)
        assert sum(p.device_bytes for p in made.experts) <= room
        now = {(i, e) for i, p in enumerate(made.experts) for e in p.on_device}
        assert before <= now and all(e != 0 for _, e in now)
        before = now
        for p in made.experts:
            assert sorted({*p.on_device, *p.on_cpu}) == list(range(p.experts))
            assert len(p.in_memory) == (p.experts if p.copied else len(p.on_cpu))
    assert made.device_bytes == made.dense_bytes + sum(p.device_bytes for p in made.experts)


# ---- rules


def test_the_first_rule_that_says_it_counts() -> None:
    program = moe((4, 32), (4, 32))
    made = placed(
        program,
        2 * EXPERT,
        Rule(match="blk.1.*", format="bf16"),
        Rule(match="blk.1.experts", device="device", experts=(3,)),
        Rule(match="*.ffn_gate_exps", device="cpu", format="int8", kernel="reference"),
        Rule(match="*.experts", format="int4"),
        Rule(match="blk.0.experts", device="device"),
    )
    assert on_device(made) == [(), (3,)]
    assert [p.device_format for p in made.experts] == ["f32", "bf16"]
    assert [p.cpu_format for p in made.experts] == ["int8"] * 2
    assert [p.kernel for p in made.experts] == ["reference"] * 2
    assert made.formats[0] == "f32" and made.formats[5] == "bf16"
    rules = Rules("", rules=(Rule(match="blk.1.*", format="bf16"),))
    assert made.dense_bytes == 32 * 32 * (4 + 2) + 2 * 32 * 4 == dense_bytes(program, rules)
    assert made.experts[0].cpu_bytes == 4 * 3 * 32 * 34


FILE = """
memory_bytes = 5_000_000
policy = "uniform"
defer = 1
statistics = "counts.json"

[[rule]]
match = "blk.*.attn_*"
format = "bf16"

[[rule]]
match = "blk.0.experts"
device = "device"
experts = [1, 2]
"""


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(FILE)
    rules = read_rules(str(file), KERNELS)
    assert (rules.memory_bytes, rules.policy, rules.defer) == (5_000_000, "uniform", 1)
    assert rules.statistics == tmp_path / "counts.json"
    assert rules.rules == (
        Rule(match="blk.*.attn_*", format="bf16"),
        Rule(match="blk.0.experts", device="device", experts=(1, 2)),
    )
    assert read_rules("auto", KERNELS) == Rules("placement auto")


RULE = '[[rule]]\nmatch = "*.experts"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory = 5", "unknown key `memory`"),
        ("memory_bytes = 0", "memory_bytes: Expected `int` >= 1"),
        ("policy = 'hot'", "policy: Invalid enum value 'hot'"),
        ("defer = -1", "defer"),
        ("[[rules]]\nmatch = '*'", "unknown key `rules`"),
        ("[[rule]]\ndevice = 'cpu'", "rule 1: .*required field `match`"),
        (RULE + "device = 'cpu'\n" + RULE + "devise = 'cpu'", "rule 2: unknown key `devise`"),
        (RULE + "experts = [-1]", r"rule 1: experts\[0\]: Expected `int` >= 0"),
        (RULE, "rule 1: says neither device, format nor kernel"),
        (RULE + "device = 'cuda'", "rule 1: device 'cuda' is not known: 'device'"),
        (RULE + "format = 'q4'", "rule 1: format 'q4' is not known: f32, bf16, as-is, int8, int4"),
        (RULE + "device = 'cpu'\nformat = 'bf16'", "format 'bf16' is not known on 'cpu': as-is, int8, int4"),
        (RULE + "device = 'device'\nformat = 'int4'", "format 'int4' is not known on 'device': f32, bf16"),
        (RULE + "kernel = 'sse'", "kernel 'sse' is not known on this machine"),
        (RULE + "kernel = 'torch'\ndevice = 'cpu'", "kernel 'torch' is not known on 'cpu'"),
        (RULE + "format = 'int4'\nexperts = [1]", "say it in a rule without experts"),
        (RULE + "device = 'cpu'\nexperts = []", "experts is empty"),
        ("[[rule]\n", "Expected"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(PlacementError, match=says) as raised:
        read_rules(str(file), KERNELS)
    assert "p.toml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"none.toml: No such file.*'auto'"):
        read_rules(str(tmp_path / "none.toml"), KERNELS)
    (tmp_path / "b.toml").write_bytes(b"\xff")
    with pytest.raises(PlacementError, match="UTF-8"):
        read_rules(str(tmp_path / "b.toml"), KERNELS)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule(match="blk.7.*", device="cpu"), "match 'blk.7.\\*' matches nothing; there are blk.0.experts"),
        (Rule(match="blk.*.attn_norm", format="bf16"), "matches nothing"),
        (Rule(match="*", device="cpu"), "means blk.0.attn_q, too, and only experts can be on the cpu"),
        (Rule(match="*", format="int8"), "means blk.0.attn_q, too"),
        (Rule(match="*.attn_q", kernel="reference"), "means blk.0.attn_q, too"),
        (Rule(match="*.attn_q", device="device", experts=(0,)), "blk.0.attn_q.* has none"),
        (Rule(match="*.experts", device="cpu", experts=(4,)), "experts: 4: blk.0.experts has 0 to 3"),
        (Rule(match="*.experts", device="device"), "rules put 0.1 MiB .* 0.0 MiB are left"),
    ],
)
def test_rules_that_do_not_go_with_the_model(rule: Rule, says: str) -> None:
    program = moe((4, 32), (4, 32))
    good = Rule(match="*.attn_*", format="bf16")
    with pytest.raises(PlacementError, match=f"p.toml: (rule 2: |the ).*{says}"):
        placed(program, EXPERT, good, rule)


def test_not_all_of_a_token_can_be_deferred() -> None:
    with pytest.raises(PlacementError, match="defer: 2 of 2 experts"):
        placed(moe((4, 32)), 0, defer=2)


# ---- statistics


def test_recent_choices_count_more_where_asked_for() -> None:
    plain, fading = (ExpertStatistics({"a": 2}, half_life=h) for h in (float("inf"), 100.0))
    for statistics in (plain, fading):
        statistics.add("a", np.array([100, 0]))
        statistics.add("a", np.array([0, 90]))
    assert plain.of("a").tolist() == [100, 90] and plain.total == 190
    assert fading.of("a")[0] < 60 < fading.of("a")[1]


def test_statistics_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "folder" / "m.json"
    one = ExpertStatistics({"a": 2, "b": 3})
    one.load(file, "id")
    one.add("b", np.array([1, 2, 3]))
    one.save(file, "id")
    two = ExpertStatistics({"a": 2, "b": 3})
    two.load(file, "id")
    assert two.of("b").tolist() == [1, 2, 3] and not caplog.text
    good = json.loads(file.read_text())
    for broken in (
        "{",
        json.dumps(good | {"model": "other"}),
        json.dumps(good | {"version": 2}),
        json.dumps(good | {"counts": {"a": [0, 0], "b": [1, 2]}}),
        json.dumps(good | {"counts": {"a": [0, 0], "b": [1, 2, -3]}}),
        json.dumps(good | {"counts": {"a": [0, 0]}}),
    ):
        file.write_text(broken)
        caplog.clear()
        three = ExpertStatistics({"a": 2, "b": 3})
        three.load(file, "id")
        assert three.total == 0 and "begin anew" in caplog.text


def test_what_changes_places() -> None:
    program = moe((6, 32))
    fixed = Rule(match="*.experts", device="device", experts=(5,))
    for counts, expected in (
        ([10, 100, 60, 0, 0, 0], [(0, 2)]),
        ([10, 100, 20, 0, 0, 0], []),
        ([0, 0, 99, 98, 97, 0], [(1, 2), (0, 3)]),
    ):
        statistics = counted(program)
        made = placed(program, 3 * EXPERT, fixed, policy="adaptive", statistics=statistics).experts[0]
        assert made.on_device == (0, 1, 5) and made.copied and made.in_memory == tuple(range(6))
        statistics.add("blk.0.experts", np.array(counts))
        assert swaps(made, statistics, 2) == expected


# ---- within the memory there is


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Program, Facts]:
    """The default model with experts: 30 layers of 4."""
    import speaking

    path = str(speaking.write(tmp_path_factory.mktemp("model") / "moe.gguf", "mixtral"))
    return path, *open_model(EngineConfig(model=path))


def config_of(path: str, tmp_path: Path, text: str, **changes: Any) -> EngineConfig:
    file = tmp_path / "placement.toml"
    file.write_text(text)
    return EngineConfig(**{"model": path, "executor": "torch", "placement": str(file), **changes})


def test_a_budget_is_kept(model: tuple[str, Program, Facts], tmp_path: Path) -> None:
    path, program, facts = model
    last = -1
    for megabytes in (400, 500, 700, 5000):
        text = f"memory_bytes = {megabytes}_000_000"
        config = config_of(path, tmp_path, text, max_sequences=1, context=1024)
        made = plan(config, program, facts, 16 << 30)
        assert made.hybrid is not None
        needs = dict(made.needs)
        assert sum(n for what, n in made.needs if what != "experts on the cpu") <= megabytes * 1_000_000
        assert needs["weights but experts"] == made.hybrid.placement.dense_bytes
        here = sum(len(p.on_device) for p in made.hybrid.placement.experts)
        assert here > last or here == 120
        last = here
        # What is not on the device is with the CPU, in the format of the file.
        cpu = sum(p.cpu_bytes for p in made.hybrid.placement.experts)
        assert needs["experts on the cpu"] == cpu
    assert last == 120 and cpu == 0


def test_what_is_read_in_every_step_must_fit(model: tuple[str, Program, Facts], tmp_path: Path) -> None:
    path, program, facts = model
    with pytest.raises(CannotFit, match=r"(?s)weights but experts.*memory_bytes of the placement.*bf16"):
        plan(config_of(path, tmp_path, "memory_bytes = 100_000_000"), program, facts, 16 << 30)
    with pytest.raises(PlacementError, match=r"memory_bytes 99.*: the device has 17179869184 free"):
        plan(config_of(path, tmp_path, "memory_bytes = 99_000_000_000"), program, facts, 16 << 30)
    # The CPU's part is part of the same memory here.
    with pytest.raises(CannotFit, match="experts on the cpu"):
        plan(config_of(path, tmp_path, "memory_bytes = 430_000_000"), program, facts, 460_000_000)


def test_auto(model: tuple[str, Program, Facts]) -> None:
    """Device and CPU share the memory here: both sides fit what is usable of it."""
    path, program, facts = model
    config = EngineConfig(model=path, executor="torch", placement="auto", max_sequences=1, context=1024)
    here = []
    for available in (500 << 20, 600 << 20, 800 << 20, 16 << 30):
        made = plan(config, program, facts, available)
        assert made.hybrid is not None and made.hybrid.records.path is None
        assert sum(n for _, n in made.needs) <= usable(available)
        here.append(sum(len(p.on_device) for p in made.hybrid.placement.experts))
    assert here == sorted(here) and 0 < here[1] < here[2] and here[-1] == 120
    with pytest.raises(CannotFit, match="experts on the cpu"):
        plan(config, program, facts, 350 << 20)


def test_statistics_of_the_model_are_read(model: tuple[str, Program, Facts], tmp_path: Path) -> None:
    path, program, facts = model
    cache = CacheConfig(cache_dir=str(tmp_path / "kv"))
    config = config_of(path, tmp_path, "memory_bytes = 450_000_000", cache=cache, max_sequences=1)
    before = plan(config, program, facts, 16 << 30).hybrid
    assert before is not None and before.records.path is not None
    assert before.records.path.parent == tmp_path / "kv-experts"
    before.records.statistics.add("blk.9.experts", np.array([0, 0, 0, 500]))
    before.records.save()
    after = plan(config, program, facts, 16 << 30).hybrid
    assert after is not None and 3 in after.placement.experts[9].on_device
    assert 3 not in before.placement.experts[9].on_device


def test_settings_that_do_not_go_together(model: tuple[str, Program, Facts], tmp_path: Path) -> None:
    path, program, facts = model
    for changes, says in (
        ({"executor": "native"}, "placement: the native executor.*torch:cuda"),
        ({"expert_bytes": 1 << 30}, "not together with expert_bytes"),
    ):
        with pytest.raises(ModelError, match=says):
            plan(config_of(path, tmp_path, "", **changes), program, facts)


# ---- what it costs


def total(rows: list[PlacedRow]) -> float:
    return sum(row.seconds for row in rows)


def test_predicted_time(model: tuple[str, Program, Facts]) -> None:
    _, program, _ = model
    statistics = ExpertStatistics({f"blk.{n}.experts": 4 for n in range(30)})
    none = place(program, Rules("p"), 0, statistics)
    rows = predict(program, none, statistics, DEVICE, HOST)
    assert [row.row.index for row in rows] == list(range(len(program.ops)))
    experts = [row for row in rows if row.row.kind == "Experts"]
    # All four of a layer are chosen, in 4 bits from the CPU's memory.
    for row, p in zip(experts, none.experts, strict=True):
        assert row.device_bytes == 0 and row.cpu_bytes == p.cpu_bytes
        assert row.cpu_seconds == pytest.approx(p.cpu_bytes / 20e9) and row.device_seconds == 0
        assert row.formats == "Q4_1"
    every = place(program, Rules("p", rules=(Rule(match="*", format="bf16"),)), 1 << 40, statistics)
    fast = predict(program, every, statistics, DEVICE, HOST)
    assert {row.cpu_seconds for row in fast} == {0.0} and total(fast) < total(rows) / 8
    assert sum(row.device_bytes for row in fast) == every.device_bytes
    some = place(program, Rules("p"), every.device_bytes, statistics)
    half = predict(program, some, statistics, DEVICE, HOST)
    assert total(fast) < total(half) < total(rows)
    assert total(predict(program, none, statistics, DEVICE, HOST, tokens=64)) < 64 * total(rows)


def test_hot_experts_save_more_than_others() -> None:
    program = moe((4, 32))
    statistics = counted(program, blk_0=[0, 0, 10, 90])
    made = placed(program, 0, statistics=statistics).experts[0]
    assert chances(made, statistics.of("blk.0.experts")).tolist() == [0, 0, 0.2, 1.0]
    assert chances(made, np.zeros(4)).tolist() == [0.5] * 4
    program = replace(program, ops=program.ops[1:])

    def seconds(expert: int) -> float:
        rule = Rule(match="*.experts", device="device", experts=(expert,))
        made = placed(program, EXPERT, rule, statistics=statistics)
        return total(predict(program, made, statistics, DEVICE, HOST))

    assert seconds(3) < seconds(0) / 3
