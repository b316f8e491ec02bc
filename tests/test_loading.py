"""Weights from files to devices against arrays that NumPy puts together, and what a stage imports."""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from jax.experimental.compilation_cache import compilation_cache
from safetensors import safe_open
from safetensors.numpy import save_file

from cogvideox.errors import UserError
from cogvideox.files import checkpoint
from cogvideox.files.tensors import compute_dtype
from cogvideox.models.shared import loading
from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.shared.sharding import Parallelism, make_mesh
from cogvideox.models.transformer import parameters
from cogvideox.models.vae.plan import DECODERS, make_decoding_plan
from cogvideox.run import decoding, page_cache
from compile_for_tpu import programs, topologies
from tests.helpers import ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX, needs_libtpu

CONFIG_5B = json.loads((ROOT / "configs" / "CogVideoX1.5-5B" / "transformer" / "config.json").read_text())
EIGHT_HEADS = CONFIG_5B | dict(
    num_attention_heads=8, attention_head_dim=16, num_layers=3, time_embed_dim=24, text_embed_dim=40
)
EIGHT_HEADS |= dict(in_channels=8, out_channels=4, ofs_embed_dim=24)  # with an image
SIX_HEADS = CONFIG_5B | dict(
    num_attention_heads=6, attention_head_dim=8, num_layers=2, time_embed_dim=10, text_embed_dim=6, out_channels=16
)
SIX_HEADS |= dict(patch_size_t=None, patch_bias=True, use_learned_positional_embeddings=True)  # flat patches
SIX_HEADS |= dict(sample_height=6, sample_width=8, sample_frames=9, max_text_seq_length=5)
PLAIN = CONFIG_5B | dict(num_layers=1, attention_bias=False, norm_elementwise_affine=False, patch_size_t=3)
FIXED = CONFIG_5B | dict(num_layers=1, patch_size_t=None, patch_bias=False, use_rotary_positional_embeddings=False)


@pytest.mark.parametrize(
    "config", [CONFIG_5B, EIGHT_HEADS, SIX_HEADS, PLAIN, FIXED], ids=["5B", "8", "6", "plain", "fixed"]
)
def test_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        module = CogVideoXTransformer3DModel.from_config(config)
    theirs = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    assert parameters.stored_shapes(config) == theirs


