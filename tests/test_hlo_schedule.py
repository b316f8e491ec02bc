"""The reader of scheduled HLO, on programs whose counts are known, and the model of collectives."""

import numpy as np
import pytest

from cogvideox.hlo_schedule import HloError, Program, costs, replica_groups
from compile_for_tpu import topologies

ESTIMATE = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def program(*, bound="constant(42)", start="constant(0)", body_cycles=1000) -> str:
    """Write a loop over a fusion with a matrix product, a kernel and a collective, as the TPU compiler prints them."""
    return f"""HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/models/transformer.py"

FunctionNames
1 "f"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=77 end_line=77 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

%fused_matmul (p.1: bf16[8,128], p.2: bf16[128,128]) -> bf16[8,128] {{
  %p.1 = bf16[8,128]{{1,0}} parameter(0)
  %p.2 = bf16[128,128]{{1,0}} parameter(1)
  ROOT %conv = bf16[8,128]{{1,0}} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}}

%fused_copy (p.3: bf16[8,128]) -> bf16[128,8] {{
  %p.3 = bf16[8,128]{{1,0}} parameter(0)
  ROOT %t = bf16[128,8]{{1,0}} transpose(%p.3), dimensions={{1,0}}
}}

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {{
  %state.1 = (s32[], bf16[8,128]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] {bound}
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}}

%body (state.2: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {{
  %state.2 = (s32[], bf16[8,128]{{1,0}}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %x.2 = bf16[8,128]{{1,0}} get-tuple-element(%state.2), index=1
  %matmul = bf16[8,128]{{1,0}} fusion(%x.2, %x.2), kind=kOutput, calls=%fused_matmul, metadata={{op_name="jit(f)/while/dot_general" stack_frame_id=1}}, {ESTIMATE.format(body_cycles)}
  %kernel = bf16[8,128]{{1,0}} custom-call(%matmul), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, backend_config={{"flag_configs":[]}}
  %gather-start = (bf16[8,128]{{1,0}}, bf16[32,128]{{1,0}}) all-gather-start(%kernel), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %moved = bf16[128,8]{{1,0}} fusion(%kernel), kind=kLoop, calls=%fused_copy, {ESTIMATE.format(50)}
  %gather-done = bf16[32,128]{{1,0}} all-gather-done(%gather-start)
  %one = s32[] constant(1)
  %next = s32[] add(%i.2, %one)
  ROOT %out = (s32[], bf16[8,128]{{1,0}}) tuple(%next, %kernel)
}}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{
  %x = bf16[8,128]{{1,0}} parameter(0)
  %zero = s32[] {start}
  %state = (s32[], bf16[8,128]{{1,0}}) tuple(%zero, %x)
  %loop = (s32[], bf16[8,128]{{1,0}}) while(%state), condition=%condition, body=%body
  ROOT %result = bf16[8,128]{{1,0}} get-tuple-element(%loop), index=1
}}
"""  # noqa: E501


def test_costs_of_a_known_loop():
    found = costs(
        Program.parse(program()), 100.0, lambda name, size: {"kernel": 3.0}[name], lambda opcode, size, group: 2.0
    )
    by_name = {cost.name: cost for cost in found}
    assert {name: (cost.category, cost.times) for name, cost in by_name.items()} == {
        "matmul": ("matrix products", 42),
        "kernel": ("Pallas kernels", 42),
        "moved": ("layout copies", 42),
        "gather-done": ("collectives", 42),
    }
    assert by_name["matmul"].seconds == pytest.approx(42 * 10)
    assert by_name["kernel"].seconds == pytest.approx(42 * 3)
    assert by_name["gather-done"].seconds == pytest.approx(42 * (2 - 0.5))  # the copy hides a part
    assert by_name["matmul"].source == "transformer.py:77 dot_general"


def test_loop_around_a_rare_kernel_counts_as_not_run():
    text = program(bound="parameter(1)")
    assert costs(Program.parse(text), 1.0, {}.__getitem__, lambda *_: 0.0, rare_kernels=["kern"]) == []


def test_loop_around_a_kernel_that_runs_once():
    """Or not at all, which depends on data."""
    text = program(bound="parameter(1)")
    found = costs(Program.parse(text), 1.0, lambda *_: 2.0, lambda *_: 0.0, kernels_run_once=["kern"])
    assert [(cost.seconds, cost.times) for cost in found if cost.name.startswith("kern")] == [(2.0, 1)]


@pytest.mark.parametrize("part", [dict(bound="add(%i.1, %i.1)"), dict(start="parameter(1)")])
def test_unreadable_trip_count_is_an_error(part):
    with pytest.raises(HloError, match="loop"):
        costs(Program.parse(program(**part)), 1.0, lambda *_: 0.0, lambda *_: 0.0)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(text) == groups


def test_collectives_on_a_2x4_slice():
    """Against counting by hand what crosses the links: one way, 100 bytes a second each."""
    places = {y * 2 + x: (x, y, 0) for x in range(2) for y in range(4)}
    seconds = lambda opcode, group: topologies.collective_seconds(opcode, 1200, group, places, 100.0)  # noqa: E731
    assert seconds("all-gather", [0]) == 0
    assert seconds("all-gather", [0, 1]) == pytest.approx(12)  # the other's 1200 bytes on one link
    assert seconds("all-gather", [0, 1, 2, 3]) == pytest.approx(18)  # a square: 3 x 1200 bytes on two links
    assert seconds("all-gather", [0, 2, 4, 6]) == pytest.approx(36)  # a line: the end chip has one link
    assert seconds("reduce-scatter", [0, 1, 2, 3]) == pytest.approx(4.5)
    assert seconds("all-reduce", [0, 1, 2, 3]) == pytest.approx(9)
    assert seconds("all-to-all", [0, 1, 2, 3]) == pytest.approx(6)  # 2 x 2 x 300 bytes over the two middle links
    assert seconds("all-to-all", range(8)) == pytest.approx(12)  # 4 x 4 x 150 bytes over two links
    with pytest.raises(ValueError, match="broadcast"):
        seconds("collective-broadcast", [0, 1])


def test_every_slice_has_a_chip():
    for topology in topologies.TOPOLOGIES.keys() - {"cpu"}:
        assert np.isfinite(topologies.chip(topology).clock)
