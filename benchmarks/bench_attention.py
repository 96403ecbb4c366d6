"""Scale-causal attention by every backend, beside unmasked attention and what the chip allows at most."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    copy_rate,
    describe_benchmark,
    fill_section,
    first_line,
    markdown_table,
    matrix_rate,
    print_machine,
    record_report,
    side_by_side,
)
from torch import Tensor
from tqdm import tqdm

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import add_device, make_parser

# Shape letters: B batch, A heads, N tokens of all scales, d channels of a head.

RESULTS = Path(__file__).parent / "results"
CHOICE = Path(__file__).parents[1] / "src" / "hieratok_hf" / "ops" / "attention.py"
README = Path(__file__).parent / "README.md"
BEGIN = "<!-- bench_attention.py --record writes this -->"
SCALE_FACTORS = (8, 4, 2, 1)
BACKENDS = ("sdpa_mask", "sdpa", "flex", "triton")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# A backend replaces "sdpa" in `auto` only where it is faster by more than the noise.
MARGIN = 1.03

# Side of the finest grid: images at once. 16 is that of 256x256 pixels in patches of 16.
GPU_SIZES = {8: 256, 16: 64, 32: 64, 64: 16}
CPU_SIZES = {8: 16, 16: 4, 32: 1, 64: 1}
# What tells one row from another.
ROW = ("dtype", "head_dim", "heads", "images", "grid", "gradients")
# Dtype, channels of a head, heads; the first is the one whose table is printed in full.
GPU_KINDS = [("bfloat16", 64, 12), ("float16", 64, 12), ("bfloat16", 32, 12), ("bfloat16", 128, 12)]
CPU_KINDS = [("float32", 64, 12), ("float32", 32, 4), ("bfloat16", 64, 12)]


def with_gradients(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    attended = attend(*leaves)
    return attended, *torch.autograd.grad(attended, leaves, upstream)


def work(layout: PyramidLayout, images: int, heads: int, head_dim: int, backward: bool) -> tuple[int, int]:
    """FLOPs of the visible scores, and numbers that must be read or written at least."""
    visible = sum(length * end for length, end in zip(layout.lengths, layout.ends))
    # Products of matrices: scores and values; backward both again, and of them three gradients more.
    products, tensors = (7, 12) if backward else (2, 4)
    width = images * heads * head_dim
    return 2 * products * visible * width, tensors * layout.num_tokens * width


def mistakes(results: tuple[Tensor, ...], leaves: list[Tensor], upstream: Tensor, layout: PyramidLayout) -> list[str]:
    """Which of the output and the gradients differ from the reference, for two heads of the first and last image."""
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    wrong = []
    for image in (0, -1):
        few = [x[image, :2][None].detach().float().requires_grad_(len(results) > 1) for x in leaves]
        expected = [scale_causal_attention(*few, layout, backend="reference")]
        if len(results) > 1:
            expected += torch.autograd.grad(expected[0], few, upstream[image, :2][None].float())
        for name, actual, right in zip(names, results, expected):
            error = ((actual[image, :2][None].float() - right).norm() / right.norm()).item()
            if not error < TOLERANCES[leaves[0].dtype]:
                wrong.append(f"{name} off by {error:.1e}")
    return wrong


def measure(
    device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, side: int, images: int, backward: bool,
    backends: tuple[str, ...], rates: dict[str, float], budget: float,
) -> dict[str, Any]:  # fmt: skip
    """One row: every backend at one size. Raises where a result is wrong."""
    layout = PyramidLayout.from_grid(side, side, SCALE_FACTORS)
    shape = (images, layout.num_tokens, heads, head_dim)
    # As the model has them: heads beside channels in memory.
    leaves = [torch.randn(shape, device=device).to(dtype).transpose(1, 2).requires_grad_(backward) for _ in range(3)]
    upstream = torch.randn(shape, device=device).to(dtype).transpose(1, 2)

    calls: dict[str, Callable[[], Any]] = {}
    memory, absent = {}, {}
    for name in (*backends, "full"):
        is_full = name == "full"  # every token sees every token: the price without a mask
        masked = partial(scale_causal_attention, layout=layout, backend=name)
        attend = F.scaled_dot_product_attention if is_full else masked
        call = partial(with_gradients, attend, leaves, upstream) if backward else partial(_once, attend, leaves)
        try:
            results = call()
        except Exception as error:  # compilers raise all kinds, and one that fails says nothing of the others
            if name in ("sdpa_mask", "sdpa"):  # what the others are compared with
                raise
            absent[name] = first_line(error)
            continue
        if not is_full and (wrong := mistakes(results, leaves, upstream, layout)):
            raise AssertionError(f"{name}, {dtype}, {layout.num_tokens} tokens: {', '.join(wrong)}")
        del results
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            memory[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        calls[name] = call

    seconds = side_by_side(calls, device, budget)
    flops, numbers = work(layout, images, heads, head_dim, backward)
    seconds["floor"] = max(flops / rates["flops"], numbers * dtype.itemsize / rates["bytes"])
    row: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim, "heads": heads, "images": images,
        "grid": [side, side], "tokens": layout.num_tokens, "gradients": backward,
        "bound": "arithmetic" if flops / rates["flops"] == seconds["floor"] else "memory",
        "of_sdpa_mask": {name: round(value / seconds["sdpa_mask"], 4) for name, value in seconds.items()},
        "absent": absent,
    }  # fmt: skip
    if device.type == "cuda":
        row["milliseconds"] = {name: round(value * 1e3, 4) for name, value in seconds.items()}
        row["tflops"] = {name: round(flops / value / 1e12, 1) for name, value in seconds.items()}
        row["peak_mib"] = memory
    return row


def _once(attend: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (attend(*leaves),)


def fastest(row: dict[str, Any]) -> str:
    """The backend that `auto` should take at this row's size: the same one in both passes, or `"sdpa"`."""
    winners = set()
    for ratios in (row["of_sdpa_mask"], row["of_sdpa_mask_again"]):
        times = {name: value for name, value in ratios.items() if name in BACKENDS}
        best = min(times, key=times.__getitem__)
        winners.add(best if times[best] * MARGIN < times["sdpa"] else "sdpa")
    return winners.pop() if len(winners) == 1 else "sdpa"


