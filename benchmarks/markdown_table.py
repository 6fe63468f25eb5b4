"""What all tables of results share: their form, and the machine that they were measured on."""

import statistics


def markdown(header, rows) -> str:
    """A table; the first column is words, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def over_seeds(values: list[float], digits: int = 1) -> str:
    """The mean, and the standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def gpu(environment: dict) -> str | None:
    """The GPU that was used. None: only the processor was."""
    (device,) = set(environment.get("devices", ["cpu"]))
    return None if device == "cpu" else device


def machine(environment: dict) -> str:
    """The GPU, or the processor and its cores."""
    return gpu(environment) or f"{environment['cpu']}, {environment['cores']} cores"


def measured_with(environment: dict, *packages: str) -> str:
    """Machine, versions and commit."""
    facts = [machine(environment), *(f"{p} {environment['versions'][p]}" for p in packages)]
    if environment.get("commit"):
        changed = " with changes" if environment.get("uncommitted_changes") else ""
        facts.append(f"commit {environment['commit']}{changed}")
    return ", ".join(facts)
