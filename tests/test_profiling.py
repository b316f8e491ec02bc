"""--profile: which calls are traced, what a trace says, and by which names a person sees it."""

import argparse
import json
import os
import re

import diffusers
import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from cogvideox.cli.report import Report
from cogvideox.errors import UserError
from cogvideox.hlo_schedule import parse_instruction
from cogvideox.run import accelerator, profiling
from cogvideox.run.profiling import Profile
from tests.helpers import LATENTS, SIZE, STAGE2, STAGE3, STAGE3_FLAX, values

# --- Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/patch_embed/dot_general", ("patch_embed", "dot_general")),
        ("jit(step)/while/body/closed_call/blocks.{4}/ff/bsi,nhi->bnsh/dot_general", ("blocks.{4}.ff", "dot_general")),
        ("jit(step)/while/body/checkpoint/blocks.{2}/attn1/vmap(jit(_where))/gt", ("blocks.{2}.attn1", "gt")),
        ("jit(run)/up_blocks.1/up_blocks.1.upsamplers.0/add", ("up_blocks.1.upsamplers.0", "add")),
        ("jit(step)/while/body/blocks.{4}/attn1/exp2_splash/pallas_call", ("blocks.{4}.attn1", "exp2_splash")),
        ("jit(run)/aten::add.Tensor/add", ("", "add")),
        ("jit(step)/...i,oi->...o/dot_general", ("", "dot_general")),
        ("jit(step)/mul", ("", "mul")),
        ("reduce_sum", ("", "reduce_sum")),
        (None, None),
    ],
)  # fmt: skip
def test_scope(op_name, expected):
    metadata = f', metadata={{op_name="{op_name}" stack_frame_id=4}}' if op_name else ""
    assert profiling.scope(parse_instruction(f"  %add.1 = f32[2]{{0}} add(%a, %b){metadata}")) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("transformer_blocks.{42}.attn1", "transformer_blocks.*.attn1"),
        ("up_blocks.3.resnets.1.conv1", "up_blocks.3.resnets.*.conv1"),
        ("up_blocks.3.upsamplers.0", "up_blocks.3.upsamplers.0"),
        ("norm_out", "norm_out"),
    ],
)
def test_numbers_of_equal_blocks_are_folded(module, expected):
    assert profiling.folded(module) == expected