def choices(reports: list[dict[str, Any]]) -> dict[tuple[str, str, int, bool], dict[int, str]]:
    """Compute the entries of `hieratok_hf.ops.attention.FASTEST` from these reports."""
    table: dict[tuple[str, str, int, bool], dict[int, str]] = {}
    for report in sorted(reports, key=lambda report: report["machine"]["kind"]):
        for row in report["rows"]:
            key = (report["machine"]["kind"], row["dtype"], row["head_dim"], row["gradients"])
            table.setdefault(key, {})[row["tokens"]] = fastest(row)
    return table


def record() -> None:
    """Write the choices of all recorded results into the package, and their table into the README beside this."""
    reports = recorded()
    lines = ["FASTEST: dict[tuple[str, str, int, bool], dict[int, str]] = {"]
    for key, row in choices(reports).items():
        kind, dtype, head_dim, gradients = key
        entries = ", ".join(f'{tokens}: "{backend}"' for tokens, backend in row.items())
        lines.append(f'    ("{kind}", "{dtype}", {head_dim}, {gradients}): {{{entries}}},')
    head, _, rest = CHOICE.read_text().partition("FASTEST: dict")
    tail = rest[rest.index("}\n") + 2 :]
    CHOICE.write_text(head + "\n".join([*lines, "}", ""]) + tail)
    README.write_text(fill_section(README.read_text(), BEGIN, markdown(reports)))
    print(f"recorded {len(lines) - 1} rows of {len(reports)} reports in {CHOICE.name}")


def table(row: dict[str, Any]) -> str:
    """A row of results as lines of text."""
    what = "forward and backward" if row["gradients"] else "forward"
    lines = [
        f"{row['dtype']}, {row['images']} images, {row['heads']} heads of {row['head_dim']}, {row['tokens']} tokens "
        f"({row['grid'][0]}x{row['grid'][1]} finest), {what}; the floor is {row['bound']}"
    ]
    for name, ratio in row["of_sdpa_mask"].items():
        line = f"    {name:12}{ratio:8.3f} of sdpa_mask{row['of_sdpa_mask_again'][name]:8.3f} again"
        if "milliseconds" in row:
            line += f"{row['milliseconds'][name]:12.4f} ms{row['tflops'][name]:9.1f} TFLOP/s"
            line += f"{row['peak_mib'][name]:10.1f} MiB" if name in row["peak_mib"] else ""
        lines.append(line + ("   <- auto" if name == fastest(row) else ""))
    lines += [f"    {name:12}absent: {reason}" for name, reason in row["absent"].items()]
    return "\n".join(lines)


