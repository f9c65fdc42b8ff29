"""What becomes `torch.hpu`; the names are those of Habana's documentation."""

from habana_frameworks import record


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def get_device_name() -> str:
    return "STAND-IN"


def max_memory_allocated() -> int:
    return 3 * 2**30


def memory_stats() -> dict[str, int]:
    return {"Limit": 96 * 2**30, "InUse": 5 * 2**30, "MaxInUse": 3 * 2**30}


def synchronize() -> None:
    pass


def setDeterministic(value: bool) -> None:
    record(f"setDeterministic {value}")
