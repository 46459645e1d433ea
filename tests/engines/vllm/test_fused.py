"""The one kernel of captured graphs, where Triton is installed: interpreted on the CPU, and compiled for GPUs.

Interpreted, it is compared with the same operators in torch; compiled, for GPUs that aren't here, it isn't run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

if find_spec("triton") is None or ("triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip("needs Triton, and a process of its own; make test-vllm runs these", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which the modules below do

import torch
from test_parts import RULES, start, steering
from test_static_kernel import mixes, static_rig
from tiny import LAYERS, WIDTH, direction, read_write

from trimtab import Ablate, Add, Site, Threshold, TrimtabError
from trimtab.engines.vllm import worker
from trimtab.engines.vllm.capacity import KERNELS, Capacity
from trimtab.engines.vllm.fused import Fused, check_fused
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager

ALL = replace(KERNELS["all"], rank=8, steps=3)


def fused(capacity: Capacity, dtype: torch.dtype) -> SteeringManager:
    fused_rig = static_rig(capacity, slots=80, maps=80, dtype=dtype, captured=256)
    assert fused_rig.counts is not None
    fused_rig.fused = Fused(fused_rig.bank, fused_rig.maps, fused_rig.counts, fused_rig.kept)
    return fused_rig


@pytest.mark.parametrize(
    ("dtype", "pair"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_a_mix_is_what_torchs_operators_make_of_it(dtype: torch.dtype, pair: bool) -> None:
    """Tokens on which nothing acts, or on which there are additions alone, to the bit."""
    fused_rig, plain_rig, steerings = fused(ALL, dtype), static_rig(ALL, 80, 80, 256, dtype), mixes(4, 10)
    for each in (fused_rig, plain_rig):
        for i, what in enumerate(steerings):
            start(each, str(i), what, 3)
        each.begin(Chunks([*map(str, range(10)), "none"], [1] * 11, [1] * 11))
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        x, residual = torch.randn(2, 12, WIDTH, generator=generator).to(dtype)
        result, wanted = x.clone(), x.clone()
        fused_rig.apply(Site(layer), result, residual if pair else None)
        plain_rig.apply(Site(layer), wanted, residual if pair else None)
        near = {torch.float32: 2e-5, torch.bfloat16: 0.02}[dtype]
        torch.testing.assert_close(result, wanted, rtol=near, atol=near)
        assert torch.equal(result[10:], x[10:])
        assert plain_rig.maps is not None
        plain = plain_rig.maps.index[:12] == 0
        assert torch.equal(result[plain], wanted[plain])
        kept = fused_rig.kept[Site(layer)], plain_rig.kept[Site(layer)]
        torch.testing.assert_close(*kept, rtol=near, atol=near)
    assert fused_rig.counts is not None
    assert plain_rig.counts is not None
    assert torch.equal(fused_rig.counts._all, plain_rig.counts._all)


def test_nothing_leaks() -> None:
    """A shut gate, negative zeros and infinities; and NaN stays where it is."""
    fused_rig = fused(replace(ALL, reads=False), torch.float32)
    shut = Threshold(Site(1), direction(70), 1e9, each_token=True)
    start(fused_rig, "a", steering((1, Add(direction(1)), RULES[0])).when(shut), 3)
    start(fused_rig, "b", steering((1, read_write(2, 8), RULES[0])), 3)
    start(fused_rig, "c", steering((1, Ablate(direction(3)), RULES[0])), 3)
    fused_rig.begin(Chunks(["a", "b", "c"], [0, 0, 0], [2, 2, 1]))
    x = torch.randn(6, WIDTH)
    x[0, 0], x[1, :2], x[2], x[5] = -0.0, torch.tensor([1e30, -1e30]), torch.nan, -0.0
    result = x.clone()
    fused_rig.apply(Site(1), result, None)
    assert torch.equal(result.view(torch.int32)[[0, 1, 5]], x.view(torch.int32)[[0, 1, 5]])
    assert bool(result[3:5].isfinite().all())
    assert not torch.equal(result[3], x[3])
    assert not torch.equal(result[4], x[4])


@pytest.mark.parametrize("kernel", ["additions", "projections", "all"])
def test_an_engine_looks_whether_it_does_the_same(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is used, on the device; and it isn't where it doesn't."""
    tried_rig = static_rig(KERNELS[kernel], slots=6, maps=5, dtype=torch.bfloat16, captured=16)
    check_fused(tried_rig)
    act = Fused.act

    def wrong(self: Fused, site: Site, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        act(self, site, hidden, residual)
        hidden[-1, 0] += 0.25

    monkeypatch.setattr(Fused, "act", wrong)
    with pytest.raises(TrimtabError, match=r"at residual\[\d\] it differs from torch's operators"):
        check_fused(tried_rig)
    monkeypatch.setattr(Fused, "act", lambda *_: None)
    with pytest.raises(TrimtabError, match="it differs"):
        check_fused(tried_rig)
    worker._fuse(tried_rig)
    assert tried_rig.fused is None
    monkeypatch.setattr(Fused, "act", act)
    worker._fuse(tried_rig)
    assert tried_rig.fused is not None


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80:32", "cuda:90:32", "cuda:100:32"])
def test_it_compiles_for_gpus(target: str) -> None:
    """Without a GPU; in each of its forms, so that an engine doesn't find out when it starts."""
    script = f"""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trimtab import Site
from trimtab.engines.vllm import fused
from trimtab.engines.vllm import worker
from trimtab.engines.vllm.capacity import KERNELS
from trimtab.engines.vllm.maps import Maps
backend, arch, warp = {target!r}.split(":")
kinds = dict(hidden="*bf16", residual="*bf16", rows="*bf16", index="*i64", vectors="*fp32", numbers="*fp32",
             which="*i64", kept="*bf16", count="*i64", amount="i64", kept_rows="i32", hidden_stride="i32",
             residual_stride="i32")
for name in ("additions", "projections", "all"):
    capacity = KERNELS[name]
    maps = Maps(capacity, {{Site(0): 4096}}, 17, 8, torch.bfloat16, torch.device("cpu")) if capacity.maps else None
    given = dict(fused.constants(4096, maps), PAIR=True, ADDS=True, KEEPS=capacity.reads)
    source = ASTSource(fused.steer_token, dict(kinds, **dict.fromkeys(given, "constexpr")), given)
    made = triton.compile(source, target=GPUTarget(backend, int(arch), int(warp)))
    print(name, len(made.asm["ptx"]) > 0, "cubin" in made.asm)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == [f"{name} True True" for name in KERNELS]