@pytest.fixture
def no_compilation_cache():
    """Compile anew: a CPU's program from jax's cache runs collectives at once that XLA then takes for one, and dies."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def random_bits(shape: tuple[int, ...], dtype: np.dtype, random: np.random.Generator) -> np.ndarray:
    """Make an array of random bits, but without NaNs: a CPU gathers bfloat16 as float32, which changes their bits."""
    array = np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    with np.errstate(invalid="ignore"):  # it warns of the NaNs that it looks for
        return np.where(np.isnan(array), np.ones((), dtype), array)


def expected_parameter(name: str, stored: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """Stack the layers of a parameter, and put the rotary pairs (2i, 2i + 1) of a head at (i, half + i), row by row."""
    if name == "patch_embed.proj.weight":  # a convolution's, too, is a matrix
        return stored[name].reshape(len(stored[name]), -1)
    if not name.startswith("blocks."):
        return stored[name]
    stacked = np.stack(
        [stored[name.replace("blocks.", f"transformer_blocks.{i}.")] for i in range(config["num_layers"])]
    )
    if not any(part in name for part in ("to_q.", "to_k.", "norm_q.", "norm_k.")):
        return stacked
    size, moved = config["attention_head_dim"], np.empty_like(stacked)
    for row in range(stacked.shape[1]):
        head, position = divmod(row, size)
        moved[:, head * size + position // 2 + position % 2 * (size // 2)] = stacked[:, row]
    return moved


def assert_same_bits(array: jax.Array, expected: np.ndarray, what: str) -> None:
    """Check dtype, the whole array, and the copy of every device."""
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape), what
    for shard in array.addressable_shards:
        different = np.asarray(shard.data).tobytes() != np.ascontiguousarray(expected[shard.index]).tobytes()
        assert not different, f"{what}: wrong values on {shard.device} at {shard.index}"


@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("scatter", [False, True], ids=["each its own", "scattered"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("config", "mesh", "dtype"),
    [
        (EIGHT_HEADS, (1, 1, 1), ml_dtypes.bfloat16),
        (EIGHT_HEADS, (2, 2, 2), ml_dtypes.bfloat16),
        (EIGHT_HEADS, (1, 8, 1), np.float32),
        (EIGHT_HEADS, (1, 1, 8), ml_dtypes.bfloat16),
        (SIX_HEADS, (1, 1, 1), np.float32),
        (SIX_HEADS, (2, 3, 1), ml_dtypes.bfloat16),
        (SIX_HEADS, (1, 2, 3), ml_dtypes.bfloat16),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_parameters(config, mesh, dtype, layout, scatter, monkeypatch):
    monkeypatch.setattr(loading, "SMALL", 0)
    monkeypatch.setattr(parameters, "load_arrays", functools.partial(loading.load_arrays, scatter=scatter))
    random = np.random.default_rng(0)
    shapes = parameters.stored_shapes(config)
    stored = {name: random_bits(shape, np.dtype(dtype), random) for name, shape in shapes.items()}
    sizes = dict(zip(("dp", "sp", "tp"), mesh, strict=True))
    parallelism = Parallelism(make_mesh(sizes, jax.devices()[: np.prod(mesh)]), layout)
    loaded = parameters.load_parameters(stored.__getitem__, config, parallelism, dtype)
    assert loaded.keys() == parameters.parameter_shapes(config).keys()
    for name, array in loaded.items():
        assert array.sharding == parallelism.sharding(*parameters.parameter_spec(name, layout)), name
        assert_same_bits(array, expected_parameter(name, stored, config), name)


def wanted_array(shape: tuple[int, ...], *spec: str | None, dp: int = 2, sp: int = 4) -> jax.ShapeDtypeStruct:
    sizes = {"dp": dp, "sp": sp, "tp": 8 // (dp * sp)}
    parallelism = Parallelism(make_mesh(sizes, jax.devices()))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallelism.sharding(*spec))


@pytest.mark.parametrize(
    ("shape", "spec", "further"),
    [
        ((1024, 1024), (), (0, ("dp", "sp"))),
        ((1023, 1032), (), (1, ("dp", "sp"))),
        ((1028, 3, 1024), ("sp",), (2, ("dp",))),  # the 257 rows of a chip do not divide by 2
        ((1024, 1024), ("dp", "sp"), None),  # no two chips hold the same part
        ((1023, 1025), (), None),  # no axis divides
        ((8, 8), (), None),  # small
    ],
    ids=str,
)
def test_each_byte_is_read_once(shape, spec, further):
    array = wanted_array(shape, *spec)
    scatter = loading.scatter_of(array)
    assert (scatter and scatter[1:]) == further
    whole, filled = random_bits(shape, np.dtype(np.float32), np.random.default_rng(0)), []

    def fill(_, index, part):
        filled.append(part.size)
        part[...] = whole[index]

    told, start = {}, time.perf_counter()
    loaded = loading.load_arrays({"array": array}, fill, scatter=True, told=told.__setitem__)
    assert_same_bits(loaded["array"], whole, "array")
    assert sum(filled) == whole.size, f"{sum(filled)} values were copied for {whole.size}"
    assert list(told) == ["reading", "placing"] and min(told.values()) > 0
    assert sum(told.values()) <= time.perf_counter() - start, "of all threads, not of the load"


COMPILE_GATHER = """
import json, math, jax.numpy as jnp
from compile_for_tpu import topologies
from cogvideox.models.shared import loading
from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.shared.sharding import Parallelism, make_mesh
from cogvideox.models.transformer.parameters import abstract_parameters
config = json.load(open("configs/CogVideoX1.5-5B/transformer/config.json"))
for layout in LAYOUTS:
    parallelism = Parallelism(make_mesh({"dp": 2, "sp": 2, "tp": 2}, topologies.devices("v6e-8")), layout)
    wanted = abstract_parameters(config, jnp.bfloat16, parallelism)
    scatters = {name: scatter for name, array in wanted.items() if (scatter := loading.scatter_of(array))}
    with topologies.compiling_for(parallelism.mesh):
        used = loading.compile_gather(wanted, scatters).memory_analysis()
    whole = sum(2 * math.prod(wanted[name].shape) for name in scatters)
    print(used.argument_size_in_bytes, used.temp_size_in_bytes, used.output_size_in_bytes, whole)