def markdown(reports: list[dict[str, Any]]) -> str:
    """The recorded results as the table of benchmarks/README.md: time of each backend over that of `sdpa_mask`."""
    rows = []
    for report in reports:
        for row in report["rows"]:
            cells = [report["machine"]["kind"], row["dtype"], row["head_dim"], row["tokens"]]
            cells.append("forward, backward" if row["gradients"] else "forward")
            first, again = row["of_sdpa_mask"], row["of_sdpa_mask_again"]
            for name in ("sdpa", "flex", "triton", "full"):
                cells.append(f"{first[name]:.2f}, {again[name]:.2f}" if name in first else "")
            cells += [f"{first['floor']:.2f}", fastest(row)]
            rows.append(cells)
    head = "| machine | dtype | head | tokens | pass | sdpa | flex | triton | unmasked | floor | auto |"
    return markdown_table(head, rows)


def recorded() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("attention_*.json"))]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_device(parser)
    add("--sides", type=int, nargs="+", help="take only these sides of the finest grid")
    add("--kinds", type=int, nargs="+", help="take only these kinds of dtype and head, counted from 0")
    add("--backends", nargs="+", choices=BACKENDS, help="backends to time; all that suit the device unless given")
    add("--seconds", type=float, help="time for each row; 0.3 on a GPU, 2 on a CPU unless given")
    add("--json", action="store_true", help="write results/attention_KIND.json, after each kind")
    add("--markdown", action="store_true", help="measure nothing, print what is recorded as a table")
    add("--record", action="store_true", help="let `auto` follow the recorded results")
    args = parser.parse_args(argv)
    if args.markdown:
        print(markdown(recorded()))
        return 0
    device = find_device(args)
    on_gpu = device.type == "cuda"
    sizes, kinds = (GPU_SIZES, GPU_KINDS) if on_gpu else (CPU_SIZES, CPU_KINDS)
    backends = tuple(args.backends or (BACKENDS if on_gpu else ("sdpa_mask", "sdpa")))
    if "sdpa_mask" not in backends or "sdpa" not in backends:
        parser.error("--backends must name sdpa_mask and sdpa, which the others are compared with")
    budget = args.seconds if args.seconds is not None else (0.3 if on_gpu else 2)
    torch.manual_seed(0)

    bytes_a_second = copy_rate(device)
    about = describe_benchmark(device)
    print_machine(about)
    for place, (dtype, head_dim, heads) in enumerate(kinds):
        if place not in (args.kinds or range(len(kinds))):
            continue
        rate = matrix_rate(device, getattr(torch, dtype))
        measured = {"copy_gb_per_s": round(bytes_a_second / 1e9, 1), f"{dtype}_tflops": round(rate / 1e12, 3)}
        print(", ".join(f"{key} {value}" for key, value in measured.items()))
        # Compiling takes most of the time, so the table that is printed in full has all, the others what may win.
        chosen = tuple(name for name in backends if place == 0 or name != "flex")
        rates = {"flops": rate, "bytes": bytes_a_second}
        tasks = [
            (device, getattr(torch, dtype), head_dim, heads, side, images, backward, chosen, rates, budget)
            for side, images in sizes.items()
            for backward in (False, True)
            if side in (args.sides or sizes)
        ]
        try:
            # Two passes, because what disturbs a machine for a while disturbs all of a row.
            rows, again = ([measure(*task) for task in tqdm(tasks)] for _ in range(2))
        except AssertionError as error:
            print(f"error: wrong results, so nothing is reported: {error}", file=sys.stderr)
            return 1
        for row, second in zip(rows, again):
            row["of_sdpa_mask_again"] = second["of_sdpa_mask"]
        print("\n".join(map(table, rows)), flush=True)
        if args.json:
            report = {"machine": about, "scale_factors": SCALE_FACTORS, "measured_rates": measured, "rows": rows}
            record_report(RESULTS, "attention", report, ROW)
    if args.record:
        record()
    return 0


if __name__ == "__main__":
    sys.exit(main())
