"""The tables of docs/results.md that `accelerator.py` measures."""

from markdown_table import markdown, measured_with


def accelerator(data: dict, output: str) -> str:
    """The steps, and what else was measured."""
    by_section: dict[str, list[dict]] = {}
    for row in data["rows"]:
        by_section.setdefault(row["section"], []).append(row)
    titles = {"steps": "", "batch_norm": "B1, batch 256, target, BatchNorm ", "search": "search, "}
    timed = [
        (title + r["name"], r)
        for section, title in titles.items()
        for r in by_section.get(section, [])
    ]
    paragraphs = [_steps(timed), _others(by_section)]
    if "forms" in by_section:
        paragraphs.append(_steps([(r["name"], r) for r in by_section["forms"]], "B1, batch 256"))
    facts = measured_with(data["environment"], "jax", "torch")
    paragraphs.append(f"`python benchmarks/accelerator.py{output}`: {facts}.")
    return "\n\n".join(paragraphs)


def _steps(timed: list[tuple[str, dict]], title: str = "training step") -> str:
    rows = [
        (
            name,
            f"{r['milliseconds']:.1f}",
            f"{r['images_per_second']:,.0f}",
            f"{100 * r['mfu']:.1f}" if "mfu" in r else "",
            f"{r['program_bytes'] / 1e9:.2f}" if "program_bytes" in r else "",
        )
        for name, r in timed
    ]
    return markdown((title, "ms", "images/s", "MFU %", "program GB"), rows)


def _others(by_section: dict[str, list[dict]]) -> str:
    rows = []
    for r in by_section.get("randaugment", []):
        families = ("look_up", "blend", "cut_out", "move")
        apart = ", ".join(f"{name} {r[f'{name}_milliseconds']:.2f}" for name in families)
        rows.append((f"RandAugment on the device, {r['name']}", f"{r['milliseconds']:.2f} ms"))
        rows.append(("its families of operations alone", f"{apart} ms"))
    for r in by_section.get("training", []):
        rates = f"{r['images_per_second']:,.0f} against {r['without_input']:,.0f}"
        rows.append(
            (
                "`train.py` with raug15 on JPEG files against its step on one batch, images/s",
                f"{rates} ({r['share']:.3f}), {r['input_wait']:.1%} of the time waiting",
            )
        )
    for r in by_section.get("small_set", []):
        ways = (f"{r[f'{way}_images_per_second']:,.0f}" for way in ("host", "device", "bare"))
        what = (
            "32 px, 28 layers, 25,000 images, evaluation and checkpoint after every epoch, "
            "images/s: from the host / on the device / bare steps"
        )
        rows.append((what, " / ".join(ways)))
    for r in by_section.get("search", []):
        rows.append(("240 epochs of 50,000 images of that search", f"{r['minutes']:.1f} minutes"))
    return markdown(("what", "figure"), rows)