"""


@pytest.mark.slow
@needs_libtpu
def test_gather_on_v6e_8_takes_no_memory_beside_its_arguments_and_results():
    """The 5B model's parameters; without loops over the layers, the program needed their size a second time."""
    environment = os.environ | topologies.compiler_environment("v6e-8")
    command = [sys.executable, "-c", COMPILE_GATHER]
    process = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    for line in process.stdout.splitlines():
        arguments, temporaries, results, whole = map(int, line.split())
        assert results > 1e9 and temporaries < 0.01 * results, f"{temporaries:,} bytes beside {results:,}"
        assert arguments == pytest.approx(whole / 8, rel=0.01), f"{arguments * 8:,} bytes are sent of {whole:,}"


def test_parts_in_flight():
    """As many parts at a time as there are devices, and one more: the host's memory is bounded by that."""
    wanted = {i: wanted_array((16, 8), "sp", dp=1, sp=8) for i in range(8)}
    lock, together, now, most = threading.Lock(), threading.Barrier(9), 0, 0

    def fill(i, index, part):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if i == 0 or (i == 1 and index[0].start == 0):  # the first nine
            together.wait(timeout=60)
        part[...] = i
        with lock:
            now -= 1

    loaded = loading.load_arrays(wanted, fill)
    assert list(loaded) == list(wanted) and all((array == i).all() for i, array in loaded.items())
    assert most == 9, f"{most} parts at a time on 8 devices"


def test_an_error_while_reading_ends_the_load():
    calls = []

    def fill(i, index, part):
        calls.append(i)
        raise OSError("the disk is gone")

    wanted = {i: wanted_array((16, 8), "sp", dp=1, sp=8) for i in range(50)}
    with pytest.raises(OSError, match="the disk is gone"):
        loading.load_arrays(wanted, fill)
    assert len(calls) < 400, f"{len(calls)} of 400 parts were tried"


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder_weights(decoder, devices, random_model):
    """Against the weights as diffusers reads them, in the layout of channels that a decoder takes."""
    config = json.loads((random_model / "vae" / "config.json").read_text())
    plan = make_decoding_plan(
        vae=config, decoder=decoder, devices=jax.devices()[:devices], dtype=jnp.float32, height=64, width=64, frames=9
    )
    vae = plan.make_decoder()
    files = decoding.weight_files(vae, str(random_model))
    weights = decoding.load_weights(files, plan.on_devices(files))
    theirs = AutoencoderKLCogVideoX.from_pretrained(random_model, subfolder="vae").decoder.state_dict()
    expected = vae.convert_weights({name: weight.numpy() for name, weight in theirs.items()})
    assert jax.tree.structure(weights) == jax.tree.structure(expected)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(expected)[0]]
    for name, ours, array in zip(names, jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True):
        assert ours.sharding == plan.split.replicated, name
        assert_same_bits(ours, array, name)
    shapes = {name: tuple(weight.shape) for name, weight in theirs.items()}
    convolution = "conv_in.conv.weight"
    assert np.moveaxis(theirs[convolution].numpy(), (0, 1), (-1, -2)).shape != shapes[convolution]
    assert any(
        array.shape == shapes[convolution][2:] + shapes[convolution][1::-1] for array in jax.tree.leaves(weights)
    )


