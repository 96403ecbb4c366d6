"""Read what the processor of this machine is and can do."""

from pathlib import Path

__all__ = ["lacks_bfloat16", "processor_field"]


def processor_field(name: str) -> str:
    """Read what Linux tells of the first processor under a `name`, as `"model name"`; empty where nothing is told."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def lacks_bfloat16() -> bool:
    """Tell whether this is a processor of Intel's kind without instructions that multiply numbers in bfloat16."""
    flags = processor_field("flags").split()
    return bool(flags) and not {"avx512_bf16", "amx_bf16"}.intersection(flags)