HLO = """HloModule jit_step, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %tanh.1 = f32[2]{0} tanh(%p), metadata={op_name="jit(step)/blocks.{2}/ff/tanh"}
}

ENTRY %main (a: f32[2], w: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0), metadata={op_name="arguments[1]"}
  %w = f32[2]{0} parameter(1), metadata={op_name="arguments[0]['head.linear.weight']"}
  %fusion.7 = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused
  %copy.1 = f32[2]{0} copy(%fusion.7)
  %attention = f32[2]{0} add(%copy.1, %copy.1), metadata={op_name="jit(step)/blocks.{2}/attn1/add"}
  %convert.2 = f32[2]{0} convert(%w)
  %dot.3 = f32[2]{0} dot(%attention, %convert.2)
  %copy.4 = f32[2]{0} copy(%dot.3)
  %scaled = f32[2]{0} multiply(%copy.4, %copy.4), metadata={op_name="jit(step)/mul"}
  ROOT %head = f32[2]{0} add(%a, %a), metadata={op_name="jit(step)/head/add"}
}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention", ("blocks.{2}.attn1", "add")),
        ("fusion.7", ("blocks.{2}.ff", "fusion")),  # by what is inside
        ("dot.3", ("head", "dot")),  # by its weight
        ("convert.2", ("head", "convert")),
        ("copy.1", ("blocks.{2}.attn1", "copy")),  # by what uses it
        ("copy.4", ("head", "copy")),  # by what it uses, as nothing else is in a module
        ("scaled", ("", "mul")),
    ],
)
def test_what_the_compiler_made_has_the_name_of_what_it_serves(name, expected):
    names = profiling.Names(HLO)
    assert name in names and "fusion.8" not in names
    assert names.find(name) == expected


def test_text_that_is_no_program():
    assert "add.1" not in profiling.Names("")


# --- A trace as a TPU writes it ----------------------------------------------------------------------------------


def tpu_trace() -> ProfileData:
    """Make a trace of two chips: a loop of 100 us around attention (60) and ff (30), then a scalar's conversion (10).

    Operations are named by their instruction's text, the times are in picoseconds, and other lines repeat them.
    """
    operations = [
        ("%while.1 = (f32[2]) while(%t), body=%body", 0, 100),
        ("%attention = f32[2]{0} add(%copy.1, %copy.1)", 0, 60),
        ("%fusion.7 = f32[2]{0} fusion(%a), calls=%fused", 65, 30),
        ("%convert_element_type.9 = s32[] convert(%x)", 100, 10),
    ]
    metadata = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n'
        for i, (name, _, _) in enumerate(operations, 1)
    )
    events = "".join(
        f"events {{ metadata_id: {i} offset_ps: {start * 10**6} duration_ps: {duration * 10**6} }}\n"
        for i, (_, start, duration) in enumerate(operations, 1)
    )
    planes = "".join(
        f'planes {{ id: {chip} name: "/device:TPU:{chip}"\n'
        f'lines {{ id: 1 name: "XLA Modules" {events} }}\n'
        f'lines {{ id: 2 name: "XLA Ops" {events} }}\n'
        f'lines {{ id: 3 name: "Async XLA Ops" {events} }}\n{metadata} }}\n'
        for chip in (0, 1)
    )
    host = f'planes {{ id: 9 name: "/host:CPU" lines {{ id: 1 name: "thread" {events} }} {metadata} }}'
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(planes + host))


def test_table_of_a_tpu():
    """The loop has only the time that its body leaves, and the names of both chips are together."""
    operations = list(profiling.operations_of(tpu_trace()))
    assert {operation.device for operation in operations} == {"/device:TPU:0", "/device:TPU:1"}
    hlo = HLO.replace(
        "  ROOT %head", '  %while.1 = (f32[2]) while(%a), metadata={op_name="jit(step)/while"}\n  ROOT %head'
    )
    found = {row.name: row.nanoseconds for row in profiling.table(operations, hlo)}
    expected = {
        "blocks.*.attn1": 120_000,
        "blocks.*.ff": 60_000,
        profiling.OUTSIDE: 20_000,
        profiling.OTHER: 20_000,
    }
    assert found == expected
    assert list(found) == list(expected), "the most expensive come first"


# --- A trace as a GPU writes it ----------------------------------------------------------------------------------

GPU_HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,8]{1,0})->bf16[8,8]{1,0}}

%fused_add (p.1: bf16[8,8]) -> bf16[8,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %add.2 = bf16[8,8]{1,0} add(%p.1, %p.1), metadata={op_name="jit(step)/while/body/blocks.{2}/norm1/add"}
}

%command_buffer (p.2: bf16[8,8]) -> (bf16[8,8], s8[64]) {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  %loop_add_fusion.3 = bf16[8,8]{1,0} fusion(%p.2), kind=kLoop, calls=%fused_add, metadata={op_name="jit(step)/while/body/blocks.{2}/norm1/add"}, backend_config={"kind":"__loop_fusion"}
  %cudnn.4 = (bf16[8,8]{1,0}, u8[0]{0}) custom-call(%loop_add_fusion.3), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/while/body/blocks.{2}/attn1/dot_product_attention"}, backend_config={"fmha":{"a":[1,2]}}
  %gte.5 = bf16[8,8]{1,0} get-tuple-element(%cudnn.4), index=0
  ROOT %custom-call.6 = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%gte.5, %gte.5), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/while/body/blocks.{2}/ff/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_batch_dimensions":[]}}}
}

ENTRY %main.7 (a: bf16[8,8]) -> (bf16[8,8], s8[64]) {
  %a = bf16[8,8]{1,0} parameter(0), metadata={op_name="arguments[0]"}
  ROOT %call.8 = (bf16[8,8]{1,0}, s8[64]{0}) call(%a), to_apply=%command_buffer
}
"""  # noqa: E501
GPU_KERNELS = (  # name of the kernel, its operation by the trace and in a graph, nanoseconds
    ("loop_add_fusion_3", "loop_add_fusion.3", 10_000),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64", "cudnn.4", 60_000),
    ("void cutlass::Kernel2<nvjet_tst_128x256>(Params)", "custom-call.6", 20_000),
)