@pytest.fixture
def weights_folder(tmp_path):
    """Write two files of weights in three dtypes, and return the model's folder and the tensors."""
    random = np.random.default_rng(0)
    dtypes = {"a": ml_dtypes.bfloat16, "b.c": np.float32, "d": np.float16, "e": np.float64}
    tensors = {name: random_bits((3, 5, 7), np.dtype(dtype), random) for name, dtype in dtypes.items()}
    (tmp_path / "vae").mkdir()
    for i, names in enumerate((("a", "d"), ("b.c", "e"))):
        path = tmp_path / "vae" / f"diffusion_pytorch_model-{i}.safetensors"
        save_file({name: tensors[name] for name in names}, path, metadata={"format": "pt"})
    shard = "diffusion_pytorch_model-{}.safetensors"
    index = {"weight_map": {"a": shard.format(0), "d": shard.format(0), "b.c": shard.format(1), "e": shard.format(1)}}
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, tensors


def test_mapped_tensors_are_those_of_safetensors(weights_folder):
    folder, tensors = weights_folder
    read = checkpoint.tensor_reader(str(folder), "vae", {name: (3, 5, 7) for name in tensors})
    for name, tensor in tensors.items():
        mapped = read(name)
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert mapped.tobytes() == tensor.tobytes(), name
        assert not mapped.flags.writeable and not mapped.flags.owndata, f"{name} is a copy"
    with safe_open(folder / "vae" / "diffusion_pytorch_model-1.safetensors", "np") as file:
        assert file.get_tensor("b.c").tobytes() == read("b.c").tobytes()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (3, 5, 7), "z": (1,)}, ("1 tensors", "z among them, which is missing")),
        ({"a": (3, 7, 5), "d": (3, 5, 7)}, ("1 tensors", "a among them, which has shape [3, 5, 7]")),
    ],
)
def test_tensors_that_do_not_fit(shapes, words, weights_folder):
    folder, _ = weights_folder
    with pytest.raises(UserError) as error:
        checkpoint.tensor_reader(str(folder), "vae", shapes)
    assert all(word in str(error.value) for word in (*words, str(folder), "get the model again")), error.value


NAME, SHARD = "diffusion_pytorch_model", "diffusion_pytorch_model{}-00001-of-00001.safetensors"
STRAYS = {
    *(f"._{NAME}.safetensors", f"{NAME}_old.safetensors", SHARD.format("-old"), SHARD.format(".ema")),
    *(SHARD.format(""), "other.safetensors"),
}


@pytest.mark.parametrize(
    ("files", "variant", "expected", "is_said"),
    [
        ({f"{NAME}.safetensors"}, None, f"{NAME}.safetensors", False),
        ({f"{NAME}.safetensors", f"{NAME}.fp16.safetensors"}, None, f"{NAME}.safetensors", False),
        ({f"{NAME}.safetensors", f"{NAME}.fp16.safetensors"}, "fp16", f"{NAME}.fp16.safetensors", False),
        ({f"{NAME}.safetensors", f"{NAME}.safetensors.index.json"}, None, SHARD.format("-new"), False),
        ({f"{NAME}.safetensors.index.ema.json", f"{NAME}.fp16.safetensors"}, "ema", SHARD.format("-new"), False),
        ({f"{NAME}.safetensors.index.ema.json"}, None, SHARD.format("-new"), True),
    ],
)
def test_which_files_are_read(files, variant, expected, is_said, tmp_path):
    (tmp_path / "vae").mkdir()
    for name in files | STRAYS:
        (tmp_path / "vae" / name).write_text(json.dumps({"weight_map": {"a": SHARD.format("-new")}}))
    said = []
    found = checkpoint.weight_files(tmp_path / "vae", variant, said.append)
    assert found == [tmp_path / "vae" / expected]
    assert said == [f"{tmp_path / 'vae'} has its weights as the variant ema alone"] * is_said


@pytest.mark.parametrize(
    ("values", "wanted", "platform", "expected"),
    [
        ({"bfloat16": 9, "float32": 1}, None, "tpu", "bfloat16"),
        ({"bfloat16": 1, "float32": 9}, None, "tpu", "float32"),
        ({"float16": 9, "float32": 1}, None, "tpu", "bfloat16"),
        ({"float16": 9}, None, "cpu", "float32"),
        ({"float16": 9}, None, "gpu", "float16"),
        ({"float16": 9}, None, None, "float16"),
        ({"float64": 9}, None, "cpu", "float32"),
        ({"float32": 9}, "float16", "tpu", "bfloat16"),
        ({"float32": 9}, "bfloat16", "cpu", "bfloat16"),
    ],
)
def test_compute_dtype(values, wanted, platform, expected):
    """A line says what is converted; the compile tool has the same rule."""
    chosen, line = compute_dtype(values, wanted, platform)
    assert chosen == expected and bool(line) == (values.keys() != {expected}), line
    if wanted and platform:
        assert programs.dtype_of(argparse.Namespace(dtype=wanted, topology=platform)) == expected


