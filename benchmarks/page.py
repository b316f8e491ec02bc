"""How results are shown: as a line, and as a page to be posted."""

from collections.abc import Iterator, Mapping

MODEL = "CogVideoX1.5-5B"  # of results that do not name theirs
DIFFUSERS = "diffusers: "  # before the name of a row that is diffusers' own


def text_of(found: Mapping) -> str:
    """Return the result of an entry as one line."""
    status = found["status"]
    if "figure" in found:
        figure = "not finite" if found["figure"] is None else f"{found['figure']:.1e}"
        return f"{status}: {figure}, tolerance {found['tolerance']:.1e}; {found['note']}"
    if status == "measured":
        beside = f"; predicted {found['predicted_seconds']:.3g} s" if found["predicted_seconds"] else ""
        note = f"; {found['note']}" if "note" in found else ""
        return f"{found['seconds']:.4g} s ({found['least']:.4g} to {found['most']:.4g}){beside}{note}"
    return f"{status}: {found['message']}" if "message" in found else status


def as_markdown(content: Mapping) -> str:
    """Return the results as a page to be posted."""

    def cell(found: Mapping, name: str, form: str = ".3g") -> str:
        return "-" if found.get(name) is None else format(found[name], form)

    made, found = content["made_with"], content["entries"]
    lines = [
        f"# {made.get('model', MODEL)} on {made['devices']}",
        "",
        f"Begun {content['begun']}; sources {made['source files']}.",
        "",
    ]
    lines += [", ".join(f"{name} {version}" for name, version in made["versions"].items()) + ".", ""]
    lines += ["| check | result | figure | tolerance | note |", "| --- | --- | --- | --- | --- |"]
    for name, one in found.items():
        if one["kind"] == "check":
            figures = [cell(one, "figure", ".1e"), cell(one, "tolerance", ".1e")]
            note = one.get("note") or one.get("message", "")
            lines.append(f"| {name} | {one['status']} | {' | '.join(figures)} | {note} |")
    lines += ["", "Seconds (predicted; median measured; least and most) and GiB of a chip. Peak is -, if it was not"]
    lines += ["higher than in something before.", ""]
    columns = ["predicted", "measured", "spread", "measured / predicted", "the original project measured"]
    columns += ["compilation", "GiB: predicted", "allotted here", "in use", "peak", "note"]
    lines += [f"| row | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, one in found.items():
        if one["kind"] == "row" and one["status"] == "measured":
            spread = f"{one['least']:.3g} to {one['most']:.3g}"
            ratio = one["seconds"] / one["predicted_seconds"] if one["predicted_seconds"] else None
            cells = [cell(one, "predicted_seconds"), cell(one, "seconds"), spread, cell({"ratio": ratio}, "ratio")]
            cells += [cell(one, "original_seconds"), cell(one, "compile_seconds")]
            cells += [cell(one, f"{what}_gib", ".2f") for what in ("predicted", "allotted", "in_use", "peak")]
            cells.append(one.get("note", ""))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        elif one["kind"] == "row":
            lines.append(f"| {name} | - | {text_of(one)} |" + " - |" * (len(columns) - 2))
    return "\n".join(lines + side_by_side(found)) + "\n"


def pairs(entries: Mapping[str, Mapping]) -> Iterator[tuple[str, Mapping, Mapping]]:
    """Yield the name of each row that diffusers has too, its result, and that of diffusers, both measured."""
    rows = {name: one for name, one in entries.items() if one["kind"] == "row" and one["status"] == "measured"}
    for name, ours in rows.items():
        for theirs in rows:
            row = theirs.removeprefix(DIFFUSERS)
            if row != theirs and (name == row or name.startswith(f"{row},")):  # after the comma there is our decoder
                yield name, ours, rows[theirs]


def side_by_side(entries: Mapping[str, Mapping]) -> list[str]:
    """Return the lines of the table of our rows beside those of diffusers; none without such rows."""
    lines = ["", "Beside diffusers in torch on one device: seconds, medians; GiB of a device, diffusers' at its peak,"]
    lines += ["ours as the compiler allots them.", ""]
    lines += ["| row | diffusers | this project | diffusers / this project | GiB: diffusers | this project |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    rows = []
    for name, ours, theirs in pairs(entries):
        gib = ["-" if size is None else f"{size:.2f}" for size in (theirs["peak_gib"], ours["allotted_gib"])]
        seconds = [theirs["seconds"], ours["seconds"], theirs["seconds"] / ours["seconds"]]
        rows.append(f"| {name} | {' | '.join(f'{value:.3g}' for value in seconds)} | {' | '.join(gib)} |")
    return lines + rows if rows else []