def gpu_trace(in_a_graph: bool) -> ProfileData:
    """Make a trace of a GPU: kernels in a stream, which say their operation and program, and a copy, which does not."""
    names = [kernel for kernel, _, _ in GPU_KERNELS] + ["convert", "MemcpyD2D"]
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(names))
    metadata += "".join(
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(["hlo_op", "hlo_module"])
    )
    events, start = "", 0
    operations = [("command_buffer_1" if in_a_graph else op, "jit_step", ns) for _, op, ns in GPU_KERNELS]
    for i, (operation, module, ns) in enumerate([*operations, ("convert", "jit_convert", 5_000), (None, None, 9_000)]):
        stats = f'stats {{ metadata_id: 0 str_value: "{operation}" }} stats {{ metadata_id: 1 str_value: "{module}" }}'
        events += (
            f"events {{ metadata_id: {i} offset_ps: {start} duration_ps: {ns * 1000} {stats if module else ''} }}\n"
        )
        start += ns * 1000
    line = f'lines {{ id: 1 name: "Stream #13(Compute,MemcpyD2D)" {events} }}'
    plane = f'planes {{ id: 1 name: "/device:GPU:0" {line} {metadata} }}'
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(plane))


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_table_of_a_gpu(in_a_graph):
    """Products by cuBLAS and attention by cuDNN have their modules, or in a graph the names of their kernels."""
    operations = list(profiling.operations_of(gpu_trace(in_a_graph)))
    found = {row.name: row.nanoseconds for row in profiling.table(operations, GPU_HLO)}
    attention, product = "blocks.*.attn1", "blocks.*.ff"
    if in_a_graph:
        attention, product = (profiling.kernel_name(GPU_KERNELS[i][0]) for i in (1, 2))
        assert product == "kernel cutlass::Kernel2" and attention.startswith("kernel cudnn_generated_fort")
    assert found == {attention: 60_000, product: 20_000, "blocks.*.norm1": 10_000, profiling.OTHER: 5_000}


@pytest.mark.parametrize(
    ("platforms", "flags", "profiled", "expected"),
    [
        ("cuda,cpu", None, True, accelerator.NO_GRAPHS),
        ("cuda", "--a=b", True, f"--a=b {accelerator.NO_GRAPHS}"),
        ("cuda", f"{accelerator.NO_GRAPHS}FUSION", True, f"{accelerator.NO_GRAPHS}FUSION"),
        ("cuda", None, False, None),
        ("tpu,cpu", None, True, None),
    ],
)
def test_no_graphs_in_a_trace(platforms, flags, profiled, expected, monkeypatch):
    """Else a GPU's trace names a graph where there are operations."""
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": platforms} | ({"XLA_FLAGS": flags} if flags else {}))
    accelerator.prepare_libraries(profiled)
    assert os.environ.get("XLA_FLAGS") == expected
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"  # without the warnings of the autotuner


# --- A trace of this machine -------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path) -> Report:
    return Report("stage2", "program", argparse.Namespace(verbose=False, quiet=False, log_json=tmp_path / "log.jsonl"))


