"""The formulas beside those of libraries that nobody here wrote, bit by bit, on random bytes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from moe_core import QuantSpec, ScaleFormat, formats

E4M3 = "float8_e4m3fn"
BLOCK, CHANNEL, TENSOR = (QuantSpec(E4M3, group) for group in ((128, 128), (1, -1), (-1, -1)))
NVFP4 = QuantSpec("float4_e2m1", (1, 16), ScaleFormat.E4M3, second_level=True)


@pytest.fixture(scope="module")
def ct() -> Any:
    """compressed-tensors, with a shorter way to its arguments."""
    pytest.importorskip("loguru", reason="compressed-tensors is not installed whole: pip install moe-core[oracles]")
    pytest.importorskip("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import compressed_tensors.quantization as quantization
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
        from compressed_tensors.quantization.lifecycle import forward

    class Library:
        compressor = staticmethod(BaseCompressor.get_value_from_registry)
        block_dequantizer = FP8BlockDequantizer
        quantize = staticmethod(forward.quantize)

        @staticmethod
        def args(**settings: Any) -> Any:
            return quantization.QuantizationArgs(type="float", symmetric=True, **settings)

        @staticmethod
        def scheme(**settings: Any) -> Any:
            return quantization.QuantizationScheme(targets=["Linear"], weights=Library.args(**settings))

    return Library


def random_fp8(*shape: int) -> torch.Tensor:
    """Every finite e4m3 byte, and NaN nowhere: `nan == nan` is another test."""
    codes = torch.randint(0, 127, shape, dtype=torch.uint8) | (torch.randint(0, 2, shape, dtype=torch.uint8) << 7)
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (128, 72), (1, 1)])
def test_block_fp8_as_compressed_tensors_reads_deepseek(ct, shape):
    torch.manual_seed(0)
    q, scale = random_fp8(*shape), torch.rand(formats.scale_shape((128, 128), *shape)) * 0.01
    theirs = ct.block_dequantizer(targets=["re:.*"], dtype=torch.float32).process(
        {"m.weight": q.clone(), "m.weight_scale_inv": scale.clone()}
    )["m.weight"]
    assert torch.equal(formats.dequantize(q, scale, BLOCK), theirs)


def test_block_fp8_as_transformers_reads_it():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    q, scale = random_fp8(256, 384), torch.rand(2, 3) * 0.01
    library = finegrained.Fp8Dequantize(None)
    assert torch.equal(formats.dequantize(q, scale, BLOCK), library._dequantize_one(q, scale, torch.float32))
    exponents = torch.randint(100, 140, (2, 3), dtype=torch.uint8)
    theirs = library._dequantize_one(q, exponents, torch.float32)
    assert torch.equal(formats.dequantize(q, formats.decode_ue8m0(exponents), BLOCK), theirs)


@pytest.mark.parametrize(
    ("spec", "strategy", "shape"), [(CHANNEL, "channel", (48, 1)), (TENSOR, "tensor", (1,))], ids=["channel", "tensor"]
)
def test_fp8_as_compressed_tensors_decompresses_it(ct, spec, strategy, shape):
    torch.manual_seed(0)
    q, scale = random_fp8(48, 80), torch.rand(shape) * 0.01
    library = ct.compressor("float-quantized")
    theirs = library.decompress({"weight": q, "weight_scale": scale}, ct.scheme(num_bits=8, strategy=strategy))
    ours = formats.dequantize(q, scale.reshape(formats.scale_shape(spec.group_shape, 48, 80)), spec)
    assert torch.equal(ours, theirs["weight"])


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (CHANNEL, {"strategy": "channel"}),
        (QuantSpec(E4M3, (1, 128)), {"strategy": "group", "group_size": 128}),
        (BLOCK, {"strategy": "block", "block_structure": [128, 128]}),
    ],
    ids=["channel", "group", "block"],
)
def test_fp8_codes_are_those_of_compressed_tensors(ct, spec, settings):
    torch.manual_seed(0)
    x = torch.randn(256, 384) * torch.logspace(-2, 2, 256).unsqueeze(1)
    q, scale = formats.quantize(x, spec)
    theirs = ct.quantize(x, scale, torch.zeros_like(scale), ct.args(num_bits=8, **settings), dtype=torch.float8_e4m3fn)
    assert torch.equal(q.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("settings", [{"strategy": "channel"}, {"strategy": "token", "dynamic": True}])
def test_fp8_scales_are_those_of_compressed_tensors(ct, settings):
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.logspace(-4, 4, 64).unsqueeze(1)
    amin, amax = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    theirs, _ = calculate_qparams(amin, amax, ct.args(num_bits=8, **settings))
    assert torch.equal(formats.quantize(x, CHANNEL)[1], theirs)


def random_nvfp4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    return packed, torch.randint(0, 127, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_nvfp4_as_torchao_dequantizes_modelopts():
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    torch.manual_seed(0)
    packed, scale = random_nvfp4(64, 128)
    top = torch.tensor(0.00037)
    tensor = module.NVFP4Tensor(packed, scale, 16, torch.float32, per_tensor_scale=top)
    assert torch.equal(formats.dequantize(packed, scale, NVFP4, top.double()), tensor.dequantize(torch.float32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_e2m1_codes_are_those_of_torchao():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4000) * 3, torch.arange(-32, 33) / 4, torch.zeros(3)]).reshape(-1, 2)
    theirs = kernels.pack_uint4(kernels.f32_to_f4_unpacked(x))
    assert torch.equal(formats.pack_e2m1(x), theirs)


def test_nvfp4_as_compressed_tensors_decompresses_it(ct):
    """Exactly, in the bf16 that the library answers in: it divides by the inverse that the checkpoint holds."""
    torch.manual_seed(0)
    library = ct.compressor("nvfp4-pack-quantized")
    scheme = ct.scheme(num_bits=4, strategy="tensor_group", group_size=16)
    for inverse in (torch.rand(20) * 5000 + 100).split(1):
        packed, scale = random_nvfp4(32, 128)
        sent = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": inverse}
        theirs = library.decompress(sent, scheme)["weight"]
        ours = formats.dequantize(packed, scale, NVFP4, 1 / inverse.double())
        assert torch.equal(ours.to(theirs.dtype), theirs)


def test_nvfp4_activations_are_those_of_compressed_tensors(nvfp4_of_the_library):
    """W4A4: group scales from the data under the checkpoint's inverse global scale, then the codes."""
    torch.manual_seed(0)
    x = torch.randn(40, 96) * torch.logspace(-1, 1, 40).unsqueeze(1)
    for inverse in (torch.rand(10) * 300 + 20).split(1):
        ours = formats.quantize_dequantize(x, NVFP4, global_scale=1 / inverse.double())
        assert torch.equal(ours, nvfp4_of_the_library(x, inverse.item()))
