"""What the compiler makes of the shipped Triton kernels, per architecture; needs no GPU.

    python benchmarks/gpu/resources.py                   print the table
    python benchmarks/gpu/resources.py --write           write docs/kernels/resources.md
    python benchmarks/gpu/resources.py --only project correct --arch 90

Every kernel is compiled ahead of time with the sizes of the launch policy and the hints the
launcher's arguments give. The exit status is 1 where a configuration spills registers, asks for
more shared memory than a block may use, lacks tensor-core instructions or 16-byte loads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "kernels" / "resources.md"
ARCHS = (80, 90, 100)
# Other families: their sizes are those of sm_80 within less shared memory.
MORE_ARCHS = (86, 89, 120)

# The instructions of tensor-core products: warp, warp group (sm_90), tensor memory (sm_100).
MMA = ("HMMA", "HGMMA", "UTCHMMA")
# What the heavy products must use: mma.sync runs at a fraction of the rate on sm_90 and sm_100.
NATIVE_MMA = {90: "HGMMA", 100: "UTCHMMA"}

_FEATURES = {
    "pitch",
    "features",
    "stride_x",
    "stride_s",
    "stride_weight",
    "stride_y",
    "stride_lift",
    "chunk",
}
_SIZES = {"depth", "outputs", *_FEATURES}


@dataclass(frozen=True)
class Case:
    """One configuration of one kernel.

    Attributes:
        name: what the table calls it.
        kernel: name in ``triton_kernels`` or ``triton_cue_kernels``.
        pointers: element types of its pointers; a pointer left out is None.
        constants: its constexpr arguments.
        options: warps, and stages where the kernel has a pipelined loop.
        mma: ``"native"``, ``"any"`` or ``""``: tensor-core instructions it must have.
        wide: whether it must load 16 bytes at a time.
    """

    name: str
    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    mma: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Row:
    """What a configuration became."""

    name: str
    arch: int
    sizes: str
    registers: int
    spills: int
    shared: int
    limit: int
    mma: str
    wide_loads: int
    narrow_loads: int
    problems: list[str]


def cases(arch: int) -> Iterator[Case]:
    """Every shipped configuration for an architecture."""
    from coachhook.ops.hooked_linear import triton as launcher
    from coachhook.ops.hooked_linear import triton_cues as cues
    from coachhook.ops.hooked_linear import triton_kernels as kernels
    from coachhook.ops.hooked_linear.policy import LaunchPolicy

    policy = LaunchPolicy.for_arch(arch // 10, arch % 10)

    def project(name: str, kind: str, x: str, s: str, features: int, squares: bool) -> Case:
        tile = policy.project(kind, features)
        pointers = {"x_ptr": x, "s_ptr": s, "part_ptr": "fp32"}
        if squares:
            pointers["squares_ptr"] = "fp32"
        if kind.startswith("fused"):
            pointers |= {"weight_ptr": x, "bias_ptr": x, "y_ptr": x}
        constants = {
            "PAIR": kind.endswith("pair"),
            "GROUP": policy.group,
            "BT": tile.tokens,
            "BF": tile.width,
            "BK": tile.depth,
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        mma = "" if kind == "full" else "native"
        return Case(f"project, {name}", "_project_kernel", pointers, constants, options, mma)

    yield project("bf16 x, fp32 S", "pair", "bf16", "fp32", 128, False)
    yield project("bf16 x, fp32 S, r <= 64", "pair", "bf16", "fp32", 64, False)
    yield project("bf16 x, fp32 dense", "pair", "bf16", "fp32", 4096, True)
    yield project("fp16 x, fp32 S", "pair", "fp16", "fp32", 128, False)
    yield project("bf16 x, bf16 S", "single", "bf16", "bf16", 128, False)
    yield project("bf16 x, bf16 dense", "single", "bf16", "bf16", 4096, True)
    yield project("fp16 x, fp16 S", "single", "fp16", "fp16", 128, False)
    yield project("fp32", "full", "fp32", "fp32", 128, False)
    yield project("with W0, bf16 x, bf16 dense", "fused_single", "bf16", "bf16", 4096, True)
    yield project("with W0, fp16 x, fp32 dense", "fused_pair", "fp16", "fp32", 4096, True)

    def correct(name: str, y: str, full: bool, lift: bool, own: str = "") -> Case:
        tile = policy.correct_full if full else policy.correct
        pointers = {"y_ptr": y, "feature_ptr": "fp32", "index_ptr": "i32", "count_ptr": "i32"}
        if lift:
            pointers["lift_ptr"] = "fp32"
        if own:
            pointers |= {"winner_ptr": "i32", "magnitude_ptr": "fp32"}
        if own == "group":
            pointers["groups_ptr"] = "i64"
        constants = {
            "PRECISION": "ieee" if full else "tf32x3",
            "BT": tile.tokens,
            "BM": tile.width,
            "BK": tile.depth,
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        mma = "any" if lift and not full and own != "edit" else ""
        return Case(f"correct, {name}", "_correct_kernel", pointers, constants, options, mma)

    yield correct("bf16 y", "bf16", full=False, lift=True)
    yield correct("fp16 y", "fp16", full=False, lift=True)
    yield correct("bf16 y, own group", "bf16", full=False, lift=True, own="group")
    yield correct("bf16 y, own edit", "bf16", full=False, lift=True, own="edit")
    yield correct("bf16 y, dense", "bf16", full=False, lift=False)
    yield correct("fp32 y", "fp32", full=True, lift=True)

    per_token = {"magnitude_ptr": "fp32", "z_ptr": "fp32", "fired_ptr": "u8"}
    block = launcher._REDUCE_TOKENS, launcher._REDUCE_FEATURES
    wide_block = launcher._WIDE_TOKENS, launcher._WIDE_FEATURES
    chunks = policy.programs_per_token_tile
    for name, splits, reduction, more, (tokens, features) in (
        (f"norm of {chunks} chunks", chunks, kernels.NORM, {}, block),
        ("norm, dense", 1, kernels.NORM, {"squares_ptr": "fp32"}, block),
        ("norm of whole rows", 1, kernels.NORM, {}, wide_block),
        (f"largest of {chunks} chunks", chunks, kernels.LARGEST, {"winner_ptr": "i32"}, block),
    ):
        constants = {"SPLITS": splits, "REDUCTION": reduction.value, "BT": tokens, "BF": features}
        pointers = {"part_ptr": "fp32", **per_token, **more}
        # The squares of a token's tiles are few and start anywhere.
        wide = "squares_ptr" not in more
        options = {"num_warps": launcher._REDUCE_WARPS}
        yield Case(f"reduce, {name}", "_reduce_kernel", pointers, constants, options, wide=wide)
    group_sizes = {"BT": launcher._GROUP_TOKENS, "BF": launcher._GROUP_FEATURES}
    group = {"feature_ptr": "fp32", "groups_ptr": "i64", "magnitude_ptr": "fp32"}
    pointers = {**group, "winner_ptr": "i32"}
    options = {"num_warps": launcher._GROUP_WARPS}
    yield Case("group sums", "_group_max_kernel", pointers, group_sizes, options)

    packed = {**per_token, "mask_ptr": "u8", "cu_seqlens_ptr": "i32", "alpha_ptr": "fp32"}
    for name, scope, more in (
        ("sequence", kernels.SEQUENCE, {"state_ptr": "fp64"}),
        ("prefix", kernels.PREFIX, {"state_ptr": "fp64"}),
        ("population", kernels.POPULATION, {"mean_ptr": "fp64", "std_ptr": "fp64"}),
        ("membership", kernels.DIRECT, {}),
        ("ungated", kernels.UNGATED, {}),
    ):
        constants = {"SCOPE": scope.value, "CUED": True, "BT": launcher._GATE_TOKENS}
        pointers = {**packed, **more}
        options = {"num_warps": launcher._GATE_WARPS}
        yield Case(f"gate, {name}", "_gate_kernel", pointers, constants, options, wide=False)
    listing = {"fired_ptr": "u8", "index_ptr": "i32", "count_ptr": "i32"}
    constants = {"BT": launcher._LIST_TOKENS}
    options = {"num_warps": launcher._LIST_WARPS}
    yield Case("list", "_list_kernel", listing, constants, options, wide=False)

    sized = {"BE": cues._EDITS}
    options = {"num_warps": cues._WARPS}
    asked = {"limits_ptr": "fp32", "reaches_ptr": "i32", "gaps_ptr": "i32"}
    where = {"cu_seqlens_ptr": "i32", "state_ptr": "i64"}
    words = {"word_ptr": "i64", "entry_ptr": "i64"}
    for splits in (1, chunks):
        name = "whole" if splits == 1 else f"{splits} chunks"
        pointers = {"seen_ptr": "fp32", "limits_ptr": "fp32", "mask_ptr": "u8", **where}
        pointers = {**pointers, "word_ptr": "i64"}
        constants = {**sized, "SPLITS": splits}
        yield Case(f"cue words, {name}", "_words_kernel", pointers, constants, options, wide=False)
        pointers = {**asked, **where, **words, "part_ptr": "fp32"}
        yield Case(f"cue arm, {name}", "_arm_kernel", pointers, constants, options, wide=False)
        pointers = {"part_ptr": "fp32", "seen_ptr": "fp32", **asked, **where, "mask_ptr": "u8"}
        constants = {**constants, "SEEN_SPLITS": splits}
        yield Case(f"cue short, {name}", "_short_kernel", pointers, constants, options, wide=False)
    pointers = {**asked, **where, **words}
    options = {"num_warps": cues._READ_WARPS}
    yield Case("cue read", "_read_kernel", pointers, sized, options, wide=False)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    result = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip()}")
    return result.stdout


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"resources: cuobjdump must name {pattern}, got {text!r}")
    return int(found[1])


def compile_case(case: Case, arch: int) -> Row:
    """Compile one configuration and read what became of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coachhook.ops.hooked_linear import triton as launcher
    from coachhook.ops.hooked_linear import triton_cue_kernels, triton_kernels
    from coachhook.ops.hooked_linear.policy import LaunchPolicy

    where = triton_kernels if hasattr(triton_kernels, case.kernel) else triton_cue_kernels
    function = getattr(where, case.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(function.arg_names):
        if name in case.pointers:
            signature[name] = "*" + case.pointers[name]
            hints[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr") or name in case.constants:
            signature[name] = "constexpr"
            constants[(i,)] = case.constants.get(name)
        elif name == "alpha":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in _SIZES:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    options = {**case.options, "enable_fp_fusion": launcher._FUSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    native = NATIVE_MMA.get(arch, "HMMA")
    found = {name: count(rf"\b{name}\b") for name in MMA}
    stack = _number(r"STACK:(\d+)", usage)
    spills = stack + count(r"\bSTL\b") + count(r"\bLDL\b")
    limit = LaunchPolicy.for_arch(arch // 10, arch % 10).shared_memory
    wide = count(r"\b(?:LDG|LDGSTS)\.\S*128")
    narrow = count(r"\b(?:LDG|LDGSTS)\.\S*(?:U8|U16)\b")
    problems = []
    if spills:
        problems.append(f"{spills} spills (stack bytes and local accesses)")
    if compiled.metadata.shared > limit:
        problems.append("too much shared memory")
    if case.mma == "native" and not found[native]:
        problems.append(f"no {native}")
    if case.mma == "any" and not any(found.values()):
        problems.append("no tensor-core instruction")
    if case.wide and not wide:
        problems.append("no 16-byte loads")
    sizes = "x".join(
        str(case.constants[k]) for k in ("BT", "BF", "BM", "BK") if k in case.constants
    )
    if where is triton_cue_kernels:
        sizes = f"{where.CHUNK.value}x{case.constants['BE']}"
    sizes += f", {case.options['num_warps']} warps"
    if "num_stages" in case.options:
        sizes += f", {case.options['num_stages']} stages"
    return Row(
        case.name,
        arch,
        sizes,
        _number(r"REG:(\d+)", usage),
        spills,
        compiled.metadata.shared,
        limit,
        " ".join(f"{n} {name}" for name, n in found.items() if n) or "-",
        wide,
        narrow,
        problems,
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| kernel | sm | tile | registers | spills | KiB (limit) | tensor cores | wide loads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        shared = f"{row.shared / 1024:.4g} ({row.limit // 1024})"
        lines.append(
            f"| {row.name} | {row.arch} | {row.sizes} | {row.registers} | {row.spills} "
            f"| {shared} | {row.mma} | {row.wide_loads} |"
        )
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """``docs/kernels/resources.md``."""
    import triton

    return f"""# What the Triton kernels compile to

Written by `python benchmarks/gpu/resources.py --write` with Triton {triton.__version__}; no GPU is
needed. The gate in `tests/ops/test_triton_aot.py` compiles the same configurations and fails on a
spill, on more shared memory than a block may use, on a product without tensor-core instructions
(`HGMMA` on sm_90, `UTCHMMA` on sm_100, `HMMA` elsewhere; any of them in the correction, whose tiles
of tokens are narrow), and where no 16-byte load is left.

Tiles are tokens x features (or outputs), then x terms per step. KiB is shared memory, with the
limit of a block; wide loads are those of 16 bytes, counted in the code. Sizes and pitches are taken
as divisible by 16, as they are in the models the kernels are made for; other sizes are correct and
load narrower. float32 products run on the CUDA cores by intent: the frozen layer's do too. The gate
and the list read one value per token, the norm of a dense hook one per tile, cues rows of 32 edits,
of which there may be any number: no wide loads there.

{table(rows)}
"""


def main() -> int:
    """Compile, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = (*ARCHS, *MORE_ARCHS)
    parser.add_argument("--arch", type=int, nargs="+", default=list(every), metavar="90")
    parser.add_argument("--only", nargs="+", default=None, help="first words of configurations")
    parser.add_argument("--json", action="store_true", help="print JSON, one row a line")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    # Interpreted kernels cannot be compiled; the switch is read when triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))

    rows = []
    for case_index in range(len(list(cases(arguments.arch[0])))):
        for arch in arguments.arch:
            case = list(cases(arch))[case_index]
            if arguments.only and not any(case.name.startswith(only) for only in arguments.only):
                continue
            row = compile_case(case, arch)
            rows.append(row)
            if arguments.json:
                print(json.dumps(asdict(row)), flush=True)
            elif row.problems:
                print(f"{row.name}, sm_{row.arch}: {'; '.join(row.problems)}", flush=True)
    if arguments.write:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        import cuda_resources as cuda

        native = [r for s in cuda.SOURCES for arch in cuda.ARCHS for r in cuda.measure(s, arch)]
        TABLE.write_text(page(rows) + "\n" + cuda.section(native), encoding="utf-8")
    if not arguments.json:
        print(table(rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