@pytest.mark.parametrize(("calls", "traced"), [(1, [0]), (2, [1]), (3, [1, 2]), (9, [1, 2])])
def test_which_calls_are_traced(calls, traced, report, tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    programs = Profile(tmp_path / "trace", "step", report).traced([happened.append, happened.append], calls)
    for i in range(calls):
        programs[min(i, 1)](i)
    first, last = traced[0], traced[-1]
    assert happened == [*range(first), "start", *traced, "stop", *range(last + 1, calls)]


def test_without_a_folder_nothing_is_wrapped(report):
    profile = Profile(None, "step", report)
    program = lambda: None  # noqa: E731
    assert profile.traced([program], 3) == [program]
    profile.show()


def test_a_folder_that_cannot_be(report, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Profile(tmp_path / "file", "step", report)


def test_names_and_shares_of_a_trace(report, tmp_path, capsys):
    """One scope with nearly all the work, in a program whose answer the trace must not change."""

    def step(x):
        def body(x, _):
            with jax.named_scope("blocks.{4}"):
                with jax.named_scope("attn1"):
                    x = jnp.tanh(x @ x)
                with jax.named_scope("norm1"):
                    return x / jnp.sum(x[0]), None

        return jax.lax.scan(body, x, length=4)[0]

    x = jnp.ones((400, 400)) / 400
    program = jax.jit(step).lower(x).compile()
    profile = Profile(tmp_path / "trace", "step", report)
    (traced,) = profile.traced([program], 3)
    for _ in range(3):
        assert jnp.array_equal(traced(x), program(x))
    profile.show()
    (trace,) = (tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb")
    assert b"blocks.{4}/attn1" in trace.read_bytes()
    printed = capsys.readouterr().out
    assert "profile of 2 steps" in printed and "on the CPU" in printed, printed
    assert re.search(r"^ +\d+\.\d% +\d+\.\d+ ms  blocks\.\*\.attn1: ", printed.splitlines()[1]), printed
    event = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-2])
    assert event["event"] == "profile" and event["calls"] == 2
    assert sum(name["share"] for name in event["names"].values()) == pytest.approx(1)


def test_a_trace_that_cannot_be_written_does_not_end_the_run(report, tmp_path, monkeypatch, capsys):
    def fail():
        raise jax.errors.JaxRuntimeError("no space left")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = Profile(tmp_path / "trace", "step", report)
    (traced,) = profile.traced([lambda x: x + 1], 2)
    assert [traced(1), traced(2)] == [2, 3]
    profile.show()
    assert "WARNING" in (printed := capsys.readouterr().out) and "no space left" in printed


# --- The stages --------------------------------------------------------------------------------------------------


def shares(output: str) -> dict[str, float]:
    """Return the percentages of the table by name."""
    return {
        match[2]: float(match[1]) for match in re.finditer(r"^ +([\d.]+)% +[\d.]+ ms  (.+?): ", output, re.MULTILINE)
    }


def module_names(module) -> set[str]:
    """Return the names of all modules of a diffusers model, with a * for the numbers that the table folds."""
    names = [re.sub(r"(transformer_blocks|resnets)\.\d+", r"\1.*", name) for name, _ in module.named_modules()]
    return set(names) | {profiling.OUTSIDE, profiling.OTHER}


@pytest.mark.slow
@pytest.mark.parametrize("virtual_devices", [False, True])
def test_stage2(outputs, random_model, run_stage, tmp_path, virtual_devices):
    before = values(outputs / LATENTS)
    options = ("--profile", tmp_path / "trace", "--log_json", tmp_path / "log.jsonl")
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, virtual_devices=virtual_devices)
    if not virtual_devices:
        assert values(outputs / LATENTS) == before, "the profile changed the result"
    assert "profile of one step" in process.stdout, process.stdout  # the second of two
    (trace,) = (tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb")
    assert b"/attn1/" in trace.read_bytes()
    found = shares(process.stdout)
    assert {"transformer_blocks.*.attn1", "transformer_blocks.*.ff"} <= set(found), process.stdout
    assert 90 < sum(found.values()) <= 100.5, process.stdout
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(random_model, subfolder="transformer")
    assert set(found) <= module_names(model), set(found) - module_names(model)
    assert json.loads((outputs / "timings.json").read_text())["stage2"]["profiled"] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("script", [STAGE3, STAGE3_FLAX])
def test_stage3(script, outputs, random_model, run_stage, tmp_path):
    process = run_stage(script, "--input_dir", outputs, "--profile", tmp_path / "trace")
    assert "profile of one chunk" in process.stdout, process.stdout  # 9 frames are one
    found = shares(process.stdout)
    assert len(found) == profiling.ROWS and sum(found.values()) <= 100.5, process.stdout
    decoder = diffusers.AutoencoderKLCogVideoX.from_pretrained(random_model, subfolder="vae").decoder
    assert set(found) <= module_names(decoder), set(found) - module_names(decoder)
