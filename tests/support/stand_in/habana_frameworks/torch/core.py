from habana_frameworks import record


def mark_step() -> None:
    record("mark_step")