def test_truncated_file(weights_folder):
    folder, _ = weights_folder
    path = folder / "vae" / "diffusion_pytorch_model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="get the model again"):
        checkpoint.tensor_reader(str(folder), "vae", {"a": (3, 5, 7)})


@pytest.fixture
def asked_for(monkeypatch) -> list[tuple[str, int]]:
    """Let warming happen at once; return the name of the file and the offset of each piece that it asks for."""
    asked = []

    def noted(descriptor: int, begin: int, length: int, advice: int) -> None:
        asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), begin))

    monkeypatch.setattr(page_cache.os, "posix_fadvise", noted)
    monkeypatch.setattr(page_cache, "in_background", lambda function, *arguments: function(*arguments))
    return asked


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say how much memory is free")
def test_only_the_weights_that_will_be_read_are_read_ahead(weights_folder, asked_for):
    """Not other components, variants or files beside them; what is wrong is left to whoever needs it."""
    folder, _ = weights_folder
    files = sorted((folder / "vae").glob("*.safetensors"))
    (folder / "transformer").mkdir()
    for other in ("vae/other.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "transformer/a.safetensors"):
        shutil.copy(files[0], folder / other)
    page_cache.warm(str(folder), "vae")
    assert asked_for == [(file.name, 0) for file in files]
    files[0].unlink()
    for model, component in ((folder, "vae"), (folder, "text_encoder"), (folder / "nowhere", "vae")):
        page_cache.warm(str(model), component)
    assert asked_for[2:] == [(files[1].name, 0)]


def test_no_more_is_read_ahead_than_stays(tmp_path, asked_for, monkeypatch):
    monkeypatch.setattr(page_cache, "PIECE", 10)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(25))
    page_cache.read_ahead([tmp_path / "a", tmp_path / "b"], 49)
    assert asked_for == [("a", 0), ("a", 10), ("a", 20), ("b", 0), ("b", 10)]


def test_a_plan_needs_neither_torch_nor_diffusers():
    code = (
        "import sys; from cogvideox.models.vae import plan, vae_flax; "
        "from cogvideox.models.transformer import denoising; "
        "print(*{'torch', 'diffusers', 'transformers', 'torchax', 'scipy'} & sys.modules.keys())"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "", f"imported: {process.stdout}"


@pytest.mark.slow
def test_what_the_stages_import(processes):
    """No library that a stage does not need; what diffusers imports for itself is not ours to choose."""
    unneeded = {
        STAGE1: "jax diffusers",
        STAGE2: "transformers torchax flax scipy diffusers.models.transformers",
        STAGE3: "flax",
        STAGE3_FLAX: "torch diffusers transformers torchax scipy",
    }
    for script, process in processes.items():
        lines = process.stderr.splitlines()
        imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
        assert "numpy" in imported
        assert not (found := imported & set(unneeded[script].split())), f"{script} imports {found}"
        assert "  wrote " in process.stdout, process.stdout


@pytest.mark.slow
def test_imports_have_a_part_of_their_own(processes):
    """What Python says that the large libraries took is within the part of the load."""
    for script, process in processes.items():
        lines = re.findall(r"^import time: +(\d+) \|.*\| +(\w+)", process.stderr, re.M)
        large = ("torch", "diffusers", "transformers", "flax")
        seconds = sum(int(microseconds) / 1e6 for microseconds, package in lines if package in large)
        (imports,) = re.findall(r"^  load .*: imports (\S+), ", process.stdout, re.M)
        assert 0 < seconds <= float(imports) + 0.01, f"{script}: {seconds} s of imports"
